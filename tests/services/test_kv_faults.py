"""What goes wrong with NATS, done to a real server: the worker keeps serving, memory stays bounded, the log says each
change once, and all is well again by itself (reliability: F1 to F7, F20, R12, T22, T29)."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import time
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
    stream,
    tap,
    until,
)
from tests.services.nats_server import NatsServer

pytest.importorskip("nats", reason="the client of NATS is not installed: pip install 'rkmetrics[nats]'")


async def event_ids(server: NatsServer, registry: rk.Registry) -> list[int]:
    async with tap(server) as client:
        return [json.loads(message.data)["event"]["event_id"] for message in await stream(client.client, registry)]


# --- away -------------------------------------------------------------------------------------------------------------


async def test_a_server_that_comes_late_gets_what_is_true_then(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    server = make_nats()
    registry = registries(server)
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
    events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    for number in range(100):
        publisher.publish(metrics(number))
        events.publish_removed([number])
    await until(lambda: counted(registry, "rkmetrics_nats_connects_total", outcome="unreachable") > 2)
    assert counted(registry, "rkmetrics_kv_active_blocks") == 99  # who scrapes notices nothing
    assert counted(registry, "rkmetrics_kv_events_pending") == 100
    server.start()
    await until(lambda: sent(registry) == 100)
    assert await event_ids(server, registry) == list(range(100))
    await until(lambda: counted(registry, "rkmetrics_kv_messages_total", outcome="sent") == 1)
    said = nats_lines(caplog)
    assert len([line for line in said if "no connection to" in line]) == 1
    assert len([line for line in said if "connected to" in line]) == 1
    assert len(said) <= 3


async def test_killed_and_started_again_under_load_nothing_is_lost_nor_twice_there(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    server = make_nats().start()
    registry = registries(server)
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
    events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    number = 0

    async def work(seconds: float) -> None:
        nonlocal number
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(10):
                events.publish_removed([number])
                number += 1
            publisher.publish(metrics(number))
            await asyncio.sleep(0.01)

    for _ in range(3):
        await work(0.4)
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
        server.stop(signal.SIGKILL)
        await work(0.4)
        server.start()
    await work(0.4)
    await until(lambda: sent(registry) >= number)
    assert await event_ids(server, registry) == list(range(number))
    assert counted(registry, "rkmetrics_kv_events_total", outcome="dropped") == 0
    assert counted(registry, "rkmetrics_nats_disconnects_total") == 3
    assert len(nats_lines(caplog)) <= 3 * LINES
    async with tap(server, f"namespace.{space(registry)}.kv_metrics") as heard:
        publisher.publish(metrics(7))
        assert json.loads((await heard.settle(1))[-1])["active_decode_blocks"] == 7


async def test_a_frozen_server_is_noticed_and_left(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    server = make_nats().start()
    registry = registries(server)
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
    events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    publisher.publish(metrics(0))
    await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
    with server.frozen():
        for number in range(1_000):
            publisher.publish(metrics(number))
            events.publish_removed([number])
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 0)
    await until(lambda: sent(registry) == 1_000)
    assert await event_ids(server, registry) == list(range(1_000))
    assert len(nats_lines(caplog)) <= LINES


async def test_a_link_that_flaps_makes_no_storm_of_connections_nor_of_lines(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    server = make_nats().start()
    async with link(server) as (proxy, port):
        registry = registries(server, nats_server=f"nats://127.0.0.1:{port}")
        events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
        for number in range(25):
            events.publish_removed([number])
            await asyncio.sleep(0.2)
            proxy.drop()
        await until(lambda: sent(registry) == 25)
        found = await event_ids(server, registry)
        KvPlane.of(registry).close()
    assert found == list(range(25))
    assert counted(registry, "rkmetrics_nats_connects_total") <= 2 * 25
    assert len(nats_lines(caplog)) <= LINES


async def test_wrong_credentials_are_said_once_without_them_and_right_ones_mend_it(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "rkmetrics")
    server = make_nats(config='authorization { user: worker, password: "new-s3cret" }').start()
    registry = registries(
        server, nats_server=f"nats://worker:old-s3cret@127.0.0.1:{server.port}", nats_username="worker",
        nats_password=rk.Secret("old-s3cret"),
    )  # fmt: skip
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
    publisher.publish(metrics(5))
    await until(lambda: counted(registry, "rkmetrics_nats_connects_total", outcome="unauthorized") >= 3)
    said = nats_lines(caplog)
    assert len(said) == 1
    assert "unauthorized" in said[0]
    assert not any("s3cret" in record.getMessage() for record in caplog.records)
    server.stop()
    server.config = 'authorization { user: worker, password: "old-s3cret" }'
    server.start()
    await until(lambda: counted(registry, "rkmetrics_kv_messages_total", outcome="sent") == 1)
    assert len(nats_lines(caplog)) <= LINES


@pytest.mark.parametrize("options", [{"nats_token": rk.Secret("t0ken")}, {}])
async def test_a_token_opens_the_server_that_wants_one(
    make_nats: MakeNats, registries: Registries, options: dict[str, Any]
) -> None:
    server = make_nats(config="authorization { token: t0ken }").start()
    registry = registries(server, **options)
    rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1).publish(metrics(5))
    outcome = "ok" if options else "unauthorized"
    await until(lambda: counted(registry, "rkmetrics_nats_connects_total", outcome=outcome) >= 1)


def nkey() -> tuple[str, str]:
    """A seed, and its public key."""
    nkeys = pytest.importorskip("nkeys", reason="NKeys: pip install 'rkmetrics[nats]'")
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode(), nkeys.from_seed(bytearray(seed)).public_key.decode()


async def test_an_nkey_opens_the_server_that_knows_it(make_nats: MakeNats, registries: Registries) -> None:
    seed, public = nkey()
    server = make_nats(config=f"authorization {{ users: [ {{ nkey: {public} }} ] }}").start()
    registry = registries(server, nats_nkey=rk.Secret(seed))
    rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1).publish(metrics(5))
    await until(lambda: counted(registry, "rkmetrics_kv_messages_total", outcome="sent") == 1)


async def test_a_file_that_is_not_there_is_no_unreachable_server(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    registry = registries(make_nats(), nats_ca_file="/nowhere/ca.pem")
    rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1).publish(metrics(5))
    await until(lambda: counted(registry, "rkmetrics_nats_connects_total", outcome="error") >= 1)
    assert "No such file" in nats_lines(caplog)[0]


# --- a stream in trouble ----------------------------------------------------------------------------------------------


async def test_events_wait_while_jetstream_is_full_and_go_on_in_order(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_nats(config="", jetstream_limits="max_file: 65536").start()
    registry = registries(server)
    events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    for number in range(2_000):
        events.publish_removed([number])
    await until(lambda: any("insufficient" in line or "resource" in line for line in nats_lines(caplog)))
    full = sent(registry)
    assert 0 < full < 2_000
    assert counted(registry, "rkmetrics_kv_events_pending") == 2_000 - full
    seen = await event_ids(server, registry)
    async with tap(server) as client:
        while sent(registry) < 2_000:
            seen = list(dict.fromkeys(seen + await event_ids(server, registry)))
            await client.client.jetstream().purge_stream(stream_name(space(registry), "backend"))
            await asyncio.sleep(0.1)
        seen = list(dict.fromkeys(seen + await event_ids(server, registry)))  # what is sent anew stands there twice
    assert seen == sorted(seen)
    assert counted(registry, "rkmetrics_kv_events_total", outcome="dropped") == 0
    assert len(nats_lines(caplog)) <= 2 * LINES


async def test_a_queue_that_overflows_begins_again_with_cleared(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_nats()
    registry = registries(server)
    events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4, queue_events=10)
    for number in range(25):
        events.publish_removed([number])
    server.start()
    await until(lambda: counted(registry, "rkmetrics_kv_events_pending") == 0 and sent(registry) > 0)
    async with tap(server) as client:
        found = [json.loads(message.data)["event"] for message in await stream(client.client, registry)]
    assert found[0]["data"] == "cleared"
    assert [event["event_id"] for event in found[1:]] == list(range(25))[-(len(found) - 1) :]
    assert counted(registry, "rkmetrics_kv_events_total", outcome="dropped") + sent(registry) >= 25
    assert len([line for line in nats_lines(caplog) if "dropped" in line]) == 1


async def test_a_server_without_jetstream_is_said_once_and_events_wait(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_nats(jetstream=False).start()
    registry = registries(server)
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
    all_events = [rk.kv.KvEventPublisher(registry, worker_id=number, block_size=4) for number in range(5)]
    for events in all_events:
        events.publish_removed([1])
    publisher.publish(metrics(3))  # metrics need no stream
    await until(lambda: counted(registry, "rkmetrics_kv_messages_total", outcome="sent") == 1)
    await until(lambda: any("no JetStream" in line for line in nats_lines(caplog)))
    await asyncio.sleep(1.0)
    assert len([line for line in nats_lines(caplog) if "no JetStream" in line]) == 1
    assert counted(registry, "rkmetrics_kv_events_pending") == 5


async def test_a_publisher_that_nobody_keeps_still_sends_what_it_had_and_leaves(
    make_nats: MakeNats, registries: Registries
) -> None:
    server = make_nats().start()
    registry = registries(server)
    for number in range(5):
        rk.kv.KvEventPublisher(registry, worker_id=number, block_size=4).publish_removed([number])
    gc.collect()
    await until(lambda: sent(registry) == 5)
    thread = KvPlane.of(registry)._thread
    assert thread is not None
    await until(lambda: thread._link is not None and not thread._link._riders)


async def test_an_event_that_is_too_large_costs_the_worker_its_blocks_and_nothing_else(
    make_nats: MakeNats, registries: Registries, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_nats(config="max_payload: 4096").start()
    registry = registries(server)
    events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    events.publish_removed([1])
    events.publish_removed([2**63 + number for number in range(1_000)])
    events.publish_removed([3])
    await until(lambda: sent(registry) == 3)
    async with tap(server) as client:
        found = [json.loads(message.data)["event"]["data"] for message in await stream(client.client, registry)]
    assert found == [{"removed": {"block_hashes": [1]}}, "cleared", {"removed": {"block_hashes": [3]}}]
    assert counted(registry, "rkmetrics_kv_events_total", outcome="dropped") == 1
    assert len([line for line in nats_lines(caplog) if "max_payload" in line]) == 1


# --- who listens ------------------------------------------------------------------------------------------------------


async def test_a_listener_whose_loop_was_blocked_goes_on(make_nats: MakeNats, registries: Registries) -> None:
    """F20: five seconds of time.sleep in the listener's loop."""
    server = make_nats().start()
    registry, elsewhere = registries(server), registries(server, namespace="other")
    aggregator = rk.kv.KvMetricsAggregator(registry)
    listener = rk.kv.KvMetricsSubscriber(registry, aggregator)
    async with listener:
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
        await asyncio.sleep(0.1)
        settings = rk.Settings(request_plane="nats", nats_server=server.url, namespace=space(registry))
        other = rk.Registry(settings, builtin=False)
        publisher = rk.kv.WorkerMetricsPublisher(other, actor_name="llm", worker_id=1)
        publisher.publish(metrics(1))
        await until(aggregator.workers)
        time.sleep(5)  # noqa: ASYNC251 - what an application does, and should not
        publisher.publish(metrics(2))
        await until(lambda: aggregator.workers()[rk.kv.WorkerKey(1, 0)].active_blocks == 2)
        KvPlane.of(other).close()
    assert counted(elsewhere, "rkmetrics_nats_connections") == 0


