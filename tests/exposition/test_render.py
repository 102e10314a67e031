"""Concurrent scrapes share a rendering, and nothing that happens to one of them harms another."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.exposition import CODINGS, FORMATS, choose_coding
from rkmetrics.exposition import render as module
from rkmetrics.exposition.render import MAX_CALLERS, MAX_PAGES, Busy, Renderer

TEXT, OPENMETRICS, PROTOBUF = FORMATS
IDENTITY, GZIP = CODINGS[-1], choose_coding(b"gzip")


class Chat(rk.MetricSet):
    messages = rk.Counter("rendered_messages_total", "Messages handled.")
    members = rk.Gauge("chat_members", "Members in rooms.", across="sum")


class Slow:
    """A collector that counts its runs and holds each until it is let go."""

    def __init__(self) -> None:
        self.runs = 0
        self.began = threading.Semaphore(0)
        self.go = threading.Event()

    def __call__(self) -> None:
        self.runs += 1
        self.began.release()
        assert self.go.wait(30)


@pytest.fixture
def registry() -> rk.Registry:
    made = rk.Registry(rk.Settings(), builtin=False)
    made.bind(Chat, actor_name="lobby").messages.inc(7)
    return made


@pytest.fixture
def slow(registry: rk.Registry) -> Iterator[Slow]:
    collector = Slow()
    registry.add_collector(collector, name="slow", timeout_seconds=30)
    yield collector
    collector.go.set()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what other threads will do in any case; the limit is for bugs only."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def callers(renderer: Renderer) -> int:
    return len(renderer._tables.callers)


async def callers_come_to(renderer: Renderer, count: int) -> None:
    while callers(renderer) < count:  # noqa: ASYNC110 - they come when the loop has run them, not by an event
        await asyncio.sleep(0)


def test_a_page_is_the_registry_in_a_format_and_a_coding(registry: rk.Registry) -> None:
    renderer = Renderer(registry)
    page = renderer.render(TEXT, IDENTITY)
    assert b'rendered_messages_total{actor_name="lobby"} 7\n' in page
    assert b"chat_members" not in page, "no gauge was set"
    assert renderer.render(OPENMETRICS, IDENTITY).endswith(b"# EOF\n")
    assert renderer.render(PROTOBUF, IDENTITY) != page
    assert renderer.render(TEXT, GZIP)[:2] == b"\x1f\x8b"


def test_names_choose_families(registry: rk.Registry) -> None:
    page = Renderer(registry).render(TEXT, IDENTITY, frozenset({"rendered_messages_total"}))
    assert page.count(b"# TYPE") == 1
    assert b"rendered_messages_total" in page


def test_each_rendering_is_measured(registry: rk.Registry) -> None:
    renderer = Renderer(registry)
    renderer.render(TEXT, IDENTITY)
    renderer.render(TEXT, IDENTITY)
    assert registry.exporter.render_duration.count == 2


def test_a_page_is_not_kept(registry: rk.Registry) -> None:
    renderer = Renderer(registry)
    renderer.render(TEXT, IDENTITY)
    registry.bind(Chat, actor_name="lobby").messages.inc()
    assert b'rendered_messages_total{actor_name="lobby"} 8\n' in renderer.render(TEXT, IDENTITY)
    assert renderer._tables.pages == {}


def test_scrapes_at_the_same_time_share_one_rendering(
    registry: rk.Registry, slow: Slow, threads: ThreadPoolExecutor
) -> None:
    renderer = Renderer(registry)
    scrapes = [threads.submit(renderer.render, TEXT, IDENTITY) for _ in range(16)]
    eventually(lambda: callers(renderer) == 16)
    slow.go.set()
    pages = {scrape.result(30) for scrape in scrapes}
    assert len(pages) == 1
    assert slow.runs == 1
    assert registry.exporter.render_duration.count == 1


def test_different_pages_are_rendered_apart(registry: rk.Registry, slow: Slow, threads: ThreadPoolExecutor) -> None:
    renderer = Renderer(registry)
    asked = [
        (TEXT, IDENTITY, None),
        (TEXT, GZIP, None),
        (OPENMETRICS, IDENTITY, None),
        (TEXT, IDENTITY, {"chat_members"}),
    ]
    scrapes = [threads.submit(renderer.render, *each) for each in asked for _ in range(2)]
    eventually(lambda: callers(renderer) == 8)
    slow.go.set()
    assert len({scrape.result(30) for scrape in scrapes}) == 4
    assert registry.exporter.render_duration.count == 4


def test_past_the_limit_a_caller_is_sent_away_and_room_comes_back(
    registry: rk.Registry, slow: Slow, threads: ThreadPoolExecutor
) -> None:
    renderer = Renderer(registry)
    scrapes = [threads.submit(renderer.render, TEXT, IDENTITY) for _ in range(MAX_CALLERS)]
    eventually(lambda: callers(renderer) == MAX_CALLERS)
    with pytest.raises(Busy, match="40 scrapes"):
        renderer.render(TEXT, IDENTITY)
    with pytest.raises(Busy):
        asyncio.run(renderer.arender(PROTOBUF, IDENTITY))
    slow.go.set()
    assert len({scrape.result(30) for scrape in scrapes}) == 1
    eventually(lambda: callers(renderer) == 0)
    renderer.render(TEXT, IDENTITY)


class Broken:
    """A registry whose snapshot fails."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.go, self.calls = error, threading.Event(), 0

    def collect(self, names: object) -> Any:
        self.calls += 1
        assert self.go.wait(30)
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no snapshot"), SystemExit(3)])
def test_an_error_goes_to_all_who_wait_and_is_not_kept(error: BaseException, threads: ThreadPoolExecutor) -> None:
    broken = Broken(error)
    renderer = Renderer(broken)  # type: ignore[arg-type]
    scrapes = [threads.submit(renderer.render, TEXT, IDENTITY) for _ in range(5)]
    eventually(lambda: callers(renderer) == 5)
    broken.go.set()
    assert [scrape.exception(30) for scrape in scrapes] == [error] * 5
    assert broken.calls == 1
    with pytest.raises(type(error)):
        renderer.render(TEXT, IDENTITY)
    assert broken.calls == 2
    assert (renderer._tables.pages, callers(renderer)) == ({}, 0)


