"""What is known of workers elsewhere: the newest word of each source, ages, gaps, staleness, and who is told."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.kv import ReportSource
from rkmetrics.kv.aggregator import KvMetricsAggregator, KvTotal, KvUpdates, WorkerState
from rkmetrics.kv.base import ForwardPassMetrics, KvReport, KvStats, WorkerKey, WorkerStats
from rkmetrics.model import MetricFamily
from rkmetrics.settings import Settings

PUSH, PULL = ReportSource.PUSH, ReportSource.PULL
ONE, TWO = WorkerKey(1), WorkerKey(2)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def metrics(active: int, total: int = 100) -> ForwardPassMetrics:
    return ForwardPassMetrics(
        WorkerStats(request_active_slots=active // 10, request_total_slots=16, num_requests_waiting=1),
        KvStats(
            kv_active_blocks=active, kv_total_blocks=total, gpu_cache_usage_perc=0.5, gpu_prefix_cache_hit_rate=0.25
        ),
    )


def full(active: int, key: WorkerKey = ONE, *, total: int = 100, **fields: Any) -> KvReport:
    return KvReport(key, active, metrics(active, total), **fields)


def part(active: int, key: WorkerKey = ONE, **fields: Any) -> KvReport:
    return KvReport(key, active, **fields)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def aggregator(clock: Clock) -> KvMetricsAggregator:
    return KvMetricsAggregator(clock=clock)


def known(aggregator: KvMetricsAggregator, key: WorkerKey = ONE) -> WorkerState:
    return aggregator.workers()[key]


# --- states, ages, staleness ------------------------------------------------------------------------------------------


def test_the_latest_report_of_a_worker_is_its_state(aggregator: KvMetricsAggregator, clock: Clock) -> None:
    aggregator.report(full(10, sequence=1, incarnation="a", age_seconds=0.5), PULL, 1.0)
    clock.now += 0.25
    assert known(aggregator) == WorkerState(
        ONE, 10, 0.75, metrics(10), 0.75, None, 0.25, stale=False, missed=0, source=PULL, sequence=1, incarnation="a"
    )
    aggregator.report(full(20, sequence=2, incarnation="a"), PULL, 1.0)
    assert (known(aggregator).active_blocks, known(aggregator).age_seconds) == (20, 0.0)


def test_a_snapshot_stays_as_it_is(aggregator: KvMetricsAggregator, clock: Clock) -> None:
    aggregator.report(full(10), PULL, 1.0)
    before = known(aggregator)
    clock.now += 5
    aggregator.report(full(20), PULL, 1.0)
    assert (before.active_blocks, before.age_seconds, before.stale) == (10, 0.0, False)


def test_a_silent_worker_is_stale_and_stays(aggregator: KvMetricsAggregator, clock: Clock) -> None:
    aggregator.report(full(10), PULL, 1.0)
    clock.now += 1.0
    assert not known(aggregator).stale
    clock.now += 3600
    assert (known(aggregator).stale, known(aggregator).age_seconds) == (True, 3601.0)
    aggregator.report(full(11), PULL, 1.0)
    assert not known(aggregator).stale


def test_an_unchanged_answer_keeps_a_worker_fresh_while_its_state_grows_old(
    aggregator: KvMetricsAggregator, clock: Clock
) -> None:
    aggregator.report(full(10), PULL, 1.0)
    aggregator.report(full(10, TWO), PULL, 1.0)
    for _ in range(10):
        clock.now += 0.9
        assert aggregator.heard(ONE)
        assert aggregator.heard_all([ONE, TWO])
    state = known(aggregator, TWO)
    assert (state.stale, state.heard_seconds, round(state.age_seconds, 6)) == (False, 0.0, 9.0)


def test_whoever_is_not_known_is_not_heard(aggregator: KvMetricsAggregator) -> None:
    aggregator.report(full(10), PULL, 1.0)
    assert not aggregator.heard(TWO)
    assert not aggregator.heard_all([ONE, TWO])
    assert aggregator.heard_all([])


def test_a_worker_that_left_is_forgotten_with_all_its_ranks_or_one(aggregator: KvMetricsAggregator) -> None:
    for rank in range(3):
        aggregator.report(full(10, WorkerKey(1, rank)), PULL, 1.0)
    aggregator.report(full(10, TWO), PULL, 1.0)
    assert aggregator.forget(1, 2)
    assert not aggregator.forget(1, 2)
    assert set(aggregator.workers()) == {WorkerKey(1, 0), WorkerKey(1, 1), TWO}
    assert aggregator.forget(1)
    assert not aggregator.forget(1)
    assert set(aggregator.workers()) == {TWO}


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_part_leaves_the_rest_as_the_last_full_report_said_it(aggregator: KvMetricsAggregator, clock: Clock) -> None:
    aggregator.report(full(10), PULL, 1.0)
    clock.now += 0.5
    aggregator.report(part(30, active_prefill_tokens=7), PUSH, 2.0)
    state = known(aggregator)
    assert (state.active_blocks, state.age_seconds, state.source) == (30, 0.0, PUSH)
    assert (state.metrics, state.metrics_age_seconds) == (metrics(10), 0.5)
    assert state.active_prefill_tokens == 7


def test_a_full_report_of_an_older_state_does_not_take_a_newer_word_away(
    aggregator: KvMetricsAggregator, clock: Clock
) -> None:
    aggregator.report(part(30), PUSH, 1.0)
    aggregator.report(full(10, age_seconds=0.5), PULL, 1.0)
    state = known(aggregator)
    assert (state.active_blocks, state.age_seconds, state.source) == (30, 0.0, PUSH)
    assert (state.metrics, state.metrics_age_seconds) == (metrics(10), 0.5)
    aggregator.report(full(5, age_seconds=0.75), PULL, 1.0)  # of another poller, and late
    assert known(aggregator).metrics == metrics(10)


def test_who_sends_parts_only_has_no_metrics(aggregator: KvMetricsAggregator) -> None:
    aggregator.report(part(30), PUSH, 1.0)
    state = known(aggregator)
    assert (state.metrics, state.metrics_age_seconds, state.active_prefill_tokens) == (None, None, None)


def test_a_restarted_worker_keeps_nothing_of_its_life_before(aggregator: KvMetricsAggregator) -> None:
    aggregator.report(full(10, sequence=9, incarnation="a"), PUSH, 1.0)
    aggregator.report(part(3, sequence=1, incarnation="b"), PUSH, 1.0)
    assert known(aggregator).metrics is None


# --- gaps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "missed"),
    [
        ([("a", 1), ("a", 2), ("a", 3)], 0),
        ([("a", 5)], 0),  # nobody knows what was before the first
        ([("a", 1), ("a", 5)], 3),
        ([("a", 1), ("a", 3), ("a", 3), ("a", 6)], 3),
        ([("a", 90), ("b", 7)], 0),  # begun again
        ([("a", 1), ("a", 3), ("b", 1), ("b", 3)], 2),
        ([("", 90), ("", 1), ("", 2)], 0),  # begun again, on a wire without incarnation
        ([("a", None), ("a", 5), ("a", None), ("a", 9)], 0),
    ],
)
def test_publications_that_were_never_seen_are_counted_by_sequence(
    aggregator: KvMetricsAggregator, said: list[tuple[str, int | None]], missed: int
) -> None:
    for number, (incarnation, sequence) in enumerate(said):
        aggregator.report(full(number, sequence=sequence, incarnation=incarnation), PULL, 1.0)
    assert known(aggregator).missed == missed


def test_each_source_has_sequences_of_its_own(aggregator: KvMetricsAggregator) -> None:
    for number in range(1, 4):
        aggregator.report(full(number, sequence=number, incarnation="a"), PULL, 1.0)
        aggregator.report(part(number, sequence=100 * number), PUSH, 1.0)
    assert known(aggregator).missed == 99 + 99


def test_the_same_publication_again_is_a_sign_of_life_and_no_news(
    aggregator: KvMetricsAggregator, clock: Clock
) -> None:
    told: list[WorkerState] = []
    aggregator.on_update(told.append)
    for _ in range(3):
        aggregator.report(full(10, sequence=4, incarnation="a"), PULL, 1.0)
        clock.now += 0.5
    assert len(told) == 1
    assert (known(aggregator).heard_seconds, known(aggregator).age_seconds) == (0.5, 1.5)


# --- totals -----------------------------------------------------------------------------------------------------------


def test_the_total_is_that_of_the_fresh_and_usage_a_ratio_of_sums(
    aggregator: KvMetricsAggregator, clock: Clock
) -> None:
    aggregator.report(full(90, total=100), PULL, 1.0)
    clock.now += 2
    aggregator.report(full(10, TWO, total=300), PULL, 1.0)
    aggregator.report(full(50, WorkerKey(3), total=100), PULL, 1.0)
    assert aggregator.total() == KvTotal(2, 2, 60, 400, 6, 32, 2, 0.15)
    assert aggregator.total(include_stale=True) == KvTotal(3, 3, 150, 500, 15, 48, 3, 0.3)


def test_what_no_wire_carried_is_none(aggregator: KvMetricsAggregator) -> None:
    assert aggregator.total() == KvTotal(0, 0, 0, None, None, None, None, None)
    aggregator.report(part(30), PUSH, 1.0)
    assert aggregator.total() == KvTotal(1, 0, 30, None, None, None, None, None)


def test_usage_is_that_of_workers_whose_blocks_are_known(aggregator: KvMetricsAggregator) -> None:
    aggregator.report(part(30), PUSH, 1.0)
    aggregator.report(full(50, TWO), PULL, 1.0)
    total = aggregator.total()
    assert (total.workers, total.full_workers, total.active_blocks, total.total_blocks) == (2, 1, 80, 100)
    assert total.usage == 0.5


def test_usage_of_no_blocks_is_none(aggregator: KvMetricsAggregator) -> None:
    aggregator.report(full(0, total=0), PULL, 1.0)
    assert aggregator.total().usage is None


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_workers_past_the_limit_are_refused_and_said_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    aggregator = KvMetricsAggregator(clock=clock, max_workers=2)
    for worker in range(10):
        aggregator.report(full(1, WorkerKey(worker)), PUSH, 1.0)
    aggregator.report(full(2, WorkerKey(0)), PUSH, 1.0)
    assert (len(aggregator), aggregator.refused) == (2, 8)
    assert known(aggregator, WorkerKey(0)).active_blocks == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    aggregator.forget(0)
    aggregator.report(full(1, WorkerKey(7)), PUSH, 1.0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


# --- listeners --------------------------------------------------------------------------------------------------------


def test_listeners_are_told_until_they_unsubscribe(aggregator: KvMetricsAggregator) -> None:
    told: list[int] = []
    unsubscribe = aggregator.on_update(lambda state: told.append(state.active_blocks))
    aggregator.report(full(1), PULL, 1.0)
    aggregator.heard(ONE)
    unsubscribe()
    unsubscribe()
    aggregator.report(full(2), PULL, 1.0)
    assert told == [1]


def test_a_listener_that_raises_is_logged_once_and_harms_nobody(
    aggregator: KvMetricsAggregator, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []

    def fail(state: WorkerState) -> None:
        if state.active_blocks < 10:
            raise RuntimeError("the listener")

    aggregator.on_update(fail)
    aggregator.on_update(lambda state: told.append(state.active_blocks))
    for active in (1, 2, 3, 10, 4):
        aggregator.report(full(active), PULL, 1.0)
    assert told == [1, 2, 3, 10, 4]
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2  # it began to fail twice


def test_a_listener_may_use_the_aggregator(aggregator: KvMetricsAggregator) -> None:
    """No lock is held meanwhile."""

    def ask(state: WorkerState) -> None:
        if state.key == ONE:
            aggregator.report(full(5, TWO), PULL, 1.0)
            aggregator.forget(1)

    aggregator.on_update(ask)
    aggregator.report(full(1), PULL, 1.0)
    assert set(aggregator.workers()) == {TWO}


# --- iteration --------------------------------------------------------------------------------------------------------


async def take(updates: AsyncIterator[WorkerState], count: int) -> list[tuple[int, int]]:
    async with asyncio.timeout(20):
        states = [await anext(updates) for _ in range(count)]
    return [(state.key.worker_id, state.active_blocks) for state in states]


async def test_iteration_begins_with_who_is_known_and_goes_on_with_news(aggregator: KvMetricsAggregator) -> None:
    aggregator.report(full(1), PULL, 1.0)
    updates = aggregator.updates()
    assert await take(updates, 1) == [(1, 1)]
    aggregator.report(full(2), PULL, 1.0)
    aggregator.report(full(3, TWO), PULL, 1.0)
    assert await take(updates, 2) == [(1, 2), (2, 3)]


async def test_a_slow_consumer_finds_the_latest_of_each_worker_once(aggregator: KvMetricsAggregator) -> None:
    updates = aggregator.updates()
    for active in range(1000):
        aggregator.report(full(active, WorkerKey(active % 3)), PULL, 1.0)
    assert len(updates.pending) == 3
    assert sorted(await take(updates, 3)) == [(0, 999), (1, 997), (2, 998)]


async def test_a_worker_that_left_meanwhile_is_passed_over(aggregator: KvMetricsAggregator) -> None:
    updates = aggregator.updates()
    aggregator.report(full(1), PULL, 1.0)
    aggregator.report(full(2, TWO), PULL, 1.0)
    aggregator.forget(1)
    assert await take(updates, 1) == [(2, 2)]


async def test_reports_of_other_threads_wake_the_consumer(aggregator: KvMetricsAggregator) -> None:
    def report(worker: int) -> None:
        for active in range(1, 501):
            aggregator.report(full(active, WorkerKey(worker), sequence=active), PUSH, 1.0)

    threads = [threading.Thread(target=report, args=(worker,)) for worker in range(4)]
    latest: dict[int, int] = {}
    for thread in threads:
        thread.start()
    async with asyncio.timeout(20):
        async for state in aggregator.updates():
            latest[state.key.worker_id] = state.active_blocks
            if list(latest.values()) == [500] * 4:
                break
    for thread in threads:
        thread.join()
    assert all(state.missed == 0 for state in aggregator.workers().values())


async def test_two_consumers_get_everything_each(aggregator: KvMetricsAggregator) -> None:
    first, second = aggregator.updates(), aggregator.updates()
    aggregator.report(full(1), PULL, 1.0)
    assert await take(first, 1) == await take(second, 1) == [(1, 1)]


@pytest.mark.parametrize("end", ["aggregator", "aggregator, in a thread", "iterator"])
async def test_iteration_ends_with_the_aggregator_or_the_iterator(aggregator: KvMetricsAggregator, end: str) -> None:
    updates = aggregator.updates()

    async def consume() -> int:
        return len([state async for state in updates])

    aggregator.report(full(1), PULL, 1.0)
    task = asyncio.create_task(consume())
    await asyncio.sleep(0.01)
    if end == "iterator":
        await updates.aclose()
    elif end == "aggregator":
        aggregator.close()
    else:
        await asyncio.to_thread(aggregator.close)
    async with asyncio.timeout(20):
        assert await task == 1
    aggregator.report(full(2), PULL, 1.0)
    with pytest.raises(StopAsyncIteration):
        await anext(updates)


async def test_an_iterator_that_was_left_is_let_go(aggregator: KvMetricsAggregator) -> None:
    aggregator.report(full(1), PULL, 1.0)
    left: weakref.ref[KvUpdates] = weakref.ref(updates := aggregator.updates())
    async for _ in updates:
        break
    del updates
    gc.collect()
    assert left() is None
    aggregator.report(full(2), PULL, 1.0)


async def test_a_task_that_waits_for_news_is_kept_alive(aggregator: KvMetricsAggregator) -> None:
    """asyncio holds tasks weakly."""
    found: list[int] = []

    async def consume() -> None:
        async for state in aggregator.updates():
            found.append(state.active_blocks)
            return

    asyncio.create_task(consume())  # noqa: RUF006 - on purpose
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    aggregator.report(full(7), PULL, 1.0)
    async with asyncio.timeout(20):
        while not found:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert found == [7]


def test_a_loop_that_is_closed_harms_no_report(aggregator: KvMetricsAggregator) -> None:
    async def subscribe() -> KvUpdates:
        return aggregator.updates()

    updates = asyncio.run(subscribe())
    aggregator.report(full(1), PULL, 1.0)
    assert ONE in updates.pending
    aggregator.close()


# --- metrics about it -------------------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(Settings(), builtin=False)


def values(registry: rk.Registry, name: str) -> list[float]:
    family = next(family for family in registry.collect() if family.name == name)
    assert isinstance(family, MetricFamily)
    return [value for value in family.values if value == value]


def test_gauges_are_brought_up_to_date_by_a_collection(registry: rk.Registry, clock: Clock) -> None:
    aggregator = KvMetricsAggregator(registry, clock=clock)
    assert values(registry, "rkmetrics_kv_workers") == [0, 0]
    assert values(registry, "rkmetrics_kv_oldest_state_age_seconds") == []
    aggregator.report(full(1, age_seconds=4), PULL, 1.0)
    clock.now += 2
    aggregator.report(full(2, TWO), PUSH, 1.0)
    aggregator.report(full(2, WorkerKey(3)), PUSH, 1.0)
    assert values(registry, "rkmetrics_kv_workers") == [2, 1]
    assert values(registry, "rkmetrics_kv_oldest_state_age_seconds") == [6]


def test_reports_gaps_and_what_is_malformed_are_counted(registry: rk.Registry) -> None:
    aggregator = KvMetricsAggregator(registry)
    aggregator.report(full(1, sequence=1), PULL, 1.0)
    aggregator.report(full(2, sequence=4), PULL, 1.0)
    aggregator.report(part(3, sequence=4), PUSH, 1.0)
    aggregator.count_malformed(PUSH)
    assert values(registry, "rkmetrics_kv_reports_total") == [1, 2]
    assert values(registry, "rkmetrics_kv_missed_updates_total") == [2]
    assert values(registry, "rkmetrics_kv_malformed_total") == [1, 0]


def test_a_closed_aggregator_takes_its_gauges_along(registry: rk.Registry) -> None:
    aggregator = KvMetricsAggregator(registry)
    aggregator.report(full(1), PULL, 1.0)
    assert values(registry, "rkmetrics_kv_workers") == [1, 0]
    aggregator.close()
    aggregator.close()
    assert values(registry, "rkmetrics_kv_workers") == []
    aggregator.report(full(2, TWO), PULL, 1.0)
    assert set(aggregator.workers()) == {ONE}


@pytest.mark.parametrize("close", [True, False])
def test_a_registry_holds_no_aggregator_that_nobody_uses(registry: rk.Registry, close: bool) -> None:
    aggregator = KvMetricsAggregator(registry)
    if close:
        aggregator.close()
    gone = weakref.ref(aggregator)
    del aggregator
    gc.collect()
    assert gone() is None
    assert not registry._refreshers
    registry.collect()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_waits_for_no_lock(registry: rk.Registry) -> None:
    aggregator = KvMetricsAggregator(registry)
    aggregator.report(full(1), PULL, 1.0)
    with aggregator._lock:
        child = os.fork()
        if child == 0:
            aggregator.report(full(2), PULL, 1.0)
            registry.collect()
            os._exit(0 if known(aggregator).active_blocks == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
