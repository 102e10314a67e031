"""Threads that make the answers that take time, for a server that must not wait."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

from rkmetrics.asgi.base import Response
from rkmetrics.asgi.routes import FAILED, Answer, Surface

__all__ = ["Workers"]

log = logging.getLogger(__name__)

C = TypeVar("C")


class Workers(Generic[C]):
    """A few daemon threads; `submit` and `finished` are for one thread alone, the server's. ring: called from any."""

    def __init__(self, surface: Surface, threads: int, waiting: int, ring: Callable[[], None]) -> None:
        self._surface, self._most, self._waiting, self._ring = surface, threads, waiting, ring
        self._jobs: SimpleQueue[tuple[C, Answer] | None] = SimpleQueue()
        self._done: deque[tuple[C, Response]] = deque()
        self._threads = self._outstanding = 0

    def submit(self, client: C, answer: Answer) -> bool:
        """Have an answer made. False when too many wait already."""
        if self._outstanding >= self._most + self._waiting:
            return False
        if self._outstanding >= self._threads and self._threads < self._most:
            with suppress(RuntimeError):  # no thread to be had; those that run take the job
                threading.Thread(target=self._work, name="rkmetrics-serve-worker", daemon=True).start()
                self._threads += 1
        if not self._threads:
            return False
        self._outstanding += 1
        self._jobs.put((client, answer))
        return True

    def finished(self) -> list[tuple[C, Response]]:
        """Return what has been made since the last call."""
        made: list[tuple[C, Response]] = []
        while self._done:
            made.append(self._done.popleft())
        self._outstanding -= len(made)
        return made

    def stop(self) -> None:
        """Let every thread end after its job."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            client, answer = job
            self._done.append((client, self._respond(answer)))
            self._ring()

    def _respond(self, answer: Answer) -> Response:
        try:
            return self._surface.respond(answer)
        except BaseException:  # a SystemExit that ended the worker would leave its client waiting for ever
            log.exception("answering %s failed", answer.route)
            return self._surface.count(answer.route, FAILED)
