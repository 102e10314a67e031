"""KV metrics, events and service statistics over a real nats-server: what is sent, when, and what is heard."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import rkmetrics as rk
from rkmetrics.kv.events import decode_event, stream_name
from rkmetrics.kv.plane import KvPlane, why_without_nats
from tests.services.kv import counted, metrics, space, stream, tap, until
from tests.services.nats_server import NatsServer

pytest.importorskip("nats", reason="the client of NATS is not installed: pip install 'rkmetrics[nats]'")

DATA = Path(__file__).parents[1] / "data" / "dynamo"
WORKER = 9041998779776340742


# --- the mode switch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_plane", "nats_server", "kv_plane", "told"),
    [
        ("nats", None, "auto", None),
        ("nats", None, "nats", None),
        ("nats", None, "off", "KV plane is 'off'"),
        ("tcp", None, "auto", "request plane mode is 'tcp' and NATS_SERVER is not set"),
        ("tcp", "nats://here:1", "auto", None),
        ("tcp", None, "nats", None),
        ("tcp", "nats://here:1", "off", "KV plane is 'off'"),
        ("http", "nats://here:1", "auto", "request plane mode is 'http'"),
        ("http", None, "nats", None),
        ("http", "nats://here:1", "off", "KV plane is 'off'"),
    ],
)
def test_the_mode_decides_once(request_plane: Any, nats_server: str | None, kv_plane: Any, told: str | None) -> None:
    settings = rk.Settings(request_plane=request_plane, nats_server=nats_server, kv_plane=kv_plane)
    assert why_without_nats(settings) == told


async def everything(registry: rk.Registry) -> None:
    """One program for all modes: a worker that publishes, somebody who listens, and a router's background task."""
    aggregator = rk.kv.KvMetricsAggregator(registry)
    with (
        rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=123) as publisher,
        rk.kv.KvEventPublisher(registry, worker_id=123, block_size=4) as events,
    ):
        async with (
            rk.kv.KvMetricsSubscriber(registry, aggregator),
            rk.kv.KvIndexer(registry, block_size=4, instances=lambda: {123}) as indexer,
        ):
            await indexer.caught_up()
            for active in range(20):
                publisher.publish(metrics(active))
                events.publish_removed([active])
                await asyncio.sleep(0.005)
            await asyncio.sleep(1.5)  # several rounds of whatever asks by itself
    assert counted(registry, "rkmetrics_kv_publish_total", outcome="ok") >= 20


async def test_http_mode_connects_to_nothing_and_says_so_once(
    make_nats: Callable[..., NatsServer], registries: Callable[..., rk.Registry], caplog: pytest.LogCaptureFixture
) -> None:
    server = make_nats().start()
    caplog.set_level(logging.DEBUG, "rkmetrics")
    registry = registries(server, "http")
    before = server.traffic()
    await everything(registry)
    await everything(registry)
    assert server.traffic() == before == (0, 0, 0)
    assert counted(registry, "rkmetrics_kv_events_total", outcome="discarded") == 40
    said = [record.getMessage() for record in caplog.records if "Skipping" in record.getMessage()]
    mode = "request plane mode is 'http'"
    assert sorted(said) == sorted(
        [
            f"Skipping NATS metrics publishing for KV metrics - {mode} (worker_id: 123)",
            f"Skipping NATS publishing of KV events - {mode} (worker_id: 123)",
            f"Skipping NATS service metrics collection for '{space(registry)}_backend' - {mode}",
            f"Skipping NATS subscription to KV metrics - {mode}; poll /kv_metrics instead",
            f"Skipping the KV router's background task - {mode}; only instances are watched",
        ]
    )
    assert {record.levelno for record in caplog.records if "Skipping" in record.getMessage()} == {logging.DEBUG}
    # The control: the same program, one variable changed.
    await everything(registries(server, "nats"))
    connections, messages, _ = server.traffic()
    assert connections == 3
    assert messages > 20


