"""The ASGI speaker: scopes, lifespan, websockets, and the middleware that counts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.asgi.app import CHUNK_BYTES
from rkmetrics.health import Status
from rkmetrics.settings import Settings
from tests.asgi.hosts import InMemory, OnSocket, uvicorn_of

Messages = list[dict[str, Any]]


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(Settings(metrics_enabled=True, metrics_access="open"))


async def speak(app: Any, scope: dict[str, Any], *messages: dict[str, Any]) -> Messages:
    """Call an application with these messages; return what it sent."""
    sent: Messages = []
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await app(scope, receive, send)
    return sent


# --- scopes -----------------------------------------------------------------------------------------------------------


async def test_a_websocket_is_closed_before_it_is_accepted(registry: rk.Registry) -> None:
    sent = await speak(rk.asgi.app(registry), {"type": "websocket", "path": "/metrics"}, {"type": "websocket.connect"})
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "no websocket here"}]


async def test_an_unknown_scope_raises(registry: rk.Registry) -> None:
    """ASGI 3.0: applications raise for protocols that they do not know, so that servers need not guess."""
    with pytest.raises(ValueError, match="'telnet'"):
        await speak(rk.asgi.app(registry), {"type": "telnet"})


async def test_the_body_of_a_request_is_never_asked_for(registry: rk.Registry) -> None:
    scope = {"type": "http", "method": "POST", "path": "/metrics", "headers": [], "query_string": b""}
    sent = await speak(rk.asgi.app(registry), scope)  # receive() would fail: there is no message
    assert sent[0]["status"] == 405


PREFIXES: list[tuple[str, str, int]] = [
    ("", "/metrics", 200),
    ("/", "/metrics", 200),
    ("/internal", "/internal/metrics", 200),
    ("/internal/", "/internal/metrics", 200),
    ("/internal", "/metrics", 200),  # a server that leaves the prefix out of the path
    ("/internal", "/internal", 404),
    ("/internal", "/internal/", 404),
    ("/internal", "/internalmetrics", 404),
    ("/a/b", "/a/b/metrics", 200),
    ("/a", "/a/a/metrics", 404),
]


@pytest.mark.parametrize(("root_path", "path", "status"), PREFIXES)
async def test_the_prefix_of_a_mount_is_root_path(
    registry: rk.Registry, root_path: str, path: str, status: int
) -> None:
    scope = {"type": "http", "method": "GET", "path": path, "root_path": root_path, "headers": [], "query_string": b""}
    assert (await speak(rk.asgi.app(registry), scope))[0]["status"] == status


def test_it_works_behind_a_root_path_of_uvicorn(registry: rk.Registry) -> None:
    """uvicorn puts its root path before the path as well."""
    with uvicorn_of(rk.asgi.app(registry), root_path="/outer") as port:
        assert OnSocket(port).ask("GET", "/health").status == 200
        assert OnSocket(port).ask("GET", "/nothing").status == 404


async def test_a_large_page_is_sent_in_chunks(registry: rk.Registry) -> None:
    class Many(rk.MetricSet):
        value = rk.Gauge("many_value", "A value.", across="sum")

    big = rk.Registry(Settings(metrics_enabled=True, metrics_access="open", max_actor_names=10_000))
    for number in range(10_000):
        big.bind(Many, actor_name=f"{number:064d}").value.set(number)
    scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": [], "query_string": b""}
    start, *bodies = await speak(rk.asgi.app(big), scope)
    sizes = [len(message["body"]) for message in bodies]
    assert max(sizes) == CHUNK_BYTES
    assert int(dict(start["headers"])[b"content-length"]) == sum(sizes) > 2 * CHUNK_BYTES
    assert [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [False]


def test_starlette_is_loaded_only_when_routes_are_asked_for() -> None:
    code = (
        "import sys, rkmetrics as rk\n"
        "rk.asgi.app(rk.Registry(rk.Settings()))\n"
        "assert not {'starlette', 'fastapi', 'uvicorn', 'http.server'} & sys.modules.keys()\n"
        "rk.asgi.routes(rk.Registry(rk.Settings()))\n"
        "assert 'starlette' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_routes_are_named_and_stay_out_of_the_schema(registry: rk.Registry) -> None:
    routes = rk.asgi.routes(registry, prefix="/internal")
    assert [route.path for route in routes] == [
        "/internal/health", "/internal/metadata", "/internal/metrics", "/internal/kv_metrics", "/internal/telemetry",
        "/internal/vitals",
    ]  # fmt: skip
    assert {route.include_in_schema for route in routes} == {False}
    assert routes[2].name == "rkmetrics_metrics"


def test_a_prefix_may_end_with_a_slash_and_must_begin_with_one(registry: rk.Registry) -> None:
    for prefix in ("/internal", "/internal/"):
        assert rk.asgi.routes(registry, prefix)[0].path == "/internal/health"
    assert rk.asgi.routes(registry, "/")[0].path == rk.asgi.routes(registry)[0].path == "/health"
    with pytest.raises(ValueError, match="prefix='internal': expected a path"):
        rk.asgi.routes(registry, "internal")


# --- lifespan ---------------------------------------------------------------------------------------------------------

STARTUP, SHUTDOWN = {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}


async def test_the_lifespan_of_the_app_alone_is_the_life_of_the_process(registry: rk.Registry) -> None:
    sent = await speak(rk.asgi.app(registry), {"type": "lifespan"}, STARTUP, SHUTDOWN)
    assert sent == [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]
    assert registry.health.check().status is Status.SHUT_DOWN


class Seen:
    """An application with a lifespan, that notes the health at each step."""

    def __init__(self, registry: rk.Registry, fail_in: str = "") -> None:
        self.registry, self.fail_in, self.statuses = registry, fail_in, list[str]()

    def note(self) -> None:
        self.statuses.append(self.registry.health.check().status.value)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        for step in ("startup", "shutdown"):
            await receive()
            self.note()
            verdict = "failed" if self.fail_in == step else "complete"
            await send({"type": f"lifespan.{step}.{verdict}"})
            self.note()
            if verdict == "failed":
                return


async def test_the_middleware_takes_health_along_with_the_lifespan_of_what_it_wraps(registry: rk.Registry) -> None:
    app = Seen(registry)
    sent = await speak(rk.asgi.Middleware(app, registry), {"type": "lifespan"}, STARTUP, SHUTDOWN)
    assert app.statuses == ["starting", "ok", "shutting_down", "shut_down"]
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_startup_that_fails_ends_in_shut_down(registry: rk.Registry) -> None:
    app = Seen(registry, fail_in="startup")
    await speak(rk.asgi.Middleware(app, registry), {"type": "lifespan"}, STARTUP, SHUTDOWN)
    assert app.statuses == ["starting", "shut_down"]


async def test_an_application_runs_twice_in_one_process(registry: rk.Registry) -> None:
    for _ in range(2):
        app = Seen(registry)
        await speak(rk.asgi.Middleware(app, registry), {"type": "lifespan"}, STARTUP, SHUTDOWN)
        assert app.statuses == ["starting", "ok", "shutting_down", "shut_down"]


async def test_without_a_lifespan_the_first_request_says_that_the_application_is_up(registry: rk.Registry) -> None:
    async def plain(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            raise NotImplementedError("no lifespan here")
        await answer(200)(scope, receive, send)

    app = rk.asgi.Middleware(plain, registry)
    with pytest.raises(NotImplementedError):
        await speak(app, {"type": "lifespan"}, STARTUP)
    assert registry.health.check().status is Status.STARTING
    await InMemory(app).request("GET", "/")
    assert registry.health.check().status is Status.OK


def test_starlette_and_fastapi_take_it_as_middleware(registry: rk.Registry) -> None:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware

    starlette = Starlette(
        routes=rk.asgi.routes(registry), middleware=[Middleware(rk.asgi.Middleware, registry=registry)]
    )
    fastapi = pytest.importorskip("fastapi").FastAPI()
    fastapi.add_middleware(rk.asgi.Middleware, registry=registry)
    fastapi.mount("/internal", rk.asgi.app(registry))
    for app, path in ((starlette, "/health"), (fastapi, "/internal/health")):
        with uvicorn_of(app) as port:
            assert OnSocket(port).ask("GET", path).status == 200
        assert registry.health.check().status is Status.SHUT_DOWN


# --- counting ---------------------------------------------------------------------------------------------------------

App = Callable[[Any, Any, Any], Awaitable[None]]


def answer(status: int, *, ends: bool = True) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": not ends})

    return app


def raising(error: BaseException, after: App | None = None) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if after is not None:
            await after(scope, receive, send)
        raise error

    return app


async def silent(scope: Any, receive: Any, send: Any) -> None:
    """Return without an answer."""


def outcomes(registry: rk.Registry) -> Mapping[str, float]:
    names = ("success", "client_error", "server_error", "aborted")
    return {name: value for name in names if (value := registry.node.responses[name].value)}


ENDS: list[tuple[App, str]] = [
    (answer(200), "success"),
    (answer(304), "success"),
    (answer(404), "client_error"),
    (answer(429), "client_error"),
    (answer(500), "server_error"),
    (answer(503), "server_error"),
    (answer(200, ends=False), "aborted"),
    (silent, "aborted"),
    (raising(RuntimeError()), "server_error"),
    (raising(RuntimeError(), after=answer(200, ends=False)), "server_error"),
    (raising(RuntimeError(), after=answer(200)), "success"),
    (raising(asyncio.CancelledError()), "aborted"),
    (raising(asyncio.CancelledError(), after=answer(200, ends=False)), "aborted"),
    (raising(asyncio.CancelledError(), after=answer(404)), "client_error"),
]


@pytest.mark.parametrize(("app", "outcome"), ENDS)
async def test_each_request_ends_in_one_outcome(registry: rk.Registry, app: App, outcome: str) -> None:
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with suppress(RuntimeError, asyncio.CancelledError):
        await speak(rk.asgi.Middleware(app, registry), scope)
    assert outcomes(registry) == {outcome: 1}
    assert registry.node.requests_in_progress.value == 0


async def test_a_client_that_is_gone_is_aborted_and_not_an_error_of_ours(registry: rk.Registry) -> None:
    """ASGI 3.0 lets send() raise an OSError then."""

    async def send(message: Any) -> None:
        raise OSError("the client is gone")

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(OSError, match="gone"):
        await rk.asgi.Middleware(answer(200), registry)(scope, send, send)  # type: ignore[arg-type]
    assert outcomes(registry) == {"aborted": 1}


async def test_requests_in_progress_rise_and_fall(registry: rk.Registry) -> None:
    release = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await answer(200)(scope, receive, send)

    app = InMemory(rk.asgi.Middleware(slow, registry))
    requests = [asyncio.ensure_future(app.request("GET", "/")) for _ in range(10)]
    await asyncio.sleep(0)
    assert registry.node.requests_in_progress.value == 10
    for request in requests[:3]:
        request.cancel()
    await asyncio.gather(*requests[:3], return_exceptions=True)
    assert registry.node.requests_in_progress.value == 7
    release.set()
    await asyncio.gather(*requests[3:])
    assert registry.node.requests_in_progress.value == 0
    assert outcomes(registry) == {"success": 7, "aborted": 3}


def test_requests_to_our_own_routes_are_not_counted(registry: rk.Registry) -> None:
    """A balancer that asks how many requests are in progress must not be told of its own question."""
    from starlette.applications import Starlette
    from starlette.routing import Mount, Route

    inner = Starlette(routes=[Mount("/internal", rk.asgi.app(registry)), Route("/page", answer_class(200))])
    app = InMemory(rk.asgi.Middleware(inner, registry))
    assert b'"requests_in_progress":0' in app.ask("GET", "/internal/vitals").body
    app.ask("GET", "/internal/nothing")
    assert outcomes(registry) == {}
    app.ask("GET", "/page")
    app.ask("GET", "/nothing")
    assert outcomes(registry) == {"success": 1, "client_error": 1}
    assert registry.node.requests_in_progress.value == 0


def answer_class(status: int) -> Any:
    """An endpoint that Starlette takes for an ASGI application."""

    class Page:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await answer(status)(scope, receive, send)

    return Page()


async def test_other_scopes_pass_through_the_middleware(registry: rk.Registry) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await speak(rk.asgi.Middleware(app, registry), {"type": "websocket"})
    assert seen == ["websocket"]
    assert outcomes(registry) == {}
