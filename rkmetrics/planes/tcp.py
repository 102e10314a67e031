"""The tcp plane: requests over a few kept connections, each acknowledged in the order they came.

The server takes both forms of the envelope, whatever DYN_WIRE says: a client of 0.7 sends its own also to what is
listed as 0.8 lists itself, and the reverse (frame.py). What it lists itself as is of DYN_WIRE, and a client speaks the
form of what is listed, so a fleet with both works, where Dynamo's own runtimes hang on each other's form.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec

from rkmetrics.catalogue.planes import IntakeRefusal, Plane
from rkmetrics.errors import PayloadError, RpcRefusedError, RpcUnreachableError
from rkmetrics.planes.base import Instance, Refusal
from rkmetrics.planes.callhome import keep_alive
from rkmetrics.planes.calling import SILENCE_SECONDS, Call
from rkmetrics.planes.connecting import ConnectingClient
from rkmetrics.planes.frame import (
    ACCEPTED,
    PATH_LIMIT_BYTES,
    AckReader,
    FrameTooLargeError,
    RequestReader,
    TcpRequest,
    encode_ack,
    encode_request,
    encode_two_part,
)
from rkmetrics.planes.listening import Guest, ListeningServer

if TYPE_CHECKING:
    from rkmetrics.registry import Registry
    from rkmetrics.settings import Settings

__all__ = ["TcpClient", "TcpServer", "read_target"]

FRAME_SECONDS = 30.0
#: What is sent in one turn of the loop goes out together, in parts of about this size.
TURN_BYTES = 64 * 1024
#: So many requests wait on a connection for their acknowledgement before another connection is opened.
PIPELINE_REQUESTS = 8
KIND = "tcp"
#: What a probe asks for: no endpoint has such a name, so that any acknowledgement is a sign of life and nothing runs.
NOBODY = "?"

_headers = msgspec.json.Decoder(dict[str, str]).decode


# --- the server -------------------------------------------------------------------------------------------------------


class _Caller(Guest):
    """A connection from a client."""

    def __init__(self, server: TcpServer) -> None:
        super().__init__(server)
        self._tcp = server
        self._reader = RequestReader(server.limit_bytes)
        self._since = 0.0  # when the request began that is incomplete

    def data_received(self, data: bytes) -> None:
        if self._over or self._transport is None or self._transport.is_closing():
            return
        answers: list[bytes] = []
        refusal = None
        try:
            for request in self._reader.feed(data):
                answers.append(self._tcp.acknowledge(request))
        except PayloadError as error:
            large = isinstance(error, FrameTooLargeError)
            refusal = self._server.refuse(Refusal.TOO_LARGE if large else Refusal.MALFORMED, str(error))
            if isinstance(error, FrameTooLargeError):
                self._tcp.tell(refusal, error.begin)
        if answers:
            self.known = True
            self._transport.write(b"".join(answers) if len(answers) > 1 else answers[0])
        if refusal is None and (self._reader.rest or self._kept):
            refusal = self._watch(begins=bool(answers) or not self._kept)
        if refusal is not None:
            self._end(self._transport, refusal)

    def _watch(self, *, begins: bool) -> Refusal | None:
        """A request that has begun has to end in time, and room; a connection without one may rest."""
        rest = self._reader.rest
        crowded = self.keep(rest)
        if begins:
            self._since = self._loop.time()
        if rest and self._timer is None:
            self._timer = self._loop.call_later(FRAME_SECONDS, self._ring)
        if crowded:
            return self._server.refuse(Refusal.BUSY, "incomplete requests take all the memory they may")
        return None

    def _ring(self) -> None:
        """The timer is not moved with each request: it looks when it rings."""
        self._timer = None
        if not self._kept:
            return
        due = self._since + FRAME_SECONDS
        if due > self._loop.time():
            self._timer = self._loop.call_at(due, self._ring)
            return
        self._server.note(IntakeRefusal.TOO_SLOW, f"a request was not complete in {FRAME_SECONDS:g} s")
        self.abort()

    def _end(self, transport: asyncio.Transport, refusal: Refusal) -> None:
        """Say why, and wait a little for the peer to have read it."""
        self._reader = RequestReader(0)  # what it kept goes
        transport.write(encode_ack(refusal.text))
        self._linger(transport)


class TcpServer(ListeningServer):
    """Serves endpoints over tcp, at DYN_TCP_RPC_HOST and DYN_TCP_RPC_PORT."""

    plane = Plane.TCP
    kept_requests = 4

    @property
    def _place(self) -> tuple[str | None, int]:
        return self.settings.tcp_rpc_host, self.settings.tcp_rpc_port

    def _guest(self) -> _Caller:
        return _Caller(self)

    def instances(self) -> Iterable[Instance]:
        middle = "" if self.settings.wire == "0.7" else f"{self.instance_id:x}/"
        for name in self.endpoints:
            yield Instance(*name, self.instance_id, (KIND, f"{self.address}/{middle}{name.endpoint}"))

    def acknowledge(self, request: TcpRequest) -> bytes:
        """Take a request; what its sender gets."""
        id, _, name = request.path.rpartition("/")
        if name == NOBODY:
            return encode_ack(Refusal.UNKNOWN_ENDPOINT.text)
        if id and not self.is_mine(id):
            refusal: Refusal | None = self.refuse(Refusal.UNKNOWN_ENDPOINT)
        else:
            refusal = self.take(name, request.payload, _traceparent(request.headers))
        if refusal is None:
            return ACCEPTED
        self.tell(refusal, request.payload)
        return encode_ack(f"{refusal.text}: {request.path}" if refusal is Refusal.UNKNOWN_ENDPOINT else refusal.text)


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
    good = slash and host and 0 < len(path) <= PATH_LIMIT_BYTES and path.isascii()
    if not good or not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ValueError(f"{place[:200]!r}: expected host:port/endpoint or host:port/id/endpoint")
    return _Target(host.strip("[]"), int(port), path, "/" in path)


class _Line(asyncio.Protocol):
    """A connection to a server. pending: calls whose acknowledgement is awaited, in the order of their requests."""

    def __init__(self, pool: _Pool, patience_seconds: float) -> None:
        self._pool, self._patience = pool, patience_seconds
        self._reader = AckReader()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._heard = 0.0  # since when an acknowledgement is awaited
        self._timer: asyncio.TimerHandle | None = None
        self.pending: deque[Call] = deque()
        self.full = False

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._transport

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, call: Call, frame: bytes) -> None:
        """Send a request; those of one turn of the loop go out together."""
        if not self.pending:
            self._heard = self._loop.time()
            if self._timer is None:
                self._timer = self._loop.call_later(self._patience, self._ring)
        self.pending.append(call)
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame)
        self._out_bytes += len(frame)
        if self._out_bytes > TURN_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._out and self.usable:
            out, self._out, self._out_bytes = self._out, [], 0
            assert self._transport is not None
            self._transport.write(b"".join(out) if len(out) > 1 else out[0])

    def _ring(self) -> None:
        """Who acknowledges nothing at all is not asked again on this connection."""
        self._timer = None
        if not self.pending:
            return
        due = self._heard + self._patience
        if due > self._loop.time():
            self._timer = self._loop.call_at(due, self._ring)
        else:
            self._lose(f"no acknowledgement in {self._patience:g} s")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        keep_alive(self._transport)

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
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
        """What was written may have been taken, and the answer be on its way: only what was not is sure."""
        if self._transport is not None:
            self._transport.abort()
        pending, self.pending = self.pending, deque()
        written = len(pending) - len(self._out)
        self._out.clear()
        for place, call in enumerate(pending):
            if not call.begun.done():
                delivered = place < written
                call.fail(RpcUnreachableError(call.endpoint, reason, instance=call.where, delivered=delivered))

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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.drop(self)
        self._lose(f"the connection ended before the acknowledgement{f': {exc}' if exc else ''}")
        self._pool.go_on()


class _Pool:
    """The connections to one server: one, and more while it acknowledges slowly, up to DYN_TCP_POOL_SIZE.

    On each, DYN_TCP_CHANNEL_BUFFER requests may wait; what is more waits here, until its time-out. forget: called when
    nothing is left of it; servers come and go, and take another port each time.
    """

    def __init__(self, settings: Settings, host: str, port: int, forget: Callable[[_Pool], None]) -> None:
        self._settings, self._host, self._port, self._forget = settings, host, port, forget
        self._lines: list[_Line] = []
        self._opening: set[asyncio.Task[bool]] = set()
        self._waiting: deque[tuple[Call, bytes]] = deque()

    @property
    def lines(self) -> Iterable[_Line]:
        """Those that stand."""
        return self._lines

    @property
    def key(self) -> tuple[str, int]:
        """Whose connections these are."""
        return self._host, self._port

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
        """One at a time, so that a server that comes back meets no storm."""
        return not self._opening and len(self._lines) < self._settings.tcp_pool_size

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
        task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[bool]) -> None:
        """Where others stand already, one that failed is tried again when they are heard of, and not at once."""
        self._opening.discard(task)
        if not task.cancelled() and (task.result() or not self._lines):
            self.go_on()
        self._leave()

    async def _connect(self) -> bool:
        seconds = self._settings.tcp_connect_timeout_seconds
        line = _Line(self, self._settings.tcp_request_timeout_seconds)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().create_connection(lambda: line, self._host, self._port)
        except TimeoutError:
            self._fail(f"no connection in {seconds:g} s")
        except (OSError, ValueError) as error:  # ValueError: a name that no look-up takes
            self._fail(f"no connection: {error}")
        else:
            if line.usable:
                self._lines.append(line)
                return True
            self._fail("the connection ended at once")
        return False

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
            self._leave()

    def _leave(self) -> None:
        if not (self._lines or self._opening or self._waiting):
            self._forget(self)

    def close(self) -> list[asyncio.Task[bool]]:
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


class TcpClient(ConnectingClient[_Target, _Pool]):
    """Calls over tcp."""

    plane, kind = Plane.TCP, KIND

    def __init__(
        self, registry: Registry, *, silence_seconds: float = SILENCE_SECONDS, actor_name: str | None = None
    ) -> None:
        settings = registry.settings
        super().__init__(
            registry,
            host=settings.tcp_rpc_host,
            request_timeout_seconds=settings.tcp_request_timeout_seconds,
            silence_seconds=silence_seconds,
            actor_name=actor_name,
        )

    def _target(self, place: str) -> _Target:
        return read_target(place)

    def _new_pool(self, key: tuple[str, int]) -> _Pool:
        return _Pool(self.settings, *key, self._forget)

    def _forget(self, pool: _Pool) -> None:
        if self._pools.get(pool.key) is pool:
            del self._pools[pool.key]

    def _send(self, pool: _Pool, call: Call, target: _Target, payload: bytes, traceparent: str) -> None:
        headers = _encode_headers(target.path, traceparent) if target.headers else None
        pool.send(call, encode_request(TcpRequest(target.path, headers, payload)))

    def _greeting(self, target: _Target) -> bytes:
        path = f"{target.path.rpartition('/')[0]}/{NOBODY}" if target.headers else NOBODY
        headers = _encode_headers(path, "") if target.headers else None
        return encode_request(TcpRequest(path, headers, encode_two_part(b"", b"")))

    @property
    def probe_seconds(self) -> float:
        return self.settings.tcp_connect_timeout_seconds


def _encode_headers(path: str, traceparent: str) -> bytes:
    fields = {"x-endpoint-path": path}
    if traceparent:
        fields["traceparent"] = traceparent
    return msgspec.json.encode(fields)
