"""What ships beside the code and must agree with it: the generated pages of the manual."""

__all__: list[str] = []
