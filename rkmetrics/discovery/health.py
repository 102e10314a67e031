"""The check loop: asks each backend of a directory for its vitals, at its time, and tells the directory.

At 5,000 backends and an interval of 5 s that is a check each millisecond on one core, so: no task for a check, no
timer either. A probe stands in the slot of a wheel in which something of it is due next, and one timer of the loop
serves all probes of a slot. Checks are spread over the interval by chance and stay so; a new backend is checked at
once.

No backend delays another's check (F14, T15). What waits for an answer costs a place, so places are limited, and those
who missed their last check (or never answered) share half of them: a flood of addresses that answer nothing queues
among itself. A connection is kept while there is room, since connecting is most of a check's cost.

What a check reads is not trusted (T14): `rkmetrics.fetch` follows no redirect, takes no content coding and at most 64
KiB; one deadline covers connecting, head and body, by the monotonic clock. Where the loop itself was late (a stopped
process, a paused machine), a check gets its time once more: a balancer that slept knows nothing of its backends. The
token goes to addresses of the directory only, which `policy.py` has passed, and is in no log, error or repr.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rkmetrics.catalogue.discovery import Balancing, CheckOutcome
from rkmetrics.discovery.base import Address
from rkmetrics.discovery.directory import Change, Directory
from rkmetrics.discovery.entry import Entry
from rkmetrics.discovery.verdict import Vitals, judge_answer, judge_failure
from rkmetrics.fetch import Channel, Endpoint, Failure, request_head
from rkmetrics.http_answer import Answer

if TYPE_CHECKING:
    from rkmetrics.settings import Secret

__all__ = ["HealthChecker"]

log = logging.getLogger(__name__)

TICK_SECONDS = 0.01
LATE_SECONDS = 0.25  # a turn of the wheel that is later than this was not the peers' doing
HOUSEKEEPING_SECONDS = 1.0
VERY_FIRST_LIMIT_SECONDS = 1.0  # checks of a fleet that is there at the start are spread over so long

# --- places -----------------------------------------------------------------------------------------------------------


class _Lane:
    """Places for checks in flight, and those who wait for one, first come first served."""

    def __init__(self, places: int) -> None:
        self.places, self.taken = places, 0
        self.waiting: deque[_Probe] = deque()

    def take(self, probe: _Probe) -> bool:
        """Whether there is a place; otherwise the probe waits."""
        if self.taken < self.places:
            self.taken += 1
            return True
        self.waiting.append(probe)
        return False

    def leave(self) -> _Probe | None:
        """Give a place back, and return who has it now."""
        while self.waiting:
            probe = self.waiting.popleft()
            if not probe.closed:
                return probe
        self.taken -= 1
        return None


class _Wheel:
    """Looks at probes when something is due: one timer of the loop for all of a tick."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, list[tuple[_Probe, int]]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def put(self, probe: _Probe, when: float) -> None:
        """Look at a probe then, and at no other time that was said before."""
        slot = int(when / TICK_SECONDS) + 1
        waiting = self._slots.get(slot)
        if waiting is None:
            waiting = self._slots[slot] = []
            self._timers[slot] = self._loop.call_at(slot * TICK_SECONDS, self._turn, slot)
        probe.ticket += 1
        waiting.append((probe, probe.ticket))

    def _turn(self, slot: int) -> None:
        del self._timers[slot]
        now = max(self._loop.time(), slot * TICK_SECONDS)  # some loops are early by their clock's grain
        late = now - slot * TICK_SECONDS
        for probe, ticket in self._slots.pop(slot):
            if probe.ticket == ticket and not probe.closed:
                probe.look(now, late if late > LATE_SECONDS else 0.0)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._slots.clear()


