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
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import cast

from rkmetrics.errors import BackendError, PayloadError, ServeError
from rkmetrics.planes.fork import descriptors, unplug_all
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

__all__ = [
    "Answer",
    "CallHome",
    "ForbiddenHome",
    "Home",
    "Homes",
    "Incoming",
    "keep_alive",
    "refuse",
]

log = logging.getLogger("rkmetrics.planes")

#: How long a connection may take to say whose answer it has; a caller's own connections wait idle for longer than a
#: worker keeps them, so that a worker never begins on one that is about to be closed.
HANDSHAKE_SECONDS = 5.0
WORKER_IDLE_SECONDS, CALLER_IDLE_SECONDS = 30.0, 90.0
#: After an answer that is whole, for its last word.
LAST_WORD_SECONDS = 2.0
#: A caller that reads nothing at all for so long is given up.
SLOW_SECONDS = 300.0
CONTROL_LIMIT_BYTES = 4 * 1024
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 2.0
#: Turns of the loop from a connection that asyncio accepts to its end, where nobody wants it any more.
ACCEPT_TURNS = 4
IDLE_PER_ADDRESS = 64
CONNECTIONS_LIMIT = 16_384
#: So many may be there that did not say yet whose answer they have; beyond it the oldest goes. Workers say it at once.
STRANGERS_LIMIT = 1_024
#: What an answer may gather in one turn of the loop; a handler that awaits nothing has to let others in after it.
TURN_BYTES = 64 * 1024
#: Where clouds hand out credentials, beside the link-local addresses: AWS and Google over IPv6, Azure, Alibaba, Oracle.
NAT64 = IPv6Network("64:ff9b::/96")
METADATA = frozenset({"fd00:ec2::254", "fd20:ce::254", "168.63.129.16", "100.100.100.200", "192.0.0.192"})
#: A peer that vanished without a word (its machine, or the cable) is found by TCP's own probes after this.
KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_PROBES = 10, 5, 3


KEEPALIVE = tuple(
    (getattr(socket, option), value)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    )
    if hasattr(socket, option)
)


