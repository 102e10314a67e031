"""One content in every library: what a fleet of 200 actor names exposes, 50 lines each."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import rkmetrics as rk
from tests.bench.peers import peer

__all__ = ["CONTENTS", "Content", "Kind", "aio", "otel", "otel_prometheus", "ours", "prometheus", "pytheus", "samples"]

OBSERVATIONS = 20  # of each histogram


@dataclass(frozen=True, slots=True)
class Kind:
    """One family: at most one label beside actor_name. type: Counter, Gauge or Histogram."""

    name: str
    type: str
    label: str = ""
    values: tuple[str, ...] = ()

    @property
    def combos(self) -> tuple[tuple[str, ...], ...]:
        return tuple((value,) for value in self.values) or ((),)

    @property
    def labels(self) -> tuple[str, ...]:
        return ("actor_name", self.label) if self.label else ("actor_name",)

    @property
    def lines(self) -> int:
        return len(self.combos) * (len(rk.LATENCY) + 3 if self.type == "Histogram" else 1)


@dataclass(frozen=True, slots=True)
class Content:
    """What one actor name exposes, and what numbers it has."""

    kinds: tuple[Kind, ...]
    number: Callable[[random.Random], float] = lambda rng: float(rng.randrange(1_000_000))

    def names(self, of: int) -> tuple[str, ...]:
        """Actor names for 50 lines times `of`."""
        lines = sum(kind.lines for kind in self.kinds)
        return tuple(f"actor-{i:03}" for i in range(max(of * 50 // lines, 1)))

    def updates(self, of: int) -> Iterator[tuple[Kind, str, tuple[str, ...], tuple[float, ...]]]:
        """Every series with its numbers, the same each time."""
        rng = random.Random(42)
        for name in self.names(of):
            for kind in self.kinds:
                for combo in kind.combos:
                    if kind.type == "Histogram":
                        yield kind, name, combo, tuple(10 ** rng.uniform(-3.5, 2) for _ in range(OBSERVATIONS))
                    else:
                        yield kind, name, combo, (self.number(rng),)


def _fifty(name: str, type: str) -> tuple[Kind, ...]:
    return (Kind(name, type, "kind", tuple(f"kind_{i}" for i in range(50))),)


CONTENTS: Mapping[str, Content] = {
    "counters": Content(_fifty("page_messages_total", "Counter")),
    "floats": Content(_fifty("page_load", "Gauge"), lambda rng: rng.uniform(0, 1000)),
    "histograms": Content((Kind("page_call_duration_seconds", "Histogram", "outcome", ("success", "error", "lost")),)),
    # As a service has it: most numbers are whole, a third are ratios and durations; half of the lines are buckets.
    "mix": Content(
        (
            Kind("page_messages_total", "Counter", "kind", ("text", "image", "audio", "file")),
            Kind("page_sessions_total", "Counter", "outcome", ("success", "error", "cancelled")),
            Kind("page_tokens_total", "Counter"),
            Kind("page_bytes_total", "Counter"),
            Kind("page_members", "Gauge"),
            Kind("page_queue_depth", "Gauge"),
            Kind("page_cpu_seconds_total", "Counter"),
            Kind("page_cache_usage_ratio", "Gauge"),
            Kind("page_last_seen_timestamp_seconds", "Gauge"),
            Kind("page_reply_duration_seconds", "Histogram", "outcome", ("success", "error")),
        ),
        lambda rng: rng.uniform(0, 1000) if rng.random() < 0.3 else float(rng.randrange(100_000)),
    ),
}


# --- ours -------------------------------------------------------------------------------------------------------------


def _metric(kind: Kind) -> Any:
    labels = {kind.label: rk.OneOf(*kind.values)} if kind.label else {}
    more: dict[str, Any] = {"across": "sum"} if kind.type == "Gauge" else {}
    return getattr(rk, kind.type)(kind.name, "Benchmark.", **more, **labels)


def declare(content: Content) -> type[rk.MetricSet]:
    """The content as a set."""
    return type("Page", (rk.MetricSet,), {kind.name: _metric(kind) for kind in content.kinds})


def ours(content: Content, of: int, room: int = 0) -> tuple[rk.Registry, type[rk.MetricSet]]:
    """A registry with the content. room: how many more actor names it takes."""
    settings = rk.Settings(max_actor_names=len(content.names(of)) + room)
    registry, page = rk.Registry(settings, access=rk.Access.open(), builtin=False), declare(content)
    for kind, name, combo, numbers in content.updates(of):
        cell = getattr(registry.bind(page, actor_name=name), kind.name)
        cell = cell[combo] if combo else cell
        update = {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}[kind.type]
        for number in numbers:
            getattr(cell, update)(number)
    return registry, page


# --- others -----------------------------------------------------------------------------------------------------------


def _base(kind: Kind) -> str:
    return kind.name.removesuffix("_total") if kind.type == "Counter" else kind.name


def prometheus(content: Content, of: int) -> Any:
    """The same in prometheus_client, without its _created lines, which we do not write."""
    client = peer("prometheus_client")
    client.disable_created_metrics()
    registry = client.CollectorRegistry()
    made = {
        kind: getattr(client, kind.type)(
            kind.name, "Benchmark.", kind.labels, registry=registry, **_buckets(kind, "buckets")
        )
        for kind in content.kinds
    }
    for kind, name, combo, numbers in content.updates(of):
        child = made[kind].labels(name, *combo)
        update = {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}[kind.type]
        for number in numbers:
            getattr(child, update)(number)
    return registry


def _buckets(kind: Kind, argument: str) -> dict[str, Any]:
    return {argument: list(rk.LATENCY)} if kind.type == "Histogram" else {}


def otel(content: Content, of: int, reader: Any) -> Any:
    """The same in the OpenTelemetry SDK, read by `reader`."""
    meter = peer("opentelemetry.sdk.metrics").MeterProvider(metric_readers=[reader]).get_meter("bench")
    made = {
        kind: getattr(meter, f"create_{kind.type.lower()}")(
            _base(kind), description="Benchmark.", **_buckets(kind, "explicit_bucket_boundaries_advisory")
        )
        for kind in content.kinds
    }
    for kind, name, combo, numbers in content.updates(of):
        attributes = dict(zip(kind.labels, (name, *combo), strict=True))
        update = {"Counter": "add", "Gauge": "set", "Histogram": "record"}[kind.type]
        for number in numbers:
            getattr(made[kind], update)(number, attributes)
    return reader


def without_limit(reader: Any) -> dict[str, Any]:
    """Arguments for a reader that keeps more than the SDK's 2,000 attribute sets for each instrument."""
    if "cardinality_limits" not in inspect.signature(reader).parameters:
        return {}
    metrics = peer("opentelemetry.sdk.metrics")
    kinds = (metrics.Counter, metrics.Histogram, peer("opentelemetry.sdk.metrics._internal.instrument").Gauge)
    return {"cardinality_limits": dict.fromkeys(kinds, 1_000_000)}


