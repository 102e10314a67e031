"""What a counter series costs, and what names cost that nobody declared. Each figure comes from a fresh interpreter.

tracemalloc counts what Python allocates; RSS is what the system gave, and includes what its allocator keeps. Cells "in
hand" are all taken out and kept, with a list to hold them; otherwise a series exists in its block only.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rkmetrics as rk
from rkmetrics.exposition.text import TEXT
from tests.bench import page
from tests.bench.base import Case, Scale, Skipped
from tests.bench.peers import peer

__all__ = ["CASES", "child"]

# Series of one actor name: (label values of the metric, metrics). One is the worst there is: a set of a single counter.
SHAPES: Mapping[str, tuple[int, int]] = {"50": (50, 1), "10": (5, 2), "1": (0, 1)}


def _kinds(shape: str) -> tuple[page.Kind, ...]:
    values, metrics = SHAPES[shape]
    label = "kind" if values else ""
    words = tuple(f"kind_{i}" for i in range(values))
    return tuple(page.Kind(f"page_messages_{i}_total", "Counter", label, words) for i in range(metrics))


def _rss() -> int:
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


def _used() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else _rss()


# --- series -----------------------------------------------------------------------------------------------------------


def _ours(content: page.Content, series: int, in_hand: bool) -> Any:
    per_name = sum(kind.lines for kind in content.kinds)
    names = [f"actor-{i:05}" for i in range(series // per_name)]
    page_set = page.declare(content)
    registry = rk.Registry(rk.Settings(max_actor_names=len(names)), builtin=False)
    TEXT.encode(registry.collect())  # what a registry has before the first series is no part of one
    before = _used()
    held: list[Any] = []
    for name in names:
        bound = registry.bind(page_set, actor_name=name)
        for kind in content.kinds if in_hand else ():
            cells = getattr(bound, kind.name)
            held += [cells[combo] for combo in kind.combos] if kind.label else [cells]
    TEXT.encode(registry.collect())
    used = _used() - before
    return used, registry, held


def _prometheus(content: page.Content, series: int, _: bool) -> Any:
    client = peer("prometheus_client")
    client.disable_created_metrics()
    per_name = sum(kind.lines for kind in content.kinds)
    registry = client.CollectorRegistry()
    made = {kind: client.Counter(kind.name, "x", kind.labels, registry=registry) for kind in content.kinds}
    client.generate_latest(registry)
    before = _used()
    held = [
        made[kind].labels(f"actor-{i:05}", *combo)
        for i in range(series // per_name)
        for kind in content.kinds
        for combo in kind.combos
    ]
    client.generate_latest(registry)
    return _used() - before, registry, held


def _otel(content: page.Content, series: int, _: bool) -> Any:
    in_memory = peer("opentelemetry.sdk.metrics.export").InMemoryMetricReader
    reader = in_memory(**page.without_limit(in_memory))
    meter = peer("opentelemetry.sdk.metrics").MeterProvider(metric_readers=[reader]).get_meter("bench")
    per_name = sum(kind.lines for kind in content.kinds)
    made = {kind: meter.create_counter(kind.name) for kind in content.kinds}
    before = _used()
    for i in range(series // per_name):
        for kind in content.kinds:
            for combo in kind.combos:
                made[kind].add(1, dict(zip(kind.labels, (f"actor-{i:05}", *combo), strict=True)))
    reader.get_metrics_data()
    return _used() - before, reader, made


_LIBRARIES: Mapping[str, Callable[[page.Content, int, bool], Any]] = {
    "rkmetrics": _ours,
    "prometheus_client": _prometheus,
    "opentelemetry": _otel,
}


def _series(library: str, shape: str, in_hand: str, tool: str, series: str) -> float:
    content = page.Content(_kinds(shape))
    run, in_all = _LIBRARIES[library], int(series)
    run(content, max(in_all // 50, 50), in_hand == "in hand")  # what is imported and cached at first is no series
    if tool == "tracemalloc":
        tracemalloc.start()
    used, *_ = kept = run(content, in_all, in_hand == "in hand")
    assert kept
    return float(used / in_all)


# --- bogus names ------------------------------------------------------------------------------------------------------


class Chat(rk.MetricSet):
    messages = rk.Counter("bench_offered_total", "Messages.", kind=rk.OneOf("text", "image"))


def _bogus_names(registry: rk.Registry, first: int, last: int) -> None:
    for i in range(first, last):
        registry.bind(Chat, actor_name=f"bogus-{i}").messages["text"].inc()


def _bogus_values(registry: rk.Registry, first: int, last: int) -> None:
    cells = registry.bind(Chat, actor_name="lobby").messages
    for i in range(first, last):
        cells[f"bogus-{i}"].inc()


_OFFERS = {"actor names": _bogus_names, "label values": _bogus_values}


def _bogus(kind: str, offered: str) -> float:
    """Megabytes that the process grew by."""
    registry, count = rk.Registry(rk.Settings(), builtin=False), int(offered)
    warm = min(10_000, count // 10)
    _OFFERS[kind](registry, 0, warm)
    before = _used()
    _OFFERS[kind](registry, warm, warm + count)
    TEXT.encode(registry.collect())
    return (_used() - before) / 1e6


def _bogus_prometheus(offered: str) -> float:
    """The same, where any value makes a series."""
    client = peer("prometheus_client")
    counter = client.Counter("x", "x", ["actor_name", "kind"], registry=client.CollectorRegistry())
    before = _used()
    for i in range(int(offered)):
        counter.labels(f"bogus-{i}", "text").inc()
    return (_used() - before) / 1e6


# --- children ---------------------------------------------------------------------------------------------------------

_CHILDREN: Mapping[str, Callable[..., float]] = {
    "series": _series,
    "bogus": _bogus,
    "bogus prometheus": _bogus_prometheus,
}


def child(arguments: Sequence[str]) -> float:
    """What an interpreter of its own measures: a row of the table above, and its arguments."""
    return _CHILDREN[arguments[0]](*arguments[1:])


def _in_child(*arguments: str) -> float:
    command = [sys.executable, "-m", "tests.bench", "--measure", json.dumps(arguments)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(f"{arguments}: {out.stderr}")
    return float(json.loads(out.stdout))


def measure_series(tool: str) -> Callable[[Scale], Mapping[str, Sequence[float]]]:
    """Bytes of each counter series, after a scrape."""

    def measure(scale: Scale) -> Mapping[str, Sequence[float]]:
        found: dict[str, list[float]] = {}
        for shape in SHAPES:
            for library in _LIBRARIES:
                for state in ("", "in hand") if library == "rkmetrics" else ("",):
                    try:
                        _require(library)
                    except Skipped:
                        continue
                    name = f"{library}, {shape} per actor name" + (f", {state}" if state else "")
                    found[name] = [_in_child("series", library, shape, state, tool, str(scale.series))]
        return found

    return measure


def _require(library: str) -> None:
    peer({"opentelemetry": "opentelemetry.sdk.metrics"}.get(library, library))


def measure_bogus(scale: Scale) -> Mapping[str, Sequence[float]]:
    """Growth of the process while names are offered that nobody declared."""
    found = {f"{scale.bogus:,} {kind}": [_in_child("bogus", kind, str(scale.bogus))] for kind in _OFFERS}
    few = min(scale.bogus, 200_000)
    found[f"prometheus_client, {few:,} label values"] = [_in_child("bogus prometheus", str(few))]
    return found


CASES = (
    Case("memory", "memory of a counter series, tracemalloc", "bytes", measure_series("tracemalloc")),
    Case("memory rss", "memory of a counter series, RSS", "bytes", measure_series("rss")),
    Case("bogus", "growth under undeclared names", "MB", measure_bogus, note="RSS"),
)