@pytest.mark.parametrize(
    ("mode", "more", "connected"),
    [
        ("tcp", {}, True),
        ("tcp", {"nats_server": None}, False),
        ("http", {"kv_plane": "nats"}, True),
        ("nats", {"kv_plane": "off"}, False),
    ],
)
async def test_tcp_uses_nats_where_it_is_named_and_the_kv_plane_overrules(
    make_nats: Callable[..., NatsServer],
    registries: Callable[..., rk.Registry],
    mode: str,
    more: dict[str, Any],
    connected: bool,
) -> None:
    server = make_nats().start()
    await everything(registries(server, mode, **more))
    assert (server.traffic()[0] > 0) is connected


# --- metrics ----------------------------------------------------------------------------------------------------------


async def test_a_message_is_sent_when_blocks_or_waiting_requests_change(
    nats_server: NatsServer, registries: Callable[..., rk.Registry]
) -> None:
    registry = registries(nats_server, wire="0.7")
    async with tap(nats_server, f"namespace.{space(registry)}.kv_metrics") as heard:
        publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=WORKER)
        assert await heard.settle() == []  # nothing is sent at the start
        for given in (metrics(1), metrics(1, slots=9), metrics(1, waiting=1), metrics(1, waiting=1), metrics(2)):
            publisher.publish(given)
            await asyncio.sleep(0.05)
        said = [json.loads(data) for data in await heard.settle(3)]
    assert [(m["worker_id"], m["data"]["kv_stats"]["kv_active_blocks"]) for m in said] == [
        (WORKER, 1),
        (WORKER, 1),
        (WORKER, 2),
    ]
    assert counted(registry, "rkmetrics_kv_messages_total", outcome="sent") == 3
    assert counted(registry, "rkmetrics_kv_messages_total", outcome="unchanged") == 2


async def test_a_burst_is_one_message_and_it_is_the_last(
    nats_server: NatsServer, registries: Callable[..., rk.Registry]
) -> None:
    registry = registries(nats_server)
    async with tap(nats_server, f"namespace.{space(registry)}.kv_metrics") as heard:
        publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
        publisher.publish(metrics(0))
        await heard.settle(1)
        for active in range(1, 21):
            publisher.publish(metrics(active))
        said = [json.loads(data)["active_decode_blocks"] for data in await heard.settle(2)]
    assert said[-1] == 20
    assert len(said) <= 4
    sent = counted(registry, "rkmetrics_kv_messages_total", outcome="sent")
    assert sent + counted(registry, "rkmetrics_kv_messages_total", outcome="coalesced") == 21


@pytest.mark.parametrize("wire", ["0.7", "0.8", "0.9"])
async def test_each_wire_is_heard_by_the_aggregator(
    nats_server: NatsServer, registries: Callable[..., rk.Registry], wire: str
) -> None:
    registry = registries(nats_server, wire=wire)
    aggregator = rk.kv.KvMetricsAggregator(registry)
    async with rk.kv.KvMetricsSubscriber(registry, aggregator):
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
        await asyncio.sleep(0.1)
        with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=WORKER, dp_rank=3) as publisher:
            publisher.publish(metrics(41, waiting=2))
            await until(aggregator.workers)
    (key, state), *others = aggregator.workers().items()
    rank = 0 if wire == "0.7" else 3  # the payload of 0.7 has the rank of the metrics, which name none here
    assert (key, state.active_blocks, others) == (rk.kv.WorkerKey(WORKER, rank), 41, [])
    assert (state.metrics == metrics(41, waiting=2)) is (wire == "0.7")
    assert not state.stale


async def test_all_that_real_workers_sent_is_heard_and_the_rest_is_passed_over(
    nats_server: NatsServer, registries: Callable[..., rk.Registry], caplog: pytest.LogCaptureFixture
) -> None:
    registry = registries(nats_server)
    aggregator = rk.kv.KvMetricsAggregator(registry)
    files = [*DATA.glob("*/kv_metrics.jsonl"), *DATA.glob("*/kv_metrics.*.msgpack")]
    payloads = [
        part
        for file in files
        for part in (file.read_bytes().splitlines() if file.suffix == ".jsonl" else [file.read_bytes()])
    ]
    async with rk.kv.KvMetricsSubscriber(registry, aggregator), tap(nats_server) as client:
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
        await asyncio.sleep(0.1)
        for payload in (b"", b"garbage", *payloads, b"{}"):
            await client.client.publish(f"namespace.{space(registry)}.kv_metrics", payload)
        await until(lambda: counted(registry, "rkmetrics_kv_malformed_total", source="push") == 3)
    assert len(payloads) == 13
    assert counted(registry, "rkmetrics_kv_reports_total", source="push") == len(payloads)
    assert len(aggregator.workers()) == 4
    assert len([record for record in caplog.records if "passed over" in record.getMessage()]) == 1


