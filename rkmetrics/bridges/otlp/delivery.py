"""One push after another, in one thread: collect, cut into requests, send, remember what was acknowledged.

Memory. A cumulative push keeps nothing: the next one, retry or not, collects anew and says all that a lost one would
have. A delta push keeps the last acknowledged point of each series, and the request whose fate is unknown, if any.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from rkmetrics.bridges.otlp.answers import Answer, Data
from rkmetrics.bridges.otlp.delta import Part, Points, key_of, parts, since
from rkmetrics.bridges.otlp.exporters import Link
from rkmetrics.bridges.otlp.translate import envelope, metrics_of
from rkmetrics.catalogue.otlp import Otlp, Outcome
from rkmetrics.model import Family, ForeignFamily, MetricFamily

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import Metric
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

__all__ = ["Delivery", "Schedule", "StateLog"]

logger = logging.getLogger("rkmetrics")

# Of a family: does it go as a delta? "lowmemory" is the specification's: deltas for what is counted synchronously,
# which is what cells do; what another registry has counted comes as totals, and stays so.
_AS_DELTA: Final[dict[str, Callable[[Family], bool]]] = {
    "cumulative": lambda family: False,
    "delta": lambda family: True,
    "lowmemory": lambda family: isinstance(family, MetricFamily),
}


class Delivery:
    """What is owed to a receiver.

    collect: a snapshot. connect: opens a link; called again after a failure, so that no bad connection is kept.
    metrics: where each answer is counted. start: nanoseconds since when foreign families without _created count.
    """

    def __init__(
        self,
        collect: Callable[[], Iterable[Family]],
        connect: Callable[[], Link],
        metrics: Otlp,
        *,
        temporality: str,
        resource: Callable[[], Resource],
        scope: InstrumentationScope,
        start: int,
    ) -> None:
        self._collect, self._connect, self._metrics = collect, connect, metrics
        self._as_delta = _AS_DELTA[temporality]
        self._resource, self._scope, self._start = resource, scope, start
        self._link: Link | None = None
        self._acknowledged: Points = {}
        self._unsure: Part | None = None
        self._origin: Points = {}
        self._origin_time = 0
        self.failed_attempts = 0

    def attempt(self, now: int) -> Answer:
        """Push what there is at `now` (Unix nanoseconds), each request once. Answers the first not good, or OK."""
        try:
            answer = self._push(now)
        except (
            Exception
        ) as error:  # a fault in collecting or translating: the thread goes on, the next attempt may do better
            self._metrics.exports[Outcome.FAILED].inc()
            self.failed_attempts += 1
            answer = Answer(Outcome.FAILED, f"{type(error).__name__}: {error}")
        if answer.good:
            self.failed_attempts = 0
        if answer.outcome is Outcome.OK:
            self._metrics.last_success.set(time.time())
        self._metrics.failed_attempts.set(self.failed_attempts)
        return answer

    def _push(self, now: int) -> Answer:
        bad: Answer | None = None
        for part in self._owed(now):
            answer = self._send(part)
            if not answer.good:
                bad = bad or answer
            if answer.rule.data is not Data.DONE:
                if part.marks and answer.rule.data is Data.UNSURE:
                    self._unsure = part
                break
            self._acknowledged |= part.marks
            self._unsure = None
        return bad or Answer(Outcome.OK)

    def _owed(self, now: int) -> Iterator[Part]:
        if self._unsure is not None:
            yield self._unsure
        families = list(self._collect())
        flagged = [(metric, self._as_delta(family)) for family in families for metric in self._metrics_of(family, now)]
        self._forget(flagged)
        yield from parts(flagged, self._acknowledged)

    def _metrics_of(self, family: Family, now: int) -> Iterator[Metric]:
        return since(metrics_of(family, now, self._start), self._origin, self._origin_time)

    def _forget(self, flagged: Iterable[tuple[Metric, bool]]) -> None:
        """Let go of series that have ended. Those of an absent family stay: its collector failed this time."""
        if not self._acknowledged:
            return
        present: dict[str, set[object]] = {}
        for metric, _ in flagged:
            present.setdefault(metric.name, set()).update(key_of(metric, point) for point in metric.data.data_points)
        self._acknowledged = {
            key: point for key, point in self._acknowledged.items() if key in present.get(key[0], {key})
        }

    def _send(self, part: Part) -> Answer:
        began = time.monotonic()
        answer = self._answer(part)
        self._metrics.export_duration.observe(time.monotonic() - began)
        self._metrics.exports[answer.outcome].inc()
        if answer.outcome is Outcome.REJECTED:
            answer = Answer(answer.outcome, answer.detail, points_rejected=part.points)
        if answer.points_rejected:
            self._metrics.points_rejected.inc(answer.points_rejected)
        if not answer.good:
            self.failed_attempts += 1
            if self._link is not None and self._link.renewable:
                self.close()
        return answer

    def _answer(self, part: Part) -> Answer:
        try:
            link = self._link = self._link or self._connect()
            return link.send(envelope(part.metrics, self._resource(), self._scope))
        except Exception as error:  # whatever an exporter does, the thread goes on
            return Answer(Outcome.FAILED, f"no exporter could be made: {type(error).__name__}")

    def close(self) -> None:
        """Close the link; safe from any thread, and ends a request that is under way."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def abandon(self) -> Link | None:
        """Forget the link without closing it, for a forked child: the connection is the parent's."""
        link, self._link = self._link, None
        return link

    def restart(self, now: int, inherited: Iterable[MetricFamily]) -> None:
        """Begin anew in a forked child: what was counted up to now is the parent's to report.

        inherited: the cells as they were at the fork; what other registries have counted is asked of them here.
        """
        self._acknowledged, self._unsure, self.failed_attempts = {}, None, 0
        foreign = [family for family in self._collect() if isinstance(family, ForeignFamily)]
        families: list[Family] = [*inherited, *foreign]
        flagged = (metric for family in families for metric in metrics_of(family, now, self._start))
        self._origin = {key_of(metric, point): point for metric in flagged for point in metric.data.data_points}
        self._origin_time = now


