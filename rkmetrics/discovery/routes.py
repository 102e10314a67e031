"""The routes of a balancer: request in, answer out. No socket; only a host name that has to be looked up takes time.

    POST   /register        a backend announces itself       its own token   201 new, 200 known
    DELETE /register/{id}   it takes its leave               its own token   200, 404
    GET    /backends        the pool: a list of addresses    the gate        all backends with ?details=1
    GET    /sd              Prometheus HTTP SD               the gate

Whatever a caller sends gets a 4xx that says what is wrong with it, in one sentence; a table that is full is 507. Order
matters: guard, size, rate, content, policy, table. A request that a browser sends for some page (it has an Origin) is
refused, as a balancer on loopback without a token would otherwise take registrations from any page.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable, Mapping
from functools import partial
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

import msgspec

from rkmetrics.asgi.base import JSON, Guard, Later, Request, Response, Route, text_response
from rkmetrics.catalogue.discovery import BackendState, RegisterOutcome
from rkmetrics.catalogue.exporter import Route as RouteName
from rkmetrics.discovery.base import BODY_LIMIT_BYTES, ID, REGISTER_PATH, Address, Backend, Registered
from rkmetrics.discovery.policy import IPAddress, caller_address
from rkmetrics.errors import BackendError, PayloadError

if TYPE_CHECKING:
    from rkmetrics.discovery.balancer import Balancer
    from rkmetrics.discovery.directory import Directory, Listed

__all__ = ["DETAILS_TYPE", "ROUTES", "details", "resolve", "routes", "target_groups"]

log = logging.getLogger(__name__)

DETAILS_TYPE = "application/vnd.rkmetrics.backends+json"
LOOK_UPS = 4  # names that are looked up at once; each may hold a thread for as long as the resolver likes

STATUSES: Mapping[RegisterOutcome, int] = {
    RegisterOutcome.ADDED: 201,
    RegisterOutcome.REFRESHED: 200,
    RegisterOutcome.REMOVED: 200,
    RegisterOutcome.UNKNOWN: 404,
    RegisterOutcome.CONFLICT: 409,
    RegisterOutcome.FULL: 507,
    RegisterOutcome.LIMITED: 429,
}
SENTENCES: Mapping[RegisterOutcome, str] = {
    RegisterOutcome.REMOVED: "removed",
    RegisterOutcome.UNKNOWN: "no backend of that id is announced",
    RegisterOutcome.CONFLICT: "a live backend has this id or this address, and was registered as another or by another "
    "caller; it can be replaced once it is down or has left",
    RegisterOutcome.FULL: "the table is full (RKMETRICS_MAX_BACKENDS of the balancer)",
    RegisterOutcome.LIMITED: "one caller has registered as many backends as it may",
}
FROM_A_PAGE = text_response(403, "registrations do not come from pages in a browser (there is an Origin header)\n")
NO_CALLER = text_response(403, "this server does not say who calls, so nothing can be registered\n")
NO_SUCH_ID = text_response(404, "no backend has such an id\n")


# --- registrations ----------------------------------------------------------------------------------------------------


def _register(balancer: Balancer, request: Request) -> Response | Later:
    caller = caller_address(request.client)
    refusal = _refuse(balancer, request, caller)
    if refusal is not None or caller is None:
        return refusal or NO_CALLER
    try:
        backend = Backend.decode(request.body)
    except (PayloadError, BackendError) as error:
        return _refused(balancer, RegisterOutcome.MALFORMED, 400, error)
    known = _looked_up(balancer.directory, backend, caller)
    if known is not None or backend.address.ip is not None:
        return _take(balancer, known or backend, caller)
    return _later(lambda: _take_name(balancer, backend, caller))


def _refuse(balancer: Balancer, request: Request, caller: IPAddress | None) -> Response | None:
    """Return what a request gets that is not looked at."""
    if request.values(b"origin"):
        return FROM_A_PAGE
    wait = balancer.rate.admit(caller)
    if wait:
        balancer.directory.count(RegisterOutcome.LIMITED)
        return _wait("too many registrations from this address", wait)
    return None


def _take(balancer: Balancer, backend: Backend, caller: IPAddress) -> Response:
    """Take a backend whose host is an address."""
    address, directory = backend.address.ip, balancer.directory
    assert address is not None
    try:
        balancer.policy.check(address, (backend.address.port, backend.metrics_port), caller)
    except BackendError as error:
        return _refused(balancer, RegisterOutcome.FORBIDDEN, 403, error)
    outcome = directory.announce(backend, str(caller))
    if outcome not in (RegisterOutcome.ADDED, RegisterOutcome.REFRESHED):
        return _said(outcome)
    state = directory.state(backend.id) or BackendState.NEW
    return Response(STATUSES[outcome], Registered(backend.id, state, directory.rules.expire_seconds).encode(), JSON)


def _leave(balancer: Balancer, request: Request) -> Response:
    caller, id = caller_address(request.client), request.path.rpartition("/")[2]
    refusal = _refuse(balancer, request, caller)
    if refusal is not None or caller is None:
        return refusal or NO_CALLER
    if not ID.fullmatch(id):
        return NO_SUCH_ID
    return _said(balancer.directory.leave(id, str(caller)))


def _said(outcome: RegisterOutcome) -> Response:
    headers = ((b"retry-after", b"30"),) if outcome in (RegisterOutcome.FULL, RegisterOutcome.LIMITED) else ()
    return text_response(STATUSES[outcome], f"{SENTENCES[outcome]}\n", headers)


def _refused(balancer: Balancer, outcome: RegisterOutcome, status: int, error: Exception) -> Response:
    balancer.directory.count(outcome)
    return text_response(status, f"{error}\n")


def _wait(what: str, seconds: float) -> Response:
    return text_response(429, f"{what}; try again later\n", ((b"retry-after", b"%d" % math.ceil(seconds)),))


# --- names ------------------------------------------------------------------------------------------------------------

_look_ups = BoundedSemaphore(LOOK_UPS)


def _looked_up(directory: Directory, backend: Backend, caller: IPAddress) -> Backend | None:
    """The same backend with the address that its name had when it was first announced, while it is not down."""
    known = directory.announced(backend.id)
    if known is None or not known[0].name or directory.state(backend.id) is BackendState.DOWN:
        return None
    found, owner = known
    same = found.name == backend.address.host and found.address.port == backend.address.port and owner == str(caller)
    return backend._replace(address=found.address, name=found.name) if same else None


def _take_name(balancer: Balancer, backend: Backend, caller: IPAddress) -> Response:
    """Look a name up, once, and take the backend under its address. Every address of the name has to be allowed."""
    if not _look_ups.acquire(blocking=False):
        balancer.directory.count(RegisterOutcome.LIMITED)
        return _wait("too many names are being looked up", 1)
    try:
        found = balancer.resolve(backend.address.host)
    except OSError:
        error = BackendError("address", str(backend.address), "a name that this balancer can look up")
        return _refused(balancer, RegisterOutcome.FORBIDDEN, 403, error)
    finally:
        _look_ups.release()
    ports = (backend.address.port, backend.metrics_port)
    try:
        for address in found:
            balancer.policy.check(address, ports, caller)
    except BackendError as error:
        return _refused(balancer, RegisterOutcome.FORBIDDEN, 403, error)
    name, port = backend.address
    return _take(balancer, backend._replace(address=Address(str(found[0]), port), name=name), caller)


def resolve(host: str) -> list[IPAddress]:
    """Return the addresses of a name, at least one. Raises OSError. Waits."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(str(error)) from None
    return [address for *_, at in found if (address := caller_address(str(at[0]))) is not None]


