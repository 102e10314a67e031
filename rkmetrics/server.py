"""`rk.serve()`: the routes on a port of their own, for programs without an ASGI server. Standard library only.

One daemon thread holds every connection without blocking (a selector), so a client that sends or reads slowly costs a
socket and a deadline, never a thread: slowloris and slow readers delay nobody (T16). Nor does one that always sends: a
turn takes each connection a few steps further, and what is left waits for the next turn. Answers that take time are
made by a few worker threads, therefore /health is answered while scrapes wait. When the places are full, the connection
that has been in its state for the longest makes room, so whoever sends a request at once is served at once.

A fork takes no server along: the child has none of the threads, so it closes its copies of the sockets and may serve
anew.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import formatdate
from enum import StrEnum
from ipaddress import ip_address
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from rkmetrics.asgi.auth import CLOSED, LoopbackGate
from rkmetrics.asgi.base import Later, Request, Response, Route, text_response
from rkmetrics.asgi.http1 import CONTINUE, END, HEAD_LIMIT_BYTES, Head, Refused, parse_head, response_head
from rkmetrics.asgi.routes import BUSY, Answer, Guard, Surface, too_large
from rkmetrics.asgi.workers import Workers
from rkmetrics.catalogue.exporter import Route as RouteName
from rkmetrics.errors import ServeError

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["Connection", "Limits", "Server", "State", "serve"]

log = logging.getLogger(__name__)

HOW_TO_OPEN = f"""{CLOSED}
To open them, set METRICS_ENABLED=1 and METRICS_TOKEN (or METRICS_TOKEN_FILE), and send "Authorization: Bearer <token>".
METRICS_ENABLED=1 with METRICS_ACCESS=open serves them to anybody, `rkmetrics serve --open` to this host only.
"""

# errno -> what to do; anything else is told as the system says it.
MENDS = {
    errno.EADDRINUSE: "the port is taken; stop what listens there, or choose another (RKMETRICS_PORT, 0 for any)",
    errno.EADDRNOTAVAIL: "not an address of this machine; choose one that is, such as 127.0.0.1 (RKMETRICS_HOST)",
    errno.EACCES: "the system does not allow it; ports below 1024 need a privilege",
}
RESET = struct.pack("ii", 1, 0)  # linger for no time: what is unsent is thrown away
NO_MORE_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
STEPS = 4  # of one connection in one turn: read, answer, send, and see that there is no more
EMPTY_LINES_LIMIT = 4  # before a request; RFC 9112, 2.2 asks for one


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server spends on its clients. Seconds are from the beginning of a state, whatever drips in meanwhile."""

    connections: int = 256
    head_seconds: float = 10.0
    body_seconds: float = 10.0
    idle_seconds: float = 120.0  # more than the usual scrape interval, so that scrapers keep their connection
    send_seconds: float = 30.0
    linger_seconds: float = 2.0
    workers: int = 8
    waiting: int = 64
    grace_seconds: float = 2.0


