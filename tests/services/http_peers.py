"""What tests of the http plane share: bytes to send, and servers that are attacked while an honest client is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from typing import Any, cast

import pytest

from rkmetrics.planes.base import RpcContext
from rkmetrics.planes.frame import encode_two_part
from rkmetrics.planes.http import HttpClient, HttpServer
from rkmetrics.planes.wire import RequestHeader
from tests.contracts.peers import Peers, peers_of, until
from tests.planes.test_http import frame

__all__ = [
    "HEAD",
    "PREFACE",
    "Attacked",
    "attacked",
    "honest",
    "no_pools",
    "over_either",
    "payload",
    "pools",
    "port_of",
    "post",
    "said",
]

#: Whether the client speaks HTTP/2.
over_either = pytest.mark.parametrize(
    "prior",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not find_spec("h2"), reason="HTTP/2: pip install 'rkmetrics[http]'")
        ),
    ],
    ids=["HTTP/1.1", "HTTP/2"],
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4)
#: :method POST, :scheme http, :path of the static table is "/", so the path is a literal; :authority a.
HEAD = b"\x83\x86\x44\x0e/v1/rpc/honest\x41\x01a"
VERSIONS = {"HTTP/1.1": False, "HTTP/2": True}


@pytest.fixture(params=list(VERSIONS.values()), ids=list(VERSIONS))
def prior(request: pytest.FixtureRequest) -> bool:
    """Whether the client speaks HTTP/2."""
    if request.param:
        pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    return bool(request.param)


async def honest(request: Any, context: RpcContext) -> AsyncIterator[Any]:
    yield {"got": request if not isinstance(request, str) or len(request) < 100 else len(request)}
    yield context.request.traceparent


def pools(client: Any) -> int:
    """How many connections a client has."""
    return sum(len(pool) for pool in cast("HttpClient", client)._pools.values())


def no_pools(client: Any) -> bool:
    return not pools(client)


def port_of(peers: Peers) -> int:
    return int(peers.instance("honest").transport[1].split(":")[2].partition("/")[0])


def payload(body: bytes = b"1", id: str = "a") -> bytes:
    """A request whose answer goes nowhere: nobody listens there."""
    return encode_two_part(RequestHeader(id, "127.0.0.1:9", "s").encode(), body)


def post(body: bytes, *headers: str, path: str = "/v1/rpc/honest", method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: a", *headers]
    if not any(each.lower().startswith(("content-length", "transfer-encoding")) for each in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def said(port: int, data: bytes, *, until_end: bool = True) -> bytes:
    """What a server says to some bytes, until it ends the connection, or to the end of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        async with asyncio.timeout(60):
            if until_end:
                with suppress(ConnectionError):
                    return await reader.read()
                return b""
            return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.transport.abort()


class Attacked:
    """A server, an honest client of each version, and a way to attack meanwhile."""

    def __init__(self, peers: Peers) -> None:
        self.peers, self.port = peers, port_of(peers)

    async def serves(self, calls: int = 20) -> None:
        """Honest calls, of which each is answered."""
        for at in range(calls):
            assert (await self.peers.items("honest", at))[0] == {"got": at}

    def refused(self, reason: str) -> float:
        return self.peers.count("refused_total", reason=reason)

    async def beside(self, *attacks: Any) -> list[Any]:
        """Serve while attacks go on; what came of them."""
        found, _ = await asyncio.gather(asyncio.gather(*attacks), self.serves())
        return list(found)


@asynccontextmanager
async def attacked(prior: bool = False, **more: Any) -> AsyncGenerator[Attacked]:
    """patience, connections_limit, kept_limit_bytes: of the server; all else is settings."""
    limits = {name: more.pop(name) for name in ("patience", "connections_limit", "kept_limit_bytes") if name in more}
    kept = {name: getattr(HttpServer, name) for name in limits}
    with pytest.MonkeyPatch.context() as patch:
        for name in kept:
            patch.setattr(HttpServer, name, limits[name])
        async with peers_of("http", http2_prior_knowledge=prior, **more) as peers:
            server = cast("HttpServer", await peers.serve(honest=honest))
            yield Attacked(peers)
            await until(lambda: not server.kept_bytes)
