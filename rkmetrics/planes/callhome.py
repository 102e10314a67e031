"""The way home of an answer: the caller listens, the worker connects there. Both ends, in one file.

    caller                                         worker
    CallHome.expect(subject)   --- request --->
                               <-- connection ---  Homes.open(header)
                               <-- handshake ----  subject: whose answer this is
                               <-- prologue, items, sentinel
                               --- stop | kill -->
                               --- again -------->  the connection may carry another answer

A subject is a secret of 128 bits, so nobody answers in another's name; a connection that knows none is closed. Opening
a connection for each answer, as Dynamo does, costs more than all the rest of a call: where both sides are ours a
connection is used again, once the caller has said that it read the sentinel, so that a late "stop" never meets the next
answer (decision 0060).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from ipaddress import ip_address
from typing import cast

from rkmetrics.errors import PayloadError, ServeError
from rkmetrics.planes.frame import TwoPart, TwoPartReader
from rkmetrics.planes.wire import (
    AGAIN,
    CONTROLS,
    FINAL,
    PROLOGUE,
    SENTINEL,
    SENTINEL_HEADER,
    Control,
    Handshake,
    RequestHeader,
    encode_refusal,
)
from rkmetrics.retry import StateLog

__all__ = ["Answer", "CallHome", "ForbiddenHome", "Home", "Homes", "Incoming", "keep_alive"]

log = logging.getLogger("rkmetrics.planes")

#: How long a connection may take to say whose answer it has; a caller's own connections wait idle for longer than a
#: worker keeps them, so that a worker never begins on one that is about to be closed.
HANDSHAKE_SECONDS = 5.0
WORKER_IDLE_SECONDS = 30.0
CONTROL_LIMIT_BYTES = 4 * 1024
CONNECT_SECONDS = 5.0
IDLE_PER_ADDRESS = 64
CONNECTIONS_LIMIT = 16_384
#: A peer that vanished without a word (its machine, or the cable) is found by TCP's own probes after this.
KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_PROBES = 10, 5, 3


def keep_alive(transport: asyncio.Transport) -> None:
    """Have TCP notice a peer that is gone without a word, and send small frames at once."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# --- the caller's end -------------------------------------------------------------------------------------------------


class Incoming(ABC):
    """An answer that is awaited. Called from the event loop; none of it may raise."""

    home: Home | None = None

    @abstractmethod
    def began(self) -> None:
        """The worker has connected."""

    @abstractmethod
    def frame(self, frame: TwoPart) -> None:
        """A frame came: the prologue, then items."""

    @abstractmethod
    def ended(self) -> None:
        """The sentinel came: nothing comes any more."""

    @abstractmethod
    def lost(self, reason: str) -> None:
        """The connection ended before the sentinel, or said what nobody understands."""


class Home(asyncio.Protocol):
    """A connection from a worker, at the caller's: one answer after another."""

    def __init__(self, listener: CallHome) -> None:
        self._listener = listener
        self._reader = TwoPartReader(listener.limit_bytes)
        self._transport: asyncio.Transport | None = None
        self._incoming: Incoming | None = None
        self._reuse = self._said = False
        self._timer: asyncio.TimerHandle | None = None

    def say(self, control: bytes) -> None:
        """Tell the worker to stop; after that the connection carries no other answer."""
        self._said = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(control)

    def hold(self, held: bool) -> None:
        """Read no further for now, so that the worker has to wait; or go on."""
        if self._transport is not None and not self._transport.is_closing():
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    def close(self) -> None:
        """End the connection; what was said before is sent."""
        self._incoming = None
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A worker is there, or a stranger."""
        self._transport = cast("asyncio.Transport", transport)
        if not self._listener.admit(self):
            self._transport.abort()
            return
        keep_alive(self._transport)
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self._too_late)

    def data_received(self, data: bytes) -> None:
        """Frames of an answer."""
        try:
            for frame in self._reader.feed(data):
                self._take(frame)
        except PayloadError as error:
            self._fail(str(error))

    def _take(self, frame: TwoPart) -> None:
        incoming = self._incoming
        if incoming is None:
            self._greet(Handshake.decode(frame))
        elif frame.header == SENTINEL_HEADER and not frame.body:
            self._end(incoming)
        else:
            incoming.frame(frame)

    def _greet(self, word: Handshake) -> None:
        incoming = self._listener.claim(word.subject)
        if incoming is None:
            raise PayloadError("a handshake", word.subject.encode(), "nobody waits for that subject")
        self._stop_timer()
        self._incoming, self._reuse = incoming, word.reuse
        incoming.home = self
        incoming.began()

    def _end(self, incoming: Incoming) -> None:
        self._incoming = incoming.home = None
        incoming.ended()
        transport = self._transport
        if transport is None:
            return
        if not self._reuse or self._said:
            transport.close()
        else:
            transport.resume_reading()
            transport.write(AGAIN)

    def _fail(self, reason: str) -> None:
        incoming, self._incoming = self._incoming, None
        if self._transport is not None:
            self._transport.abort()
        if incoming is not None:
            incoming.home = None
            incoming.lost(reason)
        else:
            self._listener.stranger(reason)

    def _too_late(self) -> None:
        if self._incoming is None:
            self._fail(f"it did not say whose answer it has within {HANDSHAKE_SECONDS:g} s")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The worker is gone, or the connection was closed here."""
        self._stop_timer()
        self._transport = None
        self._listener.release(self)
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.home = None
            incoming.lost(f"the connection ended{f': {exc}' if exc else ''}")


