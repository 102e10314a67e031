"""HTTP/1.1 of the http plane, as bytes: requests read, answers and request heads written. Pure: no socket, no clock.

A parser of our own: the library h11 takes 125 us for a request, more than all the rest of a call; this one takes
five. It reads less than a library would: a request that two parsers could read in two ways (RFC 9112, 11.2) is refused,
and so is whatever a caller of endpoints has no need of. Limits are checked before anything is kept (reliability, T16 to
T20): memory follows the bytes that came, never a claim.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

from rkmetrics.http_answer import HEADERS_LIMIT
from rkmetrics.http_body import END, FIELD, FIELDS, LENGTH_DIGITS, TOKEN, BodyParser
from rkmetrics.planes.http_base import Intake, Reply, Request, Speaker, path_of

__all__ = [
    "HEAD_LIMIT_BYTES",
    "BadRequestError",
    "Http1",
    "RequestParser",
    "encode_post",
    "encode_reply",
]


HEAD_LIMIT_BYTES = 64 * 1024
#: What a head that was read takes.
HEAD_BYTES = 512
#: Each chunk costs a step, however small it is; hyper, Dynamo's client, sends 8 KiB or more in one.
CHUNKS_LIMIT = 65_536

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# RFC 9112, 3: one space each, and a target without any.
HEAD = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])\r\n" + FIELDS)


class BadRequestError(Exception):
    """A request that is not taken, and after which nothing more can be read. status: what its sender gets."""

    def __init__(self, status: int, detail: str) -> None:
        self.status, self.detail = status, detail
        super().__init__(detail)


class _Head(NamedTuple):
    """A head. length: of the body, -1 for a chunked one; expects: to be told that the body may come."""

    method: str
    path: str
    traceparent: str
    origin: str
    keep_alive: bool
    length: int
    expects: bool

    def request(self, body: bytes) -> Request:
        return Request(self.method, self.path, self.traceparent, self.origin, body, self.keep_alive)


_SPECIAL = frozenset(
    {b"content-length", b"transfer-encoding", b"connection", b"host", b"expect", b"traceparent", b"origin"}
)
_NONE: list[bytes] = []


def _parse_head(data: bytes) -> _Head:
    """Read a head with its final empty line. Raises BadRequestError."""
    found = HEAD.fullmatch(data)
    if found is None:
        raise BadRequestError(400, "not the head of an HTTP/1.1 request")
    fields = FIELD.findall(found[4])
    if len(fields) > HEADERS_LIMIT:
        raise BadRequestError(431, f"more than {HEADERS_LIMIT} headers")
    special: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        if (name := name.lower()) in _SPECIAL:
            special.setdefault(name, []).append(value.strip(b" \t"))
    modern, hosts = found[3] == b"1", special.get(b"host", _NONE)
    if len(hosts) > 1 or (modern and not hosts):
        raise BadRequestError(400, "expected one Host header")
    return _Head(
        found[1].decode("ascii"),
        path_of(found[2].decode("ascii")),
        _only(special.get(b"traceparent", _NONE)),
        _only(special.get(b"origin", _NONE)),
        modern and not any(b"close" in value.lower() for value in special.get(b"connection", _NONE)),
        _length(special, modern=modern),
        modern and any(value.lower() == b"100-continue" for value in special.get(b"expect", _NONE)),
    )


def _only(values: list[bytes]) -> str:
    return values[0].decode("latin-1") if len(values) == 1 else ""


def _length(special: Mapping[bytes, list[bytes]], *, modern: bool) -> int:
    """How the end of the body is found (RFC 9112, 6.3): its length, or -1 where it comes in chunks."""
    lengths, codings = special.get(b"content-length", _NONE), special.get(b"transfer-encoding", _NONE)
    if codings:
        if lengths or not modern or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise BadRequestError(400, "a Transfer-Encoding that is not just chunked")
        return -1
    if not lengths:
        return 0
    if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > LENGTH_DIGITS:
        raise BadRequestError(400, "a Content-Length that is not one number")
    return int(lengths[0])


class RequestParser(BodyParser[Request]):
    """Bytes in, requests out, however the bytes are cut: `feed`, then `next` until that is None.

    limit_bytes: of a body. continues: a client waits to be told that its body may come; whoever tells it clears that.
    """

    __slots__ = ("_head", "_known", "continues")

    chunks_limit, head_limit_bytes = CHUNKS_LIMIT, HEAD_LIMIT_BYTES

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes, RequestParser._read_head)
        self._known: tuple[bytes, _Head | None] = (b"", None)  # the last head: a client mostly sends the same again
        self._begin()

    def _begin(self) -> None:
        self._head: _Head | None = None
        self._begin_body(RequestParser._read_head)
        self.continues = False

    @property
    def rest(self) -> int:
        """How many bytes of an incomplete request are there; 0 for none."""
        return len(self._data) - self._at + self._size + (HEAD_BYTES if self._head is not None else 0)

    @property
    def in_head(self) -> bool:
        """Whether the head is incomplete."""
        return self._head is None

    def feed(self, data: bytes) -> None:
        """Take some bytes."""
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0

    def next(self) -> Request | None:
        """Return a request that is complete. Raises BadRequestError; then nothing more is to be read."""
        while True:
            found = self._step(self)
            if found is False:
                return None
            if found is not True:
                self._begin()
                return found

    def _read_head(self) -> Request | bool:
        data, at = self._data, self._at
        if at == len(data):
            return False
        if not 65 <= data[at] <= 90:  # TLS, or anything else: not to be waited for
            raise BadRequestError(400, "not HTTP/1.1")
        end = self._block_end(END, at, HEAD_LIMIT_BYTES, "a head")
        if end < 0:
            return False
        head = self._parsed(data[at:end])
        if head.length > self._limit:
            raise BadRequestError(413, f"a body of {head.length} bytes is over the limit of {self._limit}")
        body_end = end + head.length
        if end <= body_end <= len(data):
            self._at = body_end
            return head.request(data[end:body_end])
        self._at, self._head, self.continues = end, head, head.expects
        self._step = RequestParser._read_chunk_line if head.length < 0 else RequestParser._read_sized
        return True

    def _parsed(self, data: bytes) -> _Head:
        known, head = self._known
        if head is None or data != known:
            head = _parse_head(data)
            self._known = data, head
        return head

    def _read_sized(self) -> Request | bool:
        assert self._head is not None
        self._take(self._head.length - self._size)
        return self._whole() if self._size == self._head.length else False

    def _malformed(self, detail: str) -> BadRequestError:
        return BadRequestError(400, detail)

    def _too_large(self, detail: str, *, body: bool) -> BadRequestError:
        return BadRequestError(413 if body else 431, detail)

    def _take(self, size: int) -> None:
        before = self._size
        super()._take(size)
        if self._size > before:
            self.continues = False

    def _whole(self) -> Request:
        assert self._head is not None
        return self._head.request(b"".join(self._body))


# --- answers ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def encode_reply(reply: Reply, second: int, *, keep_alive: bool) -> bytes:
    """Return an answer. second: of the wall clock, for its date."""
    body = reply.text.encode("utf-8", "replace")
    lines = [
        f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}",
        "content-type: text/plain; charset=utf-8",
        f"content-length: {len(body)}",
        *(f"{name}: {value}" for name, value in reply.headers),
        *(() if keep_alive else ("connection: close",)),
        f"date: {formatdate(second, usegmt=True)}",
    ]
    return "\r\n".join(lines).encode("ascii") + END + body


# --- a connection -----------------------------------------------------------------------------------------------------


class Http1(Speaker):
    """HTTP/1.1: each request is answered as soon as it is complete, so pipelining is in order without a queue."""

    def __init__(self, intake: Intake, now: float) -> None:
        self._intake, self._parser = intake, RequestParser(intake.limit_bytes)
        self.due, self._began = now + intake.patience.head_seconds, now

    @property
    def rest(self) -> int:
        return self._parser.rest

    def feed(self, data: bytes, now: float) -> bytes:
        parser, intake, out = self._parser, self._intake, list[bytes]()
        if not parser.rest:
            self._began = now
        parser.feed(data)
        try:
            while not self.over and (request := parser.next()) is not None:
                reply = intake.reply(request)
                self.over = not request.keep_alive or intake.draining
                out.append(self._encoded(reply))
                self._began = now
        except BadRequestError as error:
            out.append(self.give_up(error.status, error.detail))
        if parser.continues:
            out.append(CONTINUE)
            parser.continues = False
        patience = intake.patience
        if parser.rest:
            self.due = self._began + (patience.head_seconds if parser.in_head else patience.body_seconds)
        else:
            self.due = now + patience.idle_seconds
        return b"".join(out) if len(out) != 1 else out[0]

    def _encoded(self, reply: Reply) -> bytes:
        return encode_reply(reply, int(time.time()), keep_alive=not self.over)

    def expire(self, now: float) -> bytes:
        self.over = True
        if not self._parser.rest:
            return b""
        self._intake.too_slow(f"a request was not complete {now - self._began:.0f} s after it began")
        return self._encoded(Reply(408, "Too slow"))

    def give_up(self, status: int, detail: str) -> bytes:
        self.over = True
        return self._encoded(self._intake.refused(status, detail))

    def drain(self) -> bytes:
        return b""  # whoever sends another request hears of it with its answer

    def close(self) -> bytes:
        self.over = True
        return b""


# --- the other end ----------------------------------------------------------------------------------------------------


def encode_post(path: str, authority: str, length: int, traceparent: str = "") -> bytes:
    """Return the head of a request, in the order and form of Dynamo's client. Nothing of it is checked here."""
    trace = f"traceparent: {traceparent}\r\n" if traceparent else ""
    return (
        f"POST {path} HTTP/1.1\r\ncontent-type: application/octet-stream\r\n{trace}"
        f"accept: */*\r\nhost: {authority}\r\ncontent-length: {length}\r\n\r\n"
    ).encode("ascii")
