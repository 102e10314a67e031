"""One application over each request plane: the environment chooses, and no line of its code (rpc_app.py)."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.planes import InstanceState, RpcRouting
from rkmetrics.errors import RpcClosedError, RpcTimeoutError
from rkmetrics.kv.base import WorkerKey
from rkmetrics.planes.router import PushRouter
from tests.hostile import until
from tests.services.conftest import PATIENCE_SECONDS
from tests.services.etcd_server import EtcdServer
from tests.services.nats_server import NatsServer

KINDS = {"tcp": "tcp", "http": "http", "nats": "nats_tcp"}
Environment = Mapping[str, str]
_numbers = count()


@pytest.fixture(params=["tcp", "http", "nats"])
def environment(request: pytest.FixtureRequest, etcd_server: EtcdServer) -> Environment:
    """What differs between the planes: these variables, and nothing else."""
    found = {
        "DYN_REQUEST_PLANE": request.param,
        "DYN_NAMESPACE": f"modes-{os.getpid()}-{next(_numbers)}",
        "ETCD_ENDPOINTS": etcd_server.url,
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_HTTP_RPC_HOST": "127.0.0.1",
        "DYN_HTTP_RPC_PORT": "0",
    }
    if request.param == "nats":
        server: NatsServer = request.getfixturevalue("nats_server")
        found["NATS_SERVER"] = server.url
    return found


class Worker:
    """A worker in a process of its own."""

    def __init__(self, environment: Environment) -> None:
        self.process = start(environment, "worker")
        self.ready = self.line()

    @property
    def id(self) -> int:
        return int(self.ready["id"])

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def start(environment: Environment, *arguments: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "NATS_", "ETCD_"))}
    command = [sys.executable, "-m", "tests.services.rpc_app", *arguments]
    return subprocess.Popen(command, env={**inherited, **environment}, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def start_worker(environment: Environment) -> Iterator[Callable[[], Worker]]:
    started: list[Worker] = []

    def start_one() -> Worker:
        started.append(Worker(environment))
        return started[-1]

    yield start_one
    for worker in started:
        worker.end()


@asynccontextmanager
async def routing(environment: Environment, **options: Any) -> AsyncGenerator[PushRouter]:
    """A client of the same settings in this process."""
    registry = rk.Registry(rk.Settings.from_env(environment), strict=True, builtin=False)
    try:
        async with rk.rpc.client(registry) as client, rk.rpc.router(client, "backend.generate", **options) as router:
            yield router
    finally:
        rk.kv.KvPlane.of(registry).close()


def test_the_same_worker_and_client_run_over_each_plane(
    environment: Environment, start_worker: Callable[[], Worker]
) -> None:
    workers = start_worker(), start_worker()
    kind, place = workers[0].ready["places"]["generate"]
    assert kind == KINDS[environment["DYN_REQUEST_PLANE"]]
    assert "generate" in place
    client = start(environment, "client", "10")
    out, _ = client.communicate(timeout=PATIENCE_SECONDS)
    assert client.returncode == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [[item["number"] for item in answer] for answer in answers] == [[0, 1, 2]] * 10
    assert {answer[0]["worker"] for answer in answers} <= {worker.id for worker in workers}


async def test_a_worker_that_is_told_to_end_leaves_the_list_and_ends_what_it_has(
    environment: Environment, start_worker: Callable[[], Worker]
) -> None:
    workers = [await asyncio.to_thread(start_worker) for _ in range(2)]
    async with routing(environment) as router:
        await until(lambda: len(router.instance_ids()) == 2)
        response = await router.direct({"n": 100, "pause": 0.02}, workers[0].id)
        items = aiter(response)
        found = [await anext(items)]
        workers[0].process.send_signal(signal.SIGTERM)
        await until(lambda: router.instance_ids() == (workers[1].id,))  # first of all it is listed no more
        assert workers[0].process.poll() is None
        others = [await router.generate({"n": 1}) for _ in range(5)]
        assert {other.instance.instance_id for other in others} == {workers[1].id}
        for other in others:
            assert len([item async for item in other]) == 1
        found += [item async for item in items]
        assert [item["number"] for item in found] == list(range(100))
        assert await asyncio.to_thread(workers[0].line) == {"ended": True}
        assert await asyncio.to_thread(workers[0].process.wait, PATIENCE_SECONDS) == 0


async def test_a_worker_that_is_killed_in_the_middle_is_told_from_its_end_and_the_other_goes_on(
    environment: Environment, start_worker: Callable[[], Worker]
) -> None:
    workers = [await asyncio.to_thread(start_worker) for _ in range(2)]
    async with routing(environment) as router:
        await until(lambda: len(router.instance_ids()) == 2)
        response = await router.direct({"n": 10_000, "pause": 0.01}, workers[0].id)
        items = aiter(response)
        assert (await anext(items))["number"] == 0
        workers[0].process.kill()
        with pytest.raises(RpcClosedError):
            async for _ in items:
                pass
        assert router.states()[workers[0].id] is InstanceState.DOWN
        asked: Counter[int] = Counter()
        for _ in range(20):
            answer = await router.generate({"n": 1})
            asked[answer.instance.instance_id] += 1
            assert len([item async for item in answer]) == 1
        assert asked == {workers[1].id: 20}


async def test_a_worker_that_hangs_is_out_until_it_lives_again(
    environment: Environment, start_worker: Callable[[], Worker]
) -> None:
    """F12: it takes connections, and its subject is heard; only its answers are missing."""
    workers = [await asyncio.to_thread(start_worker) for _ in range(2)]
    impatient = {
        "DYN_TCP_REQUEST_TIMEOUT": "0.5s",
        "DYN_HTTP_REQUEST_TIMEOUT": "0.5s",
        "DYN_TCP_CONNECT_TIMEOUT": "0.5s",
    }
    async with routing({**environment, **impatient}) as router:
        await until(lambda: len(router.instance_ids()) == 2)
        cells = router.client.registry.bind(RpcRouting, actor_name="backend")
        workers[0].process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(RpcTimeoutError):
                await router.direct({"n": 1}, workers[0].id)
            assert router.states()[workers[0].id] is InstanceState.DOWN
            while cells.probes["failed"].value == 0:
                answer = await router.generate({"n": 1})
                assert answer.instance.instance_id == workers[1].id
                assert len([item async for item in answer]) == 1
            assert router.states()[workers[0].id] is InstanceState.DOWN
        finally:
            workers[0].process.send_signal(signal.SIGCONT)
        await until(lambda: router.states()[workers[0].id] is InstanceState.UP)
        answer = await router.direct({"n": 1}, workers[0].id)
        assert len([item async for item in answer]) == 1
        assert cells.probes["ok"].value == 1


async def test_a_router_by_kv_state_knows_how_busy_the_workers_are(
    environment: Environment, start_worker: Callable[[], Worker], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("xxhash", reason="hashes of tokens: pip install 'rkmetrics[dynamo]'")
    caplog.set_level(logging.DEBUG, logger="rkmetrics.kv")
    workers = [await asyncio.to_thread(start_worker) for _ in range(2)]
    ids = {worker.id for worker in workers}
    async with routing(environment, mode="kv", busy_threshold=0.5, kv=rk.rpc.Kv(poll_seconds=0.02)) as router:
        aggregator = rk.rpc.loads(router.client.registry)
        await until(lambda: {key.worker_id for key in aggregator.workers()} == ids)
        state = aggregator.workers()[WorkerKey(workers[0].id)]
        assert state.active_blocks == 25
        assert state.metrics is not None
        assert state.metrics.kv_stats.kv_total_blocks == 100
        assert not state.stale
        answers = [await router.generate({"n": 1}, tokens=list(range(64))) for _ in range(4)]
        assert {answer.instance.instance_id for answer in answers} == ids  # equal loads: what was routed decides
        cells = router.client.registry.bind(RpcRouting, actor_name="backend")
        assert cells.prompt_blocks.value == 16
        for answer in answers:
            await answer.aclose()
    skipped = any("Skipping the KV router's background task" in line for line in caplog.messages)
    assert skipped == (environment["DYN_REQUEST_PLANE"] != "nats")


@pytest.mark.parametrize("environment", ["nats"], indirect=True)
async def test_a_prompt_goes_to_the_worker_that_holds_it(
    environment: Environment, start_worker: Callable[[], Worker]
) -> None:
    """The ids of instances, of KV metrics and of KV events are one: the router joins the three."""
    workers = [await asyncio.to_thread(start_worker) for _ in range(3)]
    ids = {worker.id for worker in workers}
    prompts = {id: [number * 1_000 + at for at in range(64)] for number, id in enumerate(ids, 1)}
    async with routing(environment, mode="kv", kv=rk.rpc.Kv(block_size=16, poll_seconds=0.02)) as router:
        await until(lambda: set(router.instance_ids()) == ids)
        for id, tokens in prompts.items():
            answer = await router.direct({"n": 1, "tokens": tokens}, id)
            assert len([item async for item in answer]) == 1
        index = router.index
        assert index is not None
        await until(lambda: all(index.find_matches(tokens) == {(id, 0): 4} for id, tokens in prompts.items()))
        for _ in range(5):
            for id, tokens in prompts.items():
                answer = await router.generate({"n": 1}, tokens=tokens)
                assert answer.instance.instance_id == id
                assert len([item async for item in answer]) == 1
        cells = router.client.registry.bind(RpcRouting, actor_name="backend")
        assert cells.overlap_blocks.value == cells.prompt_blocks.value == 5 * 3 * 4


async def test_runtime_stats_are_what_a_frontend_polls(
    environment: Environment, start_worker: Callable[[], Worker]
) -> None:
    worker = await asyncio.to_thread(start_worker)
    registry = rk.Registry(rk.Settings.from_env(environment), strict=True, builtin=False)
    async with rk.rpc.client(registry) as client, rk.rpc.router(client, "nim.backend.runtime_stats") as router:
        await until(lambda: worker.id in router.instance_ids())
        text = await (await router.direct("", worker.id)).one()  # a frontend's body is ""
        found = json.loads(text)
        assert found["schema_version"] == 1
        assert found["worker_id"] == str(worker.id)
        assert found["metrics"]["gauges"]["kv_active_blocks"] == 25
    async with rk.rpc.client(registry) as client, rk.rpc.router(client, "backend.load_metrics") as router:
        metrics = await (await router.generate(None)).one()  # and an aggregator's is null
        assert metrics["kv_stats"]["kv_active_blocks"] == 25


@pytest.mark.parametrize("environment", ["nats"], indirect=True)
async def test_in_nats_mode_the_service_statistics_count_what_was_answered(
    environment: Environment, start_worker: Callable[[], Worker]
) -> None:
    nats = importlib.import_module("nats")
    worker = await asyncio.to_thread(start_worker)
    async with routing(environment) as router:
        await router.wait_for_instances(30)
        for _ in range(3):
            async for _ in await router.generate({"n": 1}):
                pass
    connection = await nats.connect(environment["NATS_SERVER"])
    try:
        service = f"{environment['DYN_NAMESPACE']}_backend"
        found = json.loads((await connection.request(f"$SRV.STATS.{service}", b"", timeout=10)).data)
    finally:
        await connection.close()
    endpoints = {each["name"]: each for each in found["endpoints"]}
    generate = endpoints[f"{service}-generate-{worker.id:x}"]
    assert (generate["num_requests"], generate["num_errors"]) == (3, 0)
    assert generate["subject"] == worker.ready["places"]["generate"][1]
    data = endpoints[f"{service}-load_metrics-{worker.id:x}"]["data"]  # where aggregators of 0.6.0 read it
    assert data["kv_stats"]["kv_active_blocks"] == 25


@pytest.mark.parametrize("told", ["quic", "grpc,tcp"])
def test_a_plane_that_is_none_stops_the_start(told: str) -> None:
    process = start({"DYN_REQUEST_PLANE": told}, "worker")
    out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert out == ""
