"""How full the node is: CPU and memory in use, of all that this process may use.

"All" is the machine, or less: the CPUs that the process may run on, and the limits of its cgroup (versions 1 and 2,
and of the groups around it, since those bind as well). Under a limit, usage is that of the limited group; without
one, of the machine. Memory leaves out the page cache that the kernel gives back at need (inactive_file), as
Kubernetes' working set does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import psutil

from rkmetrics.collectors.base import PerProcess, Turn

__all__ = [
    "INTERVAL_SECONDS",
    "CpuReading",
    "Group",
    "Host",
    "Usage",
    "cpu_reading",
    "groups",
    "load_ratio",
    "memory_ratio",
    "usage",
]

# Usage is measured at most this often: CPU usage over less is noise (the kernel counts in hundredths of a second).
INTERVAL_SECONDS = 1.0

PROC = Path("/proc/self")


class Usage(NamedTuple):
    """Ratios, 0 to 1."""

    cpu: float
    memory: float


class CpuReading(NamedTuple):
    """CPU seconds used so far, and those there were to use. Comparable with readings of the same source only."""

    source: str
    used: float
    available: float

    def ratio_since(self, before: CpuReading) -> float | None:
        """Return the share that was used between two readings; None where they cannot be compared."""
        available = self.available - before.available
        if self.source != before.source or available <= 0:
            return None
        return _clamped((self.used - before.used) / available)


class Host:
    """Measures usage, at most once in INTERVAL_SECONDS; all registries of a process share one.

    The first CPU usage is the machine's load average of the last minute over its CPUs: there is no interval yet to
    look at, and waiting for one would hold up the scrape.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._memory_groups, self._cpu_groups = tuple(groups(proc, "memory")), tuple(groups(proc, "cpu"))
        self._turn, self._measured = Turn(), monotonic()
        self._reading = cpu_reading(self._cpu_groups)
        self._usage = Usage(load_ratio(), memory_ratio(self._memory_groups))

    def usage(self) -> Usage:
        """Return the usage, a second old at most if asked often; over the time since it was last asked, if seldom."""
        now = monotonic()
        if now - self._measured >= INTERVAL_SECONDS and self._turn.take():
            try:
                self._measured = now
                self._measure()
            finally:
                self._turn.give()
        return self._usage

    def _measure(self) -> None:
        before, self._reading = self._reading, cpu_reading(self._cpu_groups)
        cpu = self._reading.ratio_since(before)
        self._usage = Usage(self._usage.cpu if cpu is None else cpu, memory_ratio(self._memory_groups))


_own = PerProcess(Host)


def usage() -> Usage:
    """Return how full this node is."""
    return _own.get().usage()


# --- the machine, or what a group leaves of it ------------------------------------------------------------------------


def cpu_reading(limited: tuple[Group, ...] = ()) -> CpuReading:
    """Return what is used of the tightest limit on CPU time, else of the CPUs that the process may run on."""
    quotas = [(quota, group) for group in limited if (quota := group.cpus()) is not None]
    if quotas:
        quota, group = min(quotas, key=lambda each: each[0])
        used = group.cpu_seconds()
        if used is not None:
            cpus = min(quota, float(_cpus()))
            return CpuReading(f"{group.folder} {cpus}", used, monotonic() * cpus)
    return _machine_reading()


def memory_ratio(limited: tuple[Group, ...] = ()) -> float:
    """Return the memory in use: of the limit that is nearest to being reached, else of the machine."""
    machine = psutil.virtual_memory()
    ratios = [ratio for group in limited if (ratio := group.memory_ratio(machine.total)) is not None]
    return max(ratios) if ratios else _clamped(1 - machine.available / machine.total)


def load_ratio() -> float:
    """Return the load average of the last minute over the CPUs; 0 where there is no such thing."""
    try:
        return _clamped(os.getloadavg()[0] / (psutil.cpu_count() or 1))
    except (AttributeError, OSError):
        return 0.0


def _machine_reading() -> CpuReading:
    times = [psutil.cpu_times()]
    allowed = _allowed()
    if allowed and len(allowed) < (psutil.cpu_count() or 1):
        each = psutil.cpu_times(percpu=True)
        if max(allowed) < len(each):
            times = [each[cpu] for cpu in sorted(allowed)]
    total, idle = sum(map(_total, times)), sum(time.idle + getattr(time, "iowait", 0.0) for time in times)
    return CpuReading(f"machine {sorted(allowed)}", total - idle, total)