def keep_alive(transport: asyncio.Transport) -> None:
    """Have TCP notice a peer that is gone without a word."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):  # it is gone already; macOS says so here
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def refuse(server: asyncio.Server) -> None:
    """Close a server, once nothing that it accepted is half made: asyncio forgets such a connection, open, before
    Python 3.12. What comes meanwhile is for `admit` to refuse."""
    loop = asyncio.get_running_loop()
    for sock in server.sockets:
        with suppress(RuntimeError, NotImplementedError, OSError):  # a loop that is no selector's
            loop.remove_reader(sock.fileno())
    try:
        for _ in range(ACCEPT_TURNS):
            await asyncio.sleep(0)
    finally:
        server.close()


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
    """A connection from a worker, at the caller's: one answer after another. since: when the last one ended."""

    def __init__(self, listener: CallHome) -> None:
        self._listener = listener
        self._reader = TwoPartReader(listener.limit_bytes)
        self._transport: asyncio.Transport | None = None
        self._incoming: Incoming | None = None
        self._reuse = self._said = self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.since = self._loop.time()

    @property
    def idle(self) -> bool:
        """Whether it carries no answer."""
        return self._incoming is None

    def say(self, control: bytes) -> None:
        """Tell the worker to stop; after that the connection carries no other answer."""
        self._said = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(control)

    def hold(self, held: bool) -> None:
        """Read no further for now, so that the worker has to wait; or go on."""
        if self._transport is not None and not self._transport.is_closing():
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    def leave(self) -> None:
        """The answer is whole, and only its last word is awaited, for a while."""
        self._stop_timer()
        self._timer = self._loop.call_later(LAST_WORD_SECONDS, self.close)

    def close(self) -> None:
        """End the connection; what was said before is sent. Nothing more is heard of it."""
        self._closed, self._incoming = True, None
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Break it off."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A worker is there, or a stranger."""
        self._transport = cast("asyncio.Transport", transport)
        if not self._listener.admit(self):
            self.abort()
            return
        keep_alive(self._transport)
        self._timer = self._loop.call_later(HANDSHAKE_SECONDS, self._too_late)

    def data_received(self, data: bytes) -> None:
        """Frames of an answer."""
        if self._closed:
            return
        try:
            for frame in self._reader.feed(data):
                if not self._take(frame):
                    return  # what else came with it is for nobody
        except PayloadError as error:
            self._fail(str(error))

    def _take(self, frame: TwoPart) -> bool:
        """Whether more may come."""
        incoming = self._incoming
        if incoming is None:
            self._greet(Handshake.decode(frame))
        elif frame.header == SENTINEL_HEADER and not frame.body:
            self._end(incoming)
        else:
            incoming.frame(frame)
        return not self._closed

    def _greet(self, word: Handshake) -> None:
        incoming = self._listener.claim(word.subject)
        if incoming is None:
            raise PayloadError("a handshake", word.subject.encode(), "nobody waits for that subject")
        self._stop_timer()
        self._listener.greeted(self)
        self._incoming, self._reuse = incoming, word.reuse
        incoming.home = self
        incoming.began()

    def _end(self, incoming: Incoming) -> None:
        self._incoming = incoming.home = None
        self._stop_timer()
        incoming.ended()
        transport = self._transport
        if transport is None:
            return
        if not self._reuse or self._said:
            self.close()
        else:
            self.since = self._loop.time()
            transport.resume_reading()
            transport.write(AGAIN)

    def _fail(self, reason: str) -> None:
        incoming, self._incoming = self._incoming, None
        self.abort()
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
        self._strangers: dict[Home, None] = {}  # the oldest first
        self._sweep: asyncio.TimerHandle | None = None
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
        except (OSError, ValueError) as error:  # ValueError: a name that no look-up takes
            raise ServeError(f"answers cannot be awaited at {self._host!r}: {error}") from error
        host, port = self._server.sockets[0].getsockname()[:2]
        try:
            return self._advertised(host, port)
        except BackendError:
            self._server.close()
            raise

    async def close(self) -> None:
        """Listen no more; answers that are awaited are lost."""
        self._open = False
        server, self._server = self._server, None
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for home in list(self._homes):
            home._fail("the client was closed")
        for incoming in list(self._waiting.values()):
            incoming.lost("the client was closed")
        self._waiting.clear()
        if server is not None:
            await refuse(server)
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
        self._strangers[home] = None
        if len(self._strangers) > STRANGERS_LIMIT:
            next(iter(self._strangers))._fail("too many others did not say either whose answer they have")
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(CALLER_IDLE_SECONDS / 2, self._close_idle)
        return True

    def greeted(self, home: Home) -> None:
        """A connection said whose answer it has."""
        self._strangers.pop(home, None)

    def release(self, home: Home) -> None:
        """A connection ended."""
        self._homes.discard(home)
        self._strangers.pop(home, None)

    def _close_idle(self) -> None:
        """Workers end what they use no more; who does not is no such worker."""
        loop = asyncio.get_running_loop()
        before = loop.time() - CALLER_IDLE_SECONDS
        for home in [each for each in self._homes if each.idle and each.since <= before]:
            home.abort()
        self._sweep = loop.call_later(CALLER_IDLE_SECONDS / 2, self._close_idle) if self._homes else None

    def stranger(self, reason: str) -> None:
        """A connection that had no answer for us."""
        self._log.note(reason, logging.DEBUG, "a connection to %s had no answer: %s", self.address, reason)

    def forked(self) -> None:
        """In a forked child: forget what is the parent's."""
        transports = [home._transport for home in self._homes]
        unplug_all(descriptors([self._server, *transports]), self._server, self._homes, self._waiting, self._sweep)
        self._homes, self._strangers, self._waiting = set(), {}, {}
        self._server = self._sweep = None
        self._open = False

    def __len__(self) -> int:
        return len(self._homes)


# --- the worker's end -------------------------------------------------------------------------------------------------


