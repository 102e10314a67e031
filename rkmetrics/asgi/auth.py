"""The gate before everything that shows metrics: bearer tokens, and closed whenever in doubt.

The only thing that it trusts is the Authorization header (RFC 9110, 11.6.2; RFC 6750, 2.1). It never reads Host,
X-Forwarded-*, cookies or any other header. Tokens and what clients offer are compared as keyed digests, all of the
valid ones each time, so that neither length nor order shows in the time taken; neither is ever part of a log line, a
repr, an error or an answer. Nor is the path of a token file: who mixes up the variables puts the token there.

    METRICS_ENABLED  token                        answer
    unset, 0         any                          403
    1                set, or in a readable file   the right bearer passes, all else is 401
    1                none that can be used        403, and one ERROR line that names the variables
    1                METRICS_ACCESS=open          passes
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from hmac import compare_digest
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from rkmetrics.asgi.base import Request, Response, text_response
from rkmetrics.catalogue.exporter import AuthFailure

if TYPE_CHECKING:
    from rkmetrics.settings import Secret, Settings

__all__ = ["CLOSED", "Gate", "LoopbackGate", "TokenFile", "Tokens", "bearer"]

log = logging.getLogger(__name__)


# --- what a client offers ---------------------------------------------------------------------------------------------

# RFC 9110, 11.4: credentials = auth-scheme 1*SP token68. Wider than token68 in its characters, since operators choose
# tokens by hand: any visible ASCII but the comma, which separates list items for proxies that join headers.
TOKEN = rb"[!-+\--~]+"
USABLE = re.compile(TOKEN)
CREDENTIALS = re.compile(rb"bearer +(" + TOKEN + rb")", re.IGNORECASE)
SCHEME = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ")  # RFC 9110, 5.6.2: token
# Names under which clients put a token into the query, where it ends in logs (RFC 6750, 2.3 advises against it).
QUERY_NAMES = frozenset(
    {
        b"token",
        b"access_token",
        b"auth_token",
        b"bearer",
        b"bearer_token",
        b"metrics_token",
        b"authorization",
        b"api_key",
    }
)

NO_REGISTRATIONS = "registrations not enabled\n"
CLOSED = "metrics not enabled\n"
NOT_THIS_HOST = text_response(403, "metrics are open to this host only; ask for them as localhost or 127.0.0.1\n")


def _unauthorized(what: str) -> Response:
    return text_response(401, f"{what} request requires a valid bearer token\n", ((b"www-authenticate", b"Bearer"),))


def bearer(request: Request) -> bytes | AuthFailure:
    """Return the one token that the request offers, or why there is none."""
    if any(name.lower() in QUERY_NAMES for name, _ in request.fields()):
        return AuthFailure.QUERY_TOKEN
    values = request.values(b"authorization")
    if not values:
        return AuthFailure.MISSING
    if len(values) > 1:
        return AuthFailure.SEVERAL_HEADERS
    found = CREDENTIALS.fullmatch(values[0])
    return found[1] if found else _why_not(values[0])


def _why_not(value: bytes) -> AuthFailure:
    if b"," in value:
        return AuthFailure.SEVERAL_HEADERS
    scheme = SCHEME.match(value)
    return AuthFailure.WRONG_SCHEME if scheme and scheme[1].lower() != b"bearer" else AuthFailure.MALFORMED


# --- what is valid ----------------------------------------------------------------------------------------------------

KEY = os.urandom(32)  # digests of one process mean nothing outside it


def _digest(value: bytes) -> bytes:
    return blake2b(value, digest_size=32, key=KEY).digest()


class Tokens(NamedTuple):
    """Digests of valid tokens, and what is wrong with where they come from ("" if nothing)."""

    digests: tuple[bytes, ...]
    problem: str = ""


def _tokens(values: Iterable[tuple[str, bytes]]) -> Tokens:
    """Tokens of named places; one that no client could send is no token."""
    named = [(name, value.strip()) for name, value in values]
    problems = [f"{name}: {UNUSABLE}" for name, value in named if value and not USABLE.fullmatch(value)]
    if problems:
        return Tokens((), "; ".join(problems))
    return Tokens(tuple(_digest(value) for _, value in named if value))


UNUSABLE = "a token is visible ASCII characters without spaces and commas"
FILE_LIMIT_BYTES = 16_384
FILE_LIMIT_TOKENS = 2  # the new and the old one of a rotation
# Two writes within one tick of the file system's clock may leave the same time and size: such a file is read again.
SETTLED_NS = 2_000_000_000


class TokenFile:
    """The tokens in a file: one or two lines, blank ones ignored. Read when it changes, asked by one stat() a request.

    Whatever is wrong with it, it has no tokens: a gate that went on with an old token would outlive its withdrawal.
    Several threads may ask at once; the state is one value that is replaced as a whole.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._seen: tuple[object, Tokens] = (None, Tokens(()))

    def tokens(self) -> Tokens:
        """Return what the file says now."""
        signature, tokens = self._seen
        try:
            if signature is not None and _signature(os.stat(self.path)) == signature:
                return tokens
            signature, tokens = self._read()
        except OSError as error:
            signature, tokens = None, self._problem(error.strerror or type(error).__name__)
        self._seen = signature, tokens
        return tokens

    def _read(self) -> tuple[object, Tokens]:
        # Not blocking: a FIFO in its place must not hang the request (T25).
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return None, self._problem("not a regular file")
            content = os.read(descriptor, FILE_LIMIT_BYTES + 1)
        finally:
            os.close(descriptor)
        settled = abs(time.time_ns() - status.st_mtime_ns) > SETTLED_NS
        return _signature(status) if settled else None, self._parse(content)

    def _parse(self, content: bytes) -> Tokens:
        lines = [(f"line {number}", line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        if len(content) > FILE_LIMIT_BYTES or len(lines) > FILE_LIMIT_TOKENS:
            return self._problem(f"more than {FILE_LIMIT_TOKENS} lines, or {FILE_LIMIT_BYTES} bytes")
        if not lines:
            return self._problem("empty")
        tokens = _tokens(lines)
        return self._problem(tokens.problem) if tokens.problem else tokens

    def _problem(self, what: str) -> Tokens:
        return Tokens((), f"METRICS_TOKEN_FILE: {what}")

    def __repr__(self) -> str:
        return "TokenFile()"


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# --- the gate ---------------------------------------------------------------------------------------------------------


class Gate:
    """Lets a request for metrics pass, or answers it.

    tokens: asked at each request; None: the gate stands open. count: called with the reason of every 401. closed: the
    body of a 403. what: is asked for, in a 401 and in the log.
    """

    def __init__(
        self,
        *,
        enabled: bool,
        tokens: Callable[[], Tokens] | None,
        count: Callable[[AuthFailure], None],
        closed: str = CLOSED,
        what: str = "metrics",
    ) -> None:
        self._enabled, self._tokens, self._count = enabled, tokens, count
        self._closed, self._unauthorized = text_response(403, closed), _unauthorized(what)
        self._tell = _TELLERS[what]
        self._told = ""
        if enabled and tokens:
            self._valid(tokens)  # so that the log says at the start what is wrong

    @classmethod
    def from_settings(
        cls, settings: Settings, count: Callable[[AuthFailure], None] = lambda _: None, closed: str = CLOSED
    ) -> Gate:
        """Return the gate that the settings describe."""
        tokens = None if settings.metrics_access == "open" else _sources(settings)
        return cls(enabled=settings.metrics_enabled, tokens=tokens, count=count, closed=closed)

    @classmethod
    def for_registrations(cls, settings: Settings, count: Callable[[AuthFailure], None] = lambda _: None) -> Gate:
        """Return the gate before POST /register: tokens of its own, since who may be scraped may not join a pool."""
        tokens = None if settings.registration_access == "open" else _registration_tokens(settings)
        return cls(enabled=True, tokens=tokens, count=count, closed=NO_REGISTRATIONS, what="registration")

    @property
    def usable(self) -> bool:
        """Whether any request at all can pass now."""
        return self._enabled and (self._tokens is None or bool(self._valid(self._tokens)))

    def refuse(self, request: Request) -> Response | None:
        """Return the answer to a request that may not pass; None for one that may."""
        if not self._enabled:
            return self._closed
        if self._tokens is None:
            return None
        valid = self._valid(self._tokens)
        if not valid:
            return self._closed
        failure = _failure(bearer(request), valid)
        if failure is None:
            return None
        self._count(failure)
        return self._unauthorized

    def _valid(self, tokens: Callable[[], Tokens]) -> tuple[bytes, ...]:
        digests, problem = tokens()
        if not digests and not problem:
            problem = "no token is set"
        if problem != self._told:
            self._told = problem
            self._tell(problem, not digests)
        return digests

    def __repr__(self) -> str:
        return f"Gate(enabled={self._enabled}, open={self._tokens is None})"


class LoopbackGate:
    """Open, to clients on this host that know it as this host.

    For servers on a loopback address. The Host header opens nothing here, it can only close: a page in a browser on
    this host may reach loopback under a name of its own (DNS rebinding), and would otherwise read metrics.
    """

    def refuse(self, request: Request) -> Response | None:
        """Return the answer to a request under another name."""
        return None if all(_is_this_host(value) for value in request.values(b"host")) else NOT_THIS_HOST


def _is_this_host(value: bytes) -> bool:
    text = value.decode("latin-1").lower()
    name = text[1 : text.find("]")] if text.startswith("[") else text.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _failure(offered: bytes | AuthFailure, valid: tuple[bytes, ...]) -> AuthFailure | None:
    if isinstance(offered, AuthFailure):
        return offered
    digest, found = _digest(offered), False
    for known in valid:  # every one, also after a match
        found |= compare_digest(digest, known)
    return None if found else AuthFailure.WRONG_TOKEN


def _sources(settings: Settings) -> Callable[[], Tokens]:
    """METRICS_TOKEN and each line of the file are valid, and METRICS_TOKEN_PREVIOUS beside at least one of them."""
    current = _tokens([("METRICS_TOKEN", _reveal(settings.metrics_token))])
    previous = _tokens([("METRICS_TOKEN_PREVIOUS", _reveal(settings.metrics_token_previous))])
    file = TokenFile(settings.metrics_token_file) if settings.metrics_token_file else None

    def tokens() -> Tokens:
        parts = [current, file.tokens()] if file else [current]
        digests = tuple(digest for part in parts for digest in part.digests)
        problem = "; ".join(part.problem for part in (*parts, previous) if part.problem)
        return Tokens(digests + previous.digests if digests else (), problem)

    return tokens


def _reveal(secret: Secret | None) -> bytes:
    return secret.reveal() if secret else b""


def _registration_tokens(settings: Settings) -> Callable[[], Tokens]:
    """RKMETRICS_REGISTRATION_TOKEN, and the previous one beside it."""
    current = _tokens([("RKMETRICS_REGISTRATION_TOKEN", _reveal(settings.registration_token))])
    previous = _tokens([("RKMETRICS_REGISTRATION_TOKEN_PREVIOUS", _reveal(settings.registration_token_previous))])
    problem = "; ".join(part.problem for part in (current, previous) if part.problem)
    found = Tokens(current.digests + previous.digests if current.digests else (), problem)
    return lambda: found


def _tell_of_registrations(problem: str, closed: bool) -> None:
    if problem:
        log.error("registrations: %s%s", problem, "; all of them get 403" if closed else ", which is left out")


def _tell_of_metrics(problem: str, closed: bool) -> None:
    if not problem:
        log.info("metrics tokens can be read again")
    elif closed:
        log.error(
            "/metrics answers 403 although METRICS_ENABLED is set: %s; set METRICS_TOKEN or METRICS_TOKEN_FILE "
            "(or METRICS_ACCESS=open, to serve metrics to anybody)",
            problem,
        )
    else:
        log.error("a metrics token is left out: %s", problem)


_TELLERS: Mapping[str, Callable[[str, bool], None]] = {
    "metrics": _tell_of_metrics,
    "registration": _tell_of_registrations,
}
