"""The numbers are those of a real process: this one, or a child of it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from threading import Event, Thread

import psutil
import pytest

from rkmetrics.collectors.process import age_seconds
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings

Number = Callable[..., float]


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def used() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


def test_cpu_time_that_is_burned_shows(look: Number) -> None:
    before = look("process_cpu_seconds_total")
    burn(0.1)
    assert look("process_cpu_seconds_total") > before


def test_cpu_time_is_the_system_s_count(look: Number) -> None:
    low, shown, high = used(), look("process_cpu_seconds_total"), used()
    assert low <= shown + 1e-6
    assert shown <= high + 1e-6


def test_each_registry_shows_the_whole_and_scrapes_at_once_count_it_once(look: Number) -> None:
    registries = [Registry(Settings()) for _ in range(3)]
    stop = Event()

    def scrape(registry: Registry) -> None:
        while not stop.is_set():
            registry.collect()

    threads = [Thread(target=scrape, args=(registry,)) for registry in registries * 2]
    for thread in threads:
        thread.start()
    burn(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    low = used()
    for registry in registries:
        shown = look("process_cpu_seconds_total", registry)
        assert low <= shown + 1e-6 <= used() + 1e-3


@pytest.mark.skipif(sys.platform == "win32", reason="no descriptors")
def test_an_open_file_shows(look: Number) -> None:
    before = look("process_open_fds")
    reader, writer = os.pipe()
    after = look("process_open_fds")
    os.close(reader)
    os.close(writer)
    assert (after - before, look("process_open_fds")) == (2, before)
    assert look("process_max_fds") >= after


def test_a_thread_shows(look: Number) -> None:
    before, stop = look("process_threads"), Event()
    thread = Thread(target=stop.wait)
    thread.start()
    after = look("process_threads")
    stop.set()
    thread.join()
    assert after == before + 1


def test_memory_that_is_touched_shows(look: Number) -> None:
    before = look("process_resident_memory_bytes")
    kept = b"x" * 64_000_000
    assert look("process_resident_memory_bytes") - before > 32_000_000
    assert look("process_virtual_memory_bytes") >= look("process_resident_memory_bytes")
    del kept


def test_the_start_does_not_move(look: Number) -> None:
    start = look("process_start_time_seconds")
    assert 0 < start <= time.time()
    assert look("process_start_time_seconds") == start


def test_age_agrees_with_the_start(look: Number) -> None:
    """Two sources, as one is read without the wall clock; the system rounds the time of its boot to a second."""
    assert abs(time.time() - look("process_start_time_seconds") - age_seconds()) < 2


FORK = """
import json, os, time
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def numbers():
    shown = {}
    for family in registry.collect():
        if family.name.startswith(("process_", "rkmetrics_node_uptime")):
            shown[family.name] = family.values[0]
    return shown

registry = Registry(Settings())
burn(0.4)
registry.collect()
reader, writer = os.pipe()
if not os.fork():
    first = numbers()
    burn(0.1)
    os.write(writer, json.dumps([os.getpid(), first, numbers()]).encode())
    os._exit(0)
os.wait()
print(json.dumps([os.getpid(), numbers(), *json.loads(os.read(reader, 65536))]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_reports_itself(script: Callable[..., str]) -> None:
    _, parent, _, first, second = json.loads(script(FORK))
    cpu, start, uptime = "process_cpu_seconds_total", "process_start_time_seconds", "rkmetrics_node_uptime_seconds"
    assert parent[cpu] >= 0.4
    assert first[cpu] < second[cpu] < parent[cpu]
    assert first[start] == second[start] > parent[start]
    assert first[uptime] < second[uptime] < parent[uptime]
    assert second["process_threads"] == 1
