"""`python -m rkmetrics`: the command line."""

from rkmetrics.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    raise SystemExit(main())
