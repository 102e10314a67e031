"""The tcp plane: requests over a few kept connections, each acknowledged in the order they came.

The server takes both forms of the envelope, whatever DYN_WIRE says: a path with an id in it is of 0.8 and later, one
without of 0.7. What it lists itself as is of DYN_WIRE, and a client speaks the form of what is listed, so a fleet with
both works, where Dynamo's own runtimes hang on each other's form.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec

from rkmetrics.addresses import WILDCARDS, advertised, first_address, local_addresses
from rkmetrics.catalogue.planes import IntakeRefusal, Plane
from rkmetrics.errors import PayloadError, RpcRefusedError, RpcUnreachableError, ServeError
from rkmetrics.planes.base import Instance, Refusal
from rkmetrics.planes.callhome import CallHome, keep_alive
from rkmetrics.planes.calling import SILENCE_SECONDS, Call, PlaneClient
from rkmetrics.planes.frame import (
    ACCEPTED,
    AckReader,
    FrameTooLargeError,
    RequestReader,
    TcpRequest,
    encode_ack,
    encode_request,
)
from rkmetrics.planes.serving import PlaneServer

if TYPE_CHECKING:
    from rkmetrics.registry import Registry
    from rkmetrics.settings import Settings

__all__ = ["TcpClient", "TcpServer", "call_home", "here", "read_target"]

FRAME_SECONDS = 30.0
CONNECTIONS_LIMIT = 10_000
#: So many requests wait on a connection for their acknowledgement before another connection is opened.
PIPELINE_REQUESTS = 8
KIND = "tcp"

_headers = msgspec.json.Decoder(dict[str, str]).decode


# --- where ------------------------------------------------------------------------------------------------------------


def here(host: str | None) -> str:
    """Return the address to bind where nobody says one: the first that is not loopback, as Dynamo does."""
    return host or first_address(local_addresses()) or "127.0.0.1"


def call_home(settings: Settings, host: str | None) -> CallHome:
    """Return where a client awaits its answers."""
    return CallHome(
        here(host),
        lambda bound, port: advertised(_told(settings), bound, port) if bound in WILDCARDS else _joined(bound, port),
        settings.tcp_max_message_size_bytes,
    )


def _told(settings: Settings) -> str | None:
    """The host of what is announced for traffic; its port is another's."""
    told = settings.advertise_address
    return told.rpartition(":")[0] if told and ":" in told.strip("[]") and not told.endswith("]") else told


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- the server -------------------------------------------------------------------------------------------------------


