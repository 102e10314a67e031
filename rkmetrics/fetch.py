"""A strict, small HTTP/1.1 client: for polling workers and checking backends with GET, thousands at a time.

A library's request costs 250 to 1,400 us of CPU; a poll of a thousand workers each 100 ms has about 60. So: bytes are
read by a parser without socket or clock (`AnswerParser`), a protocol class feeds it (`Connection`), and `Channel` keeps
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
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import cache
from ipaddress import AddressValueError, IPv6Address
from typing import NamedTuple, cast
from urllib.parse import urlsplit

from rkmetrics.errors import FetchError

__all__ = [
    "BODY_LIMIT_BYTES",
    "HEAD_LIMIT_BYTES",
    "Answer",
    "AnswerParser",
    "Channel",
    "Connection",
    "Endpoint",
    "Failure",
    "Framing",
    "Head",
    "Headers",
    "Reason",
    "Refused",
    "get",
    "parse_head",
    "request_head",
    "send",
]

Headers = Iterable[tuple[bytes, bytes]]

HEAD_LIMIT_BYTES = 16_384
BODY_LIMIT_BYTES = 65_536
HEADERS_LIMIT = 100
INTERIM_LIMIT = 4  # answers of 1xx before the one that counts
CHUNKS_LIMIT = 4_096  # each costs us a step, however small it is
CHUNK_LINE_LIMIT_BYTES = 256
LENGTH_DIGITS = 18

END = b"\r\n\r\n"
BEGINNING = b"HTTP/1."
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
VALUE = rb"[\t\x20-\x7e\x80-\xff]*"
FIELD = re.compile(rb"(" + TOKEN + rb"):(" + VALUE + rb")\r\n")  # RFC 9112, 5; no folding (5.2)
FIELDS = rb"((?:" + TOKEN + rb":" + VALUE + rb"\r\n)*)\r\n"
# RFC 9112, 4. The space after the code is left out by some who send no phrase.
HEAD = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: " + VALUE + rb")?\r\n" + FIELDS)
TRAILERS = re.compile(FIELDS)
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[\t ]*(?:;" + VALUE + rb")?")  # RFC 9112, 7.1; extensions mean nothing to us


class Reason(StrEnum):
    """Why a request has no answer."""

    REQUEST = "request"  # the URL or a header cannot be sent
    UNREACHABLE = "unreachable"  # no connection: refused, no route, no such name
    TLS = "tls"  # no connection that is safe
    TIMEOUT = "timeout"
    CLOSED = "closed"  # the connection ended before the answer did
    MALFORMED = "malformed"  # not HTTP/1.1, or not in one clear way
    ENCODED = "encoded"  # a content coding, which nobody asked for
    TOO_LARGE = "too_large"


class Refused(Exception):
    """An answer that is not taken. The only exception of the parser."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class Answer(NamedTuple):
    """One answer, complete. headers: lower-case names, values without white space around them."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    keep_alive: bool

    def value(self, name: bytes) -> bytes | None:
        """Return the value of the first header of that (lower-case) name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


# --- heads ------------------------------------------------------------------------------------------------------------


class Framing(StrEnum):
    """How the end of a body is found (RFC 9112, 6.3)."""

    NONE = "none"
    SIZED = "sized"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until_close"