async def test_coroutines_share_a_rendering_with_threads_and_the_loop_goes_on(
    registry: rk.Registry, slow: Slow, threads: ThreadPoolExecutor
) -> None:
    renderer = Renderer(registry)
    in_thread = threads.submit(renderer.render, TEXT, IDENTITY)
    eventually(lambda: callers(renderer) == 1)
    in_loop = [asyncio.create_task(renderer.arender(TEXT, IDENTITY)) for _ in range(8)]
    await callers_come_to(renderer, 9)  # the loop runs while all of them wait
    slow.go.set()
    pages = await asyncio.gather(*in_loop)
    assert {*pages, in_thread.result(30)} == {pages[0]}
    assert slow.runs == 1


async def test_a_coroutine_that_is_cancelled_takes_nothing_from_the_others(registry: rk.Registry, slow: Slow) -> None:
    renderer = Renderer(registry)
    first, second, third = (asyncio.create_task(renderer.arender(TEXT, IDENTITY)) for _ in range(3))
    await callers_come_to(renderer, 3)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(second, 0.001)
    assert callers(renderer) == 1
    slow.go.set()
    assert b"rendered_messages_total" in await third
    assert slow.runs == 1


async def test_who_asks_and_gives_up_again_and_again_gets_no_more_work_done_than_who_waits(
    registry: rk.Registry, slow: Slow, threads: ThreadPoolExecutor
) -> None:
    renderer = Renderer(registry)
    waiting = threads.submit(renderer.render, TEXT, IDENTITY)
    assert slow.began.acquire(timeout=30)
    for number in range(10 * MAX_PAGES):
        scrape = asyncio.create_task(renderer.arender(TEXT, IDENTITY, {f"name_{number}"}))
        await asyncio.sleep(0)
        scrape.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scrape
    assert len(renderer._tables.pages) == MAX_PAGES
    assert callers(renderer) == 1
    with pytest.raises(Busy, match="40 scrapes"):
        await renderer.arender(OPENMETRICS, IDENTITY)
    slow.go.set()
    assert b"rendered_messages_total" in waiting.result(30)
    eventually(lambda: renderer._tables.pages == {})  # the places come back when the pages are done
    assert registry.exporter.render_duration.count == MAX_PAGES
    assert b"rendered_messages_total" in await renderer.arender(TEXT, IDENTITY)


