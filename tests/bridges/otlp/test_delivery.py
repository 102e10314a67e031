from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("opentelemetry.sdk.metrics")

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

import rkmetrics as rk
from rkmetrics.bridges.otlp.answers import RULES, Answer, Data
from rkmetrics.bridges.otlp.delivery import Delivery, Schedule, StateLog
from rkmetrics.catalogue.otlp import Otlp, Outcome
from rkmetrics.model import Family, ForeignFamily, MetricType, Sample

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


class Work(rk.MetricSet):
    done = rk.Counter("work_done_total", "Work done.", kind=rk.OneOf("easy", "hard"))
    depth = rk.Gauge("work_depth", "Work waiting.", across="sum")
    time = rk.Histogram("work_duration_seconds", "Time of work.", buckets=(1.0, 2.0, 4.0))
    size = rk.Histogram("work_size_bytes", "Size of work.", buckets=(1.0,), native=True)


class MemoryLink:
    """A receiver in memory: answers by `outcome`, keeps what it takes; `takes` decides where that leaves it open."""

    renewable = True

    def __init__(self) -> None:
        self.outcome, self.takes = Outcome.OK, True
        self.points: list[tuple[str, Any, Any]] = []
        self.requests = 0

    def send(self, data: Any) -> Answer:
        self.requests += 1
        if RULES[self.outcome].data is Data.DONE or (RULES[self.outcome].data is Data.UNSURE and self.takes):
            for metric in data.resource_metrics[0].scope_metrics[0].metrics:
                for point in metric.data.data_points:
                    row = (metric.name, tuple(sorted(point.attributes.items())), point)
                    if not any(self.same(row, other) for other in self.points):
                        self.points.append(row)
        return Answer(self.outcome)

    @staticmethod
    def same(row: tuple[str, Any, Any], other: tuple[str, Any, Any]) -> bool:
        """A receiver knows a point that it has by its series and its times."""
        return row[:2] == other[:2] and times(row[2]) == times(other[2])

    def close(self) -> None:
        pass

    def total(self, name: str, **labels: str) -> float:
        """What the deltas of one series add up to."""
        found = [p for n, a, p in self.points if n == name and labels.items() <= dict(a).items()]
        return math.fsum(getattr(point, "value", getattr(point, "count", 0)) for point in found)


def times(point: Any) -> tuple[int, int]:
    return point.start_time_unix_nano, point.time_unix_nano


def owner(link: MemoryLink, temporality: str, families: Iterable[Family] = ()) -> tuple[rk.Registry, Delivery]:
    registry = rk.Registry(rk.Settings(), builtin=False)
    delivery = Delivery(
        lambda: (*registry.collect(), *families),
        lambda: link,
        registry.bind(Otlp),
        temporality=temporality,
        resource=lambda: Resource({}),
        scope=InstrumentationScope("test"),
        start=START,
    )
    return registry, delivery


steps = st.tuples(
    st.integers(0, 9),
    st.sampled_from([1.0, 3.0, 1e-9, 1e9]),
    st.sampled_from([outcome for outcome in Outcome if outcome is not Outcome.REJECTED]),
    st.booleans(),
)


@settings(deadline=None)
@given(st.lists(steps, max_size=12))
def test_deltas_add_up_whatever_fails(script: list[tuple[int, float, Outcome, bool]]) -> None:
    """Nothing lost, nothing counted twice; also when a request that seemed lost had been taken."""
    link = MemoryLink()
    registry, delivery = owner(link, "delta")
    work = registry.bind(Work, actor_name="a")
    now = START
    for amount, size, outcome, takes in [*script, (1, 1.0, Outcome.OK, True), (0, 1.0, Outcome.OK, True)]:
        work.done["easy"].inc(amount)
        for _ in range(amount):
            work.time.observe(size)
            work.size.observe(size)
        link.outcome, link.takes, now = outcome, takes, now + SECOND
        delivery.attempt(now)
    assert link.total("work_done_total", kind="easy") == work.done["easy"].value
    assert link.total("work_duration_seconds") == work.time.count
    assert link.total("work_size_bytes") == work.size.count
    by_series: dict[Any, list[tuple[int, int]]] = {}
    for name, attributes, point in link.points:
        by_series.setdefault((name, attributes), []).append(times(point))
    for spans in by_series.values():
        assert all(start <= end for start, end in spans)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_buckets_and_sums_of_deltas_add_up() -> None:
    link = MemoryLink()
    registry, delivery = owner(link, "delta")
    work = registry.bind(Work, actor_name="a")
    for round_ in range(3):
        for value in (0.5, 1.5, 1.5, 100.0):
            work.time.observe(value)
            work.size.observe(value)
        delivery.attempt(START + round_ * SECOND)
    classic = [point for name, _, point in link.points if name == "work_duration_seconds"]
    assert [list(point.bucket_counts) for point in classic] == [[1, 2, 0, 1]] * 3
    assert [point.sum for point in classic] == [103.5] * 3
    exponential = [point for name, _, point in link.points if name == "work_size_bytes"]
    assert len({(point.positive.offset, tuple(point.positive.bucket_counts)) for point in exponential}) == 1


