"""Bodies of HTTP/1.1, read from bytes that come in pieces: what the parsers of answers and of requests share. Pure.

A body is sized or chunked (RFC 9112, 6 and 7). Limits are checked before anything is stored, and whatever two parsers
could read in two ways is refused; how a refusal is called is for the parser to say.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["END", "FIELD", "FIELDS", "LENGTH_DIGITS", "TOKEN", "VALUE", "BodyParser"]

CHUNK_LINE_LIMIT_BYTES = 256
LENGTH_DIGITS = 18

END = b"\r\n\r\n"
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
VALUE = rb"[\t\x20-\x7e\x80-\xff]*"
FIELD = re.compile(rb"(" + TOKEN + rb"):(" + VALUE + rb")\r\n")  # RFC 9112, 5; no folding (5.2)
FIELDS = rb"((?:" + TOKEN + rb":" + VALUE + rb"\r\n)*)\r\n"
TRAILERS = re.compile(FIELDS)
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[\t ]*(?:;" + VALUE + rb")?")  # RFC 9112, 7.1; extensions mean nothing to us

Message = TypeVar("Message")


class BodyParser(ABC, Generic[Message]):
    """A parser but for heads. Steps are functions of it: they return a message; True when there is another step to
    take; False when more bytes are needed."""

    __slots__ = ("_at", "_body", "_chunk_end", "_chunks", "_data", "_limit", "_size", "_step")

    #: Each chunk costs a step, however small it is.
    chunks_limit: int
    head_limit_bytes: int

    def __init__(self, limit_bytes: int, first: Callable[[Any], Message | bool]) -> None:
        self._limit = limit_bytes
        self._data, self._at = b"", 0  # what is not read yet begins at _at
        self._begin_body(first)

    def _begin_body(self, first: Callable[[Any], Message | bool]) -> None:
        """Forget the last message's body, and begin with that step."""
        self._body: list[bytes] = []
        self._size = self._chunks = self._chunk_end = 0  # _chunk_end: a _size
        self._step = first

    @abstractmethod
    def _malformed(self, detail: str) -> Exception:
        """What is raised for what is no HTTP/1.1."""

    @abstractmethod
    def _too_large(self, detail: str, *, body: bool) -> Exception:
        """What is raised for a body past its limit, or for a head or a line."""

    @abstractmethod
    def _whole(self) -> Message:
        """The message, whose body is complete."""

    def _block_end(self, mark: bytes, at: int, limit: int, what: str) -> int:
        """Where the block that ends with the mark ends, -1 if not yet. Refuses one that is, or gets, too large."""
        end = self._data.find(mark, at, at + limit)
        if end < 0 and len(self._data) - at >= limit:
            raise self._too_large(f"{what} of more than {limit} bytes", body=False)
        return end + len(mark) if end >= 0 else -1

    def _read_chunk_line(self) -> Message | bool:
        at = self._at
        end = self._block_end(b"\r\n", at, CHUNK_LINE_LIMIT_BYTES, "the line of a chunk")
        if end < 0:
            return False
        found = CHUNK.fullmatch(self._data, at, end - 2)
        if found is None:
            raise self._malformed("not the line of a chunk")
        self._at, self._chunks = end, self._chunks + 1
        size = int(found[1], 16)
        self._admit(size)
        if self._chunks > self.chunks_limit:
            raise self._too_large(f"more than {self.chunks_limit} chunks", body=True)
        self._chunk_end = self._size + size
        self._step = type(self)._read_chunk if size else type(self)._read_trailers
        return True

    def _read_chunk(self) -> Message | bool:
        self._take(self._chunk_end - self._size)
        if self._size < self._chunk_end:
            return False
        self._step = type(self)._read_chunk_end
        return True

    def _read_chunk_end(self) -> Message | bool:
        end = self._data[self._at : self._at + 2]
        if not b"\r\n".startswith(end):
            raise self._malformed("a chunk is longer than it says")
        if len(end) < 2:
            return False
        self._at += 2
        self._step = type(self)._read_chunk_line
        return True

    def _read_trailers(self) -> Message | bool:
        """Trailers mean nothing to us, and are to be well formed all the same."""
        at = self._at
        empty = self._data.startswith(b"\r\n", at)
        end = at + 2 if empty else self._block_end(END, at, self.head_limit_bytes, "trailers")
        if end < 0:
            return False
        if not TRAILERS.fullmatch(self._data, at, end):
            raise self._malformed("trailers that are no headers")
        self._at = end
        return self._whole()

    def _admit(self, size: int) -> None:
        if self._size + size > self._limit:
            raise self._too_large(f"a body of more than {self._limit} bytes", body=True)

    def _take(self, size: int) -> None:
        """Move up to so many bytes to the body."""
        piece = self._data[self._at : self._at + size]
        self._at += len(piece)
        self._size += len(piece)
        self._body.append(piece)
