"""The usual `process_*` metrics, read from the operating system by psutil before each collection."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

from rkmetrics.catalogue.runtime import Process
from rkmetrics.collectors.base import PerProcess, Refresh, Turn

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from rkmetrics.cells import GaugeCell
    from rkmetrics.registry import Registry

__all__ = ["age_seconds", "install"]

Read = Callable[[psutil.Process], float | None]


def install(registry: Registry) -> Refresh:
    """Feed Process. A forked child reports itself, and begins at zero."""
    own = PerProcess(lambda: _Reader(_bound(registry)))

    def process() -> None:
        own.get().refresh()

    return process


def age_seconds() -> float:
    """Seconds since this process started, by clocks that nobody sets where there are such (Linux)."""
    try:
        with open("/proc/self/stat", "rb") as file:
            # proc(5): starttime is field 22, in ticks since boot; the name, field 2, may hold spaces and brackets.
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = time.time() - psutil.Process().create_time()
    return max(0.0, age)


def _bound(registry: Registry) -> Process:
    """The set for this process: a new one in a forked child, as the memory it inherits holds its parent's numbers."""
    bound = registry.bind(Process)
    return registry.renew(Process) if bound.cpu_seconds.value else bound


class _Reader:
    """One process, its cells, and how much of its CPU time is counted already."""

    def __init__(self, bound: Process) -> None:
        self._process, self._cpu_seconds, self._counted = psutil.Process(), bound.cpu_seconds, 0.0
        self._gauges: list[tuple[GaugeCell, Read]] = [(getattr(bound, name), read) for name, read in _GAUGES.items()]
        self._turn = Turn()

    def refresh(self) -> None:
        if self._turn.take():  # two at once would count the same CPU time twice
            try:
                with self._process.oneshot():
                    self._count()
                    for gauge, read in self._gauges:
                        _set(gauge, read, self._process)
            finally:
                self._turn.give()

    def _count(self) -> None:
        """Follow a number that the system counts: by what it rose since the last reading."""
        times = self._process.cpu_times()
        used = times.user + times.system
        self._cpu_seconds.inc(max(0.0, used - self._counted))
        self._counted = max(used, self._counted)


def _set(gauge: GaugeCell, read: Read, process: psutil.Process) -> None:
    try:
        value = read(process)
    except (psutil.Error, OSError):  # not allowed or not there on this system; the other numbers are
        value = None
    if value is None:
        gauge.clear()
    else:
        gauge.set(value)


def _open_fds(process: psutil.Process) -> float:
    if sys.platform == "win32":
        return float(process.num_handles())
    return float(process.num_fds())


def _max_fds(_: psutil.Process) -> float | None:
    if sys.platform == "win32":
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


# Attribute of Process -> how it is read. Asked inside `oneshot`, so that one reading of /proc serves several.
_GAUGES: dict[str, Read] = {
    "resident_memory": lambda process: process.memory_info().rss,
    "virtual_memory": lambda process: process.memory_info().vms,
    "open_fds": _open_fds,
    "max_fds": _max_fds,
    "threads": lambda process: process.num_threads(),
    "started": lambda process: process.create_time(),
}