async def test_gaps_are_of_what_was_missed_and_not_of_ranks_that_take_turns(
    nats_server: NatsServer, registries: Callable[..., rk.Registry]
) -> None:
    """An envelope of 0.9 counts what its publisher sent for all of its ranks."""
    registry = registries(nats_server, wire="0.9")
    aggregator = rk.kv.KvMetricsAggregator(registry)
    subject = f"namespace.{space(registry)}.kv_metrics"
    async with rk.kv.KvMetricsSubscriber(registry, aggregator), tap(nats_server, subject) as heard:
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
        await asyncio.sleep(0.1)
        with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1) as publisher:
            for number in range(10):
                publisher.publish(metrics(number, rank=number % 2))
                await heard.settle(number + 1)
            await until(lambda: counted(registry, "rkmetrics_kv_reports_total", source="push") == 10)
            assert [state.missed for state in aggregator.workers().values()] == [0, 0]
            envelope = msgspec.msgpack.decode(heard.heard[-1][1])
            assert envelope["sequence"] == 9
            await heard.client.publish(subject, msgspec.msgpack.encode(envelope | {"sequence": 13}))
            await until(lambda: counted(registry, "rkmetrics_kv_missed_updates_total") == 3)
            await heard.client.publish(subject, msgspec.msgpack.encode(envelope | {"sequence": 0}))  # it began again
            await until(lambda: counted(registry, "rkmetrics_kv_reports_total", source="push") == 12)
    assert counted(registry, "rkmetrics_kv_missed_updates_total") == 3


# --- events -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["0.7", "0.8", "0.9"])
async def test_events_go_to_the_stream_that_real_workers_make(
    nats_server: NatsServer, registries: Callable[..., rk.Registry], wire: str
) -> None:
    pytest.importorskip("xxhash", reason="hashes of tokens: pip install 'rkmetrics[dynamo]'")
    registry = registries(nats_server, wire=wire)
    name = stream_name(space(registry), "backend")
    with rk.kv.KvEventPublisher(registry, worker_id=WORKER, block_size=4) as publisher:
        publisher.publish_stored([1, 2, 3, 4, 5, 6, 7, 8], [1000, -1])
        publisher.publish_removed([-1], event_id=7)
        publisher.publish_cleared()
    async with tap(nats_server) as client:
        found = await stream(client.client, registry)
        info = json.loads((await client.client.request(f"$JS.API.STREAM.INFO.{name}", b"")).data)
    tail = "queue" if wire == "0.7" else "kv-events"
    assert {message.subject for message in found} == {f"{name}.{tail}"}
    first = (DATA / ("0.7.1" if wire == "0.7" else "0.8.1.post3") / "kv_events.jsonl").read_bytes().splitlines()[0]
    captured = json.loads(first)["event"]["data"]
    said = [json.loads(message.data) for message in found]
    assert said[0]["event"]["data"]["stored"]["blocks"][0] == captured["stored"]["blocks"][0]
    assert [event["event"]["event_id"] for event in said] == [0, 7, 1]
    assert said[1]["event"]["data"] == {"removed": {"block_hashes": [2**64 - 1]}}
    assert said[2]["event"]["data"] == "cleared"
    made = json.loads((DATA / "jetstream_stream_create.json").read_bytes())
    config = info["config"]
    assert config["subjects"] == [f"{name}.*"]
    assert {key: config[key] for key in ("max_age", "retention", "storage", "discard")} == {
        key: made[key] for key in ("max_age", "retention", "storage", "discard")
    }
    assert len({message.headers["Nats-Msg-Id"] for message in found}) == 3
    assert counted(registry, "rkmetrics_kv_events_total", outcome="sent") == 3
    assert counted(registry, "rkmetrics_kv_events_pending") == 0


