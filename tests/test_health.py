"""The health state machine: phases, sources, serverless, and that it can be called from anywhere."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.errors import RegistryError
from rkmetrics.health import CODES, TRANSITIONS, Health, Link, Phase, Status


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(clock=clock)


LIFE = [
    ("begin_start", Status.STARTING),
    ("start", Status.OK),
    ("begin_drain", Status.DRAINING),
    ("begin_shutdown", Status.SHUTTING_DOWN),
    ("finish_shutdown", Status.SHUT_DOWN),
]


def test_a_life_passes_through_every_phase_in_order(health: Health) -> None:
    assert health.check().status is Status.NOT_STARTED
    for method, status in LIFE:
        getattr(health, method)()
        assert health.check().status is status
        assert health.check().code == (200 if status is Status.OK else 503)


def test_only_ok_is_200() -> None:
    assert {status for status, code in CODES.items() if code == 200} == {Status.OK}
    assert set(CODES.values()) == {200, 503}


@given(st.lists(st.sampled_from(sorted(TRANSITIONS))))
def test_a_phase_never_goes_back_but_for_a_new_start_after_the_end(events: list[str]) -> None:
    health = Health()
    for event in events:
        before = health.phase
        getattr(health, event)()
        restart = before is Phase.SHUT_DOWN and event in ("begin_start", "start")
        assert health.phase == (TRANSITIONS[event] if restart else max(before, TRANSITIONS[event]))


def test_a_drain_that_is_asked_for_before_the_start_is_not_undone_by_it(health: Health) -> None:
    health.begin_drain()
    health.start()
    assert health.check().status is Status.DRAINING


def test_not_started_says_what_to_call(health: Health) -> None:
    assert "health.start()" in str(health.check().details["hint"])
    health.start()
    assert health.check().details == {}


def test_a_started_process_without_sources_is_ok(health: Health) -> None:
    health.start()
    assert health.ready


def test_a_source_makes_it_wait_for_the_first_beat(health: Health) -> None:
    engine = health.source("engine", max_age_seconds=20)
    health.start()
    assert health.check().status is Status.STARTING
    engine.beat()
    assert health.check().status is Status.OK


def test_a_source_older_than_its_limit_is_stale_and_recovers(health: Health, clock: Clock) -> None:
    engine = health.source("engine", max_age_seconds=20)
    health.start()
    engine.beat()
    clock.now += 20
    assert health.check().status is Status.OK
    clock.now += 0.001
    assert health.check().status is Status.STALE
    assert health.check().code == 503
    engine.beat()
    assert health.check().status is Status.OK


def test_the_first_beat_has_the_limit_as_grace_from_the_start(health: Health, clock: Clock) -> None:
    health.source("engine", max_age_seconds=20)
    clock.now += 100  # registered long before the start: only the time since the start counts
    health.start()
    clock.now += 20
    assert health.check().status is Status.STARTING
    clock.now += 1
    assert health.check().status is Status.STALE


def test_a_source_registered_late_has_its_own_grace(health: Health, clock: Clock) -> None:
    health.start()
    clock.now += 100
    health.source("engine", max_age_seconds=20)
    assert health.check().status is Status.STARTING


def test_one_stale_source_outweighs_fresh_and_waiting_ones(health: Health, clock: Clock) -> None:
    old, young = health.source("old", 1), health.source("young", 100)
    health.source("waiting", 100)
    health.start()
    old.beat()
    young.beat()
    clock.now += 2
    assert health.check().status is Status.STALE


def test_a_source_without_limit_needs_one_beat_only(health: Health, clock: Clock) -> None:
    model = health.source("model", max_age_seconds=None)
    health.start()
    clock.now += 10_000
    assert health.check().status is Status.STARTING
    model.beat()
    clock.now += 10_000
    assert health.check().status is Status.OK


def test_a_closed_source_no_longer_counts(health: Health, clock: Clock) -> None:
    engine = health.source("engine", 20)
    health.start()
    engine.close()
    engine.close()
    engine.beat()
    assert health.check().status is Status.OK
    assert health.source("engine", 20) is not engine
    engine.close()  # of the old one: the new one stays
    assert health.check().status is Status.STARTING


def test_a_source_is_registered_once_by_name(health: Health) -> None:
    assert health.source("engine", 20) is health.source("engine", 20)
    with pytest.raises(RegistryError, match=r"'engine'.*registered with 20"):
        health.source("engine", 30)


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_is_above_zero(health: Health, limit: float) -> None:
    with pytest.raises(RegistryError, match="more than 0"):
        health.source("engine", limit)


def test_sources_do_not_matter_while_draining(health: Health, clock: Clock) -> None:
    health.source("engine", 1).beat()
    health.start()
    health.begin_drain()
    clock.now += 10
    assert health.check().status is Status.DRAINING


def test_serverless_without_a_link_is_ok(clock: Clock) -> None:
    """DESIGN section 15: early health is 503, and 200 only where it is asked for."""
    health = Health(serverless=True, clock=clock)
    assert (health.check().status, health.check().code) == (Status.OK, 200)
    engine = health.source("engine", 20)
    health.start()
    clock.now += 1000
    assert health.check().code == 200
    engine.beat()
    clock.now += 21
    assert health.check().status is Status.STALE


@pytest.mark.parametrize("method", ["begin_drain", "begin_shutdown", "finish_shutdown"])
def test_serverless_does_not_hide_the_end(method: str) -> None:
    health = Health(serverless=True)
    getattr(health, method)()
    assert health.check().code == 503


def test_one_hot_is_one_for_the_state_that_check_gives(health: Health) -> None:
    for method, status in LIFE:
        getattr(health, method)()
        one_hot = health.one_hot()
        assert list(one_hot) == list(Status)
        assert [state for state, value in one_hot.items() if value] == [status]
        assert sum(one_hot.values()) == 1.0


def test_details_show_each_source_and_nothing_else(health: Health, clock: Clock) -> None:
    health.source("engine", 20).beat()
    health.source("model", None)
    health.start()
    clock.now += 1.23456
    assert health.check().details == {
        "sources": {
            "engine": {"state": Link.FRESH, "age_seconds": 1.235, "max_age_seconds": 20},
            "model": {"state": Link.WAITING, "age_seconds": None, "max_age_seconds": None},
        }
    }


def test_shutdown_as_a_block_ends_shut_down_also_on_an_exception(health: Health) -> None:
    health.start()

    def take_apart() -> None:
        with health.shutdown():
            assert health.check().status is Status.SHUTTING_DOWN
            raise RuntimeError("the pool would not close")

    with pytest.raises(RuntimeError):
        take_apart()
    assert health.check().status is Status.SHUT_DOWN


def test_a_process_may_start_again_after_the_end(health: Health, clock: Clock) -> None:
    health.start()
    health.finish_shutdown()
    health.source("engine", 20)
    clock.now += 100
    health.start()
    assert health.check().status is Status.STARTING  # with a grace of its own
    health.begin_drain()
    assert health.check().status is Status.DRAINING


def test_the_wall_clock_is_never_asked() -> None:
    health = Health()
    health.source("engine", 20).beat()
    health.start()
    assert (
        health.check().status is Status.OK
    )  # the default clock is time.monotonic, which a step of the date leaves alone
    assert health._clock.__name__ == "monotonic"


def test_a_signal_handler_may_beat_check_and_drain(health: Health) -> None:
    engine = health.source("engine", None)
    health.start()
    seen: list[Status] = []

    def handler(*_: object) -> None:
        engine.beat()
        seen.append(health.check().status)
        health.begin_drain()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        for _ in range(1000):
            os.kill(os.getpid(), signal.SIGUSR1)
            health.check()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen[0] is Status.OK
    assert health.check().status is Status.DRAINING


def test_a_finalizer_may_beat_and_check(health: Health) -> None:
    engine = health.source("engine", None)
    health.start()

    class Room:
        def __del__(self) -> None:
            engine.beat()
            health.check()

    for _ in range(100):
        room = Room()
        room.itself = room  # type: ignore[attr-defined]
    del room
    gc.collect()
    assert health.check().status is Status.OK


def test_threads_that_race_to_end_it_never_take_it_back() -> None:
    for _ in range(100):
        health = Health()
        health.start()
        barrier = threading.Barrier(3)

        def run(method: Callable[[], None], barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            method()

        methods = (health.begin_drain, health.begin_shutdown, health.finish_shutdown)
        threads = [threading.Thread(target=run, args=(method,)) for method in methods]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert health.check().status is Status.SHUT_DOWN


def test_who_was_told_that_we_are_not_ready_is_counted(health: Health) -> None:
    health.start()
    health.note_told(ready=health.ready)
    assert health.told_not_ready == 0
    health.begin_drain()
    health.note_told(ready=health.ready)
    assert health.told_not_ready == 1
