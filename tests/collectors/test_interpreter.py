from __future__ import annotations

import platform
from collections.abc import Callable
from threading import Event, Thread

from rkmetrics.cells import IMPLEMENTATION


def test_threads_of_python_show(look: Callable[..., float]) -> None:
    before, stop = look("rkmetrics_threads"), Event()
    thread = Thread(target=stop.wait)
    thread.start()
    after = look("rkmetrics_threads")
    stop.set()
    thread.join()
    assert (after, look("rkmetrics_threads")) == (before + 1, before)


def test_the_python_that_runs_is_named(look: Callable[..., object]) -> None:
    assert look("rkmetrics_python_info", version=platform.python_version(), cells=IMPLEMENTATION) == 1
