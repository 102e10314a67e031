"""What an HTTP/2 peer may send, seen from the heads of its frames. Pure: no socket, no clock of its own.

The library h2 knows the protocol and keeps none of the promises that a server of strangers has to (reliability, T18):
what a peer may make it do without asking for anything is limited here. `Frames` sees the head of each frame before h2
sees any of it, and counts what only makes work: resets, settings, pings, empty data, window updates, unknown frames; a
header block is measured while it comes. Resets that are sent to a peer count as well, as it can provoke them
(CVE-2025-8671). Over a limit the connection ends with GOAWAY (ENHANCE_YOUR_CALM).
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import NamedTuple

__all__ = ["HEADER_BLOCK_BYTES", "LEAVING", "LIMITS", "WINDOW_SECONDS", "FloodError", "FrameError", "Frames", "Goaway"]

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 0x1, 0x4
PROTOCOL_ERROR, FRAME_SIZE_ERROR, ENHANCE_YOUR_CALM = 0x1, 0x6, 0xB

WINDOW_SECONDS = 10.0
#: Frames of a kind within WINDOW_SECONDS on one connection. Honest peers of ours send none of them for a request.
LIMITS: Mapping[int, int] = {
    DATA: 5_000,  # small ones that do not end a stream
    PRIORITY: 500,
    RST_STREAM: 500,  # of both ends
    SETTINGS: 50,
    PING: 200,
    GOAWAY: 10,
    WINDOW_UPDATE: 2_000,
    CONTINUATION: 500,
}
OTHER_LIMIT = 200  # of frames that nobody knows
EMPTY_LIMIT = 100  # of DATA without any, which does not even move a window
SMALL_DATA_BYTES = 128
HEADER_BLOCK_BYTES = 64 * 1024
CONTINUATIONS = 16  # of one header block
GOAWAY_BYTES = 16 * 1024

_GOAWAY = Struct(">II")
#: "I take no more, and go on with what I have": no stream is named as the last (RFC 9113, 6.8).
LEAVING = b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + _GOAWAY.pack(2**31 - 1, 0)


class FrameError(Exception):
    """A peer sends what ends its connection. code: the error (RFC 9113, 7) that it is told."""

    def __init__(self, detail: str, code: int) -> None:
        self.code = code
        super().__init__(detail)


class FloodError(FrameError):
    """A peer sends what only makes work."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, ENHANCE_YOUR_CALM)


class Goaway(NamedTuple):
    """The other end takes no more streams, and looks at none after the last."""

    last: int
    code: int


class Frames:
    """Sees the heads of frames. limit_bytes: of one; preface: how many bytes come before the first one.

    The size of a frame is looked at before it is kept: h2 does so when all of it is there, which may be 16 MiB.
    """

    def __init__(self, limit_bytes: int, preface: int = 0) -> None:
        self._limit, self._begun = limit_bytes, False
        self._head = b""  # of a frame, incomplete
        self._kind, self._left, self._length = -1, preface, preface
        self._block = self._continuations = 0
        self._payload = bytearray()
        self._counts: dict[int, int] = {}
        self._until = 0.0
        self.goaway: Goaway | None = None

    @property
    def rest(self) -> int:
        """How many bytes of an incomplete frame were there."""
        return len(self._head) + (self._length - self._left if self._left else 0)

    @property
    def in_block(self) -> bool:
        """Whether a header block is incomplete."""
        return bool(self._block) or bool(self._head) or (bool(self._left) and self._kind != DATA)

    def feed(self, data: bytes, now: float) -> bytes:
        """Look at some bytes. Returns those of them that are for h2. Raises FrameError."""
        if now >= self._until:
            self._counts.clear()
            self._until = now + WINDOW_SECONDS
        data, self._head = self._head + data, b""
        at, begin, out = 0, 0, list[bytes]()
        while at < len(data):
            if self._left:
                at = self._pass(data, at)
                if self._kind == GOAWAY:
                    begin = at
                continue
            if len(data) - at < 9:
                self._head = data[at:]
                out.append(data[begin:at])
                return b"".join(out)
            self._enter(data, at)
            if self._kind == GOAWAY:
                out.append(data[begin:at])
                begin = at + 9
            at += 9
        if begin == 0 and not out:
            return data
        out.append(data[begin:])
        return b"".join(out)

    def _pass(self, data: bytes, at: int) -> int:
        """Go over the payload of a frame."""
        end = min(at + self._left, len(data))
        self._left -= end - at
        if self._kind == GOAWAY:
            self._payload += data[at:end]
            if not self._left:
                self.goaway = Goaway(*_GOAWAY.unpack_from(self._payload))
        return end

    def _enter(self, data: bytes, at: int) -> None:
        """A frame begins."""
        self._length = self._left = int.from_bytes(data[at : at + 3], "big")
        self._kind, flags = data[at + 3], data[at + 4]
        length, kind = self._length, self._kind
        if length > self._limit:
            raise FrameError(f"a frame of {length} bytes is over the limit of {self._limit}", FRAME_SIZE_ERROR)
        if not self._begun and kind != SETTINGS:  # RFC 9113, 3.4: HTTP/1.1, as a rule
            raise FrameError("its first frame is no SETTINGS", PROTOCOL_ERROR)
        self._begun = True
        if kind in (HEADERS, CONTINUATION, PUSH_PROMISE):
            self._measure(length, flags)
        if kind == GOAWAY:
            if not _GOAWAY.size <= length <= GOAWAY_BYTES:
                raise FloodError("a GOAWAY of a size that none has")
            self._payload.clear()
        if kind == DATA:
            if length <= SMALL_DATA_BYTES and not flags & END_STREAM:
                self.count(DATA, LIMITS[DATA])
                if not length:
                    self.count(-1, EMPTY_LIMIT)
        elif kind != HEADERS:
            self.count(kind, LIMITS.get(kind, OTHER_LIMIT))

    def _measure(self, length: int, flags: int) -> None:
        self._continuations = self._continuations + 1 if self._kind == CONTINUATION else 0
        self._block += length + 1
        if self._block > HEADER_BLOCK_BYTES or self._continuations > CONTINUATIONS:
            raise FloodError(f"headers of more than {HEADER_BLOCK_BYTES} bytes or {CONTINUATIONS} continuations")
        if flags & END_HEADERS:
            self._block = 0

    def count(self, kind: int, limit: int) -> None:
        """Count a frame."""
        counted = self._counts[kind] = self._counts.get(kind, 0) + 1
        if counted > limit:
            raise FloodError(f"more than {limit} frames of type {kind} in {WINDOW_SECONDS:g} s")

    def sent(self, out: bytes) -> None:
        """Look at what is sent: a reset is work as well, whoever sends it."""
        at = 0
        while at + 9 <= len(out):
            if out[at + 3] == RST_STREAM:
                self.count(RST_STREAM, LIMITS[RST_STREAM])
            at += 9 + int.from_bytes(out[at : at + 3], "big")
