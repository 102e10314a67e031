"""Frames of Dynamo's request planes, as bytes. Pure: no socket, no clock.

Two parts, in each direction and over each plane (releases 0.6 to 1.0):

    0   u64   length of the header
    8   u64   length of the body
    16  u64   a checksum; 0 in the released runtimes, and whoever reads it takes any
    24  header, body

A request over tcp is one of these in an envelope, which differs between releases; an acknowledgement is a length and
that many bytes of text, none where all is well:

    0.7     u16 length | path | u32 length | two parts
    0.8+    u16 length | path | u16 length | headers (JSON) | u32 length | two parts

The newer lists itself with a '/' in its path, but a client of either release sends its own envelope with whatever path
is listed, and real servers then wait for ever. So it is the lengths that tell: where that of the payload is what its
two parts need, there are no headers. Otherwise there are, where the path has a '/' or what follows begins as JSON.

All numbers are big-endian. A length is compared with its limit before anything is kept for it, so memory follows the
bytes that came and never what a peer claims (reliability, T20).
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from rkmetrics.errors import PayloadError

__all__ = [
    "ACCEPTED",
    "AckReader",
    "FrameTooLargeError",
    "RequestReader",
    "TcpRequest",
    "TwoPart",
    "TwoPartReader",
    "encode_ack",
    "encode_request",
    "encode_two_part",
    "read_header",
    "read_two_part",
]

#: Of the header of two parts, of headers and of a path; real ones take a few hundred bytes.
HEADER_LIMIT_BYTES = 64 * 1024
PATH_LIMIT_BYTES = 1_024
ACK_LIMIT_BYTES = 64 * 1024

_TWO_PART = Struct(">QQQ")
_PLAIN = Struct(">IQQ")  # of an envelope without headers: the payload's length, and the first two of the two parts
_SHORT = Struct(">H")
_LONG = Struct(">I")


class FrameTooLargeError(PayloadError):
    """A length is over its limit; nothing was kept for it. begin: what came of a request's payload."""

    begin = b""


class TwoPart(NamedTuple):
    """A header and a body, either of which may be empty."""

    header: bytes
    body: bytes


def encode_two_part(header: bytes, body: bytes = b"") -> bytes:
    """Return a frame."""
    return _TWO_PART.pack(len(header), len(body), 0) + header + body


def read_two_part(data: bytes) -> TwoPart:
    """Read a frame; bytes after it are left alone, as real workers do. Raises PayloadError."""
    if len(data) < _TWO_PART.size:
        raise PayloadError("a two-part message", data, f"expected {_TWO_PART.size} bytes or more")
    header, body, _ = _TWO_PART.unpack_from(data)
    if _TWO_PART.size + header + body > len(data):
        raise PayloadError("a two-part message", data, f"it says that it has {header} + {body} bytes")
    begin = _TWO_PART.size + header
    return TwoPart(data[_TWO_PART.size : begin], data[begin : begin + body])


def read_header(data: bytes) -> bytes:
    """Read only the header of a frame, whose body need not be there. Raises PayloadError."""
    if len(data) < _TWO_PART.size:
        raise PayloadError("a two-part message", data, f"expected {_TWO_PART.size} bytes or more")
    end = _TWO_PART.size + int(_TWO_PART.unpack_from(data)[0])
    if end > len(data):
        raise PayloadError("a two-part message", data, "its header is not whole")
    return data[_TWO_PART.size : end]


class _Reader:
    """Bytes in, frames out. What is incomplete is kept; `rest` is how much.

    `feed` is a generator: however the bytes were cut on their way, all frames come that are whole, and only then the
    error of one that can never be; after that nothing more is to be fed.
    """

    def __init__(self) -> None:
        self._kept = bytearray()
        self._needed = 0  # nothing can be complete before there is so much

    @property
    def rest(self) -> int:
        """How many bytes of an incomplete frame are there."""
        return len(self._kept)

    def _join(self, data: bytes) -> bytes:
        """All there is, or nothing where it cannot be a frame yet."""
        if not self._kept:
            return data
        self._kept += data
        if len(self._kept) < self._needed:
            return b""
        joined = bytes(self._kept)
        self._kept.clear()
        return joined

    def _keep(self, data: bytes, at: int, needed: int) -> None:
        self._needed = needed
        self._kept += memoryview(data)[at:]