async def test_ten_thousand_events_are_there_in_their_order(
    nats_server: NatsServer, registries: Callable[..., rk.Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registries(nats_server)
    with rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4, queue_events=20_000) as publisher:
        for number in range(10_000):
            publisher.publish_removed([number])
        await until(lambda: counted(registry, "rkmetrics_kv_events_total", outcome="sent") == 10_000)
    seen: list[bytes] = []
    reader = rk.kv.KvIndexer(registries(nats_server, namespace=space(registry)), block_size=4)
    monkeypatch.setattr(reader.index, "receive", seen.append)
    async with reader:
        await reader.caught_up()
    assert [decode_event(data).event.event_id for data in seen] == list(range(10_000))


@pytest.mark.parametrize("wire", ["0.8", "0.9"])
async def test_a_local_indexer_needs_no_stream(
    make_nats: Callable[..., NatsServer], registries: Callable[..., rk.Registry], wire: str
) -> None:
    server = make_nats(jetstream=False).start()
    registry = registries(server, wire=wire)
    async with (
        rk.kv.KvIndexer(registry, block_size=4) as indexer,
        tap(server, f"namespace.{space(registry)}.component.backend.kv-events") as heard,
    ):
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
        await asyncio.sleep(0.1)
        with rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4, local_indexer=True) as publisher:
            for number in range(1000):
                publisher.publish_removed([number])
            await until(lambda: counted(registry, "rkmetrics_kv_events_total", outcome="sent") == 1000)
        said = await heard.settle(1000)
        await until(lambda: counted(registry, "rkmetrics_kv_index_events_total") == 1000)
    assert [decode_event(data).event.event_id for data in said] == list(range(1000))
    assert len(indexer.index) == 0
    if wire == "0.9":
        assert [msgspec.msgpack.decode(data)["sequence"] for data in said] == list(range(1000))


# --- the index --------------------------------------------------------------------------------------------------------


async def test_an_index_is_rebuilt_from_the_stream_follows_it_and_forgets_who_left(
    nats_server: NatsServer, registries: Callable[..., rk.Registry]
) -> None:
    pytest.importorskip("xxhash", reason="hashes of tokens: pip install 'rkmetrics[dynamo]'")
    registry = registries(nats_server)
    live = {1, 2}
    tokens = list(range(16))
    first = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    second = rk.kv.KvEventPublisher(registry, worker_id=2, block_size=4)
    first.publish_stored(tokens, [10, 11, 12, 13])
    second.publish_stored(tokens[:8], [20, 21])
    await until(lambda: counted(registry, "rkmetrics_kv_events_total", outcome="sent") == 2)
    async with rk.kv.KvIndexer(registry, block_size=4, instances=lambda: live) as indexer:
        await indexer.caught_up()
        assert indexer.find_matches(tokens) == {(1, 0): 4, (2, 0): 2}
        second.publish_stored(tokens[8:12], [22], parent_hash=21)
        first.publish_removed([13])
        await until(lambda: indexer.find_matches(tokens) == {(1, 0): 3, (2, 0): 3})
        live.discard(1)
        await until(lambda: indexer.find_matches(tokens) == {(2, 0): 3})
    assert counted(registry, "rkmetrics_kv_index_blocks") == 3


