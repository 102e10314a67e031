"""Peers of the request planes that misbehave, on real sockets, and the little that well-behaved ones need.

`Worker` takes requests over tcp and does with each what a test says; `Caller` sends bytes to a server and listens for
what is connected to it. Both see every byte. `Counts` reads what was counted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import rkmetrics as rk
from rkmetrics.catalogue.planes import (
    CallOutcome,
    IntakeRefusal,
    Plane,
    RpcCalling,
    RpcIntake,
    RpcServing,
    ServeOutcome,
)
from rkmetrics.errors import PayloadError
from rkmetrics.planes.base import Instance
from rkmetrics.planes.frame import (
    ACCEPTED,
    AckReader,
    RequestReader,
    TcpRequest,
    TwoPart,
    TwoPartReader,
    encode_request,
    encode_two_part,
    read_two_part,
)
from rkmetrics.planes.wire import Handshake, RequestHeader
from tests.hostile import until

__all__ = [
    "Caller",
    "Connection",
    "Counts",
    "Worker",
    "awaiting",
    "descriptors",
    "ended",
    "passed",
    "registry",
    "working",
]

LIMIT = 64 << 20
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def registry(**settings: Any) -> rk.Registry:
    """A registry of its own, for the tcp plane on loopback."""
    return rk.Registry(rk.Settings(**({"tcp_rpc_host": "127.0.0.1"} | settings)), builtin=False)


async def passed(seconds: float) -> None:
    """Wait until so much time of the loop's clock has passed: for what is to happen after it, or not to happen."""
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    await until(lambda: loop.time() >= due)


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


class Counts:
    """What a registry counted for the component "backend"."""

    def __init__(self, of: rk.Registry, plane: Plane = Plane.TCP) -> None:
        self._plane = plane
        self._serving, self._calling = (
            of.bind(RpcServing, actor_name="backend"),
            of.bind(RpcCalling, actor_name="backend"),
        )
        self._intake = of.bind(RpcIntake)

    @property
    def served(self) -> dict[str, float]:
        """How requests ended, without zeros."""
        return _without_zeros((each.value, self._serving.requests[self._plane, each].value) for each in ServeOutcome)

    @property
    def called(self) -> dict[str, float]:
        """How calls ended."""
        return _without_zeros((each.value, self._calling.calls[self._plane, each].value) for each in CallOutcome)

    @property
    def refused(self) -> dict[str, float]:
        """What reached no handler."""
        return _without_zeros((each.value, self._intake.refused[self._plane, each].value) for each in IntakeRefusal)

    @property
    def in_flight(self) -> tuple[float, float]:
        """Requests that are answered, calls that wait."""
        return self._serving.in_flight[self._plane].value or 0.0, self._calling.in_flight[self._plane].value or 0.0

    @property
    def connections(self) -> float:
        return self._intake.connections[self._plane].value or 0.0


def _without_zeros(pairs: Iterator[tuple[str, float]]) -> dict[str, float]:
    return {name: value for name, value in pairs if value}


# --- workers ----------------------------------------------------------------------------------------------------------


class Worker:
    """Takes requests, and does with each what a test says: `behave(worker, request header, connection of the request)`.

    seen: the envelopes. ended: how connections to callers ended that the test is done with.
    """

    def __init__(self, behave: Callable[[Worker, RequestHeader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self.behave = behave
        self.seen: list[TcpRequest] = []
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.address = ""

    def instance(self, endpoint: str = "echo") -> Instance:
        return Instance("dynamo", "backend", endpoint, 7, ("tcp", f"{self.address}/7/{endpoint}"))

    async def home(self, header: RequestHeader, *frames: bytes, subject: str | None = None) -> Streams:
        """Connect to a caller, say whose answer this is, and send frames."""
        host, _, port = header.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        self._writers.append(writer)
        writer.write(Handshake(header.subject if subject is None else subject).encode() + b"".join(frames))
        await writer.drain()
        return reader, writer

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        requests = RequestReader(LIMIT)
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                for request in requests.feed(data):
                    self.seen.append(request)
                    header = RequestHeader.decode(read_two_part(request.payload).header)
                    task = asyncio.create_task(self._behave(header, writer))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        writer.close()

    async def _behave(self, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await self.behave(self, header, writer)

    async def end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await ended(self._writers)


async def ended(writers: list[asyncio.StreamWriter]) -> None:
    """Close connections, and wait until they are."""
    for writer in writers:
        writer.transport.abort()
    await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


@asynccontextmanager
async def working(
    behave: Callable[[Worker, RequestHeader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Worker]:
    """Run a worker."""
    worker = Worker(behave)
    server = await asyncio.start_server(worker.connected, "127.0.0.1", 0)
    worker.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield worker
    finally:
        server.close()
        await worker.end()


# --- callers ----------------------------------------------------------------------------------------------------------


class Connection:
    """A connection to a caller: the frames that came on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.frames: list[TwoPart] = []
        self.over = False

    @property
    def bodies(self) -> list[bytes]:
        return [frame.body for frame in self.frames if frame.body]

    @property
    def headers(self) -> list[bytes]:
        return [frame.header for frame in self.frames if frame.header]

    async def read(self) -> None:
        reader = TwoPartReader(LIMIT)
        with suppress(ConnectionError):
            while data := await self.reader.read(65_536):
                self.frames += reader.feed(data)
        self.over = True


class Caller:
    """Sends requests as bytes, and listens. connections: those that were made to it, in order.

    read: whether what comes is read.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, read: bool = True) -> None:
        self.reader, self.writer = reader, writer
        self.address = ""
        self.connections: list[Connection] = []
        self.acks: list[str] = []
        self.over = False
        self._read = read
        self._acks = AckReader()
        self._tasks: set[asyncio.Task[None]] = set()
        if read:
            self._run(self._read_acks())

    def _run(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read_acks(self) -> None:
        with suppress(ConnectionError, PayloadError):
            while data := await self.reader.read(65_536):
                self.acks += self._acks.feed(data)
        self.over = True

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        self.connections.append(connection)
        if self._read:
            await connection.read()
            writer.close()

    def payload(self, body: bytes = b"{}", *, id: str = "a", subject: str = "s", **fields: Any) -> bytes:
        """Two parts whose answer is awaited here."""
        header = RequestHeader(id, fields.pop("address", self.address), subject, fields.pop("reuse", False))
        return encode_two_part(header.encode(), body)

    def send(self, path: str, payload: bytes, headers: bytes | None = None) -> None:
        """Send a request: with headers in the form of 0.8, without in that of 0.7."""
        self.writer.write(encode_request(TcpRequest(path, headers, payload)))

    async def answers(self, connections: int = 1) -> None:
        """Wait until so many answers were read to their last word, but for those that only say that none comes."""
        await until(lambda: self.whole >= connections)

    @property
    def whole(self) -> int:
        """How many answers were read to their last word."""
        begun = (connection.headers for connection in self.connections if b'{"error":null}' in connection.headers)
        return sum(headers.count(b'"sentinel"') for headers in begun)

    async def end(self) -> None:
        await ended([self.writer, *(connection.writer for connection in self.connections)])
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def awaiting(address: str, *, read: bool = True) -> AsyncIterator[Caller]:
    """Connect to a server at host:port, and listen."""
    host, _, port = address.rpartition(":")
    caller = Caller(*await asyncio.open_connection(host, int(port)), read=read)
    server = await asyncio.start_server(caller.connected, "127.0.0.1", 0)
    caller.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield caller
    finally:
        server.close()
        await caller.end()
        await asyncio.sleep(0)


#: What an acknowledgement says.
TAKEN = ACCEPTED
