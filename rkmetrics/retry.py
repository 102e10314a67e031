"""For what is tried again in the background: how long to wait, and how much to say.

A peer that is away costs a try now and then and one line of log for each change, whatever it does and for how long.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

__all__ = ["Backoff", "StateLog", "jittered"]


class Backoff:
    """How long to wait before the n-th try: a random part of a span that doubles up to a cap ("full jitter")."""

    def __init__(self, first: float = 0.1, cap: float = 2.0) -> None:
        self._first, self._cap, self._tries = first, cap, 0

    def next(self) -> float:
        """Return the seconds to wait; never less than half of `first`, so that nobody spins."""
        span = min(self._first * 2**self._tries, self._cap)
        self._tries += span < self._cap
        return max(random.uniform(0, span), self._first / 2)  # noqa: S311 - no secret

    def reset(self) -> None:
        """All is well again."""
        self._tries = 0


def jittered(seconds: float, part: float = 0.1) -> float:
    """Return the span, shorter by up to that part: who began together does not stay together."""
    return seconds * random.uniform(1 - part, 1)  # noqa: S311 - no secret


class StateLog:
    """One line for each change of state, and not more than a few in a while when it flaps."""

    BURST, REFILL_SECONDS = 6, 30.0

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._left, self._at = float(self.BURST), clock()
        self._state = ""
        self._unsaid = 0

    def note(self, state: str, level: int, text: str, *parts: object) -> None:
        """Say the text if the state is a new one."""
        if state == self._state:
            return
        self._state = state
        now = self._clock()
        self._left = min(self._left + (now - self._at) / self.REFILL_SECONDS, self.BURST)
        self._at = now
        if self._left < 1:
            self._unsaid += 1
            return
        self._left -= 1
        more = f" (and {self._unsaid} more changes that were not said)" if self._unsaid else ""
        self._unsaid = 0
        self._log.log(level, text + "%s", *parts, more)
