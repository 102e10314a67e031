"""What keeps the number of series bounded: admission of actor names, overflow, and the budget.

Nothing here takes a lock. Tables change by single dictionary or list operations that CPython runs whole (setdefault,
pop, append), so a finaliser or a signal handler that comes in between finds a table that is right, and nothing waits
for anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rkmetrics.definition import OTHER, LabelDefinition, MetricDefinition
from rkmetrics.errors import ActorNameError, LabelValueError

__all__ = ["ActorNames", "Admission", "Budget", "MetricBudget", "Overflow", "Overflows", "budget"]

logger = logging.getLogger("rkmetrics")

ACTOR_NAME_BYTES = 128
_SAMPLES = 5
_SHOWN = 64
_LOG_SECONDS = 60.0


@dataclass(slots=True)
class Overflow:
    """What went to "__other__" of one label: how often, and up to five of the values, shortened."""

    expected: str
    count: int = 0
    samples: list[str] = field(default_factory=list[str])
    said: int = 0
    next_log: float = 0.0


class Overflows:
    """Counts label values that were not declared, or actor names past the limit, and says so once a minute for each
    label.

    count: called with (metric, label) each time, so that the registry's own counter rises. strict: raise instead.
    """

    def __init__(self, count: Callable[[str, str], None], *, strict: bool = False) -> None:
        self._count, self._strict = count, strict
        self._table: dict[tuple[str, str], Overflow] = {}

    def __call__(self, metric: str, label: LabelDefinition, value: object) -> None:
        """Note an undeclared value. Raises LabelValueError if strict."""
        if self._strict:
            raise LabelValueError(metric, label.name, value, label.values)
        self.note(metric, label.name, value, f"one of: {', '.join(label.values)}")

    def note(self, metric: str, label: str, value: object, expected: str) -> None:
        """Count one value as overflown. Keys are declared names only, so the table stays small whatever the values are.

        Nothing is logged here: this runs in finalisers and signal handlers, and handlers of logging hold locks.
        """
        entry = self._table.get((metric, label)) or self._table.setdefault((metric, label), Overflow(expected))
        entry.count += 1
        self._count(metric, label)
        if len(entry.samples) < _SAMPLES:
            shown = repr(value[:_SHOWN] if isinstance(value, str) else value)[:_SHOWN]
            if shown not in entry.samples:
                entry.samples.append(shown)

    def say(self) -> None:
        """Log what came since the last time: a line for each label, at most one a minute. Called at each collection."""
        now = time.monotonic()
        for (metric, label), entry in list(self._table.items()):
            if entry.count == entry.said or now < entry.next_log:
                continue
            entry.said, entry.next_log = entry.count, now + _LOG_SECONDS
            logger.warning(
                "%s: %d values of label %s counted as %s so far, such as %s; expected %s",
                metric,
                entry.count,
                label,
                OTHER,
                ", ".join(entry.samples),
                entry.expected,
            )

    def table(self) -> Mapping[tuple[str, str], Overflow]:
        """(metric, label) to what overflowed; the metric is "*" where a name was refused for a whole set."""
        return dict(self._table)


class Admission:
    """One admitted name, from its admission to its release, and all that is bound to it.

    Releasing it is taking this one object out of one table; what binds to it at the same moment goes with it, and
    neither stays behind unreleasable nor falls to whoever is admitted under the name next.
    """

    __slots__ = ("actor", "bound", "name", "ticket")

    def __init__(self, name: str, ticket: int) -> None:
        self.name, self.ticket = name, ticket
        self.bound: dict[type[Any], Any] = {}
        self.actor: list[Any] = []  # its ActorMetrics, once there is one


class ActorNames:
    """The actor names that are admitted: `limit` at most, each until it is released.

    A limit by tickets: taking one is one list operation, so no two threads can both take the last.
    """

    def __init__(self, limit: int, overflows: Overflows, *, strict: bool = False) -> None:
        self.limit, self._overflows, self._strict = limit, overflows, strict
        self.other = Admission(OTHER, -1)
        self._names: dict[str, Admission] = {}
        self._tickets = list(range(limit))

    def __len__(self) -> int:
        return len(self._names)

    def all(self) -> tuple[str, ...]:
        """The admitted names, oldest first."""
        return tuple(self._names)

    def admissions(self) -> list[Admission]:
        """The admitted names and "__other__", which comes last."""
        return [*list(self._names.values()), self.other]

    def get(self, name: str) -> Admission | None:
        """The admission of a name, if it is admitted already."""
        return self._names.get(name) if type(name) is str else None

    def admit(self, name: str) -> Admission:
        """The admission of a name, or that of "__other__" when the limit is reached.

        Raises ActorNameError for a name that can never be one (empty, not text, not UTF-8, over 128 bytes, reserved),
        and at the limit if strict.
        """
        name = _valid(name)
        try:
            ticket = self._tickets.pop()
        except IndexError:
            return self._names.get(name) or self._refuse(name)
        new = Admission(name, ticket)
        admission = self._names.setdefault(name, new)
        if admission is not new:
            self._tickets.append(ticket)  # it was admitted already
        return admission

    def release(self, name: str) -> bool:
        """Give a name's place back. False when it was not admitted."""
        admission = self._names.pop(name, None)
        if admission is None:
            return False
        self._tickets.append(admission.ticket)
        return True

    def _refuse(self, name: str) -> Admission:
        if self._strict:
            raise ActorNameError(name, f"{self.limit} actor names are admitted already", _MEND_LIMIT)
        self._overflows.note("*", "actor_name", name, f"{self.limit} names at most; {_MEND_LIMIT}")
        return self.other


