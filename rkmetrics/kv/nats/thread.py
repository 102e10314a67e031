"""A link in a thread of its own, for those who publish.

An engine publishes from its loop, from a thread, or from a program that has no loop at all; and an event loop that is
blocked for five seconds must not lose the connection. So publishing is an append to what a rider holds and a ring at
its doorbell, and everything that waits is in this thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from rkmetrics.background import LoopThread
from rkmetrics.nats_link import Link, Rider

__all__ = ["Doorbell", "LinkThread", "Resident"]

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
    """Runs a link, from its first rider on. All of it may be called from any thread."""

    def __init__(self, make_link: Callable[[], Link]) -> None:
        self._make_link = make_link
        self._riders: list[Resident] = []
        self._link: Link | None = None
        self._abandoned: list[Link] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._thread = LoopThread("rkmetrics-nats", self._live, self._end, self._forget)

    def add(self, rider: Resident) -> None:
        """Take a rider on, and start with the first."""
        self._riders.append(rider)
        self.start()
        self._thread.soon(self._board, rider)

    def remove(self, rider: Resident, timeout_seconds: float) -> None:
        """Let a rider send what waits, for so long at most, and go on without it."""
        link = self._link
        if rider in self._riders:
            self._riders.remove(rider)
            if link is not None:
                self._thread.call(_leave(link, rider, timeout_seconds), timeout_seconds + MARGIN_SECONDS)

    def retire(self, rider: Resident, timeout_seconds: float, then: Callable[[], object]) -> None:
        """The same without waiting for it; `then` is called in the end, in the link's thread."""
        if rider in self._riders:
            self._riders.remove(rider)
            self._thread.soon(self._see_off, rider, timeout_seconds, then)

    def start(self) -> None:
        """Start the thread if it does not run; in a forked child none does."""
        if not self._stopped:
            self._thread.start()

    def stop(self, timeout_seconds: float) -> bool:
        """Send what waits and end, within the time. Whether it ended."""
        self._stopped = True
        return self._thread.stop(timeout_seconds)

    # --- in the thread ------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        link = self._link = self._make_link()
        for rider in list(self._riders):
            link.add(rider)
        await link.run()

    def _board(self, rider: Resident) -> None:
        if self._link is not None:
            self._link.add(rider)

    def _see_off(self, rider: Resident, seconds: float, then: Callable[[], object]) -> None:
        link = self._link
        if link is None:
            then()
            return
        leaving = asyncio.create_task(_leave(link, rider, seconds))
        leaving.add_done_callback(lambda _: then())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    def _end(self, seconds: float) -> None:
        self._stopped = True
        if self._link is not None:
            self._link.stop(max(seconds - MARGIN_SECONDS, 0.1))

    def _forget(self) -> None:
        """In a forked child the thread is gone and the socket unplugged; its first publication begins anew."""
        link, self._link = self._link, None
        if link is not None:
            link.forget()
            self._abandoned.append(link)  # kept: what is collected with it would close the parent's connection in order
        for rider in self._riders:
            rider.forget()


async def _leave(link: Link, rider: Rider, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await link.remove(rider)
