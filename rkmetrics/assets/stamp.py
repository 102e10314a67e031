"""Keep the version of the catalogue that is written in the rules: RkMetricsCatalogMismatch compares exporters with it.

The rule and its tests hold the version as text, since Prometheus can compare a label with nothing else. So a change of
the catalogue changes these files too; `rkmetrics assets docs` does it, and a test says when somebody forgot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rkmetrics.catalogue import catalog_version

__all__ = ["STAMPED", "stale", "write"]

# Below the folder of the rules; the first one says what the others repeat.
STAMPED = ("exporter.yaml", "tests/exporter_test.yaml")
_STAMP = re.compile(r'rkmetrics_build_info\{catalog!="([0-9a-f]{8})"\}')


def write(folder: Path) -> list[Path]:
    """Bring the rules in a folder up to date; return the files that changed."""
    changed = dict(_changes(folder))
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return list(changed)


def stale(folder: Path) -> list[Path]:
    """Return the files that hold another version than the catalogue's."""
    return [path for path, _ in _changes(folder)]


def _changes(folder: Path) -> Iterator[tuple[Path, str]]:
    texts = {path: path.read_text(encoding="utf-8") for name in STAMPED if (path := folder / name).is_file()}
    stamps = [match[1] for text in texts.values() for match in _STAMP.finditer(text)]
    for path, text in texts.items():
        new = text.replace(stamps[0], catalog_version()) if stamps else text
        if new != text:
            yield path, new
