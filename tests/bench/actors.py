"""The helpers for actors, beside the same counted by hand with another library: what somebody would write there."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Mapping, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any

import rkmetrics as rk
from tests.bench.base import Case, Scale, interleave
from tests.bench.peers import peer, present
from tests.bench.updates import EMPTY, OURS, Nothing, timed

__all__ = ["CASES"]


class ByHand:
    """What `with actor.task("action")` keeps, in prometheus_client, every child looked up beforehand."""

    def __init__(self) -> None:
        client = peer("prometheus_client")
        registry = client.CollectorRegistry()
        duration = client.Histogram(
            "task_seconds", "x", ["actor_name", "kind", "outcome"], registry=registry, buckets=list(rk.LATENCY)
        )
        calls = client.Counter("calls", "x", ["actor_name", "outcome"], registry=registry)
        active = client.Gauge("active", "x", ["actor_name", "kind"], registry=registry)
        started = client.Counter("started", "x", ["actor_name"], registry=registry)
        stopped = client.Counter("stopped", "x", ["actor_name", "reason"], registry=registry)
        outcomes = ("success", "error", "cancelled")
        self.durations = {outcome: duration.labels("lobby", "action", outcome) for outcome in outcomes}
        self.calls = {outcome: calls.labels("lobby", outcome) for outcome in outcomes}
        self.active, self.started = active.labels("lobby", "action"), started.labels("lobby")
        self.stopped = {reason: stopped.labels("lobby", reason) for reason in ("completed", "error")}

    def task(self) -> _TaskByHand:
        return _TaskByHand(self)

    def running(self) -> _RunningByHand:
        return _RunningByHand(self)


class _TaskByHand:
    __slots__ = ("_by", "_start")

    def __init__(self, by: ByHand) -> None:
        self._by = by

    def __enter__(self) -> None:
        self._start = perf_counter()
        self._by.active.inc()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        by = self._by
        by.active.dec()
        outcome = "success" if error is None else "cancelled" if isinstance(error, CancelledError) else "error"
        by.durations[outcome].observe(perf_counter() - self._start)
        by.calls[outcome].inc()


class _RunningByHand:
    __slots__ = ("_by",)

    def __init__(self, by: ByHand) -> None:
        self._by = by

    def __enter__(self) -> None:
        self._by.started.inc()
        self._by.active.inc()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._by.active.dec()
        self._by.stopped["completed" if error is None else "error"].inc()


def _actor() -> Any:
    return rk.Registry(rk.Settings(), builtin=False).actor("lobby")


def _measure(scale: Scale, ours: str, by_hand: str) -> Mapping[str, Sequence[float]]:
    made = present(
        {
            EMPTY: lambda: ("cell.method()", Nothing()),
            OURS: lambda: (ours, _actor()),
            "prometheus_client, by hand": lambda: (by_hand, ByHand()),
        }
    )
    return interleave(scale.rounds, {name: timed(*each, scale.updates // 4) for name, each in made.items()})


def measure_task(scale: Scale) -> Mapping[str, Sequence[float]]:
    """One action: gauge up, gauge down, duration by outcome, calls by outcome."""
    return _measure(scale, "with cell.task('action'): pass", "with cell.task(): pass")


def measure_running(scale: Scale) -> Mapping[str, Sequence[float]]:
    """The life of one actor; ours is also right when it is forgotten, ends twice, or is collected as garbage."""
    return _measure(scale, "with cell.running(): pass", "with cell.running(): pass")


CASES = (
    Case("task", 'with actor.task("action")', "ns", measure_task),
    Case("running", "with actor.running()", "ns", measure_running),
)