class State(StrEnum):
    """Where a connection stands."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"  # of a request whose route reads one
    WORK = "work"
    SEND = "send"
    LINGER = "linger"


EVENTS = {
    State.IDLE: EVENT_READ,
    State.HEAD: EVENT_READ,
    State.BODY: EVENT_READ,
    State.WORK: 0,
    State.SEND: EVENT_WRITE,
    State.LINGER: EVENT_READ,
}


def serve(
    registry: Registry,
    port: int | None = None,
    host: str | None = None,
    *,
    open_loopback: bool = False,
    more: Mapping[str, Route[Any]] | None = None,
) -> Server:
    """Serve the routes from a background thread, and return at once.

    port, host: by default RKMETRICS_PORT and RKMETRICS_HOST; port 0 takes a free one, which `server.port` tells.
    open_loopback: no token is asked for, whatever METRICS_* say; on loopback addresses only. more: routes beside ours.
    Starts `registry.health`, unless the program has begun to move it itself. Raises ServeError.
    """
    settings = registry.settings
    listener = _listen(settings.host if host is None else host, settings.port if port is None else port)
    gate: Guard | None = None
    if open_loopback:
        if not ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback:
            listener.close()
            raise ServeError(f"{host or settings.host!r} is no loopback address; there, serving needs METRICS_TOKEN")
        gate = LoopbackGate()
    server = Server(Surface(registry, gate, closed=HOW_TO_OPEN, more=more), listener)
    registry.health.start_if_new()
    return server


def _listen(host: str, port: int) -> socket.socket:
    where = f"cannot serve on {host!r}, port {port!r}"
    if not 0 <= port <= 65_535:
        raise ServeError(f"{where}: expected a port from 0 to 65535")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"{where}: {error}; expected a name or an address of this machine") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ServeError(f"{where}: {MENDS.get(error.errno or 0, str(error))}") from error
    return listener


class Connection:
    """One client. deadline: monotonic seconds at which it is dropped; since: when it came into its state."""

    __slots__ = (
        "deadline",
        "discard",
        "empty_lines",
        "inbox",
        "keep_alive",
        "method",
        "outbox",
        "peer",
        "request",
        "searched",
        "since",
        "socket",
        "state",
    )

    def __init__(self, connected: socket.socket, peer: str | None = None) -> None:
        self.socket, self.peer = connected, peer
        self.state, self.since, self.deadline = State.HEAD, 0.0, 0.0
        self.inbox, self.outbox = bytearray(), memoryview(b"")
        self.searched = 0  # bytes of inbox in which the end of the head is not
        self.discard = 0  # bytes of a body that is still to come
        self.empty_lines = 0  # passed over since the last request
        self.method, self.keep_alive = "", True  # of the last request
        self.request: tuple[Request, int] | None = None  # whose body is to come, and its length


class Server:
    """A running server. Close it, or use it as a context manager; a program that ends needs neither."""

    def __init__(self, surface: Surface, listener: socket.socket, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.host, self.port = str(listener.getsockname()[0]), int(listener.getsockname()[1])
        self._surface, self._listener = surface, listener
        self._connections: dict[Connection, None] = {}
        self._unfinished: dict[Connection, None] = {}  # they go on in the next turn, whatever the selector says
        self._selector = DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._workers: Workers[Connection] = Workers(surface, self.limits.workers, self.limits.waiting, self._ring)
        self._accepting_from = 0.0
        self._closing: float | None = None
        self._pid = os.getpid()
        self._selector.register(listener, EVENT_READ)
        self._selector.register(self._ear, EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="rkmetrics-serve", daemon=True)
        _servers.add(self)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._tear_down()
            raise ServeError(f"cannot serve: {error}; see how many threads this process may have") from error

    @property
    def url(self) -> str:
        """Where it listens, as a URL."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether it serves: False after close(), and in a forked child."""
        return self._pid == os.getpid() and self._closing is None and self._thread.is_alive()

    def close(self) -> None:
        """Stop listening, let answers in progress go out for a moment, and wait until all is closed. Once is enough."""
        if self._pid != os.getpid():
            return
        if self._closing is None:
            self._closing = time.monotonic() + self.limits.grace_seconds
        self._ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(self.limits.grace_seconds + 5)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Server {self.url} {'running' if self.running else 'closed'}>"

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._closing is None:
                self._turn()
            self._stop_listening()
            while self._answering() and time.monotonic() < self._closing:
                self._turn()
        finally:
            self._tear_down()

    def _turn(self) -> None:
        """Wait until something can be done, and do some of it for each: a turn is short, whatever clients send."""
        events = self._selector.select(self._patience_seconds())
        due, self._unfinished = self._unfinished, {}
        for key, _ in events:
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._ear:
                self._hear()
            else:
                due[key.data] = None
        for connection in due:
            self._drive(connection)
        now = time.monotonic()
        for connection in [each for each in self._connections if each.deadline <= now]:
            self._cut(connection)
        if 0 < self._accepting_from <= now:
            self._accepting_from = 0.0
            self._selector.register(self._listener, EVENT_READ)

    def _patience_seconds(self) -> float | None:
        """How long nothing needs to happen by itself; None: until somebody comes."""
        if self._unfinished:
            return 0.0
        moments = [each.deadline for each in self._connections if each.state is not State.WORK]
        if self._accepting_from:
            moments.append(self._accepting_from)
        if self._closing is not None:
            moments.append(self._closing)
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _ring(self) -> None:
        """Wake the thread, from any other."""
        with suppress(OSError):  # full: it will wake anyway; closed: it is gone
            self._bell.send(b"!")

    def _hear(self) -> None:
        with suppress(BlockingIOError):
            self._ear.recv(4096)
        for connection, response in self._workers.finished():
            if connection in self._connections:
                self._put(connection, response)
                self._drive(connection)

    # --- connections ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connected, address = self._listener.accept()
        except OSError as error:
            if error.errno in NO_MORE_SOCKETS and not self._make_room():
                self._selector.unregister(self._listener)
                self._accepting_from = time.monotonic() + 1
            return
        if len(self._connections) >= self.limits.connections and not self._make_room():
            connected.close()
            return
        connected.setblocking(False)
        connection = Connection(connected, str(address[0]))
        self._connections[connection] = None
        self._selector.register(connected, EVENT_READ, connection)
        self._enter(connection, State.HEAD)
        with suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._drive(connection)

    def _make_room(self) -> bool:
        """Drop the client that has been in its state for the longest. False when all of them wait for us."""
        slow = [each for each in self._connections if each.state is not State.WORK]
        if slow:
            self._cut(min(slow, key=lambda each: each.since))
        return bool(slow)

    def _cut(self, connection: Connection) -> None:
        """Drop a slow client with a reset, so that the system does not go on sending what it does not read."""
        with suppress(OSError):
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        if self._connections.pop(connection, self) is self:
            return
        self._unfinished.pop(connection, None)
        if EVENTS[connection.state]:
            self._selector.unregister(connection.socket)
        connection.socket.close()

    def _enter(self, connection: Connection, state: State) -> None:
        """Bring a connection into a state: its deadline, and what the selector waits for."""
        before, connection.state, connection.since = connection.state, state, time.monotonic()
        connection.deadline = connection.since + self._seconds(state)
        if EVENTS[before] == EVENTS[state]:
            return
        if not EVENTS[state]:
            self._selector.unregister(connection.socket)
        elif EVENTS[before]:
            self._selector.modify(connection.socket, EVENTS[state], connection)
        else:
            self._selector.register(connection.socket, EVENTS[state], connection)

    def _seconds(self, state: State) -> float:
        limits = self.limits
        return {
            State.IDLE: limits.idle_seconds,
            State.HEAD: limits.head_seconds,
            State.BODY: limits.body_seconds,
            State.WORK: float("inf"),
            State.SEND: limits.send_seconds,
            State.LINGER: limits.linger_seconds,
        }[state]

    def _drive(self, connection: Connection) -> None:
        """Take a connection a few steps further, as far as it goes without waiting."""
        steps: dict[State, Callable[[Connection], bool]] = {
            State.IDLE: self._receive,
            State.HEAD: self._receive,
            State.BODY: self._receive,
            State.SEND: self._flush,
            State.LINGER: self._receive,
        }
        try:
            for _ in range(STEPS):
                if connection not in self._connections or connection.state not in steps:
                    return
                if not steps[connection.state](connection):
                    return
            self._unfinished[connection] = None
        except OSError:
            self._drop(connection)  # reset, timed out: the client's own affair
        except Exception:
            log.exception("a connection is dropped")
            self._drop(connection)

    def _receive(self, connection: Connection) -> bool:
        """Read once, and answer what is complete. True when there may be more to do at once."""
        if connection.state is State.LINGER:
            return self._ignore(connection)
        if self._take(connection):
            return True
        try:
            data = connection.socket.recv(HEAD_LIMIT_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._drop(connection)
            return False
        connection.inbox += data
        if connection.state is State.IDLE:
            self._enter(connection, State.HEAD)
        return True

    def _ignore(self, connection: Connection) -> bool:
        """Closing with unread bytes would reset the connection, and the answer with it (RFC 9112, 9.6)."""
        try:
            data = connection.socket.recv(HEAD_LIMIT_BYTES)
        except BlockingIOError:
            return False
        connection.discard += len(data)
        if not data or connection.discard > 4 * HEAD_LIMIT_BYTES:
            self._drop(connection)
            return False
        return True

    # --- requests -------------------------------------------------------------------------------------------------

    def _take(self, connection: Connection) -> bool:
        """Answer the next request, if its head is complete, or its body where it has one that is read."""
        inbox = connection.inbox
        if connection.request is not None:
            return self._take_body(connection, *connection.request)
        self._pass_over(connection)
        end = inbox.find(END, max(0, connection.searched - len(END)))
        if end < 0 and len(inbox) <= HEAD_LIMIT_BYTES:
            connection.searched = len(inbox)
            return False
        head = bytes(inbox[: end if end >= 0 else HEAD_LIMIT_BYTES + 1])
        del inbox[: end + len(END)]
        connection.searched = connection.empty_lines = 0
        try:
            self._answer(connection, _parsed(head))
        except Refused as refused:
            connection.method, connection.keep_alive = "", False
            response = text_response(refused.status, f"{refused.reason}\n")
            self._put(connection, self._surface.count(RouteName.OTHER, response))
        return True

    def _pass_over(self, connection: Connection) -> None:
        """Throw away what belongs to no head: the body of the last request, and a few empty lines (RFC 9112, 2.2)."""
        inbox, before = connection.inbox, len(connection.inbox)
        gone = min(connection.discard, before)
        connection.discard -= gone
        del inbox[:gone]
        while inbox.startswith(b"\r\n") and connection.empty_lines < EMPTY_LINES_LIMIT:
            connection.empty_lines += 1
            del inbox[:2]
        if before and not inbox and not connection.discard and connection.method:
            self._enter(connection, State.IDLE)  # the last request is over, and the next has not begun

    def _take_body(self, connection: Connection, request: Request, length: int) -> bool:
        if len(connection.inbox) < length:
            return False
        body = bytes(connection.inbox[:length])
        del connection.inbox[:length]
        connection.request = None
        self._give(connection, self._surface.answer(replace(request, body=body)))
        return True

    def _answer(self, connection: Connection, head: Head) -> None:
        connection.method, connection.keep_alive, connection.discard = head.request.method, head.keep_alive, head.length
        request = replace(head.request, client=connection.peer)
        begun = self._surface.begin(request)
        if isinstance(begun, Answer):
            self._give(connection, begun)
        elif head.length > begun:
            connection.keep_alive = False
            self._give(connection, self._surface.refuse_body(request, too_large(begun)))
        else:
            self._await_body(connection, head, request)

    def _await_body(self, connection: Connection, head: Head, request: Request) -> None:
        connection.request, connection.discard = (request, head.length), 0
        if head.expects and len(connection.inbox) < head.length:
            connection.socket.send(CONTINUE)  # 25 bytes, with nothing before them in the buffer
        self._enter(connection, State.BODY)

    def _give(self, connection: Connection, answer: Answer) -> None:
        if not isinstance(answer.response, Later):
            self._put(connection, self._surface.respond(answer))
        elif self._workers.submit(connection, answer):
            self._enter(connection, State.WORK)
        else:
            self._put(connection, self._surface.count(answer.route, BUSY))

    def _put(self, connection: Connection, response: Response) -> None:
        keep_alive = connection.keep_alive = connection.keep_alive and self._closing is None
        head = response_head(response, keep_alive=keep_alive, date=formatdate(usegmt=True))
        connection.outbox = memoryview(head if connection.method == "HEAD" else head + response.body)
        self._enter(connection, State.SEND)

    def _flush(self, connection: Connection) -> bool:
        try:
            sent = connection.socket.send(connection.outbox)
        except BlockingIOError:
            return False
        connection.outbox = connection.outbox[sent:]
        if connection.outbox:
            return True
        if connection.keep_alive and self._closing is None:
            self._enter(connection, State.HEAD if connection.inbox or connection.discard else State.IDLE)
        else:
            connection.socket.shutdown(socket.SHUT_WR)
            connection.discard = 0
            self._enter(connection, State.LINGER)
        return True

    # --- the end --------------------------------------------------------------------------------------------------

    def _stop_listening(self) -> None:
        """No new client, and none that has asked for nothing: whoever waits for an answer gets it."""
        if not self._accepting_from:
            self._selector.unregister(self._listener)
        self._accepting_from = 0.0
        self._listener.close()
        for connection in list(self._connections):
            if connection.state in (State.IDLE, State.HEAD, State.BODY, State.LINGER):
                self._drop(connection)

    def _answering(self) -> bool:
        return any(connection.state in (State.WORK, State.SEND) for connection in self._connections)

    def _tear_down(self) -> None:
        self._workers.stop()
        for connection in list(self._connections):
            self._drop(connection)
        for each in (self._listener, self._bell, self._ear):
            each.close()
        self._selector.close()

    def abandon(self) -> None:
        """Let go of the sockets in a forked child; they go on in the parent.

        Nothing is told to the selector, which is the parent's too. Detached: no finaliser closes a number again.
        """
        for each in (self._listener, self._bell, self._ear, *(connection.socket for connection in self._connections)):
            with suppress(OSError):
                os.close(each.detach())
        self._connections.clear()
        self._selector.close()


def _parsed(head: bytes) -> Head:
    if len(head) > HEAD_LIMIT_BYTES:
        raise Refused(
            431 if b"\r\n" in head[:HEAD_LIMIT_BYTES] else 414, f"a head of more than {HEAD_LIMIT_BYTES} bytes"
        )
    return parse_head(head)


_servers: WeakSet[Server] = WeakSet()


def _abandon_all() -> None:
    for server in list(_servers):
        server.abandon()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
