"""What a check says of its backend: its vitals, and the outcome of an answer or of none. Pure."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from typing import Annotated

import msgspec

from rkmetrics.catalogue.discovery import CheckOutcome
from rkmetrics.fetch import Failure
from rkmetrics.http_answer import Answer, Reason

__all__ = ["BLIND", "Vitals", "judge_answer", "judge_failure"]

#: What a balancer hears of when it is itself to blame: cut off, too slow, or with the wrong token.
BLIND = frozenset({CheckOutcome.TIMEOUT, CheckOutcome.UNREACHABLE, CheckOutcome.UNAUTHORIZED})

_Whole = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]
_Number = Annotated[float, msgspec.Meta(ge=0)]


class Vitals(msgspec.Struct, frozen=True):
    """What a check reads of a backend's vitals. Usage is in percent.

    `ready` decides, and nothing but true means true. The rest may be left out; what is there has to be a number that
    is not negative. gpu_usage: also null, for nodes without one.
    """

    ready: bool
    requests_in_progress: _Whole = 0
    cpu_usage: _Number = 0.0
    memory_usage: _Number = 0.0
    gpu_usage: _Number | None = None
    failed_responses: _Whole = 0
    connected_peers: _Whole = 0
    backoff_requests: _Whole = 0
    uptime_seconds: _Number = 0.0
    version: Annotated[str, msgspec.Meta(max_length=128)] = ""

    @property
    def load(self) -> tuple[float, float]:
        """How busy it is: what it has in hand, then how full its scarcest resource is."""
        usage = max(self.cpu_usage, self.memory_usage, self.gpu_usage or 0.0)
        return self.requests_in_progress + self.backoff_requests, usage


_vitals = msgspec.json.Decoder(Vitals)
STATUSES: Mapping[int, CheckOutcome] = {401: CheckOutcome.UNAUTHORIZED, 403: CheckOutcome.UNAUTHORIZED}
FAILURES: Mapping[Reason, CheckOutcome] = {
    Reason.REQUEST: CheckOutcome.MALFORMED,
    Reason.UNREACHABLE: CheckOutcome.UNREACHABLE,
    Reason.TLS: CheckOutcome.UNREACHABLE,
    Reason.TIMEOUT: CheckOutcome.TIMEOUT,
    Reason.CLOSED: CheckOutcome.CLOSED,
    Reason.MALFORMED: CheckOutcome.MALFORMED,
    Reason.ENCODED: CheckOutcome.MALFORMED,
    Reason.TOO_LARGE: CheckOutcome.TOO_LARGE,
}
ERRNO = re.compile(r"\[Errno ([0-9]+)\]")
ERRNOS: Mapping[int, CheckOutcome] = {
    errno.ECONNREFUSED: CheckOutcome.REFUSED,
    errno.EMFILE: CheckOutcome.NOT_SENT,
    errno.ENFILE: CheckOutcome.NOT_SENT,
    errno.ENOBUFS: CheckOutcome.NOT_SENT,
    errno.ENOMEM: CheckOutcome.NOT_SENT,
    errno.EADDRNOTAVAIL: CheckOutcome.NOT_SENT,  # no port of our own left
}


def judge_answer(answer: Answer) -> tuple[CheckOutcome, Vitals | None]:
    """Return what an answer says of its backend."""
    if answer.status != 200:
        return STATUSES.get(answer.status, CheckOutcome.WRONG_STATUS), None
    try:
        vitals = _vitals.decode(answer.body)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return CheckOutcome.MALFORMED, None
    return (CheckOutcome.READY if vitals.ready else CheckOutcome.NOT_READY), vitals


def judge_failure(failure: Failure) -> CheckOutcome:
    """Return what it says of a backend, or of us, that there is no answer."""
    found = ERRNO.search(failure.detail) if failure.reason is Reason.UNREACHABLE else None
    return ERRNOS.get(int(found[1]), CheckOutcome.UNREACHABLE) if found else FAILURES[failure.reason]
