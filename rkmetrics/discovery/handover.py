"""Signals that wait for something to be done first.

A server closes its port as the first thing on SIGTERM; a backend wants to be unlisted before. So the signal is caught
after the server has set its handlers, and handed to them when all is done; a second one is handed on at once.
Handlers that asyncio keeps for itself (loop.add_signal_handler) hear a signal in any case, and cannot be made to wait.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

__all__ = ["Handover"]


class Handover:
    """Signals that wait until we have left, and go on to their former handlers then; a second one goes on at once."""

    def __init__(self, numbers: Sequence[signal.Signals], leave: Callable[[Callable[[], None]], None]) -> None:
        self._numbers, self._leave = numbers, leave
        self._before: dict[int, Any] = {}
        self._leaving = self._passed_on = False
        self._pid = 0

    def catch(self) -> None:
        """Main thread only, and after the server has set its own handlers: in the lifespan."""
        self._pid = os.getpid()
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._caught)

    def release(self) -> None:
        """Put the former handlers back, where nobody has put others since."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._caught:
                signal.signal(number, before)
        self._before = {}

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self._leaving or self._pid != os.getpid():  # a forked child has nothing to leave
            self._pass_on(number, frame)
            return
        self._leaving = True
        self._leave(lambda: None if self._passed_on else os.kill(os.getpid(), number))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._passed_on = True
        before = self._before.get(number, signal.SIG_DFL)
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
