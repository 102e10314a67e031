"""The memory plane: servers and clients of one event loop, without sockets. For the tests of who uses rkmetrics.

    async def test_my_worker():
        registry = rk.Registry(strict=True, builtin=False)
        server = MemoryServer(registry, instance_id=1)
        server.endpoint("backend.generate", generate)
        async with server, MemoryClient(registry) as client:
            (instance,) = server.instances()
            response = await client.call(instance, {"prompt": "hello"})
            assert [item async for item in response] == ["h", "e", "l", "l", "o"]

The handler and its caller cannot tell it from the other planes: requests and items are really encoded and decoded, in
real frames; a slow reader holds the handler; stop, kill, deadlines, drain, refusals and the metrics (`plane="memory"`)
are the same code. There is no port, no thread and nothing to wait for, and what happens is always in the same order.
`server.cut()` breaks off as a crash does. An instance that a test makes up is reached nowhere, as with any plane.

A server is found by the place of its instances, ("memory", "<server id in hex>/<endpoint>"), from its own event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from contextvars import Context, copy_context
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rkmetrics.catalogue.planes import Plane
from rkmetrics.errors import RpcRefusedError, RpcUnreachableError, ServeError
from rkmetrics.planes.base import Instance, Refusal
from rkmetrics.planes.callhome import Answer, CallHome, Home, Homes
from rkmetrics.planes.calling import SILENCE_SECONDS, Call, PlaneClient
from rkmetrics.planes.serving import PlaneServer

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["MemoryClient", "MemoryServer"]

KIND = "memory"
#: What may lie between two ends before who writes is told to wait, and before it may go on; as asyncio's for sockets.
BYTES_HIGH, BYTES_LOW = 64 * 1024, 16 * 1024


class _Places:
    """Who is where, in one event loop."""

    def __init__(self) -> None:
        self.servers: dict[int, MemoryServer] = {}
        self.callers: dict[str, _CallHome] = {}
        self.numbers = count(1)


_places: WeakKeyDictionary[asyncio.AbstractEventLoop, _Places] = WeakKeyDictionary()


def _here() -> _Places:
    return _places.setdefault(asyncio.get_running_loop(), _Places())


# --- instead of sockets -----------------------------------------------------------------------------------------------


class _End(asyncio.Transport):
    """One end of a connection. What is written at one is read at the other, in a later turn of the loop."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol, self._loop = protocol, asyncio.get_running_loop()
        self._inbox: deque[bytes] = deque()
        self._inbox_bytes = 0
        self._closing = self._no_more = self._held = self._full = self._due = False
        self.other: _End = self

    def is_closing(self) -> bool:
        return self._closing

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not data:
            return
        self.other._arrive(bytes(data))
        if not self._full and self.other._inbox_bytes > BYTES_HIGH:
            self._full = True
            self._protocol.pause_writing()

    def _room(self) -> None:
        if self._full and not self._closing:
            self._full = False
            self._protocol.resume_writing()

    # --- reading ------------------------------------------------------------------------------------------------------

    def pause_reading(self) -> None:
        self._held = True

    def resume_reading(self) -> None:
        self._held = False
        self._ask()

    def is_reading(self) -> bool:
        return not self._held and not self._closing

    def _arrive(self, data: bytes) -> None:
        if not self._closing:
            self._inbox.append(data)
            self._inbox_bytes += len(data)
            self._ask()

    def _ask(self) -> None:
        if not self._due and (self._inbox or self._no_more):
            self._due = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        """Hand over one piece, as a socket does, since the protocol may want no more after it."""
        self._due = False
        if self._held or self._closing:
            return
        if self._inbox:
            data = self._inbox.popleft()
            self._inbox_bytes -= len(data)
            self._protocol.data_received(data)
            if self._inbox_bytes <= BYTES_LOW:
                self.other._room()
            self._ask()
        elif self._no_more:
            self.close()

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End it; what was written before is read at the other end."""
        if self._closing:
            return
        self._closing = True
        self._inbox.clear()
        self._inbox_bytes = 0
        self._loop.call_soon(self._protocol.connection_lost, None)
        self.other._no_more = True
        self.other._ask()

    abort = close


def _connect(one: asyncio.Protocol, other: asyncio.Protocol) -> None:
    ends = _End(one), _End(other)
    ends[0].other, ends[1].other = ends[1], ends[0]
    other.connection_made(ends[1])
    one.connection_made(ends[0])


class _CallHome(CallHome):
    """Where a client awaits its answers."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__("", lambda host, _: host, limit_bytes)

    async def _listen(self) -> str:
        places = _here()
        address = f"caller {next(places.numbers)}"
        places.callers[address] = self
        return address

    async def close(self) -> None:
        _here().callers.pop(self.address, None)
        await super().close()


