"""The table of backends: where they are known from, what their checks say, and which of them get traffic.

    NEW ----ready---> UP <--ready, `rise` times-- DOWN, DRAINING
    any --not ready-> DRAINING (NEW stays NEW: it was never in the pool)
    any --`fall` misses in a row--> DOWN

Entries leave by DELETE, when a source withdraws them, or when they are down and nobody has announced them for
`expire_seconds`. The rules, and why:

- A backend that was never up needs one good check, as nothing bad is known of it. One that left needs `rise` of them,
  or one where it has announced itself again since: that "revives" it (the protocol).
- Damping (RFC 2439 is the pattern): each departure from the pool is a penalty of 1, which halves every three minutes.
  From the second on the rise doubles with each, up to 16 times, and an announcement revives no more.
- Panic (as Envoy has it): where the backends that fell silent are too many of those in the pool, the balancer doubts
  its own network. It keeps the silent ones listed, as nobody is helped by an empty pool (F15). Silence is a time-out,
  no route, or a refused token; who says that it is not ready, refuses the connection or answers nonsense has been
  heard, and leaves. In panic one good check is enough to be up again, and the dead expire later.
- Two sources may know of one backend; the stronger (`SourceName`) is right about it, and it stays while one of them
  has it. An announced id belongs to its address and its caller until it is down: nobody takes over a live one (T12).

All calls are safe from any thread, and none waits for anything but a lock that is held for microseconds; who listens
to changes is told outside of it. Time is the caller's `clock`, monotonic: no step of the wall clock does anything here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from threading import Lock
from typing import NamedTuple

from rkmetrics.catalogue.discovery import BackendState as State
from rkmetrics.catalogue.discovery import Balancing, CheckOutcome, Departure, RegisterOutcome
from rkmetrics.discovery.base import Address, Backend, SourceName
from rkmetrics.discovery.entry import RANK, Entry, Holding
from rkmetrics.discovery.selection import Pool, Strategy
from rkmetrics.discovery.verdict import BLIND, Vitals

__all__ = ["Change", "Directory", "Listed", "Listener", "Rules", "State"]

log = logging.getLogger(__name__)

PANIC_EXPIRE_SECONDS = 3_600.0
EXPIRE_INTERVALS = 3  # of the announce interval that a backend has named

TAKEN = frozenset({RegisterOutcome.ADDED, RegisterOutcome.REFRESHED})


class Rules(NamedTuple):
    """When a backend comes and goes, and how many there may be.

    panic_ratio: panic below this share of the pool heard; 0: never. limit_per_caller: announced from one address.
    """

    rise: int = 2
    fall: int = 2
    expire_seconds: float = 90.0
    panic_ratio: float = 0.5
    limit: int = 10_000
    limit_per_caller: int = 1_024


class Change(StrEnum):
    """What happened to an entry, for who checks it."""

    CHECK = "check"  # new, or announced again while it is not up: to be checked at once
    GONE = "gone"


class Listed(NamedTuple):
    """One backend as it stands, for people. checked_seconds: how long ago; None: not yet. damping: doublings.

    scraped: whether it is a target of Prometheus: up, or lost without a word.
    """

    backend: Backend
    state: State
    pooled: bool
    outcome: CheckOutcome | None
    checked_seconds: float | None
    state_seconds: float
    damping: int
    sources: tuple[SourceName, ...]
    vitals: Vitals | None
    scraped: bool


Listener = Callable[[Entry, Change], object]
_Event = tuple[Entry, Change]


class Directory:
    """A bounded table of backends, and the pool of those that get traffic. A `Sink` for sources.

    metrics: where departures and registrations are counted; `describe` brings its gauges up to date. seed: of the
    random choices; None: a different one each time.
    """

    def __init__(
        self,
        rules: Rules | None = None,
        *,
        metrics: Balancing | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self.rules, self.clock = rules or Rules(), clock
        self._metrics = metrics
        self._lock = Lock()
        self._entries: dict[str, Entry] = {}
        self._by_address: dict[Address, Entry] = {}
        self._per_caller: dict[str, int] = {}
        self._pool: Pool[Entry] = Pool(seed)
        self._sorted: tuple[int, tuple[Backend, ...]] = (0, ())
        self._states = dict.fromkeys(State, 0)
        self._lost: dict[Entry, None] = {}
        self._panic = False
        self._listeners: list[Listener] = []
        self._voice, self._alarm = _Voice(clock), _Voice(clock)

    # --- who comes and goes ---------------------------------------------------------------------------------------

    def announce(self, backend: Backend, caller: str) -> RegisterOutcome:
        """Take a registration. caller: the address that it came from.

        ADDED or REFRESHED, and CONFLICT, FULL or LIMITED for one that is not taken.
        """
        return self._offer(SourceName.ANNOUNCED, backend, caller)

    def leave(self, id: str, caller: str) -> RegisterOutcome:
        """End a registration: REMOVED, UNKNOWN where there is none, CONFLICT where it is another caller's."""
        with self._lock:
            entry = self._entries.get(id)
            holding = entry.holders.get(SourceName.ANNOUNCED) if entry else None
            if entry is None or holding is None:
                return self._count(RegisterOutcome.UNKNOWN)
            if holding.caller != caller:
                self._voice.warn("backend %s: %s may not remove what %s announced", id, caller, holding.caller)
                return self._count(RegisterOutcome.CONFLICT)
            events = self._let_go(entry, SourceName.ANNOUNCED)
        self._tell(events)
        return self._count(RegisterOutcome.REMOVED)

    def upsert(self, source: SourceName, backend: Backend) -> bool:
        """A source knows of this backend. False where it is not taken."""
        return self._offer(source, backend, "") in TAKEN

    def withdraw(self, source: SourceName, id: str) -> bool:
        """A source knows of it no longer. False where it was not known from there."""
        with self._lock:
            entry = self._entries.get(id)
            if entry is None or source not in entry.holders:
                return False
            events = self._let_go(entry, source)
        self._tell(events)
        return True

    def resync(self, source: SourceName, backends: Iterable[Backend]) -> None:
        """These are all that the source knows of."""
        known = {backend.id: backend for backend in backends}
        with self._lock:
            gone = [id for id, entry in self._entries.items() if source in entry.holders and id not in known]
        for id in gone:
            self.withdraw(source, id)
        for backend in known.values():
            self.upsert(source, backend)

    def _offer(self, source: SourceName, backend: Backend, caller: str) -> RegisterOutcome:
        holding = Holding(backend, caller, self.clock())
        with self._lock:
            outcome, events = self._admit(source, holding)
        self._tell(events)
        return self._count(outcome)

    def _admit(self, source: SourceName, holding: Holding) -> tuple[RegisterOutcome, list[_Event]]:
        backend = holding.backend
        others = {
            entry: None for entry in (self._entries.get(backend.id), self._by_address.get(backend.address)) if entry
        }
        for other in others:
            if not _may_replace(other, source, holding):
                self._refuse(other, source, holding)
                return RegisterOutcome.CONFLICT, []
        same = next((other for other in others if _is_same(other.backend, backend)), None)
        if same is None and (full := self._is_full(source, holding.caller, len(others))):
            return full, []
        events = [event for other in others if other is not same for event in self._remove(other)]
        entry = same or self._add(backend, holding.seen)
        return (RegisterOutcome.REFRESHED if same else RegisterOutcome.ADDED), events + self._hold(
            entry, source, holding
        )

    def _refuse(self, other: Entry, source: SourceName, holding: Holding) -> None:
        self._voice.warn(
            "backend %s at %s is refused (%s %s): %s at %s has that id or address, and is %s",
            holding.backend.id,
            holding.backend.address,
            source,
            holding.caller,
            other.backend.id,
            other.backend.address,
            other.state,
        )

    def _is_full(self, source: SourceName, caller: str, leaving: int) -> RegisterOutcome | None:
        if len(self._entries) - leaving >= self.rules.limit:
            return RegisterOutcome.FULL
        if source is SourceName.ANNOUNCED and self._per_caller.get(caller, 0) >= self.rules.limit_per_caller:
            return RegisterOutcome.LIMITED
        return None

    def _add(self, backend: Backend, now: float) -> Entry:
        entry = self._entries[backend.id] = self._by_address[backend.address] = Entry(backend, now)
        self._states[State.NEW] += 1
        return entry

    def _hold(self, entry: Entry, source: SourceName, holding: Holding) -> list[_Event]:
        """A source has an entry; one that is not up is checked at once."""
        self._count_callers(entry, -1)
        entry.holders[source] = holding
        self._count_callers(entry, +1)
        events = self._follow(entry, holding.seen)
        if entry.state is State.UP:
            return events
        entry.eager = entry.eager or entry.damping(holding.seen) == 0
        return [(entry, Change.CHECK)]

    def _follow(self, entry: Entry, now: float) -> list[_Event]:
        """Take over what its strongest source says of it now."""
        before, entry.backend = entry.backend, entry.strongest
        if before == entry.backend:
            return []
        self._pool.changes += 1
        if before.metrics_port != entry.backend.metrics_port:  # another process, so nothing is known of it
            entry.hits = entry.misses = 0
            self._enter(entry, State.NEW, now)
        return [(entry, Change.CHECK)]

    def _count_callers(self, entry: Entry, step: int) -> None:
        holding = entry.holders.get(SourceName.ANNOUNCED)
        if holding is not None:
            left = self._per_caller.get(holding.caller, 0) + step
            self._per_caller[holding.caller] = left
            if not left:
                del self._per_caller[holding.caller]

    def _let_go(self, entry: Entry, source: SourceName) -> list[_Event]:
        self._count_callers(entry, -1)
        del entry.holders[source]
        self._count_callers(entry, +1)
        if not entry.holders:
            return self._remove(entry)
        return self._follow(entry, self.clock())

    def _remove(self, entry: Entry) -> list[_Event]:
        self._count_callers(entry, -1)
        del self._entries[entry.backend.id], self._by_address[entry.backend.address]
        entry.gone = True
        if entry.state is State.UP:
            self._depart(Departure.REMOVED)
        self._states[entry.state] -= 1
        self._lost.pop(entry, None)
        self._pool.discard(entry)
        self._settle()
        return [(entry, Change.GONE)]

    # --- what checks say ------------------------------------------------------------------------------------------

    def record(self, entry: Entry, outcome: CheckOutcome, vitals: Vitals | None = None) -> None:
        """Take the outcome of a check. vitals: what it has read, where it has read any."""
        now = self.clock()
        with self._lock:
            if entry.gone:
                return
            entry.outcome, entry.checked = outcome, now
            if vitals is not None:
                entry.vitals, entry.assigned = vitals, 0
            _AFTER.get(outcome, Directory._missed)(self, entry, now)

    def _ready(self, entry: Entry, now: float) -> None:
        entry.hits, entry.misses = entry.hits + 1, 0
        if entry.state is not State.UP and entry.hits >= self._needed(entry, now):
            entry.seen_up, entry.eager = True, False
            self._enter(entry, State.UP, now)

    def _needed(self, entry: Entry, now: float) -> int:
        """How many good checks in a row bring it into the pool."""
        if not entry.seen_up or entry.eager or (self._panic and entry.lost):
            return 1
        return self.rules.rise << entry.damping(now)

    def _not_ready(self, entry: Entry, now: float) -> None:
        entry.hits = entry.misses = 0
        entry.eager = False
        if entry.state is not State.NEW:
            self._enter(entry, State.DRAINING, now, Departure.NOT_READY)

    def _missed(self, entry: Entry, now: float) -> None:
        entry.hits, entry.misses = 0, entry.misses + 1
        silent = entry.outcome in BLIND
        if entry.state is State.DOWN:
            if entry.lost and not silent:  # heard of, and it is dead
                self._lose(entry, lost=False)
        elif entry.misses >= self.rules.fall:
            self._lose(entry, lost=silent and entry.state is State.UP)
            self._enter(entry, State.DOWN, now, Departure.UNREACHABLE)

    def _lose(self, entry: Entry, *, lost: bool) -> None:
        entry.lost = lost
        if lost:
            self._lost[entry] = None
        else:
            self._lost.pop(entry, None)
        if entry.state is State.DOWN:
            self._pool_or_not(entry)
            self._settle()

    def _enter(self, entry: Entry, state: State, now: float, why: Departure = Departure.REMOVED) -> None:
        before = entry.state
        if before is state:
            return
        self._states[before] -= 1
        self._states[state] += 1
        entry.fell = before is State.UP and state is State.DOWN
        entry.state, entry.since = state, now
        if before is State.UP:
            entry.punish(now)
            self._depart(why)
        if state is not State.DOWN and entry.lost:
            self._lose(entry, lost=False)
        self._pool_or_not(entry)
        self._settle()
        self._voice.say(
            "backend %s at %s: %s, was %s (%s)", entry.backend.id, entry.backend.address, state, before, entry.outcome
        )

    def expire(self) -> int:
        """Forget announced backends that are down and have not been announced for their time; return how many."""
        now, events = self.clock(), list[_Event]()
        with self._lock:
            dead = [
                entry for entry in self._entries.values() if entry.state is State.DOWN and self._is_expired(entry, now)
            ]
            for entry in dead:
                self._voice.say("backend %s at %s is forgotten", entry.backend.id, entry.backend.address)
                events += self._let_go(entry, SourceName.ANNOUNCED)
        self._tell(events)
        if self._metrics and dead:
            self._metrics.expired.inc(len(dead))
        return len(dead)

    def _is_expired(self, entry: Entry, now: float) -> bool:
        holding = entry.holders.get(SourceName.ANNOUNCED)
        if holding is None:
            return False
        patience = max(self.rules.expire_seconds, EXPIRE_INTERVALS * (holding.backend.announce_interval_seconds or 0))
        if self._panic and entry.lost:
            patience = max(patience, PANIC_EXPIRE_SECONDS)
        return now - holding.seen > patience

    # --- the pool -------------------------------------------------------------------------------------------------

    def _pool_or_not(self, entry: Entry) -> None:
        if entry.state is State.UP or (self._panic and entry.lost):
            self._pool.add(entry)
        else:
            self._pool.discard(entry)

    def _settle(self) -> None:
        """See whether there is panic, and let the silent ones in or out."""
        up, lost = self._states[State.UP], len(self._lost)
        panic = lost > 0 and up < self.rules.panic_ratio * (up + lost)
        if panic is self._panic:
            return
        self._panic = panic
        for entry in self._lost:
            entry.eager = True  # also after the panic, as it ends before all of them were asked again
            self._pool_or_not(entry)
        if panic:
            self._alarm.warn(
                "%d of %d backends fell silent: they stay listed, as the fault may be this balancer's", lost, up + lost
            )
        else:
            self._alarm.warn("no more panic: %d backends are up, %d are still silent", up, lost)

    def pick(self, strategy: Strategy = Strategy.ROUND_ROBIN) -> Backend | None:
        """Return a backend of the pool; None where it is empty. O(1)."""
        with self._lock:
            entry = self._pool.pick(strategy)
            return entry.backend if entry else None

    # --- what is there --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def panic(self) -> bool:
        """Whether silent backends are listed all the same."""
        return self._panic

    def pool(self) -> tuple[Backend, ...]:
        """The backends that get traffic, by address: balancers that know the same list the same."""
        with self._lock:
            changes, known = self._pool.changes, self._sorted
            if known[0] == changes:
                return known[1]
            found = [entry.backend for entry in self._pool.members]
        self._sorted = changes, tuple(sorted(found, key=_by_address))  # a race costs no more than sorting once more
        return self._sorted[1]

    def entries(self) -> tuple[Entry, ...]:
        """All entries, for who checks them."""
        with self._lock:
            return tuple(self._entries.values())

    def state(self, id: str) -> State | None:
        """The state of one backend; None where it is not known."""
        entry = self._entries.get(id)
        return entry.state if entry else None

    def announced(self, id: str) -> tuple[Backend, str] | None:
        """What was announced under an id, and by whom."""
        entry = self._entries.get(id)
        holding = entry.holders.get(SourceName.ANNOUNCED) if entry else None
        return (holding.backend, holding.caller) if holding else None

    def listed(self) -> tuple[Listed, ...]:
        """All backends as they stand, by address."""
        now = self.clock()
        with self._lock:
            found = [_listed(entry, now) for entry in self._entries.values()]
        return tuple(sorted(found, key=lambda each: _by_address(each.backend)))

    def describe(self) -> None:
        """Bring the gauges up to date; a refresher for a registry."""
        metrics, now = self._metrics, self.clock()
        if metrics is None:
            return
        with self._lock:
            states, pool, panic = dict(self._states), len(self._pool), self._panic
            damped = sum(entry.state is not State.UP and entry.damping(now) > 0 for entry in self._entries.values())
            ages = [now - (entry.since if entry.checked is None else entry.checked) for entry in self._pool.members]
        for state, count in states.items():
            metrics.backends[state].set(count)
        metrics.backends_limit.set(self.rules.limit)
        metrics.pool.set(pool)
        metrics.panic.set(panic)
        metrics.damped.set(damped)
        metrics.oldest_check_age.set(max(ages, default=0.0))

    # --- who is told ----------------------------------------------------------------------------------------------

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call a function at each change that a checker has to know of, in the thread where it happens; returns what
        ends that. It must not raise."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _tell(self, events: Iterable[_Event]) -> None:
        for entry, change in events:
            for listener in list(self._listeners):
                listener(entry, change)

    def _depart(self, why: Departure) -> None:
        if self._metrics:
            self._metrics.departures[why].inc()

    def _count(self, outcome: RegisterOutcome) -> RegisterOutcome:
        self.count(outcome)
        return outcome

    def count(self, outcome: RegisterOutcome) -> None:
        """Count what became of a registration that never came as far as here."""
        if self._metrics:
            self._metrics.registrations[outcome].inc()

    def __repr__(self) -> str:
        return f"<Directory: {len(self._pool)} of {len(self._entries)} backends in the pool>"