def _later(run: Callable[[], Response]) -> Later:
    async def arun() -> Response:
        return await asyncio.to_thread(run)

    return Later(run, arun)


# --- lists ------------------------------------------------------------------------------------------------------------

_encode = msgspec.json.Encoder().encode


def _json(value: object, content_type: str = JSON) -> Response:
    return Response(200, _encode(value) + b"\n", content_type)


def _backends(balancer: Balancer, request: Request) -> Response | Later:
    directory = balancer.directory
    if (b"details", b"1") in request.fields():
        return _later(lambda: _json(details(directory)))
    if DETAILS_TYPE.encode() in (request.combined(b"accept") or b""):
        return _later(lambda: _json(details(directory), DETAILS_TYPE))
    return _json([str(backend.address) for backend in directory.pool()])


def details(directory: Directory) -> Mapping[str, object]:
    """Return all that is known of all backends, as the JSON of /backends?details=1 has it."""
    return {"panic": directory.panic, "backends": [_detail(each) for each in directory.listed()]}


def _detail(listed: Listed) -> Mapping[str, object]:
    backend = listed.backend
    return {
        "id": backend.id,
        "address": str(backend.address),
        "metrics_port": backend.metrics_port,
        "name": backend.name or None,
        "state": listed.state,
        "in_pool": listed.pooled,
        "state_seconds": round(listed.state_seconds, 3),
        "last_check": listed.outcome,
        "last_check_seconds": None if listed.checked_seconds is None else round(listed.checked_seconds, 3),
        "damping": listed.damping,
        "sources": listed.sources,
        "labels": dict(backend.labels),
        "vitals": listed.vitals,
    }