@dataclass(slots=True)
class Schedule:
    """When the next attempt is due, in monotonic seconds.

    Attempts keep to a grid of intervals. After a failure that may pass, they come sooner, by exponential backoff with
    jitter, and never before the time that the server asked for.
    """

    interval_seconds: float
    due: float = 0.0
    not_before: float = 0.0
    _grid: float = 0.0
    _retries: int = 0
    _random: random.Random = field(default_factory=random.Random)

    BACKOFF_SECONDS = 1.0
    MAX_BACKOFF_SECONDS = 8.0
    JITTER = 0.2

    def begin(self, now: float) -> None:
        """Set the first attempt: at random in the interval's second half, so that workers started at once spread."""
        self._grid = self.due = now + self.interval_seconds * self._random.uniform(0.5, 1.0)

    def after(self, answer: Answer, now: float) -> None:
        """Set the attempt after one that ended so."""
        while self._grid <= now:
            self._grid += self.interval_seconds * (1 + (now - self._grid) // self.interval_seconds)
        self._retries = self._retries + 1 if answer.rule.retry else 0
        self.due = min(self._grid, now + self._backoff()) if answer.rule.retry else self._grid
        if answer.retry_after_seconds is not None:
            self.not_before = now + answer.retry_after_seconds
        self.due = max(self.due, self.not_before)

    def _backoff(self) -> float:
        seconds = min(self.BACKOFF_SECONDS * 2.0 ** min(self._retries - 1, 30), self.MAX_BACKOFF_SECONDS)
        return seconds * self._random.uniform(1 - self.JITTER, 1 + self.JITTER)


@dataclass(slots=True)
class StateLog:
    """Says in the log when the push begins to fail, fails in another way, works again: once each, not too often."""

    QUIET_SECONDS = 30.0

    _said: Outcome = Outcome.OK
    _at: float = float("-inf")

    def note(self, answer: Answer, now: float) -> None:
        """Take an answer at `now` (monotonic seconds)."""
        state = _STATE.get(answer.outcome, answer.outcome)
        if state is self._said or now - self._at < self.QUIET_SECONDS:
            return
        self._said, self._at = state, now
        if state is Outcome.OK:
            logger.warning("OTLP push works again")
        else:
            logger.warning(
                "OTLP push: %s (%s); %s", _SAYS[state], answer.detail or "no more is known", _NEXT[answer.rule.data]
            )


# States that are one and the same to a reader of the log.
_STATE = {Outcome.UNANSWERED: Outcome.UNAVAILABLE}
_SAYS = {
    Outcome.PARTIAL: "the receiver took a part of the data",
    Outcome.REJECTED: "the receiver rejects the data",
    Outcome.REFUSED: "the receiver refuses the request",
    Outcome.UNAVAILABLE: "the receiver does not take data now",
    Outcome.GARBAGE: "what answers is no OTLP receiver",
    Outcome.FAILED: "the exporter failed",
}
_NEXT = {
    Data.DONE: "they are dropped and counted, not sent again",
    Data.KEPT: "it is tried again, and nothing is lost",
    Data.UNSURE: "it is tried again, and nothing is lost",
}
