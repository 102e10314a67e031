"""What a server's connection says and hears, whichever HTTP it speaks: values and interfaces; pure.

A `Speaker` (http1.py, http2.py) knows one version and no socket; it asks the `Intake`, the server, and whoever has the
socket (http.py) carries bytes and looks at the clock for it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, Protocol

__all__ = ["Intake", "Patience", "Reply", "Request", "Speaker", "path_of"]

# http://host/path instead of /path: what a proxy is asked, and a server has to understand (RFC 9112, 3.2.2).
ABSOLUTE = re.compile(r"https?://[^/?#]*", re.ASCII | re.IGNORECASE)


class Request(NamedTuple):
    """One request. path: without query; origin: of the page that sends it, where a browser does; body: two parts."""

    method: str
    path: str
    traceparent: str
    origin: str
    body: bytes
    keep_alive: bool


def path_of(target: str) -> str:
    """Return the path of a request's target."""
    if not target.startswith("/"):
        target = ABSOLUTE.sub("", target, count=1)
    return target.partition("?")[0]


class Reply(NamedTuple):
    """What a request gets. text: why not, none where it is taken."""

    status: int
    text: str = ""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What belongs to the status."""
        return HEADERS.get(self.status, ())


HEADERS: Mapping[int, tuple[tuple[str, str], ...]] = {405: (("allow", "POST"),), 503: (("retry-after", "1"),)}


class Patience(NamedTuple):
    """How long a client may take: from the first byte to the end of a head, and of a body; a new connection has no
    longer than for a head. One that rests between two requests stays for twice as long as Dynamo's client keeps it,
    which then is the one who closes it."""

    head_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 180.0


class Intake(Protocol):
    """What a connection asks of its server."""

    patience: Patience

    @property
    def limit_bytes(self) -> int:
        """Of a body."""
        ...

    @property
    def draining(self) -> bool:
        """Whether nothing more is taken."""
        ...

    def reply(self, request: Request) -> Reply:
        """Take a request, or not."""
        ...

    def refused(self, status: int, detail: str) -> Reply:
        """Count what cannot be read; what its sender gets."""
        ...

    def too_slow(self, detail: str) -> None:
        """Count what was not complete in time."""

    def flooded(self, detail: str) -> None:
        """Count a peer that only makes work."""


class Speaker(ABC):
    """One version of HTTP, on one connection of a server. Times are of a monotonic clock.

    over: nothing more is read, and the connection ends. due: when the peer must have gone on, else `expire`.
    """

    over = False
    due: float

    @property
    @abstractmethod
    def rest(self) -> int:
        """How many bytes of incomplete requests are kept."""

    @abstractmethod
    def feed(self, data: bytes, now: float) -> bytes:
        """Take some bytes; what is to be sent."""

    @abstractmethod
    def expire(self, now: float) -> bytes:
        """Time ran out; what is to be sent."""

    @abstractmethod
    def give_up(self, status: int, detail: str) -> bytes:
        """Take nothing more of what is incomplete; what is to be sent."""

    @abstractmethod
    def drain(self) -> bytes:
        """The server takes nothing more; what is to be sent."""

    @abstractmethod
    def close(self) -> bytes:
        """The connection ends now; what is to be sent."""
