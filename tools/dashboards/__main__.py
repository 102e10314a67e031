"""`python -m tools.dashboards [--check]`: write dashboards/*.json, or name the files that are not as they would be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.dashboards import BOARDS, board
from tools.dashboards.render import rendered

__all__ = ["main", "stale"]

FOLDER = Path(__file__).resolve().parents[2] / "dashboards"


def stale(folder: Path) -> dict[str, str]:
    """Return the files that are not, byte for byte, what the builder makes: their names and what they should be."""
    made = {f"{name}.json": rendered(board(name)) for name in BOARDS}
    return {name: text for name, text in made.items() if _read(folder / name) != text.encode()}


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if something is stale and is only to be checked, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.dashboards", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file would change")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are")
    options = parser.parse_args(arguments)
    changed = stale(options.folder)
    for name, text in changed.items():
        print(name)
        if not options.check:
            (options.folder / name).write_text(text, encoding="utf-8")
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
