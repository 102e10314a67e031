"""What a worker publishes, in the modes without NATS: gauges and pull, always."""

from __future__ import annotations

import gc
import json
import os
import threading
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.kv.plane import DOCUMENT, KvPlane


def metrics(active: int = 100, waiting: int = 0, rank: int | None = None, **spec: Any) -> rk.kv.ForwardPassMetrics:
    return rk.kv.ForwardPassMetrics(
        rk.kv.WorkerStats(
            data_parallel_rank=rank, request_active_slots=2, request_total_slots=64, num_requests_waiting=waiting
        ),
        rk.kv.KvStats(
            kv_active_blocks=active,
            kv_total_blocks=1000,
            gpu_cache_usage_perc=active / 1000,
            gpu_prefix_cache_hit_rate=0.25,
        ),
        rk.kv.SpecDecodeStats(**spec) if spec else None,
    )


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(rk.Settings(request_plane="http"), strict=True, builtin=False)


def shown(registry: rk.Registry, name: str, actor_name: str = "llm") -> float | None:
    """The value of a series; None where there is none."""
    found = [
        series.value
        for family in registry.collect({name})
        if family.name == name
        for series in family.series()  # type: ignore[union-attr]
        if dict(series.labels).get("actor_name") == actor_name
    ]
    return float(found[0]) if found else None  # type: ignore[arg-type]


def pulled(registry: rk.Registry) -> dict[tuple[int, int], dict[str, Any]]:
    document = registry.document(DOCUMENT)
    assert document is not None
    return {(w["worker_id"], w["dp_rank"]): w for w in json.loads(document.render())["workers"]}


# --- gauges -----------------------------------------------------------------------------------------------------------


def test_a_publication_is_seen_by_who_scrapes_and_by_who_polls(registry: rk.Registry) -> None:
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=7) as publisher:
        assert shown(registry, "rkmetrics_kv_last_publish_timestamp_seconds") is None
        publisher.publish(metrics(250, waiting=3))
        names = {
            "rkmetrics_kv_active_blocks": 250,
            "rkmetrics_kv_blocks": 1000,
            "rkmetrics_kv_cache_usage_ratio": 0.25,
            "rkmetrics_kv_prefix_cache_hit_ratio": 0.25,
            "rkmetrics_worker_request_active_slots": 2,
            "rkmetrics_worker_request_slots": 64,
            "rkmetrics_worker_requests_waiting": 3,
        }
        assert {name: shown(registry, name) for name in names} == names
        assert (shown(registry, "rkmetrics_kv_last_publish_timestamp_seconds") or 0) > 1_700_000_000
        worker = pulled(registry)[7, 0]
        assert (worker["data"]["kv_stats"]["kv_active_blocks"], worker["sequence"]) == (250, 1)


def test_workers_of_one_kind_add_up_and_each_takes_its_part_along(registry: rk.Registry) -> None:
    first = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
    second = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=2)
    first.publish(metrics(100))
    second.publish(metrics(700))
    assert shown(registry, "rkmetrics_kv_active_blocks") == 800
    assert shown(registry, "rkmetrics_kv_blocks") == 2000
    assert shown(registry, "rkmetrics_kv_cache_usage_ratio") == 0.7
    second.close()
    assert shown(registry, "rkmetrics_kv_active_blocks") == 100
    assert shown(registry, "rkmetrics_kv_cache_usage_ratio") == 0.1
    first.close()
    assert shown(registry, "rkmetrics_kv_active_blocks") == 0
    assert shown(registry, "rkmetrics_kv_cache_usage_ratio") is None  # of no worker, there is no ratio
    assert pulled(registry) == {}


def test_ranks_of_one_publisher_are_workers_of_their_own(registry: rk.Registry) -> None:
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1, dp_rank=5) as publisher:
        for rank in (None, 0, 1):
            publisher.publish(metrics(10, rank=rank))
        assert pulled(registry).keys() == {(1, 5), (1, 0), (1, 1)}
        assert shown(registry, "rkmetrics_kv_active_blocks") == 30
    assert shown(registry, "rkmetrics_kv_active_blocks") == 0


def test_a_publisher_that_is_collected_takes_its_worker_along(registry: rk.Registry) -> None:
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
    publisher.publish(metrics(10))
    del publisher
    gc.collect()
    assert shown(registry, "rkmetrics_kv_active_blocks") == 0
    assert pulled(registry) == {}


