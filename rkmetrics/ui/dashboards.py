"""Dashboards as the preview serves them: files in Grafana's classic JSON, found by a name that fits into an address.

A file is read anew at each request: who edits a dashboard sees it by loading the page again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from rkmetrics.errors import AssetError, ServeError

__all__ = ["SHIPPED", "Dashboard", "find", "read"]

SHIPPED = Path(__file__).resolve().parents[1] / "shipped" / "dashboards"
LIMIT_BYTES = 8 * 1024 * 1024


class Dashboard(NamedTuple):
    """A dashboard as it was when the preview began. key: its uid as far as an address can carry it."""

    key: str
    title: str
    description: str
    path: Path


def find(paths: Iterable[Path]) -> Mapping[str, Dashboard]:
    """Return the dashboards in files and folders by key, in the order of their titles.

    Raises AssetError for a file that is no dashboard, and ServeError when there is none, or two of one uid.
    """
    found: dict[str, Dashboard] = {}
    for path in _files(paths):
        model = read(path)
        key = re.sub(r"[^A-Za-z0-9_-]+", "-", str(model.get("uid") or path.stem))
        if key in found:
            raise ServeError(f"{path} and {found[key].path} have one uid, {key!r}; name one of them")
        found[key] = Dashboard(key, *_texts(model, path), path)
    if not found:
        raise ServeError(f"no dashboard in {', '.join(map(str, paths))}; name JSON files, or a folder of them")
    return dict(sorted(found.items(), key=lambda item: item[1].title))


def _texts(model: Mapping[str, Any], path: Path) -> tuple[str, str]:
    return str(model.get("title") or path.stem), str(model.get("description") or path.name)


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        yield from sorted(path.glob("*.json")) if path.is_dir() else [path]


def read(path: Path) -> dict[str, Any]:
    """Return what is in a file. Raises AssetError when it is no dashboard in the classic form."""
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise AssetError(str(path), 1, 1, f"more than {LIMIT_BYTES} bytes")
        model = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AssetError(str(path), error.lineno, error.colno, f"not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise AssetError(str(path), 1, 1, f"cannot be read: {reason}") from None
    found = cast("dict[str, Any]", model) if isinstance(model, dict) else {}
    if not isinstance(found.get("panels"), list):
        raise AssetError(str(path), 1, 1, "no Grafana dashboard in the classic form (it has no list of panels)")
    return found
