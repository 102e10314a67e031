"""One reading under three names: the cells of Node, the JSON, the page of the discovery protocol."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable

import pytest

from rkmetrics.catalogue.node import Node, Outcome
from rkmetrics.collectors import gpu
from rkmetrics.collectors.vitals import Vitals, read, uptime_seconds
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings

# "Minimalist Service Discovery", section "GET /metrics (JSON vitals - human readable)".
EXAMPLE = {
    "ready": True,
    "requests_in_progress": 42,
    "cpu_usage": 35.2,
    "memory_usage": 67.8,
    "gpu_usage": 0.0,
    "failed_responses": 15,
    "connected_peers": 3,
    "backoff_requests": 0,
    "uptime_seconds": 86400,
    "version": "1.0.0",
}


def test_the_json_has_the_protocol_s_fields_order_and_types(registry: Registry) -> None:
    vitals = json.loads(json.dumps(dataclasses.asdict(registry.vitals())))
    assert list(vitals) == list(EXAMPLE)
    assert [type(value) for value in vitals.values()] == [type(value) for value in EXAMPLE.values()]


def test_readiness_is_the_answer_of_health(registry: Registry, look: Callable[..., object]) -> None:
    shown = [(registry.vitals().ready, look("rkmetrics_node_ready"))]
    for move in (registry.health.start, registry.health.begin_drain):
        move()
        shown.append((registry.vitals().ready, look("rkmetrics_node_ready")))
    assert shown == [(False, 0), (True, 1), (False, 0)]


def test_what_the_application_keeps_is_told(registry: Registry) -> None:
    node = registry.node
    node.requests_in_progress.inc(42)
    node.connected_peers.set(3)
    node.backoff_requests.set(7)
    for outcome, count in zip(Outcome, (1000, 100, 15, 10), strict=True):
        node.responses[outcome].inc(count)
    vitals = registry.vitals()
    assert (vitals.requests_in_progress, vitals.connected_peers, vitals.backoff_requests) == (42, 3, 7)
    assert vitals.failed_responses == 15


def test_what_nobody_keeps_is_zero_in_json_and_absent_from_the_metrics(
    registry: Registry, look: Callable[..., object]
) -> None:
    vitals = registry.vitals()
    assert (vitals.requests_in_progress, vitals.connected_peers, vitals.backoff_requests) == (0, 0, 0)
    assert look("rkmetrics_node_connected_peers") is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_zero_in_the_vitals(registry: Registry, value: float) -> None:
    node = registry.node
    for gauge in (node.requests_in_progress, node.connected_peers, node.backoff_requests):
        gauge.set(value)
    for _ in range(2):
        node.responses[Outcome.SERVER_ERROR].inc(1.7e308)
    vitals = registry.vitals()
    json.dumps(dataclasses.asdict(vitals), allow_nan=False)
    assert (vitals.requests_in_progress, vitals.connected_peers, vitals.backoff_requests) == (0, 0, 0)
    assert vitals.failed_responses == 0


def test_a_usage_that_is_not_finite_is_zero(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may say anything."""
    for usage in (math.nan, math.inf, 1e308):
        monkeypatch.setattr(gpu, "usage", lambda usage=usage: usage)
        assert registry.vitals().gpu_usage == 0


def test_json_and_metrics_say_the_same(registry: Registry) -> None:
    vitals, node = registry.vitals(), registry.bind(Node)
    assert vitals.cpu_usage == round(100 * (node.cpu_usage.value or 0), 2)
    assert vitals.memory_usage == round(100 * (node.memory_usage.value or 0), 2)
    assert vitals.uptime_seconds == int(node.uptime.value or 0)


def test_usage_is_a_percentage_from_the_first_reading_on(registry: Registry) -> None:
    vitals = registry.vitals()
    assert 0 <= vitals.cpu_usage <= 100
    assert 0 < vitals.memory_usage < 100


def test_usage_is_measured_once_a_second_at_most(registry: Registry) -> None:
    shown = [registry.vitals() for _ in range(100)]
    assert len({(vitals.cpu_usage, vitals.memory_usage) for vitals in shown}) <= 2


def test_readings_need_no_collection_before() -> None:
    bare = Registry(Settings(), builtin=False)
    assert isinstance(read(bare), Vitals)


def test_uptime_only_rises() -> None:
    first = uptime_seconds()
    assert 0 < first < uptime_seconds()


def test_a_step_of_the_clock_does_not_change_uptime(script: Callable[..., str]) -> None:
    out = script("""
import time
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings
registry, true = Registry(Settings()), time.time
uptimes = [registry.vitals().uptime_seconds]
for step in (3600, -3600):
    time.time = lambda: true() + step
    uptimes.append(registry.vitals().uptime_seconds)
print(max(uptimes) < 600, min(uptimes) >= 0)
""")
    assert out.split() == ["True", "True"]


def test_two_registries_share_one_measurement() -> None:
    first, second = Registry(Settings()), Registry(Settings())
    one, other = first.vitals(), second.vitals()
    if time.monotonic() and one.memory_usage == other.memory_usage:  # else a second began between the two
        assert one.cpu_usage == other.cpu_usage