async def test_a_listener_is_back_after_its_server_was(make_nats: MakeNats, registries: Registries) -> None:
    server = make_nats().start()
    registry = registries(server)
    aggregator = rk.kv.KvMetricsAggregator(registry)
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
    async with rk.kv.KvMetricsSubscriber(registry, aggregator):
        publisher.publish(metrics(1))
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 2)
        server.stop()
        publisher.publish(metrics(2))
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 0)
        server.start()
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 2)
        for active in range(3, 1_000):  # whichever of the two came back first
            publisher.publish(metrics(active))
            await asyncio.sleep(0.02)
            if aggregator.workers() and aggregator.workers()[rk.kv.WorkerKey(1, 0)].active_blocks >= 3:
                return
    pytest.fail("nothing is heard")


# --- the process ------------------------------------------------------------------------------------------------------

PUBLISH = """
for number in range(500):
    cache = rk.kv.KvStats(kv_active_blocks=number, kv_total_blocks=999, gpu_cache_usage_perc=0.0,
                          gpu_prefix_cache_hit_rate=0.0)
    publisher.publish(rk.kv.ForwardPassMetrics(stats, cache))
    events.publish_removed([number])
"""


async def test_a_program_that_ends_at_once_has_sent_everything(make_nats: MakeNats, registries: Registries) -> None:
    server = make_nats().start()
    out = await asyncio.to_thread(run, SCRIPT + PUBLISH, server.url)
    assert (out.returncode, out.stderr) == (0, "")
    assert await event_ids(server, registries(server, namespace="exits")) == list(range(500))