async def test_a_reader_survives_a_router_that_deletes_its_consumer(
    nats_server: NatsServer, registries: Callable[..., rk.Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registries(nats_server)
    name = stream_name(space(registry), "backend")
    seen: list[int] = []
    indexer = rk.kv.KvIndexer(registry, block_size=4)
    monkeypatch.setattr(indexer.index, "receive", lambda data: seen.append(decode_event(data).event.event_id))
    publisher = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    async with indexer, tap(nats_server) as client:
        js = client.client.jetstream()
        await indexer.caught_up()  # the stream is there
        for number in range(30):
            publisher.publish_removed([number])
            if number % 5 == 0:
                for consumer in await js.consumers_info(name):
                    await js.delete_consumer(name, consumer.name)
            await asyncio.sleep(0.01)
        await until(lambda: len(seen) >= 30)
        await asyncio.sleep(0.1)
    assert seen == list(range(30))


async def test_a_stream_that_was_made_anew_is_read_anew(
    nats_server: NatsServer, registries: Callable[..., rk.Registry], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("xxhash", reason="hashes of tokens: pip install 'rkmetrics[dynamo]'")
    registry = registries(nats_server)
    name = stream_name(space(registry), "backend")
    publisher = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
    async with rk.kv.KvIndexer(registry, block_size=4) as indexer, tap(nats_server) as client:
        for number in range(3):
            publisher.publish_stored([number] * 4, [number])
        await until(lambda: len(indexer.index) == 3)
        await client.client.jetstream().delete_stream(name)
        publisher.publish_stored([9, 9, 9, 9], [9])
        await until(lambda: indexer.find_matches([9, 9, 9, 9]) == {(1, 0): 1})
        assert indexer.find_matches([1, 1, 1, 1]) == {}
    assert any("read anew" in record.getMessage() for record in caplog.records)
    assert counted(registry, "rkmetrics_kv_index_resyncs_total") >= 1


# --- service statistics -----------------------------------------------------------------------------------------------


async def test_service_statistics_are_answered_as_by_real_workers(
    nats_server: NatsServer, registries: Callable[..., rk.Registry]
) -> None:
    registry = registries(nats_server)
    service = f"{space(registry)}_backend"
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=0x7D7BA1FBDCACD81F) as publisher:
        generate = KvPlane.of(registry).service_endpoint("backend", "generate", 0x7D7BA1FBDCACD81F)
        assert generate is not None
        async with tap(nats_server) as client:
            await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
            await asyncio.sleep(0.1)
            nothing_yet = json.loads((await client.client.request(f"$SRV.STATS.{service}", b"")).data)
            publisher.publish(metrics(102, waiting=2, slots=4))
            generate.record(0.25)
            generate.record(0.75, error="it failed")
            stats = json.loads((await client.client.request(f"$SRV.STATS.{service}", b"")).data)
            info = json.loads((await client.client.request(f"$SRV.INFO.{service}.{stats['id']}", b"")).data)
            ping = json.loads((await client.client.request("$SRV.PING", b"")).data)
    captured = json.loads((DATA / "0.6.0" / "srv_stats_reply_with_load_metrics.json").read_bytes())
    load, worked = stats["endpoints"]
    assert stats.keys() == captured.keys()
    assert load.keys() == captured["endpoints"][1].keys()
    assert load["name"] == f"{service}-load_metrics-7d7ba1fbdcacd81f"
    assert load["subject"] == f"{service}.load_metrics-7d7ba1fbdcacd81f"
    assert (nothing_yet["endpoints"][0]["data"], load["queue_group"]) == (None, "q")
    assert load["data"] == captured["endpoints"][1]["data"] | {
        "kv_stats": captured["endpoints"][1]["data"]["kv_stats"] | {"gpu_cache_usage_perc": 0.102}
    }
    assert (worked["num_requests"], worked["num_errors"], worked["last_error"]) == (2, 1, "it failed")
    assert worked["average_processing_time"] == 500_000_000
    assert (info["type"], ping["type"]) == ("io.nats.micro.v1.info_response", "io.nats.micro.v1.ping_response")
    assert {endpoint["subject"] for endpoint in info["endpoints"]} == {load["subject"], worked["subject"]}


@pytest.mark.parametrize("mode", ["tcp", "http"])
async def test_service_statistics_are_silent_outside_of_nats_mode(
    nats_server: NatsServer, registries: Callable[..., rk.Registry], mode: str
) -> None:
    from nats.errors import NoRespondersError

    registry = registries(nats_server, mode, kv_plane="nats")
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1) as publisher:
        publisher.publish(metrics())
        async with tap(nats_server) as client:
            await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
            with pytest.raises(NoRespondersError):
                await client.client.request(f"$SRV.STATS.{space(registry)}_backend", b"")
