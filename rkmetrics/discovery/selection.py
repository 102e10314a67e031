"""Choosing one of many: a pool in which coming, going and each choice cost O(1). Not safe from threads by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from random import Random
from typing import Generic, Protocol, TypeVar

__all__ = ["Candidate", "Pool", "Strategy"]


class Strategy(StrEnum):
    """How `pick` chooses."""

    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    LEAST_LOADED = "least_loaded"  # the better of two at random: O(1), and no herd runs to the one that is idle


class Candidate(Protocol):
    """What can be in a pool. position: where it is there, -1 for not at all. assigned: how often it was picked since
    its load was last heard of."""

    position: int
    assigned: int

    def load(self) -> tuple[float, float]:
        """How busy it is; with what was assigned to it since."""
        ...


C = TypeVar("C", bound=Candidate)


class Pool(Generic[C]):
    """Candidates, in no order that means anything. seed: of the random choices; None: a different one each time.

    The least loaded is the better of two at random. What is known of loads is seconds old, and whoever takes the best
    of all by old news sends everything there until the next (Mitzenmacher, "How Useful Is Old Information?"); what was
    assigned since counts too, for the same reason.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.members: list[C] = []
        self.changes = 0  # of the members
        self._cursor = -1
        self._random = Random(seed).random  # noqa: S311 - no secret
        self._picks: Mapping[Strategy, Callable[[], C]] = {
            Strategy.ROUND_ROBIN: self._next,
            Strategy.RANDOM: self._any,
            Strategy.LEAST_LOADED: self._less_loaded,
        }

    def __len__(self) -> int:
        return len(self.members)

    def add(self, candidate: C) -> None:
        """Let one in; nothing where it is in."""
        if candidate.position < 0:
            candidate.position = len(self.members)
            self.changes += 1
            self.members.append(candidate)

    def discard(self, candidate: C) -> None:
        """Let one go: the last one takes its place."""
        if candidate.position < 0:
            return
        self.changes += 1
        last = self.members.pop()
        if last is not candidate:
            self.members[candidate.position] = last
            last.position = candidate.position
        candidate.position = -1

    def pick(self, strategy: Strategy) -> C | None:
        """Return one; None where there is none."""
        if not self.members:
            return None
        found = self._picks[strategy]()
        found.assigned += 1
        return found

    def _next(self) -> C:
        self._cursor = (self._cursor + 1) % len(self.members)
        return self.members[self._cursor]

    def _any(self) -> C:
        return self.members[int(self._random() * len(self.members))]

    def _less_loaded(self) -> C:
        one, other = self._any(), self._any()
        return one if one.load() <= other.load() else other
