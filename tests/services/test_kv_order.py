"""Events whose answers, or who themselves, are lost; and what publishers leave behind. A real nats-server, where a
stream of ours answers as JetStream does, but for what it is told to do wrong."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.kv.events import stream_name
from rkmetrics.kv.plane import KvPlane
from tests.services.kv import (
    LINES,
    SCRIPT,
    MakeNats,
    Registries,
    counted,
    link,
    metrics,
    nats_lines,
    run,
    sent,
    space,
    tap,
    until,
)
from tests.services.nats_server import NatsServer

pytest.importorskip("nats", reason="the client of NATS is not installed: pip install 'rkmetrics[nats]'")

#: What is done with an event, by its id and how often it has come: "keep", "lose", "refuse", or keep and say "nothing".
Decide = Callable[[int, int], str]
REFUSAL = {"error": {"code": 500, "err_code": 10047, "description": "insufficient storage resources available"}}


class Stream:
    """What JetStream would hold, and how often each event came."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self.ids: dict[str, int] = {}
        self.kept: list[int] = []
        self.came: dict[int, int] = {}

    async def info(self, message: Any) -> None:
        await message.respond(json.dumps({"created": "once", "state": {"last_seq": len(self.kept)}}).encode())

    async def take(self, message: Any) -> None:
        event_id, id = json.loads(message.data)["event"]["event_id"], message.headers["Nats-Msg-Id"]
        self.came[event_id] = self.came.get(event_id, 0) + 1
        what = self._decide(event_id, self.came[event_id])
        if what == "refuse":
            await message.respond(json.dumps(REFUSAL).encode())
        elif what != "lose":
            if id not in self.ids:
                self.kept.append(event_id)
                self.ids[id] = len(self.kept)
            if what == "keep":
                await message.respond(json.dumps({"stream": "s", "seq": self.ids[id]}).encode())


@asynccontextmanager
async def streaming(server: NatsServer, registry: rk.Registry, decide: Decide) -> AsyncGenerator[Stream]:
    name, made = stream_name(space(registry), "backend"), Stream(decide)
    async with tap(server) as client:
        await client.client.subscribe(f"$JS.API.STREAM.INFO.{name}", cb=made.info)
        await client.client.subscribe(f"{name}.*", cb=made.take)
        await client.client.flush()
        yield made


@pytest.fixture
def server(make_nats: MakeNats) -> NatsServer:
    return make_nats(jetstream=False).start()


# --- lost on the way --------------------------------------------------------------------------------------------------


async def test_a_lost_answer_is_missed_although_the_worker_never_rests(
    server: NatsServer, registries: Registries
) -> None:
    registry = registries(server)
    async with streaming(server, registry, lambda event_id, time: "nothing" if event_id + time == 1 else "keep") as got:
        events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
        number = 0
        async with asyncio.timeout(30):  # for bugs only: three seconds, and a moment
            while not sent(registry):
                events.publish_removed([number])
                number += 1
                await asyncio.sleep(0.02)
        await until(lambda: sent(registry) == number)
        assert got.kept == list(range(number))
        assert got.came[0] == 2


