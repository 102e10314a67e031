"""One rendering for all who ask at the same time.

A scrape that arrives while the same page is being made gets that page (client_golang's CoalesceGather does so too).
What it misses is what happened since that rendering began, and the next scrape has it. Errors go to all who wait;
nothing is kept.

The work runs in a thread of its own. Callers only wait, so one that gives up (cancelled, interrupted, gone) takes
nothing from the others, and an event loop never renders. The work goes on without it, therefore pages in the making
have a limit of their own: who asks and goes away, again and again, gets no more threads than who waits. There is no
lock to hold: tables change by single dictionary operations. Three would wait for themselves, and do not wait: a
finaliser that renders inside of a rendering makes its own page, so does one that runs while the interpreter ends and no
thread runs any more, and a forked child, where the threads of its parent do not exist, starts with empty tables.
"""

from __future__ import annotations

import inspect
import os
import sys
import time

# Not threading.Thread: its start() waits until the thread runs, and an event loop would wait for other threads' slices.
from _thread import start_new_thread
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias

from rkmetrics.errors import RkMetricsError
from rkmetrics.exposition.base import Coding, Format

if TYPE_CHECKING:
    import asyncio

    from rkmetrics.model import Family
    from rkmetrics.registry import Registry

__all__ = ["MAX_CALLERS", "MAX_PAGES", "Busy", "Renderer"]

# What node_exporter allows (--web.max-requests): a Prometheus that gave up still has its request here, and it asks
# again.
MAX_CALLERS = 40
MAX_PAGES = MAX_CALLERS  # being made, for callers that wait and for those that gave up

# How long families are encoded at a stretch, and how long other threads then have.
_TURN_SECONDS = 0.0005
_PAUSE_SECONDS = 0.00005

_Page: TypeAlias = "Future[bytes]"
_Key: TypeAlias = tuple[str, str, frozenset[str] | None]


class Busy(RkMetricsError):
    """As many callers as are allowed wait for a page already, or no page can be begun; answer 503."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; scrape less often, or find out which collector is slow")


class _Tables:
    """What one process is rendering, and for how many."""

    __slots__ = ("callers", "pages", "pid")

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.pages: dict[_Key, _Page] = {}
        self.callers: dict[object, None] = {}

    @contextmanager
    def admitted(self) -> Generator[None]:
        """A place among the callers. Raises Busy."""
        caller = object()
        self.callers[caller] = None
        try:
            if len(self.callers) > MAX_CALLERS:
                raise Busy(f"{MAX_CALLERS} scrapes wait already")
            yield
        finally:
            del self.callers[caller]


class Renderer:
    """Pages of one registry. Safe in any thread, event loop, finaliser and forked child."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._tables = _Tables()

    def render(self, format: Format, coding: Coding, names: Collection[str] | None = None) -> bytes:
        """The page in a format and coding; names: only families with one of these names. Waits. Raises Busy."""
        if _is_rendering() or sys.is_finalizing():
            return self._make(format, coding, names)
        tables = self._current_tables()
        with tables.admitted():
            return self._page(tables, format, coding, names, may_wait=True).result()

    async def arender(self, format: Format, coding: Coding, names: Collection[str] | None = None) -> bytes:
        """The same for asyncio; the loop is not blocked."""
        from asyncio import get_running_loop  # not needed by threaded servers

        loop = get_running_loop()
        tables = self._current_tables()
        with tables.admitted():
            page = self._page(tables, format, coding, names, may_wait=False)
            made: asyncio.Future[None] = loop.create_future()
            page.add_done_callback(lambda _: _wake(loop, made))
            await made
            return page.result()

    def _current_tables(self) -> _Tables:
        if self._tables.pid != os.getpid():
            self._tables = _Tables()
        return self._tables

    def _page(
        self, tables: _Tables, format: Format, coding: Coding, names: Collection[str] | None, *, may_wait: bool
    ) -> _Page:
        """The page that is being made, or a new one. may_wait: without a thread, the caller can make it."""
        key = (format.name, coding.name, None if names is None else frozenset(names))
        new: _Page = Future()
        page = tables.pages.setdefault(key, new)
        if page is not new:
            return page
        work = (tables, key, page, lambda: self._make(format, coding, names))
        if len(tables.pages) > MAX_PAGES:
            _refuse(tables, key, page, f"{MAX_PAGES} scrapes are under way already")
            return page
        try:
            start_new_thread(_run, work)
        except RuntimeError:  # no thread is to be had: late is better than never, but not for a whole event loop
            if may_wait:
                _run(*work)
            else:
                _refuse(tables, key, page, "no thread can be started for a scrape")
        return page

    def _make(self, format: Format, coding: Coding, names: Collection[str] | None) -> bytes:
        began = time.perf_counter()
        page = coding.compress(format.encode(_politely(self._registry.collect(names))))
        self._registry.exporter.render_duration.observe(time.perf_counter() - began)
        return page


def _politely(families: Iterable[Family]) -> Iterator[Family]:
    """The families, with pauses in which a waiting event loop gets the interpreter's lock before the switch interval
    (5 ms) ends. Giving the lock up is not enough: this thread would have it back before another wakes.
    """
    began = time.perf_counter()
    for family in families:
        yield family
        if time.perf_counter() - began > _TURN_SECONDS:
            time.sleep(_PAUSE_SECONDS)
            began = time.perf_counter()


def _run(tables: _Tables, key: _Key, page: _Page, make: Callable[[], bytes]) -> None:
    """Make a page for all who wait for it. It leaves the table first: who comes now has a right to a newer one."""
    try:
        made = make()
    except BaseException as error:
        tables.pages.pop(key, None)
        page.set_exception(error)
    else:
        tables.pages.pop(key, None)
        page.set_result(made)


def _refuse(tables: _Tables, key: _Key, page: _Page, why: str) -> None:
    """Nobody makes the page; who shares it already is told so too."""
    tables.pages.pop(key, None)
    page.set_exception(Busy(why))


def _wake(loop: asyncio.AbstractEventLoop, made: asyncio.Future[None]) -> None:
    with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
        loop.call_soon_threadsafe(_set, made)


def _set(made: asyncio.Future[None]) -> None:
    if not made.done():  # it is when its caller gave up
        made.set_result(None)


# Where a thread has part in a page that others may wait for, or is on its way there.
_RENDERING = frozenset(
    function.__code__
    for function in (Renderer.render, Renderer.arender, Renderer._page, _run)  # pyright: ignore[reportPrivateUsage]
)


def _is_rendering() -> bool:
    """Whether the caller's caller is called by a rendering: a finaliser, say, that garbage collection runs inside it.

    Looked up in the stack. A flag would be set a moment late: a finaliser may run in a thread's very first step.
    """
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame and frame.f_back
    while frame is not None:
        if frame.f_code in _RENDERING:
            return True
        frame = frame.f_back
    return False
