"""The hot path: one update of a cell that is held, and of what others hold.

Statements run as timeit runs them, ten times in each turn of its loop, so that the loop is a small part (under 1 ns)
and nothing has to be subtracted. What is called lies in a local variable, as in a method that is used well.
"""

from __future__ import annotations

import random
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rkmetrics as rk
from tests.bench.base import Case, Scale, Subject, interleave
from tests.bench.peers import peer, present

__all__ = ["CASES", "EMPTY", "OURS", "PURE"]

OURS = "rkmetrics"
EMPTY = "empty method call"
PURE = {"RKMETRICS_PURE_PYTHON": "1"}

_UNROLLED = 10
# Ten durations over all of the fifteen buckets, the last one and above.
_SPREAD = (0.0004, 0.002, 0.004, 0.02, 0.07, 0.2, 0.7, 3.0, 20.0, 90.0)
_LABELS = {"actor_name": "lobby", "kind": "text"}
# Peers that take microseconds are measured over fewer updates, so that rounds stay short.
_SHARE_OF_SLOW = 10


class Chat(rk.MetricSet):
    messages = rk.Counter("bench_messages_total", "Messages.")
    by_kind = rk.Counter("bench_messages_by_kind_total", "Messages.", kind=rk.OneOf("text", "image"))
    members = rk.Gauge("bench_members", "Members.", across="sum")
    reply = rk.Histogram("bench_reply_duration_seconds", "Time to reply.", buckets=rk.LATENCY)


class Nothing:
    """Has a method that does nothing: what Python asks for any call."""

    __slots__ = ()

    def method(self) -> None:
        pass


Made = Callable[[], tuple[str | Sequence[str], Any]]


def _bound() -> Chat:
    return rk.Registry(rk.Settings(), builtin=False).bind(Chat, actor_name="lobby")


def _statement(lines: str | Sequence[str]) -> str:
    return "\n".join((lines,) * _UNROLLED if isinstance(lines, str) else lines)


