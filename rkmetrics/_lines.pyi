from collections.abc import Sequence

__all__ = ["encode", "number"]

def number(value: float, /) -> bytes: ...
def encode(
    head: bytes,
    pres: tuple[bytes, ...],
    posts: tuple[bytes, ...],
    names: tuple[str, ...],
    values: Sequence[float],
    bounds: int,
    width: int,
    tails: tuple[tuple[int, bytes], ...] = ...,
    /,
) -> bytes: ...
