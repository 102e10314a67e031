"""Routes for any ASGI application: `routes()` for its route list, `app()` to mount, `Middleware` around it all."""

from __future__ import annotations

from rkmetrics.asgi.app import Application, Middleware, app, routes

__all__ = ["Application", "Middleware", "app", "routes"]
