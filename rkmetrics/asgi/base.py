"""Requests, answers and rows of the route table as values. Pure: no socket, no event loop, no framework.

Bytes stay bytes: a header is what came over the wire, so that no byte of it can fail to decode (reliability, T4).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar
from urllib.parse import unquote_to_bytes

from rkmetrics.catalogue.exporter import Route as RouteName

__all__ = [
    "COMMON_HEADERS",
    "Guard",
    "Headers",
    "Later",
    "Request",
    "Response",
    "Route",
    "is_exact",
    "json_response",
    "text_response",
]

Headers = tuple[tuple[bytes, bytes], ...]
Surface = TypeVar("Surface")

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"

# On every answer. No cache keeps what a token opened, and no cache mixes up what differs by these headers (T11). There
# is no CORS header, on purpose: no page of another origin reads metrics.
COMMON_HEADERS: Headers = (
    (b"cache-control", b"no-store"),
    (b"vary", b"Accept, Accept-Encoding, Authorization"),
    (b"x-content-type-options", b"nosniff"),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One request. path: decoded, relative to where the routes are mounted; query: raw, without "?".

    body: only where the route reads one. client: the other end of the connection, an IP address; None where the server
    does not say. No header is asked for it (T9).
    """

    method: str
    path: str
    query: bytes = field(default=b"", repr=False)  # clients put credentials there too
    headers: Headers = field(default=(), repr=False)
    body: bytes = field(default=b"", repr=False)
    client: str | None = field(default=None, repr=False)

    def values(self, name: bytes) -> list[bytes]:
        """Return the value of every header of that (lower-case) name, without the white space around it.

        RFC 9110, 5.5: "A field value does not include leading or trailing whitespace".
        """
        return [value.strip(b" \t") for key, value in self.headers if key.lower() == name]

    def combined(self, name: bytes) -> bytes | None:
        """Return the value of a list header, its lines joined by commas (RFC 9110, 5.3); None without such a header."""
        values = self.values(name)
        return b", ".join(values) if values else None

    def fields(self) -> list[tuple[bytes, bytes]]:
        """Return names and values of the query, percent-decoded; bytes that decode to nothing stay as they are."""
        pairs = (part.partition(b"=") for part in self.query.split(b"&") if part)
        return [(_unquote(name), _unquote(value)) for name, _, value in pairs]


def _unquote(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" "))


@dataclass(frozen=True, slots=True)
class Response:
    """One answer, complete; who sends it leaves the body out for HEAD."""

    status: int
    body: bytes
    content_type: str = TEXT
    headers: Headers = ()

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """Return all headers, names in lower case, with the length of the body.

        304 has no body, and says nothing of the one that there would be (RFC 9110, 15.4.5).
        """
        if self.status == 304:
            return [*COMMON_HEADERS, *self.headers]
        return [
            (b"content-type", self.content_type.encode("latin-1")),
            (b"content-length", b"%d" % len(self.body)),
            *COMMON_HEADERS,
            *self.headers,
        ]


@dataclass(frozen=True, slots=True)
class Later:
    """An answer that takes time: who speaks HTTP decides where it may wait.

    run: waits, so not for an event loop. arun: the same for an event loop, which it does not hold up.
    """

    run: Callable[[], Response]
    arun: Callable[[], Awaitable[Response]]


class Guard(Protocol):
    """What stands before gated routes: `auth.Gate`, or one that knows more about its server."""

    def refuse(self, request: Request) -> Response | None:
        """Return the answer to a request that may not pass; None for one that may."""


@dataclass(frozen=True, slots=True)
class Route(Generic[Surface]):
    """One row of the route table.

    path: "{id}" as its last part, or as the one before, stands for any one part. name: the `route` label. gated: it
    shows metrics, so a token is asked for. guard: stands before this route instead of the gate. body_limit_bytes: it
    reads a body, of at most so many bytes; it is read once path, guard and method have let the request pass.
    """

    path: str
    name: RouteName
    answer: Callable[[Surface, Request], Response | Later]
    gated: bool
    methods: tuple[str, ...] = ("GET", "HEAD")
    guard: Guard | None = None
    body_limit_bytes: int = 0


def is_exact(path: str, raw_path: bytes | None) -> bool:
    """Whether the client wrote the path as it stands: not with %-escapes, and no server mended it on the way (T7).

    raw_path: what came over the wire, None where a server does not say. One that does not decode to the path, because
    something in between rewrote it, is not held against it.
    """
    if raw_path is None:
        return True
    raw = raw_path.partition(b"?")[0]
    return raw.endswith(path.encode("utf-8", "replace")) or not _unquote_path(raw).rstrip("/").endswith(
        path.rstrip("/")
    )


def _unquote_path(raw: bytes) -> str:
    return unquote_to_bytes(raw).decode("utf-8", "replace")


def text_response(status: int, text: str, headers: Headers = ()) -> Response:
    """Return a plain text answer."""
    return Response(status, text.encode(), TEXT, headers)


def json_response(status: int, value: Mapping[str, object]) -> Response:
    """Return a JSON answer of one line."""
    return Response(status, json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n", JSON)
