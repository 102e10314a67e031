"""One backend in the table of a balancer, and its damping. A value that the directory alone changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from rkmetrics.catalogue.discovery import BackendState, CheckOutcome
from rkmetrics.discovery.base import Backend, SourceName
from rkmetrics.discovery.verdict import Vitals

__all__ = ["RANK", "Entry", "Holding"]

RANK: Mapping[SourceName, int] = {name: rank for rank, name in enumerate(SourceName)}
HALF_LIFE_SECONDS = 180.0
DAMPING_DOUBLINGS = 4


class Holding(NamedTuple):
    """What one source says of a backend. caller: who announced it."""

    backend: Backend
    caller: str
    seen: float


class Entry:
    """One backend in the table. Its fields are the directory's; a checker reads `backend` and `gone`."""

    __slots__ = (
        "assigned",
        "backend",
        "checked",
        "eager",
        "fell",
        "gone",
        "hits",
        "holders",
        "lost",
        "misses",
        "outcome",
        "penalty",
        "penalty_at",
        "position",
        "seen_up",
        "since",
        "state",
        "vitals",
    )

    def __init__(self, backend: Backend, now: float) -> None:
        self.backend = backend
        self.holders: dict[SourceName, Holding] = {}
        self.state, self.since = BackendState.NEW, now
        self.hits = self.misses = 0  # in a row
        self.seen_up = self.eager = self.gone = False
        self.fell = self.lost = False  # from up to down; without a word
        self.penalty, self.penalty_at = 0.0, now
        self.outcome: CheckOutcome | None = None
        self.checked: float | None = None
        self.vitals: Vitals | None = None
        self.assigned = 0  # picks since the last check: what its vitals do not know of yet
        self.position = -1  # in the pool

    @property
    def strongest(self) -> Backend:
        """What its strongest source says of it."""
        return self.holders[max(self.holders, key=RANK.__getitem__)].backend

    @property
    def rank(self) -> int:
        """The rank of its strongest source."""
        return max(map(RANK.__getitem__, self.holders))

    def damping(self, now: float) -> int:
        """How many times its rise is doubled."""
        return min(max(0, round(self._left(now)) - 1), DAMPING_DOUBLINGS)

    def punish(self, now: float) -> None:
        """It left the pool."""
        self.penalty, self.penalty_at = 1 + self._left(now), now

    def _left(self, now: float) -> float:
        """What is left of its penalty."""
        return self.penalty * math.exp2((self.penalty_at - now) / HALF_LIFE_SECONDS)

    def load(self) -> tuple[float, float]:
        """How busy it is, as far as is known."""
        busy, usage = self.vitals.load if self.vitals else (0.0, 0.0)
        return busy + self.assigned, usage
