"""Blocking work for an event loop, also where no thread is to be had."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from rkmetrics.asgi.off_loop import off_loop


def broken() -> None:
    raise LookupError("the details")


async def test_the_work_is_done_in_another_thread() -> None:
    assert await off_loop(threading.get_ident) != threading.get_ident()


async def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(LookupError, match="the details"):
        await off_loop(broken)


async def test_who_gives_up_leaves_the_work_to_itself() -> None:
    go, gone = threading.Event(), threading.Event()

    def work() -> None:
        assert go.wait(30)
        gone.set()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(off_loop(work), 0.001)
    go.set()
    assert gone.wait(30)


WITHOUT_THREADS = """
import asyncio, threading
import rkmetrics as rk
from rkmetrics.asgi.base import Request
from rkmetrics.asgi.off_loop import off_loop
from rkmetrics.asgi.routes import Surface

registry = rk.Registry(rk.Settings(metrics_enabled=True, metrics_access="open"))
surface = Surface(registry)
threading.stack_size(1 << 50)  # more than any address space has
assert asyncio.run(off_loop(threading.get_ident)) == threading.get_ident()
for path in ("/vitals", "/telemetry", "/metrics"):
    request = Request("GET", path)
    shown = surface.respond(surface.answer(request)), asyncio.run(surface.arespond(surface.answer(request)))
    print(path, *(response.status for response in shown))
"""


def test_without_a_thread_the_loop_does_what_is_short_and_refuses_what_is_long() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["/vitals 200 200", "/telemetry 200 200", "/metrics 200 503"], done.stderr
