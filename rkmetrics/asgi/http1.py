"""Heads of HTTP/1.1 requests and answers as bytes, for `rk.serve()`. Pure: no socket, no clock.

Stricter than RFC 9112 asks of a server, since it has nothing to be lenient for: whatever two parsers could read in two
ways is refused (T19). Header values keep their bytes; only their ends are trimmed.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import NamedTuple

from rkmetrics.asgi.base import Headers, Request, Response

__all__ = [
    "BODY_LIMIT_BYTES",
    "CONTINUE",
    "END",
    "HEADERS_LIMIT",
    "HEAD_LIMIT_BYTES",
    "Head",
    "Refused",
    "parse_head",
    "response_head",
]

END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # RFC 9110, 15.2.1
HEAD_LIMIT_BYTES = 65_536  # as h11
HEADERS_LIMIT = 100  # as the standard library's http.client
BODY_LIMIT_BYTES = 65_536  # larger ones are refused before they are read (T17)
LENGTH_DIGITS = 18

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")  # RFC 9112, 3
FIELD_LINE = re.compile(rb"(" + TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")  # RFC 9112, 5; no folding (5.2)
ABSOLUTE = re.compile(rb"https?://[^/?#]+", re.IGNORECASE)  # RFC 9112, 3.2.2


class Refused(Exception):
    """A head that is answered with an error, after which the connection closes."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(f"{status}: {reason}")


class Head(NamedTuple):
    """One request's head. length: bytes of body that follow. keep_alive: whether another request may follow.

    expects: the client waits for 100 before it sends the body (RFC 9110, 10.1.1).
    """

    request: Request
    length: int
    keep_alive: bool
    expects: bool = False


def parse_head(head: bytes) -> Head:
    """Read a head without its final empty line. Raises Refused."""
    first, *lines = head.split(b"\r\n")
    found = REQUEST_LINE.fullmatch(first)
    if not found:
        raise Refused(400, "not an HTTP/1.1 request line")
    if found[3] != b"1":
        raise Refused(400, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    if len(lines) > HEADERS_LIMIT:
        raise Refused(431, f"more than {HEADERS_LIMIT} headers")
    path, query = _target(found[2])
    request = Request(found[1].decode("ascii"), path, query, tuple(_field(line) for line in lines))
    modern = found[4] != b"0"
    if len(request.values(b"host")) != 1 and (modern or request.values(b"host")):  # RFC 9112, 3.2
        raise Refused(400, "exactly one Host header is required")
    expects = [value.lower() for value in request.values(b"expect")] == [b"100-continue"]
    return Head(request, _length(request), modern and _persists(request), modern and expects)


def _target(target: bytes) -> tuple[str, bytes]:
    absolute = ABSOLUTE.match(target)
    origin = target[absolute.end() :] if absolute else target
    path, _, query = origin.partition(b"?")
    # Not percent-decoded: no route has anything to encode, so an encoded path is not exactly a route (T7).
    return path.decode("ascii"), query


def _field(line: bytes) -> tuple[bytes, bytes]:
    found = FIELD_LINE.fullmatch(line)
    if not found:
        raise Refused(400, "a header is malformed")
    return found[1].lower(), found[2].strip(b" \t")


def _length(request: Request) -> int:
    """The length of the body; a chunked one has none that could be checked, so it is refused."""
    if request.values(b"transfer-encoding"):
        raise Refused(400, "a body here has a Content-Length")
    lengths = request.values(b"content-length")
    if not lengths:
        return 0
    text = lengths[0]
    if len(lengths) > 1 or not text.isdigit() or len(text) > LENGTH_DIGITS:  # RFC 9112, 6.3
        raise Refused(400, "Content-Length is not one number")
    if int(text) > BODY_LIMIT_BYTES:
        raise Refused(413, f"a body of more than {BODY_LIMIT_BYTES} bytes")
    return int(text)


def _persists(request: Request) -> bool:
    """RFC 9112, 9.3. Who asks whether to send a body (Expect) gets the answer at once, and does not send it."""
    options = (request.combined(b"connection") or b"").lower().replace(b" ", b"").split(b",")
    return b"close" not in options and not request.values(b"expect")


def response_head(response: Response, *, keep_alive: bool, date: str) -> bytes:
    """Return the head of an answer, with its final empty line. date: an HTTP date (RFC 9110, 5.6.7)."""
    headers: Headers = (
        *response.raw_headers(),
        (b"date", date.encode("ascii")),
        (b"connection", b"keep-alive" if keep_alive else b"close"),
    )
    status = b"HTTP/1.1 %d %s\r\n" % (response.status, HTTPStatus(response.status).phrase.encode())
    return status + b"".join(b"%s: %s\r\n" % header for header in headers) + b"\r\n"
