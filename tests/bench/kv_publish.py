"""What publishing costs who publishes, and what goes over NATS in a second, beside nats-py's own publish.

The server is a real one on loopback, in a process of its own, so its CPU time is nobody's here. Each subject sends the
same bytes to the same subject and ends with a round trip, so that all of it is at the server. Ours begins at the
publisher's call: it encodes, hands over to the link's thread, and keeps what the publish rule needs.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import rkmetrics as rk
from rkmetrics.catalogue.kv import KvPublishing, Nats
from rkmetrics.kv.base import ForwardPassMetrics, KvStats, KvUpdate, WorkerKey, WorkerStats, checked
from rkmetrics.kv.events import Removed, encode_event
from rkmetrics.kv.plane import KvPlane
from rkmetrics.kv.wire import ENCODERS, decode_metrics
from tests.bench.base import Case, Scale, Skipped, interleave
from tests.bench.peers import peer, present
from tests.bench.updates import OURS
from tests.services.nats_server import NatsServer

__all__ = ["CASES"]

RAW = "nats-py, publish"
RAW_ACKED = "nats-py, publish_async, 4,000 pending"
RAW_ONE = "nats-py, js.publish one at a time"
WORKERS = 2_000  # whose states change at once: none of them may take another's place
BURST = 4_000  # events; a queue of the default size holds them
_spaces = count()


def _metrics(active: int) -> ForwardPassMetrics:
    return ForwardPassMetrics(
        WorkerStats(data_parallel_rank=0, request_active_slots=12, request_total_slots=64, num_requests_waiting=3),
        KvStats(
            kv_active_blocks=active,
            kv_total_blocks=100_000,
            gpu_cache_usage_perc=0.575,
            gpu_prefix_cache_hit_rate=0.42,
        ),
    )


# --- one call ---------------------------------------------------------------------------------------------------------


def _per_call(run: Callable[[int], object], times: int) -> Callable[[], float]:
    """Nanoseconds of CPU of this thread for one call."""

    def measure() -> float:
        began = time.thread_time_ns()
        for number in range(times):
            run(number)
        return (time.thread_time_ns() - began) / times

    return measure


def _publisher() -> Callable[[int], object]:
    registry = rk.Registry(rk.Settings(request_plane="http"), builtin=False)
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=7)
    given = [_metrics(active) for active in range(64)]
    return lambda number: publisher.publish(given[number % 64])


def _prometheus() -> Callable[[int], object]:
    """The gauges of prometheus_client and the message as its users would write it."""
    client, json = peer("prometheus_client"), peer("json")
    registry = client.CollectorRegistry()
    names = ("active", "blocks", "usage", "hits", "slots", "all_slots", "waiting")
    gauges = [client.Gauge(f"kv_{name}", name, ["actor_name"], registry=registry).labels("llm") for name in names]

    def publish(number: int) -> object:
        numbers = (number, 100_000, 0.575, 0.42, 12, 64, 3)
        for gauge, value in zip(gauges, numbers, strict=True):
            gauge.set(value)
        worker = {"data_parallel_rank": 0, "request_active_slots": 12, "request_total_slots": 64}
        cache = {"kv_active_blocks": number, "kv_total_blocks": 100_000, "gpu_cache_usage_perc": 0.575}
        data = {"worker_stats": worker, "kv_stats": cache, "spec_decode_stats": None}
        return json.dumps({"worker_id": 7, "data": data})

    return publish


def _codec() -> dict[str, Callable[[int], object]]:
    update = KvUpdate(WorkerKey(9041998779776340742, 0), *checked(_metrics(100)), 1)
    found: dict[str, Callable[[int], object]] = {"check and encode once": lambda _: checked(update.metrics)}
    for wire, encode in ENCODERS.items():
        payload = encode(update, 1, 1_700_000_000_000)
        found[f"message of {wire}"] = lambda _, encode=encode: encode(update, 1, 1_700_000_000_000)  # type: ignore[misc]
        found[f"read a message of {wire}"] = lambda _, payload=payload: decode_metrics(payload)  # type: ignore[misc]
    return found


def measure_publish(scale: Scale) -> Mapping[str, Sequence[float]]:
    made = present({OURS: _publisher, "prometheus_client's gauges and json.dumps": _prometheus})
    subjects = {name: _per_call(run, scale.updates) for name, run in (made | _codec()).items()}
    return interleave(scale.rounds, subjects)


# --- over NATS --------------------------------------------------------------------------------------------------------


@contextmanager
def _server() -> Iterator[NatsServer]:
    binary = shutil.which("nats-server")
    if binary is None:
        raise Skipped("nats-server is not installed")
    peer("nats")
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(binary, Path(folder)).start()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def _plane(server: NatsServer) -> Iterator[rk.Registry]:
    """A registry whose link stands."""
    settings = rk.Settings(request_plane="tcp", nats_server=server.url, namespace=f"bench{next(_spaces)}", wire="0.7")
    registry = rk.Registry(settings, builtin=False)
    KvPlane.of(registry).metrics_sink(1)
    while not registry.bind(Nats).connections.value:
        time.sleep(0.001)
    yield registry
    KvPlane.of(registry).close()


def _wait(cell: Any, value: float) -> None:
    while cell.value < value:
        time.sleep(0.002)


def _us_each(run: Callable[[], object], messages: int) -> float:
    """Microseconds of CPU of the process for one message."""
    began = time.process_time()
    run()
    return (time.process_time() - began) / messages * 1e6


def _raw(server: NatsServer, work: Callable[[Any], Awaitable[object]], messages: int) -> float:
    """The same for nats-py, in its own loop."""
    nats = peer("nats")

    async def run() -> float:
        client = await nats.connect(server.url)
        began = time.process_time()
        await work(client)
        took = time.process_time() - began
        await client.close()
        return took / messages * 1e6

    return asyncio.run(run())


def measure_metrics(scale: Scale) -> Mapping[str, Sequence[float]]:
    """CPU of one message: all workers publish new states, some times over."""
    turns = max(1, scale.updates // 5_000)
    messages = WORKERS * turns

    with _server() as server, _plane(server) as registry:
        publishers = [
            rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=2**62 + n) for n in range(WORKERS)
        ]
        sent = registry.bind(KvPublishing).messages["sent"]
        states = count(1)
        sink = KvPlane.of(registry)._metrics
        assert sink is not None
        updates = [
            [KvUpdate(WorkerKey(p.worker_id), *checked(_metrics(turn)), turn) for p in publishers] for turn in range(64)
        ]

        def publish() -> None:
            for _ in range(turns):
                before, given = sent.value, _metrics(next(states))
                for publisher in publishers:
                    publisher.publish(given)
                _wait(sent, before + WORKERS)

        def offer() -> None:
            for _ in range(turns):
                before = sent.value
                for update in updates[next(states) % 64]:
                    sink.offer(update)
                _wait(sent, before + WORKERS)

        payload = ENCODERS["0.7"](updates[0][0], 0, 0)
        subject = f"namespace.{registry.settings.namespace}.kv_metrics"

        async def raw(client: Any) -> None:
            for _ in range(turns):
                for _ in range(WORKERS):
                    await client.publish(subject, payload)
                await client.flush()

        return interleave(
            scale.rounds,
            {
                OURS: lambda: _us_each(offer, messages),
                f"{OURS}, from publish() on": lambda: _us_each(publish, messages),
                RAW: lambda: _raw(server, raw, messages),
            },
        )


def measure_events(scale: Scale) -> Mapping[str, Sequence[float]]:
    """CPU of one acknowledged event."""
    burst = max(10, min(BURST, scale.updates // 5))

    with _server() as server, _plane(server) as registry:
        publisher = rk.kv.KvEventPublisher(registry, worker_id=2**62, block_size=16)
        sent = registry.bind(KvPublishing).events["sent"]
        publisher.publish_removed([0])
        _wait(sent, 1)
        event = rk.kv.RouterEvent(2**62, rk.kv.KvEvent(1, Removed((2**63 + 1,))))
        payload = encode_event(event, "0.7")
        stream = f"namespace-{registry.settings.namespace}-component-backend-kv-events"

        def ours() -> None:
            before = sent.value
            for number in range(burst):
                publisher.publish_removed([2**63 + number])
            _wait(sent, before + burst)

        async def acked(client: Any) -> None:
            js = client.jetstream(publish_async_max_pending=4_000)
            acks = [
                await js.publish_async(f"{stream}.queue", payload, headers={"Nats-Msg-Id": f"{time.time_ns()}{number}"})
                for number in range(burst)
            ]
            await asyncio.gather(*acks)

        async def one_by_one(client: Any) -> None:
            js = client.jetstream()
            for _ in range(burst // 4):
                await js.publish(f"{stream}.queue", payload)

        return interleave(
            scale.rounds,
            {
                OURS: lambda: _us_each(ours, burst),
                RAW_ACKED: lambda: _raw(server, acked, burst),
                RAW_ONE: lambda: _raw(server, one_by_one, burst // 4),
            },
        )


CASES = (
    Case("kv publish", "publishing a worker's state, and reading one", "ns", measure_publish, note="one call"),
    Case("kv nats metrics", "a KV metrics message over NATS", "us", measure_metrics, note="CPU"),
    Case("kv nats events", "an acknowledged KV event over NATS", "us", measure_events, note="CPU"),
)
