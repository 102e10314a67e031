"""The only speaker of ASGI: an application, the same as Starlette routes, and the middleware that counts requests.

References: ASGI 3.0, "HTTP & WebSocket" and "Lifespan". No body is ever read: none of the routes has a use for one, and
a body that is not read costs nothing (T16, T17).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from rkmetrics.asgi.base import Request, Response, is_exact
from rkmetrics.asgi.routes import ROUTES, Surface
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
TICKET = "rkmetrics.ticket"


def app(registry: Registry) -> Application:
    """Return the routes as an ASGI application: to serve alone, or to mount under any prefix."""
    return Application(Surface(registry))


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
            await _answer(self._surface, scope, send, _route_path(scope))
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
        await _answer(self._surface, scope, send, self._path if path.endswith(self._path) else path)


async def _answer(surface: Surface, scope: Scope, send: Send, path: str) -> None:
    ticket = scope.get(TICKET)
    if isinstance(ticket, _Ticket):
        ticket.leave()  # who looks at the numbers is not part of them
    if surface.registry.health.phase is Phase.NEW:  # mounted, so nobody told us of the server's lifespan
        _up(surface.registry)
    exact = is_exact(path, scope.get("raw_path"))
    headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
    request = Request(scope["method"], path if exact else "", scope.get("query_string", b""), headers)
    await _send(await surface.arespond(surface.answer(request)), request.method, send)


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
