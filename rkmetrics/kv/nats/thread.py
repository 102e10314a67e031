"""A link in a thread of its own, for those who publish.

An engine publishes from its loop, from a thread, or from a program that has no loop at all; and an event loop that is
blocked for five seconds must not lose the connection. So publishing is an append to what a rider holds and a ring at
its doorbell, and everything that waits is in this thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from rkmetrics.background import unplug
from rkmetrics.kv.nats.link import Link, Rider
from rkmetrics.lifetime import PROCESS, Hooks

__all__ = ["Doorbell", "LinkThread", "Resident"]

log = logging.getLogger("rkmetrics.nats")

#: What is kept of the time to stop, for ending a connection that hangs.
MARGIN_SECONDS = 0.5


class Doorbell:
    """Wakes one coroutine from any thread. While it rings already, ringing costs a flag and no system call."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ringing = False

    def ring(self) -> None:
        """Something is there; whoever waits, or waits next, gets to know."""
        if self.ringing:
            return
        self.ringing = True
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Return when it was rung since the last return."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._event = loop, asyncio.Event()
        if not self.ringing:  # what is rung from here on sets the event of this loop
            await self._event.wait()
        self._event.clear()
        self.ringing = False


class Resident(Rider, Protocol):
    """A rider of a link thread."""

    def forget(self) -> None:
        """In a forked child: what waits is the parent's to send."""


class LinkThread:
    """Runs a link while it has riders. `call` and what builds on it may come from any thread."""

    def __init__(self, make_link: Callable[[], Link]) -> None:
        self._make_link = make_link
        self._riders: list[Resident] = []
        self._stopped = False
        self._unhook: Callable[[], None] = lambda: None
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a signal handler may publish while the main thread is in `start`
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: Link | None = None

    def add(self, rider: Resident) -> None:
        """Take a rider on, and start with the first."""
        self._riders.append(rider)
        self.start()
        self._call(lambda link: link.add(rider))

    def remove(self, rider: Resident, timeout_seconds: float) -> None:
        """Let a rider send what waits, for so long at most, and go on without it."""
        if rider not in self._riders:
            return
        self._riders.remove(rider)
        loop, link = self._loop, self._link
        if loop is None or link is None or threading.current_thread() is self._thread:
            return
        leaving = _leave(link, rider, timeout_seconds)
        try:
            left = asyncio.run_coroutine_threadsafe(leaving, loop)
        except RuntimeError:  # the loop is closed
            leaving.close()
            return
        with suppress(Exception):
            left.result(timeout_seconds + MARGIN_SECONDS)

    def start(self) -> None:
        """Start the thread if it does not run; in a forked child none does."""
        if self._thread is not None or self._stopped:
            return
        with self._lock:
            ready = threading.Event()
            thread = threading.Thread(target=self._run, args=(ready,), name="rkmetrics-nats", daemon=True)
            if self._thread is None:
                self._thread = thread
                thread.start()
                self._unhook()
                self._unhook = PROCESS.add(Hooks(self._ask_to_stop, self.stop, self._go_on_in_child))
                ready.wait()

    @property
    def running(self) -> bool:
        """Whether the thread is there; publishers look, as a forked child has none."""
        return self._thread is not None

    def stop(self, timeout_seconds: float) -> bool:
        """Send what waits and end, within the time. Whether it ended."""
        self._stopped = True
        self._ask_to_stop(time.monotonic() + timeout_seconds)
        self._unhook()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout_seconds)
        return not thread.is_alive()

    def _ask_to_stop(self, deadline: float) -> None:
        self._stopped = True
        drain = max(deadline - time.monotonic() - MARGIN_SECONDS, 0.1)
        self._call(lambda link: link.stop(drain))

    def _call(self, function: Callable[[Link], Any]) -> None:
        loop, link = self._loop, self._link
        if loop is not None and link is not None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(function, link)

    def _run(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._live(ready))
        except Exception:
            log.exception("the NATS thread ends; nothing more is sent")
        finally:
            ready.set()

    async def _live(self, ready: threading.Event) -> None:
        link = self._make_link()
        for rider in list(self._riders):
            link.add(rider)
        self._link, self._loop = link, asyncio.get_running_loop()
        ready.set()
        await link.run()

    def _go_on_in_child(self) -> None:
        """No thread has come along, and the socket is the parent's: let go, and begin with the next publication."""
        link = self._link
        self._reset()
        if link is not None:
            number = link.fileno()
            if number is not None and number >= 0:
                unplug(number)
            link.forget()
            self._abandoned = link  # kept: what is collected with it would close the parent's connection in order
        for rider in self._riders:
            rider.forget()


async def _leave(link: Link, rider: Rider, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await link.remove(rider)