class TwoPartReader(_Reader):
    """Reads a stream of two-part frames. limit_bytes: of header and body together."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self._limit = limit_bytes

    def feed(self, data: bytes) -> Iterator[TwoPart]:
        """Yield the frames that are complete. Raises PayloadError for one that can never be."""
        data, at = self._join(data), 0
        have, size, unpack = len(data), _TWO_PART.size, _TWO_PART.unpack_from
        while have - at >= size:
            header, body, _ = unpack(data, at)
            if header > HEADER_LIMIT_BYTES or header + body > self._limit:
                raise FrameTooLargeError("a two-part message", data[at:], f"{header} + {body} bytes are over the limit")
            begin = at + size
            middle = begin + header
            end = middle + body
            if end > have:
                self._keep(data, at, end - at)
                return
            yield TwoPart(data[begin:middle], data[middle:end])
            at = end
        if at < have:
            self._keep(data, at, size)


# --- requests over tcp ------------------------------------------------------------------------------------------------


class TcpRequest(NamedTuple):
    """A request as it comes over tcp. headers: JSON; None in the form of 0.7, which has none. payload: two parts."""

    path: str
    headers: bytes | None
    payload: bytes


def encode_request(request: TcpRequest) -> bytes:
    """Return the envelope, in the form that has headers or the one that has none."""
    path = request.path.encode()
    head = _SHORT.pack(len(path)) + path
    if request.headers is not None:
        head += _SHORT.pack(len(request.headers)) + request.headers
    return head + _LONG.pack(len(request.payload)) + request.payload


class RequestReader(_Reader):
    """Reads a stream of requests, in both forms. limit_bytes: of a payload."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self._limit = limit_bytes

    def feed(self, data: bytes) -> Iterator[TcpRequest]:
        """Yield the requests that are complete. Raises PayloadError for one that can never be."""
        data, at = self._join(data), 0
        while at < len(data):
            request, end = self._one(data, at)
            if request is None:
                self._keep(data, at, end - at)
                return
            yield request
            at = end

    def _one(self, data: bytes, begin: int) -> tuple[TcpRequest | None, int]:
        """A request and where it ends, or None and how far there must be data."""
        at, have = begin + _SHORT.size, len(data)
        if at > have:
            return None, at
        path_end = at + _SHORT.unpack_from(data, begin)[0]
        if not 0 < path_end - at <= PATH_LIMIT_BYTES:
            raise PayloadError("a request", data[begin:], "its path is empty or too long")
        sure_at = path_end + _PLAIN.size  # a request that is whole has more, in either form
        if sure_at > have:
            return None, sure_at
        raw = data[at:path_end]
        if not raw.isascii():
            raise PayloadError("a request", data[begin:], "its path is not ASCII")
        at, headers = path_end, None
        if _has_headers(data, path_end, b"/" in raw):
            headers_at = path_end + _SHORT.size
            at = headers_at + _SHORT.unpack_from(data, path_end)[0]
            if at + _LONG.size > have:
                return None, at + _LONG.size
            headers = data[headers_at:at]
        size = _LONG.unpack_from(data, at)[0]
        at += _LONG.size
        if size > self._limit:
            error = FrameTooLargeError("a request", data[begin:], f"{size} bytes are over the limit of {self._limit}")
            error.begin = data[at : at + _TWO_PART.size + HEADER_LIMIT_BYTES]
            raise error
        end = at + size
        if end > have:
            return None, end
        return TcpRequest(raw.decode("ascii"), headers, data[at:end]), end


def _has_headers(data: bytes, at: int, slash: bool) -> bool:
    """Whether an envelope has headers. at: where its path ends; slash: whether that has one."""
    size, header, body = _PLAIN.unpack_from(data, at)
    return size != _TWO_PART.size + header + body and (slash or data[at + _SHORT.size] == ord("{"))


#: The acknowledgement of a request that is taken.
ACCEPTED = _LONG.pack(0)


def encode_ack(reason: str = "") -> bytes:
    """Return an acknowledgement; with a reason, of a request that is not taken."""
    text = reason.encode("utf-8", "replace")[:ACK_LIMIT_BYTES]
    return _LONG.pack(len(text)) + text


class AckReader(_Reader):
    """Reads a stream of acknowledgements."""

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield the reasons, "" for what was taken. Raises PayloadError."""
        data, at = self._join(data), 0
        while len(data) - at >= _LONG.size:
            size = _LONG.unpack_from(data, at)[0]
            if size > ACK_LIMIT_BYTES:
                raise PayloadError("an acknowledgement", data[at:], f"{size} bytes are over the limit")
            end = at + _LONG.size + size
            if end > len(data):
                self._keep(data, at, end - at)
                return
            yield data[at + _LONG.size : end].decode("utf-8", "replace")
            at = end
        if at < len(data):
            self._keep(data, at, _LONG.size)
