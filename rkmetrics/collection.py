"""Runs the collectors of a user, so that one that raises or hangs costs its own families and nothing else.

Each runs in a daemon thread of its own while a scrape waits for it, up to its time limit. One that is still running
is not started again: the scrape after the next finds out with no wait whether it came back. What it gave too late is
dropped.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future, wait
from enum import StrEnum
from typing import Any, TypeAlias

from rkmetrics.model import Family, ForeignFamily, MetricFamily

__all__ = ["Collect", "CollectorFailure", "Guarded"]

logger = logging.getLogger("rkmetrics")

#: Refreshes cells of its own and returns None, or returns families. May be a coroutine function.
Collect: TypeAlias = Callable[[], "Iterable[Family] | Awaitable[Iterable[Family] | None] | None"]

_Result: TypeAlias = "Future[tuple[Family, ...]]"


class CollectorFailure(StrEnum):
    """Why a scrape went without a collector's families."""

    RAISED = "raised"
    TIMEOUT = "timeout"


class Guarded:
    """One collector, its time limit, and whether it is running.

    failed: called with (name, reason) each time a scrape goes without it.
    """

    def __init__(
        self, name: str, collect: Collect, timeout_seconds: float, failed: Callable[[str, CollectorFailure], None]
    ) -> None:
        self.name, self.timeout_seconds = name, timeout_seconds
        self._collect, self._failed = collect, failed
        self._running: tuple[int, _Result] | None = None
        self._state = "ok"

    def start(self) -> _Result | None:
        """Begin a run, or join the one that another scrape began. None while an overdue one has not come back."""
        pid = os.getpid()
        running = self._running
        if running and running[0] == pid and not running[1].done():  # a forked child has no such thread
            return None if self._state == CollectorFailure.TIMEOUT else running[1]
        result: _Result = Future()
        self._running = (pid, result)
        thread = threading.Thread(target=self._run, args=(result,), name=f"rkmetrics-collect-{self.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no thread to be had: as many as the system allows, or a subinterpreter
            result.set_exception(error)
        return result

    def finish(self, result: _Result | None, deadline: float) -> tuple[Family, ...]:
        """Wait until `deadline` (monotonic seconds) for a run; no families if it raised or is overdue."""
        if result is None:
            return self._fail(CollectorFailure.TIMEOUT, None)
        # What is raised while waiting (Ctrl-C) is the caller's; what the collector raised is looked at afterwards.
        wait((result,), max(0.0, deadline - time.monotonic()))
        if not result.done():
            return self._fail(CollectorFailure.TIMEOUT, None)
        error = result.exception()
        if error is not None:
            return self._fail(CollectorFailure.RAISED, error)
        families = result.result()
        if self._state != "ok":
            logger.warning("collector %r is back", self.name)
        self._state = "ok"
        return families

    def _fail(self, reason: CollectorFailure, error: BaseException | None) -> tuple[Family, ...]:
        if self._state != reason:  # once for each change, not for each scrape
            what = f"did not answer within its {self.timeout_seconds:g} s" if error is None else "raised"
            logger.error(
                "collector %r %s; its metrics are left out until it does better", self.name, what, exc_info=error
            )
        self._state = reason
        self._failed(self.name, reason)
        return ()

    def _run(self, result: _Result) -> None:
        try:
            given = self._collect()
            if inspect.isawaitable(given):
                given = _await(given)
            result.set_result(_families(self.name, given))
        except BaseException as error:
            result.set_exception(error)


def _await(awaitable: Awaitable[Any]) -> Any:
    import asyncio

    async def waited() -> Any:
        return await awaitable

    return asyncio.run(waited())


def _families(name: str, given: Any) -> tuple[Family, ...]:
    families = () if given is None else tuple(given)
    for family in families:
        if not isinstance(family, MetricFamily | ForeignFamily):
            raise TypeError(f"collector {name!r} gave {family!r}; expected rkmetrics.model families, or None")
    return families
