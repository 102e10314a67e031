"""What a collector is, and two things that most of them need: a value for each process, and a turn that is taken.

A scrape may run in any thread, in a forked child, or in a signal handler that interrupts another scrape. So nothing
here is a lock, on which the last two could wait for ever: a dictionary operation or a list operation happens whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["Collector", "PerProcess", "Refresh", "Turn"]

#: Brings cells up to date. Runs before each collection, in the scrape's own thread: it costs well under a millisecond.
Refresh = Callable[[], object]

T = TypeVar("T")


class Collector(Protocol):
    """What each module of this folder that is listed in COLLECTORS offers."""

    def install(self, registry: Registry) -> Refresh | None:
        """Bind what it feeds. Returns what is to run before each collection; None if it needs no such thing."""
        ...


class PerProcess(Generic[T]):
    """A value that each process makes for itself: a forked child gets its own, at its first use."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def get(self) -> T:
        """Return this process' value."""
        pid = os.getpid()
        found = self._made.get(pid)
        if found is None:
            found = self._made.setdefault(pid, self._make())
            for other in [each for each in self._made if each != pid]:
                self._made.pop(other, None)
        return found


class Turn:
    """Lets one caller in and sends others away, instead of having them wait.

    `if turn.take(): try: ... finally: turn.give()`. Make one for each process: a child has not the thread that has it.
    """

    __slots__ = ("_free",)

    def __init__(self) -> None:
        self._free = [None]

    def take(self) -> bool:
        """Whether the turn is the caller's, who has to give it back."""
        try:
            self._free.pop()
        except IndexError:
            return False
        return True

    def give(self) -> None:
        """Give the turn back."""
        self._free.append(None)