def timed(lines: str | Sequence[str], cell: Any, updates: int, per_run: int = _UNROLLED) -> Subject:
    """Nanoseconds of one update. lines: statements about `cell`; one of them is unrolled."""
    timer = timeit.Timer(_statement(lines), "cell = given", time.thread_time, {"given": cell})
    runs = max(updates // per_run, 1)
    return lambda: timer.timeit(runs) / (runs * per_run) * 1e9


def _measure(scale: Scale, fast: Mapping[str, Made], slow: Mapping[str, Made]) -> Mapping[str, Sequence[float]]:
    subjects = {name: timed(*made, scale.updates) for name, made in present(fast).items()}
    few = max(scale.updates // _SHARE_OF_SLOW, 1)
    subjects |= {name: timed(*made, few) for name, made in present(slow).items()}
    return interleave(scale.rounds, subjects)


def _empty() -> tuple[str, Any]:
    return "cell.method()", Nothing()


# --- peers ------------------------------------------------------------------------------------------------------------


def _prometheus(kind: str, **more: Any) -> Any:
    client = peer("prometheus_client")
    made = getattr(client, kind)("bench_x", "x", ["actor_name"], registry=client.CollectorRegistry(), **more)
    return made.labels("lobby")


def _meter() -> Any:
    metrics = peer("opentelemetry.sdk.metrics")
    reader = peer("opentelemetry.sdk.metrics.export").InMemoryMetricReader()
    return metrics.MeterProvider(metric_readers=[reader]).get_meter("bench")


def _otel_histogram() -> Any:
    return _meter().create_histogram("x", explicit_bucket_boundaries_advisory=list(rk.LATENCY))


def _pytheus(kind: str, **more: Any) -> Any:
    metrics = peer("pytheus.metrics")
    made = getattr(metrics, kind)("bench_x", "x", required_labels=["actor_name"], registry=None, **more)
    return made.labels({"actor_name": "lobby"})


def _aio(kind: str, **more: Any) -> Any:
    aioprometheus = peer("aioprometheus")
    return getattr(aioprometheus, kind)("bench_x", "x", registry=aioprometheus.Registry(), **more)


_ATTRIBUTES = repr(_LABELS)


def _spread(call: str) -> list[str]:
    return [call.format(value) for value in _SPREAD]


# --- counters and gauges ----------------------------------------------------------------------------------------------


def measure_inc(scale: Scale) -> Mapping[str, Sequence[float]]:
    """inc() of a counter in hand. OpenTelemetry and aioprometheus have no bound counter: they take labels each time."""
    return _measure(
        scale,
        {
            EMPTY: _empty,
            OURS: lambda: ("cell.inc()", _bound().messages),
            "prometheus_client": lambda: ("cell.inc()", _prometheus("Counter")),
            "pytheus": lambda: ("cell.inc()", _pytheus("Counter")),
        },
        {
            "aioprometheus": lambda: (f"cell.inc({_ATTRIBUTES})", _aio("Counter")),
            "opentelemetry, no attributes": lambda: ("cell.add(1)", _meter().create_counter("x")),
            "opentelemetry, 2 attributes": lambda: (f"cell.add(1, {_ATTRIBUTES})", _meter().create_counter("x")),
        },
    )


def measure_set(scale: Scale) -> Mapping[str, Sequence[float]]:
    """set() of a gauge in hand."""
    return _measure(
        scale,
        {
            EMPTY: _empty,
            OURS: lambda: ("cell.set(12.0)", _bound().members),
            "prometheus_client": lambda: ("cell.set(12.0)", _prometheus("Gauge")),
            "pytheus": lambda: ("cell.set(12.0)", _pytheus("Gauge")),
        },
        {
            "aioprometheus": lambda: (f"cell.set({_ATTRIBUTES}, 12.0)", _aio("Gauge")),
            "opentelemetry, no attributes": lambda: ("cell.set(12.0)", _meter().create_gauge("x")),
            "opentelemetry, 2 attributes": lambda: (f"cell.set(12.0, {_ATTRIBUTES})", _meter().create_gauge("x")),
        },
    )


def measure_labelled(scale: Scale) -> Mapping[str, Sequence[float]]:
    """A counter by its label value, found anew each time: what a cell in hand saves."""
    return _measure(
        scale,
        {
            EMPTY: _empty,
            OURS: lambda: ("cell.by_kind['text'].inc()", _bound()),
            "prometheus_client": lambda: ("cell.labels('lobby', 'text').inc()", _prometheus_by_kind()),
        },
        {"opentelemetry, 2 attributes": lambda: (f"cell.add(1, {_ATTRIBUTES})", _meter().create_counter("x"))},
    )


def _prometheus_by_kind() -> Any:
    client = peer("prometheus_client")
    return client.Counter("bench_x", "x", ["actor_name", "kind"], registry=client.CollectorRegistry())


# --- histograms -------------------------------------------------------------------------------------------------------


def measure_observe(scale: Scale) -> Mapping[str, Sequence[float]]:
    """observe() with 15 buckets, of ten durations from 0.4 ms to 90 s in turn."""
    buckets = list(rk.LATENCY)
    return _measure(
        scale,
        {
            EMPTY: _empty,
            OURS: lambda: (_spread("cell.observe({})"), _bound().reply),
            "prometheus_client": lambda: (_spread("cell.observe({})"), _prometheus("Histogram", buckets=buckets)),
            "pytheus": lambda: (_spread("cell.observe({})"), _pytheus("Histogram", buckets=buckets)),
        },
        {
            "aioprometheus": lambda: (
                _spread(f"cell.observe({_ATTRIBUTES}, {{}})".replace(_ATTRIBUTES, _doubled(_ATTRIBUTES))),
                _aio("Histogram", buckets=[*buckets, float("inf")]),
            ),
            "opentelemetry, no attributes": lambda: (_spread("cell.record({})"), _otel_histogram()),
            "opentelemetry, 2 attributes": lambda: (
                _spread(f"cell.record({{}}, {_doubled(_ATTRIBUTES)})"),
                _otel_histogram(),
            ),
        },
    )


def _doubled(text: str) -> str:
    """Braces that str.format leaves alone."""
    return text.replace("{", "{{").replace("}", "}}")


def measure_observe_random(scale: Scale) -> Mapping[str, Sequence[float]]:
    """observe() of durations that no processor can foresee: 1,000 of them, each from a list."""
    rng = random.Random(7)
    values = [10 ** rng.uniform(-3.5, 2) for _ in range(1000)]

    def looped(call: str, cell: Any) -> Subject:
        statement = f"for value in values: {call}"
        timer = timeit.Timer(statement, "cell = given", time.thread_time, {"given": cell, "values": values})
        runs = max(scale.updates // len(values), 1)
        return lambda: timer.timeit(runs) / (runs * len(values)) * 1e9

    histogram = _prometheus("Histogram", buckets=list(rk.LATENCY))
    return interleave(
        scale.rounds,
        {
            EMPTY: looped("cell.method()", Nothing()),
            OURS: looped("cell.observe(value)", _bound().reply),
            "prometheus_client": looped("cell.observe(value)", histogram),
        },
    )


CASES = (
    Case("inc", "counter, inc()", "ns", measure_inc),
    Case("set", "gauge, set()", "ns", measure_set),
    Case("observe", "histogram of 15 buckets, observe()", "ns", measure_observe),
    Case("observe random", "the same, unforeseeable values, with their loop", "ns", measure_observe_random),
    Case("labelled", "counter found by its label, then inc()", "ns", measure_labelled),
    Case("pure inc", "pure Python: counter, inc()", "ns", measure_inc, environment=PURE),
    Case("pure set", "pure Python: gauge, set()", "ns", measure_set, environment=PURE),
    Case("pure observe", "pure Python: histogram of 15 buckets, observe()", "ns", measure_observe, environment=PURE),
)
