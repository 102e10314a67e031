"""A strict, small HTTP/1.1 client: for polling workers and checking backends with GET, thousands at a time.

A library's request costs 250 to 1,400 us of CPU; a poll of a thousand workers each 100 ms has about 60. So: bytes are
read by a parser without socket or clock (`http_answer`), a protocol class feeds it (`Connection`), and `Channel` keeps
one connection to one place, opens it again when it is needed, and calls back; no task runs for a request, and time is
its owner's. `get` is the same for one request, as a coroutine, and `send` for any method and a body; an answer that is
read while it comes is in `rkmetrics.stream`.

Peers are not trusted (reliability, T14, T17, T19). One answer at a time, no redirect followed, no content coding taken,
limits checked before anything is stored, and whatever two parsers could read in two ways is refused. Credentials in a
URL are not sent, and neither they nor a query are in any error; what a peer sent is in none either.
"""

from __future__ import annotations

import asyncio
import re
import ssl as tls
from collections.abc import Callable
from functools import cache
from ipaddress import AddressValueError, IPv6Address
from typing import NamedTuple, cast
from urllib.parse import urlsplit

from rkmetrics.errors import FetchError
from rkmetrics.http_answer import BODY_LIMIT_BYTES, Answer, AnswerParser, Headers, Reason, Refused
from rkmetrics.http_body import END, TOKEN, VALUE

__all__ = ["Channel", "Connection", "Endpoint", "Failure", "get", "request_head", "send"]

URL = re.compile(r"[\x21-\x7e]+")
HOST = re.compile(r"[A-Za-z0-9._-]+")
PORTS = {"http": 80, "https": 443}
HEADER_NAME, HEADER_VALUE = re.compile(TOKEN), re.compile(VALUE)
OURS = frozenset({b"host", b"accept-encoding", b"content-length", b"transfer-encoding"})