async def test_a_program_without_its_server_ends_as_well(make_nats: MakeNats) -> None:
    server = make_nats()
    out = await asyncio.to_thread(run, SCRIPT + PUBLISH + "\nimport time; time.sleep(0.5)", server.url)
    assert out.returncode == 0
    assert "Traceback" not in out.stderr


FORK = """
from rkmetrics.catalogue.kv import Nats
import time
while not registry.bind(Nats).connections.value:
    time.sleep(0.01)
pid = os.fork()
if pid == 0:
    assert rk.kv.KvPlane.of(registry).kind("llm").cells.active_blocks.value == 0
    mine = rk.kv.KvEventPublisher(registry, worker_id=2, block_size=4)
    for number in range(100):
        mine.publish_removed([number])
    mine.close()
    sys.exit(0)
events.publish_removed([1000])
assert os.waitpid(pid, 0)[1] == 0
events.publish_removed([1001])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child_has_a_connection_of_its_own(make_nats: MakeNats, registries: Registries) -> None:
    server = make_nats().start()
    out = await asyncio.to_thread(run, SCRIPT + PUBLISH + FORK, server.url)
    assert (out.returncode, out.stderr) == (0, "")
    registry = registries(server, namespace="exits")
    async with tap(server) as client:
        found = [json.loads(message.data) for message in await stream(client.client, registry)]
    by_worker = {1: list[int](), 2: list[int]()}
    for event in found:
        by_worker[event["worker_id"]].append(event["event"]["event_id"])
    assert by_worker == {1: list(range(502)), 2: list(range(100))}
    assert server.traffic()[0] == 3  # parent, child, and this test


async def test_a_reader_that_was_too_slow_reads_again_what_it_missed(
    make_nats: MakeNats, registries: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: what does not fit is dropped and counted; a log has no holes, so its reader goes back to the last it had."""
    server = make_nats().start()
    registry = registries(server)
    events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4, queue_events=5_000)
    for number in range(1_200):
        events.publish_removed([number])
    await until(lambda: sent(registry) == 1_200)
    monkeypatch.setattr("rkmetrics.nats_link.LISTEN_MESSAGES", 400)
    indexer = rk.kv.KvIndexer(registries(server, namespace=space(registry)), block_size=4)
    seen: list[int] = []

    def receive(data: bytes) -> None:
        seen.append(json.loads(data)["event"]["event_id"])
        time.sleep(0.0002)

    monkeypatch.setattr(indexer.index, "receive", receive)
    async with indexer:
        await until(lambda: len(seen) >= 1_200)
    assert seen == list(range(1_200))