class _Homes(Homes):
    """A server's connections to its callers. Which addresses are allowed is for those that have one."""

    def check(self, address: str) -> None:
        """Any will do; who is gone is found when its answer begins."""

    async def _connect(self, answer: Answer) -> None:
        caller = _here().callers.get(answer.address)
        if caller is None:
            raise ConnectionRefusedError("it is gone")
        _connect(answer, Home(caller))


# --- the plane --------------------------------------------------------------------------------------------------------


class MemoryServer(PlaneServer):
    """Serves endpoints in memory."""

    plane = Plane.MEMORY
    homes_class = _Homes

    async def _listen(self) -> None:
        servers = _here().servers
        other = servers.get(self.instance_id)
        if other is not None and other is not self:
            raise ServeError(f"instance_id={self.instance_id}: another memory server of this event loop has it")
        servers[self.instance_id] = self
        self.context: Context = copy_context()

    async def _close(self) -> None:
        servers = _here().servers
        for id in [id for id, server in servers.items() if server is self]:
            del servers[id]

    def cut(self) -> None:
        """Break all answers off, as a crash does: their handlers are cancelled, and their callers hear of no end."""
        self.homes.close()

    def renumber(self, instance_id: int) -> None:
        super().renumber(instance_id)
        if self.started:
            _here().servers[instance_id] = self

    def instances(self) -> Iterable[Instance]:
        for name in self.endpoints:
            yield Instance(*name, self.instance_id, (KIND, f"{self.instance_id:x}/{name.endpoint}"))


class MemoryClient(PlaneClient):
    """Calls servers of the same event loop."""

    plane = Plane.MEMORY

    def __init__(
        self, registry: Registry, *, silence_seconds: float = SILENCE_SECONDS, actor_name: str | None = None
    ) -> None:
        settings = registry.settings
        super().__init__(
            registry,
            _CallHome(settings.tcp_max_message_size_bytes),
            request_timeout_seconds=settings.tcp_request_timeout_seconds,
            silence_seconds=silence_seconds,
            actor_name=actor_name,
        )

    async def probe(self, instance: Instance) -> bool:
        return _server(instance.transport[1].partition("/")[0]) is not None

    async def _close(self) -> None:
        """Nothing is open but the way home."""

    def _push(self, call: Call, payload: bytes, traceparent: str) -> None:
        kind, place = call.instance.transport
        id, _, name = place.partition("/")
        server = _server(id) if kind == KIND else None
        if server is None:
            reason = f"no memory server of this event loop is at {place!r} ({kind})"
            call.fail(RpcUnreachableError(call.endpoint, reason, instance=call.where))
            return
        loop = asyncio.get_running_loop()
        loop.call_soon(_deliver, server, call, name, payload, traceparent, context=server.context)


def _server(id: str) -> MemoryServer | None:
    try:
        return _here().servers.get(int(id, 16))
    except ValueError:
        return None


def _deliver(server: MemoryServer, call: Call, name: str, payload: bytes, traceparent: str) -> None:
    if len(payload) > server.settings.tcp_max_message_size_bytes:
        refusal: Refusal | None = server.refuse(Refusal.TOO_LARGE, f"{len(payload)} bytes")
    else:
        refusal = server.take(name, payload, traceparent)
    if refusal is None:
        call.acknowledged()
        return
    reason = f"{refusal.text}: {call.where}" if refusal is Refusal.UNKNOWN_ENDPOINT else refusal.text
    call.fail(RpcRefusedError(call.endpoint, reason, instance=call.where))