def test_a_loop_that_is_closed_in_the_meantime_is_not_missed(registry: rk.Registry, slow: Slow) -> None:
    renderer = Renderer(registry)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(renderer.arender(TEXT, IDENTITY), 0.001)

    asyncio.run(give_up())
    slow.go.set()
    assert b"rendered_messages_total" in renderer.render(TEXT, IDENTITY)
    eventually(lambda: renderer._tables.pages == {})


async def test_an_error_reaches_coroutines() -> None:
    broken = Broken(RuntimeError("no snapshot"))
    broken.go.set()
    renderer = Renderer(broken)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no snapshot"):
        await renderer.arender(TEXT, IDENTITY)


def test_a_finaliser_that_renders_inside_of_a_rendering_does_not_wait_for_it(registry: rk.Registry) -> None:
    renderer = Renderer(registry)
    pages: list[bytes] = []

    class Resource:
        def __init__(self) -> None:
            self.me = self  # freed by the collector only

        def __del__(self) -> None:
            pages.append(renderer.render(TEXT, IDENTITY))

    def make_and_collect() -> None:
        if not pages:
            Resource()
        gc.collect()

    registry.add_refresher(make_and_collect)
    outer = renderer.render(TEXT, IDENTITY)
    assert pages
    assert all(b'rendered_messages_total{actor_name="lobby"} 7\n' in page for page in [outer, *pages])


def test_finalisers_that_render_all_the_time_never_deadlock(registry: rk.Registry, threads: ThreadPoolExecutor) -> None:
    renderer = Renderer(registry)
    made = 0

    class Resource:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            nonlocal made
            renderer.render(TEXT, IDENTITY)
            made += 1

    def work() -> None:
        for _ in range(20):
            Resource()
            renderer.render(TEXT, IDENTITY)

    threshold = gc.get_threshold()
    gc.set_threshold(50)
    try:
        for done in [threads.submit(work) for _ in range(8)]:
            done.result(120)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert made == 160


AT_EXIT = """
import rkmetrics as rk
from rkmetrics.exposition import CODINGS, FORMATS
from rkmetrics.exposition.render import Renderer

class Resource:
    def __init__(self):
        self.me = self
        self.renderer = Renderer(rk.Registry(rk.Settings(), builtin=False))
    def __del__(self):
        print(len(self.renderer.render(FORMATS[0], CODINGS[-1])) > 100)

kept = Resource()
"""


def test_a_finaliser_that_renders_while_the_interpreter_ends_does_not_keep_it() -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def refuse(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_without_a_thread_the_caller_renders_by_itself(registry: rk.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "start_new_thread", refuse)
    renderer = Renderer(registry)
    assert b"rendered_messages_total" in renderer.render(TEXT, IDENTITY)


def test_without_a_thread_an_event_loop_does_not_render_by_itself(
    registry: rk.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector may take its whole time, and the loop serves others."""
    renderer = Renderer(registry)
    with monkeypatch.context() as patch:
        patch.setattr(module, "start_new_thread", refuse)
        with pytest.raises(Busy, match="no thread"):
            asyncio.run(renderer.arender(TEXT, IDENTITY))
    assert (renderer._tables.pages, callers(renderer)) == ({}, 0)
    assert b"rendered_messages_total" in asyncio.run(renderer.arender(TEXT, IDENTITY))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_child_forked_in_the_middle_of_a_rendering_renders_for_itself(
    registry: rk.Registry, slow: Slow, threads: ThreadPoolExecutor
) -> None:
    renderer = Renderer(registry)
    waiting = [threads.submit(renderer.render, TEXT, IDENTITY) for _ in range(MAX_CALLERS)]
    eventually(lambda: callers(renderer) == MAX_CALLERS)
    assert slow.began.acquire(timeout=30)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            slow.go.set()
            code = 0 if b'rendered_messages_total{actor_name="lobby"} 7\n' in renderer.render(TEXT, IDENTITY) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    slow.go.set()
    assert len({each.result(30) for each in waiting}) == 1
