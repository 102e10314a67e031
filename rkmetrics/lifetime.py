"""What runs in the background of a process, and what becomes of it at exit and in a forked child.

Threads end with the interpreter and do not come along into a child. Whoever has one registers three functions: at exit
all are asked to stop at once and share EXIT_SECONDS, whatever their peers do; a child is told that it has no thread.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["EXIT_SECONDS", "PROCESS", "Hooks", "Process"]

#: What exit waits for, at most, while everything in the background ends.
EXIT_SECONDS = 5.0


class Hooks(NamedTuple):
    """At exit the first two are called, with a deadline (monotonic) and with what is left; in a forked child the
    third."""

    ask_to_stop: Callable[[float], object]
    shutdown: Callable[[float], bool]
    go_on_in_child: Callable[[], None]


class Process:
    """What runs in the background of this process. Hooks on exit and fork are set with the first, once."""

    def __init__(self) -> None:
        self._running: dict[object, Hooks] = {}
        self._hooked = False

    def add(self, hooks: Hooks) -> Callable[[], None]:
        """Have the hooks called, until what is returned is called: it has ended by itself."""
        mark = object()
        self._running[mark] = hooks
        if not self._hooked:
            self._hooked = True
            atexit.register(self._at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._after_fork)

        def remove() -> None:
            self._running.pop(mark, None)

        return remove

    def _at_exit(self) -> None:
        deadline = time.monotonic() + EXIT_SECONDS
        running = list(self._running.values())
        for hooks in running:
            hooks.ask_to_stop(deadline)
        for hooks in running:
            hooks.shutdown(max(deadline - time.monotonic(), 0.01))

    def _after_fork(self) -> None:
        for hooks in list(self._running.values()):
            hooks.go_on_in_child()


PROCESS = Process()
