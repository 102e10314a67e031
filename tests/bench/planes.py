"""Calls over request planes: how many in a second, how long each takes, items of a stream, memory of a connection.

Server and client of each subject are in one process and one event loop, so a figure is what both ends cost together
(gRPC and nats-server have threads and a process beside it, which is theirs to keep). Each call sends JSON, which the
handler decodes, encodes again and sends back as one item.

"raw" is the limit: asyncio and Dynamo's frames with this package's codecs, and none of what makes a plane: no pools,
limits, time-outs, cancellation, back-pressure or metrics. It keeps the connection on which answers come, as ours does;
"raw, connects back" opens one for each answer, as Dynamo does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

import rkmetrics as rk
from rkmetrics.planes import RequestPlaneClient, client_class, server_class
from rkmetrics.planes.frame import (
    ACCEPTED,
    AckReader,
    RequestReader,
    TcpRequest,
    TwoPartReader,
    encode_request,
    encode_two_part,
    read_two_part,
)
from rkmetrics.planes.wire import (
    AGAIN,
    FINAL,
    PROLOGUE,
    SENTINEL,
    SENTINEL_HEADER,
    Handshake,
    RequestHeader,
    encode_item,
    read_item,
)
from tests.bench.base import Case, Scale, Skipped
from tests.bench.memory import _rss
from tests.bench.peers import peer
from tests.bench.updates import OURS

__all__ = ["CASES", "GRPC", "HTTPX", "RAW"]

RAW, RAW_BACK, GRPC, HTTPX = "raw", "raw, connects back", "grpc.aio", "httpx2 + uvicorn"
ROOT = Path(__file__).resolve().parents[2]
REQUEST = {"prompt": "The quick brown fox jumps over the lazy dog", "max_tokens": 16, "stream": True}
LIMIT = 32 << 20
MANY = 64
INSTANCE = 0x7D7BA1FBDCACD743

_encode, _decode = msgspec.json.Encoder().encode, msgspec.json.Decoder().decode


class Wire(NamedTuple):
    """A subject that runs. call: one call to its end; stream: so many items of one answer, to its end."""

    call: Callable[[], Awaitable[object]]
    stream: Callable[[int], Awaitable[object]]


Opened = Callable[[], AbstractAsyncContextManager[Wire]]


# --- ours -------------------------------------------------------------------------------------------------------------


async def _echo(request: Any) -> AsyncIterator[Any]:
    yield request


async def _count(request: Any) -> AsyncIterator[Any]:
    for i in range(request["n"]):
        yield {"i": i}


@asynccontextmanager
async def _ours(plane: str, **settings: Any) -> AsyncIterator[Wire]:
    local: dict[str, Any] = {"tcp_rpc_host": "127.0.0.1", "http_rpc_host": "127.0.0.1", "http_rpc_port": 0}
    registry = rk.Registry(rk.Settings(**(local | settings)))
    server, make_client = server_class(plane)(registry, instance_id=INSTANCE), cast("Any", client_class(plane))
    server.endpoint("backend.echo", _echo)
    server.endpoint("backend.count", _count)
    async with server, make_client(registry) as client:
        places = {each.endpoint: each for each in server.instances()}

        async def call() -> None:
            async for item in await client.call(places["echo"], REQUEST):
                assert item["max_tokens"] == 16

        async def stream(items: int) -> None:
            got = 0
            async for _ in await client.call(places["count"], {"n": items}):
                got += 1
            assert got == items

        yield Wire(call, stream)


# --- the limit --------------------------------------------------------------------------------------------------------


class _RawBack(asyncio.Protocol):
    """A connection to the caller, at the worker's."""

    def __init__(self, free: list[_RawBack]) -> None:
        self._free, self._reader = free, TwoPartReader(4_096)
        self._room: asyncio.Future[None] | None = None
        self.full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for _ in self._reader.feed(data):
            self._free.append(self)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        if self._room is not None:
            self._room.set_result(None)

    async def room(self) -> None:
        self._room = asyncio.get_running_loop().create_future()
        await self._room
        self._room = None