class _Caller(asyncio.Protocol):
    """A connection from a client."""

    def __init__(self, server: TcpServer) -> None:
        self._server = server
        self._reader = RequestReader(server.limit_bytes)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if not self._server.admit(self):
            self._transport.abort()
            return
        keep_alive(self._transport)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        try:
            requests = self._reader.feed(data)
        except PayloadError as error:
            self._refuse(transport, error)
            return
        if requests:
            transport.write(b"".join(map(self._server.acknowledge, requests)))
        self._watch()

    def _refuse(self, transport: asyncio.Transport, error: PayloadError) -> None:
        large = isinstance(error, FrameTooLargeError)
        refusal = self._server.refuse(Refusal.TOO_LARGE if large else Refusal.MALFORMED, str(error))
        transport.write(encode_ack(refusal.text))
        transport.close()

    def _watch(self) -> None:
        """A request that has begun has to end in time; a connection without one may rest."""
        if self._timer is not None and not self._reader.rest:
            self._timer.cancel()
            self._timer = None
        elif self._timer is None and self._reader.rest:
            self._timer = asyncio.get_running_loop().call_later(FRAME_SECONDS, self._too_slow)

    def _too_slow(self) -> None:
        self._server.note(IntakeRefusal.TOO_SLOW, f"a request was not complete in {FRAME_SECONDS:g} s")
        self.abort()

    def pause_writing(self) -> None:
        """The client does not read its acknowledgements: it is not read either."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        self._server.release(self)


class TcpServer(PlaneServer):
    """Serves endpoints over tcp, at DYN_TCP_RPC_HOST and DYN_TCP_RPC_PORT."""

    plane = Plane.TCP

    @property
    def limit_bytes(self) -> int:
        """Of a request."""
        return self.settings.tcp_max_message_size_bytes

    async def _listen(self) -> None:
        host, port = here(self.settings.tcp_rpc_host), self.settings.tcp_rpc_port
        self._callers: set[_Caller] = set()
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: _Caller(self), "" if host == "*" else host, port, backlog=1_024
            )
        except OSError as error:
            raise ServeError(
                f"the tcp plane cannot listen at {host}:{port}: {error}; set DYN_TCP_RPC_HOST and DYN_TCP_RPC_PORT "
                "(0 takes a free port)"
            ) from error
        bound, port = self._server.sockets[0].getsockname()[:2]
        self._address = advertised(_told(self.settings), host, port) if host in WILDCARDS else _joined(bound, port)

    async def _close(self) -> None:
        self._server.close()
        for caller in list(self._callers):
            caller.close()
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        """host:port, as others reach it."""
        return self._address

    def instances(self) -> Iterable[Instance]:
        middle = "" if self.settings.wire == "0.7" else f"{self.instance_id:x}/"
        for name in self.endpoints:
            yield Instance(*name, self.instance_id, (KIND, f"{self._address}/{middle}{name.endpoint}"))

    def acknowledge(self, request: TcpRequest) -> bytes:
        """Take a request; what its sender gets."""
        id, _, name = request.path.rpartition("/")
        if id and not self.is_mine(id):
            refusal: Refusal | None = self.refuse(Refusal.UNKNOWN_ENDPOINT)
        else:
            refusal = self.take(name, request.payload, _traceparent(request.headers))
        if refusal is None:
            return ACCEPTED
        return encode_ack(f"{refusal.text}: {request.path}" if refusal is Refusal.UNKNOWN_ENDPOINT else refusal.text)

    def admit(self, caller: _Caller) -> bool:
        """Whether there is room for another connection."""
        if len(self._callers) >= CONNECTIONS_LIMIT:
            self.note(IntakeRefusal.BUSY, f"{CONNECTIONS_LIMIT} connections are there already")
            return False
        self._callers.add(caller)
        self.connections.set(len(self._callers))
        return True

    def release(self, caller: _Caller) -> None:
        """A connection ended."""
        self._callers.discard(caller)
        self.connections.set(len(self._callers))


def _traceparent(headers: bytes | None) -> str:
    if not headers or b"traceparent" not in headers:
        return ""
    try:
        return _headers(headers).get("traceparent", "")
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ""  # routing is by the path; real workers take any headers


# --- the client -------------------------------------------------------------------------------------------------------


class _Target(NamedTuple):
    """What an address says. headers: whether its envelope has them, as in 0.8 and later."""

    host: str
    port: int
    path: str
    headers: bool


@lru_cache(maxsize=10_000)
def read_target(place: str) -> _Target:
    """Read host:port/path, as it is listed. Raises ValueError."""
    address, slash, path = place.partition("/")
    host, _, port = address.rpartition(":")
    if not slash or not path.isascii() or not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ValueError(f"{place!r}: expected host:port/endpoint or host:port/id/endpoint")
    return _Target(host.strip("[]"), int(port), path, "/" in path)


class _Line(asyncio.Protocol):
    """A connection to a server. pending: calls whose acknowledgement is awaited, in the order of their requests."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._reader = AckReader()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self.pending: deque[Call] = deque()
        self.full = False

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, call: Call, frame: bytes) -> None:
        """Send a request; those of one turn of the loop go out together."""
        self.pending.append(call)
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out and self.usable:
            assert self._transport is not None
            self._transport.write(b"".join(out) if len(out) > 1 else out[0])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        keep_alive(self._transport)

    def data_received(self, data: bytes) -> None:
        try:
            for reason in self._reader.feed(data):
                self._settle(reason)
        except PayloadError as error:
            self._lose(str(error))
        self._pool.go_on()

    def _settle(self, reason: str) -> None:
        if not self.pending:
            raise PayloadError("an acknowledgement", reason.encode(), "nothing was sent")
        call = self.pending.popleft()
        if reason:
            call.fail(RpcRefusedError(call.endpoint, reason, instance=call.where))
        else:
            call.acknowledged()

    def _lose(self, reason: str) -> None:
        if self._transport is not None:
            self._transport.abort()
        pending, self.pending = self.pending, deque()
        for call in pending:  # it may have been taken, and the answer on its way: only a begun one is sure
            if not call.begun.done():
                call.fail(RpcUnreachableError(call.endpoint, reason, instance=call.where, delivered=True))

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self._pool.go_on()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def eof_received(self) -> None:
        """The server leaves; what is pending is told when the connection is lost."""
        self._pool.drop(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.drop(self)
        self._lose(f"the connection ended before the acknowledgement{f': {exc}' if exc else ''}")
        self._pool.go_on()


class _Pool:
    """The connections to one server: one, and more while it acknowledges slowly, up to DYN_TCP_POOL_SIZE.

    On each, DYN_TCP_CHANNEL_BUFFER requests may wait; what is more waits here, until its time-out.
    """

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        self._settings, self._host, self._port = settings, host, port
        self._lines: list[_Line] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[tuple[Call, bytes]] = deque()

    def send(self, call: Call, frame: bytes) -> None:
        """Send a request, or have it wait for a place."""
        line = self._best()
        if line is None or (len(line.pending) >= PIPELINE_REQUESTS and self._may_open()):
            self._open()
        if line is not None and not self._waiting:
            line.send(call, frame)
        else:
            self._waiting.append((call, frame))
            self.go_on()

    def _best(self) -> _Line | None:
        """The connection with the fewest that wait."""
        best, fewest = None, self._settings.tcp_channel_buffer
        for line in self._lines:
            if len(line.pending) < fewest and line.usable and not line.full:
                best, fewest = line, len(line.pending)
                if not fewest:
                    break
        return best

    def _may_open(self) -> bool:
        return len(self._lines) + len(self._opening) < self._settings.tcp_pool_size and not self._opening

    def go_on(self) -> None:
        """Send what waits, where there is a place by now."""
        while self._waiting:
            call, frame = self._waiting[0]
            if call.begun.done():  # given up
                self._waiting.popleft()
                continue
            line = self._best()
            if line is None:
                if self._may_open():
                    self._open()
                return
            self._waiting.popleft()
            line.send(call, frame)

    def _open(self) -> None:
        if not self._may_open():
            return
        task = asyncio.get_running_loop().create_task(self._connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        line, seconds = _Line(self), self._settings.tcp_connect_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().create_connection(lambda: line, self._host, self._port)
        except TimeoutError:
            self._fail(f"no connection in {seconds:g} s")
        except OSError as error:
            self._fail(f"no connection: {error}")
        else:
            self._lines.append(line)
            asyncio.get_running_loop().call_soon(self.go_on)

    def _fail(self, reason: str) -> None:
        """Without any connection nothing that waits has a chance; with one it goes on."""
        if self._lines:
            return
        waiting, self._waiting = self._waiting, deque()
        for call, _ in waiting:
            call.fail(RpcUnreachableError(call.endpoint, reason, instance=call.where))

    def drop(self, line: _Line) -> None:
        """A connection ended."""
        if line in self._lines:
            self._lines.remove(line)

    def close(self) -> list[asyncio.Task[None]]:
        """End all connections. Returns the tasks that are ending."""
        for task in self._opening:
            task.cancel()
        lines, self._lines = self._lines, []
        for line in lines:
            line.close()
        self._fail("the client was closed")
        return list(self._opening)

    def __len__(self) -> int:
        return len(self._lines)


class TcpClient(PlaneClient):
    """Calls over tcp."""

    plane = Plane.TCP

    def __init__(
        self, registry: Registry, *, silence_seconds: float = SILENCE_SECONDS, actor_name: str | None = None
    ) -> None:
        settings = registry.settings
        super().__init__(
            registry,
            call_home(settings, settings.tcp_rpc_host),
            request_timeout_seconds=settings.tcp_request_timeout_seconds,
            silence_seconds=silence_seconds,
            actor_name=actor_name,
        )
        self._pools: dict[tuple[str, int], _Pool] = {}

    def _push(self, call: Call, payload: bytes, traceparent: str) -> None:
        kind, place = call.instance.transport
        try:
            if kind != KIND:
                raise ValueError(f"it is reached over {kind!r}, and this client speaks tcp")
            target = read_target(place)
        except ValueError as error:
            call.fail(RpcUnreachableError(call.endpoint, str(error), instance=call.where))
            return
        if len(payload) > self.settings.tcp_max_message_size_bytes:
            reason = f"the request has {len(payload)} bytes (DYN_TCP_MAX_MESSAGE_SIZE)"
            call.fail(RpcRefusedError(call.endpoint, reason, instance=call.where))
            return
        headers = _encode_headers(target.path, traceparent) if target.headers else None
        self._pool(target).send(call, encode_request(TcpRequest(target.path, headers, payload)))

    def _pool(self, target: _Target) -> _Pool:
        key = target.host, target.port
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = _Pool(self.settings, *key)
        return pool

    async def _close(self) -> None:
        ending = [task for pool in self._pools.values() for task in pool.close()]
        self._pools.clear()
        if ending:
            await asyncio.wait(ending)


def _encode_headers(path: str, traceparent: str) -> bytes:
    fields = {"x-endpoint-path": path}
    if traceparent:
        fields["traceparent"] = traceparent
    return msgspec.json.encode(fields)
