"""The connections of the http plane's client: to each server a pool, over HTTP/1.1 or over HTTP/2.

A line is one connection. Over HTTP/1.1 it carries one request at a time, so there are as many as requests that wait for
their acknowledgement; over HTTP/2 there is one. Those that rest are kept as the settings say. No request is sent twice:
a server may have taken one whose acknowledgement never came, and whether to ask elsewhere is the router's to say.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

from rkmetrics.errors import RpcRefusedError, RpcUnreachableError
from rkmetrics.fetch import Connection, Failure
from rkmetrics.http_answer import Answer
from rkmetrics.planes.callhome import keep_alive
from rkmetrics.planes.calling import Call
from rkmetrics.planes.http1 import encode_post

if TYPE_CHECKING:
    from rkmetrics.settings import Settings

__all__ = ["HOST_CONNECTIONS", "Http1Line", "Http2Line", "Job", "Line", "Pool", "Target", "lose", "read_target"]

CONNECT_SECONDS = 3.0
#: Connections to one host at once over HTTP/1.1; requests beyond it wait, within their time.
HOST_CONNECTIONS = 256
URL = re.compile(r"http://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})(/[\x21-\x7e]*)", re.ASCII)


#: What a proxy says that had no answer, or none that it understood: its server may have taken the request.
GATEWAY = (502, 504)


class Target(NamedTuple):
    """What a URL says."""

    host: str
    port: int
    authority: str
    path: str


@lru_cache(maxsize=10_000)
def read_target(url: str) -> Target:
    """Read http://host:port/path, as it is listed. Raises ValueError."""
    found = URL.fullmatch(url)
    if found is None or not 0 < int(found[2]) < 65_536:
        raise ValueError(f"{url!r}: expected http://host:port/path")
    return Target(found[1].strip("[]"), int(found[2]), f"{found[1]}:{found[2]}", found[3])


class Job(NamedTuple):
    """A request to be sent."""

    call: Call
    target: Target
    payload: bytes
    traceparent: str


def _settle(call: Call, status: int, body: bytes) -> None:
    """Tell a call what its request was answered."""
    if 200 <= status < 300:
        call.acknowledged()
        return
    text = "".join(each if each.isprintable() else " " for each in body[:2_000].decode("utf-8", "replace")).strip()
    reason = f"{text or 'refused'} (status {status})"
    if status in GATEWAY:
        lose(call, reason, delivered=True)
    else:
        call.fail(RpcRefusedError(call.endpoint, reason, instance=call.where))


def lose(call: Call, reason: str, *, delivered: bool) -> None:
    """Tell a call that its request has no answer. One whose answer came home already needs none."""
    if not call.begun.done():
        call.fail(RpcUnreachableError(call.endpoint, reason, instance=call.where, delivered=delivered))


class Line(ABC):
    """A connection to a server. since: when its last request was sent or, while it rests, answered."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.listed = pool, False
        self.since = asyncio.get_running_loop().time()

    @property
    @abstractmethod
    def room(self) -> bool:
        """Whether a request can be sent now."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether an answer is awaited."""

    @property
    @abstractmethod
    def usable(self) -> bool:
        """Whether the connection stands."""

    @property
    @abstractmethod
    def transport(self) -> asyncio.Transport | None:
        """What it stands on, while it does."""

    @abstractmethod
    def protocol(self) -> asyncio.Protocol:
        """What reads the connection."""

    @abstractmethod
    def send(self, job: Job) -> None:
        """Send a request."""

    @abstractmethod
    def tick(self, now: float, answer_seconds: float) -> None:
        """Give up what has no answer in time; look whether the other end lives."""

    @abstractmethod
    def end(self, reason: str) -> None:
        """Break the connection off; whoever awaits an answer hears of it."""


