"""Event-loop lag: how late a loop runs what is due. `watch(registry)` from a coroutine, or with loop=.

A timer of the loop calls itself again and again, and each call notes by how much it was late. It is a timer and not a
task: a loop that is closed drops its timers without a warning, and programs that wait for all their tasks still end.
A block that lasts shows in the next scrape as rkmetrics_event_loop_overdue_seconds, if something else than that loop
answers the scrape (rk.serve's thread), and in the histogram when it is over.
"""

from __future__ import annotations

import os
from contextvars import Context
from math import inf
from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

from rkmetrics.catalogue.runtime import Runtime
from rkmetrics.collectors.base import Refresh
from rkmetrics.errors import RegistryError

if TYPE_CHECKING:
    import asyncio

    from rkmetrics.health import Source
    from rkmetrics.registry import Registry

__all__ = ["INTERVAL_SECONDS", "Watch", "install", "watch"]

# A block of t seconds shows as a lag between t - INTERVAL_SECONDS and t. Ten wake-ups a second take 0.15 % of a core.
INTERVAL_SECONDS = 0.1

SOURCE = "event_loop"

# No value holds its key: a registry or a loop that is dropped takes its watches along.
_watches: WeakKeyDictionary[Registry, WeakKeyDictionary[asyncio.AbstractEventLoop, Watch]] = WeakKeyDictionary()


def install(registry: Registry) -> Refresh:
    """Feed Runtime.event_loop_overdue. Loops are not looked for: `watch` says which there are."""
    overdue, watches = registry.bind(Runtime).event_loop_overdue, _loops(registry)

    def eventloop() -> None:
        now = monotonic()
        late = [seconds for each in list(watches.values()) if (seconds := each.overdue_seconds(now)) is not None]
        if late:
            overdue.set(max(late))
        else:
            overdue.clear()

    return eventloop


def watch(
    registry: Registry,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
    interval_seconds: float = INTERVAL_SECONDS,
    max_age_seconds: float | None = None,
) -> Watch:
    """Measure the lag of a loop, by default the running one, until it is closed or `stop()` is called.

    A loop is watched once for each registry: asked again, the same watch comes back. May be called from any thread when
    the loop is given. max_age_seconds: also make the loop a liveness source, so that /health says `stale` while it is
    blocked for longer than that. Raises RuntimeError without a running loop or for a closed one.
    """
    if not interval_seconds > 0:
        raise RegistryError(f"interval_seconds={interval_seconds!r}: expected more than 0")
    loop = loop or _running_loop()
    new = Watch(registry, loop, interval_seconds)
    found = _loops(registry).setdefault(loop, new)
    if found is new:
        loop.call_soon_threadsafe(new.begin, context=Context())
    if max_age_seconds is not None:
        found.beats(registry.health.source(SOURCE, max_age_seconds))
    return found


def _running_loop() -> asyncio.AbstractEventLoop:
    import asyncio  # a program without a loop does without

    return asyncio.get_running_loop()


def _loops(registry: Registry) -> WeakKeyDictionary[asyncio.AbstractEventLoop, Watch]:
    return _watches.setdefault(registry, WeakKeyDictionary())


class Watch:
    """The measuring of one loop for one registry."""

    def __init__(self, registry: Registry, loop: asyncio.AbstractEventLoop, interval_seconds: float) -> None:
        self._watches, self._loop, self._runtime = _loops(registry), ref(loop), ref(registry.bind(Runtime))
        self._interval_seconds = interval_seconds
        self._due, self._pid, self._stopped = inf, os.getpid(), False
        self._source: Source | None = None

    def stop(self) -> None:
        """Measure no more. May be called from any thread, and again."""
        self._stopped = True
        loop, source = self._loop(), self._source
        if loop is not None and self._watches.get(loop) is self:
            del self._watches[loop]
        if source is not None:
            source.close()

    def overdue_seconds(self, now: float) -> float | None:
        """How long the loop has been late by `now` (monotonic); None while it does not run, or in a forked child."""
        loop = self._loop()
        if loop is None or not loop.is_running() or self._pid != os.getpid():
            return None
        return max(0.0, now - self._due)

    def beats(self, source: Source) -> None:
        """Show life to a liveness source, too."""
        self._source = source

    def begin(self) -> None:
        """Set the next timer; in the loop's thread."""
        loop = self._loop()
        if loop is None:
            return
        self._pid, self._due = os.getpid(), monotonic() + self._interval_seconds
        # An empty context: the one that is current here may be a request's, and would be kept alive.
        loop.call_later(self._interval_seconds, self._tick, context=Context())
        if self._source is not None:
            self._source.beat()

    def _tick(self) -> None:
        runtime = self._runtime()
        if runtime is not None and not self._stopped:
            runtime.event_loop_lag.observe(max(0.0, monotonic() - self._due))
            self.begin()

    def __repr__(self) -> str:
        return f"<Watch: {self._loop()!r}, {'stopped' if self._stopped else 'measuring'}>"
