"""Answers of HTTP/1.1 as values, read from bytes that come in pieces. Pure: no socket, no clock.

Peers are not trusted (reliability, T14, T17, T19): limits are checked before anything is stored, no content coding is
taken, and whatever two parsers could read in two ways is refused. What a peer sent is in no error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import NamedTuple

from rkmetrics.http_body import END, FIELD, FIELDS, LENGTH_DIGITS, VALUE, BodyParser

__all__ = [
    "BODY_LIMIT_BYTES",
    "HEAD_LIMIT_BYTES",
    "Answer",
    "AnswerParser",
    "Framing",
    "Head",
    "Headers",
    "Reason",
    "Refused",
    "parse_head",
]

Headers = Iterable[tuple[bytes, bytes]]

HEAD_LIMIT_BYTES = 16_384
BODY_LIMIT_BYTES = 65_536
HEADERS_LIMIT = 100
INTERIM_LIMIT = 4  # answers of 1xx before the one that counts
CHUNKS_LIMIT = 4_096  # each costs us a step, however small it is

BEGINNING = b"HTTP/1."
# RFC 9112, 4. The space after the code is left out by some who send no phrase.
HEAD = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: " + VALUE + rb")?\r\n" + FIELDS)


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


class AnswerParser(BodyParser[Answer]):
    """Bytes in, an answer out, however the bytes are cut. Pure; one answer after the other, with `reset` in between.

    limit_bytes: of the body. After Refused, and after an answer that is not keep_alive, there is nothing more to read.
    """

    __slots__ = ("_head", "_interim", "_known", "begun")

    chunks_limit, head_limit_bytes = CHUNKS_LIMIT, HEAD_LIMIT_BYTES

    def __init__(self, limit_bytes: int = BODY_LIMIT_BYTES) -> None:
        super().__init__(limit_bytes, AnswerParser._read_head)
        self._known: tuple[bytes, Head | None] = (b"", None)  # the last head: polls of one place mostly get it again
        self.reset()

    def reset(self) -> None:
        """Begin with the next answer."""
        self._data, self._at = b"", 0
        self._head: Head | None = None
        self._begin_body(AnswerParser._read_head)
        self._interim = 0
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
            return self._whole()
        raise Refused(Reason.CLOSED, "the connection ended before the answer did")

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
        return self._whole()

    def _read_sized(self) -> Answer | bool:
        assert self._head is not None
        length = self._head.length
        if length > self._limit:
            raise Refused(Reason.TOO_LARGE, f"a body of more than {self._limit} bytes")
        self._take(length - self._size)
        return self._whole() if self._size == length else False

    def _read_until_close(self) -> Answer | bool:
        self._admit(len(self._data) - self._at)
        self._take(len(self._data) - self._at)
        return False

    def _malformed(self, detail: str) -> Refused:
        return Refused(Reason.MALFORMED, detail)

    def _too_large(self, detail: str, *, body: bool) -> Refused:
        return Refused(Reason.TOO_LARGE, detail)

    def _whole(self) -> Answer:
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
