"""The table of backends: rise and fall, damping, panic, takeover, sources, expiry, choice. A clock of its own."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import rkmetrics as rk
from rkmetrics.catalogue.discovery import Balancing, CheckOutcome, Departure, RegisterOutcome
from rkmetrics.discovery.base import Backend, SourceName
from rkmetrics.discovery.directory import Change, Directory, Rules, State
from rkmetrics.discovery.entry import Entry
from rkmetrics.discovery.selection import Strategy
from rkmetrics.discovery.verdict import BLIND, Vitals
from rkmetrics.settings import Settings

READY, NOT_READY = CheckOutcome.READY, CheckOutcome.NOT_READY
TIMEOUT, REFUSED = CheckOutcome.TIMEOUT, CheckOutcome.REFUSED
ADDED, REFRESHED, CONFLICT = RegisterOutcome.ADDED, RegisterOutcome.REFRESHED, RegisterOutcome.CONFLICT
MISSES = frozenset(CheckOutcome) - {READY, NOT_READY, CheckOutcome.NOT_SENT}
CALLER = "10.0.0.9"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """A directory, its clock, and short words for what happens to it."""

    def __init__(self, rules: Rules | None = None, **options: object) -> None:
        self.clock = Clock()
        self.events: list[tuple[str, Change]] = []
        self.directory = Directory(rules or Rules(), clock=self.clock, seed=1, **options)  # type: ignore[arg-type]
        self.directory.listen(lambda entry, change: self.events.append((entry.backend.id, change)))

    def entry(self, id: str) -> Entry:
        return next(each for each in self.directory.entries() if each.backend.id == id)

    def announce(self, id: str = "a", address: str = "", caller: str = CALLER, **more: int) -> RegisterOutcome:
        return self.directory.announce(backend(id, address, **more), caller)

    def check(self, id: str, *outcomes: CheckOutcome, each: float = 5.0) -> None:
        for outcome in outcomes:
            self.clock.now += each
            self.directory.record(self.entry(id), outcome, Vitals(ready=True) if outcome is READY else None)

    def state(self, id: str = "a") -> State | None:
        return self.directory.state(id)

    def panics(self) -> bool:
        return self.directory.panic

    def pool(self) -> list[str]:
        return sorted(backend.id for backend in self.directory.pool())

    def up(self, *ids: str) -> None:
        for id in ids:
            self.announce(id)
            self.check(id, READY, each=0.0)


def backend(id: str, address: str = "", metrics_port: int = 9090) -> Backend:
    host = f"10.0.{len(id)}.{ord(id[0])}"
    return Backend.checked(id, address or f"{host}:3000", metrics_port)


@pytest.fixture
def table() -> Table:
    return Table()


# --- rise and fall ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([], State.NEW),
        ([READY], State.UP),
        ([NOT_READY], State.NEW),
        ([NOT_READY, NOT_READY, READY], State.UP),
        ([TIMEOUT], State.NEW),
        ([TIMEOUT, TIMEOUT], State.DOWN),
        ([TIMEOUT, TIMEOUT, READY], State.UP),  # nothing bad is known of one that was never up
        ([READY, TIMEOUT], State.UP),
        ([READY, TIMEOUT, READY, TIMEOUT], State.UP),  # two in a row, not two in all
        ([READY, TIMEOUT, TIMEOUT], State.DOWN),
        ([READY, TIMEOUT, NOT_READY], State.DRAINING),
        ([READY, NOT_READY], State.DRAINING),
        ([READY, NOT_READY, READY], State.DRAINING),
        ([READY, NOT_READY, READY, READY], State.UP),
        ([READY, NOT_READY, READY, TIMEOUT, READY], State.DRAINING),
        ([READY, NOT_READY, TIMEOUT, TIMEOUT], State.DOWN),
        ([READY, TIMEOUT, TIMEOUT, READY], State.DOWN),
        ([READY, TIMEOUT, TIMEOUT, READY, READY], State.UP),
        ([READY, TIMEOUT, TIMEOUT, READY, TIMEOUT, READY], State.DOWN),
    ],
)
def test_states(table: Table, outcomes: list[CheckOutcome], state: State) -> None:
    table.up("other", "third")
    table.announce()
    table.check("a", *outcomes)
    assert table.state() is state
    assert ("a" in table.pool()) is (state is State.UP)


@pytest.mark.parametrize("miss", sorted(MISSES))
def test_every_kind_of_miss_counts(table: Table, miss: CheckOutcome) -> None:
    table.up("a", "b", "c")
    table.check("a", miss, miss)
    assert (table.state(), table.pool()) == (State.DOWN, ["b", "c"])


def test_rise_and_fall_can_be_chosen() -> None:
    table = Table(Rules(rise=4, fall=3))
    table.up("a", "b", "c")
    table.check("a", REFUSED, REFUSED)
    assert table.state() is State.UP
    table.check("a", REFUSED, READY, READY, READY)
    assert table.state() is State.DOWN
    table.check("a", READY)
    assert table.state() is State.UP


def test_announcing_again_revives_one_that_is_down(table: Table) -> None:
    table.up("a", "b")
    table.check("a", REFUSED, REFUSED)
    table.events.clear()
    assert table.announce() is REFRESHED
    assert table.events == [("a", Change.CHECK)]  # at once, not when its turn comes
    assert table.state() is State.DOWN  # a word of its own does not put it into the pool
    table.check("a", READY)
    assert table.state() is State.UP


def test_announcing_again_while_up_costs_no_check(table: Table) -> None:
    table.up("a")
    table.events.clear()
    assert table.announce() is REFRESHED
    assert table.events == []


def test_a_result_that_comes_after_the_end_changes_nothing(table: Table) -> None:
    table.up("a")
    entry = table.entry("a")
    table.directory.leave("a", CALLER)
    table.directory.record(entry, READY, Vitals(ready=True))
    assert (table.pool(), len(table.directory)) == ([], 0)


# --- damping ----------------------------------------------------------------------------------------------------------


def rises_needed(table: Table) -> int:
    for count in range(1, 100):
        table.check("a", READY)
        if table.state() is State.UP:
            return count
    raise AssertionError("never up")


def test_each_departure_from_the_second_on_doubles_the_rise(table: Table) -> None:
    table.up("a", "b")
    needed: list[int] = []
    for _ in range(6):
        table.check("a", NOT_READY, each=0.1)
        needed.append(rises_needed(table))
    assert needed[0] == 2
    assert needed == sorted(needed)
    assert needed[1] > 2
    assert needed[-1] >= 8


def test_damping_has_an_end(table: Table) -> None:
    table.up("a", "b")
    for _ in range(200):
        table.entry("a").punish(table.clock.now)
    table.check("a", NOT_READY)
    assert rises_needed(table) <= 2 << 4


def test_what_was_long_ago_is_forgotten(table: Table) -> None:
    table.up("a", "b")
    for _ in range(3):
        table.check("a", NOT_READY, each=0.1)
        rises_needed(table)
    table.clock.now += 2_000
    table.check("a", NOT_READY)
    assert rises_needed(table) == 2


def test_announcing_does_not_get_around_damping(table: Table) -> None:
    table.up("a", "b")
    for _ in range(3):
        table.check("a", NOT_READY, each=0.1)
        rises_needed(table)
    table.check("a", NOT_READY, each=0.1)
    table.announce()
    assert rises_needed(table) > 2


# --- panic ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", sorted(BLIND))
def test_the_pool_is_never_emptied_by_silence(table: Table, outcome: CheckOutcome) -> None:
    """F15: a balancer that is cut off hears nothing, and so does one with the wrong token."""
    ids = list("abcdefghij")
    table.up(*ids)
    for _ in range(3):
        for id in ids:
            table.check(id, outcome, each=0.5)
    assert table.panics()
    assert table.pool() == ids
    assert table.directory.pick() is not None
    table.check("a", READY)
    assert table.state("a") is State.UP  # one is enough: it was the balancer
    for id in ids:
        table.check(id, READY, each=0.0)
    assert not table.panics()
    assert (table.pool(), [table.state(id) for id in ids]) == (ids, [State.UP] * 10)


@pytest.mark.parametrize("outcome", sorted(MISSES - BLIND))
def test_backends_that_were_heard_to_be_dead_leave_even_if_all_do(table: Table, outcome: CheckOutcome) -> None:
    table.up("a", "b", "c")
    for id in "abc":
        table.check(id, outcome, outcome)
    assert (table.pool(), table.panics()) == ([], False)


def test_a_backend_that_is_not_ready_leaves_in_panic_too(table: Table) -> None:
    table.up("a", "b", "c", "d")
    for id in "abc":
        table.check(id, TIMEOUT, TIMEOUT)
    assert table.pool() == ["a", "b", "c", "d"]
    table.check("d", NOT_READY)
    table.check("a", NOT_READY)
    table.check("b", REFUSED)
    assert table.pool() == ["c"]


def test_some_that_fall_silent_leave(table: Table) -> None:
    table.up(*"abcdefghij")
    for id in "abcde":
        table.check(id, TIMEOUT, TIMEOUT)
    assert table.pool() == list("fghij")
    table.check("f", TIMEOUT, TIMEOUT)
    assert table.pool() == list("abcdefghij")
    table.check("f", READY)
    assert table.pool() == list("fghij")


def test_panic_can_be_switched_off() -> None:
    table = Table(Rules(panic_ratio=0.0))
    table.up("a", "b")
    for id in "ab":
        table.check(id, TIMEOUT, TIMEOUT)
    assert table.pool() == []


def test_one_that_was_never_up_is_not_kept(table: Table) -> None:
    table.up("a")
    table.announce("b")
    table.check("b", TIMEOUT, TIMEOUT)
    assert table.pool() == ["a"]


# --- who an id belongs to ---------------------------------------------------------------------------------------------


def test_a_live_id_is_not_taken_over(table: Table) -> None:
    """T12."""
    table.up("a", "b")
    mine = backend("a").address
    assert table.announce("a", "10.6.6.6:3000") is CONFLICT
    assert table.announce("a", "10.6.6.6:3000", caller="10.6.6.6") is CONFLICT
    assert table.announce("a", caller="10.6.6.6") is CONFLICT
    assert table.announce("evil", str(mine), caller="10.6.6.6") is CONFLICT
    assert table.directory.leave("a", "10.6.6.6") is CONFLICT
    assert table.entry("a").backend.address == mine
    assert table.pool() == ["a", "b"]


def test_one_that_fell_silent_in_a_panic_is_not_taken_over(table: Table) -> None:
    table.up("a")
    table.check("a", TIMEOUT, TIMEOUT)
    assert (table.state(), table.pool()) == (State.DOWN, ["a"])
    assert table.announce("a", "10.6.6.6:3000", caller="10.6.6.6") is CONFLICT


def test_an_id_that_is_down_is_free(table: Table) -> None:
    table.up("a", "b")
    table.check("a", REFUSED, REFUSED)
    assert table.announce("a", "10.7.7.7:3000", caller="10.7.7.7") is ADDED
    assert table.state() is State.NEW
    assert len(table.directory) == 2


def test_a_squatter_holds_an_id_only_while_something_answers(table: Table) -> None:
    table.announce("a", "10.6.6.6:3000", caller="10.6.6.6")
    assert table.announce("a") is CONFLICT
    table.check("a", REFUSED, REFUSED)
    assert table.announce("a") is ADDED


def test_the_same_caller_may_rename_what_is_at_its_address(table: Table) -> None:
    table.up("a")
    assert table.announce("a2", str(backend("a").address)) is ADDED
    assert [each.backend.id for each in table.directory.entries()] == ["a2"]
    assert ("a", Change.GONE) in table.events


def test_another_metrics_port_is_another_process(table: Table) -> None:
    table.up("a", "b")
    assert table.announce("a", metrics_port=9999) is REFRESHED
    assert table.state() is State.NEW
    assert table.entry("a").backend.metrics_port == 9999


def test_leaving(table: Table) -> None:
    table.up("a", "b")
    assert table.directory.leave("a", CALLER) is RegisterOutcome.REMOVED
    assert table.pool() == ["b"]
    assert table.directory.leave("a", CALLER) is RegisterOutcome.UNKNOWN


def test_the_table_is_bounded() -> None:
    table = Table(Rules(limit=3, limit_per_caller=2))
    assert [table.announce(id) for id in "abc"] == [ADDED, ADDED, RegisterOutcome.LIMITED]
    assert table.announce("c", caller="10.0.0.8") is ADDED
    assert table.announce("d", caller="10.0.0.7") is RegisterOutcome.FULL
    assert table.announce("a") is REFRESHED
    table.directory.leave("a", CALLER)
    assert table.announce("d") is ADDED


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_backend_stays_while_one_source_knows_of_it(table: Table) -> None:
    directory = table.directory
    assert directory.upsert(SourceName.ETCD, backend("a"))
    assert table.announce("a") is REFRESHED
    table.check("a", READY)
    assert directory.leave("a", CALLER) is RegisterOutcome.REMOVED
    assert table.pool() == ["a"]
    assert directory.withdraw(SourceName.ETCD, "a")
    assert not directory.withdraw(SourceName.ETCD, "a")
    assert table.pool() == []


def test_the_stronger_source_is_right(table: Table) -> None:
    directory = table.directory
    table.up("a")
    assert directory.upsert(SourceName.ETCD, backend("a", "10.5.5.5:3000"))
    assert str(table.entry("a").backend.address) == "10.5.5.5:3000"
    assert table.announce("a") is CONFLICT
    assert directory.upsert(SourceName.STATIC, backend("a", "10.4.4.4:3000"))
    assert not directory.upsert(SourceName.ETCD, backend("a", "10.5.5.5:3000"))


def test_what_a_weaker_source_says_comes_back_when_the_stronger_one_goes(table: Table) -> None:
    table.up("a")
    assert table.directory.upsert(SourceName.ETCD, backend("a", metrics_port=9999))
    assert (table.entry("a").backend.metrics_port, table.state()) == (9999, State.NEW)
    table.check("a", READY)
    table.directory.withdraw(SourceName.ETCD, "a")
    assert (table.entry("a").backend.metrics_port, table.state()) == (9090, State.NEW)


def test_resync_withdraws_what_is_not_listed(table: Table) -> None:
    directory = table.directory
    table.up("mine")
    for id in "abc":
        directory.upsert(SourceName.ETCD, backend(id))
    directory.resync(SourceName.ETCD, [backend("b"), backend("d")])
    assert sorted(each.backend.id for each in directory.entries()) == ["b", "d", "mine"]


# --- expiry -----------------------------------------------------------------------------------------------------------


def test_a_dead_backend_is_forgotten_when_nobody_announces_it(table: Table) -> None:
    table.up("a", "b")
    table.check("a", REFUSED, REFUSED)
    table.clock.now += 70
    assert table.directory.expire() == 0
    table.announce()
    table.clock.now += 80
    assert table.directory.expire() == 0
    table.clock.now += 11
    assert table.directory.expire() == 1
    assert table.state() is None


def test_one_that_answers_is_not_forgotten(table: Table) -> None:
    table.up("a", "b")
    table.check("b", NOT_READY)
    table.clock.now += 100_000
    assert table.directory.expire() == 0


def test_a_slow_announcer_has_three_of_its_intervals(table: Table) -> None:
    table.directory.announce(backend("a")._replace(announce_interval_seconds=600), CALLER)
    table.check("a", REFUSED, REFUSED)
    table.clock.now += 1_700
    assert table.directory.expire() == 0
    table.clock.now += 200
    assert table.directory.expire() == 1


def test_what_other_sources_know_of_is_not_forgotten(table: Table) -> None:
    table.directory.upsert(SourceName.STATIC, backend("a"))
    table.check("a", REFUSED, REFUSED)
    table.clock.now += 100_000
    assert table.directory.expire() == 0


def test_panic_keeps_the_silent_for_an_hour(table: Table) -> None:
    table.up("a", "b")
    for id in "ab":
        table.check(id, TIMEOUT, TIMEOUT)
    table.clock.now += 3_000
    assert table.directory.expire() == 0
    table.clock.now += 1_000
    assert table.directory.expire() == 2


# --- the choice -------------------------------------------------------------------------------------------------------


def picks(table: Table, strategy: Strategy, count: int) -> Counter[str]:
    found = (table.directory.pick(strategy) for _ in range(count))
    return Counter(each.id for each in found if each)


def test_nothing_to_choose_from(table: Table) -> None:
    assert [table.directory.pick(each) for each in Strategy] == [None] * 3


def test_round_robin_is_even(table: Table) -> None:
    table.up(*"abcd")
    assert set(picks(table, Strategy.ROUND_ROBIN, 400).values()) == {100}


def test_round_robin_goes_on_while_backends_come_and_go(table: Table) -> None:
    table.up(*"abcdefg")
    for id in "gfedcb":
        table.check(id, NOT_READY)
        assert table.directory.pick() is not None
    assert picks(table, Strategy.ROUND_ROBIN, 3) == {"a": 3}


def test_random_reaches_all(table: Table) -> None:
    table.up(*"abcd")
    assert all(80 < count < 120 for count in picks(table, Strategy.RANDOM, 400).values())


def load(table: Table, id: str, **vitals: float) -> None:
    table.directory.record(table.entry(id), READY, Vitals(ready=True, **vitals))  # type: ignore[arg-type]


def test_least_loaded_prefers_those_with_less_in_hand(table: Table) -> None:
    table.up("a", "b")
    load(table, "a", requests_in_progress=1_000)
    load(table, "b", requests_in_progress=0)
    found = picks(table, Strategy.LEAST_LOADED, 400)
    assert found["b"] > found["a"] > 50  # a fourth, where both of the two at random were it


def test_what_was_sent_since_the_last_check_counts(table: Table) -> None:
    table.up("a", "b")
    load(table, "a", requests_in_progress=10)
    assert picks(table, Strategy.LEAST_LOADED, 2_000)["a"] > 900


def test_with_the_same_in_hand_the_rest_of_the_vitals_decides(table: Table) -> None:
    table.up("a", "b")
    load(table, "a", cpu_usage=5, memory_usage=95)
    load(table, "b", cpu_usage=30, memory_usage=30)
    table.entry("a").assigned = table.entry("b").assigned = 0
    first = {Directory.pick(table.directory, Strategy.LEAST_LOADED).id for _ in range(1)}  # type: ignore[union-attr]
    assert first <= {"a", "b"}
    assert table.entry("b").load() < table.entry("a").load() or table.entry("b").assigned


def test_choices_are_safe_from_threads_while_the_pool_changes(table: Table) -> None:
    table.up(*"abcdefgh")
    stop, errors = threading.Event(), list[BaseException]()

    def choose(strategy: Strategy) -> None:
        try:
            while not stop.is_set():
                assert table.directory.pick(strategy) is not None
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=choose, args=(each,)) for each in Strategy]
    for thread in threads:
        thread.start()
    for _ in range(60):
        for id in "bcdefgh":
            table.directory.record(table.entry(id), NOT_READY)
        for id in "bcdefgh":
            for _ in range(40):
                table.directory.record(table.entry(id), READY)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


# --- what it says -----------------------------------------------------------------------------------------------------


def test_gauges_and_counters() -> None:
    registry = rk.Registry(Settings(), builtin=False)
    metrics = registry.bind(Balancing)
    table = Table(metrics=metrics)
    table.up("a", "b", "c")
    table.check("a", NOT_READY)
    table.check("b", REFUSED, REFUSED)
    table.announce("d")
    table.directory.leave("c", CALLER)
    table.announce("a", caller="10.6.6.6")
    table.directory.describe()
    assert {state: metrics.backends[state].value for state in State} == {
        State.NEW: 1,
        State.UP: 0,
        State.DOWN: 1,
        State.DRAINING: 1,
    }
    assert metrics.pool.value == 0
    assert {why: metrics.departures[why].value for why in Departure} == dict.fromkeys(Departure, 1)
    assert metrics.registrations[ADDED].value == 4
    assert metrics.registrations[CONFLICT].value == 1


def test_a_flood_does_not_flood_the_log(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table.up("a")
    for _ in range(1_000):
        table.announce("a", caller="10.6.6.6")
    assert len(caplog.records) <= 51
    table.clock.now += 11
    table.announce("a", caller="10.6.6.6")
    assert any("more lines about backends were left out" in record.message for record in caplog.records)


def test_listed_says_all(table: Table) -> None:
    table.up("b", "a")
    table.check("a", READY)
    one, other = table.directory.listed()
    assert (one.backend.id, other.backend.id) == ("a", "b")
    assert (one.state, one.pooled, one.outcome, one.checked_seconds) == (State.UP, True, READY, 0.0)
    assert one.vitals == Vitals(ready=True)
    assert one.sources == (SourceName.ANNOUNCED,)


def test_two_tables_that_know_the_same_list_the_same() -> None:
    one, other = Table(), Table()
    one.up(*"abcdef")
    other.up(*"fedcba")
    other.check("c", NOT_READY)
    one.check("c", NOT_READY)
    assert one.directory.pool() == other.directory.pool()


# --- all of it at once ------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the table agrees with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(Rules(limit=6, limit_per_caller=4))

    ids = st.sampled_from("abcdefgh")
    callers = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"])
    addresses = st.sampled_from([f"10.0.1.{number}:3000" for number in range(6)])

    @rule(id=ids, address=addresses, caller=callers, port=st.sampled_from([9090, 9091]))
    def announce(self, id: str, address: str, caller: str, port: int) -> None:
        self.table.announce(id, address, caller, metrics_port=port)

    @rule(id=ids, caller=callers)
    def leave(self, id: str, caller: str) -> None:
        self.table.directory.leave(id, caller)

    @rule(id=ids, address=addresses, source=st.sampled_from([SourceName.ETCD, SourceName.STATIC]))
    def upsert(self, id: str, address: str, source: SourceName) -> None:
        self.table.directory.upsert(source, backend(id, address))

    @rule(ids=st.lists(ids, unique=True), source=st.sampled_from([SourceName.ETCD, SourceName.STATIC]))
    def resync(self, ids: list[str], source: SourceName) -> None:
        self.table.directory.resync(source, map(backend, ids))

    @rule(pick=st.integers(0, 5), outcome=st.sampled_from(CheckOutcome), seconds=st.floats(0, 50))
    def record(self, pick: int, outcome: CheckOutcome, seconds: float) -> None:
        entries = self.table.directory.entries()
        if entries:
            self.table.clock.now += seconds
            self.table.directory.record(entries[pick % len(entries)], outcome)

    @rule(seconds=st.floats(0, 200))
    def expire(self, seconds: float) -> None:
        self.table.clock.now += seconds
        self.table.directory.expire()

    @invariant()
    def agrees(self) -> None:
        directory = self.table.directory
        listed = directory.listed()
        assert len(listed) <= directory.rules.limit
        assert (
            len({each.backend.address for each in listed}) == len({each.backend.id for each in listed}) == len(listed)
        )
        pool = {each.backend.id for each in listed if each.pooled}
        assert pool == {each.id for each in directory.pool()}
        assert {each.backend.id for each in listed if each.state is State.UP} <= pool
        assert all(each.state in (State.UP, State.DOWN) for each in listed if each.pooled)
        for entry in directory.entries():
            assert (entry.position >= 0) is (entry.state is State.UP or (directory.panic and entry.lost))
        assert Counter(each.state for each in listed) == +Counter(directory._states)
        assert all(each.sources for each in listed)
        callers = Counter(
            entry.holders[SourceName.ANNOUNCED].caller
            for entry in directory.entries()
            if SourceName.ANNOUNCED in entry.holders
        )
        assert callers == directory._per_caller
        assert {entry.backend.address for entry in directory.entries()} == set(directory._by_address)


TestMachine = Machine.TestCase
TestMachine.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