class _RawServer(asyncio.Protocol):
    """A connection of requests."""

    free: list[_RawBack]
    tasks: set[asyncio.Task[None]]

    def __init__(self, free: list[_RawBack], tasks: set[asyncio.Task[None]]) -> None:
        self._reader, self.free, self.tasks = RequestReader(LIMIT), free, tasks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for request in self._reader.feed(data):
            self._transport.write(ACCEPTED)
            task = asyncio.get_running_loop().create_task(self._answer(request.payload))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _answer(self, payload: bytes) -> None:
        parts = read_two_part(payload)
        header, request = RequestHeader.decode(parts.header), _decode(parts.body)
        back = self.free.pop() if self.free else await self._connect(header.address)
        head = Handshake(header.subject, header.reuse).encode() + PROLOGUE
        if "n" in request:
            back.transport.write(head)
            await self._stream(back, request["n"])
        else:
            back.transport.write(head + encode_item(_encode(request)) + FINAL + SENTINEL)
        if not header.reuse:
            back.transport.close()

    async def _stream(self, back: _RawBack, items: int) -> None:
        for first in range(0, items, 100):
            some = [encode_item(_encode({"i": i})) for i in range(first, min(first + 100, items))]
            back.transport.write(b"".join(some))
            if back.full:
                await back.room()
            else:
                await asyncio.sleep(0)
        back.transport.write(FINAL + SENTINEL)

    async def _connect(self, address: str) -> _RawBack:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: _RawBack(self.free), host, int(port)))[1]


class _RawHome(asyncio.Protocol):
    """A connection from the worker, at the caller's."""

    def __init__(self, waiting: dict[str, asyncio.Future[int]]) -> None:
        self._reader, self._waiting = TwoPartReader(LIMIT), waiting
        self._subject, self._reuse, self._items = "", False, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for frame in self._reader.feed(data):
            if frame.body:
                self._items += read_item(frame.body).data is not None
            elif frame.header == SENTINEL_HEADER:
                self._waiting.pop(self._subject).set_result(self._items)
                self._subject, self._items = "", 0
                if self._reuse:
                    self._transport.write(AGAIN)
            elif not self._subject:
                self._subject, self._reuse = Handshake.decode(frame)


class _RawLine(asyncio.Protocol):
    """The connection of requests, at the caller's."""

    def __init__(self) -> None:
        self._reader = AckReader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for reason in self._reader.feed(data):
            assert not reason


@asynccontextmanager
async def _raw(reuse: bool) -> AsyncIterator[Wire]:
    loop = asyncio.get_running_loop()
    free: list[_RawBack] = []
    tasks: set[asyncio.Task[None]] = set()
    waiting: dict[str, asyncio.Future[int]] = {}
    server = await loop.create_server(lambda: _RawServer(free, tasks), "127.0.0.1", 0, backlog=1_024)
    home = await loop.create_server(lambda: _RawHome(waiting), "127.0.0.1", 0, backlog=1_024)
    address = f"127.0.0.1:{home.sockets[0].getsockname()[1]}"
    line = (await loop.create_connection(_RawLine, *server.sockets[0].getsockname()[:2]))[1]

    def ask(request: Any) -> Awaitable[int]:
        subject = secrets.token_hex(16)
        header = RequestHeader(subject, address, subject, reuse)
        found = waiting[subject] = loop.create_future()
        two = encode_two_part(header.encode(), _encode(request))
        line.transport.write(encode_request(TcpRequest(f"{INSTANCE:x}/echo", b"{}", two)))
        return found

    async def call() -> None:
        assert await ask(REQUEST) == 1

    async def stream(items: int) -> None:
        assert await ask({"n": items}) == items

    yield Wire(call, stream)
    for transport in (line.transport, *(back.transport for back in free)):
        transport.close()
    server.close()
    home.close()
    await asyncio.sleep(0.01)