def _nobodys(address: IPv4Address | IPv6Address) -> bool:
    """Whether no caller is at an address; 64:ff9b::/96 stands for IPv4 behind a translator (RFC 6052)."""
    if address in NAT64:
        address = IPv4Address(int(address) & 0xFFFF_FFFF)
    broadcast = address.version == 4 and address.is_reserved
    odd = address.is_unspecified or address.is_multicast or address.is_link_local or broadcast
    return odd or str(address) in METADATA


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
        self._reuse = self._paused = self._kept = self.over = self.full = False
        self._turn_bytes = 0
        self.over_since = 0.0
        self.sent_bytes = 0

    @property
    def usable(self) -> bool:
        """Whether the connection stands."""
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, header: RequestHeader, told: Callable[[Control], None], refusal: str = "") -> None:
        """Say whose answer this is, and that it comes, or why it does not."""
        self._told, self._reuse, self.over, self._kept = told, header.reuse, False, False
        self.sent_bytes = 0
        prologue = encode_refusal(refusal) if refusal else PROLOGUE
        self._send(Handshake(header.subject, header.reuse).encode() + prologue)

    def send(self, frame: bytes) -> None:
        """Send an item; where `full` is set then, wait for `room` before the next one is made."""
        self._send(frame)

    def end(self, *, final: bool) -> None:
        """Say that nothing comes any more. final: the answer is whole, and was not stopped."""
        if self.over:
            return
        self.over, self.over_since, self._told = True, self._loop.time(), None
        self._send(FINAL + SENTINEL if final else SENTINEL)
        if not self._reuse:
            self.close()

    def close(self) -> None:
        """End the connection, now or with its answer; what was said before is sent."""
        self._reuse = False
        if self.over:
            self._flush()
            if self._transport is not None:
                self._transport.close()

    def end_idle(self, seconds: float) -> None:
        """It has rested for so long. A caller that has not read all yet is to have it: breaking off would lose what is
        on its way."""
        if self._kept or seconds >= SLOW_SECONDS:
            self.abort()
        else:
            self.close()

    def abort(self) -> None:
        """Break the connection off."""
        self._out.clear()
        if self._transport is not None:
            self._transport.abort()

    async def room(self) -> None:
        """Let the loop turn, and wait until the caller has read, or is gone, or has read nothing for too long."""
        if self._turn_bytes > TURN_BYTES:
            await asyncio.sleep(0)
        if self._paused and self.usable:
            self._room = self._loop.create_future()
            patience = self._loop.call_later(SLOW_SECONDS, self.abort)
            try:
                await self._room
            finally:
                patience.cancel()

    def _send(self, frame: bytes) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame)
        self.sent_bytes += len(frame)
        self._turn_bytes += len(frame)
        if self._turn_bytes > TURN_BYTES:
            self.full = True

    def _flush(self) -> None:
        out, self._out = self._out, []
        self._turn_bytes, self.full = 0, self._paused
        if out and self.usable:
            assert self._transport is not None
            self._transport.write(b"".join(out) if len(out) > 1 else out[0])

    # --- the protocol -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The caller is reached."""
        self._transport = cast("asyncio.Transport", transport)
        self._homes.opened(self)
        keep_alive(self._transport)

    def data_received(self, data: bytes) -> None:
        """The caller wants it to stop, or has read all."""
        try:
            for frame in self._reader.feed(data):
                self._hear(CONTROLS.get(frame.header))
        except PayloadError:
            self.abort()

    def _hear(self, control: Control | None) -> None:
        if control is Control.AGAIN:
            if self.over and self._reuse and not self._kept:  # said twice, two answers would share it
                self._kept, self.over_since = True, self._loop.time()
                self._homes.keep(self)
        elif control is not None and self._told is not None:
            self._told(control)

    def pause_writing(self) -> None:
        """The caller reads slowly."""
        self._paused = self.full = True

    def resume_writing(self) -> None:
        """There is room again."""
        self._paused = self.full = False
        self._wake()

    def _wake(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller is gone."""
        self._transport = None
        self._homes.lose(self)
        self._out.clear()
        told, self._told = self._told, None
        if told is not None:
            told(Control.KILL)
        self._wake()


class Homes:
    """The connections of a server to its callers; those that may be used again are kept for a while.

    allowed: whether an answer may go to an IP address. Never to one that is unspecified, multicast or link-local, nor
    where clouds hand out credentials, as whoever can send a request chooses where its answer goes.
    """

    def __init__(self, allowed: Callable[[str], bool] = lambda _: True) -> None:
        self._allowed = allowed
        self._idle: dict[str, list[Answer]] = {}
        self._all: set[Answer] = set()
        self._left: asyncio.Event | None = None
        self._opening = 0
        self._sweep: asyncio.TimerHandle | None = None

    async def open(self, address: str) -> Answer:
        """Return a new connection to a caller. Raises ForbiddenHome, OSError or TimeoutError."""
        if len(self._all) + self._opening >= CONNECTIONS_LIMIT:
            raise OSError(f"{CONNECTIONS_LIMIT} connections to callers are there already")
        answer = Answer(self, address)
        self._opening += 1
        try:
            await self._connect(answer)
        finally:
            self._opening -= 1
        return answer

    def opened(self, answer: Answer) -> None:
        """A connection stands."""
        self._all.add(answer)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(WORKER_IDLE_SECONDS / 2, self._close_idle)

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

    def check(self, address: str) -> None:
        """Raises ForbiddenHome where no answer goes there."""
        if address not in self._idle:
            self.checked(address)

    def checked(self, address: str) -> tuple[str, int]:
        """Return host and port. Raises ForbiddenHome."""
        text, _, port = address.rpartition(":")
        try:
            host = ip_address(text.strip("[]"))
            number = int(port) if port.isascii() and port.isdigit() else 0
        except ValueError:
            raise ForbiddenHome("its answer is awaited at what is no IP address and port") from None
        mapped = getattr(host, "ipv4_mapped", None) or host
        if _nobodys(mapped) or not 0 < number < 65_536:
            raise ForbiddenHome(f"its answer is awaited at {host}, port {number}, to which none goes")
        if not self._allowed(str(mapped)):
            raise ForbiddenHome(f"its answer is awaited at {host}, which is not allowed")
        return str(host), number

    def keep(self, answer: Answer) -> None:
        """An answer was read to its end; its connection may carry another."""
        kept = self._idle.setdefault(answer.address, [])
        if len(kept) >= IDLE_PER_ADDRESS:
            answer.abort()
        else:
            kept.append(answer)

    def lose(self, answer: Answer) -> None:
        """A connection ended."""
        self._all.discard(answer)
        if self._left is not None:
            self._left.set()
        kept = self._idle.get(answer.address)
        if kept and answer in kept:
            kept.remove(answer)
        if not kept:
            self._idle.pop(answer.address, None)

    def _close_idle(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for answer in [each for each in self._all if each.over and now - each.over_since >= WORKER_IDLE_SECONDS]:
            answer.end_idle(now - answer.over_since)
        self._sweep = loop.call_later(WORKER_IDLE_SECONDS / 2, self._close_idle) if self._all else None

    async def leave(self, timeout_seconds: float) -> None:
        """End all connections, each with its answer, and wait until callers have read what was said last."""
        self._left = asyncio.Event()
        for answer in list(self._all):
            answer.close()
        try:
            async with asyncio.timeout(timeout_seconds):
                while any(answer.over for answer in self._all):
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            for answer in [each for each in self._all if each.over]:
                answer.abort()
        finally:
            self._left = None

    def close(self) -> None:
        """Break all connections off; those that are opened after it stand."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for answer in list(self._all):
            answer.abort()

    def forked(self) -> None:
        """In a forked child: forget what is the parent's."""
        unplug_all(descriptors([answer._transport for answer in self._all]), self._all, self._idle, self._sweep)
        self._all, self._idle, self._opening = set(), {}, 0
        self._sweep = self._left = None

    def __len__(self) -> int:
        return len(self._all)
