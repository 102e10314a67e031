"""One balancer, as one backend sees it: announce, be known, take it back.

A balancer is not trusted more than any peer: no redirect is followed, answers are bounded in size and time, and what it
asks for (Retry-After) delays an announcement by one interval at most.
"""

from __future__ import annotations

import asyncio
import logging
import ssl as tls
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec

from rkmetrics.catalogue.announcing import AnnounceOutcome, WithdrawOutcome
from rkmetrics.discovery.base import REGISTER_PATH, Backend
from rkmetrics.errors import FetchError
from rkmetrics.fetch import Endpoint, send
from rkmetrics.http_answer import Answer, Reason
from rkmetrics.retry import Backoff, StateLog, jittered
from rkmetrics.settings import Secret

if TYPE_CHECKING:
    from rkmetrics.catalogue.announcing import Announcing
    from rkmetrics.cells import GaugeShare

__all__ = ["TIMEOUT_SECONDS", "WITHDRAW_SECONDS", "Membership", "Place"]

log = logging.getLogger("rkmetrics.discovery")

TIMEOUT_SECONDS = 5.0  # of one announcement
WITHDRAW_SECONDS = 1.0
BACKOFF_FIRST_SECONDS, BACKOFF_CAP_SECONDS = 0.25, 10.0
ANSWER_LIMIT_BYTES = 16_384
SAID_BYTES = 160
DOWN = "down"  # the one state of ours at a balancer that somebody has to look after
JSON = (b"content-type", b"application/json")

STATUS_OUTCOMES: Mapping[int, AnnounceOutcome] = {
    200: AnnounceOutcome.OK,
    201: AnnounceOutcome.OK,
    204: AnnounceOutcome.OK,
    401: AnnounceOutcome.UNAUTHORIZED,
    403: AnnounceOutcome.UNAUTHORIZED,
    409: AnnounceOutcome.CONFLICT,
    429: AnnounceOutcome.BUSY,
    503: AnnounceOutcome.BUSY,
    507: AnnounceOutcome.BUSY,
}
REASON_OUTCOMES: Mapping[Reason, AnnounceOutcome] = {
    Reason.TIMEOUT: AnnounceOutcome.TIMEOUT,
    Reason.UNREACHABLE: AnnounceOutcome.UNREACHABLE,
    Reason.TLS: AnnounceOutcome.UNREACHABLE,
    Reason.CLOSED: AnnounceOutcome.UNREACHABLE,
}


class Place(Protocol):
    """Where a backend can be listed."""

    listed: bool

    @property
    def shown(self) -> str:
        """What it is called in logs."""
        ...

    async def run(self) -> None:
        """Be listed, until cancelled; never raises anything else."""
        ...

    async def withdraw(self) -> bool:
        """Be listed no longer, after `run` has ended. False where the place does not hear of it."""
        ...