def test_who_names_no_worker_shares_one_name(registry: rk.Registry) -> None:
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm")
    events = rk.kv.KvEventPublisher(registry, block_size=4)
    assert publisher.worker_id == events.worker_id == KvPlane.of(registry).worker_id


def test_a_worker_has_one_publisher(registry: rk.Registry) -> None:
    first = rk.kv.WorkerMetricsPublisher(registry, actor_name="prefill")
    second = rk.kv.WorkerMetricsPublisher(registry, actor_name="decode")
    first.publish(metrics(1))
    with pytest.raises(rk.KvValueError, match="no other publisher"):
        second.publish(metrics(2))
    second.publish(metrics(3, rank=1))  # another rank is another worker
    first.close()
    second.publish(metrics(4))
    assert {key[1]: worker["data"]["kv_stats"]["kv_active_blocks"] for key, worker in pulled(registry).items()} == {
        0: 4,
        1: 3,
    }
    assert KvPlane.of(registry).kind("decode").cells.publish["error"].value == 1


@pytest.mark.parametrize("worker_id", [-1, 2**64, "7", 7.0, True])
def test_a_worker_id_is_a_u64(registry: rk.Registry, worker_id: Any) -> None:
    with pytest.raises(rk.KvValueError, match="worker_id"):
        rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=worker_id)


def test_metrics_that_cannot_be_change_nothing_and_are_counted(registry: rk.Registry) -> None:
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1) as publisher:
        publisher.publish(metrics(1))
        with pytest.raises(rk.KvValueError, match="kv_active_blocks"):
            publisher.publish(metrics(-1))
        assert shown(registry, "rkmetrics_kv_active_blocks") == 1
    cells = KvPlane.of(registry).kind("llm").cells
    assert (cells.publish["ok"].value, cells.publish["error"].value) == (1, 1)


@pytest.mark.parametrize(("meaning", "drafts", "accepted"), [("step", 30, 12), ("total", 20, 8)])
def test_speculative_decoding_counts_steps_or_totals(
    registry: rk.Registry, meaning: Any, drafts: int, accepted: int
) -> None:
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1, spec_decode=meaning) as publisher:
        for total in (10, 20):
            publisher.publish(metrics(num_drafts=total, num_accepted_tokens=total * 2 // 5))
    assert shown(registry, "rkmetrics_worker_spec_decode_drafts_total") == drafts
    assert shown(registry, "rkmetrics_worker_spec_decode_accepted_tokens_total") == accepted


def test_a_total_that_fell_began_again(registry: rk.Registry) -> None:
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1, spec_decode="total") as publisher:
        for total in (10, 15, 3):
            publisher.publish(metrics(num_drafts=total))
    assert shown(registry, "rkmetrics_worker_spec_decode_drafts_total") == 18


def test_the_prefix_cache_is_counted(registry: rk.Registry) -> None:
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1) as publisher:
        publisher.count_prefix_cache(queries=100, hits=40)
        assert shown(registry, "rkmetrics_kv_prefix_cache_queries_total") == 100
        assert shown(registry, "rkmetrics_kv_prefix_cache_hits_total") == 40
        with pytest.raises(rk.KvValueError, match="hits"):
            publisher.count_prefix_cache(queries=1, hits=2)


def test_publishing_from_many_threads_keeps_each_worker_right(registry: rk.Registry) -> None:
    publishers = [rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=n) for n in range(8)]

    def work(publisher: rk.kv.WorkerMetricsPublisher) -> None:
        for active in range(500):
            publisher.publish(metrics(active))

    threads = [threading.Thread(target=work, args=(publisher,)) for publisher in publishers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shown(registry, "rkmetrics_kv_active_blocks") == 8 * 499
    assert {worker["sequence"] for worker in pulled(registry).values()} == {500}


def test_each_rank_has_publications_of_its_own_to_count(registry: rk.Registry) -> None:
    """Else who polls counts those of the other ranks as missed."""
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1) as publisher:
        for rank in (0, 1, 0, 1, 0):
            publisher.publish(metrics(10, rank=rank))
        assert {key: worker["sequence"] for key, worker in pulled(registry).items()} == {(1, 0): 3, (1, 1): 2}


def test_what_spec_decode_counts_is_each_publishers_own(registry: rk.Registry) -> None:
    totals = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1, spec_decode="total")
    steps = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=2)
    for total in (10, 20):
        totals.publish(metrics(num_drafts=total))
        steps.publish(metrics(num_drafts=1))
    assert shown(registry, "rkmetrics_worker_spec_decode_drafts_total") == 22


