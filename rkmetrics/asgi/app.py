"""The only speaker of ASGI: an application, the same as Starlette routes, and the middleware that counts requests.

References: ASGI 3.0, "HTTP & WebSocket" and "Lifespan". A body is read where a route asks for one, once the request may
pass, up to that route's limit and for BODY_SECONDS at most; one that is not read costs nothing (T16, T17).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rkmetrics.asgi.base import Request, Response, Route, is_exact, text_response
from rkmetrics.asgi.routes import ROUTES, Answer, Surface, too_large
from rkmetrics.catalogue.node import Outcome
from rkmetrics.health import Phase

if TYPE_CHECKING:
    from starlette.routing import Route as StarletteRoute

    from rkmetrics.catalogue.node import Node
    from rkmetrics.registry import Registry

__all__ = ["Application", "Endpoint", "Middleware", "app", "routes"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

CHUNK_BYTES = 262_144  # a slow reader holds up the sending of the next chunk, so a server buffers about one of them
BODY_SECONDS = 10.0
BODY_NOT_HERE = text_response(408, "the body did not come in time, or not to its end\n")
TICKET = "rkmetrics.ticket"


def app(registry: Registry, more: Mapping[str, Route[Any]] | None = None) -> Application:
    """Return the routes as an ASGI application: to serve alone, or to mount under any prefix.

    more: routes beside ours, such as those of a balancer (`rkmetrics.discovery.routes`).
    """
    return Application(Surface(registry, more=more))


def routes(registry: Registry, prefix: str = "") -> list[StarletteRoute]:
    """Return the routes for the route list of a Starlette or FastAPI application.

    prefix: as in "/internal", or "" for none. Raises ValueError when it does not begin with a slash.
    """
    from rkmetrics.asgi.exact_route import ExactRoute

    if prefix and not prefix.startswith("/"):
        raise ValueError(f"prefix={prefix!r}: expected a path that begins with '/', such as '/internal'")
    surface, base = Surface(registry), prefix.rstrip("/")
    return [ExactRoute(base + path, Endpoint(surface, path), f"rkmetrics_{row.name}") for path, row in ROUTES.items()]


class Application:
    """All routes. As the outermost application it also takes the health through the server's lifespan."""

    def __init__(self, surface: Surface) -> None:
        self._surface = surface

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await _answer(self._surface, scope, receive, send, _route_path(scope))
        elif kind == "websocket":
            await _refuse_websocket(receive, send)
        elif kind == "lifespan":
            await _live(_Lifespan(self._surface.registry), receive, send)
        else:
            raise ValueError(f"scope type {kind!r}: expected http, websocket or lifespan")  # ASGI 3.0, "Applications"


class Endpoint:
    """One route, where a framework has matched the path. A class, so that Starlette hands over every method."""

    def __init__(self, surface: Surface, path: str) -> None:
        self._surface, self._path = surface, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _route_path(scope)
        await _answer(self._surface, scope, receive, send, self._path if path.endswith(self._path) else path)


async def _answer(surface: Surface, scope: Scope, receive: Receive, send: Send, path: str) -> None:
    ticket = scope.get(TICKET)
    if isinstance(ticket, _Ticket):
        ticket.leave()  # who looks at the numbers is not part of them
    if surface.registry.health.phase is Phase.NEW:  # mounted, so nobody told us of the server's lifespan
        _up(surface.registry)
    exact = is_exact(path, scope.get("raw_path"))
    headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
    client = str(scope["client"][0]) if scope.get("client") else None
    request = Request(scope["method"], path if exact else "", scope.get("query_string", b""), headers, client=client)
    begun = surface.begin(request)
    answer = begun if isinstance(begun, Answer) else await _with_body(surface, request, begun, receive)
    await _send(await surface.arespond(answer), request.method, send)


async def _with_body(surface: Surface, request: Request, limit: int, receive: Receive) -> Answer:
    """Read the body, and return the answer to the whole request."""
    lengths = request.values(b"content-length")
    if lengths and lengths[0].isdigit() and (len(lengths[0]) > 18 or int(lengths[0]) > limit):
        return surface.refuse_body(request, too_large(limit))
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _body(receive, limit)
    except TimeoutError:
        body = None
    if body is None:
        return surface.refuse_body(request, BODY_NOT_HERE)
    if len(body) > limit:
        return surface.refuse_body(request, too_large(limit))
    return surface.answer(replace(request, body=body))


async def _body(receive: Receive, limit: int) -> bytes | None:
    """Read until the end, or past the limit; None where the client is gone."""
    body = bytearray()
    while len(body) <= limit:
        message = await receive()
        if message["type"] != "http.request":  # http.disconnect
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return bytes(body)


def _up(registry: Registry) -> None:
    """A server sends requests once the application has started; who knows better calls health.begin_start() first."""
    registry.health.start()
    registry.watch_loop()


