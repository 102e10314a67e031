"""The KV plane beside NVIDIA Dynamo's own runtime: what either side says, the other one understands.

RKMETRICS_DYNAMO_PYTHON names interpreters that have `ai-dynamo-runtime` (several: as in PATH), 0.7 for most of it and
0.6.0 for what later releases no longer have. Later ones want a nats-server of 2.10.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

import rkmetrics as rk
from rkmetrics.kv.events import RouterEvent, decode_event, encode_event, stored, stream_name
from rkmetrics.kv.plane import KvPlane
from tests.services.etcd_server import EtcdServer
from tests.services.kv import (
    Registries,
    counted,
    metrics,
    space,
    tap,
    until,
)
from tests.services.nats_server import NatsServer, free_port
from tests.services.real_dynamo import VARIABLE, Peer, missing, settles, tiny_model

pytest.importorskip("nats", reason="the client of NATS is not installed: pip install 'rkmetrics[nats]'")
pytest.importorskip("xxhash", reason="hashes of tokens: pip install 'rkmetrics[dynamo]'")

PEER = Path(__file__).with_name("dynamo_peer.py")

StartPeer = Callable[..., Coroutine[Any, Any, Peer]]


# --- the other side ---------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.skipif(not os.environ.get(VARIABLE), reason=missing("0.7"))


@pytest.fixture
async def peers(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StartPeer]:
    """start(namespace=None, release="0.7", **environment); with a namespace it has joined."""
    started: list[Peer] = []
    nats: NatsServer = request.getfixturevalue("nats_server")
    etcd: EtcdServer = request.getfixturevalue("etcd_server")
    servers = {"NATS_SERVER": nats.url, "ETCD_ENDPOINTS": etcd.url, "DYN_REQUEST_PLANE": "nats", "DYN_LOG": "info"}

    async def start(namespace: str | None = None, release: str = "0.7", **environment: str) -> Peer:
        log = tmp_path / f"dynamo{len(started)}.log"
        peer = await Peer.start(release, PEER, log, servers | environment)
        started.append(peer)
        if namespace is not None:
            await peer.ask("join", namespace=namespace)
        return peer

    yield start
    await asyncio.gather(*(peer.end() for peer in started))


async def stream_of(server: NatsServer, registry: rk.Registry) -> dict[str, Any]:
    """What is known of the stream of a registry's workers; {} where there is none."""
    async with tap(server) as client:
        answer = await client.client.request(f"$JS.API.STREAM.INFO.{stream_name(space(registry), 'backend')}", b"")
    found: dict[str, Any] = json.loads(answer.data)
    return {} if "error" in found else found


async def holds(server: NatsServer, registry: rk.Registry, number: int) -> None:
    """Return when so many events are in the stream.

    What a worker of Dynamo publishes in the milliseconds in which somebody else makes the stream is lost to it: it is
    told that the stream is there, and does not wait for an acknowledgement. So tests let one begin after the other.
    """

    async def length() -> int:
        return int((await stream_of(server, registry)).get("state", {"messages": 0})["messages"])

    await settles(length, number)


# --- hashes -----------------------------------------------------------------------------------------------------------


async def test_blocks_have_the_hashes_that_dynamo_gives_them(peers: StartPeer) -> None:
    peer, dice = await peers(), random.Random(1)
    for block_size in (1, 2, 4, 15, 16, 17, 64, 128):
        for length in (0, block_size - 1, block_size, block_size + 1, dice.randrange(2000)):
            tokens = [dice.getrandbits(dice.choice((1, 8, 17, 32))) for _ in range(length)]
            theirs = await peer.ask("hashes", tokens=tokens, block_size=block_size)
            assert rk.kv.block_hashes(tokens, block_size) == theirs


# --- metrics ----------------------------------------------------------------------------------------------------------