async def test_an_event_that_is_lost_brings_those_after_it_into_order_again(
    server: NatsServer, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    registry = registries(server)
    async with streaming(server, registry, lambda event_id, time: "lose" if event_id + time == 1 else "keep") as got:
        events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
        for number in range(5):
            events.publish_removed([number])
        await until(lambda: sent(registry) == 5)
    assert got.kept == [1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert len(nats_lines(caplog)) <= LINES


async def test_a_refusal_is_not_forgotten_with_the_connection(server: NatsServer, registries: Registries) -> None:
    async with link(server) as (proxy, port):
        registry = registries(server, nats_server=f"nats://127.0.0.1:{port}")
        refused = asyncio.Event()

        def decide(event_id: int, time: int) -> str:
            if event_id + time > 1:
                return "keep"
            refused.set()
            return "refuse"

        async with streaming(server, registry, decide) as got:
            events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
            for number in range(5):
                events.publish_removed([number])
            await refused.wait()
            proxy.drop()
            await until(lambda: sent(registry) == 5)
        KvPlane.of(registry).close()
    assert got.kept[-5:] == list(range(5))


async def test_a_stream_at_its_limit_is_not_said_each_time_that_it_takes_one(
    server: NatsServer, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    registry = registries(server)
    async with streaming(server, registry, lambda _, time: "keep" if time % 2 == 0 else "refuse"):
        events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
        for number in range(20):
            events.publish_removed([number])
            await until(lambda number=number: sent(registry) == number + 1)  # type: ignore[misc]
    assert 3 <= len(nats_lines(caplog)) <= LINES


# --- what is left behind ----------------------------------------------------------------------------------------------


async def test_a_publisher_that_ends_leaves_nothing_on_the_connection(
    server: NatsServer, registries: Registries
) -> None:
    """Also where its events cannot be sent."""
    registry = registries(server)
    rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)

    def subscriptions() -> int:
        return sum(int(each["subscriptions"]) for each in server.monitor("connz")["connections"])

    await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
    await until(lambda: subscriptions() == 9)  # those of the service protocol
    events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    events.publish_removed([1])
    await until(lambda: subscriptions() > 9)
    await asyncio.to_thread(events.close)
    await until(lambda: subscriptions() <= 10)  # and the one for all answers, nats-py's own
    events.publish_removed([2])
    assert counted(registry, "rkmetrics_kv_events_pending") == 0
    assert counted(registry, "rkmetrics_kv_events_total", outcome="dropped") == 2


async def test_a_publisher_may_end_after_its_plane(server: NatsServer, registries: Registries) -> None:
    registry = registries(server)
    events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
    await asyncio.to_thread(KvPlane.of(registry).close)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no coroutine that was never awaited
        events.close()
        gc.collect()


async def test_workers_that_come_and_go_while_nats_is_away_hold_no_memory(
    make_nats: MakeNats, registries: Registries
) -> None:
    registry = registries(make_nats())
    for worker_id in range(3_000):
        with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=worker_id) as publisher:
            publisher.publish(metrics(worker_id))
    assert counted(registry, "rkmetrics_kv_messages_total", outcome="dropped") == 2_000


THREADS = """
import json, sys, threading
import rkmetrics as rk
registry = rk.Registry(rk.Settings(request_plane="nats", nats_server=sys.argv[1], namespace="threads"), builtin=False)
barrier = threading.Barrier(8)
cache = rk.kv.KvStats(kv_active_blocks=1, kv_total_blocks=9, gpu_cache_usage_perc=0.0, gpu_prefix_cache_hit_rate=0.0)
stats = rk.kv.WorkerStats(request_active_slots=0, request_total_slots=1, num_requests_waiting=0)
publishers = []

def work(worker_id):
    barrier.wait()
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=worker_id)
    publisher.publish(rk.kv.ForwardPassMetrics(stats, cache))
    publishers.append(publisher)

threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(json.loads(registry.document("kv_metrics").render())["workers"]),
      sum(thread.name == "rkmetrics-nats" for thread in threading.enumerate()))
"""


async def test_workers_that_begin_at_once_in_threads_share_one_connection(server: NatsServer) -> None:
    async with tap(server, "namespace.threads.kv_metrics") as heard:
        out = await asyncio.to_thread(run, THREADS, server.url)
        assert (out.stdout.split(), out.stderr, out.returncode) == (["8", "1"], "", 0)
        said = await heard.settle(8)
    assert {json.loads(data)["worker_id"] for data in said} == set(range(8))
    assert server.traffic()[0] == 2  # the program, and this test


FORK = """
from rkmetrics.catalogue.kv import Nats
import time
while not registry.bind(Nats).connections.value:
    time.sleep(0.01)
pid = os.fork()
if pid == 0:
    assert registry.bind(Nats).connections.value == registry.bind(Nats).connections_wanted.value == 0
    mine = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=2)
    cache = rk.kv.KvStats(kv_active_blocks=1, kv_total_blocks=9, gpu_cache_usage_perc=0.0,
                          gpu_prefix_cache_hit_rate=0.0)
    mine.publish(rk.kv.ForwardPassMetrics(stats, cache))
    while not registry.bind(Nats).connections.value:
        time.sleep(0.01)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child_counts_and_answers_for_itself_only(server: NatsServer) -> None:
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT + FORK, server.url, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert running.stdout is not None
        for _ in range(2):
            assert await running.stdout.readline() == b"ready\n"
        async with tap(server) as client:
            answers = list[Any]()
            inbox = client.client.new_inbox()

            async def note(message: Any) -> None:
                answers.append(json.loads(message.data))

            await client.client.subscribe(inbox, cb=note)
            async with asyncio.timeout(60):  # for bugs only
                while len({answer["id"] for answer in answers}) < 2:
                    await client.client.publish("$SRV.STATS.exits_backend", b"", reply=inbox)
                    await asyncio.sleep(0.05)
    finally:
        os.killpg(running.pid, 9)
        await running.wait()
        transport: Any = running
        transport._transport.close()
    found = {answer["id"]: [endpoint["name"] for endpoint in answer["endpoints"]] for answer in answers}
    assert sorted(found.values()) == [["exits_backend-load_metrics-1"], ["exits_backend-load_metrics-2"]]


# --- who listens ------------------------------------------------------------------------------------------------------


async def test_an_index_is_not_caught_up_with_a_server_that_is_gone(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_nats().start()
    registry = registries(server)

    def instances() -> list[int]:
        raise ConnectionError("etcd is away")

    async with rk.kv.KvIndexer(registry, block_size=4, instances=instances) as indexer:
        await indexer.caught_up()
        server.stop()
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await indexer.caught_up()
        await asyncio.sleep(2.0)
    assert len([record for record in caplog.records if "instances of backend" in record.getMessage()]) == 1
