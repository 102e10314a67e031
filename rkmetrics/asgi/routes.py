"""The routes: request in, answer out. Nothing here knows a socket or an event loop.

ROUTES is the whole table; a route is a row and a function. `Surface.answer` takes a request through path, gate and
method, in that order: an unknown path is 404, and a gated one says nothing to who may not see it, not even which
methods it has. What takes time comes back as a `Later`, for the caller to run where it may wait.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from rkmetrics.asgi.auth import CLOSED, Gate
from rkmetrics.asgi.base import JSON, Guard, Later, Request, Response, Route, json_response, text_response
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

__all__ = ["NAMES_LIMIT", "ROUTES", "Answer", "Guard", "Surface", "too_large"]

log = logging.getLogger(__name__)

RUNTIME = "rkmetrics"
NAMES_LIMIT = 256  # name[] fields of one request
OVERFLOWS_SHOWN = 20

NOT_FOUND = text_response(404, "not found\n")
TOO_MANY_NAMES = text_response(400, f"more than {NAMES_LIMIT} name[] fields\n")
FAILED = text_response(500, "the answer could not be made; the log says why\n")
BUSY = text_response(503, "too many scrapes at once\n", ((b"retry-after", b"1"),))


class Answer(NamedTuple):
    """What a request gets, and the route under which it is counted."""

    route: RouteName
    response: Response | Later


class Surface:
    """A registry as HTTP sees it: its routes, their gate, the renderer that concurrent scrapes share, and the counting.

    gate: by default the one that the registry's settings describe; closed: the body of its 403. more: rows beside
    ROUTES.
    """

    def __init__(
        self,
        registry: Registry,
        gate: Guard | None = None,
        closed: str = CLOSED,
        more: Mapping[str, Route[Any]] | None = None,
    ) -> None:
        self.registry = registry
        self.routes: Mapping[str, Route[Any]] = {**ROUTES, **(more or {})}
        self.gate = gate or Gate.from_settings(registry.settings, self.count_failure, closed)
        self.renderer = Renderer(registry)

    def begin(self, request: Request) -> Answer | int:
        """Return the answer to a request whose body is not read; or the limit of the body that its route asks for.

        Who speaks HTTP reads the body then, and comes with it to `answer`, or to `refuse_body` where it is larger.
        """
        route = self._find(request.path)
        if route is None or not route.body_limit_bytes:
            return self.answer(request)
        refusal = self._refuse(route, request)
        return route.body_limit_bytes if refusal is None else Answer(route.name, refusal)

    def answer(self, request: Request) -> Answer:
        """Return the answer, or what leads to it. No bytes of a client raise."""
        route = self._find(request.path)
        if route is None:
            return Answer(RouteName.OTHER, NOT_FOUND)
        return Answer(route.name, self._refuse(route, request) or route.answer(self, request))

    def refuse_body(self, request: Request, response: Response) -> Answer:
        """Return the answer to a request whose body is too large, or does not come."""
        route = self._find(request.path)
        return Answer(route.name if route else RouteName.OTHER, response)

    def _find(self, path: str) -> Route[Any] | None:
        rest, _, last = path.rpartition("/")
        candidates = (path, f"{rest}/{{id}}", f"{rest.rpartition('/')[0]}/{{id}}/{last}")
        return next((self.routes[each] for each in candidates if each in self.routes), None)

    def _refuse(self, route: Route[Any], request: Request) -> Response | None:
        guard = route.guard or (self.gate if route.gated else None)
        refusal = guard.refuse(request) if guard else None
        if refusal is None and request.method not in route.methods:
            refusal = _method_not_allowed(route)
        return refusal

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


def too_large(limit: int) -> Response:
    """Return what a body of more than `limit` bytes gets."""
    return text_response(413, f"a body of more than {limit} bytes\n")


def _method_not_allowed(route: Route[Any]) -> Response:
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
    return _later(lambda: _told(surface.registry))


def _told(registry: Registry) -> Response:
    """The vitals, and a note of it for who waits until the balancers know that the node drains."""
    vitals = registry.vitals()
    registry.health.note_told(ready=vitals.ready)
    return json_response(200, _fields(vitals))


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


# --- KV metrics: the pull side of the KV plane ------------------------------------------------------------------------

# RFC 9110, 8.8.3; weak comparison (8.8.3.2) looks at what stands between the quotes only.
ENTITY_TAG = re.compile(rb'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')
ENTITY_TAGS = re.compile(rb"[ \t,]*(?:" + ENTITY_TAG.pattern + rb"[ \t]*(?:,[ \t,]*|\Z))+")


class _NoWorkers:
    """What /kv_metrics shows where no worker publishes in this process."""

    def etag(self) -> bytes:
        return b'"none"'

    def render(self) -> bytes:
        return b'{"runtime":"rkmetrics","incarnation":"","sequence":0,"workers":[]}'


NO_WORKERS = _NoWorkers()


def _kv_metrics(surface: Surface, request: Request) -> Response:
    document = surface.registry.document(RouteName.KV_METRICS) or NO_WORKERS
    etag = document.etag()  # before the body: see Document
    tagged = ((b"etag", etag),)
    if _known(request.combined(b"if-none-match"), etag):
        return Response(304, b"", headers=tagged)
    return Response(200, document.render(), JSON, tagged)


def _known(if_none_match: bytes | None, etag: bytes) -> bool:
    """Whether the client has this state already (RFC 9110, 13.1.2); a field that is no list of tags says nothing."""
    if if_none_match is None:
        return False
    if if_none_match == b"*":
        return True
    return bool(ENTITY_TAGS.fullmatch(if_none_match)) and etag in ENTITY_TAG.findall(if_none_match)


ROUTES: Mapping[str, Route[Surface]] = {
    route.path: route
    for route in (
        Route("/health", RouteName.HEALTH, _health, gated=False),
        Route("/metadata", RouteName.METADATA, _metadata, gated=False),
        Route("/metrics", RouteName.METRICS, _metrics, gated=True),
        Route("/kv_metrics", RouteName.KV_METRICS, _kv_metrics, gated=True),
        Route("/telemetry", RouteName.TELEMETRY, _telemetry, gated=True),
        Route("/vitals", RouteName.VITALS, _vitals, gated=True),
    )
}