_AFTER: Mapping[CheckOutcome, Callable[[Directory, Entry, float], None]] = {
    CheckOutcome.READY: Directory._ready,
    CheckOutcome.NOT_READY: Directory._not_ready,
}


def _is_same(one: Backend, other: Backend) -> bool:
    return one.id == other.id and one.address == other.address


def _may_replace(other: Entry, source: SourceName, holding: Holding) -> bool:
    """Whether a source may say something of an entry that has this id, or this address."""
    known = other.holders.get(SourceName.ANNOUNCED)
    if source is SourceName.ANNOUNCED and known is not None and other.rank == RANK[source]:
        owner = known.caller == holding.caller and other.backend.address == holding.backend.address
        return owner or (other.state is State.DOWN and other.position < 0)
    if _is_same(other.backend, holding.backend):
        return known is None or source is not SourceName.ANNOUNCED or known.caller == holding.caller
    return RANK[source] >= other.rank


def _by_address(backend: Backend) -> tuple[int, str, int]:
    host = backend.address.host
    return ":" in host, host, backend.address.port


def _listed(entry: Entry, now: float) -> Listed:
    return Listed(
        entry.backend,
        entry.state,
        entry.position >= 0,
        entry.outcome,
        None if entry.checked is None else now - entry.checked,
        now - entry.since,
        entry.damping(now),
        tuple(sorted(entry.holders, key=RANK.__getitem__)),
        entry.vitals,
        entry.state is State.UP or (entry.state is State.DOWN and entry.fell),
    )


SAID_AT_MOST = 50
SAID_IN_SECONDS = 10.0


class _Voice:
    """The log, for events that strangers cause: so many lines in so many seconds, then how many were left out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._since, self._said = clock, clock(), 0

    def say(self, text: str, *values: object) -> None:
        self._log(logging.INFO, text, values)

    def warn(self, text: str, *values: object) -> None:
        self._log(logging.WARNING, text, values)

    def _log(self, level: int, text: str, values: tuple[object, ...]) -> None:
        now = self._clock()
        if now - self._since > SAID_IN_SECONDS:
            if self._said > SAID_AT_MOST:
                log.info("%d more lines about backends were left out", self._said - SAID_AT_MOST)
            self._since, self._said = now, 0
        self._said += 1
        if self._said <= SAID_AT_MOST:
            log.log(level, text, *values)