class CallHome:
    """Where one client awaits its answers. limit_bytes: of one item.

    host: what to listen on; address: what workers are told. Neither is ever 0.0.0.0 for the latter, nor port 0.
    """

    def __init__(self, host: str, advertised: Callable[[str, int], str], limit_bytes: int) -> None:
        self._host, self._advertised, self.limit_bytes = host, advertised, limit_bytes
        self._waiting: dict[str, Incoming] = {}
        self._homes: set[Home] = set()
        self._server: asyncio.Server | None = None
        self._open = False
        self._log = StateLog(log)
        self.address = ""

    async def start(self) -> None:
        """Listen, on a free port. Raises ServeError."""
        if not self._open:
            self.address = await self._listen()
            self._open = True

    async def _listen(self) -> str:
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: Home(self), self._host, 0, backlog=1_024
            )
        except OSError as error:
            raise ServeError(f"answers cannot be awaited at {self._host!r}: {error}") from error
        host, port = self._server.sockets[0].getsockname()[:2]
        return self._advertised(host, port)

    async def close(self) -> None:
        """Listen no more; answers that are awaited are lost."""
        self._open = False
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for home in list(self._homes):
            home._fail("the client was closed")
        for incoming in list(self._waiting.values()):
            incoming.lost("the client was closed")
        self._waiting.clear()
        if server is not None:
            await server.wait_closed()

    def expect(self, subject: str, incoming: Incoming) -> None:
        """Await an answer under a subject."""
        self._waiting[subject] = incoming

    def forget(self, subject: str) -> None:
        """Await it no more; a worker that comes with it is sent away."""
        self._waiting.pop(subject, None)

    def claim(self, subject: str) -> Incoming | None:
        """Hand an answer to the connection that knows its subject; once."""
        return self._waiting.pop(subject, None)

    def admit(self, home: Home) -> bool:
        """Whether there is room for another connection."""
        if not self._open or len(self._homes) >= CONNECTIONS_LIMIT:
            return False
        self._homes.add(home)
        return True

    def release(self, home: Home) -> None:
        """A connection ended."""
        self._homes.discard(home)

    def stranger(self, reason: str) -> None:
        """A connection that had no answer for us."""
        self._log.note(reason, logging.DEBUG, "a connection to %s had no answer: %s", self.address, reason)

    def __len__(self) -> int:
        return len(self._homes)


# --- the worker's end -------------------------------------------------------------------------------------------------


class ForbiddenHome(Exception):
    """An address to which no answer goes."""


