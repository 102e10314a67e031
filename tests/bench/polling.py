"""A fleet that is polled: a thousand workers each 100 ms, what a poll costs, and how late its answer is.

The workers are one small server in a process of its own, so its CPU time is nobody's here; each has a connection, which
stays. Half of what a fleet does is nothing: "unchanged" workers have published nothing since the last poll (304), and
"new state" ones publish before each (200, a page of one worker). Peers ask in the plain way, a task for each worker,
and always get and decode the whole page.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rkmetrics.kv.aggregator import KvMetricsAggregator
from rkmetrics.kv.base import ForwardPassMetrics, KvStats, WorkerStats, checked
from rkmetrics.kv.page import read_document
from rkmetrics.kv.pull import KvMetricsPoller
from tests.bench.base import Case, Scale
from tests.bench.peers import peer, present
from tests.bench.updates import OURS

__all__ = ["CASES"]

INTERVAL_SECONDS = 0.1
SETTLE_SECONDS = 1.0
WORKERS_PER_NAME = 5  # a page has 200 actor names, a fleet 1,000 workers
ROOT = Path(__file__).resolve().parents[2]

# --- the workers ------------------------------------------------------------------------------------------------------

_METRICS = ForwardPassMetrics(
    WorkerStats(request_active_slots=12, request_total_slots=64, num_requests_waiting=3),
    KvStats(kv_active_blocks=4711, kv_total_blocks=8192, gpu_cache_usage_perc=0.575, gpu_prefix_cache_hit_rate=0.42),
)
PAGE = (
    b'{"runtime":"rkmetrics","incarnation":"0123456789abcdef","sequence":%d,"workers":[{"worker_id":%d,"dp_rank":0,'
    b'"sequence":%d,"age_seconds":0.0125,"data":' + checked(_METRICS)[1].replace(b"%", b"%%") + b"}]}"
)
# As rk.serve() says it.
COMMON = (
    b"cache-control: no-store\r\nvary: Accept, Accept-Encoding, Authorization\r\nx-content-type-options: nosniff\r\n"
    b'etag: "0123456789abcdef-%d"\r\ndate: Tue, 15 Nov 1994 08:12:31 GMT\r\nconnection: keep-alive\r\n\r\n'
)
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" + COMMON
NOT_MODIFIED = b"HTTP/1.1 304 Not Modified\r\n" + COMMON


class _Worker(asyncio.Protocol):
    """Answers GET /<kind>/<number>/kv_metrics; requests come whole, as they are small and ours."""

    sequence = 1

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        _, kind, number, _ = data.split(b"/", 3)
        if kind == b"unchanged" and b"if-none-match" in data:
            self.transport.write(NOT_MODIFIED % self.sequence)
            return
        self.sequence += kind == b"new"
        body = PAGE % (self.sequence, int(number), self.sequence)
        self.transport.write(OK % (len(body), self.sequence) + body)


async def serve() -> None:
    """Serve until the pipe from the parent closes."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Worker, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def _workers() -> Iterator[int]:
    """A process of workers; yields its port."""
    command = [sys.executable, "-m", "tests.bench.polling"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()


# --- who polls --------------------------------------------------------------------------------------------------------


class _Poller(KvMetricsPoller):
    """Keeps how long each answer took."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seconds: list[float] = []

    def observe(self, seconds: float) -> None:
        self.seconds.append(seconds)


Polling = Callable[[Sequence[str]], Any]  # an async context manager that gives the list of seconds


@asynccontextmanager
async def _ours(urls: Sequence[str]) -> AsyncIterator[list[float]]:
    aggregator = KvMetricsAggregator()
    async with _Poller(urls, aggregator, interval_seconds=INTERVAL_SECONDS, timeout_seconds=5.0) as poller:
        yield poller.seconds
        assert len(aggregator) == len(urls)


@asynccontextmanager
async def _plainly(get: Callable[[str], Awaitable[bytes]], urls: Sequence[str]) -> AsyncIterator[list[float]]:
    """A task for each worker: get, decode, sleep for what is left of the interval."""
    seconds: list[float] = []

    async def poll(url: str, delay: float) -> None:
        await asyncio.sleep(delay)
        while True:
            began = time.perf_counter()
            read_document(await get(url))
            seconds.append(time.perf_counter() - began)
            await asyncio.sleep(max(0.0, INTERVAL_SECONDS - seconds[-1]))

    tasks = [asyncio.create_task(poll(url, INTERVAL_SECONDS * i / len(urls))) for i, url in enumerate(urls)]
    yield seconds
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _httpx(module: Any) -> Polling:
    @asynccontextmanager
    async def polling(urls: Sequence[str]) -> AsyncIterator[list[float]]:
        limits = module.Limits(max_connections=None, max_keepalive_connections=None)
        async with module.AsyncClient(limits=limits, timeout=30.0, trust_env=False) as client:

            async def get(url: str) -> bytes:
                body: bytes = (await client.get(url)).content
                return body

            async with _plainly(get, urls) as seconds:
                yield seconds

    return polling


def _aiohttp(module: Any) -> Polling:
    @asynccontextmanager
    async def polling(urls: Sequence[str]) -> AsyncIterator[list[float]]:
        async with module.ClientSession(connector=module.TCPConnector(limit=0)) as session:

            async def get(url: str) -> bytes:
                async with session.get(url) as response:
                    body: bytes = await response.read()
                    return body

            async with _plainly(get, urls) as seconds:
                yield seconds

    return polling


# --- the measurement --------------------------------------------------------------------------------------------------


class _Round(NamedTuple):
    """One subject in one round. cpu_seconds: of this process; seconds: from each poll to its answer."""

    cpu_seconds: float
    wall_seconds: float
    seconds: Sequence[float]


async def _measure(polling: Polling, urls: Sequence[str], settle: float, duration: float) -> _Round:
    async with polling(urls) as seconds:
        await asyncio.sleep(settle)
        seconds.clear()
        cpu, wall = time.process_time(), time.perf_counter()
        await asyncio.sleep(duration)
        assert seconds, "not one poll was answered"
        return _Round(time.process_time() - cpu, time.perf_counter() - wall, list(seconds))


def _subjects(port: int, count: int) -> dict[str, Callable[[float, float], _Round]]:
    fleets = {
        kind: [f"http://127.0.0.1:{port}/{kind}/{number}/kv_metrics" for number in range(count)]
        for kind in ("unchanged", "new")
    }

    def run(polling: Polling, kind: str, factory: Any, settle: float, duration: float) -> _Round:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(_measure(polling, fleets[kind], settle, duration))

    def subject(polling: Polling, kind: str, factory: Any = None) -> Callable[[float, float], _Round]:
        return partial(run, polling, kind, factory)

    return present(
        {
            f"{OURS}, unchanged": lambda: subject(_ours, "unchanged"),
            f"{OURS}, new state": lambda: subject(_ours, "new"),
            f"{OURS}, unchanged, uvloop": lambda: subject(_ours, "unchanged", peer("uvloop").new_event_loop),
            f"{OURS}, new state, uvloop": lambda: subject(_ours, "new", peer("uvloop").new_event_loop),
            "aiohttp": lambda: subject(_aiohttp(peer("aiohttp")), "new"),
            "httpx2": lambda: subject(_httpx(peer("httpx2")), "new"),
        }
    )


def _rounds(scale: Scale) -> Iterator[tuple[str, _Round]]:
    """All subjects, round after round: those of a tiny scale have ten workers, and a tenth of a second."""
    tiny = scale.scrapes < 10
    settle, duration = (0.02, INTERVAL_SECONDS) if tiny else (SETTLE_SECONDS, scale.scrapes * INTERVAL_SECONDS)
    with _workers() as port:
        subjects = _subjects(port, scale.names * WORKERS_PER_NAME)
        for _ in range(1 if tiny else scale.rounds // 5):
            for name, measure in subjects.items():
                gc.collect()
                yield name, measure(settle, duration)


def _figures(figures: Mapping[str, Callable[[_Round], float]], scale: Scale) -> Mapping[str, Sequence[float]]:
    found: dict[str, list[float]] = {}
    for name, done in _rounds(scale):
        for what, figure in figures.items():
            found.setdefault(name + what, []).append(figure(done))
    return found


def _quantile(part: float, done: _Round) -> float:
    """Milliseconds from a poll to its answer."""
    ordered = sorted(done.seconds)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1e3


CASES = (
    Case(
        "polling",
        "poll of one of 1,000 workers each 100 ms",
        "us",
        partial(_figures, {"": lambda done: done.cpu_seconds / len(done.seconds) * 1e6}),
        note="CPU time of the poller's process; peers always get the whole page, in a task for each worker",
    ),
    Case(
        "polling latency",
        "the same: time from a poll to its answer",
        "ms",
        partial(_figures, {", median": partial(_quantile, 0.5), ", p99": partial(_quantile, 0.99)}),
        note="wall clock",
    ),
    Case(
        "polling rate",
        "the same: polls in a second, of 10,000 that are due",
        "1/s",
        partial(_figures, {"": lambda done: len(done.seconds) / done.wall_seconds}),
        note="wall clock; more is better",
    ),
)


if __name__ == "__main__":
    asyncio.run(serve())