def completion(port: int) -> int:
    """The status of a request to a frontend; 0 while nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"model": "tiny", "prompt": "a b", "max_tokens": 1})
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    except ConnectionError:
        return 0
    finally:
        connection.close()


async def test_a_frontend_turns_requests_away_when_our_metrics_say_that_the_worker_is_busy(
    nats_server: NatsServer, peers: StartPeer, registries: Registries, tmp_path: Path
) -> None:
    """Busy is above nine tenths of the blocks, here. A form that is another release's says nothing to a frontend."""
    registry, port = registries(nats_server, wire="0.7"), free_port()
    later = registries(nats_server, wire="0.8", namespace=space(registry))
    worker, frontend = await peers(space(registry)), await peers(space(registry))
    worker_id = await worker.ask("serve")
    await worker.ask("model", folder=str(tiny_model(tmp_path)), total_blocks=1000, block_size=4)
    await frontend.ask("frontend", port=port, busy_threshold=0.9)

    def status() -> Coroutine[Any, Any, int]:
        return asyncio.to_thread(completion, port)

    await settles(status, 200)
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=worker_id)
    for active, expected in ((500, 200), (950, 503), (900, 200), (901, 503)):
        publisher.publish(metrics(active))
        await settles(status, expected)
    rk.kv.WorkerMetricsPublisher(later, actor_name="llm", worker_id=worker_id).publish(metrics(0))
    await until(lambda: counted(later, "rkmetrics_kv_messages_total", outcome="sent") == 1)
    await asyncio.sleep(0.3)
    assert await status() == 503
    publisher.publish(metrics(0))
    await settles(status, 200)


async def test_a_worker_is_heard_and_publishes_when_ours_would(
    nats_server: NatsServer, peers: StartPeer, registries: Registries
) -> None:
    registry = registries(nats_server, wire="0.7")
    alike = registries(nats_server, wire="0.7")
    aggregator = rk.kv.KvMetricsAggregator(registry)
    worker = await peers(space(registry))
    worker_id = await worker.ask("serve")
    ours = rk.kv.WorkerMetricsPublisher(alike, actor_name="llm", worker_id=worker_id)
    subjects = [f"namespace.{space(each)}.kv_metrics" for each in (registry, alike)]
    async with rk.kv.KvMetricsSubscriber(registry, aggregator), tap(nats_server, *subjects) as heard:
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
        await asyncio.sleep(0.1)
        for active, waiting, slots in ((0, 0, 2), (0, 0, 9), (7, 0, 9), (7, 1, 9), (7, 1, 2), (7, 1, 2), (0, 0, 0)):
            await worker.ask("publish", active=active, waiting=waiting, slots=slots, usage=active / 1000)
            ours.publish(metrics(active, waiting, slots))
            await asyncio.sleep(0.1)
        await heard.settle(8)
        theirs, own = ([data for where, data in heard.heard if where == subject] for subject in subjects)
        assert [json.loads(data) for data in theirs] == [json.loads(data) for data in own]
        assert [json.loads(data)["data"]["kv_stats"]["kv_active_blocks"] for data in own] == [0, 7, 7, 0]
        spec = [2, 3, 4, 5, [1, 2]]
        await worker.ask("publish", active=104, waiting=3, slots=9, usage=0.104, rank=3, spec=spec)
        await until(lambda: rk.kv.WorkerKey(worker_id, 3) in aggregator.workers())
    state = aggregator.workers()[rk.kv.WorkerKey(worker_id, 3)]
    assert state.metrics == rk.kv.ForwardPassMetrics(
        rk.kv.WorkerStats(data_parallel_rank=3, request_active_slots=9, request_total_slots=64, num_requests_waiting=3),
        rk.kv.KvStats(
            kv_active_blocks=104, kv_total_blocks=1000, gpu_cache_usage_perc=0.104, gpu_prefix_cache_hit_rate=0.25
        ),
        rk.kv.SpecDecodeStats(
            num_spec_tokens=2,
            num_drafts=3,
            num_draft_tokens=4,
            num_accepted_tokens=5,
            num_accepted_tokens_per_pos=(1, 2),
        ),
    )
    assert aggregator.workers()[rk.kv.WorkerKey(worker_id)].metrics == metrics(0, slots=0)
    assert counted(registry, "rkmetrics_kv_malformed_total") == 0


# --- events -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["0.7", "0.8"])
async def test_a_router_finds_what_our_worker_holds(
    nats_server: NatsServer, peers: StartPeer, registries: Registries, wire: str
) -> None:
    """A router takes the events of the next release too: it listens to each subject of the stream."""
    registry, tokens = registries(nats_server, wire=wire), list(range(100, 116))
    worker, router = await peers(space(registry)), await peers(space(registry))
    worker_id = await worker.ask("serve")
    publisher = rk.kv.KvEventPublisher(registry, worker_id=worker_id, block_size=4)
    publisher.publish_stored(tokens[:8], [1000, -1])  # before it starts: it reads the stream from the beginning
    await until(lambda: counted(registry, "rkmetrics_kv_events_total", outcome="sent") == 1)
    await router.ask("router", block_size=4)
    async with rk.kv.KvIndexer(registry, block_size=4) as ours:
        changes: list[tuple[Callable[[], None], int]] = [
            (lambda: publisher.publish_stored(tokens[8:16], [1002, 2**64 - 4], parent_hash=-1), 4),
            (lambda: publisher.publish_removed([-4]), 3),
            (lambda: publisher.publish_removed([1000]), 0),
            (lambda: publisher.publish_stored(tokens[:12], [1000, -1, 1002]), 3),
            (publisher.publish_cleared, 0),
        ]
        for change, blocks in changes:
            change()
            await settles(lambda: router.ask("best", tokens=tokens), [worker_id, 0, blocks])
            expected = {(worker_id, 0): blocks} if blocks else {}
            await until(lambda expected=expected: ours.find_matches(tokens) == expected)  # type: ignore[misc]
        assert await router.ask("dump") == []


