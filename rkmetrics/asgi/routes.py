"""The routes: request in, answer out. Nothing here knows a socket or an event loop.

ROUTES is the whole table; a route is a row and a function. `Surface.answer` takes a request through path, gate and
method, in that order: an unknown path is 404, and a gated one says nothing to who may not see it, not even which
methods it has. What takes time comes back as a `Later`, for the caller to run where it may wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple, Protocol

from rkmetrics.asgi.auth import CLOSED, Gate
from rkmetrics.asgi.base import JSON, Later, Request, Response, Route, json_response, text_response
from rkmetrics.asgi.off_loop import off_loop
from rkmetrics.catalogue import version
from rkmetrics.catalogue.exporter import Route as RouteName
from rkmetrics.cells import IMPLEMENTATION
from rkmetrics.exposition import choose_coding, negotiate, prefers
from rkmetrics.exposition.render import Busy, Renderer
from rkmetrics.model import ForeignFamily, MetricType, Sample

if TYPE_CHECKING:
    from rkmetrics.collectors.vitals import Vitals
    from rkmetrics.exposition import Coding, Format
    from rkmetrics.registry import Registry

__all__ = ["NAMES_LIMIT", "ROUTES", "Answer", "Guard", "Surface"]

log = logging.getLogger(__name__)

RUNTIME = "rkmetrics"
NAMES_LIMIT = 256  # name[] fields of one request
OVERFLOWS_SHOWN = 20

NOT_FOUND = text_response(404, "not found\n")
TOO_MANY_NAMES = text_response(400, f"more than {NAMES_LIMIT} name[] fields\n")
FAILED = text_response(500, "the answer could not be made; the log says why\n")
BUSY = text_response(503, "too many scrapes at once\n", ((b"retry-after", b"1"),))


class Guard(Protocol):
    """What stands before gated routes: `auth.Gate`, or one that knows more about its server."""

    def refuse(self, request: Request) -> Response | None:
        """Return the answer to a request that may not pass; None for one that may."""


class Answer(NamedTuple):
    """What a request gets, and the route under which it is counted."""

    route: RouteName
    response: Response | Later


class Surface:
    """A registry as HTTP sees it: its routes, their gate, the renderer that concurrent scrapes share, and the counting.

    gate: by default the one that the registry's settings describe; closed: the body of its 403.
    """

    def __init__(self, registry: Registry, gate: Guard | None = None, closed: str = CLOSED) -> None:
        self.registry = registry
        self.gate = gate or Gate.from_settings(registry.settings, self.count_failure, closed)
        self.renderer = Renderer(registry)

    def answer(self, request: Request) -> Answer:
        """Return the answer, or what leads to it. No bytes of a client raise."""
        route = ROUTES.get(request.path)
        if route is None:
            return Answer(RouteName.OTHER, NOT_FOUND)
        refusal = self.gate.refuse(request) if route.gated else None
        if refusal is None and request.method not in route.methods:
            refusal = _method_not_allowed(route)
        return Answer(route.name, refusal or route.answer(self, request))

    def respond(self, answer: Answer) -> Response:
        """Wait for the answer, and count it."""
        response = answer.response
        try:
            done = response.run() if isinstance(response, Later) else response
        except Exception as error:
            done = _trouble(answer.route, error)
        return self.count(answer.route, done)

    async def arespond(self, answer: Answer) -> Response:
        """Wait for the answer without holding up the event loop, and count it."""
        response = answer.response
        try:
            done = await response.arun() if isinstance(response, Later) else response
        except Exception as error:
            done = _trouble(answer.route, error)
        return self.count(answer.route, done)

    def count(self, route: RouteName, response: Response) -> Response:
        """Count an answer, and return it."""
        self.registry.exporter.http_requests[route, str(response.status)].inc()
        return response

    def count_failure(self, reason: str) -> None:
        """Count a 401."""
        self.registry.exporter.auth_failures[reason].inc()


def _method_not_allowed(route: Route[Surface]) -> Response:
    allow = ", ".join(route.methods).encode()
    return text_response(405, "method not allowed\n", ((b"allow", allow),))


def _trouble(route: RouteName, error: Exception) -> Response:
    if isinstance(error, Busy):
        return BUSY
    log.error("answering %s failed", route, exc_info=error)
    return FAILED


# --- health and metadata: open, cheap, nothing secret -----------------------------------------------------------------


def _health(surface: Surface, _: Request) -> Response:
    report = surface.registry.health.check()
    body: dict[str, object] = {"status": report.status, "runtime": RUNTIME, "version": version(), **report.details}
    overflows = surface.registry.overflows()
    if overflows:
        # Counts only: the values are what strangers sent, and this page is open to strangers (T32).
        body["label_overflow"] = {
            f"{metric}{{{label}}}": overflow.count
            for (metric, label), overflow in list(overflows.items())[:OVERFLOWS_SHOWN]
        }
    return json_response(report.code, body)


def _metadata(surface: Surface, _: Request) -> Response:
    registry, settings = surface.registry, surface.registry.settings
    names: Mapping[str, object] = {name: {"metadata": {}} for name in registry.actor_names()}
    # Which wire we speak, not where: addresses and URLs may carry credentials.
    wire: Mapping[str, object] = {
        "requestPlane": settings.request_plane,
        "kvPlane": settings.kv_plane,
        "dynWire": settings.wire,
        "namespace": settings.namespace,
    }
    body: Mapping[str, object] = {
        "runtime": RUNTIME,
        "version": version(),
        "cells": IMPLEMENTATION,
        "catalog": registry.catalog_version,
        "actorNames": names,
        "wire": wire,
    }
    return json_response(200, body)


# --- metrics ----------------------------------------------------------------------------------------------------------


def _metrics(surface: Surface, request: Request) -> Response | Later:
    accept = request.combined(b"accept")
    if prefers(accept, JSON):
        return _vitals(surface, request)
    named = _names(request)
    if len(named) > NAMES_LIMIT:
        return TOO_MANY_NAMES
    names = frozenset(named) or None
    form, coding = negotiate(accept), choose_coding(request.combined(b"accept-encoding"))

    def run() -> Response:
        return _page(form, coding, surface.renderer.render(form, coding, names))

    async def arun() -> Response:
        return _page(form, coding, await surface.renderer.arender(form, coding, names))

    return Later(run, arun)


def _names(request: Request) -> list[str]:
    """The name[] fields: families or samples to show; none for all of them."""
    return [value.decode("utf-8", "replace") for name, value in request.fields() if name == b"name[]"]


def _page(form: Format, coding: Coding, body: bytes) -> Response:
    coded = ((b"content-encoding", coding.name.encode()),) if coding.name != "identity" else ()
    return Response(200, body, form.content_type, coded)


# --- vitals: the discovery protocol's two pages -----------------------------------------------------------------------

# Family -> type, help, field of Vitals: the names are the protocol's, unprefixed and in percent.
TELEMETRY: Mapping[str, tuple[MetricType, str, str]] = {
    "node_ready": (MetricType.GAUGE, "Whether the node is ready to receive requests", "ready"),
    "requests_in_progress": (
        MetricType.GAUGE,
        "Current number of requests being processed",
        "requests_in_progress",
    ),
    "cpu_usage_percent": (MetricType.GAUGE, "CPU usage percentage", "cpu_usage"),
    "memory_usage_percent": (MetricType.GAUGE, "Memory usage percentage", "memory_usage"),
    "gpu_usage_percent": (MetricType.GAUGE, "GPU usage percentage", "gpu_usage"),
    "failed_responses_total": (MetricType.COUNTER, "Total number of failed responses", "failed_responses"),
    "connected_peers": (MetricType.GAUGE, "Peers that this node is connected to", "connected_peers"),
    "backoff_requests": (MetricType.GAUGE, "Requests that wait before they are tried again", "backoff_requests"),
    "uptime_seconds": (MetricType.GAUGE, "Seconds since the node started", "uptime_seconds"),
}


def _vitals(surface: Surface, _: Request) -> Later:
    return _later(lambda: json_response(200, _fields(surface.registry.vitals())))


def _telemetry(surface: Surface, request: Request) -> Later:
    form = negotiate(request.combined(b"accept"))
    coding = choose_coding(request.combined(b"accept-encoding"))

    def run() -> Response:
        page = form.encode(_families(surface.registry.vitals()))
        return _page(form, coding, coding.compress(page))

    return _later(run)


def _fields(vitals: Vitals) -> dict[str, object]:
    return asdict(vitals)


def _families(vitals: Vitals) -> list[ForeignFamily]:
    fields = _fields(vitals)
    return [
        ForeignFamily(
            name=name.removesuffix("_total"),
            type=kind,
            help=text,
            unit="",
            samples=(Sample(name, (), float(value)),),
        )
        for name, (kind, text, field) in TELEMETRY.items()
        if isinstance(value := fields[field], int | float)
    ]


def _later(run: Callable[[], Response]) -> Later:
    async def arun() -> Response:
        return await off_loop(run)

    return Later(run, arun)


ROUTES: Mapping[str, Route[Surface]] = {
    route.path: route
    for route in (
        Route("/health", RouteName.HEALTH, _health, gated=False),
        Route("/metadata", RouteName.METADATA, _metadata, gated=False),
        Route("/metrics", RouteName.METRICS, _metrics, gated=True),
        Route("/telemetry", RouteName.TELEMETRY, _telemetry, gated=True),
        Route("/vitals", RouteName.VITALS, _vitals, gated=True),
    )
}