def test_a_series_at_rest_is_sent_once() -> None:
    link = MemoryLink()
    registry, delivery = owner(link, "delta")
    registry.bind(Work, actor_name="a").done["easy"].inc()
    for second in range(3):
        delivery.attempt(START + second * SECOND)
    assert (
        len([1 for name, attributes, _ in link.points if name == "work_done_total" and ("kind", "easy") in attributes])
        == 1
    )
    assert (
        len([1 for name, attributes, _ in link.points if name == "work_done_total" and ("kind", "hard") in attributes])
        == 1
    )


def test_a_name_that_is_released_and_comes_back_starts_anew() -> None:
    link = MemoryLink()
    registry, delivery = owner(link, "delta")
    for amount in (5, 3):
        registry.bind(Work, actor_name="a").done["easy"].inc(amount)
        delivery.attempt(START + amount * SECOND)
        registry.release("a")
    assert link.total("work_done_total", kind="easy") == 8


def test_a_name_that_restarts_between_two_pushes_starts_anew() -> None:
    link = MemoryLink()
    registry, delivery = owner(link, "delta")
    registry.bind(Work, actor_name="a").done["easy"].inc(5)
    delivery.attempt(START)
    registry.release("a")
    registry.bind(Work, actor_name="a").done["easy"].inc(7)  # more than before: only its start time tells
    delivery.attempt(START + SECOND)
    assert link.total("work_done_total", kind="easy") == 12


def jobs(value: float) -> ForeignFamily:
    return ForeignFamily("jobs", MetricType.COUNTER, "Jobs.", "", (Sample("jobs_total", (), value),))


def test_a_foreign_counter_that_falls_has_restarted() -> None:
    link, families = MemoryLink(), [jobs(10)]
    _, delivery = owner(link, "delta", families)
    for second, value in enumerate((10, 12, 5)):
        families[:] = [jobs(value)]
        delivery.attempt(START + second * SECOND)
    assert [point.value for name, _, point in link.points if name == "jobs_total"] == [10, 2, 5]


def test_a_collector_that_fails_for_once_does_not_count_twice() -> None:
    link, families = MemoryLink(), [jobs(10)]
    _, delivery = owner(link, "delta", families)
    for second, found in enumerate(([jobs(10)], [], [jobs(11)])):
        families[:] = found
        delivery.attempt(START + second * SECOND)
    assert link.total("jobs_total") == 11


def test_low_memory_sends_foreign_families_as_totals() -> None:
    link, families = MemoryLink(), [jobs(10)]
    registry, delivery = owner(link, "lowmemory", families)
    for second in range(2):
        registry.bind(Work, actor_name="a").done["easy"].inc(2)
        delivery.attempt(START + second * SECOND)
    assert [point.value for name, _, point in link.points if name == "jobs_total"] == [10, 10]
    assert link.total("work_done_total", kind="easy") == 4


def test_a_cumulative_push_keeps_nothing_of_what_failed() -> None:
    link = MemoryLink()
    registry, delivery = owner(link, "cumulative")
    work = registry.bind(Work, actor_name="a")
    link.outcome, link.takes = Outcome.UNANSWERED, False
    for second in range(5):
        work.done["easy"].inc()
        delivery.attempt(START + second * SECOND)
    link.outcome = Outcome.OK
    delivery.attempt(START + 9 * SECOND)
    assert [point.value for name, a, point in link.points if name == "work_done_total" and ("kind", "easy") in a] == [5]
    assert link.requests == 6


def test_a_clock_set_back_gives_no_point_that_ends_before_it_starts() -> None:
    link = MemoryLink()
    registry, delivery = owner(link, "delta")
    work = registry.bind(Work, actor_name="a")
    for now in (START, START + 3600 * SECOND, START + SECOND):
        work.done["easy"].inc()
        delivery.attempt(now)
    assert all(start <= end for start, end in (times(point) for _, _, point in link.points))
    assert link.total("work_done_total", kind="easy") == 3