def _total(times: tuple[float, ...]) -> float:
    # proc_stat(5): time spent in guests is in user and nice already.
    return sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _cpus() -> int:
    return len(_allowed()) or psutil.cpu_count() or 1


def _clamped(ratio: float) -> float:
    return min(1.0, max(0.0, ratio))


# --- cgroups (cgroups(7); kernel documentation, "Control Group v2" and "CPU Accounting Controller") -------------------


@dataclass(frozen=True, slots=True)
class Group:
    """A control group that the process is in: its folder in the hierarchy of one controller."""

    version: int
    folder: Path
    accounting: Path

    def cpus(self) -> float | None:
        """How many CPUs' time it may use; None without a limit."""
        if self.version == 2:
            quota, _, period = _text(self.folder / "cpu.max").partition(" ")
        else:
            quota, period = _text(self.folder / "cpu.cfs_quota_us"), _text(self.folder / "cpu.cfs_period_us")
        allowed, of = _number(quota), _number(period)
        return allowed / of if allowed and of and allowed > 0 else None

    def cpu_seconds(self) -> float | None:
        """CPU time that it has used."""
        if self.version == 2:
            used, unit = _field(self.folder / "cpu.stat", "usage_usec"), 1e6
        else:
            used, unit = _number(_text(self.accounting / "cpuacct.usage")), 1e9
        return None if used is None else used / unit

    def memory_ratio(self, total: float) -> float | None:
        """Memory in use of its limit; None without one, or with one that the machine cannot reach."""
        limit_file, used_file, cache_field = _MEMORY_FILES[self.version]
        limit, used = _number(_text(self.folder / limit_file)), _number(_text(self.folder / used_file))
        if limit is None or used is None or not 0 < limit < total:
            return None
        return _clamped((used - (_field(self.folder / "memory.stat", cache_field) or 0.0)) / limit)


# Version -> limit, usage, and the part of it that is page cache to give back; with the groups below it.
_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def groups(proc: Path, controller: str) -> Iterator[Group]:
    """Yield the groups whose limits bind a process for a controller, from its own outwards. proc: /proc/self, or
    alike."""
    paths = dict(_memberships(_text(proc / "cgroup")))
    mounts = list(_mounts(_text(proc / "mountinfo")))
    version = 1 if controller in paths else 2
    found = _place(paths, mounts, controller if version == 1 else "")
    if found is None:
        return
    mount, inside = found
    accounting = _place(paths, mounts, "cpuacct") if version == 1 else None
    for each in (inside, *inside.parents):
        folder = mount / each
        if folder.is_dir():
            yield Group(version, folder, accounting[0] / each if accounting else folder)


def _place(paths: dict[str, str], mounts: list[_Mount], controller: str) -> tuple[Path, Path] | None:
    """Where a controller's hierarchy is mounted, and the process' folder in it. Controller "": version 2."""
    for mount in mounts:
        if controller in mount.controllers and controller in paths:
            path, root = paths[controller], mount.root.rstrip("/")
            # In a container the mount's root may be a group far down, or the path may be seen from elsewhere.
            inside = path.removeprefix(root) if (path + "/").startswith(root + "/") else ""
            return mount.point, Path("" if ".." in inside.split("/") else inside.lstrip("/"))
    return None


class _Mount(NamedTuple):
    controllers: tuple[str, ...]
    root: str
    point: Path


def _memberships(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _mounts(text: str) -> Iterator[_Mount]:
    # proc_pid_mountinfo(5): (4) root, (5) mount point, optional fields, "-", type, source, options of the file system.
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, *_, options = after.split(" ")
        if kind in ("cgroup", "cgroup2"):
            root, point = before.split(" ")[3:5]
            yield _Mount(("",) if kind == "cgroup2" else tuple(options.split(",")), root, Path(point))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> float | None:
    return float(text) if text.lstrip("-").isdecimal() else None  # "max" is no limit


def _field(path: Path, name: str) -> float | None:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _number(value)
    return None
