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

from rkmetrics.catalogue.planes import IntakeRefusal, Plane
from rkmetrics.errors import MissingExtraError
from rkmetrics.planes.base import Instance, Refusal
from rkmetrics.planes.callhome import refuse
from rkmetrics.planes.calling import SILENCE_SECONDS, Call
from rkmetrics.planes.connecting import ConnectingClient
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
    read_target,
)
from rkmetrics.planes.listening import Guest, ListeningServer

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["HttpClient", "HttpServer"]

KIND = "http"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113, 3.4


# --- the server -------------------------------------------------------------------------------------------------------


class _Caller(Guest):
    """A connection from a client."""

    def __init__(self, server: HttpServer) -> None:
        super().__init__(server)
        self._http = server
        self._speaker: Speaker | None = None
        self._first = b""

    def _admitted(self) -> None:
        self._timer = self._loop.call_later(self._http.patience.head_seconds, self._ring)

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
        return None if PREFACE.startswith(first) else Http1(self._http, now)

    def _http2(self, now: float) -> Speaker:
        try:
            from rkmetrics.planes.http2 import Http2
        except MissingExtraError as error:
            self._server.note(IntakeRefusal.MALFORMED, str(error))
            return Http1(self._http, now)  # which says that it does not understand
        return Http2(self._http, self._http.settings, now)

    def _send(self, speaker: Speaker, out: bytes) -> None:
        transport = self._transport
        if transport is None:
            return
        if self.keep(speaker.rest):
            out += speaker.give_up(Refusal.BUSY.status, "incomplete requests take all the memory they may")
        if out:
            self.known = True
            transport.write(out)
        if speaker.over:
            self._speaker = None
            self._linger(transport)
        else:
            self._watch(speaker.due)

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
                self._http.too_slow("a connection did not say what it speaks")
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
        self._speaker = None
        self._leave()
        transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone, and what was to be said with it."""
        self._speaker = None
        super().connection_lost(exc)


#: What a client reads, where http says it otherwise than the other planes.
TEXTS = {Refusal.UNKNOWN_ENDPOINT: Reply(404, "Endpoint not found")}
REPLIES = {each: TEXTS.get(each) or Reply(each.status, each.text) for each in Refusal}
ACCEPTED, NO_POST = Reply(202), Reply(405, "Endpoints take POST")
#: Statuses for what is no request, and what it is counted as, where that is not MALFORMED.
UNREADABLE = {413: Refusal.TOO_LARGE, 431: Refusal.TOO_LARGE, 503: Refusal.BUSY}


class HttpServer(ListeningServer):
    """Serves endpoints over http, at DYN_HTTP_RPC_HOST and DYN_HTTP_RPC_PORT.

    patience: what strangers may take, beside its base's limits; to be changed before it starts.
    """

    plane = Plane.HTTP
    patience = Patience()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def _place(self) -> tuple[str | None, int]:
        return self.settings.http_rpc_host, self.settings.http_rpc_port

    @property
    def _prefix(self) -> str:
        return self.settings.http_rpc_root_path.rstrip("/") + "/"

    def _guest(self) -> _Caller:
        return _Caller(self)

    def admit(self, guest: Guest) -> bool:
        """Nobody any more once it leaves: what comes then belongs to whoever takes the port."""
        return not self._draining and super().admit(guest)

    def _drain(self) -> None:
        self._refusing = asyncio.create_task(refuse(self._server))
        for guest in list(self._guests):
            cast("_Caller", guest).drain()

    def instances(self) -> Iterable[Instance]:
        for name in self.endpoints:
            url = f"http://{self.address}{self._prefix}{name.endpoint}"
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


# --- the client -------------------------------------------------------------------------------------------------------


POOLS_SWEPT = 1_000


class HttpClient(ConnectingClient[Target, Pool]):
    """Calls over http: HTTP/1.1, or HTTP/2 at once where DYN_HTTP2_PRIOR_KNOWLEDGE says so."""

    plane, kind = Plane.HTTP, KIND

    def __init__(
        self, registry: Registry, *, silence_seconds: float = SILENCE_SECONDS, actor_name: str | None = None
    ) -> None:
        settings = registry.settings
        super().__init__(
            registry,
            host=settings.http_rpc_host,
            request_timeout_seconds=settings.http_request_timeout_seconds,
            silence_seconds=silence_seconds,
            actor_name=actor_name,
        )
        self._line: type[Line] = Http1Line
        self._most = HOST_CONNECTIONS
        if settings.http2_prior_knowledge:
            import_module("rkmetrics.planes.http2")  # raises MissingExtraError here, and not with the first call
            self._line, self._most = Http2Line, 1

    def _target(self, place: str) -> Target:
        return read_target(place)

    def _new_pool(self, key: tuple[str, int]) -> Pool:
        if len(self._pools) >= POOLS_SWEPT:  # instances come and go
            self._pools = {key: pool for key, pool in self._pools.items() if not pool.unused}
        return Pool(self.settings, *key, self._line, self._most)

    def _send(self, pool: Pool, call: Call, target: Target, payload: bytes, traceparent: str) -> None:
        pool.send(Job(call, target, payload, traceparent))

    def _greeting(self, target: Target) -> bytes:
        head = f"OPTIONS {target.path} HTTP/1.1\r\nhost: {target.authority}\r\nconnection: close\r\n\r\n"
        return head.encode()

    @property
    def probe_seconds(self) -> float:
        return self.settings.http_request_timeout_seconds