class Http1Line(Line):
    """HTTP/1.1: one request at a time."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._connection = Connection(self._ended)
        self._call: Call | None = None

    @property
    def room(self) -> bool:
        return self._connection.usable

    @property
    def usable(self) -> bool:
        return self._connection.usable

    @property
    def busy(self) -> bool:
        return self._call is not None

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._connection.transport

    def protocol(self) -> asyncio.Protocol:
        return self._connection

    def send(self, job: Job) -> None:
        self._call = job.call
        head = encode_post(job.target.path, job.target.authority, len(job.payload), job.traceparent)
        self._connection.send(head + job.payload)

    def _ended(self, found: Answer | Failure) -> None:
        call, self._call = self._call, None
        assert call is not None
        self.since = asyncio.get_running_loop().time()
        if isinstance(found, Answer):
            _settle(call, found.status, found.body)
        else:  # also where the server seems to have left before: it may have taken the request all the same
            lose(call, f"no acknowledgement: {found.detail}", delivered=True)
        self.pool.free(self)

    def tick(self, now: float, answer_seconds: float) -> None:
        if self._call is not None and self.since + answer_seconds <= now:
            self.end(f"no acknowledgement in {answer_seconds:g} s")

    def end(self, reason: str) -> None:
        call, self._call = self._call, None
        self._connection.abort()
        if call is not None:
            lose(call, reason, delivered=True)


class Http2Line(Line, asyncio.Protocol):
    """HTTP/2: as many requests at once as the server takes. What is sent in one turn of the loop goes out together."""

    def __init__(self, pool: Pool) -> None:
        from rkmetrics.planes import http2

        super().__init__(pool)
        self._loop = asyncio.get_running_loop()
        self._session, self._broken = http2.Session(pool.settings, self._loop.time()), http2.BROKEN
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, Call] = {}
        self._flushing = self._full = False

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and not self._session.leaving

    @property
    def room(self) -> bool:
        return self.usable and not self._full and self._session.room

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._transport

    def protocol(self) -> asyncio.Protocol:
        return self

    def send(self, job: Job) -> None:
        target = job.target
        id = self._session.post(target.path, target.authority, job.payload, job.traceparent, self._loop.time())
        self._calls[id] = job.call
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._session.out())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        keep_alive(self._transport)
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            found = self._session.feed(data, self._loop.time())
        except self._broken as error:
            self._flush()
            self.end(f"HTTP/2: {error}")
            self.pool.free(self)
            return
        if found:  # a PING does not make it younger
            self.since = self._loop.time()
        for each in found:
            call = self._calls.pop(each.id)
            if each.status:
                _settle(call, each.status, each.body)
            else:
                lose(call, each.reason, delivered=each.delivered)
        self._flush_soon()
        if self._session.leaving:
            self._retire()
        else:
            self.pool.free(self)

    def _retire(self) -> None:
        """The server takes no more: what is on its way goes on, and then the connection ends."""
        self.pool.retire(self)
        if not self._calls and self._transport is not None:
            self._transport.close()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self.pool.free(self)

    def tick(self, now: float, answer_seconds: float) -> None:
        if self._session.tick(now, answer_seconds):
            self.end("the server does not answer a PING")
            return
        self._calls = {id: call for id, call in self._calls.items() if id in self._session}
        self._flush()
        if self._session.leaving:
            self._retire()
        elif self.room and not self.listed:
            self.pool.free(self)

    def end(self, reason: str) -> None:
        if self._transport is not None:
            self._flush()
            self._transport.abort()
        calls, self._calls = self._calls, {}
        for lost in self._session.end():
            lose(calls[lost.id], reason, delivered=lost.delivered)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.end(f"the connection ended before the acknowledgement{f': {exc}' if exc else ''}")
        self.pool.free(self)


class Pool:
    """The connections to one server. What finds no room waits here, until its time-out.

    line: what its connections speak; most: of them at once.
    """

    def __init__(self, settings: Settings, host: str, port: int, line: type[Line], most: int) -> None:
        self.settings, self._host, self._port, self._line, self._most = settings, host, port, line, most
        self._loop = asyncio.get_running_loop()
        self._ready: list[Line] = []  # have room; the last one is used first, so that the others may end
        self._lines: set[Line] = set()
        self._leaving: set[Line] = set()  # take no more requests
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[Job] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def send(self, job: Job) -> None:
        """Send a request, or have it wait for room."""
        line = None if self._waiting else self._best()
        if line is not None:
            self._give(line, job)
        else:
            self._waiting.append(job)
            self._open()

    def _best(self) -> Line | None:
        while self._ready:
            line = self._ready[-1]
            if line.room:
                return line
            self._unlist(line)
        return None

    def _unlist(self, line: Line) -> None:
        if line.listed:
            line.listed = False
            self._ready.remove(line)
        if not line.usable and not line.busy:
            self._lines.discard(line)

    def _give(self, line: Line, job: Job) -> None:
        line.since = self._loop.time()
        line.send(job)
        if not line.room:
            line.listed = False
            self._ready.remove(line)

    def free(self, line: Line) -> None:
        """A connection has room again, or ended."""
        if not line.usable and not line.busy:
            self._unlist(line)
            self._leaving.discard(line)
        elif line.room and not line.listed and line in self._lines:
            line.listed = True
            self._ready.append(line)
        self._go_on()
        if line.listed and not line.busy and len(self._ready) > self.settings.http2_pool_max_idle_per_host:
            self._end(line, "")

    def retire(self, line: Line) -> None:
        """A connection takes no more requests; those on it go on."""
        self._unlist(line)
        self._lines.discard(line)
        if line.busy:
            self._leaving.add(line)
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting:
            if self._waiting[0].call.begun.done():  # given up
                self._waiting.popleft()
                continue
            line = self._best()
            if line is None:
                self._open()
                return
            self._give(line, self._waiting.popleft())

    def _open(self) -> None:
        while len(self._opening) < len(self._waiting) and len(self._lines) + len(self._opening) < self._most:
            task = self._loop.create_task(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        line = self._line(self)
        seconds = min(CONNECT_SECONDS, self.settings.http_request_timeout_seconds)
        try:
            async with asyncio.timeout(seconds):
                await self._loop.create_connection(line.protocol, self._host, self._port)
        except TimeoutError:
            self._fail(f"no connection in {seconds:g} s")
        except (OSError, ValueError) as error:  # ValueError: a name that no look-up takes
            self._fail(f"no connection: {error}")
        else:
            self._lines.add(line)
            self.free(line)
            self._sweep()

    def _fail(self, reason: str) -> None:
        """Without any connection nothing that waits has a chance; with one it goes on."""
        if not self._lines:
            waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                lose(job.call, reason, delivered=False)

    def _end(self, line: Line, reason: str) -> None:
        line.end(reason)
        self._unlist(line)
        self._lines.discard(line)
        self._leaving.discard(line)

    def _sweep(self) -> None:
        """End what rests for too long, and what does not answer: its call has timed out."""
        if self._timer is None and (self._lines or self._leaving):
            span = min(
                self.settings.http2_pool_idle_timeout_seconds,
                self.settings.http_request_timeout_seconds,
                self.settings.http2_keep_alive_interval_seconds,
                self.settings.http2_keep_alive_timeout_seconds,
            )
            self._timer = self._loop.call_later(span / 2, self._swept)

    def _swept(self) -> None:
        self._timer, now = None, self._loop.time()
        idle, answer = self.settings.http2_pool_idle_timeout_seconds, self.settings.http_request_timeout_seconds
        for line in [*self._lines, *self._leaving]:
            line.tick(now, answer)
            if not line.busy and (line.since + idle <= now or not line.usable):
                self._end(line, "")
        self._go_on()
        self._sweep()

    def close(self) -> list[asyncio.Task[None]]:
        """End all connections. Returns the tasks that are ending."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._opening:
            task.cancel()
        for line in [*self._lines, *self._leaving]:
            self._end(line, "the client was closed")
        self._fail("the client was closed")
        return list(self._opening)

    @property
    def lines(self) -> Iterable[Line]:
        """Those that stand."""
        return [*self._lines, *self._leaving]

    @property
    def unused(self) -> bool:
        """Whether there is nothing in it."""
        return not (self._lines or self._leaving or self._opening or self._waiting)

    def __len__(self) -> int:
        return len(self._lines)
