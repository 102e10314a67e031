"""Pages for a browser: the preview of dashboards. Static files, the plot library beside them, and their routes."""

from __future__ import annotations

__all__: list[str] = []
