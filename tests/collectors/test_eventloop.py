"""Real loops that are really blocked. What is asserted is which bucket and which order, never how fast."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from weakref import ref

import pytest

from rkmetrics.collectors import eventloop
from rkmetrics.collectors.eventloop import watch
from rkmetrics.errors import RegistryError
from rkmetrics.health import Status
from rkmetrics.model import HistogramValue
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings

Look = Callable[..., "float | HistogramValue | None"]
LAG, OVERDUE = "rkmetrics_event_loop_lag_seconds", "rkmetrics_event_loop_overdue_seconds"


def overdue(look: Look) -> float:
    """How late a loop is now; 0 if none runs."""
    value = look(OVERDUE)
    assert not isinstance(value, HistogramValue)
    return value or 0.0


def observed(look: Look, registry: Registry, above: float = -1.0) -> int:
    """How many lags there were above a bucket's bound."""
    value = look(LAG, registry)
    assert isinstance(value, HistogramValue)
    return sum(value.counts) - sum(
        count for bound, count in zip(value.bounds, value.counts, strict=False) if bound <= above
    )


async def ticks(look: Look, registry: Registry) -> None:
    """Wait until two more lags were measured."""
    until = observed(look, registry) + 2
    while observed(look, registry) < until:  # noqa: ASYNC110 - nobody sets an event
        await asyncio.sleep(0.01)


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def wait_for(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.005)


async def test_a_loop_blocked_for_200_ms_shows_in_the_next_scrape(registry: Registry, look: Look) -> None:
    watch(registry)
    await ticks(look, registry)
    before = observed(look, registry, above=0.05)
    time.sleep(0.2)  # noqa: ASYNC251 - the point
    assert overdue(look) > 0.05
    await asyncio.sleep(0.001)
    assert observed(look, registry, above=0.05) > before


async def test_a_block_is_seen_from_another_thread_while_it_lasts(registry: Registry, look: Look) -> None:
    with running_loop() as loop:
        watch(registry, loop=loop)
        wait_for(lambda: observed(look, registry) > 0)
        release = Event()
        loop.call_soon_threadsafe(release.wait)
        wait_for(lambda: overdue(look) > 0.1)
        before = observed(look, registry, above=0.1)
        release.set()
        wait_for(lambda: observed(look, registry, above=0.1) > before)
    assert look(OVERDUE) is None  # a loop that does not run is not late


def test_no_loop_no_overdue(registry: Registry, look: Look) -> None:
    assert look(OVERDUE) is None
    assert observed(look, registry) == 0


async def test_a_loop_is_watched_once_for_each_registry(registry: Registry, look: Look) -> None:
    other = Registry(Settings())
    mine = watch(registry)
    assert watch(registry) is mine
    assert watch(other) is not mine
    await ticks(look, registry)
    await ticks(look, other)


async def test_a_watch_that_is_stopped_measures_no_more_and_can_be_begun_again(registry: Registry, look: Look) -> None:
    first = watch(registry)
    await ticks(look, registry)
    first.stop()
    first.stop()
    before = observed(look, registry)
    await asyncio.sleep(3 * eventloop.INTERVAL_SECONDS)
    assert observed(look, registry) == before
    assert look(OVERDUE) is None
    assert watch(registry) is not first
    await ticks(look, registry)


def test_a_loop_that_is_closed_or_left_says_nothing(
    registry: Registry, look: Look, caplog: pytest.LogCaptureFixture
) -> None:
    """A task would be destroyed while it is pending, and say so; warnings are errors here."""

    async def main() -> None:
        watch(registry)
        await ticks(look, registry)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        gone = ref(loop)
        del loop
        gc.collect()
    assert gone() is None
    assert [record.message for record in caplog.records if record.levelno > logging.DEBUG] == []


async def test_a_watch_is_no_task(registry: Registry) -> None:
    """Programs wait for all tasks at their end."""
    watch(registry)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_watch_keeps_no_registry_alive() -> None:
    registry = Registry(Settings())
    gone = ref(registry)
    watch(registry)
    await asyncio.sleep(0.1)
    del registry
    gc.collect()
    assert gone() is None
    await asyncio.sleep(0.1)


def test_a_loop_that_is_closed_already_is_refused(registry: Registry) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        watch(registry, loop=loop)


def test_without_a_running_loop_one_has_to_be_given(registry: Registry) -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        watch(registry)


async def test_an_interval_is_above_zero(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="interval_seconds=0"):
        watch(registry, interval_seconds=0)


def test_a_blocked_loop_makes_health_stale_if_asked(registry: Registry) -> None:
    registry.health.start()
    with running_loop() as loop:
        watched = watch(registry, loop=loop, max_age_seconds=0.2)
        wait_for(lambda: registry.health.status is Status.OK)
        release = Event()
        loop.call_soon_threadsafe(release.wait)
        wait_for(lambda: registry.health.status is Status.STALE)
        release.set()
        wait_for(lambda: registry.health.status is Status.OK)
        watched.stop()
    assert registry.health.ready


def test_a_forked_child_does_not_take_its_parent_s_loop_for_blocked(script: Callable[..., str]) -> None:
    out = script("""
import asyncio, os
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings
from rkmetrics.collectors.eventloop import watch
registry = Registry(Settings())
def overdue():
    family, = registry.collect(["rkmetrics_event_loop_overdue_seconds"])
    return len(list(family.series()))
async def main():
    watch(registry)
    await asyncio.sleep(0.1)
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, str(overdue()).encode())
        os._exit(0)
    os.wait()
    print(os.read(reader, 9).decode(), overdue())
asyncio.run(main())
""")
    assert out.split() == ["0", "1"]