def _sd(balancer: Balancer, _: Request) -> Response | Later:
    return _later(lambda: _json(target_groups(balancer.directory.listed())))


META = "__meta_rkmetrics_"


def target_groups(backends: tuple[Listed, ...]) -> list[Mapping[str, object]]:
    """Return what Prometheus reads at /sd ("HTTP SD"): the metrics ports of the backends that it should scrape.

    Those that are up, and those that were and fell silent, since `up == 0` is what an alert waits for; a backend that
    drains, was never ready, or has left is no target. Everything that a backend says of itself is in labels that
    Prometheus drops after relabelling: what stays of them is for its configuration to say. Names of labels are checked
    at registration; values are text, which JSON escapes.
    """
    return [
        {
            "targets": [str(each.backend.metrics_address)],
            "labels": {
                f"{META}id": each.backend.id,
                f"{META}address": str(each.backend.address),
                f"{META}state": each.state,
                **{f"{META}label_{name}": value for name, value in each.backend.labels},
            },
        }
        for each in backends
        if each.scraped
    ]


#: Rows as in asgi/routes.py; `routes` binds them to a balancer and its guard.
ROUTES: tuple[Route[Any], ...] = (
    Route(
        REGISTER_PATH, RouteName.REGISTER, _register, gated=False, methods=("POST",), body_limit_bytes=BODY_LIMIT_BYTES
    ),
    Route(f"{REGISTER_PATH}/{{id}}", RouteName.REGISTER, _leave, gated=False, methods=("DELETE",)),
    Route("/backends", RouteName.BACKENDS, _backends, gated=True),
    Route("/sd", RouteName.SD, _sd, gated=True),
)


def routes(balancer: Balancer, guard: Guard) -> Mapping[str, Route[Any]]:
    """Return the rows for one balancer. guard: stands before registrations; the gate of the surface before the rest."""
    return {row.path: _bound(row, balancer, guard) for row in ROUTES}


def _bound(row: Route[Balancer], balancer: Balancer, guard: Guard) -> Route[Any]:
    return Route(
        row.path,
        row.name,
        partial(_answer, row, balancer),
        gated=row.gated,
        methods=row.methods,
        guard=None if row.gated else guard,
        body_limit_bytes=row.body_limit_bytes,
    )


def _answer(row: Route[Balancer], balancer: Balancer, _: object, request: Request) -> Response | Later:
    return row.answer(balancer, request)