class HealthChecker:
    """Checks the backends of a directory while its `async with` block runs.

    timeout_seconds: of one check, with connecting. jitter: part of the interval by which each may come earlier; never
    later, so that two intervals and a time-out are the longest that a dead backend stays (F10).
    token: asked about once a second, sent as bearer. alive: called about once a second. places: checks in flight at
    once; kept: connections that stay open. To be used from one event loop; the directory may be changed from any
    thread.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        interval_seconds: float = 5.0,
        timeout_seconds: float = 2.0,
        path: str = "/metrics",
        token: Callable[[], Secret | None] = lambda: None,
        alive: Callable[[], object] = lambda: None,
        metrics: Balancing | None = None,
        jitter: float = 0.1,
        places: int = 2_048,
        kept: int = 8_192,
        seed: int | None = None,
    ) -> None:
        for name, value in (("interval_seconds", interval_seconds), ("timeout_seconds", timeout_seconds)):
            if not value > 0:
                raise ValueError(f"{name}={value!r}: expected more than 0")
        self.directory, self.path = directory, path
        self.interval_seconds, self.timeout_seconds, self.jitter = interval_seconds, timeout_seconds, jitter
        self.kept_limit, self.kept = kept, 0
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self.generation = 0  # of the headers
        self.random = Random(seed).random  # noqa: S311 - no secret
        self.trusted, self.suspect = _Lane(max(1, places - places // 2)), _Lane(max(1, places // 2))
        self._metrics, self._token, self._alive = metrics, token, alive
        self._secret: Secret | None = None
        self._count = {each: metrics.checks[each].inc if metrics else _nothing for each in CheckOutcome}
        self._observe: Callable[[float], object] = metrics.check_duration.observe if metrics else _nothing
        self._probes: dict[Entry, _Probe] = {}
        self._wheel: _Wheel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._housekeeping: asyncio.TimerHandle | None = None
        self._unlisten: Callable[[], None] = lambda: None
        self._trouble = False  # of our own, which the log knows of

    async def __aenter__(self) -> Self:
        if self._wheel is not None:
            raise RuntimeError("this checker runs already")
        self._loop = asyncio.get_running_loop()
        self._wheel = _Wheel(self._loop)
        self._read_token()
        self._unlisten = self.directory.listen(self._changed)
        entries = self.directory.entries()
        spread = min(self.interval_seconds, VERY_FIRST_LIMIT_SECONDS) if len(entries) > 1 else 0.0
        for number, entry in enumerate(entries):
            self._start(entry, spread * number / len(entries))
        self._keep_house()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unlisten()
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        if self._wheel is not None:
            self._wheel.close()
            self._wheel = None
        opening = [task for probe in self._probes.values() if (task := probe.close()) is not None]
        self._probes.clear()
        await asyncio.gather(*opening, return_exceptions=True)
        await asyncio.sleep(0)  # the sockets close in the next turn of the loop

    # --- what the directory says ----------------------------------------------------------------------------------

    def _changed(self, entry: Entry, change: Change) -> None:
        """Called in any thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody checks any more
            self._loop.call_soon_threadsafe(_CHANGES[change], self, entry)

    def _check_now(self, entry: Entry) -> None:
        if self._wheel is None or entry.gone:
            return
        probe = self._probes.get(entry)
        if probe is not None and probe.address == entry.backend.metrics_address:
            probe.hurry(self._wheel, self.now())
            return
        if probe is not None:
            self._stop(entry)
        self._start(entry, 0.0)

    def _start(self, entry: Entry, delay_seconds: float) -> None:
        if self._wheel is None or entry.gone:
            return
        probe = self._probes[entry] = _Probe(self, entry)
        probe.due = self.now() + delay_seconds
        self._wheel.put(probe, probe.due)

    def _stop(self, entry: Entry) -> None:
        probe = self._probes.pop(entry, None)
        if probe is not None:
            probe.close()

    # --- what a probe needs ---------------------------------------------------------------------------------------

    def now(self) -> float:
        """The loop's clock, which is monotonic."""
        assert self._loop is not None
        return self._loop.time()

    def put(self, probe: _Probe, when: float) -> None:
        """Have a probe looked at."""
        if self._wheel is not None:
            self._wheel.put(probe, when)

    def lane(self, entry: Entry) -> _Lane:
        """Where a check takes its place: those who answered last time are not held up by the others."""
        return self.trusted if entry.checked is not None and not entry.misses else self.suspect

    def leave(self, lane: _Lane) -> None:
        """Give a place back, and let the next one begin."""
        follower = lane.leave()
        if follower is not None:
            follower.send(lane)

    def record(self, entry: Entry, outcome: CheckOutcome, vitals: Vitals | None, seconds: float) -> None:
        """Count a check, and tell the directory."""
        self._count[outcome]()
        self._observe(seconds)
        if outcome is not CheckOutcome.NOT_SENT:
            self._trouble = False
            self.directory.record(entry, outcome, vitals)
        elif not self._trouble:
            self._trouble = True
            log.error("no socket left for health checks; raise the limit of open files (ulimit -n); said once")

    # --- each second ----------------------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        assert self._loop is not None
        self._housekeeping = self._loop.call_later(HOUSEKEEPING_SECONDS, self._keep_house)
        try:
            self.directory.expire()
            self._read_token()
            self._alive()
        except Exception:
            log.exception("housekeeping of the health checks failed; it goes on")
        if self._metrics:
            self._metrics.checks_in_flight.set(self.trusted.taken + self.suspect.taken)
            self._metrics.checks_waiting.set(len(self.trusted.waiting) + len(self.suspect.waiting))

    def _read_token(self) -> None:
        secret = self._token()
        if secret != self._secret or not self.generation:
            self._secret = secret
            bearer = ((b"authorization", b"Bearer " + secret.reveal()),) if secret else ()
            self.headers = ((b"accept", b"application/json"), *bearer)
            self.generation += 1

    def __repr__(self) -> str:
        return f"<HealthChecker: {len(self._probes)} backends, each {self.interval_seconds:g} s>"


