"""How long until a balancer knows: `python -m tests.bench.discovery_faults` prints the table of docs/discovery.md.

With the protocol's own figures (checks each 5 s, time-out 2 s, announcements each 30 s) and real processes. Each of
five backends meets a fault at a moment of its own, so that the moment within the interval is a chance one. Takes three
minutes.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Iterable
from http.client import HTTPConnection
from statistics import median

from tests.services.discovery_fleet import TOKEN, BalancerProcess, Fleet, fetch, up, wait
from tests.waiting import free_port

BACKENDS = 10
FIGURES = {"RKMETRICS_HEALTH_CHECK_INTERVAL": "5s", "RKMETRICS_HEALTH_CHECK_TIMEOUT": "2s"}


class Watch:
    """When each backend was last seen to enter or leave the pool."""

    def __init__(self, url: str) -> None:
        self._url, self._pool, self._stop = url, set[str](), threading.Event()
        self.left: dict[str, float] = {}
        self.entered: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            try:
                found = up(lambda path: fetch(f"{self._url}{path}"))
            except OSError:
                continue
            now = time.monotonic()
            self.left.update(dict.fromkeys(self._pool - found, now))
            self.entered.update(dict.fromkeys(found - self._pool, now))
            self._pool = found

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def strike(fleet: Fleet, number: signal.Signals, processes: Iterable[int]) -> dict[str, float]:
    """Send a signal to each at a chance moment; return when each of its backends got it."""
    struck: dict[str, float] = {}
    for process in processes:
        time.sleep(random.uniform(0.2, 0.8))
        fleet.signal(process, number)
        struck.update(dict.fromkeys(fleet.ids(process), time.monotonic()))
    return struck


def told(what: str, struck: dict[str, float], seen: dict[str, float]) -> None:
    wait(lambda: all(seen.get(id, 0.0) > when for id, when in struck.items()), what)
    seconds = sorted(seen[id] - when for id, when in struck.items())
    print(f"| {what} | {median(seconds):.1f} s | {seconds[0]:.1f} to {seconds[-1]:.1f} s |", flush=True)


def measure() -> None:
    balancer = BalancerProcess(free_port(), **FIGURES).start()
    watch = Watch(balancer.url)
    fleet = Fleet([balancer.url], "b")
    began = time.monotonic()
    fleet.start(BACKENDS, 1, interval=30.0)
    fleet.start(5, 1, interval=30.0)  # who keep the pool from being silent as a whole
    started = dict.fromkeys(fleet.ids(), began)
    told("first announcement: into the pool (with the start of Python)", started, watch.entered)
    time.sleep(6)
    half = range(5)
    told("SIGSTOP: out", strike(fleet, signal.SIGSTOP, half), watch.left)
    told("SIGCONT: back", strike(fleet, signal.SIGCONT, half), watch.entered)
    time.sleep(6)
    told("SIGTERM: out (ready=false)", strike(fleet, signal.SIGTERM, half), watch.left)
    killed = strike(fleet, signal.SIGKILL, range(5, BACKENDS))
    told("SIGKILL: out", killed, watch.left)
    balancer.kill()
    time.sleep(1)
    now = time.monotonic()
    watch.close()
    balancer.start()
    watch = Watch(balancer.url)
    left = fleet.ids(*range(BACKENDS, BACKENDS + 5))
    told("balancer killed and started: backends back", dict.fromkeys(left, now), watch.entered)
    watch.close()
    fleet.close()
    balancer.kill()


def flood(count: int = 5_000, clients: int = 16) -> None:
    """A fleet that registers at once, over HTTP."""
    balancer = BalancerProcess(free_port(), RKMETRICS_REGISTRATION_RATE="1000000", **FIGURES).start()

    def register(number: int) -> None:
        connection = HTTPConnection("127.0.0.1", balancer.port)
        for each in range(number, 1_000, clients):
            body = f'{{"id":"b-{each}","address":"127.0.0.1:{20_000 + each}","metrics_port":{20_000 + each}}}'
            connection.request("POST", "/register", body, {"Authorization": f"Bearer {TOKEN}"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status in (200, 201), answer.status
        connection.close()

    began = time.monotonic()
    done = 0
    while done < count:
        threads = [threading.Thread(target=register, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done += 1_000
    print(f"{done} registrations over HTTP in {time.monotonic() - began:.2f} s, with their clients on the same cores")
    balancer.kill()


if __name__ == "__main__":
    flood()
    if "flood" not in sys.argv:
        print("| what happens | median | from, to |\n| --- | --- | --- |")
        measure()