class Membership:
    """One balancer, as one backend knows it. listed: whether it took the last announcement.

    To be used from one event loop. Raises FetchError for a URL that is none.
    """

    def __init__(
        self,
        balancer: str,
        backend: Backend,
        metrics: Announcing,
        *,
        interval_seconds: float,
        token: Secret | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        ssl: tls.SSLContext | None = None,
    ) -> None:
        url = (balancer if "://" in balancer else f"http://{balancer}").rstrip("/")
        self._url, self.shown = url + REGISTER_PATH, Endpoint.parse(url).authority
        self._backend, self._body, self._metrics = backend, backend.encode(), metrics
        self._interval, self._timeout, self._ssl = interval_seconds, timeout_seconds, ssl
        self._headers = () if token is None else ((b"authorization", b"Bearer " + token.reveal()),)
        self._log = StateLog(log)
        self._share: GaugeShare | None = None
        self._wait_seconds = 0.0  # what the balancer asked for
        self.listed = False

    async def run(self) -> None:
        """Announce for ever."""
        backoff = Backoff(BACKOFF_FIRST_SECONDS, min(BACKOFF_CAP_SECONDS, self._interval))
        self._share, wanted = self._metrics.balancers.share(), self._metrics.balancers_wanted.share()
        wanted.set(1)
        try:
            while True:
                if await self._announce():
                    backoff.reset()
                    await asyncio.sleep(jittered(self._interval))
                else:
                    await asyncio.sleep(max(backoff.next(), self._wait_seconds))
        finally:
            self._share.close()
            wanted.close()

    async def withdraw(self) -> bool:
        """Take the announcement back."""
        self.listed = False
        try:
            answer = await self._send("DELETE", f"{self._url}/{self._backend.id}", WITHDRAW_SECONDS)
            known = answer.status in (200, 202, 204, 404)
        except FetchError:
            known = False
        self._metrics.withdrawals[WithdrawOutcome.OK if known else WithdrawOutcome.FAILED].inc()
        return known

    async def _announce(self) -> bool:
        self._wait_seconds = 0.0
        try:
            answer = await self._send("POST", self._url, self._timeout, self._body)
            outcome, detail = self._read(answer)
        except FetchError as error:
            outcome = REASON_OUTCOMES.get(Reason(error.reason), AnnounceOutcome.MALFORMED)
            detail = error.detail
        self._note(outcome, detail)
        return self.listed

    async def _send(self, method: str, url: str, timeout_seconds: float, body: bytes | None = None) -> Answer:
        return await send(
            method,
            url,
            body=body,
            headers=(*self._headers, JSON) if body else self._headers,
            timeout_seconds=timeout_seconds,
            limit_bytes=ANSWER_LIMIT_BYTES,
            ssl=self._ssl,
        )

    def _read(self, answer: Answer) -> tuple[AnnounceOutcome, str]:
        """Return how it went. What a balancer answers is for it to choose, but it has to look like one."""
        outcome = STATUS_OUTCOMES.get(answer.status, AnnounceOutcome.REFUSED)
        if outcome is AnnounceOutcome.BUSY:
            self._wait_seconds = min(_seconds(answer.value(b"retry-after")), self._interval)
        if outcome is not AnnounceOutcome.OK:
            return outcome, f"status {answer.status}{_said(answer.body)}"
        fields = _fields(answer.body)
        if fields is None or fields.get("id", self._backend.id) != self._backend.id:
            return AnnounceOutcome.MALFORMED, "the answer is no balancer's"
        return outcome, DOWN if fields.get("state") == DOWN else ""

    def _note(self, outcome: AnnounceOutcome, detail: str) -> None:
        """Count it, and say it if it is news."""
        self.listed = outcome is AnnounceOutcome.OK
        self._metrics.announcements[outcome].inc()
        if self._share is not None:
            self._share.set(self.listed)
        if self.listed:
            self._metrics.last_success.set(time.time())
            self._note_known(detail)
            return
        told = "balancer %s: does not know us (%s: %s); trying again every %g s at most"
        seconds = min(BACKOFF_CAP_SECONDS, self._interval)
        self._log.note(f"not {outcome}", logging.WARNING, told, self.shown, outcome.value, detail, seconds)

    def _note_known(self, detail: str) -> None:
        backend = self._backend
        if detail != DOWN:
            self._log.note("ok", logging.INFO, "balancer %s: it knows us as %s", self.shown, backend.id)
            return
        told = "balancer %s: it knows us as %s, and its checks of %s fail; is that address right, and open to it?"
        self._log.note(DOWN, logging.WARNING, told, self.shown, backend.id, backend.metrics_address)


def _said(body: bytes) -> str:
    """The beginning of what a balancer says, fit for a log."""
    text = body[:SAID_BYTES].decode("ascii", "replace").partition("\n")[0]
    return f", {text!r}" if text.strip() and text.isprintable() else ""


def _seconds(retry_after: bytes | None) -> float:
    """Read Retry-After where it is a number (RFC 9110, 10.2.3)."""
    return float(retry_after) if retry_after and retry_after.isdigit() and len(retry_after) < 6 else 0.0


def _fields(body: bytes) -> Mapping[str, Any] | None:
    """Read the answer of what may be a balancer: nothing, or a JSON object. None for what is neither."""
    if not body.strip():
        return {}
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else None
