"""The demo: believable, by real calls, and gone when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.demo import KINDS, WORKERS, Demo, load
from rkmetrics.model import HistogramValue, MetricFamily

NAMES = {kind.name for kind in KINDS} | {worker.name for worker in WORKERS}


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(rk.Settings(), strict=True, builtin=False)  # strict: a label nobody declared would raise


def values(registry: rk.Registry, name: str, **labels: str) -> Iterator[float]:
    for family in registry.collect({name}):
        if isinstance(family, MetricFamily) and family.name == name:
            for series in family.series():
                if labels.items() <= dict(series.labels).items():
                    yield float(series.value.count if isinstance(series.value, HistogramValue) else series.value)


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.05)


@given(st.floats(0, 1))
def test_the_load_of_a_day_is_between_nothing_and_everything(day: float) -> None:
    assert 0 < load(day) <= 1


def test_nights_are_quiet_and_days_are_busy() -> None:
    assert load(0.0) < 0.25
    assert load(0.5) > 0.75
    assert load(0.999) == pytest.approx(load(0.0), abs=0.02)


def test_every_kind_of_actor_and_worker_comes_to_life(registry: rk.Registry) -> None:
    with Demo(registry):
        wait_until(lambda: set(registry.actor_names()) == NAMES)
        wait_until(lambda: sum(values(registry, "rivetkit_actor_active_count")) > 20)
        wait_until(lambda: sum(values(registry, "rivetkit_actor_action_calls_total", outcome="success")) > 20)
        wait_until(lambda: sum(values(registry, "rkmetrics_kv_active_blocks")) > 100)
        wait_until(lambda: sum(values(registry, "rkmetrics_kv_prefix_cache_hits_total")) > 0)
        wait_until(lambda: sum(values(registry, "rkmetrics_node_responses_total", outcome="success")) > 5)
        wait_until(lambda: sum(values(registry, "rkmetrics_rpc_client_calls_total", outcome="ok", plane="tcp")) > 5)


@pytest.mark.parametrize(
    "name",
    [
        "rivetkit_actor_startup_phase_duration_seconds",
        "rivetkit_actor_user_task_duration_seconds",
        "rivetkit_actor_queue_messages_received_total",
        "rivetkit_actor_connections_total",
        "pegboard_actor_kv_operation_duration_seconds",
        "rkmetrics_worker_spec_decode_accepted_tokens_total",
        "rkmetrics_kv_last_publish_timestamp_seconds",
        "rkmetrics_rpc_server_requests_total",
        "rkmetrics_rpc_client_items_total",
        "rkmetrics_rpc_router_picks_total",
    ],
)
def test_it_updates(name: str, registry: rk.Registry) -> None:
    with Demo(registry):
        wait_until(lambda: sum(values(registry, name)) > 0)


def test_what_starts_stops_when_it_ends_and_no_gauge_is_left(registry: rk.Registry) -> None:
    with Demo(registry):
        wait_until(lambda: sum(values(registry, "rivetkit_actor_active_count")) > 10)
    started = sum(values(registry, "rivetkit_actor_started_total"))
    stopped = sum(values(registry, "rivetkit_actor_stopped_total"))
    assert (stopped, sum(values(registry, "rivetkit_actor_stopped_total", reason="lost"))) == (started, 0)
    for gauge in ("active_count", "connections_active", "queue_depth", "user_tasks_active", "shutdown_tasks_active"):
        assert set(values(registry, f"rivetkit_actor_{gauge}")) <= {0.0}
    assert "rkmetrics-demo" not in {thread.name for thread in threading.enumerate()}


def test_a_demo_that_never_began_to_count_ends_too(registry: rk.Registry) -> None:
    with Demo(registry):
        pass
    assert "rkmetrics-demo" not in {thread.name for thread in threading.enumerate()}