class Endpoint(NamedTuple):
    """Where a request goes. address: what to connect to, by default the host. target: path and query."""

    scheme: str
    host: str
    port: int
    target: str
    authority: str
    address: str

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Read an absolute http or https URL; credentials and fragment are left out. Raises FetchError (request)."""
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, parts.hostname or "", parts.port
        except ValueError:
            raise _bad_url(url) from None
        if not URL.fullmatch(url) or scheme not in PORTS or not _is_host(host) or port == 0:
            raise _bad_url(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        name = f"[{host.partition('%')[0]}]" if ":" in host else host
        authority = name if port is None else f"{name}:{port}"
        host = host.replace("%25", "%")  # RFC 6874: the zone of a link-local address
        return cls(scheme, host, PORTS[scheme] if port is None else port, target, authority, host)

    def at(self, address: str) -> Endpoint:
        """The same, to be reached at an address that was resolved and checked before."""
        return self._replace(address=address)

    @property
    def shown(self) -> str:
        """The URL as errors and logs show it: without credentials, query and fragment."""
        return f"{self.scheme}://{self.authority}{self.target.partition('?')[0]}"


def _is_host(host: str) -> bool:
    if ":" not in host:
        return bool(HOST.fullmatch(host))
    try:
        IPv6Address(host.replace("%25", "%"))
    except AddressValueError:
        return False
    return True


def _bad_url(url: str) -> FetchError:
    shown = "<not shown>" if "@" in url else repr(url.partition("?")[0])  # any part of it may be a password
    return FetchError(shown, Reason.REQUEST, "expected an absolute URL of ASCII, such as http://host:9090/path")


METHODS = frozenset({"GET", "POST", "DELETE"})


def request_head(endpoint: Endpoint, headers: Headers = (), *, method: str = "GET", length: int | None = None) -> bytes:
    """Return the head of a request, by default the whole of a GET; `length` bytes of body are to follow it.

    Raises FetchError (request) for headers that are none, or that are ours to say.
    """
    assert method in METHODS
    lines = [
        b"%s %s HTTP/1.1" % (method.encode("ascii"), endpoint.target.encode("ascii")),
        b"host: %s" % endpoint.authority.encode("ascii"),
        b"accept-encoding: identity",
    ]
    for name, value in headers:
        if not HEADER_NAME.fullmatch(name) or not HEADER_VALUE.fullmatch(value) or name.lower() in OURS:
            raise FetchError(endpoint.shown, Reason.REQUEST, f"the header {name!r} cannot be sent so", method=method)
        lines.append(b"%s: %s" % (name, value))
    if length is not None:
        lines.append(b"content-length: %d" % length)
    return b"\r\n".join(lines) + END


# --- connections ------------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """Why there is no answer. stale: the connection had ended before the request came, so it was not looked at."""

    reason: Reason
    detail: str
    stale: bool = False


class Connection(asyncio.Protocol):
    """One connection; at most one request is in flight. ended: called with what each of them came to."""

    def __init__(
        self,
        ended: Callable[[Answer | Failure], None],
        limit_bytes: int = BODY_LIMIT_BYTES,
        parser: AnswerParser | None = None,
    ) -> None:
        self._ended, self._parser = ended, parser or AnswerParser(limit_bytes)
        self._transport: asyncio.Transport | None = None
        self._busy, self._answers = False, 0

    @property
    def usable(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._busy and not self._transport.is_closing()

    @property
    def transport(self) -> asyncio.Transport | None:
        """What it stands on, while it does."""
        return self._transport

    def send(self, request: bytes) -> None:
        """Send a request; `usable` says whether it may be."""
        assert self._transport is not None
        self._busy = True
        self._parser.reset()
        self._transport.write(request)

    def hold(self, held: bool) -> None:
        """Read no further for now, so that the peer has to wait; or go on."""
        if self._transport is not None and not self._transport.is_closing():
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    def abort(self) -> None:
        """End the connection, and call nobody."""
        self._busy = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not derived from it

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer; nobody asked for any between two requests."""
        if not self._busy:
            self.abort()
            return
        try:
            answer = self._parser.feed(data)
        except Refused as refused:
            self._end(Failure(refused.reason, refused.detail), keep=False)
        else:
            if answer is not None:
                self._end(answer, keep=answer.keep_alive and not self._parser.surplus)

    def eof_received(self) -> None:
        """The peer sends no more; the transport closes then."""
        if self._busy:
            self._ended_early()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        if self._busy and exc is None:
            self._ended_early()
        elif self._busy:
            self._end(self._lost(exc), keep=False)
        self._transport = None

    def _ended_early(self) -> None:
        try:
            self._end(self._parser.finish(), keep=False)
        except Refused as refused:
            self._end(self._lost(refused.detail), keep=False)

    def _lost(self, why: object) -> Failure:
        # A server may close an idle connection at any time, also while a request is on its way (RFC 9112, 9.3.1).
        return Failure(Reason.CLOSED, str(why), stale=self._answers > 0 and not self._parser.begun)

    def _end(self, found: Answer | Failure, *, keep: bool) -> None:
        self._busy = False
        self._answers += 1
        if not keep:
            self.abort()
        self._ended(found)