_MEND_LIMIT = "name kinds of actors and not instances, release names that ended, or raise RKMETRICS_MAX_ACTOR_NAMES"


def _valid(name: str) -> str:
    if not isinstance(name, str):
        raise ActorNameError(name, f"not text but {type(name).__name__}", "pass the name of a kind of actor")
    name = str(name)
    if not name:
        raise ActorNameError(name, "empty", "pass the name of a kind of actor")
    if name == OTHER:
        raise ActorNameError(name, "reserved for names past the limit", "choose another name")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ActorNameError(name, "not valid UTF-8 (it has a surrogate)", "decode it with errors='replace'") from None
    if size > ACTOR_NAME_BYTES:
        raise ActorNameError(name[:32] + "…", f"{size} bytes long", f"use {ACTOR_NAME_BYTES} bytes at most")
    return name


@dataclass(frozen=True, slots=True)
class MetricBudget:
    """The worst case of one metric: series and sample lines, for one actor name and for all of them."""

    metric: str
    series_per_name: int
    lines_per_name: int
    series: int
    lines: int


@dataclass(frozen=True, slots=True)
class Budget:
    """The worst case of everything declared, with `actor_names` names and "__other__" beside them."""

    actor_names: int
    metrics: tuple[MetricBudget, ...]

    @property
    def series_per_name(self) -> int:
        return sum(metric.series_per_name for metric in self.metrics)

    @property
    def lines_per_name(self) -> int:
        return sum(metric.lines_per_name for metric in self.metrics)

    @property
    def series(self) -> int:
        return sum(metric.series for metric in self.metrics)

    @property
    def lines(self) -> int:
        return sum(metric.lines for metric in self.metrics)


def budget(definitions: Iterable[MetricDefinition], actor_names: int) -> Budget:
    """Add up the worst case before anything runs: every label at every value, "__other__" included."""
    return Budget(actor_names, tuple(_metric_budget(definition, actor_names) for definition in definitions))


def _metric_budget(definition: MetricDefinition, actor_names: int) -> MetricBudget:
    names = actor_names + 1 if definition.per_actor else 1
    combos = 1 if definition.dynamic else definition.worst_combos
    lines = combos * definition.lines_per_series
    own = definition.per_actor
    return MetricBudget(definition.name, combos if own else 0, lines if own else 0, combos * names, lines * names)
