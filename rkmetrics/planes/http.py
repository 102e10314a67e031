"""The http plane: a request is a POST to `{DYN_HTTP_RPC_ROOT_PATH}/{endpoint}`, acknowledged with 202.

One port speaks HTTP/1.1, as Dynamo's own peers do, and HTTP/2 without TLS to whoever begins with its preface (RFC 9113,
3.3). What is said on a connection is in http1.py and http2.py, without sockets; here are the sockets and their limits,
and in http_pool.py a client's connections. An answer never comes over http: it goes home over tcp (callhome.py), so a
request is over once it is acknowledged, and a connection is free for the next one.

A path names no instance: one port serves an endpoint name once, and whoever listens there takes the call. Pages that a
browser shows may not call (their requests have an Origin), as a worker on a developer's machine has a well-known port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, cast

from rkmetrics.addresses import WILDCARDS, advertised
from rkmetrics.catalogue.planes import IntakeRefusal, Plane
from rkmetrics.errors import BackendError, MissingExtraError, RpcRefusedError, ServeError
from rkmetrics.planes.base import Instance, Refusal
from rkmetrics.planes.callhome import keep_alive, refuse
from rkmetrics.planes.calling import SILENCE_SECONDS, Call, PlaneClient, answers
from rkmetrics.planes.fork import descriptors
from rkmetrics.planes.http1 import Http1
from rkmetrics.planes.http_base import Patience, Reply, Request, Speaker
from rkmetrics.planes.http_pool import (
    HOST_CONNECTIONS,
    Http1Line,
    Http2Line,
    Job,
    Line,
    Pool,
    Target,
    lose,
    read_target,
)
from rkmetrics.planes.serving import PlaneServer
from rkmetrics.planes.tcp import _joined, _told, call_home, here

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["HttpClient", "HttpServer"]

KIND = "http"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113, 3.4

CONNECTIONS_LIMIT = 10_000
#: All incomplete requests together may take so much; beyond it whoever has more than a small one incomplete is sent
#: away, and requests that come at once are taken as before.
KEPT_LIMIT_BYTES, SMALL_BYTES = 256 * 1024 * 1024, 64 * 1024
#: After an answer that ends a connection, what is still coming is read and dropped for so long: closing at once would
#: make TCP take the answer back (RFC 9112, 9.6).
LINGER_SECONDS = 2.0


# --- the server -------------------------------------------------------------------------------------------------------


class _Caller(asyncio.Protocol):
    """A connection from a client. known: a request was complete on it."""

    def __init__(self, server: HttpServer) -> None:
        self._server, self._loop = server, asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._speaker: Speaker | None = None
        self._first = b""
        self._timer: asyncio.TimerHandle | None = None
        self._kept = 0
        self._over = self.known = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if not self._server.admit(self):
            self._transport.abort()
            return
        keep_alive(self._transport)
        self._timer = self._loop.call_later(self._server.patience.head_seconds, self._ring)

    def data_received(self, data: bytes) -> None:
        if self._over or self._transport is None:
            return
        now = self._loop.time()
        if self._speaker is None:
            data = self._first = self._first + data
            self._speaker = self._chosen(data, now)
        if self._speaker is not None:
            self._first = b""
            self._send(self._speaker, self._speaker.feed(data, now))

    def _chosen(self, first: bytes, now: float) -> Speaker | None:
        """Which HTTP is spoken; None where it takes more bytes to know."""
        if first.startswith(PREFACE):
            return self._http2(now)
        return None if PREFACE.startswith(first) else Http1(self._server, now)

    def _http2(self, now: float) -> Speaker:
        try:
            from rkmetrics.planes.http2 import Http2
        except MissingExtraError as error:
            self._server.note(IntakeRefusal.MALFORMED, str(error))
            return Http1(self._server, now)  # which says that it does not understand
        return Http2(self._server, self._server.settings, now)

    def _send(self, speaker: Speaker, out: bytes) -> None:
        transport = self._transport
        if transport is None:
            return
        rest = speaker.rest
        if rest != self._kept:
            if self._server.keep(rest - self._kept) and rest > SMALL_BYTES:
                out += speaker.give_up(Refusal.BUSY.status, "incomplete requests take all the memory they may")
            self._kept = rest
        if out:
            self.known = True
            transport.write(out)
        if speaker.over:
            self._end(transport)
        else:
            self._watch(speaker.due)

    def _end(self, transport: asyncio.Transport) -> None:
        """Send no more, and wait a little for the peer to have read it."""
        self._over, self._speaker = True, None
        self._release()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(LINGER_SECONDS, self.abort)
        if not transport.is_reading():
            transport.resume_reading()
        if transport.can_write_eof():
            transport.write_eof()

    def _watch(self, due: float) -> None:
        """The timer is not moved with each request: it looks when it rings."""
        if self._timer is None or due < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        speaker, now = self._speaker, self._loop.time()
        if speaker is None:
            if self._first:
                self._server.too_slow("a connection did not say what it speaks")
            self.abort()
        elif speaker.due <= now:
            self._send(speaker, speaker.expire(now))
        else:
            self._watch(speaker.due)

    def drain(self) -> None:
        """The server takes nothing more."""
        if self._speaker is not None and not self._over:
            self._send(self._speaker, self._speaker.drain())

    def close(self) -> None:
        """End it; what was said before is sent, if the peer takes it."""
        transport = self._transport
        if transport is None or self._over:
            self.abort()
            return
        if self._speaker is not None:
            transport.write(self._speaker.close())
        self._over, self._speaker = True, None
        self._release()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(LINGER_SECONDS, self.abort)
        transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def resting(self) -> bool:
        """Whether nothing is incomplete on it."""
        return not self._kept

    def pause_writing(self) -> None:
        """The client does not read its answers: it is not read either."""
        if self._transport is not None and not self._over:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _release(self) -> None:
        self._server.keep(-self._kept)
        self._kept = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._speaker = None
        self._release()
        if self._timer is not None:
            self._timer.cancel()
        self._server.release(self)


#: What a client reads, where http says it otherwise than the other planes.
TEXTS = {Refusal.UNKNOWN_ENDPOINT: Reply(404, "Endpoint not found")}
REPLIES = {each: TEXTS.get(each) or Reply(each.status, each.text) for each in Refusal}
ACCEPTED, NO_POST = Reply(202), Reply(405, "Endpoints take POST")
#: Statuses for what is no request, and what it is counted as, where that is not MALFORMED.
UNREADABLE = {413: Refusal.TOO_LARGE, 431: Refusal.TOO_LARGE, 503: Refusal.BUSY}


class HttpServer(PlaneServer):
    """Serves endpoints over http, at DYN_HTTP_RPC_HOST and DYN_HTTP_RPC_PORT.

    patience, connections_limit, kept_limit_bytes: what strangers may take; to be changed before it starts.
    """

    plane = Plane.HTTP
    patience = Patience()
    connections_limit, kept_limit_bytes = CONNECTIONS_LIMIT, KEPT_LIMIT_BYTES

    @property
    def limit_bytes(self) -> int:
        """Of a request's body."""
        return self.settings.tcp_max_message_size_bytes

    @property
    def draining(self) -> bool:
        return self._draining

    async def _listen(self) -> None:
        host, port = here(self.settings.http_rpc_host), self.settings.http_rpc_port
        self._callers: dict[_Caller, None] = {}  # the oldest first
        self._kept = 0
        self._prefix = self.settings.http_rpc_root_path.rstrip("/") + "/"
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: _Caller(self), "" if host == "*" else host, port, backlog=1_024
            )
        except (OSError, ValueError) as error:  # ValueError: a name that no look-up takes
            raise ServeError(
                f"the http plane cannot listen at {host}:{port}: {error}; set DYN_HTTP_RPC_HOST and DYN_HTTP_RPC_PORT "
                "(0 takes a free port)"
            ) from error
        bound, port = self._server.sockets[0].getsockname()[:2]
        try:
            self._address = advertised(_told(self.settings), host, port) if host in WILDCARDS else _joined(bound, port)
        except BackendError:
            self._server.close()
            raise

    def _open_files(self) -> Iterable[int]:
        return descriptors([self._server, *(caller._transport for caller in self._callers)])

    def _drain(self) -> None:
        self._refusing = asyncio.create_task(refuse(self._server))
        for caller in list(self._callers):
            caller.drain()

    async def _close(self) -> None:
        await refuse(self._server)
        for caller in list(self._callers):
            caller.close()
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        """host:port, as others reach it."""
        return self._address

    def instances(self) -> Iterable[Instance]:
        for name in self.endpoints:
            url = f"http://{self._address}{self._prefix}{name.endpoint}"
            yield Instance(*name, self.instance_id, (KIND, url))

    # --- what a connection asks ---------------------------------------------------------------------------------------

    def reply(self, request: Request) -> Reply:
        """Take a request, or say why not."""
        prefix = self._prefix
        if not request.path.startswith(prefix):
            return REPLIES[self.refuse(Refusal.UNKNOWN_ENDPOINT)]
        if request.method != "POST":
            if request.method != "OPTIONS" or request.origin:  # else a probe: that it is answered is all
                self.refuse(Refusal.MALFORMED, "a request that is no POST")
            return NO_POST
        if request.origin:
            self.note(IntakeRefusal.FORBIDDEN, "a page in a browser sent it (it has an Origin)")
            return Reply(403, "Pages in a browser may not call endpoints")
        refusal = self.take(request.path[len(prefix) :], request.body, request.traceparent)
        return ACCEPTED if refusal is None else REPLIES[refusal]

    def refused(self, status: int, detail: str) -> Reply:
        """Count what cannot be read."""
        refusal = self.refuse(UNREADABLE.get(status, Refusal.MALFORMED), detail)
        return Reply(status, refusal.text)

    def too_slow(self, detail: str) -> None:
        """Count what was not complete in time."""
        self.note(IntakeRefusal.TOO_SLOW, detail)

    def flooded(self, detail: str) -> None:
        """Count a peer that only makes work."""
        self.note(IntakeRefusal.FLOOD, detail)

    def keep(self, more_bytes: int) -> bool:
        """Count what is kept of incomplete requests. Whether that is too much."""
        self._kept += more_bytes
        return more_bytes > 0 and self._kept > max(self.kept_limit_bytes, 2 * self.limit_bytes)

    @property
    def kept_bytes(self) -> int:
        """What is kept of incomplete requests."""
        return self._kept

    def admit(self, caller: _Caller) -> bool:
        """Whether there is room for another connection. Where there is none, the oldest is ended for it: of those that
        never had an answer and say nothing, then of those that never had one, then of those that rest."""
        if self._draining:
            return False
        if len(self._callers) >= self.connections_limit:
            self.note(IntakeRefusal.BUSY, f"{self.connections_limit} connections are there already")
            oldest = self._oldest()
            if oldest is None:
                return False
            self.release(oldest)
            oldest.abort()
        self._callers[caller] = None
        self.connections.set(len(self._callers))
        return True

    def _oldest(self) -> _Caller | None:
        strangers = [each for each in self._callers if not each.known]
        silent = next((each for each in strangers if each.resting), None)
        return silent or next(iter(strangers), None) or next((each for each in self._callers if each.resting), None)

    def release(self, caller: _Caller) -> None:
        """A connection ended."""
        if caller in self._callers:
            del self._callers[caller]
            self.connections.set(len(self._callers))