class Channel:
    """Requests to one place, one at a time, over a connection that is kept, and opened when there is none.

    answered, failed: called once for each request, from the event loop; they must not raise. A request that met a
    connection which the server had closed meanwhile is sent once more. The channel has no clock: who waits too long
    calls `expire`. parser: for a channel of one request, what its answer is read with. To be used from one running
    event loop.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        answered: Callable[[Answer], None],
        failed: Callable[[Failure], None],
        *,
        limit_bytes: int = BODY_LIMIT_BYTES,
        ssl: tls.SSLContext | None = None,
        parser: AnswerParser | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._answered, self._failed = answered, failed
        self._limit, self._ssl, self._parser = limit_bytes, ssl, parser
        self._request: bytes | None = None  # in flight
        self._connection: Connection | None = None
        self._opening: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is in flight."""
        return self._request is not None

    def request(self, request: bytes) -> None:
        """Send a request, made by `request_head`. Raises RuntimeError while another one is in flight."""
        if self._request is not None:
            raise RuntimeError("a request is in flight; wait for its answer, or expire() it")
        self._request = request
        connection = self._connection
        if connection is not None and connection.usable:
            connection.send(request)
        else:
            self._open()

    def hold(self, held: bool) -> None:
        """Read no further for now, or go on."""
        if self._connection is not None:
            self._connection.hold(held)

    def expire(self) -> None:
        """Give up the request in flight: it failed by time-out."""
        if self._request is not None:
            self._drop()
            self._fail(Failure(Reason.TIMEOUT, "no complete answer in time"))

    def close(self) -> asyncio.Task[None] | None:
        """End the connection; a request in flight is forgotten, and nobody called.

        Returns the cancelled task that was about to connect, for whoever has to see it end.
        """
        self._request = None
        return self._drop()

    def _drop(self) -> asyncio.Task[None] | None:
        opening, connection = self._opening, self._connection
        self._opening = self._connection = None
        if opening is not None:
            opening.cancel()
        if connection is not None:
            connection.abort()
        return opening

    def _open(self) -> None:
        self._connection = None
        self._opening = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        connection = Connection(self._ended, self._limit, self._parser)
        at, secure = self.endpoint, self.endpoint.scheme == "https"
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: connection,
                at.address,
                at.port,
                ssl=(self._ssl or _default_context()) if secure else None,
                server_hostname=at.host if secure else None,
            )
        except asyncio.CancelledError:
            connection.abort()
            raise
        except Exception as error:
            self._opening = None
            self._fail(_why(error))
        else:
            self._opening, self._connection = None, connection
            self._begin(connection)

    def _begin(self, connection: Connection) -> None:
        if self._request is not None and connection.usable:
            connection.send(self._request)
        else:
            self._fail(Failure(Reason.CLOSED, "the connection ended at once"))

    def _ended(self, found: Answer | Failure) -> None:
        if isinstance(found, Answer):
            self._request = None
            self._answered(found)
        elif found.stale:
            self._open()
        else:
            self._fail(found)

    def _fail(self, failure: Failure) -> None:
        self._request = None
        self._failed(failure)


@cache
def _default_context() -> tls.SSLContext:
    """Loads the system's certificates, which takes tens of milliseconds."""
    return tls.create_default_context()


def _why(error: Exception) -> Failure:
    if isinstance(error, tls.SSLError):
        return Failure(Reason.TLS, str(error))
    return Failure(Reason.UNREACHABLE, str(error) or type(error).__name__)


async def get(
    url: str,
    *,
    headers: Headers = (),
    timeout_seconds: float = 5.0,
    limit_bytes: int = BODY_LIMIT_BYTES,
    ssl: tls.SSLContext | None = None,
    address: str | None = None,
) -> Answer:
    """GET a URL over a connection of its own, whatever the status; raises FetchError where there is no answer.

    timeout_seconds: for all of it, from the look-up of the name to the last byte. ssl: for https, by default the
    system's certificates. address: where to connect, for a name that was resolved and checked before.
    """
    return await send(
        "GET",
        url,
        headers=headers,
        timeout_seconds=timeout_seconds,
        limit_bytes=limit_bytes,
        ssl=ssl,
        address=address,
    )


async def send(
    method: str,
    url: str,
    *,
    body: bytes | None = None,
    headers: Headers = (),
    timeout_seconds: float = 5.0,
    limit_bytes: int = BODY_LIMIT_BYTES,
    ssl: tls.SSLContext | None = None,
    address: str | None = None,
) -> Answer:
    """The same with any of METHODS and a body. It is sent once: what it does happens once at most."""
    endpoint = Endpoint.parse(url)
    length = None if body is None else len(body)
    head = request_head(endpoint, (*headers, (b"connection", b"close")), method=method, length=length)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Answer | Failure] = loop.create_future()

    def end(found: Answer | Failure) -> None:
        if not done.done():  # cancelled
            done.set_result(found)

    at = endpoint.at(address) if address else endpoint
    channel = Channel(at, end, end, limit_bytes=limit_bytes, ssl=ssl)
    timer = loop.call_later(timeout_seconds, channel.expire)
    channel.request(head + (body or b""))
    try:
        found = await done
    finally:
        timer.cancel()
        channel.close()
    if isinstance(found, Failure):
        raise FetchError(endpoint.shown, found.reason, found.detail, method=method)
    return found
