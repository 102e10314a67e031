"""The backend's side of discovery: says that it is there, to each balancer and to etcd, and leaves in order.

    start   each place by itself: announce at once ── every interval, or up to a tenth before ── failed: back off, again
    leave   ready=false ── checks have heard it and requests ended, UNLIST_SECONDS at most ── withdraw everywhere
            ── requests that are still in progress end, exit_seconds at most

A place is a balancer (`Membership`) or etcd (`EtcdRegistrar`): what keeps us listed there while `run` runs, and takes
that back. They share nothing, so one that hangs holds up no other. A process has an own thread for them, since a
program may block its loop for longer than a balancer waits; `async with` uses the running loop instead.

Why withdraw before the last request has ended: it takes nothing from requests in progress, and while one of them takes
a minute no new ones should come. Why not at once: a proxy that hears of the drain first has stopped sending by then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl as tls
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rkmetrics.background import LoopThread
from rkmetrics.catalogue.announcing import Announcing
from rkmetrics.discovery.base import Backend
from rkmetrics.discovery.handover import Handover
from rkmetrics.discovery.membership import TIMEOUT_SECONDS, WITHDRAW_SECONDS, Membership, Place
from rkmetrics.settings import Secret

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["EXIT_SECONDS", "UNLIST_SECONDS", "Announcer"]

log = logging.getLogger("rkmetrics.discovery")

UNLIST_SECONDS = 2.0  # until we withdraw; with WITHDRAW_SECONDS within the 3 s of reliability, F11
EXIT_SECONDS = 8.0  # for all of it; with what else ends in a process within the 10 s of F11
MARGIN_SECONDS = 0.2
LOOK_SECONDS = 0.02


class _Life:
    """From one start to its end: what is waited for."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        self.withdrawing, self.withdrawn, self.stopping = asyncio.Event(), asyncio.Event(), asyncio.Event()