_CHANGES: Mapping[Change, Callable[[HealthChecker, Entry], None]] = {
    Change.CHECK: HealthChecker._check_now,
    Change.GONE: HealthChecker._stop,
}


def _nothing(_: float = 0.0) -> None:
    """There is no registry."""


class _Probe:
    """The checks of one backend. due: when the next one is; deadline: when the one in flight has failed."""

    __slots__ = (
        "_channel",
        "_checker",
        "_entry",
        "_first",
        "_forgiven",
        "_generation",
        "_kept",
        "_lane",
        "_request",
        "_sent_at",
        "address",
        "closed",
        "deadline",
        "due",
        "ticket",
        "waiting",
    )

    def __init__(self, checker: HealthChecker, entry: Entry) -> None:
        self._checker, self._entry = checker, entry
        self.address = entry.backend.metrics_address
        self._channel = Channel(_endpoint(self.address, checker.path), self._answered, self._failed)
        self._request, self._generation = b"", 0
        self._lane: _Lane | None = None  # in which it has a place
        self._first, self._forgiven, self._kept, self._sent_at = True, False, False, 0.0
        self.due = self.deadline = 0.0
        self.ticket = 0
        self.closed = self.waiting = False

    def look(self, now: float, late: float) -> None:
        """Do what is due. late: how much later than planned this is, where that is our own fault."""
        if self._lane is None:
            if now < self.due:
                self._checker.put(self, self.due)
            elif not self.waiting:
                self._begin()
            return
        if late and not self._forgiven:  # once, so that a loop which is always late still finds the dead
            self._forgiven = True
            self.deadline = now + self._checker.timeout_seconds
        if now < self.deadline:
            self._checker.put(self, self.deadline)
        else:
            self._channel.expire()

    def hurry(self, wheel: _Wheel, now: float) -> None:
        """Check now, unless a check is on its way."""
        if self._lane is None and not self.waiting:
            self.due = now
            wheel.put(self, now)

    def _begin(self) -> None:
        lane = self._checker.lane(self._entry)
        if lane.take(self):
            self.send(lane)
        else:
            self.waiting = True

    def send(self, lane: _Lane) -> None:
        """Ask, with a place in a lane."""
        checker, now = self._checker, self._checker.now()
        self._lane, self.waiting, self._forgiven = lane, False, False
        self._plan(now)
        self._sent_at, self.deadline = time.perf_counter(), now + checker.timeout_seconds
        if self._generation != checker.generation:
            self._generation = checker.generation
            self._request = request_head(self._channel.endpoint, checker.headers)
        checker.put(self, self.deadline)
        self._channel.request(self._request)

    def _plan(self, now: float) -> None:
        """Set when the next check is due. The second one comes by chance within an interval, so that backends which
        came together do not stay so; what a busy loop has missed is not made up for."""
        checker = self._checker
        if self._first:
            self._first = False
            self.due = now + checker.interval_seconds * (0.1 + 0.9 * checker.random())
            return
        pause = checker.interval_seconds * (1 - checker.jitter * checker.random())
        self.due = self.due + pause if self.due + pause > now else now + pause

    def _answered(self, answer: Answer) -> None:
        if not self._kept:
            self._keep(self._checker.kept < self._checker.kept_limit)
        if not self._kept:
            self._channel.close()
        outcome, vitals = judge_answer(answer)
        self._end(outcome, vitals)

    def _failed(self, failure: Failure) -> None:
        self._keep(False)
        self._end(judge_failure(failure), None)

    def _keep(self, kept: bool) -> None:
        self._checker.kept += kept - self._kept
        self._kept = kept

    def _end(self, outcome: CheckOutcome, vitals: Vitals | None) -> None:
        lane, self._lane = self._lane, None
        self._checker.record(self._entry, outcome, vitals, time.perf_counter() - self._sent_at)
        self._checker.put(self, self.due)
        if lane is not None:
            self._checker.leave(lane)

    def close(self) -> asyncio.Task[None] | None:
        """Check no more; see Channel.close."""
        self.closed = True
        self._keep(False)
        opening = self._channel.close()
        lane, self._lane = self._lane, None
        if lane is not None:
            self._checker.leave(lane)
        return opening

    def __repr__(self) -> str:
        return f"<_Probe {self.address}>"


def _endpoint(address: Address, path: str) -> Endpoint:
    """Where to ask. Built, not parsed: the address is a literal that was checked, and nothing else is dialled."""
    return Endpoint("http", address.host, address.port, path, str(address), address.host)
