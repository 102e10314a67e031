"""What a receiver's answer means: tables and functions of values.

OTLP 1.x, "OTLP/HTTP Response" and "OTLP/gRPC Response": 429, 502, 503 and 504, and seven gRPC codes, may be tried
again; all else MUST NOT be. A server says when by Retry-After, or RetryInfo in gRPC; RESOURCE_EXHAUSTED without it is
final. We follow that, with one addition: of what may be tried again, deltas must know whether it may have been taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Final, NamedTuple

from rkmetrics.catalogue.otlp import Outcome

__all__ = [
    "GRPC_OUTCOMES",
    "HTTP_OUTCOMES",
    "MAX_ANSWER_BYTES",
    "MAX_RETRY_AFTER_SECONDS",
    "RULES",
    "Answer",
    "Data",
    "Rule",
    "body_outcome",
    "grpc_outcome",
    "http_outcome",
    "retry_after_seconds",
]

# OTLP, "OTLP/HTTP Response": clients SHOULD limit what they read of an answer; 4 MiB is what it recommends.
MAX_ANSWER_BYTES: Final = 4 << 20

# A server that asks for more than this is taken at ten minutes: metrics that come an hour late serve nobody.
MAX_RETRY_AFTER_SECONDS: Final = 600.0


class Data(Enum):
    """What becomes of the data of a request."""

    DONE = "done"  # acknowledged, or dropped for good
    KEPT = "kept"  # not taken: part of the next request
    UNSURE = "unsure"  # perhaps taken: to be sent again as it is


class Rule(NamedTuple):
    """What follows from an outcome. retry: soon, by backoff; otherwise at the next interval."""

    retry: bool
    data: Data


RULES: Final[Mapping[Outcome, Rule]] = {
    Outcome.OK: Rule(False, Data.DONE),
    Outcome.PARTIAL: Rule(False, Data.DONE),
    Outcome.REJECTED: Rule(False, Data.DONE),
    Outcome.REFUSED: Rule(False, Data.KEPT),
    Outcome.UNAVAILABLE: Rule(True, Data.KEPT),
    Outcome.UNANSWERED: Rule(True, Data.UNSURE),
    Outcome.GARBAGE: Rule(False, Data.UNSURE),
    Outcome.FAILED: Rule(False, Data.KEPT),
}

HTTP_OUTCOMES: Final[Mapping[int, Outcome]] = {
    400: Outcome.REJECTED,
    413: Outcome.REJECTED,
    422: Outcome.REJECTED,
    429: Outcome.UNAVAILABLE,
    502: Outcome.UNANSWERED,  # a gateway speaks: what is behind it may have taken the data
    503: Outcome.UNAVAILABLE,
    504: Outcome.UNANSWERED,
}

GRPC_OUTCOMES: Final[Mapping[str, Outcome]] = {
    "OK": Outcome.OK,
    "INVALID_ARGUMENT": Outcome.REJECTED,
    "UNAVAILABLE": Outcome.UNANSWERED,  # also what a connection that breaks in the middle gives
    "CANCELLED": Outcome.UNANSWERED,
    "DEADLINE_EXCEEDED": Outcome.UNANSWERED,
    "ABORTED": Outcome.UNANSWERED,
    "OUT_OF_RANGE": Outcome.UNANSWERED,
    "DATA_LOSS": Outcome.UNANSWERED,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request ended. retry_after_seconds: what the server asked for. detail: a line for the log, no secrets."""

    outcome: Outcome
    detail: str = ""
    retry_after_seconds: float | None = None
    points_rejected: int = 0

    @property
    def good(self) -> bool:
        """Whether the receiver took the data, or all of them that it can take."""
        return self.outcome in (Outcome.OK, Outcome.PARTIAL)

    @property
    def rule(self) -> Rule:
        return RULES[self.outcome]


def http_outcome(status: int) -> Outcome:
    """The outcome by status alone; a 2xx is OK until its body is read. A redirect is refused, and not followed."""
    return Outcome.OK if 200 <= status < 300 else HTTP_OUTCOMES.get(status, Outcome.REFUSED)


def grpc_outcome(code: str, details: str, *, retry_info: bool) -> Outcome:
    """The outcome of a gRPC code. retry_info: the server said when to come back, so it has not taken the data."""
    if code == "RESOURCE_EXHAUSTED":
        return Outcome.UNAVAILABLE if retry_info else Outcome.REFUSED
    if code == "UNAVAILABLE" and (retry_info or details.startswith("failed to connect")):
        return Outcome.UNAVAILABLE
    return GRPC_OUTCOMES.get(code, Outcome.REFUSED)


def body_outcome(content_type: str, decoded: bool) -> Outcome:
    """The outcome of a 2xx. decoded: the body is an OTLP answer (an empty one is).

    Something else than a receiver may answer 200 to anything, often with HTML. There are receivers that say "ok" in
    their own words; those are believed if they call it JSON or plain text.
    """
    media = content_type.partition(";")[0].strip().lower()
    return Outcome.OK if decoded or media in ("application/json", "text/plain") else Outcome.GARBAGE


def retry_after_seconds(value: str | None, now: float) -> float | None:
    """Retry-After (RFC 9110, section 10.2.3), seconds or a date, as seconds from now (Unix time); None if neither."""
    text = (value or "").strip()
    try:
        if text.isascii() and text.isdigit():
            return min(float(text), MAX_RETRY_AFTER_SECONDS)
        at = parsedate_to_datetime(text)
        seconds = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else None
