"""Whether this process should get traffic: one answer, for every surface that is asked.

A process moves forward through phases (TRANSITIONS); while it runs, the registered liveness sources decide between
`ok`, `starting` (a source has not beaten yet) and `stale` (a source is older than its limit).

Nothing here takes a lock, waits, or asks a dependency: a beat is one attribute store, a check reads a few numbers. So
all of it may be called from signal handlers, `__del__`, gc callbacks and any thread, and /health answers while a scrape
hangs. Two threads that move the phase at once cannot take it backwards, since a phase is a flag that is only ever
raised and the furthest one counts.

Serverless (`Health(serverless=True)`): such a process is started by its first request and has no link to its engine
until an actor needs one, so `not_started` and `starting` are reported as `ok` (200). A link that was there and fell
silent is `stale` (503) in both modes. Elsewhere early health is 503; docs/health.md has the reason for the asymmetry.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from rkmetrics.errors import RegistryError

__all__ = [
    "CODES",
    "DEFAULT_MAX_AGE_SECONDS",
    "TRANSITIONS",
    "Health",
    "HealthReport",
    "Link",
    "Phase",
    "Source",
    "Status",
]

DEFAULT_MAX_AGE_SECONDS = 20.0  # the limit that RivetKit sets for its engine's pings
HINT = "nothing has said that the process is up: call registry.health.start(), or wrap the app in rk.asgi.Middleware"


class Status(StrEnum):
    """What /health says, and the values of the health state metric."""

    NOT_STARTED = "not_started"
    STARTING = "starting"
    OK = "ok"
    STALE = "stale"
    DRAINING = "draining"
    SHUTTING_DOWN = "shutting_down"
    SHUT_DOWN = "shut_down"


CODES: Mapping[Status, int] = {status: 200 if status is Status.OK else 503 for status in Status}


class Phase(IntEnum):
    """How far a process has come; the order is the order of a life."""

    NEW = 0
    STARTING = 1
    RUNNING = 2
    DRAINING = 3
    SHUTTING_DOWN = 4
    SHUT_DOWN = 5


class Link(StrEnum):
    """How one liveness source stands."""

    WAITING = "waiting"
    FRESH = "fresh"
    STALE = "stale"


# Method of Health -> the phase it leads to, from any earlier phase; called in a later one it changes nothing. The one
# way back is from SHUT_DOWN to a new start, since one process may run an application twice (test suites do).
TRANSITIONS: Mapping[str, Phase] = {
    "begin_start": Phase.STARTING,
    "start": Phase.RUNNING,
    "begin_drain": Phase.DRAINING,
    "begin_shutdown": Phase.SHUTTING_DOWN,
    "finish_shutdown": Phase.SHUT_DOWN,
}
STARTS = frozenset({Phase.STARTING, Phase.RUNNING})
PHASE_STATUS: Mapping[Phase, Status] = {
    Phase.NEW: Status.NOT_STARTED,
    Phase.STARTING: Status.STARTING,
    Phase.DRAINING: Status.DRAINING,
    Phase.SHUTTING_DOWN: Status.SHUTTING_DOWN,
    Phase.SHUT_DOWN: Status.SHUT_DOWN,
}
# While running: the first of these that any source shows.
LINK_STATUS: tuple[tuple[Link, Status], ...] = ((Link.STALE, Status.STALE), (Link.WAITING, Status.STARTING))
EARLY = frozenset({Status.NOT_STARTED, Status.STARTING})


@dataclass(frozen=True, slots=True)
class HealthReport:
    """One answer. code: the HTTP status; details: JSON for /health's body, without addresses, paths or secrets."""

    status: Status
    code: int
    details: Mapping[str, object]


class Source:
    """Something that shows life by beating: an engine's ping, a poll loop, an event loop's own task.

    max_age_seconds None: one beat is enough for ever, as for a model that is loaded once.
    """

    __slots__ = ("_clock", "_forget", "_last", "_registered", "max_age_seconds", "name")

    def __init__(
        self,
        name: str,
        max_age_seconds: float | None,
        *,
        clock: Callable[[], float],
        forget: Callable[[Source], None],
    ) -> None:
        self.name, self.max_age_seconds = name, max_age_seconds
        self._clock, self._forget = clock, forget
        self._registered = clock()
        self._last: float | None = None

    def beat(self) -> None:
        """Say that it lives, now."""
        self._last = self._clock()

    @property
    def age_seconds(self) -> float | None:
        """Seconds since the last beat; None before the first."""
        last = self._last
        return None if last is None else max(0.0, self._clock() - last)

    def close(self) -> None:
        """Take the source out of the answer: it ended on purpose."""
        self._forget(self)

    def link(self, started: float | None, *, patient: bool) -> Link:
        """How it stands. The first beat may take max_age_seconds from the start (or registration, if later);
        a patient caller waits for it without end."""
        limit, age = self.max_age_seconds, self.age_seconds
        if age is None:
            waited = self._clock() - max(self._registered, self._registered if started is None else started)
            return Link.WAITING if patient or limit is None or waited <= limit else Link.STALE
        return Link.FRESH if limit is None or age <= limit else Link.STALE

    def __repr__(self) -> str:
        return f"Source({self.name!r}, max_age_seconds={self.max_age_seconds}, age_seconds={self.age_seconds})"


