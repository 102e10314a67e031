"""The same routes behind every host that they promise to work in, asked with the same bytes.

Three kinds: an ASGI application called directly (scopes as uvicorn makes them), uvicorn on a real socket, and
`rk.serve()` on a real socket. `ask` takes raw bytes and gives back raw bytes; a status of 400 for bytes that no server
lets through is the host's own.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import pytest

import rkmetrics as rk

HeaderList = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Reply:
    """One answer. headers: lower-case names, in order."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


class Host(Protocol):
    """Something that answers requests under a prefix."""

    def ask(self, method: str, path: str, headers: HeaderList = (), body: bytes = b"") -> Reply: ...


# --- in memory --------------------------------------------------------------------------------------------------------


class InMemory:
    """Calls an ASGI application as a server does."""

    def __init__(self, app: Any, prefix: str = "") -> None:
        self.app, self.prefix = app, prefix

    def ask(self, method: str, path: str, headers: HeaderList = (), body: bytes = b"") -> Reply:
        return asyncio.run(self.request(method, path, headers, body))

    async def request(self, method: str, path: str, headers: HeaderList = (), body: bytes = b"") -> Reply:
        raw, _, query = (self.prefix + path).encode("utf-8").partition(b"?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote_to_bytes(raw).decode("utf-8", "replace"),
            "raw_path": raw,
            "query_string": query,
            "root_path": "",
            "headers": [(b"host", b"testserver"), *headers],
            "client": ("127.0.0.1", 1234),
            "server": ("127.0.0.1", 80),
        }
        sent: list[dict[str, Any]] = []
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(messages, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            sent.append(dict(message))

        await self.app(scope, receive, send)
        start, *bodies = sent
        names = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"])
        return Reply(start["status"], names, b"".join(message.get("body", b"") for message in bodies))


# --- on a socket ------------------------------------------------------------------------------------------------------


class OnSocket:
    """Writes raw requests to a port, and reads what comes back."""

    def __init__(self, port: int, prefix: str = "") -> None:
        self.port, self.prefix = port, prefix

    def ask(self, method: str, path: str, headers: HeaderList = (), body: bytes = b"") -> Reply:
        lines = [f"{method} {self.prefix}{path} HTTP/1.1".encode(), b"Host: localhost", b"Connection: close"]
        lines += [name + b": " + value for name, value in headers]
        lines += [b"Content-Length: %d" % len(body)] if body else []
        return self.raw(b"\r\n".join(lines) + b"\r\n\r\n" + body, method)

    def raw(self, request: bytes, method: str = "GET") -> Reply:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as client:
            client.sendall(request)
            return read_reply(client, method)


def read_reply(client: socket.socket, method: str = "GET") -> Reply:
    response = http.client.HTTPResponse(client, method=method)
    response.begin()
    body = response.read()
    return Reply(response.status, tuple((name.lower(), value) for name, value in response.getheaders()), body)


@contextmanager
def uvicorn_of(app: Any, root_path: str = "") -> Iterator[int]:
    """Run uvicorn in a thread; yields the port."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, root_path=root_path, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield int(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


# --- the hosts --------------------------------------------------------------------------------------------------------


def starlette_mounted(registry: rk.Registry) -> Any:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    return Starlette(routes=[Mount("/internal", rk.asgi.app(registry))])


def starlette_routes(registry: rk.Registry) -> Any:
    from starlette.applications import Starlette

    app = Starlette()
    app.router.routes.extend(rk.asgi.routes(registry, prefix="/internal"))
    return app


def fastapi_mounted(registry: rk.Registry) -> Any:
    app = pytest.importorskip("fastapi").FastAPI()
    app.mount("/internal", rk.asgi.app(registry))
    return app


def fastapi_routes(registry: rk.Registry) -> Any:
    app = pytest.importorskip("fastapi").FastAPI()
    app.router.routes.extend(rk.asgi.routes(registry, prefix="/internal"))
    return app


def fastapi_sub_router(registry: rk.Registry) -> Any:
    fastapi = pytest.importorskip("fastapi")
    router = fastapi.APIRouter()
    router.routes.extend(rk.asgi.routes(registry))
    app = fastapi.FastAPI()
    app.include_router(router, prefix="/internal")
    return app


@contextmanager
def in_memory(app: Any, prefix: str = "/internal") -> Iterator[Host]:
    yield InMemory(app, prefix)


@contextmanager
def under_uvicorn(app: Any, prefix: str) -> Iterator[Host]:
    with uvicorn_of(app) as port:
        yield OnSocket(port, prefix)


@contextmanager
def served(registry: rk.Registry) -> Iterator[Host]:
    with rk.serve(registry, port=0) as server:
        yield OnSocket(server.port)


HOSTS: dict[str, Callable[[rk.Registry], AbstractContextManager[Host]]] = {
    "plain": lambda registry: in_memory(rk.asgi.app(registry), prefix=""),
    "starlette mounted": lambda registry: in_memory(starlette_mounted(registry)),
    "starlette routes": lambda registry: in_memory(starlette_routes(registry)),
    "fastapi mounted": lambda registry: in_memory(fastapi_mounted(registry)),
    "fastapi routes": lambda registry: in_memory(fastapi_routes(registry)),
    "fastapi sub-router": lambda registry: in_memory(fastapi_sub_router(registry)),
    "uvicorn": lambda registry: under_uvicorn(rk.asgi.app(registry), ""),
    "uvicorn starlette": lambda registry: under_uvicorn(starlette_mounted(registry), "/internal"),
    "serve": served,
}


def bearer(token: bytes = b"s3cret") -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + token)]
