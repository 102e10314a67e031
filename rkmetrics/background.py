"""An event loop in a daemon thread, for what goes on beside a program of any kind.

A program may have no loop, one that blocks, or several; what must be on time has one of its own. The thread ends with
its coroutine, is asked to stop when the interpreter exits, and does not come along into a forked child: there, whatever
the loop had open is unplugged, so that nothing the child closes is the parent's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from rkmetrics.lifetime import PROCESS, Hooks

__all__ = ["LoopThread", "unplug"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class LoopThread:
    """Runs `main()` in a thread until it returns.

    stop: called in the loop, is to make main() return; seconds are what it may take. forget: called in a forked child.
    """

    def __init__(
        self,
        name: str,
        main: Callable[[], Coroutine[Any, Any, None]],
        stop: Callable[[float], None],
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._main, self._stop, self._forget = name, main, stop, forget
        self._unhook: Callable[[], None] = lambda: None
        self._abandoned: list[object] = []
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come to `start` while its thread is in it
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def running(self) -> bool:
        """Whether the thread is there; in a forked child it is not."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread, and wait until its loop runs; nothing where it runs already."""
        ready = threading.Event()
        thread = threading.Thread(target=self._run, args=(ready,), name=self._name, daemon=True)
        with self._lock:
            known = self._thread
            if known is not None and (known.ident is None or known.is_alive()):
                return
            self._thread = thread
            thread.start()
            self._unhook()
            self._unhook = PROCESS.add(Hooks(self._ask_to_stop, self.join, self._go_on_in_child))
        ready.wait()

    def soon(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function in the loop; nothing where there is none."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed: it ended
                loop.call_soon_threadsafe(function, *arguments)

    def call(self, work: Coroutine[Any, Any, T], timeout_seconds: float) -> T | None:
        """Run a coroutine in the loop, and wait for it; None where there is no loop, or no time left."""
        loop = self._loop
        if loop is None or not self.running or threading.current_thread() is self._thread:
            work.close()
            return None
        try:
            future = asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:  # closed meanwhile
            work.close()
            return None
        try:
            return future.result(timeout_seconds)
        except Exception:
            future.cancel()
            log.debug("%s: a call did not end well", self._name, exc_info=True)
            return None

    def stop(self, timeout_seconds: float) -> bool:
        """Have main() return, and wait for that. Whether it ended."""
        self._ask_to_stop(time.monotonic() + timeout_seconds)
        return self.join(timeout_seconds)

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the end of the thread. Whether it ended."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_seconds)
        return not self.running

    def _ask_to_stop(self, deadline: float) -> None:
        self.soon(self._stop, max(deadline - time.monotonic(), 0.0))

    def _run(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._live(ready))
        except Exception:
            log.exception("%s ends", self._name)
        finally:
            self._unhook()
            ready.set()

    async def _live(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(_Errands())
        ready.set()
        await self._main()

    def _go_on_in_child(self) -> None:
        loop = self._loop
        self._reset()
        if loop is not None:
            _unplug_all(loop)
            self._abandoned.append(loop)  # kept: what is collected may close numbers that are others' by then
        self._forget()


class _Errands(ThreadPoolExecutor):
    """A daemon thread for each call: what a loop looks up names with.

    A look-up may hang for half a minute. In asyncio's pool it would hold up the other look-ups, and then the end of the
    process, which waits for the threads of every pool.
    """

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run a function in a thread of its own."""
        future: Future[T] = Future()

        def run() -> None:
            with suppress(InvalidStateError):  # cancelled: nobody waits any more
                try:
                    future.set_result(fn(*args, **kwargs))
                except Exception as error:
                    future.set_exception(error)

        threading.Thread(target=run, name="rkmetrics-errand", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nobody waits for errands that are on their way."""


def _unplug_all(loop: asyncio.AbstractEventLoop) -> None:
    """Unplug whatever a loop waits for, and what it waits with: an epoll is the parent's too."""
    selector = getattr(loop, "_selector", None)
    if selector is None:
        return
    with suppress(Exception):
        numbers = [int(key.fd) for key in selector.get_map().values()]
        fileno = getattr(selector, "fileno", None)
        for number in (*numbers, *([fileno()] if fileno else [])):
            unplug(number)


def unplug(number: int) -> None:
    """Put nothing in the place of an inherited descriptor: its number stays taken, so that no later close hits
    another."""
    with suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nothing, number, inheritable=False)
        os.close(nothing)
