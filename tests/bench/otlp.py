"""A push: 10,000 points collected and encoded as OTLP, from our snapshot and from OpenTelemetry's own SDK."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tests.bench import page
from tests.bench.base import Case, Scale, cpu_seconds, interleave
from tests.bench.peers import peer, present
from tests.bench.updates import OURS

__all__ = ["CASES"]


def _ours(content: page.Content, names: int) -> Callable[[], bytes]:
    translate = peer("rkmetrics.bridges.otlp.translate")
    encode = peer("opentelemetry.exporter.otlp.proto.common.metrics_encoder").encode_metrics
    resource = peer("opentelemetry.sdk.resources").Resource.create()
    scope = peer("opentelemetry.sdk.util.instrumentation").InstrumentationScope("bench")
    registry, _ = page.ours(content, names)

    def push() -> bytes:
        now = time.time_ns()
        metrics = [each for family in registry.collect() for each in translate.metrics_of(family, now, now)]
        made: bytes = encode(translate.envelope(metrics, resource, scope)).SerializeToString()
        return made

    return push


def _theirs(content: page.Content, names: int) -> Callable[[], bytes]:
    encode = peer("opentelemetry.exporter.otlp.proto.common.metrics_encoder").encode_metrics
    in_memory = peer("opentelemetry.sdk.metrics.export").InMemoryMetricReader
    reader = page.otel(content, names, in_memory(**page.without_limit(in_memory)))

    def push() -> bytes:
        made: bytes = encode(reader.get_metrics_data()).SerializeToString()
        return made

    return push


def measure_push(scale: Scale) -> Mapping[str, Sequence[float]]:
    """Milliseconds of one push, without the network."""
    content = page.CONTENTS["counters"]
    pushes = present(
        {OURS: lambda: _ours(content, scale.names), "opentelemetry": lambda: _theirs(content, scale.names)}
    )
    return interleave(scale.rounds, {name: partial(_milliseconds, push) for name, push in pushes.items()})


def _milliseconds(push: Callable[[], bytes]) -> float:
    return cpu_seconds(push) * 1e3


CASES = (Case("otlp", "OTLP: collect and encode 10,000 counter points", "ms", measure_push),)
