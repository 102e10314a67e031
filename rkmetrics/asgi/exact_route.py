"""The one place that knows Starlette's classes; loaded by `rk.asgi.routes()` only."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.routing import Match, Route

from rkmetrics.asgi.base import is_exact

__all__ = ["ExactRoute"]


class ExactRoute(Route):
    """A route for exactly its path: no redirect from /metrics/, no %-escapes, no final newline (T7)."""

    def __init__(self, path: str, endpoint: Callable[..., Any], name: str) -> None:
        super().__init__(path, endpoint, name=name, include_in_schema=False)
        self._end = path[path.rindex("/") :]

    def matches(self, scope: MutableMapping[str, Any]) -> tuple[Match, MutableMapping[str, Any]]:
        """Return how the route matches. The router asks again without the final slash, to redirect there."""
        if (
            scope["type"] == "http"
            and str(scope["path"]).endswith(self._end)
            and is_exact(self._end, scope.get("raw_path"))
        ):
            return super().matches(scope)
        return Match.NONE, {}
