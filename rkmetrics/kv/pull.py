"""The poller: reads the pages of a fleet (page.py), each again and again, into an aggregator.

It has no task for a target: each is a small state machine, looked at when something is due. All that is due within a
tick shares one timer of the event loop, as a thousand timers of their own cost more than what they start. A target is
polled again only when its last poll has ended; one that fails is asked less and less often, up to every 5 s, and its
last state stays in the aggregator with its age. A worker is stale after three intervals of silence, however long a poll
may take: what is older is not what a router wants to decide by, even if an answer comes late.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl as tls
import time
from collections.abc import Callable, Iterable, Mapping
from random import random
from types import TracebackType
from typing import Self

from rkmetrics.catalogue.kv import PollOutcome, ReportSource
from rkmetrics.errors import FetchError, KvValueError, PayloadError
from rkmetrics.fetch import Channel, Endpoint, Failure, request_head
from rkmetrics.http_answer import Answer, Reason
from rkmetrics.kv.aggregator import KvMetricsAggregator
from rkmetrics.kv.base import WorkerKey
from rkmetrics.kv.page import PATH, read_document
from rkmetrics.settings import Secret

__all__ = ["KvMetricsPoller"]

log = logging.getLogger(__name__)

TICK_SECONDS = 0.002
STALE_INTERVALS = 3
BACKOFF_LIMIT_SECONDS = 5.0
BACKOFF_DOUBLINGS = 10
TAG = re.compile(rb'(?:W/)?"[\x21\x23-\x7e\x80-\xff]{0,200}"')  # RFC 9110, 8.8.3; what a peer sends goes back to it
TOKEN = re.compile(rb"[\x21-\x7e]+")

FAILURES: Mapping[Reason, PollOutcome] = {
    Reason.REQUEST: PollOutcome.REFUSED,
    Reason.UNREACHABLE: PollOutcome.UNREACHABLE,
    Reason.TLS: PollOutcome.UNREACHABLE,
    Reason.CLOSED: PollOutcome.UNREACHABLE,
    Reason.TIMEOUT: PollOutcome.TIMEOUT,
    Reason.MALFORMED: PollOutcome.MALFORMED,
    Reason.ENCODED: PollOutcome.MALFORMED,
    Reason.TOO_LARGE: PollOutcome.TOO_LARGE,
}
REFUSALS: Mapping[int, PollOutcome] = {401: PollOutcome.UNAUTHORIZED, 403: PollOutcome.UNAUTHORIZED}


class KvMetricsPoller:
    """Polls /kv_metrics of many processes into an aggregator, while its `async with` block runs.

    targets: URLs of the page, or of the server (http://host:port); `add` and `remove` change them at any time.
    timeout_seconds: of one poll, with connecting. jitter: part of the interval by which each poll comes earlier or
    later. token: sent as bearer, and shown nowhere. ssl: for https, by default the system's certificates.
    stale_after_seconds: by default three intervals. To be used from one event loop. Raises KvValueError.
    """

    def __init__(
        self,
        targets: Iterable[str],
        aggregator: KvMetricsAggregator,
        *,
        interval_seconds: float = 0.1,
        timeout_seconds: float = 1.0,
        token: Secret | str | None = None,
        jitter: float = 0.1,
        ssl: tls.SSLContext | None = None,
        stale_after_seconds: float | None = None,
    ) -> None:
        _check("interval_seconds", interval_seconds, "more than 0", good=interval_seconds > 0)
        _check("timeout_seconds", timeout_seconds, "more than 0", good=timeout_seconds > 0)
        _check("jitter", jitter, "a part of the interval, from 0 to 1", good=0 <= jitter <= 1)
        self.aggregator, self.interval_seconds, self.timeout_seconds = aggregator, interval_seconds, timeout_seconds
        stale = STALE_INTERVALS * interval_seconds if stale_after_seconds is None else stale_after_seconds
        self.stale_after_seconds = stale
        self._jitter, self._ssl, self._headers = jitter, ssl, _headers(token)
        self._targets: dict[str, _Target] = {}
        self._wheel: _Wheel | None = None
        metrics = aggregator.metrics
        self._count = {each: metrics.polls[each].inc if metrics else _nothing for each in PollOutcome}
        self._observe: Callable[[float], object] = metrics.poll_duration.observe if metrics else _nothing
        for url in targets:
            self.add(url)

    @property
    def targets(self) -> tuple[str, ...]:
        """The URLs that are polled, as logs show them."""
        return tuple(target.channel.endpoint.shown for target in self._targets.values())

    def add(self, url: str) -> None:
        """Poll one more target; nothing where it is polled already. Raises KvValueError."""
        endpoint = _endpoint(url)
        key = f"{endpoint.scheme}://{endpoint.authority}{endpoint.target}"
        if key in self._targets:
            return
        target = self._targets[key] = _Target(self, endpoint)
        if self._wheel is not None:
            self._wheel.start(target, random() * self.interval_seconds)  # noqa: S311 - no secret

    def remove(self, url: str) -> bool:
        """Poll a target no longer, and forget its workers. False when there is none of that URL."""
        endpoint = _endpoint(url)
        target = self._targets.pop(f"{endpoint.scheme}://{endpoint.authority}{endpoint.target}", None)
        if target is None:
            return False
        target.close()
        target.forget()
        return True

    async def __aenter__(self) -> Self:
        if self._wheel is not None:
            raise RuntimeError("this poller runs already")
        self._wheel = _Wheel(asyncio.get_running_loop())
        for number, target in enumerate(self._targets.values()):
            self._wheel.start(target, self.interval_seconds * number / len(self._targets))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wheel is not None:
            self._wheel.close()
            self._wheel = None
        opening = [task for target in self._targets.values() if (task := target.close()) is not None]
        await asyncio.gather(*opening, return_exceptions=True)
        await asyncio.sleep(0)  # the sockets close in the next turn of the loop

    def request(self, endpoint: Endpoint) -> bytes:
        """Return the bytes of a poll that gets the page in any case."""
        return request_head(endpoint, self._headers)

    def channel(
        self, endpoint: Endpoint, answered: Callable[[Answer], None], failed: Callable[[Failure], None]
    ) -> Channel:
        """Return what a target asks through."""
        return Channel(endpoint, answered, failed, ssl=self._ssl)

    def pause(self) -> float:
        """Return the seconds from one poll to the next."""
        return self.interval_seconds * (1 + self._jitter * (2 * random() - 1))  # noqa: S311 - no secret

    def backoff(self, failures: int) -> float:
        """Return the seconds until the next try, after so many failures in a row."""
        longest = min(BACKOFF_LIMIT_SECONDS, self.interval_seconds * 2.0 ** min(failures, BACKOFF_DOUBLINGS))
        return max(self.interval_seconds, longest * (1 + random()) / 2)  # noqa: S311 - no secret

    def count(self, outcome: PollOutcome) -> None:
        """Count a poll."""
        self._count[outcome]()

    def observe(self, seconds: float) -> None:
        """Note how long an answer took."""
        self._observe(seconds)

    def __repr__(self) -> str:
        return f"<KvMetricsPoller: {len(self._targets)} targets, each {self.interval_seconds} s>"


def _check(what: str, value: object, expected: str, *, good: bool) -> None:
    if not good:
        raise KvValueError(what, value, expected)


def _nothing(_: float = 0.0) -> None:
    """There is no registry."""


def _headers(token: Secret | str | None) -> tuple[tuple[bytes, bytes], ...]:
    accept = (b"accept", b"application/json")
    if token is None:
        return (accept,)
    secret = token if isinstance(token, Secret) else Secret(token)
    _check("token", secret, "visible ASCII without spaces", good=bool(TOKEN.fullmatch(secret.reveal())))
    return accept, (b"authorization", b"Bearer " + secret.reveal())


def _endpoint(url: str) -> Endpoint:
    try:
        endpoint = Endpoint.parse(url)
    except FetchError as error:
        raise KvValueError("target", error.url, "a URL of ASCII, such as http://host:9090") from None
    return endpoint._replace(target=PATH) if endpoint.target == "/" else endpoint


class _Wheel:
    """Looks at targets when something is due: one timer of the loop for all of a tick."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, list[_Target]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def start(self, target: _Target, delay_seconds: float) -> None:
        target.due, target.closed = self._loop.time() + delay_seconds, False
        self._put(target, target.due)

    def _put(self, target: _Target, when: float) -> None:
        slot = int(when / TICK_SECONDS) + 1
        waiting = self._slots.get(slot)
        if waiting is None:
            waiting = self._slots[slot] = []
            self._timers[slot] = self._loop.call_at(slot * TICK_SECONDS, self._turn, slot)
        waiting.append(target)

    def _turn(self, slot: int) -> None:
        del self._timers[slot]
        now = max(self._loop.time(), slot * TICK_SECONDS)  # some loops are early by their clock's grain
        for target in self._slots.pop(slot):
            try:
                when = target.look(now)
            except Exception:
                log.exception("polling %s failed", target.channel.endpoint.shown)
                when = now + BACKOFF_LIMIT_SECONDS
            if not target.closed:
                self._put(target, when)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._slots.clear()


class _Target:
    """One page that is polled. due: when the next poll is; deadline: when the one in flight has failed."""

    def __init__(self, poller: KvMetricsPoller, endpoint: Endpoint) -> None:
        self.due = self.deadline = self._sent_at = 0.0
        self.closed = False
        self._poller, self._aggregator = poller, poller.aggregator
        self.channel = poller.channel(endpoint, self._answered, self._failed)
        self._etag: bytes = b""  # of the page that is known
        self._request = self._unconditional = poller.request(endpoint)
        self._keys: frozenset[WorkerKey] = frozenset()
        self._failures = 0
        self._trouble: PollOutcome | None = None  # which the log knows of

    def look(self, now: float) -> float:
        """Do what is due, and return when to look again."""
        if not self.channel.busy:
            if now >= self.due:
                self._poll(now)
        elif now >= self.deadline:
            self.channel.expire()
        elif now >= self.due:
            self._poller.count(PollOutcome.SKIPPED)
            self._plan(now)
        return min(self.due, self.deadline) if self.channel.busy else self.due

    def _poll(self, now: float) -> None:
        self._sent_at, self.deadline = time.perf_counter(), now + self._poller.timeout_seconds
        self._plan(now)
        self.channel.request(self._request)

    def _plan(self, now: float) -> None:
        """Set when the next poll is due; what a busy loop has missed is not made up for."""
        pause = self._poller.pause()
        self.due = self.due + pause if self.due + pause > now else now + pause

    def _answered(self, answer: Answer) -> None:
        self._poller.observe(time.perf_counter() - self._sent_at)
        if answer.status == 304 and self._etag:
            if not self._aggregator.heard_all(self._keys):
                self._know(b"")  # somebody else forgot a worker: the next poll gets the whole page
            self._succeed(PollOutcome.UNCHANGED)
        elif answer.status == 200:
            self._read(answer)
        else:
            self._fail(REFUSALS.get(answer.status, PollOutcome.REFUSED), f"the status is {answer.status}")

    def _read(self, answer: Answer) -> None:
        try:
            reports = read_document(answer.body)
        except PayloadError as error:
            self._aggregator.count_malformed(ReportSource.PULL)
            self._fail(PollOutcome.MALFORMED, error.reason)  # and no byte of the page, which may be our own token
            return
        for report in reports:
            self._aggregator.report(report, ReportSource.PULL, self._poller.stale_after_seconds)
        keys = frozenset([report.key for report in reports])
        self._forget(self._keys - keys)
        self._keys = keys
        etag = answer.value(b"etag") or b""
        self._know(etag if TAG.fullmatch(etag) else b"")
        self._succeed(PollOutcome.OK)

    def _know(self, etag: bytes) -> None:
        """Ask from now on for a page that has another tag; b"": for any."""
        if etag != self._etag:
            self._etag, end = etag, len(b"\r\n")
            self._request = (
                b"%sif-none-match: %s\r\n\r\n" % (self._unconditional[:-end], etag) if etag else self._unconditional
            )

    def _failed(self, failure: Failure) -> None:
        self._fail(FAILURES[failure.reason], failure.detail)

    def _succeed(self, outcome: PollOutcome) -> None:
        self._poller.count(outcome)
        self._failures = 0
        if self._trouble is not None:
            self._trouble = None
            log.info("polling %s works again", self.channel.endpoint.shown)

    def _fail(self, outcome: PollOutcome, detail: str) -> None:
        self._poller.count(outcome)
        self._failures += 1
        self.due = asyncio.get_running_loop().time() + self._poller.backoff(self._failures)
        if outcome is not self._trouble:
            self._trouble = outcome
            log.warning(
                "polling %s: %s: %s; its workers keep their last state, and tries go on; said once for each change",
                self.channel.endpoint.shown,
                outcome,
                detail,
            )

    def forget(self) -> None:
        """Forget the workers of the page."""
        self._forget(self._keys)
        self._keys = frozenset()

    def _forget(self, keys: Iterable[WorkerKey]) -> None:
        for key in keys:
            self._aggregator.forget(*key)

    def close(self) -> asyncio.Task[None] | None:
        """Poll no more; see Channel.close."""
        self.closed = True
        return self.channel.close()
