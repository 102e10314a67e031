"""A fleet that is checked: 5,000 backends each 5 s on one core, what that costs, and how old the news is.

The backends are one small server in a process of its own, on an address of 127.0.0.0/8 for each, so its CPU time is
nobody's here. Their vitals are those of `rk.serve()`. A peer asks in the plain way: a task for each backend, which
gets, decodes and sleeps. What needs no socket is measured without one: registrations, choices, and a table of 100,000.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import rkmetrics as rk
from rkmetrics.asgi.auth import Gate
from rkmetrics.asgi.base import Request
from rkmetrics.asgi.routes import Surface
from rkmetrics.catalogue.discovery import CheckOutcome
from rkmetrics.discovery.balancer import Balancer
from rkmetrics.discovery.base import Backend
from rkmetrics.discovery.directory import Directory, Rules
from rkmetrics.discovery.health import HealthChecker
from rkmetrics.discovery.routes import routes
from rkmetrics.discovery.selection import Strategy
from rkmetrics.discovery.verdict import Vitals
from rkmetrics.settings import Secret, Settings
from tests.bench.base import Case, Scale, interleave
from tests.bench.peers import peer, present
from tests.bench.updates import OURS

__all__ = ["CASES"]

ROOT = Path(__file__).resolve().parents[2]
BACKENDS, LARGE = 5_000, 100_000
INTERVAL_SECONDS, TIMEOUT_SECONDS = 5.0, 2.0
SAMPLES = 20
CALLER = "127.0.0.1"

# --- the backends -----------------------------------------------------------------------------------------------------

_VITALS = json.dumps(
    {
        "ready": True,
        "requests_in_progress": 42,
        "cpu_usage": 35.2,
        "memory_usage": 67.8,
        "gpu_usage": 0.0,
        "failed_responses": 15,
        "connected_peers": 3,
        "backoff_requests": 0,
        "uptime_seconds": 86400,
        "version": "0.1.0",
    },
    separators=(",", ":"),
).encode()
ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\ncache-control: no-store\r\n"
    b"vary: Accept, Accept-Encoding, Authorization\r\nx-content-type-options: nosniff\r\n"
    b"date: Tue, 15 Nov 1994 08:12:31 GMT\r\nconnection: keep-alive\r\n\r\n" % len(_VITALS)
) + _VITALS


class _Backend(asyncio.Protocol):
    """Answers each request; requests come whole, as they are small and ours."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(ANSWER)


