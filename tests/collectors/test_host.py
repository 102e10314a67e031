"""What the node may use: trees of files as the kernel writes them, and real control groups where we may make them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.collectors.host import CpuReading, Host, cpu_reading, groups, load_ratio, memory_ratio

MIB = 2**20
GIB = 2**30


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def tree(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def mount(number: int, root: str, point: Path, kind: str, options: str) -> str:
    return f"{number} 23 0:{number} {root} {point} rw,nosuid shared:9 - {kind} {kind} rw,{options}"


@pytest.fixture
def version_2(tmp_path: Path) -> Path:
    """A container's process under version 2: its own group has no limit on CPU, the group around it has."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cgroup").write_text("0::/app/web\n")
    (tmp_path / "proc/mountinfo").write_text(
        mount(1, "/", Path("/"), "ext4", "x") + "\n" + mount(30, "/", tmp_path / "sys", "cgroup2", "nsdelegate") + "\n"
    )
    tree(
        tmp_path / "sys/app",
        {
            "cpu.max": "50000 100000",
            "cpu.stat": "usage_usec 7000000\nuser_usec 5000000",
            "memory.max": str(100 * MIB),
            "memory.current": str(60 * MIB),
            "memory.stat": f"anon 1\ninactive_file {10 * MIB}",
            "web/cpu.max": "max 100000",
            "web/cpu.stat": "usage_usec 1000000",
            "web/memory.max": "max",
            "web/memory.current": str(40 * MIB),
            "web/memory.stat": "inactive_file 0",
        },
    )
    return tmp_path


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    """A container under version 1: its own group is the root of the mounts, and memberships name the host's path."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cgroup").write_text("4:memory:/docker/ab\n3:cpuacct,cpu:/docker/ab\n0::/\n")
    (tmp_path / "proc/mountinfo").write_text(
        "\n".join(
            mount(i, root, tmp_path / "sys" / folder, kind, options)
            for i, root, folder, kind, options in (
                (30, "/docker/ab", "memory", "cgroup", "memory"),
                (31, "/docker/ab", "cpu", "cgroup", "cpu,cpuacct"),
                (32, "/", "unified", "cgroup2", "x"),
            )
        )
    )
    tree(
        tmp_path / "sys",
        {
            "memory/memory.limit_in_bytes": str(200 * MIB),
            "memory/memory.usage_in_bytes": str(150 * MIB),
            "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {50 * MIB}",
            "cpu/cpu.cfs_quota_us": "150000",
            "cpu/cpu.cfs_period_us": "100000",
            "cpu/cpuacct.usage": "9000000000",
            "unified/cgroup.procs": "1",
        },
    )
    return tmp_path


def test_version_2_the_limit_of_an_outer_group_binds(version_2: Path) -> None:
    reading = cpu_reading(tuple(groups(version_2 / "proc", "cpu")))
    assert reading.source == f"{version_2 / 'sys/app'} 0.5"
    assert reading.used == 7.0
    assert memory_ratio(tuple(groups(version_2 / "proc", "memory"))) == 0.5


def test_version_1_limits_are_found_in_a_container(version_1: Path) -> None:
    reading = cpu_reading(tuple(groups(version_1 / "proc", "cpu")))
    cpus = min(1.5, float(len(os.sched_getaffinity(0))))
    assert reading.source == f"{version_1 / 'sys/cpu'} {cpus}"
    assert reading.used == 9.0
    assert memory_ratio(tuple(groups(version_1 / "proc", "memory"))) == 0.5


def test_usage_of_a_limited_group_is_of_its_share(version_2: Path) -> None:
    limited = tuple(groups(version_2 / "proc", "cpu"))
    before = cpu_reading(limited)
    (version_2 / "sys/app/cpu.stat").write_text("usage_usec 9000000\n")
    after = cpu_reading(limited)._replace(available=before.available + 4.0)
    assert after.ratio_since(before) == 0.5


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "max"},
        {"memory.max": "", "memory.current": ""},
        {"memory.max": "nonsense"},
        {"memory.max": "0"},
        {"memory.max": str(2**63)},
    ],
    ids=["none", "empty", "garbage", "zero", "more than there is"],
)
def test_a_limit_that_is_none_leaves_the_machine(version_2: Path, files: Mapping[str, str]) -> None:
    tree(version_2 / "sys/app", files)
    limited = tuple(groups(version_2 / "proc", "memory"))
    assert [group.memory_ratio(64 * GIB) for group in limited] == [None] * len(limited)
    assert 0 < memory_ratio(limited) < 1


@pytest.mark.parametrize("missing", ["proc/cgroup", "proc/mountinfo"])
def test_a_system_without_groups_has_no_limits(version_2: Path, missing: str) -> None:
    (version_2 / missing).unlink()
    assert list(groups(version_2 / "proc", "cpu")) == []
    assert cpu_reading().source.startswith("machine")


def test_a_membership_outside_of_the_mount_is_taken_as_its_root(version_2: Path) -> None:
    """Seen from another cgroup namespace the path begins with /.. (cgroup_namespaces(7))."""
    (version_2 / "proc/cgroup").write_text("0::/../../elsewhere\n")
    assert [group.folder for group in groups(version_2 / "proc", "cpu")] == [version_2 / "sys"]


def test_readings_of_two_sources_are_not_compared() -> None:
    assert CpuReading("a 2", 9.0, 9.0).ratio_since(CpuReading("a 1", 1.0, 1.0)) is None
    assert CpuReading("a", 1.0, 1.0).ratio_since(CpuReading("a", 1.0, 1.0)) is None


@given(*[st.floats(-1e12, 1e12)] * 4)
def test_a_ratio_is_from_0_to_1(used: float, available: float, used_before: float, available_before: float) -> None:
    ratio = CpuReading("a", used, available).ratio_since(CpuReading("a", used_before, available_before))
    assert ratio is None or 0 <= ratio <= 1


def test_cpu_time_that_is_burned_shows_in_the_machine() -> None:
    before = cpu_reading()
    burn(0.1)
    after = cpu_reading()
    assert after.used > before.used
    assert 0 < (after.ratio_since(before) or 0) <= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs two CPUs")
def test_a_process_pinned_to_a_cpu_has_that_cpu(script: Callable[..., str]) -> None:
    out = script("""