class Head(NamedTuple):
    """A head, and what it says about the body. length: bytes of a sized one."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    framing: Framing
    length: int
    keep_alive: bool


_SPECIAL = frozenset({b"content-length", b"transfer-encoding", b"content-encoding", b"connection"})


def parse_head(data: bytes) -> Head:
    """Read a head with its final empty line. Raises Refused."""
    found = HEAD.fullmatch(data)
    if found is None:
        raise Refused(Reason.MALFORMED, "not the head of an HTTP/1.1 answer")
    headers = tuple([(name.lower(), value.strip(b" \t")) for name, value in FIELD.findall(found[3])])
    if len(headers) > HEADERS_LIMIT:
        raise Refused(Reason.TOO_LARGE, f"more than {HEADERS_LIMIT} headers")
    special: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in _SPECIAL:
            special.setdefault(name, []).append(value)
    status, modern = int(found[2]), found[1] == b"1"
    framing, length = _framing(status, special, modern=modern)
    persists = modern and framing is not Framing.UNTIL_CLOSE and not _closes(special.get(b"connection", ()))
    return Head(status, headers, framing, length, persists)


def _framing(status: int, special: dict[bytes, list[bytes]], *, modern: bool) -> tuple[Framing, int]:
    if status < 200 or status in (204, 304):
        return Framing.NONE, 0
    if any(value.lower() != b"identity" for value in special.get(b"content-encoding", ())):
        raise Refused(Reason.ENCODED, "a body with a content coding")
    lengths, codings = special.get(b"content-length"), special.get(b"transfer-encoding")
    if codings is not None:
        if lengths or not modern or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise Refused(Reason.MALFORMED, "a Transfer-Encoding that is not just chunked")
        return Framing.CHUNKED, 0
    if lengths is None:
        return Framing.UNTIL_CLOSE, 0
    if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > LENGTH_DIGITS:
        raise Refused(Reason.MALFORMED, "a Content-Length that is not one number")
    return Framing.SIZED, int(lengths[0])


def _closes(connection: Iterable[bytes]) -> bool:
    return any(b"close" in value.lower().replace(b" ", b"").split(b",") for value in connection)


# --- answers ----------------------------------------------------------------------------------------------------------


class AnswerParser:
    """Bytes in, an answer out, however the bytes are cut. Pure; one answer after the other, with `reset` in between.

    limit_bytes: of the body. After Refused, and after an answer that is not keep_alive, there is nothing more to read.
    """

    __slots__ = (
        "_at",
        "_body",
        "_chunk_end",
        "_chunks",
        "_data",
        "_head",
        "_interim",
        "_known",
        "_limit",
        "_size",
        "_step",
        "begun",
    )

    chunks_limit = CHUNKS_LIMIT

    def __init__(self, limit_bytes: int = BODY_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._known: tuple[bytes, Head | None] = (b"", None)  # the last head: polls of one place mostly get it again
        self.reset()

    def reset(self) -> None:
        """Begin with the next answer."""
        self._data, self._at = b"", 0  # what is not read yet begins at _at
        self._head: Head | None = None
        self._body: list[bytes] = []
        self._size = self._chunks = self._chunk_end = self._interim = 0  # _chunk_end: a _size
        self._step: Callable[[AnswerParser], Answer | bool] = AnswerParser._read_head
        self.begun = False

    @property
    def surplus(self) -> bool:
        """Whether bytes came that are no part of the answer."""
        return self._at < len(self._data)

    def feed(self, data: bytes) -> Answer | None:
        """Take some bytes, and return the answer when it is complete. Raises Refused."""
        self.begun = self.begun or bool(data)
        self._data = self._data + data if self._data else data
        while True:
            found = self._step(self)
            if found is False:  # needs more than there is
                self._data, self._at = self._data[self._at :], 0
                return None
            if found is not True:
                return found

    def finish(self) -> Answer:
        """The connection has ended: return the answer if that is its end. Raises Refused."""
        if self._head is not None and self._head.framing is Framing.UNTIL_CLOSE:
            return self._answer()
        raise Refused(Reason.CLOSED, "the connection ended before the answer did")

    # Steps: an answer; True when there is another step to take; False when more bytes are needed.

    def _read_head(self) -> Answer | bool:
        data, at = self._data, self._at
        if not data.startswith(BEGINNING, at) and not BEGINNING.startswith(data[at : at + len(BEGINNING)]):
            raise Refused(Reason.MALFORMED, "not HTTP/1.1")
        end = self._block_end(END, at, HEAD_LIMIT_BYTES, "a head")
        if end < 0:
            return False
        self._at = end
        head = self._parsed(data[at:end])
        if head.status < 200:
            return self._pass_over(head)
        self._head, self._step = head, _STEPS[head.framing]
        return True

    def _block_end(self, mark: bytes, at: int, limit: int, what: str) -> int:
        """Where the block that ends with the mark ends, -1 if not yet. Refuses one that is, or gets, too large."""
        end = self._data.find(mark, at)
        if (end + len(mark) if end >= 0 else len(self._data)) - at > limit:
            raise Refused(Reason.TOO_LARGE, f"{what} of more than {limit} bytes")
        return end + len(mark) if end >= 0 else -1

    def _parsed(self, data: bytes) -> Head:
        known, head = self._known
        if head is None or data != known:
            head = parse_head(data)
            self._known = data, head
        return head

    def _pass_over(self, head: Head) -> bool:
        self._interim += 1
        if head.status == 101 or self._interim > INTERIM_LIMIT:
            raise Refused(Reason.MALFORMED, "an interim answer that nobody asked for")
        return True

    def _read_nothing(self) -> Answer | bool:
        return self._answer()

    def _read_sized(self) -> Answer | bool:
        assert self._head is not None
        length = self._head.length
        if length > self._limit:
            raise Refused(Reason.TOO_LARGE, f"a body of more than {self._limit} bytes")
        self._take(length - self._size)
        return self._answer() if self._size == length else False

    def _read_until_close(self) -> Answer | bool:
        self._admit(len(self._data) - self._at)
        self._take(len(self._data) - self._at)
        return False

    def _read_chunk_line(self) -> Answer | bool:
        at = self._at
        end = self._block_end(b"\r\n", at, CHUNK_LINE_LIMIT_BYTES, "the line of a chunk")
        if end < 0:
            return False
        found = CHUNK.fullmatch(self._data, at, end - 2)
        if found is None:
            raise Refused(Reason.MALFORMED, "not the line of a chunk")
        self._at, self._chunks = end, self._chunks + 1
        size = int(found[1], 16)
        self._admit(size)
        if self._chunks > self.chunks_limit:
            raise Refused(Reason.TOO_LARGE, f"more than {self.chunks_limit} chunks")
        self._chunk_end = self._size + size
        self._step = AnswerParser._read_chunk if size else AnswerParser._read_trailers
        return True

    def _read_chunk(self) -> Answer | bool:
        self._take(self._chunk_end - self._size)
        if self._size == self._chunk_end:
            self._step = AnswerParser._read_chunk_end
            return True
        return False

    def _read_chunk_end(self) -> Answer | bool:
        end = self._data[self._at : self._at + 2]
        if not b"\r\n".startswith(end):
            raise Refused(Reason.MALFORMED, "a chunk is longer than it says")
        if len(end) < 2:
            return False
        self._at += 2
        self._step = AnswerParser._read_chunk_line
        return True

    def _read_trailers(self) -> Answer | bool:
        """Trailers mean nothing to us, and are to be well formed all the same."""
        at = self._at
        empty = self._data.startswith(b"\r\n", at)
        end = at + 2 if empty else self._block_end(END, at, HEAD_LIMIT_BYTES, "trailers")
        if end < 0:
            return False
        if not TRAILERS.fullmatch(self._data, at, end):
            raise Refused(Reason.MALFORMED, "trailers that are no headers")
        self._at = end
        return self._answer()

    def _admit(self, size: int) -> None:
        if self._size + size > self._limit:
            raise Refused(Reason.TOO_LARGE, f"a body of more than {self._limit} bytes")

    def _take(self, size: int) -> None:
        """Move up to so many bytes to the body."""
        piece = self._data[self._at : self._at + size]
        self._at += len(piece)
        self._size += len(piece)
        self._body.append(piece)

    def _answer(self) -> Answer:
        head = self._head
        assert head is not None
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        return Answer(head.status, head.headers, body, head.keep_alive)


_STEPS: dict[Framing, Callable[[AnswerParser], Answer | bool]] = {
    Framing.NONE: AnswerParser._read_nothing,
    Framing.SIZED: AnswerParser._read_sized,
    Framing.CHUNKED: AnswerParser._read_chunk_line,
    Framing.UNTIL_CLOSE: AnswerParser._read_until_close,
}


# --- requests ---------------------------------------------------------------------------------------------------------

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