async def serve() -> None:
    """Serve until the pipe from the parent closes."""
    _raise_file_limit()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Backend, "0.0.0.0", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def _backends() -> Generator[int]:
    """A process of backends; yields its port."""
    command = [sys.executable, "-m", "tests.bench.discovery"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()


def _raise_file_limit() -> int:
    from resource import RLIMIT_NOFILE, getrlimit, setrlimit

    _, hard = getrlimit(RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        setrlimit(RLIMIT_NOFILE, (hard, hard))
    return getrlimit(RLIMIT_NOFILE)[0]


def _host(number: int) -> str:
    return f"127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}"


def _backend(number: int, port: int = 9090) -> Backend:
    return Backend.checked(f"backend-{number}", f"{_host(number)}:{port}", port)


# --- checks -----------------------------------------------------------------------------------------------------------


class _Round(NamedTuple):
    """One subject in one round. staleness_seconds: the ages of all news, at several times."""

    cpu_seconds: float
    wall_seconds: float
    checks: int
    staleness_seconds: Sequence[float]
    memory_bytes: float


Ages = Callable[[], list[float]]


class _Counted(HealthChecker):
    """Counts its checks."""

    checks = 0

    def record(self, *args: Any) -> None:
        self.checks += 1
        super().record(*args)


async def _ours(port: int, count: int, interval: float, kept: int) -> _Round:
    directory = Directory(Rules(limit=count, limit_per_caller=count))
    gc.collect()
    before = _resident()
    for number in range(count):
        directory.announce(_backend(number, port), CALLER)
    checker = _Counted(
        directory, interval_seconds=interval, timeout_seconds=TIMEOUT_SECONDS, kept=kept, places=max(64, count // 4)
    )

    def ages() -> list[float]:
        now = directory.clock()
        return [now - (entry.checked or 0.0) for entry in directory.entries()]

    async with checker:
        while len(directory.pool()) < count:  # noqa: ASYNC110 - what is waited for knows nothing of it
            await asyncio.sleep(0.05)
        found = await _watch(ages, lambda: checker.checks, interval)
    return found._replace(memory_bytes=(_resident() - before) / count)


async def _aiohttp(port: int, count: int, interval: float) -> _Round:
    module = peer("aiohttp")
    checked: dict[int, float] = {}
    done = [0]

    async def check(session: Any, number: int) -> None:
        await asyncio.sleep(interval * number / count)
        while True:
            began = time.monotonic()
            async with session.get(f"http://{_host(number)}:{port}/metrics") as response:
                assert json.loads(await response.read())["ready"] is True
            checked[number] = time.monotonic()
            done[0] += 1
            await asyncio.sleep(max(0.0, interval - (checked[number] - began)))

    def ages() -> list[float]:
        now = time.monotonic()
        return [now - when for when in checked.values()]

    gc.collect()
    before = _resident()
    timeout = module.ClientTimeout(total=TIMEOUT_SECONDS)
    async with module.ClientSession(
        connector=module.TCPConnector(limit=0, keepalive_timeout=60), timeout=timeout
    ) as session:
        tasks = [asyncio.create_task(check(session, number)) for number in range(count)]
        while len(checked) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        found = await _watch(ages, lambda: done[0], interval)
        memory = (_resident() - before) / count
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found._replace(memory_bytes=memory)


async def _watch(ages: Ages, checks: Callable[[], int], interval: float) -> _Round:
    """Let it settle for an interval, then look at two of them."""
    await asyncio.sleep(interval)
    gc.collect()
    first, cpu, wall = checks(), time.process_time(), time.perf_counter()
    stale: list[float] = []
    for _ in range(SAMPLES):
        await asyncio.sleep(2 * interval / SAMPLES)
        stale += ages()
    return _Round(time.process_time() - cpu, time.perf_counter() - wall, checks() - first, stale, 0.0)


def _resident() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss)


Subject = Callable[[int, int, float], _Round]


def _subjects() -> dict[str, Subject]:
    def run(check: Callable[..., Awaitable[_Round]], factory: Any, kept: tuple[int, ...], *args: Any) -> _Round:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(check(*args, *kept))  # type: ignore[arg-type]

    def aiohttp() -> Subject:
        peer("aiohttp")
        return partial(run, _aiohttp, None, ())

    return present(
        {
            OURS: lambda: partial(run, _ours, None, (1 << 20,)),
            f"{OURS}, uvloop": lambda: partial(run, _ours, peer("uvloop").new_event_loop, (1 << 20,)),
            f"{OURS}, a connection for each check": lambda: partial(run, _ours, None, (0,)),
            "aiohttp": aiohttp,
        }
    )


def _fleet(scale: Scale) -> tuple[int, float]:
    """How many backends, and at which interval."""
    tiny = scale.scrapes < 10
    return min(10 if tiny else BACKENDS, _raise_file_limit() - 500), 0.1 if tiny else INTERVAL_SECONDS


def _memory(scale: Scale) -> Mapping[str, Sequence[float]]:
    """Of the first subject only: what a second one needs is there already."""
    with _backends() as port:
        return {OURS: [_subjects()[OURS](port, *_fleet(scale)).memory_bytes / 1024]}


@cache
def _rounds(scale: Scale) -> Mapping[str, _Round]:
    """One of each subject, half a minute long, for all cases that look at it."""
    found: dict[str, _Round] = {}
    with _backends() as port:
        for name, measure in _subjects().items():
            gc.collect()
            found[name] = measure(port, *_fleet(scale))
    return found


def _figures(figures: Mapping[str, Callable[[_Round], float]], scale: Scale) -> Mapping[str, Sequence[float]]:
    rounds = _rounds(scale).items()
    return {name + what: [figure(done)] for name, done in rounds for what, figure in figures.items()}


def _quantile(part: float, values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


# --- without sockets --------------------------------------------------------------------------------------------------


def _timed(work: Callable[[], object], count: int) -> float:
    """Microseconds of CPU for each of `count`."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / count * 1e6


def _registrations(scale: Scale) -> Mapping[str, Sequence[float]]:
    """POST /register of a whole fleet that starts at once, through route, guard, policy and table; then all again."""
    count = min(BACKENDS, scale.updates)
    settings = Settings(registration_token=Secret("t"), allowed_networks=("127.0.0.0/8",), registration_rate=1_000_000)
    requests = [
        Request("POST", "/register", b"", ((b"authorization", b"Bearer t"),), _backend(number).encode(), _host(number))
        for number in range(count)
    ]
    found: dict[str, list[float]] = {"new": [], "again": []}
    for _ in range(scale.rounds):
        registry = rk.Registry(settings, builtin=False)
        surface = Surface(registry, more=routes(Balancer(registry), Gate.for_registrations(settings)))
        for name in found:
            found[name].append(_timed(lambda surface=surface: _all(surface, requests), count))  # type: ignore[misc]
    return found


def _all(surface: Surface, requests: Sequence[Request]) -> None:
    for request in requests:
        surface.begin(request)
        surface.respond(surface.answer(request))


def _table(count: int) -> Directory:
    directory = Directory(Rules(limit=count, limit_per_caller=count), seed=1)
    for number in range(count):
        directory.announce(_backend(number), CALLER)
    vitals = Vitals(ready=True, requests_in_progress=3)
    for entry in directory.entries():
        directory.record(entry, CheckOutcome.READY, vitals)
    return directory


def _choices(scale: Scale) -> Mapping[str, Sequence[float]]:
    small, large = _table(10), _table(min(LARGE, scale.updates * 5))

    def picks(directory: Directory, strategy: Strategy) -> float:
        return _timed(lambda: [directory.pick(strategy) for _ in range(scale.updates)], scale.updates) * 1e3

    subjects = {
        f"{strategy.value} of {len(directory):,}": partial(picks, directory, strategy)
        for strategy in Strategy
        for directory in (small, large)
    }
    return interleave(scale.rounds, subjects)


def _large(scale: Scale) -> Mapping[str, Sequence[float]]:
    """A second of each of four balancers that check 100,000 backends: what their tables cost, with a clock of ours."""
    count = min(LARGE, scale.updates * 5)
    gc.collect()
    before = _resident()
    directory = _table(count)
    memory = (_resident() - before) / count / 1024
    entries = directory.entries()[: max(1, int(count / INTERVAL_SECONDS))]
    vitals = Vitals(ready=True, requests_in_progress=3)

    def checks(outcome: CheckOutcome) -> float:
        def work() -> None:
            for entry in entries:
                directory.record(entry, outcome, vitals)

        return _timed(work, 1) / 1e3

    return {
        "records of a second, all ready (ms)": [checks(CheckOutcome.READY) for _ in range(scale.rounds)],
        "the whole pool, sorted (ms)": [_timed(directory.pool, 1) / 1e3 for _ in range(3)],
        "a fifth falls silent at once, two misses (ms)": [checks(CheckOutcome.TIMEOUT) + checks(CheckOutcome.TIMEOUT)],
        "memory of a backend (KiB)": [memory],
    }


CASES = (
    Case(
        "discovery checks",
        "check of one of 5,000 backends each 5 s",
        "us",
        partial(_figures, {"": lambda done: done.cpu_seconds / max(1, done.checks) * 1e6}),
        note="CPU time of the balancer's process",
    ),
    Case(
        "discovery load",
        "the same: part of one core",
        "%",
        partial(_figures, {"": lambda done: done.cpu_seconds / done.wall_seconds * 100}),
    ),
    Case(
        "discovery staleness",
        "the same: age of what is known of a backend",
        "s",
        partial(
            _figures,
            {
                ", median": lambda done: _quantile(0.5, done.staleness_seconds),
                ", p99": lambda done: _quantile(0.99, done.staleness_seconds),
                ", oldest": lambda done: max(done.staleness_seconds),
            },
        ),
        note="wall clock",
    ),
    Case(
        "discovery memory",
        "the same: memory of one backend with its connection",
        "KiB",
        _memory,
        environment={"PYTHONHASHSEED": "0"},
    ),
    Case(
        "discovery registrations",
        "POST /register of a fleet that starts at once, and its next announcement",
        "us",
        _registrations,
        note="route, guard, policy and table, without the socket",
    ),
    Case("discovery choice", "choosing a backend", "ns", _choices),
    Case(
        "discovery at 100,000",
        "the table of 100,000 backends at one balancer",
        "",
        _large,
        compared=False,
        note="without sockets; each balancer checks all backends, so several of them share nothing",
        environment={"PYTHONHASHSEED": "0"},
    ),
)


def main(argv: Sequence[str]) -> None:
    """Without arguments serve backends; with "measure", measure the fleet once and print all of it."""
    if not argv:
        asyncio.run(serve())
        return
    count, interval = int(argv[1]) if len(argv) > 1 else BACKENDS, INTERVAL_SECONDS
    _raise_file_limit()
    with _backends() as port:
        for name, measure in _subjects().items():
            done = measure(port, count, interval)
            print(
                f"{name}: {done.cpu_seconds / max(1, done.checks) * 1e6:.0f} us a check, "
                f"{done.cpu_seconds / done.wall_seconds * 100:.1f} % of a core, "
                f"age mean {fmean(done.staleness_seconds):.2f} p99 {_quantile(0.99, done.staleness_seconds):.2f} "
                f"max {max(done.staleness_seconds):.2f} s, {done.memory_bytes / 1024:.1f} KiB each"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