def _route_path(scope: Scope) -> str:
    """Return the path relative to the mount; the prefix of a mount stands in root_path, and in path too."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


async def _send(response: Response, method: str, send: Send) -> None:
    await send({"type": "http.response.start", "status": response.status, "headers": response.raw_headers()})
    body = b"" if method == "HEAD" else response.body
    chunks = [body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES)] or [b""]
    for chunk in chunks[:-1]:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": chunks[-1]})


async def _refuse_websocket(receive: Receive, send: Send) -> None:
    """Closing before accepting: the server answers the handshake with 403 (ASGI 3.0, "Close - send event")."""
    await receive()
    await send({"type": "websocket.close", "code": 1008, "reason": "no websocket here"})


# --- lifespan ---------------------------------------------------------------------------------------------------------


class _Lifespan:
    """Takes the health along with what server and application say to each other."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._health = registry, registry.health
        self.complete = False

    def received(self, message: Message) -> None:
        """A message from the server."""
        if message["type"] == "lifespan.startup":
            self._health.begin_start()
        elif message["type"] == "lifespan.shutdown":
            self._health.begin_drain()
            self._health.begin_shutdown()

    def sent(self, message: Message) -> None:
        """A message from the application."""
        if message["type"] == "lifespan.startup.complete":
            self.complete = True
            _up(self._registry)
        elif message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            self._health.finish_shutdown()


async def _live(lifespan: _Lifespan, receive: Receive, send: Send) -> None:
    """The lifespan of an application that has nothing of its own to start."""
    while True:
        message = await receive()
        lifespan.received(message)
        answer = {"type": message["type"] + ".complete"}
        lifespan.sent(answer)
        await send(answer)
        if message["type"] == "lifespan.shutdown":
            return


# --- middleware -------------------------------------------------------------------------------------------------------


class Middleware:
    """Counts the requests of an application: how many are in progress, and how each of them ended.

    Put it outermost: `app.add_middleware(rk.asgi.Middleware, registry=registry)`, or `Middleware(app, registry)` around
    any ASGI application. It also takes `registry.health` through the lifespan: `starting` while the application starts
    up, `ok` after it, `shutting_down` and `shut_down` at its end. Requests to our own routes are not counted.
    """

    def __init__(self, app: ASGIApp, registry: Registry) -> None:
        self._app, self._registry, self._node = app, registry, registry.node
        self._node.requests_in_progress.inc(0)  # a gauge exists from its first update
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._count(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._observe(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._be_started()
        ticket = scope[TICKET] = _Ticket(self._node)

        async def sent(message: Message) -> None:
            try:
                await send(message)
            except OSError:  # ASGI 3.0, "Disconnected Client - send exception"
                ticket.lost = True
                raise
            ticket.sent(message)

        try:
            await self._app(scope, receive, sent)
        except Exception:
            ticket.raised()
            raise
        finally:
            ticket.close()

    def _be_started(self) -> None:
        """A server sends requests when the application has started, also a server without lifespan."""
        if not self._started:
            self._started = True
            _up(self._registry)

    async def _observe(self, scope: Scope, receive: Receive, send: Send) -> None:
        lifespan = _Lifespan(self._registry)
        self._started = True

        async def received() -> Message:
            message = await receive()
            lifespan.received(message)
            return message

        async def sent(message: Message) -> None:
            lifespan.sent(message)
            await send(message)

        try:
            await self._app(scope, received, sent)
        except BaseException:
            self._started = lifespan.complete  # an application without lifespan support raises; it starts all the same
            raise


class _Ticket:
    """One request on its way through the application."""

    __slots__ = ("_node", "_outcome", "_status", "lost")

    def __init__(self, node: Node) -> None:
        self._node: Node | None = node
        self._outcome, self._status = Outcome.ABORTED, 0
        self.lost = False  # the client is gone
        node.requests_in_progress.inc()

    def sent(self, message: Message) -> None:
        """The application has sent this."""
        if message["type"] == "http.response.start":
            self._status = int(message["status"])
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._outcome = _outcome(self._status)

    def raised(self) -> None:
        """The application raised; what comes after the whole answer (a background task) is not the client's affair."""
        if self._outcome is Outcome.ABORTED and not self.lost:
            self._outcome = Outcome.SERVER_ERROR

    def leave(self) -> None:
        """Not one of the requests that are counted."""
        node, self._node = self._node, None
        if node is not None:
            node.requests_in_progress.dec()

    def close(self) -> None:
        """The request is over. Never answered to its end (cancelled, client gone): aborted."""
        node = self._node
        self.leave()
        if node is not None:
            node.responses[self._outcome].inc()


def _outcome(status: int) -> Outcome:
    if status < 400:
        return Outcome.SUCCESS
    return Outcome.CLIENT_ERROR if status < 500 else Outcome.SERVER_ERROR
