"""`rkmetrics preview`: dashboards in a browser, for who has Prometheus and no Grafana.

    GET /                      the page
    GET /preview/, /vendor/    its files
    GET /dashboards            what there is to show, and how often Prometheus scrapes
    GET /dashboards/{key}      one of them, as it is in its file
    GET /api/v1/...            the closed list of `rkmetrics.ui.prometheus`

All the knowledge of dashboards is in the page (pages/preview/), all the knowledge of the network here. Addresses are
relative, so that it works behind any prefix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from rkmetrics.asgi.base import JSON, Guard, Later, Request, Response, Route
from rkmetrics.catalogue.exporter import Route as RouteName
from rkmetrics.errors import AssetError
from rkmetrics.ui.base import PAGE_HEADERS, KnownHosts, under
from rkmetrics.ui.dashboards import Dashboard, read
from rkmetrics.ui.files import static_routes
from rkmetrics.ui.prometheus import CALLS, Prometheus, refusal

__all__ = ["routes"]

FOLDERS = ("preview", "vendor")


def routes(
    dashboards: Mapping[str, Dashboard],
    prometheus: Prometheus,
    *,
    scrape_interval_seconds: float = 15.0,
    names: Iterable[str] = (),
    prefix: str = "",
) -> Mapping[str, Route[Any]]:
    """Return the rows to hand to `rk.serve(more=...)` or `rk.asgi.app(more=...)`.

    scrape_interval_seconds: what $__rate_interval counts with, as Grafana's data source has it. names: under which
    browsers may know this server, beside localhost and addresses. prefix: where they lie, for a proxy that leaves it.
    """
    names = tuple(names)
    api = KnownHosts(names)
    listed = _json({"dashboards": [_listed(each) for each in dashboards.values()], "prometheus": prometheus.shown,
                    "scrapeIntervalSeconds": scrape_interval_seconds})  # fmt: skip
    rows = [
        *static_routes(FOLDERS, "preview/index.html", KnownHosts(names, navigable=True)),
        _row("/dashboards", lambda _: listed, api),
        _row("/dashboards/{id}", partial(_dashboard, dashboards), api),
        *(_row(path, partial(_call, prometheus, prefix), api) for path in CALLS),
    ]
    return under(prefix, rows)


def _row(path: str, answer: Callable[[Request], Response | Later], guard: Guard) -> Route[Any]:
    return Route(path, RouteName.OTHER, lambda _, request: answer(request), gated=False, guard=guard)


def _call(prometheus: Prometheus, prefix: str, request: Request) -> Response | Later:
    return prometheus.answer(replace(request, path=request.path.removeprefix(prefix)))


def _dashboard(dashboards: Mapping[str, Dashboard], request: Request) -> Response:
    found = dashboards.get(request.path.rpartition("/")[2])
    if found is None:
        return refusal(404, "no such dashboard")
    try:
        return _json(read(found.path))
    except AssetError as error:  # it was one when the preview began
        return refusal(500, str(error))


def _listed(dashboard: Dashboard) -> Mapping[str, str]:
    return {"key": dashboard.key, "title": dashboard.title, "description": dashboard.description}


def _json(value: object) -> Response:
    return Response(200, json.dumps(value).encode(), JSON, PAGE_HEADERS)