import os
from rkmetrics.collectors.host import cpu_reading
whole = cpu_reading()
cpu = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cpu})
pinned = cpu_reading()
print(pinned.source == f"machine [{cpu}]", pinned.available < whole.available)
""")
    assert out.split() == ["True", "True"]


def test_the_first_usage_is_the_load_average(tmp_path: Path) -> None:
    host = Host(tmp_path)
    usage = host.usage()
    assert 0 <= usage.cpu <= 1
    assert abs(usage.cpu - load_ratio()) < 0.5
    assert host.usage() is usage


# --- real groups ------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_group() -> Iterator[Callable[[str], Path]]:
    """Make a control group of version 1 beside our own; skips where that is not allowed."""
    made: list[Path] = []

    def make(controller: str) -> Path:
        own = next((group for group in groups(Path("/proc/self"), controller) if group.version == 1), None)
        if own is None:
            pytest.skip(f"no {controller} controller of version 1 here")
        folder = own.folder / f"rkmetrics-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            pytest.skip(f"may not make a control group: {error}")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        folder.rmdir()


def test_a_real_memory_limit_is_honoured(make_group: Callable[[str], Path], script: Callable[..., str]) -> None:
    folder = make_group("memory")
    (folder / "memory.limit_in_bytes").write_text(str(256 * MIB))
    out = script(f"""
import os
from pathlib import Path
Path({str(folder / "cgroup.procs")!r}).write_text(str(os.getpid()))
kept = b"x" * {96 * MIB}
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings
print(Registry(Settings()).vitals().memory_usage)
""")
    assert 37 < float(out) < 100
    assert psutil.virtual_memory().total > 256 * MIB


def test_a_real_cpu_limit_is_honoured(make_group: Callable[[str], Path], script: Callable[..., str]) -> None:
    folder, accounting = make_group("cpu"), make_group("cpuacct")
    if not (folder / "cpu.cfs_quota_us").exists():
        pytest.skip("no CPU bandwidth control in this kernel")
    (folder / "cpu.cfs_quota_us").write_text("20000")
    out = script(f"""
import os, time
from pathlib import Path
for folder in {[str(folder), str(accounting)]!r}:
    Path(folder, "cgroup.procs").write_text(str(os.getpid()))
from rkmetrics.collectors.host import cpu_reading, groups
limited = tuple(groups(Path("/proc/self"), "cpu"))
before = cpu_reading(limited)
end = time.process_time() + 0.1
while time.process_time() < end: pass
after = cpu_reading(limited)
print(after.source, after.used - before.used, after.ratio_since(before))
""")
    *_, cpus, used, ratio = out.split()
    assert float(cpus) == 0.2
    assert float(used) >= 0.09
    assert 0 < float(ratio) <= 1
