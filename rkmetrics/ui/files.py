"""The static files of pages, read once. Whatever lies under pages/ is served; nothing else can be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rkmetrics.asgi.base import Guard, Request, Response, Route
from rkmetrics.catalogue.exporter import Route as RouteName
from rkmetrics.ui.base import CONTENT_TYPES, page

__all__ = ["PAGES", "static_routes"]

PAGES = Path(__file__).parent / "pages"


def static_routes(folders: tuple[str, ...], home: str, guard: Guard) -> Iterator[Route[Any]]:
    """Yield a route for each file of the folders, and "/" for the page at `home`."""
    for folder in folders:
        for path in sorted((PAGES / folder).rglob("*")):
            if path.suffix in CONTENT_TYPES:
                yield _route(f"/{path.relative_to(PAGES).as_posix()}", path, guard)
    yield _route("/", PAGES / home, guard)


def _route(address: str, path: Path, guard: Guard) -> Route[Any]:
    response = page(path.read_bytes(), CONTENT_TYPES[path.suffix])

    def answer(_: object, __: Request) -> Response:
        return response

    return Route(address, RouteName.OTHER, answer, gated=False, guard=guard)