async def test_our_index_finds_what_a_worker_holds(
    nats_server: NatsServer, peers: StartPeer, registries: Registries
) -> None:
    registry, tokens = registries(nats_server), list(range(16))
    worker, router = await peers(space(registry)), await peers(space(registry))
    worker_id = await worker.ask("serve")
    await worker.ask("event_publisher", block_size=4, dp_rank=2)
    await worker.ask("stored", event_id=0, tokens=tokens[:8], sizes=[4, 4], hashes=[10, -11])
    await holds(nats_server, registry, 1)
    await router.ask("router", block_size=4)
    async with rk.kv.KvIndexer(registry, block_size=4) as ours:
        for do, arguments, blocks in (
            ("stored", {"tokens": tokens[8:], "sizes": [4, 4], "hashes": [12, -(2**63)], "parent": -11}, 4),
            ("stored", {"tokens": [1, 2, 3], "sizes": [3], "hashes": [99]}, 4),  # no block: it sends an empty event
            ("removed", {"hashes": [-(2**63)]}, 3),
            ("removed", {"hashes": [12, -11]}, 1),
        ):
            await worker.ask(do, event_id=blocks, **arguments)
            await until(lambda blocks=blocks: ours.find_matches(tokens) == {(worker_id, 2): blocks})  # type: ignore[misc]

        async def dump() -> list[RouterEvent]:
            return [decode_event(json.dumps(event).encode()) for event in await router.ask("dump")]

        await settles(dump, ours.index.dump())
    assert counted(registry, "rkmetrics_kv_index_blocks") == 1


class Engine:
    """The cache of one worker, as a prefix cache is: whole prefixes are stored, and ends of them evicted."""

    def __init__(self, publisher: rk.kv.KvEventPublisher, dice: random.Random) -> None:
        self._publisher, self._dice = publisher, dice
        #: A prefix to the hash of its last block.
        self.held: dict[tuple[int, ...], int] = {}

    def compute(self, tokens: list[int]) -> None:
        prefixes = [tuple(tokens[:end]) for end in range(4, len(tokens) + 1, 4)]
        known = sum(1 for prefix in prefixes if prefix in self.held)
        if known == len(prefixes):
            return
        parent = self.held[prefixes[known - 1]] if known else None
        new = [self._dice.randrange(-(2**63), 2**63) for _ in prefixes[known:]]
        self.held |= zip(prefixes[known:], new, strict=True)
        self._publisher.publish_stored(tokens[4 * known : 4 * len(prefixes)], new, parent_hash=parent)

    def evict(self, number: int) -> None:
        gone: list[int] = []
        for _ in range(min(number, len(self.held))):
            inner = {prefix[:-4] for prefix in self.held}
            ends = [prefix for prefix in self.held if prefix not in inner]
            gone.append(self.held.pop(self._dice.choice(ends)))
        if gone:
            self._publisher.publish_removed(gone)

    def clear(self) -> None:
        self.held.clear()
        self._publisher.publish_cleared()

    def holds(self, tokens: list[int]) -> int:
        return sum(1 for end in range(4, len(tokens) + 1, 4) if tuple(tokens[:end]) in self.held)