class Health:
    """The health of one process.

    clock: monotonic seconds, so that a step of the wall clock makes nothing stale.
    """

    def __init__(self, *, serverless: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.serverless = serverless
        self._clock = clock
        self._reached = _unreached()
        self._started: float | None = None
        self._sources: dict[str, Source] = {}
        self.told_not_ready = 0  # checks of balancers that were answered so

    # --- liveness sources -----------------------------------------------------------------------------------------

    def source(self, name: str, max_age_seconds: float | None = DEFAULT_MAX_AGE_SECONDS) -> Source:
        """Return the source of that name, registered at the first call.

        Raises RegistryError when it is registered with another limit, or the limit is not above zero.
        """
        if max_age_seconds == math.inf:
            max_age_seconds = None
        if max_age_seconds is not None and not max_age_seconds > 0:
            raise RegistryError(f"source {name!r}: max_age_seconds={max_age_seconds!r}: expected more than 0, or None")
        new = Source(name, max_age_seconds, clock=self._clock, forget=self._forget)
        found = self._sources.setdefault(name, new)
        if found.max_age_seconds != max_age_seconds:
            raise RegistryError(
                f"source {name!r}: max_age_seconds={max_age_seconds!r}: it is registered with "
                f"{found.max_age_seconds!r}; use one limit for a name"
            )
        return found

    def _forget(self, source: Source) -> None:
        if self._sources.get(source.name) is source:
            self._sources.pop(source.name, None)

    # --- phases ---------------------------------------------------------------------------------------------------

    def begin_start(self) -> None:
        """The process is coming up: 503 `starting`."""
        self._advance("begin_start")

    def start(self) -> None:
        """The process is up; from here the sources decide."""
        self._advance("start")

    def start_if_new(self) -> None:
        """A request has come, so the server runs; who wants to say so itself calls begin_start() before that."""
        if self.phase is Phase.NEW:
            self.start()

    def begin_drain(self) -> None:
        """No new work, please: 503 `draining`, while the work in hand goes on."""
        self._advance("begin_drain")

    def begin_shutdown(self) -> None:
        """The work in hand is done; the process takes itself apart: 503 `shutting_down`."""
        self._advance("begin_shutdown")

    def finish_shutdown(self) -> None:
        """Nothing runs any more: 503 `shut_down`."""
        self._advance("finish_shutdown")

    @contextmanager
    def shutdown(self) -> Generator[None]:
        """Drain, take apart inside the block, and be `shut_down` after it, also when the block raises."""
        self.begin_drain()
        self.begin_shutdown()
        try:
            yield
        finally:
            self.finish_shutdown()

    @property
    def phase(self) -> Phase:
        """How far the process has come."""
        reached = self._reached
        return next(phase for phase in reversed(Phase) if reached[phase])

    def _advance(self, event: str) -> None:
        target = TRANSITIONS[event]
        if target in STARTS and self.phase is Phase.SHUT_DOWN:
            self._reached = _unreached()
        if target is Phase.RUNNING and not self._reached[target]:
            self._started = self._clock()
        self._reached[target] = True

    # --- the answer -----------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """The state now."""
        return self._status(self._links())

    @property
    def ready(self) -> bool:
        """Whether traffic is welcome: the answer of /health, of the vitals and of the ready gauge."""
        return self.status is Status.OK

    def note_told(self, *, ready: bool) -> None:
        """Count an answer to a balancer's check; a drain ends when all of them know."""
        if not ready:
            self.told_not_ready += 1

    def check(self) -> HealthReport:
        """Return the answer that every surface gives."""
        links = self._links()
        status = self._status(links)
        details: dict[str, object] = {}
        if links:
            details["sources"] = {source.name: _describe(source, link) for source, link in links}
        if status is Status.NOT_STARTED:
            details["hint"] = HINT
        return HealthReport(status, CODES[status], details)

    def one_hot(self) -> Mapping[Status, float]:
        """Return 1 for the state now and 0 for every other, for the health state metric."""
        now = self.status
        return {status: float(status is now) for status in Status}

    def _links(self) -> list[tuple[Source, Link]]:
        sources = list(self._sources.values())  # a copy in one step: others may register meanwhile
        return [(source, source.link(self._started, patient=self.serverless)) for source in sources]

    def _status(self, links: list[tuple[Source, Link]]) -> Status:
        phase = self.phase
        status = _linked(links) if phase is Phase.RUNNING else PHASE_STATUS[phase]
        return Status.OK if self.serverless and status in EARLY else status

    def __repr__(self) -> str:
        return f"Health({self.status.value!r}, serverless={self.serverless})"


def _unreached() -> list[bool]:
    return [phase is Phase.NEW for phase in Phase]


def _linked(links: list[tuple[Source, Link]]) -> Status:
    shown = {link for _, link in links}
    return next((status for link, status in LINK_STATUS if link in shown), Status.OK)


def _describe(source: Source, link: Link) -> Mapping[str, object]:
    age = source.age_seconds
    return {
        "state": link.value,
        "age_seconds": None if age is None else round(age, 3),
        "max_age_seconds": source.max_age_seconds,
    }
