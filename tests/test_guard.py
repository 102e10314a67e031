"""Admission of actor names, overflow and the budget."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rkmetrics as rk


class Room(rk.MetricSet):
    joins = rk.Counter("tguard_joins_total", "Joins.", kind=rk.OneOf("a", "b"))
    size = rk.Gauge("tguard_size", "Size.", across="max")


def registry(limit: int = 3, **kwargs: Any) -> rk.Registry:
    return rk.Registry(rk.Settings(max_actor_names=limit), builtin=False, **kwargs)


def joins(r: rk.Registry) -> dict[tuple[str, str], float]:
    (family,) = r.collect(["tguard_joins_total"])
    return {(s.labels[0][1], s.labels[1][1]): s.value for s in family.series()}  # type: ignore[union-attr, misc]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty"),
        ("__other__", "reserved"),
        ("\ud800", "not valid UTF-8"),
        ("x" * 129, "129 bytes long; use 128 bytes at most"),
        ("é" * 65, "130 bytes long"),
        (None, "not text but NoneType"),
        (7, "not text but int"),
        (b"lobby", "not text but bytes"),
    ],
)
def test_a_name_that_can_never_be_one_is_refused_with_reason_and_mend(name: Any, message: str) -> None:
    r = registry()
    uses: list[Any] = [r._names.admit, r.actor]
    for use in uses:
        with pytest.raises(rk.ActorNameError, match=message):
            use(name)
    assert r.actor_names() == ()


@pytest.mark.parametrize(
    "name", ["lobby", "a b", 'q"uote', "new\nline", "back\\slash", "nul\0", "é" * 64, "x" * 128, "# EOF", "}"]
)
def test_any_other_text_is_admitted_as_it_is(name: str) -> None:
    r = registry()
    r.bind(Room, actor_name=name).joins["a"].inc()
    assert r.actor_names() == (name,)
    assert joins(r)[(name, "a")] == 1.0


def test_names_past_the_limit_share_other_and_totals_stay_exact(caplog: pytest.LogCaptureFixture) -> None:
    r = registry(3)
    for i in range(50):
        r.bind(Room, actor_name=f"n{i}").joins["a"].inc()
    assert r.actor_names() == ("n0", "n1", "n2")
    got = joins(r)
    assert got[("__other__", "a")] == 47.0
    assert sum(got.values()) == 50.0
    assert r.bind(Room, actor_name="n49") is r.bind(Room, actor_name="n48")
    (overflow,) = r.overflows().values()
    assert overflow.count == 49
    assert overflow.samples == ["'n3'", "'n4'", "'n5'", "'n6'", "'n7'"]
    (record,) = [record for record in caplog.records if "actor_name" in record.getMessage()]
    assert "RKMETRICS_MAX_ACTOR_NAMES" in record.getMessage()


def test_strict_raises_at_the_limit() -> None:
    r = registry(1, strict=True)
    r.bind(Room, actor_name="a")
    r.bind(Room, actor_name="a")
    with pytest.raises(rk.ActorNameError, match="1 actor names are admitted already"):
        r.bind(Room, actor_name="b")


def test_a_released_name_leaves_and_makes_room() -> None:
    r = registry(1)
    held = r.bind(Room, actor_name="a").joins["a"]
    held.inc(5)
    assert r.release("a") is True
    assert r.release("a") is False
    held.inc(5)  # counts on, seen by nobody
    assert joins_or_none(r) == {}
    r.bind(Room, actor_name="b").joins["a"].inc()
    assert joins(r)[("b", "a")] == 1.0
    r.release("b")
    assert r.bind(Room, actor_name="a").joins["a"].value == 0.0


def joins_or_none(r: rk.Registry) -> dict[tuple[str, str], float]:
    return joins(r) if any(family.name == "tguard_joins_total" for family in r.collect()) else {}


def test_a_flood_of_bogus_names_and_values_leaves_memory_flat() -> None:
    r = registry(10)
    cells = r.bind(Room, actor_name="a").joins

    def flood(start: int) -> None:
        for i in range(start, start + 3_000):
            r.bind(Room, actor_name=f"bogus-{i}").joins["a"].inc()
            cells[f"bogus-{i}"].inc()

    flood(0)
    tracemalloc.start()
    flood(3_000)
    before, _ = tracemalloc.get_traced_memory()
    flood(6_000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000


def test_threads_never_admit_more_than_the_limit_and_lose_no_count() -> None:
    r = registry(20)
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for i in range(200):
            r.bind(Room, actor_name=f"n{i % 40}").joins["a"].inc()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(r.actor_names()) == 20
    assert sum(joins(r).values()) == 1_600.0


@given(st.lists(st.tuples(st.sampled_from(["bind", "release"]), st.sampled_from("abcdef")), max_size=60))
@settings(deadline=None, max_examples=100)
def test_any_order_of_binding_and_releasing_keeps_limit_and_table_in_step(steps: list[tuple[str, str]]) -> None:
    r = registry(3)
    for step, name in steps:
        if step == "bind":
            r.bind(Room, actor_name=name)
        else:
            r.release(name)
        names = r.actor_names()
        assert len(names) <= 3
        exposed = {name for name, _ in joins_or_none(r)} - {"__other__"}
        assert exposed == set(names)


def test_the_budget_is_the_worst_case_of_lines_and_series() -> None:
    class Timed(rk.MetricSet):
        took = rk.Histogram("tguard_took_seconds", "Time.", buckets=(1.0, 2.0), outcome=rk.OneOf("ok", "error"))

    class Node(rk.MetricSet, per_actor=False):
        up = rk.Gauge("tguard_up", "Up.", across="max")

    r = registry(10)
    for known in (Room, Timed, Node):
        r.add_set(known)
    by_name = {m.metric: m for m in r.budget().metrics}
    room, took, up = by_name["tguard_joins_total"], by_name["tguard_took_seconds"], by_name["tguard_up"]
    assert (room.series_per_name, room.lines_per_name, room.series) == (3, 3, 33)
    assert (took.series_per_name, took.lines_per_name, took.lines) == (3, 15, 165)
    assert (up.series_per_name, up.series) == (0, 1)


def test_nothing_that_can_happen_exceeds_the_budget() -> None:
    r = registry(2)
    for name in ("a", "b", "c", "d"):
        bound = r.bind(Room, actor_name=name)
        bound.size.set(1)
        for kind in ("a", "b", "c", "d"):
            bound.joins[kind].inc()
    worst = {m.metric: m.series for m in r.budget().metrics}
    for family in r.collect():
        if family.name.startswith("tguard"):
            assert len(list(family.series())) == worst[family.name]  # type: ignore[union-attr]