class Answer(asyncio.Protocol):
    """A connection to a caller, at the worker's: where frames of an answer go.

    told: called with what the caller says, and with KILL when it is gone. What is sent in one turn of the loop goes out
    together; `room` waits while the caller reads more slowly than items are made.
    """

    def __init__(self, homes: Homes, address: str) -> None:
        self._homes, self.address = homes, address
        self._reader = TwoPartReader(CONTROL_LIMIT_BYTES)
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._room: asyncio.Future[None] | None = None
        self._told: Callable[[Control], None] | None = None
        self._reuse = self.over = self.full = False
        self.over_since = 0.0
        self.sent_bytes = 0

    @property
    def usable(self) -> bool:
        """Whether the connection stands."""
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, header: RequestHeader, told: Callable[[Control], None], refusal: str = "") -> None:
        """Say whose answer this is, and that it comes, or why it does not."""
        self._told, self._reuse, self.over = told, header.reuse, False
        self.sent_bytes = 0
        self._send(Handshake(header.subject, header.reuse).encode())
        self._send(encode_refusal(refusal) if refusal else PROLOGUE)

    def send(self, frame: bytes) -> None:
        """Send an item; where `full` is set then, wait for `room` before the next one is made."""
        self._send(frame)

    def end(self, *, final: bool) -> None:
        """Say that nothing comes any more. final: the answer is whole, and was not stopped."""
        if self.over:
            return
        self.over, self.over_since = True, self._loop.time()
        if final:
            self._send(FINAL)
        self._send(SENTINEL)
        if not self._reuse:
            self._flush()
            if self._transport is not None:
                self._transport.close()

    def abort(self) -> None:
        """Break the connection off."""
        self._out.clear()
        if self._transport is not None:
            self._transport.abort()

    async def room(self) -> None:
        """Wait until the caller has read, or is gone."""
        if self.full and self.usable:
            self._room = self._loop.create_future()
            await self._room

    def _send(self, frame: bytes) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame)
        self.sent_bytes += len(frame)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out and self.usable:
            assert self._transport is not None
            self._transport.write(b"".join(out) if len(out) > 1 else out[0])

    # --- the protocol -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The caller is reached."""
        self._transport = cast("asyncio.Transport", transport)
        keep_alive(self._transport)

    def data_received(self, data: bytes) -> None:
        """The caller wants it to stop, or has read all."""
        try:
            for frame in self._reader.feed(data):
                self._hear(CONTROLS.get(frame.header))
        except PayloadError:
            self.abort()

    def _hear(self, control: Control | None) -> None:
        if control is Control.AGAIN and self.over and self._reuse:
            self._told = None
            self._homes.keep(self)
        elif control is not None and control is not Control.AGAIN and self._told is not None and not self.over:
            self._told(control)

    def pause_writing(self) -> None:
        """The caller reads slowly."""
        self.full = True

    def resume_writing(self) -> None:
        """There is room again."""
        self.full = False
        self._wake()

    def _wake(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller is gone."""
        self._transport = None
        self._homes.lose(self)
        told, self._told = self._told, None
        if told is not None and not self.over:
            told(Control.KILL)
        self._wake()


class Homes:
    """The connections of a server to its callers; those that may be used again are kept for a while.

    allowed: whether an answer may go to an IP address. Never to one that is unspecified, multicast or link-local (cloud
    machines have their credentials at such ones), as whoever can send a request chooses where its answer goes.
    """

    def __init__(self, allowed: Callable[[str], bool] = lambda _: True) -> None:
        self._allowed = allowed
        self._idle: dict[str, list[Answer]] = {}
        self._all: set[Answer] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    async def open(self, address: str) -> Answer:
        """Return a new connection to a caller. Raises ForbiddenHome, OSError or TimeoutError."""
        answer, loop = Answer(self, address), asyncio.get_running_loop()
        await self._connect(answer)
        self._all.add(answer)
        if self._sweep is None:
            self._sweep = loop.call_later(WORKER_IDLE_SECONDS / 2, self._close_idle)
        return answer

    async def _connect(self, answer: Answer) -> None:
        host, port = self.checked(answer.address)
        async with asyncio.timeout(CONNECT_SECONDS):
            await asyncio.get_running_loop().create_connection(lambda: answer, host, port)

    def kept(self, address: str) -> Answer | None:
        """A connection to a caller that stands already."""
        kept = self._idle.get(address)
        while kept:
            answer = kept.pop()
            if answer.usable:
                return answer
        return None

    def checked(self, address: str) -> tuple[str, int]:
        """Return host and port. Raises ForbiddenHome."""
        text, _, port = address.rpartition(":")
        try:
            host = ip_address(text.strip("[]"))
            number = int(port) if port.isascii() and port.isdigit() else 0
        except ValueError:
            raise ForbiddenHome("its answer is awaited at what is no IP address and port") from None
        mapped = getattr(host, "ipv4_mapped", None) or host
        if mapped.is_unspecified or mapped.is_multicast or mapped.is_link_local or not 0 < number < 65_536:
            raise ForbiddenHome(f"its answer is awaited at {host}, port {number}, to which none goes")
        if not self._allowed(str(mapped)):
            raise ForbiddenHome(f"its answer is awaited at {host}, which is not allowed")
        return str(host), number

    def keep(self, answer: Answer) -> None:
        """An answer was read to its end; its connection may carry another."""
        kept = self._idle.setdefault(answer.address, [])
        if self._closed or len(kept) >= IDLE_PER_ADDRESS:
            answer.abort()
            return
        kept.append(answer)

    def lose(self, answer: Answer) -> None:
        """A connection ended."""
        self._all.discard(answer)
        kept = self._idle.get(answer.address)
        if kept and answer in kept:
            kept.remove(answer)
        if not kept:
            self._idle.pop(answer.address, None)

    def _close_idle(self) -> None:
        loop = asyncio.get_running_loop()
        before = loop.time() - WORKER_IDLE_SECONDS
        for answer in [each for each in self._all if each.over and each.over_since <= before]:
            answer.abort()
        self._sweep = loop.call_later(WORKER_IDLE_SECONDS / 2, self._close_idle) if self._all else None

    def close(self) -> None:
        """End all connections."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for answer in list(self._all):
            answer.abort()

    def __len__(self) -> int:
        return len(self._all)
