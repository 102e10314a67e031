"""HTTP servers that misbehave, on real sockets: what a client of strangers has to live with (reliability, T14, F25).

A behaviour takes one connection's reader and writer, and may do with them as it likes. `serving` runs one on a free
port; `Peer.behave` may be replaced at any time, for the connections after it.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from rkmetrics.planes.callhome import refuse
from tests.waiting import until

__all__ = ["BEHAVIOURS", "Behave", "Peer", "answering", "response", "serving", "until"]

Behave = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
END = b"\r\n\r\n"


class Peer:
    """A server, and what it saw. requests: heads, in order."""

    def __init__(self, behave: Behave) -> None:
        self.behave, self.port = behave, 0
        self.connections = 0
        self.requests: list[bytes] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        read = reader.readuntil

        async def noted(separator: bytes = END) -> bytes:
            found = await read(separator)
            self.requests.append(found)
            return found

        reader.readuntil = noted  # type: ignore[method-assign,assignment]
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self.behave(reader, writer)
        writer.close()

    async def cut(self) -> None:
        """End all connections."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()


@asynccontextmanager
async def serving(behave: Behave, **options: Any) -> AsyncIterator[Peer]:
    peer = Peer(behave)
    server = await asyncio.start_server(
        peer.connected, options.pop("host", "127.0.0.1"), options.pop("port", 0), **options
    )
    peer.port = int(server.sockets[0].getsockname()[1])
    try:
        yield peer
    finally:
        await refuse(server)  # what is being accepted is ended by `cut` as well
        await peer.cut()
        await asyncio.sleep(0)


def response(status: str, body: bytes = b"", *headers: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status}".encode(), *headers, b"content-length: %d" % len(body)]
    return b"\r\n".join(lines) + END + body


def answering(*answers: bytes) -> Behave:
    """Give these answers on a connection, the last one for ever."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = list(answers)
        while True:
            await reader.readuntil(END)
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()

    return behave


def _then_close(data: bytes) -> Behave:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(END)
        writer.write(data)
        await writer.drain()

    return behave


def _endless(head: bytes, piece: bytes, pause: float = 0.0) -> Behave:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(END)
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return behave


async def _hang(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()
    await asyncio.Event().wait()


async def _reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(END)
    writer.transport.abort()


OK = b"HTTP/1.1 200 OK\r\n"

BEHAVIOURS: Mapping[str, Behave] = {
    "hangs": _hang,
    "drips its headers": _endless(OK, b"x: y\r\n", 0.1),
    "drips its body": _endless(OK + b"content-length: 60000\r\n\r\n", b" ", 0.05),
    "garbage": answering(b"\x00\xff\x16\x03 garbage\r\n\r\n"),
    "another protocol": _endless(b"SSH-2.0-OpenSSH_9.9\r\n", b"", 60),
    "redirect": answering(response("302 Found", b"", b"location: http://127.0.0.1:1/kv_metrics")),
    "gzip": answering(response("200 OK", gzip.compress(bytes(1_000_000)), b"content-encoding: gzip")),
    "a length of 1 GiB": _endless(OK + b"content-length: 1073741824\r\n\r\n", bytes(65_536)),
    "a body without end": _endless(OK + END[2:], bytes(65_536)),
    "headers without end": _endless(OK, b"x: " + b"y" * 1000 + b"\r\n"),
    "chunks without end": _endless(OK + b"transfer-encoding: chunked\r\n\r\n", b"1000\r\n" + bytes(4096) + b"\r\n"),
    "tiny chunks without end": _endless(OK + b"transfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 1000),
    "two lengths": answering(OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}"),
    "vanishes": _then_close(b""),
    "resets": _reset,
    "half a head": _then_close(OK + b"content-type: app"),
    "half a body": _then_close(OK + b"content-length: 100\r\n\r\n{"),
    "wrong JSON": answering(response("200 OK", b'{"workers":[{"worker_id":"seven"}]}')),
    "other JSON": answering(response("200 OK", b'{"status":"ok"}')),
    "no JSON": answering(response("200 OK", b"<html>it works</html>")),
    "JSON bomb": answering(response("200 OK", b"[" * 60_000)),
    "no UTF-8": answering(response("200 OK", b'{"runtime":"\xff\xfe"}')),
    "unauthorized": answering(response("401 Unauthorized", b"no\n")),
    "forbidden": answering(response("403 Forbidden", b"metrics not enabled\n")),
    "broken": answering(response("500 Internal Server Error", b"oops")),
    "not modified, unasked": answering(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
}
