"""Names that other programs know are theirs, to the letter; and what ships with the process keeps our own rules."""

from __future__ import annotations

import pytest

from rkmetrics.catalogue.kv import KvCache
from rkmetrics.catalogue.node import Node, Outcome
from rkmetrics.catalogue.runtime import Process, Runtime
from rkmetrics.metricset import MetricSet

# Prometheus, "Writing client libraries", section "Process metrics"; process_threads as the Rust client has it.
PROCESS = {
    "process_cpu_seconds_total": ("counter", "seconds"),
    "process_resident_memory_bytes": ("gauge", "bytes"),
    "process_virtual_memory_bytes": ("gauge", "bytes"),
    "process_open_fds": ("gauge", ""),
    "process_max_fds": ("gauge", ""),
    "process_threads": ("gauge", ""),
    "process_start_time_seconds": ("gauge", "seconds"),
}


def test_process_metrics_have_the_names_and_types_of_every_client() -> None:
    assert {d.name: (d.type.value, d.unit) for d in Process.definitions()} == PROCESS


@pytest.mark.parametrize(
    ("known", "prefixes"),
    [
        (Process, ("process_",)),
        (Runtime, ("rkmetrics_",)),
        (Node, ("rkmetrics_node_",)),
        (KvCache, ("rkmetrics_kv_", "rkmetrics_worker_")),
    ],
)
def test_each_set_keeps_to_its_prefix(known: type[MetricSet], prefixes: tuple[str, ...]) -> None:
    assert [d.name for d in known.definitions() if not d.name.startswith(prefixes)] == []


def test_only_the_kv_set_has_actor_names() -> None:
    assert [known.per_actor for known in (Process, Runtime, Node, KvCache)] == [False, False, False, True]


def test_a_response_ends_in_one_of_four_ways() -> None:
    assert [outcome.value for outcome in Outcome] == ["success", "client_error", "server_error", "aborted"]


def test_usage_comes_with_the_size_of_its_pool() -> None:
    """A mean of ratios weighs an idle worker like a busy one, so that sums have to be there as well."""
    names = {d.name for d in KvCache.definitions()}
    pools = {
        "rkmetrics_kv_active_blocks": "rkmetrics_kv_blocks",
        "rkmetrics_worker_request_active_slots": "rkmetrics_worker_request_slots",
        "rkmetrics_kv_prefix_cache_hits_total": "rkmetrics_kv_prefix_cache_queries_total",
    }
    assert {*pools, *pools.values()} <= names


def test_a_kind_of_worker_costs_few_series() -> None:
    assert sum(d.worst_combos for d in KvCache.definitions()) <= 20