def test_a_large_snapshot_goes_in_several_requests() -> None:
    """A gRPC receiver takes 4 MiB at a time."""
    link, families = MemoryLink(), list[Family]()
    _, delivery = owner(link, "delta", families)
    samples = tuple(Sample("jobs_total", (("queue", str(i)),), 1.0) for i in range(10_000))
    families[:] = [ForeignFamily("jobs", MetricType.COUNTER, "Jobs.", "", samples)]
    link.same = lambda row, other: False  # type: ignore[method-assign]
    assert delivery.attempt(START).good
    assert link.requests == 3
    assert link.total("jobs_total") == 10_000


def test_a_forked_child_reports_only_what_it_counts_itself() -> None:
    link = MemoryLink()
    registry, delivery = owner(link, "cumulative")
    work = registry.bind(Work, actor_name="a")
    work.done["easy"].inc(10)
    work.time.observe(1.0)
    work.depth.set(4)
    delivery.restart(START, registry.snapshot())
    work.done["easy"].inc(2)
    work.time.observe(1.0)
    delivery.attempt(START + SECOND)
    (done,) = [p for name, a, p in link.points if name == "work_done_total" and ("kind", "easy") in a]
    assert (done.value, done.start_time_unix_nano) == (2, START)
    assert link.total("work_duration_seconds") == 1
    assert link.total("work_depth") == 4


def test_a_fault_in_collecting_is_an_answer() -> None:
    link = MemoryLink()
    _, delivery = owner(link, "delta", [None])  # type: ignore[list-item]
    answer = delivery.attempt(START)
    assert answer.outcome is Outcome.FAILED
    assert delivery.failed_attempts == 1


# --- schedule ---------------------------------------------------------------------------------------------------------


def schedule(interval_seconds: float = 60.0) -> Schedule:
    made = Schedule(interval_seconds, _random=random.Random(7))
    made.begin(0.0)
    return made


def test_pushes_keep_to_the_grid_however_long_they_take() -> None:
    plan = schedule()
    first = plan.due
    assert 30 <= first <= 60
    plan.after(Answer(Outcome.OK), first + 5)
    assert plan.due == first + 60
    plan.after(Answer(Outcome.OK), first + 60 + 130)
    assert plan.due == first + 240


def test_retries_back_off_with_jitter_and_stay_within_ten_seconds() -> None:
    plan, now, waits = schedule(), 100.0, list[float]()
    for _ in range(6):
        plan.after(Answer(Outcome.UNAVAILABLE), now)
        waits.append(plan.due - now)
        now = plan.due
    assert all(0.8 * 2**k <= wait <= 1.2 * 2**k for k, wait in enumerate(waits[:4]))
    assert all(wait <= 9.6 for wait in waits)
    assert len({round(wait / round(wait), 6) for wait in waits}) > 1


def test_a_retry_never_comes_later_than_the_next_push_would() -> None:
    plan = schedule(2.0)
    for _ in range(8):
        plan.after(Answer(Outcome.UNAVAILABLE), plan.due)
        assert plan.due - plan._grid <= 0


def test_what_cannot_pass_waits_for_the_next_interval() -> None:
    plan = schedule()
    first = plan.due
    plan.after(Answer(Outcome.REFUSED), first + 1)
    assert plan.due == first + 60


def test_the_servers_time_is_kept_even_past_the_interval() -> None:
    plan = schedule()
    plan.after(Answer(Outcome.UNAVAILABLE, retry_after_seconds=300), 100.0)
    assert plan.due == plan.not_before == 400


def test_on_demand_only_is_never_due() -> None:
    plan = schedule(math.inf)
    plan.after(Answer(Outcome.OK), 5.0)
    assert plan.due == math.inf
    plan.after(Answer(Outcome.UNAVAILABLE), 5.0)
    assert plan.due < 8


# --- log --------------------------------------------------------------------------------------------------------------


def test_an_outage_is_one_line_and_its_end_another(caplog: pytest.LogCaptureFixture) -> None:
    log = StateLog()
    with caplog.at_level(logging.INFO, "rkmetrics"):
        for now in range(0, 600, 10):
            log.note(Answer(Outcome.UNAVAILABLE if now % 20 else Outcome.UNANSWERED, "refused"), now)
        log.note(Answer(Outcome.OK), 600)
        log.note(Answer(Outcome.OK), 601)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "OTLP push: the receiver does not take data now (refused)",
        "OTLP push works again",
    ]


def test_a_receiver_that_flaps_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    log = StateLog()
    with caplog.at_level(logging.INFO, "rkmetrics"):
        for now in range(300):
            log.note(Answer(Outcome.OK if now % 2 else Outcome.UNAVAILABLE), now)
    assert len(caplog.records) <= 11
