"""Frames of Dynamo's request planes, as bytes. Pure: no socket, no clock.

Two parts, in each direction and over each plane (releases 0.6 to 1.0):

    0   u64   length of the header
    8   u64   length of the body
    16  u64   a checksum; 0 in the released runtimes, and whoever reads it takes any
    24  header, body

A request over tcp is one of these in an envelope, which differs between releases and is told apart by its path, as only
the newer has a '/' in it; an acknowledgement is a length and that many bytes of text, none where all is well:

    0.7     u16 length | path | u32 length | two parts
    0.8+    u16 length | path | u16 length | headers (JSON) | u32 length | two parts

All numbers are big-endian. A length is compared with its limit before anything is kept for it, so memory follows the
bytes that came and never what a peer claims (reliability, T20).
"""

from __future__ import annotations

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
    "read_two_part",
]

#: Of the header of two parts, of headers and of a path; real ones take a few hundred bytes.
HEADER_LIMIT_BYTES = 64 * 1024
PATH_LIMIT_BYTES = 1_024
ACK_LIMIT_BYTES = 64 * 1024

_TWO_PART = Struct(">QQQ")
_SHORT = Struct(">H")
_LONG = Struct(">I")


class FrameTooLargeError(PayloadError):
    """A length is over its limit; nothing was kept for it."""


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


class _Reader:
    """Bytes in, frames out. What is incomplete is kept; `rest` is how much."""

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

    def feed(self, data: bytes) -> list[TwoPart]:
        """Return the frames that are complete. Raises PayloadError for one that can never be; then nothing more is
        to be read."""
        data, at, found = self._join(data), 0, list[TwoPart]()
        while len(data) - at >= _TWO_PART.size:
            header, body, _ = _TWO_PART.unpack_from(data, at)
            if header > HEADER_LIMIT_BYTES or header + body > self._limit:
                raise FrameTooLargeError("a two-part message", data[at:], f"{header} + {body} bytes are over the limit")
            begin = at + _TWO_PART.size
            end = begin + header + body
            if end > len(data):
                self._keep(data, at, end - at)
                return found
            found.append(TwoPart(data[begin : begin + header], data[begin + header : end]))
            at = end
        if at < len(data):
            self._keep(data, at, _TWO_PART.size)
        return found


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

    def feed(self, data: bytes) -> list[TcpRequest]:
        """Return the requests that are complete. Raises PayloadError for one that can never be."""
        data, at, found = self._join(data), 0, list[TcpRequest]()
        while at < len(data):
            request, end = self._one(data, at)
            if request is None:
                self._keep(data, at, end - at)
                break
            found.append(request)
            at = end
        return found

    def _one(self, data: bytes, begin: int) -> tuple[TcpRequest | None, int]:
        """A request and where it ends, or None and how far there must be data."""
        at, have = begin + _SHORT.size, len(data)
        if at > have:
            return None, at
        path_end = at + _SHORT.unpack_from(data, begin)[0]
        if not 0 < path_end - at <= PATH_LIMIT_BYTES:
            raise PayloadError("a request", data[begin:], "its path is empty or too long")
        if path_end > have:
            return None, path_end
        raw = data[at:path_end]
        if not raw.isascii():
            raise PayloadError("a request", data[begin:], "its path is not ASCII")
        at, headers = path_end, None
        if b"/" in raw:
            if at + _SHORT.size > have:
                return None, at + _SHORT.size
            headers_at = at + _SHORT.size
            at = headers_at + _SHORT.unpack_from(data, at)[0]
            if at > have:
                return None, at
            headers = data[headers_at:at]
        if at + _LONG.size > have:
            return None, at + _LONG.size
        size = _LONG.unpack_from(data, at)[0]
        if size > self._limit:
            raise FrameTooLargeError("a request", data[begin:], f"{size} bytes are over the limit of {self._limit}")
        at += _LONG.size
        if at + size > have:
            return None, at + size
        return TcpRequest(raw.decode("ascii"), headers, data[at : at + size]), at + size


#: The acknowledgement of a request that is taken.
ACCEPTED = _LONG.pack(0)


def encode_ack(reason: str = "") -> bytes:
    """Return an acknowledgement; with a reason, of a request that is not taken."""
    text = reason.encode("utf-8", "replace")[:ACK_LIMIT_BYTES]
    return _LONG.pack(len(text)) + text


class AckReader(_Reader):
    """Reads a stream of acknowledgements."""

    def feed(self, data: bytes) -> list[str]:
        """Return the reasons, "" for what was taken. Raises PayloadError."""
        data, at, found = self._join(data), 0, list[str]()
        while len(data) - at >= _LONG.size:
            size = _LONG.unpack_from(data, at)[0]
            if size > ACK_LIMIT_BYTES:
                raise PayloadError("an acknowledgement", data[at:], f"{size} bytes are over the limit")
            end = at + _LONG.size + size
            if end > len(data):
                self._keep(data, at, end - at)
                return found
            found.append(data[at + _LONG.size : end].decode("utf-8", "replace"))
            at = end
        if at < len(data):
            self._keep(data, at, _LONG.size)
        return found
