"""An answer that has no end, read while it comes: what a watch is made of.

The parser, the connection and the limits on heads are those of `rkmetrics.fetch`; here the body is handed on instead of
kept. Who reads slowly makes the peer wait: past HELD_BYTES the socket is not read any more.
"""

from __future__ import annotations

import asyncio
import ssl as tls
import sys
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rkmetrics.errors import FetchError
from rkmetrics.fetch import Channel, Endpoint, Failure, request_head
from rkmetrics.http_answer import Answer, AnswerParser, Headers

__all__ = ["HELD_BYTES", "LineCutter", "PieceParser", "Stream"]

HELD_BYTES = 262_144


class PieceParser(AnswerParser):
    """The parser for an answer of any length: gives the body away, with its status, piece by piece."""

    __slots__ = ("_give",)

    chunks_limit = sys.maxsize

    def __init__(self, give: Callable[[int, bytes], None]) -> None:
        self._give = give
        super().__init__(sys.maxsize)

    def _take(self, size: int) -> None:
        super()._take(size)
        piece = self._body.pop()
        assert self._head is not None
        if piece:
            self._give(self._head.status, piece)


class Stream:
    """One request whose answer is read while it comes. `async with` it, then `read()` until b"".

    status: of the answer, 0 until the first piece (or the end) is there.
    """

    def __init__(
        self,
        method: str,
        url: str,
        *,
        body: bytes | None = None,
        headers: Headers = (),
        ssl: tls.SSLContext | None = None,
    ) -> None:
        endpoint = Endpoint.parse(url)
        length = None if body is None else len(body)
        head = request_head(endpoint, (*headers, (b"connection", b"close")), method=method, length=length)
        self._request = head + (body or b"")
        self._method, self._shown = method, endpoint.shown
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._failure: Failure | None = None
        self._ended = False
        self._news = asyncio.Event()
        self._channel = Channel(endpoint, self._answered, self._failed, ssl=ssl, parser=PieceParser(self._taken))
        self.status = 0

    async def __aenter__(self) -> Self:
        self._channel.request(self._request)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opening = self._channel.close()
        if opening is not None:
            await asyncio.gather(opening, return_exceptions=True)
        await asyncio.sleep(0)  # the socket closes in the next turn of the loop

    async def read(self) -> bytes:
        """Return the next piece; b"" at the end. Raises FetchError. It waits without a limit of its own."""
        while not self._pieces and not self._ended:
            self._news.clear()
            await self._news.wait()
        if self._pieces:
            return self._next()
        if self._failure is not None:
            raise FetchError(self._shown, self._failure.reason, self._failure.detail, method=self._method)
        return b""

    def _next(self) -> bytes:
        piece = self._pieces.popleft()
        before, self._held = self._held, self._held - len(piece)
        if before > HELD_BYTES >= self._held:
            self._channel.hold(False)
        return piece

    def _taken(self, status: int, piece: bytes) -> None:
        self.status = status
        self._pieces.append(piece)
        before, self._held = self._held, self._held + len(piece)
        if before <= HELD_BYTES < self._held:
            self._channel.hold(True)
        self._news.set()

    def _answered(self, answer: Answer) -> None:
        self.status, self._ended = answer.status, True
        self._news.set()

    def _failed(self, failure: Failure) -> None:
        self._failure, self._ended = failure, True
        self._news.set()


class LineCutter:
    """Cuts pieces into lines. Pure."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._parts, self._size = limit_bytes, list[bytes](), 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the lines that are complete now, without their ends. Raises ValueError for one that is too long."""
        first, *rest = piece.split(b"\n")
        self._add(first)
        lines: list[bytes] = []
        for part in rest:
            lines.append(b"".join(self._parts))
            self._parts, self._size = [], 0
            self._add(part)
        return lines

    def finish(self) -> bytes:
        """Return what came after the last line."""
        rest, self._parts, self._size = b"".join(self._parts), [], 0
        return rest

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._limit:
            raise ValueError(f"a line of more than {self._limit} bytes")
        if part:
            self._parts.append(part)
