"""Short blocking work, away from an event loop.

A thread for each call and not the loop's own pool: the answer that tells balancers whether a node is ready must not
stand in a queue behind whatever the application has put there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

__all__ = ["off_loop"]

T = TypeVar("T")


async def off_loop(run: Callable[[], T]) -> T:
    """Return what run() returns, or raise what it raises, without holding up the running loop."""
    from asyncio import wrap_future

    done: Future[T] = Future()
    Thread(target=_run, args=(run, done), name="rkmetrics-off-loop", daemon=True).start()
    return await wrap_future(done)


def _run(run: Callable[[], T], done: Future[T]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(run())
    except BaseException as error:
        done.set_exception(error)