def otel_prometheus(content: Content, of: int) -> Any:
    """The same behind OpenTelemetry's Prometheus exporter: a prometheus_client registry."""
    exporter = peer("opentelemetry.exporter.prometheus").PrometheusMetricReader
    registry = peer("prometheus_client").CollectorRegistry()
    otel(content, of, exporter(registry=registry, **without_limit(exporter)))
    return registry


def pytheus(content: Content, of: int) -> Any:
    """The same in pytheus."""
    metrics, registry = peer("pytheus.metrics"), peer("pytheus.registry").CollectorRegistry()
    made = {
        kind: getattr(metrics, kind.type)(
            kind.name, "Benchmark.", required_labels=list(kind.labels), registry=registry, **_buckets(kind, "buckets")
        )
        for kind in content.kinds
    }
    for kind, name, combo, numbers in content.updates(of):
        child = made[kind].labels(dict(zip(kind.labels, (name, *combo), strict=True)))
        update = {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}[kind.type]
        for number in numbers:
            getattr(child, update)(number)
    return registry


def aio(content: Content, of: int) -> Any:
    """The same in aioprometheus."""
    aioprometheus = peer("aioprometheus")
    registry = aioprometheus.Registry()
    buckets = {"Histogram": {"buckets": [*rk.LATENCY, float("inf")]}}
    made = {
        kind: getattr(aioprometheus, kind.type)(
            kind.name, "Benchmark.", registry=registry, **buckets.get(kind.type, {})
        )
        for kind in content.kinds
    }
    for kind, name, combo, numbers in content.updates(of):
        update = {"Counter": "add", "Gauge": "set", "Histogram": "observe"}[kind.type]
        for number in numbers:
            getattr(made[kind], update)(dict(zip(kind.labels, (name, *combo), strict=True)), number)
    return registry


def samples(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The samples of our content on a page, as prometheus_client's parser reads them."""
    families = peer("prometheus_client.parser").text_string_to_metric_families(page.decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("page_")
    }