async def test_an_indexer_and_ours_agree_on_the_caches_of_several_workers(
    nats_server: NatsServer, peers: StartPeer, registries: Registries
) -> None:
    registry, dice = registries(nats_server, wire="0.7"), random.Random(7)
    indexer = await peers(space(registry))
    await indexer.ask("indexer", block_size=4)  # it purges the stream when it starts
    keys = [rk.kv.WorkerKey(1, 0), rk.kv.WorkerKey(1, 1), rk.kv.WorkerKey(2**63 - 1, 0), rk.kv.WorkerKey(2**64 - 1, 7)]
    engines = {
        key: Engine(rk.kv.KvEventPublisher(registry, worker_id=key.worker_id, dp_rank=key.dp_rank, block_size=4), dice)
        for key in keys
    }

    def prompt() -> list[int]:
        blocks = [[dice.randrange(2)] * 4 for _ in range(dice.randrange(1, 9))]
        return [token for block in blocks for token in block] + [5] * dice.randrange(4)

    found: set[tuple[int, ...]] = set()

    async def agree(prompts: Iterable[list[int]]) -> None:
        for tokens in prompts:
            held = {key: count for key, engine in engines.items() if (count := engine.holds(tokens))}
            found.add(tuple(held.values()))
            await until(lambda tokens=tokens, held=held: ours.find_matches(tokens) == held)  # type: ignore[misc]
            await settles(
                lambda tokens=tokens: indexer.ask("scores", tokens=tokens),  # type: ignore[misc]
                [[*key, count] for key, count in sorted(held.items())],
            )

    async with rk.kv.KvIndexer(registry, block_size=4) as ours:
        for _ in range(10):
            for _ in range(60):
                engine = engines[dice.choice(keys)]
                if dice.random() < 0.5:
                    engine.compute(prompt())
                else:
                    engine.evict(dice.randrange(8))
            await agree(prompt() for _ in range(20))
        engines[keys[0]].clear()
        engines[keys[1]].held.clear()  # another rank of the same worker: for an indexer that is gone, too
        await agree(prompt() for _ in range(50))
        assert len(ours.index) == sum(len(engine.held) for engine in engines.values())
    assert counted(registry, "rkmetrics_kv_index_events_total", outcome="applied") == counted(
        registry, "rkmetrics_kv_index_events_total"
    )
    assert len(found) > 50  # ways in which a prompt was spread over the workers


async def test_a_bare_tree_takes_the_bytes_that_we_publish(peers: StartPeer) -> None:
    peer, tokens = await peers(), list(range(12))
    event = RouterEvent(2**64 - 2, stored(tokens, [5, -6, 7], 4, event_id=2**64 - 1, dp_rank=3))
    for wire in ("0.7", "0.8"):
        events = [encode_event(event, wire).decode()]
        found = await peer.ask("tree", events=events, hashes=rk.kv.block_hashes(tokens, 4))
        assert found == [[2**64 - 2, 3, 3]]


# --- the stream -------------------------------------------------------------------------------------------------------