class Announcer:
    """Keeps a backend listed: at load balancers, and at other places (etcd).

        with Announcer(registry, backend): ...            in a thread of its own
        async with Announcer(registry, backend): ...      in the running loop

    load_balancers: URLs or host:port; by default RKMETRICS_LOAD_BALANCERS. token: by default
    RKMETRICS_REGISTRATION_TOKEN. The end of the block withdraws at once; `leave()` is the order for SIGTERM, and
    `drain_on=(signal.SIGTERM,)` has it done before the signal goes on to whoever handled it before: for servers that
    close their port as the first thing. linger_seconds: how long, after it withdrew, `leave` lets requests come that
    proxies still send. A forked child announces nothing.
    """

    def __init__(
        self,
        registry: Registry,
        backend: Backend,
        load_balancers: Iterable[str] | None = None,
        *,
        places: Sequence[Place] = (),
        token: Secret | str | None = None,
        interval_seconds: float | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        ssl: tls.SSLContext | None = None,
        drain_on: Sequence[signal.Signals] = (),
        exit_seconds: float = EXIT_SECONDS,
        linger_seconds: float = 0.5,
    ) -> None:
        settings = registry.settings
        self.backend = backend
        self._registry, self._health = registry, registry.health
        metrics = registry.bind(Announcing)
        secret = Secret(token) if isinstance(token, str) else token or settings.registration_token
        self._memberships = tuple(
            Membership(
                balancer,
                backend,
                metrics,
                interval_seconds=interval_seconds or settings.announce_interval_seconds,
                token=secret,
                timeout_seconds=timeout_seconds,
                ssl=ssl,
            )
            for balancer in dict.fromkeys(settings.load_balancers if load_balancers is None else load_balancers)
        )
        self.places: tuple[Place, ...] = (*self._memberships, *places)
        self._exit_seconds, self._linger_seconds = exit_seconds, linger_seconds
        self._thread = LoopThread("rkmetrics-announce", self._live, self._ask_to_stop)
        self._life = _Life()
        self._task: asyncio.Task[None] | None = None
        self._pid = os.getpid()
        self._leaving: asyncio.Task[None] | None = None
        self._told_wanted = 0
        self._signals = Handover(drain_on, self._leave_by_signal)

    @property
    def running(self) -> bool:
        """Whether it announces: False before the start, after the end, and in a forked child."""
        return self._pid == os.getpid() and (self._thread.running or self._task is not None)

    @property
    def listed(self) -> tuple[str, ...]:
        """The places that know us."""
        return tuple(place.shown for place in self.places if place.listed)

    # --- in a thread --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Announce from a thread, at once; it ends with the process."""
        self._pid = os.getpid()
        self._thread.start()
        self._signals.catch()

    def leave(self) -> None:
        """Drain, be seen to, withdraw, let requests end: within `exit_seconds`. `close()` is still to be called."""
        self._begin_drain()
        if self._pid == os.getpid():
            self._thread.call(self._leave(), self._exit_seconds + WITHDRAW_SECONDS)

    def close(self) -> None:
        """Withdraw at once, and end."""
        self._signals.release()
        if self._pid == os.getpid():
            self._thread.stop(2 * WITHDRAW_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- in the running loop ------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._pid = os.getpid()
        self._task = asyncio.create_task(self._live(), name="rkmetrics announcer")
        await asyncio.sleep(0)  # it has begun, so it can be told to end
        self._signals.catch()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.release()
        task, self._task = self._task, None
        if task is None or self._pid != os.getpid():
            return
        self._ask_to_stop(WITHDRAW_SECONDS)
        await asyncio.gather(task, return_exceptions=True)

    async def aleave(self) -> None:
        """The same as leave(), inside `async with`."""
        self._begin_drain()
        await self._leave()

    # --- a life -------------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        life = self._life = _Life(asyncio.get_running_loop())
        runs = [asyncio.create_task(self._keep(place), name=f"rkmetrics {place.shown}") for place in self.places]
        try:
            await life.withdrawing.wait()
        finally:
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
        await self._withdraw()
        life.withdrawn.set()
        await life.stopping.wait()

    async def _keep(self, place: Place) -> None:
        """Run a place; a bug in one ends neither the others nor it for good."""
        while self._pid == os.getpid():
            try:
                await place.run()
            except Exception:
                log.exception("%s: failed, and begins again", place.shown)
            await asyncio.sleep(1.0)

    def _ask_to_stop(self, _: float) -> None:
        self._life.withdrawing.set()
        self._life.stopping.set()

    async def _withdraw(self) -> None:
        async def withdraw(place: Place) -> None:
            try:
                async with asyncio.timeout(WITHDRAW_SECONDS + MARGIN_SECONDS):
                    gone = await place.withdraw()
            except TimeoutError:
                gone = False
            if not gone:
                log.warning("%s: was not told that we leave; it will find out", place.shown)

        await asyncio.gather(*(withdraw(place) for place in self.places))

    # --- the end ------------------------------------------------------------------------------------------------------

    def _begin_drain(self) -> None:
        """Say so to whoever asks from now on, and count who does: each balancer that knows us checks once at least."""
        self._told_wanted = self._health.told_not_ready + sum(place.listed for place in self._memberships)
        self._health.begin_drain()

    async def _leave(self) -> None:
        deadline, wanted = time.monotonic() + self._exit_seconds, self._told_wanted
        limit = min(UNLIST_SECONDS, self._exit_seconds)
        await _until(lambda: self._health.told_not_ready >= wanted and not self._busy, time.monotonic() + limit)
        self._life.withdrawing.set()
        await self._life.withdrawn.wait()
        await asyncio.sleep(min(self._linger_seconds, max(deadline - time.monotonic(), 0)))
        await _until(lambda: not self._busy, deadline)
        if self._busy:
            log.warning("leaving with %d requests in progress: %g s are over", self._busy, self._exit_seconds)

    @property
    def _busy(self) -> int:
        """How many requests are in progress, where the middleware counts them."""
        return int(self._registry.node.requests_in_progress.value or 0)

    def _leave_by_signal(self, done: Callable[[], None]) -> None:
        """From a signal handler: leave, and call `done` at the end."""
        self._begin_drain()

        async def leave() -> None:
            try:
                await self._leave()
            finally:
                done()

        def start() -> None:
            self._leaving = asyncio.get_running_loop().create_task(leave())

        loop = self._life.loop
        if loop is None or loop.is_closed():  # it has not begun, or is over: there is nothing to leave
            done()
        else:
            loop.call_soon_threadsafe(start)


async def _until(holds: Callable[[], object], deadline: float) -> None:
    """Wait until something is so, which no event tells of, or the time is over."""
    while not holds() and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_SECONDS)