# --- the client -------------------------------------------------------------------------------------------------------


POOLS_SWEPT = 1_000


class HttpClient(PlaneClient):
    """Calls over http: HTTP/1.1, or HTTP/2 at once where DYN_HTTP2_PRIOR_KNOWLEDGE says so."""

    plane = Plane.HTTP

    def __init__(
        self, registry: Registry, *, silence_seconds: float = SILENCE_SECONDS, actor_name: str | None = None
    ) -> None:
        settings = registry.settings
        super().__init__(
            registry,
            call_home(settings, settings.http_rpc_host),
            request_timeout_seconds=settings.http_request_timeout_seconds,
            silence_seconds=silence_seconds,
            actor_name=actor_name,
        )
        self._pools: dict[tuple[str, int], Pool] = {}
        self._line: type[Line] = Http1Line
        self._most = HOST_CONNECTIONS
        if settings.http2_prior_knowledge:
            import_module("rkmetrics.planes.http2")  # raises MissingExtraError here, and not with the first call
            self._line, self._most = Http2Line, 1

    def _push(self, call: Call, payload: bytes, traceparent: str) -> None:
        kind, url = call.instance.transport
        try:
            if kind != KIND:
                raise ValueError(f"it is reached over {kind!r}, and this client speaks http")
            target = read_target(url)
        except ValueError as error:
            lose(call, str(error), delivered=False)
            return
        if len(payload) > self.settings.tcp_max_message_size_bytes:
            reason = f"{Refusal.TOO_LARGE.text}: it has {len(payload)} bytes (DYN_TCP_MAX_MESSAGE_SIZE)"
            call.fail(RpcRefusedError(call.endpoint, reason, instance=call.where))
            return
        self._pool(target).send(Job(call, target, payload, traceparent))

    async def probe(self, instance: Instance) -> bool:
        try:
            target = read_target(instance.transport[1])
        except ValueError:
            return False
        message = f"OPTIONS {target.path} HTTP/1.1\r\nhost: {target.authority}\r\nconnection: close\r\n\r\n".encode()
        return await answers(target.host, target.port, message, self.settings.http_request_timeout_seconds)

    def _pool(self, target: Target) -> Pool:
        key = target.host, target.port
        pool = self._pools.get(key)
        if pool is None:
            if len(self._pools) >= POOLS_SWEPT:  # instances come and go
                self._pools = {key: pool for key, pool in self._pools.items() if not pool.unused}
            pool = self._pools[key] = Pool(self.settings, *key, self._line, self._most)
        return pool

    def _open_files(self) -> Iterable[int]:
        return descriptors([line.transport for pool in self._pools.values() for line in pool.lines])

    def _go_on_in_child(self) -> None:
        super()._go_on_in_child()
        self._pools = {}

    async def _close(self) -> None:
        ending = [task for pool in self._pools.values() for task in pool.close()]
        self._pools.clear()
        if ending:
            await asyncio.wait(ending)