async def test_our_reader_misses_nothing_when_routers_start_and_delete_its_consumer(
    nats_server: NatsServer, peers: StartPeer, registries: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registries(nats_server, wire="0.7")
    name = stream_name(space(registry), "backend")
    worker = await peers(space(registry))
    worker_id = await worker.ask("serve")
    seen: list[int] = []
    indexer = rk.kv.KvIndexer(registry, block_size=4)
    monkeypatch.setattr(indexer.index, "receive", lambda data: seen.append(decode_event(data).event.event_id))
    publisher = rk.kv.KvEventPublisher(registry, worker_id=worker_id, block_size=4)
    published = 0
    routers = [await peers(space(registry)) for _ in range(3)]

    async def ours(client: Any) -> str:
        """The name of our consumer; a router's is durable. There is none for a moment, after one was deleted."""
        while True:
            found = await client.jetstream().consumers_info(name)
            if own := [info.name for info in found if info.config.durable_name is None]:
                return str(own[-1])
            await asyncio.sleep(0.02)

    async def publish() -> None:
        nonlocal published
        while True:
            publisher.publish_removed([published])
            published += 1
            await asyncio.sleep(0.002)

    async with indexer, tap(nats_server) as client:
        await indexer.caught_up()
        names = {await ours(client.client)}
        publishing = asyncio.create_task(publish())
        for router in routers:
            await router.ask("router", block_size=4)
            await asyncio.sleep(0.3)
            names.add(await ours(client.client))
        publishing.cancel()
        await until(lambda: len(seen) >= published)
        await routers[0].ask("indexer", block_size=4)  # which purges the stream, too
        for _ in range(2):
            publisher.publish_removed([published])
            published += 1
        await until(lambda: len(seen) >= published)
        await asyncio.sleep(0.2)
        names.add(await ours(client.client))
    assert seen == list(range(published))
    assert len(names) == 1 + len(routers) + 1
    assert counted(registry, "rkmetrics_kv_index_resyncs_total") == 0


async def test_whoever_comes_first_makes_the_same_stream_and_both_work_on_it(
    nats_server: NatsServer, peers: StartPeer, registries: Registries
) -> None:
    configs: list[dict[str, Any]] = []
    for we_come_first in (True, False):
        registry = registries(nats_server, wire="0.7")
        worker, router = await peers(space(registry)), await peers(space(registry))
        worker_id = await worker.ask("serve")

        async def ours(registry: rk.Registry = registry, worker_id: int = worker_id) -> None:
            publisher = rk.kv.KvEventPublisher(registry, worker_id=worker_id, block_size=4)
            publisher.publish_stored([1] * 4, [1])
            await until(lambda: counted(registry, "rkmetrics_kv_events_total", outcome="sent") == 1)

        async def theirs(worker: Peer = worker) -> None:
            await worker.ask("event_publisher", block_size=4)
            await worker.ask("stored", event_id=9, tokens=[2] * 4, sizes=[4], hashes=[2])

        first, second = (ours, theirs) if we_come_first else (theirs, ours)
        await first()
        await holds(nats_server, registry, 1)
        await second()
        await holds(nats_server, registry, 2)
        configs.append((await stream_of(nats_server, registry))["config"])
        await router.ask("router", block_size=4)
        async with rk.kv.KvIndexer(registry, block_size=4) as indexer:
            await indexer.caught_up()
            for token in (1, 2):
                assert indexer.find_matches([token] * 4) == {(worker_id, 0): 1}
                await settles(
                    lambda router=router, token=token: router.ask("best", tokens=[token] * 4),  # type: ignore[misc]
                    [worker_id, 0, 1],
                )
    for config in configs:
        assert config.pop("subjects") == [f"{config.pop('name')}.*"]
    assert configs[0] == configs[1]


# --- service statistics -----------------------------------------------------------------------------------------------


def small_port() -> int:
    """Dynamo 0.7 reads this port as an i16."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := random.randrange(20_000, 32_000)))
            return port


async def test_a_worker_counts_our_endpoints_among_those_of_its_service(
    nats_server: NatsServer, peers: StartPeer, registries: Registries
) -> None:
    """It asks $SRV.STATS when it starts, and shows the sums of all answers."""
    registry, port = registries(nats_server, wire="0.7"), small_port()
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=77) as publisher:
        generate = KvPlane.of(registry).service_endpoint("backend", "generate", 77)
        assert generate is not None
        generate.record(0.25)
        generate.record(0.75, error="it failed")
        publisher.publish(metrics(5))
        await until(lambda: counted(registry, "rkmetrics_nats_connections") == 1)
        await asyncio.sleep(0.1)
        worker = await peers(space(registry), DYN_SYSTEM_PORT=str(port))
        await worker.ask("serve")

        def gauges() -> dict[str, float]:
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            found = re.findall(r"^dynamo_component_nats_service_(\w+)\{.*\} (.*)$", text, re.MULTILINE)
            return {name: float(value) for name, value in found}

        await settles(
            lambda: asyncio.to_thread(gauges),
            {
                "active_services": 2,
                "active_endpoints": 3,
                "requests_total": 2,
                "errors_total": 1,
                "processing_ms_total": 1000,
                "processing_ms_avg": 500,
            },
        )


async def test_an_old_aggregator_reads_our_metrics_from_the_service_statistics(
    nats_server: NatsServer, peers: StartPeer, registries: Registries
) -> None:
    registry = registries(nats_server, wire="0.7")
    aggregator, worker = await peers(space(registry), "0.6"), await peers(space(registry), "0.6")
    theirs = await worker.ask("serve")
    await worker.ask("publish", active=9)
    await aggregator.ask("aggregator")

    async def found() -> list[tuple[int, int, int, int, float]]:
        names = ("worker_id", "kv_active_blocks", "num_requests_waiting", "request_total_slots", "gpu_cache_usage_perc")
        endpoints = await aggregator.ask("aggregated")
        return sorted(tuple(round(endpoint[name], 5) for name in names) for endpoint in endpoints)

    most = 2**63 - 1  # it reads ids as i64, and falls over a larger one
    first = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=most)
    second = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=77)
    first.publish(metrics(321, waiting=3))
    second.publish(metrics(5))
    by_them = (theirs, 9, 0, 64, 0.5)
    await settles(found, sorted([(most, 321, 3, 64, 0.321), (77, 5, 0, 64, 0.005), by_them]))
    first.publish(metrics(322))
    second.close()
    await settles(found, sorted([(most, 322, 0, 64, 0.322), by_them]))
