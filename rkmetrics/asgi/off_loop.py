"""Short blocking work, away from an event loop.

A thread for each call and not the loop's own pool: the answer that tells balancers whether a node is ready must not
stand in a queue behind whatever the application has put there. Where no thread is to be had, the loop does the work:
it is short, and an answer is due.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

__all__ = ["off_loop"]

T = TypeVar("T")


async def off_loop(run: Callable[[], T]) -> T:
    """Return what run() returns, or raise what it raises, without holding up the running loop if that can be."""
    from asyncio import wrap_future

    done: Future[T] = Future()
    try:
        Thread(target=_run, args=(run, done), name="rkmetrics-off-loop", daemon=True).start()
    except RuntimeError:  # as many as the system allows, or a subinterpreter
        return run()
    return await wrap_future(done)


def _run(run: Callable[[], T], done: Future[T]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(run())
    except BaseException as error:
        done.set_exception(error)