# --- peers ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _grpc() -> AsyncIterator[Wire]:
    grpc = peer("grpc")
    aio = peer("grpc.aio")

    async def echo(request: bytes, _: Any) -> bytes:
        return _encode(_decode(request))

    async def count(request: bytes, _: Any) -> AsyncIterator[bytes]:
        for i in range(_decode(request)["n"]):
            yield _encode({"i": i})

    methods = {
        "echo": grpc.unary_unary_rpc_method_handler(echo),
        "count": grpc.unary_stream_rpc_method_handler(count),
    }
    server = aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Backend", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask, follow = channel.unary_unary("/bench.Backend/echo"), channel.unary_stream("/bench.Backend/count")

        async def call() -> None:
            assert _decode(await ask(_encode(REQUEST)))["max_tokens"] == 16

        async def stream(items: int) -> None:
            got = 0
            async for item in follow(_encode({"n": items})):
                got += "i" in _decode(item)
            assert got == items

        yield Wire(call, stream)
    await server.stop(None)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """POST of JSON, and the same back; or lines of it."""
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    request = _decode(body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    for i in range(request.get("n", 0)):
        await send({"type": "http.response.body", "body": _encode({"i": i}) + b"\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"" if "n" in request else _encode(request)})


@asynccontextmanager
async def _httpx() -> AsyncIterator[Wire]:
    httpx, uvicorn = peer("httpx2"), peer("uvicorn")
    config = uvicorn.Config(_app, host="127.0.0.1", port=0, log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60.0, trust_env=False) as client:

        async def call() -> None:
            assert _decode((await client.post(url, content=_encode(REQUEST))).content)["max_tokens"] == 16

        async def stream(items: int) -> None:
            got = 0
            async with client.stream("POST", url, content=_encode({"n": items})) as response:
                async for line in response.aiter_lines():
                    got += "i" in _decode(line)
            assert got == items

        yield Wire(call, stream)
    server.should_exit = True
    await task


# --- all of them ------------------------------------------------------------------------------------------------------


def _nats(stack: ExitStack) -> str:
    """The URL of a server of its own."""
    from tests.services.nats_server import NatsServer

    binary = shutil.which("nats-server")
    if binary is None:
        raise Skipped("nats-server is not installed")
    peer("nats")
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    server = NatsServer(binary, Path(folder), jetstream=False).start()
    stack.callback(server.stop)
    return server.url


def _plane(name: str, stack: ExitStack) -> Opened:
    peer(f"rkmetrics.planes.{name}")
    return partial(_ours, name, **({"nats_server": _nats(stack)} if name == "nats" else {}))


SUBJECTS: Mapping[str, Callable[[ExitStack], Opened]] = {
    OURS: partial(_plane, "tcp"),
    f"{OURS}, http": partial(_plane, "http"),
    f"{OURS}, nats": partial(_plane, "nats"),
    f"{OURS}, memory": partial(_plane, "memory"),
    RAW: lambda _: partial(_raw, True),
    RAW_BACK: lambda _: partial(_raw, False),
    GRPC: lambda _: _grpc,
    HTTPX: lambda _: _httpx,
}


@asynccontextmanager
async def _opened(stack: ExitStack) -> AsyncIterator[dict[str, Wire]]:
    """All subjects that can run here."""
    async with AsyncExitStack() as wires:
        found: dict[str, Wire] = {}
        for name, make in SUBJECTS.items():
            try:
                found[name] = await wires.enter_async_context(make(stack)())
            except Skipped:
                continue
        yield found


async def _calls(wire: Wire, calls: int, at_once: int) -> list[float]:
    """Seconds of each call."""
    seconds: list[float] = []

    async def caller(count: int) -> None:
        for _ in range(count):
            began = time.perf_counter()
            await wire.call()
            seconds.append(time.perf_counter() - began)

    await asyncio.gather(*(caller(max(1, calls // at_once)) for _ in range(at_once)))
    return seconds


Measure = Callable[[Wire, Scale], Awaitable[Mapping[str, float]]]


def _measured(measure: Measure, parts: int = 3) -> Callable[[Scale], Mapping[str, Sequence[float]]]:
    """Measure all subjects in turn, in one loop. parts: of a scale's rounds, one in so many."""

    async def run(scale: Scale, stack: ExitStack) -> Mapping[str, Sequence[float]]:
        found: dict[str, list[float]] = {}
        async with _opened(stack) as wires:
            for round in range(1 + max(2, scale.rounds // parts)):
                for name, wire in wires.items():
                    gc.collect()
                    for what, figure in (await measure(wire, scale)).items():
                        if round:  # the first one opens connections
                            found.setdefault(name + what, []).append(figure)
        return found

    def measured(scale: Scale) -> Mapping[str, Sequence[float]]:
        with ExitStack() as stack:
            return asyncio.run(run(scale, stack))

    return measured


def _rate(at_once: int) -> Measure:
    async def measure(wire: Wire, scale: Scale) -> Mapping[str, float]:
        calls = max(1, scale.updates // 10 // at_once) * at_once
        began = time.perf_counter()
        await _calls(wire, calls, at_once)
        return {"": calls / (time.perf_counter() - began)}

    return measure


async def _cpu(wire: Wire, scale: Scale) -> Mapping[str, float]:
    """Microseconds."""
    calls = max(1, scale.updates // 10 // MANY) * MANY
    began = time.process_time()
    await _calls(wire, calls, MANY)
    return {"": (time.process_time() - began) / calls * 1e6}


async def _latency(wire: Wire, scale: Scale) -> Mapping[str, float]:
    """Milliseconds."""
    found: dict[str, float] = {}
    for at_once in (1, MANY):
        ordered = sorted(await _calls(wire, max(at_once, scale.updates // 10), at_once))
        for what, part in (("p50", 0.5), ("p99", 0.99)):
            place = min(len(ordered) - 1, int(part * len(ordered)))
            found[f", {at_once} at once, {what}"] = ordered[place] * 1e3
    return found


async def _items(wire: Wire, scale: Scale) -> Mapping[str, float]:
    items = max(10, scale.updates)
    began = time.perf_counter()
    await wire.stream(items)
    return {"": items / (time.perf_counter() - began)}


# --- memory, each subject in a process of its own ---------------------------------------------------------------------


async def _idle(subject: str, clients: int) -> float:
    """KiB for each client that has called once and rests, with the server's part of it."""
    with ExitStack() as stack:
        open_one = IDLE[subject](stack)
        async with AsyncExitStack() as wires:
            for number in range(-max(2, clients // 10), clients):
                if number == 0:
                    gc.collect()
                    before = _rss()
                await wires.enter_async_context(await open_one(wires))
            gc.collect()
            return (_rss() - before) / clients / 1024


Idle = Callable[[AsyncExitStack], Awaitable[AbstractAsyncContextManager[object]]]


def _idle_ours(stack: ExitStack) -> Idle:
    registry = rk.Registry(rk.Settings(tcp_rpc_host="127.0.0.1"))
    server = server_class("tcp")(registry, instance_id=INSTANCE)
    server.endpoint("backend.echo", _echo)

    async def open_one(wires: AsyncExitStack) -> AbstractAsyncContextManager[object]:
        if not server.started:
            await wires.enter_async_context(server)
        client: RequestPlaneClient = cast("Any", client_class("tcp"))(registry)
        (place,) = server.instances()
        assert await (await client.call(place, REQUEST)).one() == REQUEST
        return client

    return open_one


def _idle_grpc(stack: ExitStack) -> Idle:
    grpc, aio = peer("grpc"), peer("grpc.aio")
    started: list[int] = []

    async def echo(request: bytes, _: Any) -> bytes:
        return request

    async def open_one(wires: AsyncExitStack) -> AbstractAsyncContextManager[object]:
        if not started:
            server = aio.server()
            methods = {"echo": grpc.unary_unary_rpc_method_handler(echo)}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Backend", methods),))
            started.append(server.add_insecure_port("127.0.0.1:0"))
            await server.start()
            wires.push_async_callback(server.stop, None)
        # Channels of one process share a connection, unless they are told not to.
        alone = [("grpc.use_local_subchannel_pool", 1)]
        channel = aio.insecure_channel(f"127.0.0.1:{started[0]}", options=alone)
        assert await channel.unary_unary("/bench.Backend/echo")(b"x") == b"x"
        return cast("AbstractAsyncContextManager[object]", channel)

    return open_one


IDLE: Mapping[str, Callable[[ExitStack], Idle]] = {OURS: _idle_ours, GRPC: _idle_grpc}


def _memory(scale: Scale) -> Mapping[str, Sequence[float]]:
    found: dict[str, Sequence[float]] = {}
    for subject, module in ((OURS, "asyncio"), (GRPC, "grpc")):
        try:
            peer(module)
        except Skipped:
            continue
        command = [sys.executable, "-m", "tests.bench.planes", subject, str(max(5, min(200, scale.updates // 10)))]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        found[subject] = [max(0.0, json.loads(out.stdout))]
    return found


WALL = "wall clock; more is better"

CASES = (
    Case("rpc", f"calls in a second, {MANY} at once", "1/s", _measured(_rate(MANY)), note=WALL),
    Case("rpc alone", "calls in a second, one after another", "1/s", _measured(_rate(1)), note=WALL),
    Case("rpc cpu", f"a call, {MANY} at once", "us", _measured(_cpu), note="CPU of both ends; of nats-server not"),
    Case("rpc latency", "a call, to its end", "ms", _measured(_latency, 5), note="wall clock", compared=False),
    Case("rpc items", "items of one answer in a second", "1/s", _measured(_items), note=WALL),
    Case(
        "rpc memory",
        "a client that rests, with both its connections, and the server's part",
        "KiB",
        _memory,
        note="RSS",
    ),
)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_idle(sys.argv[1], int(sys.argv[2])))))