def test_after_the_end_of_a_worker_nobody_hears_of_it(registry: rk.Registry) -> None:
    """An engine's callback may come late."""
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
    publisher.publish(metrics(10))
    publisher.close()
    publisher.publish(metrics(20, rank=1))
    assert shown(registry, "rkmetrics_kv_active_blocks") == 0
    assert pulled(registry) == {}
    assert KvPlane.of(registry).kind("llm").cells.publish["ok"].value == 1


def test_a_worker_that_ends_while_it_publishes_leaves_nothing_behind(registry: rk.Registry) -> None:
    for number in range(20):
        publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=number)
        began = threading.Event()

        def work(publisher: rk.kv.WorkerMetricsPublisher = publisher, began: threading.Event = began) -> None:
            for rank in range(200):
                publisher.publish(metrics(1, rank=rank))
                began.set()

        thread = threading.Thread(target=work)
        thread.start()
        began.wait()
        publisher.close()
        thread.join()
    assert shown(registry, "rkmetrics_kv_active_blocks") == 0
    assert pulled(registry) == {}


@pytest.mark.parametrize("dp_rank", [-1, 2**32, "0", 1.0, True])
def test_a_rank_is_a_u32(registry: rk.Registry, dp_rank: Any) -> None:
    """One that is not would make a page that nobody can read, of all workers of the process."""
    with pytest.raises(rk.KvValueError, match="dp_rank"):
        rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", dp_rank=dp_rank)
    with pytest.raises(rk.KvValueError, match="dp_rank"):
        rk.kv.KvEventPublisher(registry, block_size=4, dp_rank=dp_rank)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_none_of_its_parents_workers(registry: rk.Registry) -> None:
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm")
    publisher.publish(metrics(10))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        here = [
            shown(registry, "rkmetrics_kv_active_blocks"),
            KvPlane.of(registry).worker_id == publisher.worker_id,
            len(pulled(registry)),
        ]
        os.write(writer, json.dumps(here).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert json.loads(os.read(reader, 100)) == [0, False, 0]
    assert len(pulled(registry)) == 1
    assert shown(registry, "rkmetrics_kv_active_blocks") == 10
    for end in (reader, writer):
        os.close(end)


# --- events -----------------------------------------------------------------------------------------------------------


def test_events_are_discarded_without_being_made(registry: rk.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """http mode needs no hashes, so neither the package that makes them."""
    monkeypatch.setattr("rkmetrics.kv.publisher.stored", None)
    with rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4) as publisher:
        publisher.publish_stored([1, 2, 3, 4], [9])
        publisher.publish_removed([9])
        publisher.publish_cleared()
    assert sum(cell.value for cell in KvPlane.of(registry)._cells.events.values()) == 3
    assert KvPlane.of(registry)._cells.events["discarded"].value == 3


@pytest.mark.parametrize("block_size", [0, -1, 2.5])
def test_a_block_has_tokens(registry: rk.Registry, block_size: Any) -> None:
    with pytest.raises(rk.KvValueError, match="block_size"):
        rk.kv.KvEventPublisher(registry, block_size=block_size)


def test_the_oldest_wire_has_no_local_indexer() -> None:
    registry = rk.Registry(rk.Settings(request_plane="http", wire="0.7"), builtin=False)
    with pytest.raises(rk.KvValueError, match="local_indexer"):
        rk.kv.KvEventPublisher(registry, block_size=4, local_indexer=True)


@pytest.mark.parametrize("component", ["a.b", "*", "", "a b"])
def test_a_component_is_one_part_of_a_subject(registry: rk.Registry, component: str) -> None:
    with pytest.raises(rk.KvValueError, match="component"):
        rk.kv.KvEventPublisher(registry, block_size=4, component=component)


# --- without the client of NATS ---------------------------------------------------------------------------------------


def test_where_nats_is_wanted_its_client_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name == "nats" or name.startswith("nats.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nats", None)
    registry = rk.Registry(rk.Settings(request_plane="nats"), builtin=False)
    with pytest.raises(rk.MissingExtraError, match=r"rkmetrics\[nats\]"):
        rk.kv.WorkerMetricsPublisher(registry, actor_name="llm")


def test_a_registry_with_a_plane_is_freed(registry: rk.Registry) -> None:
    import weakref

    mine = rk.Registry(rk.Settings(request_plane="http"), builtin=False)
    rk.kv.WorkerMetricsPublisher(mine, actor_name="llm").publish(metrics())
    gone = weakref.ref(mine)
    del mine
    gc.collect()
    assert gone() is None
