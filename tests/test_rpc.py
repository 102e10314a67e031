"""The composer: what the settings choose, and what is made of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.kv import KvAggregation, PollOutcome
from rkmetrics.errors import BackendError, RpcRemoteError, ServeError, SettingsError
from rkmetrics.kv.plane import KvPlane
from rkmetrics.planes import PLANES
from rkmetrics.planes.base import EndpointName, Instance, InstanceListener, InstanceSource
from rkmetrics.planes.instances import DirectoryInstances, EtcdInstances, StaticInstances
from rkmetrics.planes.listing import DirectoryLister, EtcdLister
from rkmetrics.planes.polling import PlanePoller
from rkmetrics.planes.serving import Lister, PlaneServer
from rkmetrics.planes.tcp import TcpClient, TcpServer
from rkmetrics.runtime import Node, Plan, balancing
from rkmetrics.settings import Settings
from tests.hostile import until

LOOPBACK: dict[str, Any] = {"tcp_rpc_host": "127.0.0.1", "http_rpc_host": "127.0.0.1", "http_rpc_port": 0}


def registry(**settings: Any) -> rk.Registry:
    return rk.Registry(Settings(**LOOPBACK | settings), strict=True, builtin=False)


async def echo(request: Any) -> Any:
    return request


def lister_of(server: PlaneServer) -> Lister:
    return server._lister  # pyright: ignore[reportPrivateUsage]


# --- what the settings choose -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["TCP", "tcp", "Http", "NATS"])
def test_the_variable_names_the_plane_in_any_case(told: str) -> None:
    pytest.importorskip("nats")
    made = rk.Registry(Settings.from_env({"DYN_REQUEST_PLANE": told}), builtin=False)
    assert rk.rpc.server(made).mode == rk.rpc.client(made).mode == told.lower()


def test_it_is_tcp_where_nobody_says_so() -> None:
    assert isinstance(rk.rpc.server(registry()), TcpServer)
    assert isinstance(rk.rpc.client(registry()), TcpClient)


@pytest.mark.parametrize("told", ["quic", "grpc", "tcp,http", "memory"])
def test_a_plane_that_is_none_stops_the_start_with_those_that_are(told: str) -> None:
    with pytest.raises(SettingsError, match=f"DYN_REQUEST_PLANE={told!r}.*tcp.*http.*nats"):
        Settings.from_env({"DYN_REQUEST_PLANE": told})


def test_code_may_choose_another_and_no_other_than_there_are() -> None:
    assert rk.rpc.server(registry(), mode="memory").mode == "memory"
    for make in (rk.rpc.server, rk.rpc.client):
        with pytest.raises(SettingsError, match="mode='quic': expected one of tcp, http, nats, memory"):
            make(registry(), mode="quic")


def test_who_is_asked_is_said_in_one_of_three_ways() -> None:
    etcd, balancers = {"etcd_endpoints": ("http://e:2379",)}, {"load_balancers": ("http://b:8080",)}
    assert isinstance(rk.rpc.source(registry(), ["a:1"]), StaticInstances)
    assert isinstance(rk.rpc.source(registry(**etcd, **balancers), "a:1"), StaticInstances)
    assert isinstance(rk.rpc.source(registry(**etcd, **balancers)), EtcdInstances)
    assert isinstance(rk.rpc.source(registry(**balancers)), DirectoryInstances)
    own = StaticInstances([])
    assert rk.rpc.source(registry(**etcd), own) is own
    with pytest.raises(SettingsError) as error:
        rk.rpc.source(registry())
    for way in ("instances=['host:port', ...]", "ETCD_ENDPOINTS=http://", "RKMETRICS_LOAD_BALANCERS=http://"):
        assert way in str(error.value)


def test_a_server_is_listed_where_its_callers_look() -> None:
    etcd, balancers = {"etcd_endpoints": ("http://e:2379",)}, {"load_balancers": ("http://b:8080",)}
    for settings, kind in (
        ({**etcd, **balancers}, EtcdLister),
        (balancers, DirectoryLister),
        ({}, Lister),
    ):
        statistics: Any = lister_of(rk.rpc.server(registry(**settings)))
        assert type(statistics._lister) is kind


async def test_a_taken_port_is_a_clear_error() -> None:
    server = rk.rpc.server(registry())
    server.endpoint("backend.generate", echo)
    async with server:
        (instance,) = server.instances()
        port = int(instance.transport[1].partition("/")[0].rpartition(":")[2])
        other = rk.rpc.server(registry(tcp_rpc_port=port))
        other.endpoint("backend.generate", echo)
        with pytest.raises(ServeError, match=f"127.0.0.1:{port}.*DYN_TCP_RPC_PORT"):
            await other.start()


def test_the_first_server_of_a_registry_is_its_kv_worker() -> None:
    made = registry()
    first, second = rk.rpc.server(made), rk.rpc.server(made)
    assert first.instance_id == KvPlane.of(made).worker_id != second.instance_id
    assert rk.rpc.server(made, instance_id=42).instance_id == 42
    del first
    assert rk.rpc.server(made).instance_id == KvPlane.of(made).worker_id  # it is free again


# --- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["tcp", "http", "memory"])
async def test_a_server_is_called_by_its_address_alone(mode: str) -> None:
    made = registry()
    server = rk.rpc.server(made, mode=mode)
    server.endpoint("backend.generate", echo)
    async with server, rk.rpc.client(made, mode=mode) as client:
        (instance,) = server.instances()
        async with rk.rpc.router(client, "backend.generate", instances=server.instances()) as router:
            assert router.client is client
            assert (await (await router.generate([1])).one()) == [1]
            assert router.instances() == (instance,)
        where: Any = [instance.transport[1]] if mode != "memory" else Listed(instance)
        async with rk.rpc.router(client, "backend.generate", instances=where) as router:
            assert await (await router.generate({"a": 1})).one() == {"a": 1}
            assert router.instance_ids() == ((server.instance_id,) if mode != "http" else router.instance_ids())
        if mode != "memory":
            address = instance.transport[1].rpartition("://")[2].partition("/")[0]
            async with rk.rpc.router(client, "backend.generate", instances=address) as router:
                assert await (await router.generate({"b": 2})).one() == {"b": 2}


class Listed(InstanceSource):
    """A source of instances as they are."""

    def __init__(self, *instances: Instance) -> None:
        self.instances = instances

    async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
        listener(tuple(each for each in self.instances if each[:3] == endpoint))
        await asyncio.Event().wait()


def test_names_and_modes_that_are_none_are_refused() -> None:
    client = rk.rpc.client(registry(), mode="memory")
    with pytest.raises(ValueError, match=r"expected component\.endpoint"):
        rk.rpc.router(client, "generate", instances=[])
    with pytest.raises(ValueError, match="expected round_robin, random or kv"):
        rk.rpc.router(client, "backend.generate", instances=[], mode="fastest")
    with pytest.raises(BackendError, match="host:port/endpoint"):
        rk.rpc.router(client, "backend.generate", instances=["0.0.0.0:1"])


# --- KV endpoints -----------------------------------------------------------------------------------------------------


def metrics(active: int, rank: int | None = None) -> rk.kv.ForwardPassMetrics:
    return rk.kv.ForwardPassMetrics(
        rk.kv.WorkerStats(
            data_parallel_rank=rank, request_active_slots=1, request_total_slots=4, num_requests_waiting=2
        ),
        rk.kv.KvStats(
            kv_active_blocks=active, kv_total_blocks=100, gpu_cache_usage_perc=0.1, gpu_prefix_cache_hit_rate=0.5
        ),
    )


@pytest.fixture
def worker() -> PlaneServer:
    """A server of KV metrics in memory."""
    server = rk.rpc.server(registry(), mode="memory")
    rk.rpc.serve_kv(server)
    return server


async def asked(server: PlaneServer, endpoint: str, request: Any) -> Any:
    async with rk.rpc.client(server.registry, mode="memory") as client:
        instance = next(each for each in server.instances() if each.endpoint == endpoint)
        return await (await client.call(instance, request)).one()


async def test_load_metrics_are_those_of_the_worker_of_that_id(worker: PlaneServer) -> None:
    async with worker:
        with pytest.raises(RpcRemoteError, match="no worker of this process has published"):
            await asked(worker, "load_metrics", None)
        first = rk.kv.WorkerMetricsPublisher(worker.registry, actor_name="w", worker_id=1)
        first.publish(metrics(11))
        assert (await asked(worker, "load_metrics", None))["kv_stats"]["kv_active_blocks"] == 11
        ours = rk.kv.WorkerMetricsPublisher(worker.registry, actor_name="w")
        ours.publish(metrics(22))
        found = await asked(worker, "load_metrics", None)
        assert list(found) == ["worker_stats", "kv_stats", "spec_decode_stats"]
        assert found["kv_stats"]["kv_active_blocks"] == 22


async def test_runtime_stats_are_a_text(worker: PlaneServer) -> None:
    publisher = rk.kv.WorkerMetricsPublisher(worker.registry, actor_name="w")
    publisher.publish(metrics(5))
    names = {name.endpoint: str(name) for name in worker.endpoints}
    assert names == {"load_metrics": "dynamo.backend.load_metrics", "runtime_stats": "nim.backend.runtime_stats"}
    async with worker:
        found = await asked(worker, "runtime_stats", "")
        assert isinstance(found, str)
        assert json.loads(found)["metrics"]["gauges"]["kv_active_blocks"] == 5


async def test_a_poller_reads_loads_over_the_plane(worker: PlaneServer, caplog: pytest.LogCaptureFixture) -> None:
    made = registry()
    aggregator = rk.rpc.loads(made)
    name = EndpointName("dynamo", "backend", "load_metrics")
    publisher = rk.kv.WorkerMetricsPublisher(worker.registry, actor_name="w")
    async with worker, rk.rpc.client(made, mode="memory") as client:
        mine = next(each for each in worker.instances() if each.endpoint == "load_metrics")
        nobody = mine._replace(instance_id=7, transport=("memory", "7/load_metrics"))
        async with PlanePoller(client, Listed(mine, nobody), name, aggregator, interval_seconds=0.005) as poller:
            assert set(poller.instances) <= {mine, nobody}
            cells = made.bind(KvAggregation)
            await until(lambda: cells.polls[PollOutcome.REFUSED].value > 2)  # it has published nothing yet
            assert aggregator.workers() == {}
            publisher.publish(metrics(5, rank=3))
            await until(lambda: len(aggregator))
            (state,) = aggregator.workers().values()
            assert state.key == (worker.instance_id, 3)
            assert state.metrics == metrics(5, rank=3)
            publisher.publish(metrics(6, rank=3))
            await until(lambda: [each.active_blocks for each in aggregator.workers().values()] == [6])
            assert cells.polls[PollOutcome.UNREACHABLE].value > 0
        assert len(aggregator) == 0  # nobody looks any more
    assert sum("7/load_metrics: unreachable" in line for line in caplog.messages) == 1  # said once


async def test_what_is_no_state_of_a_worker_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    made = registry()
    server = rk.rpc.server(made, mode="memory")
    server.endpoint("backend.load_metrics", echo)
    cells = rk.rpc.loads(made).metrics
    assert cells is not None
    async with server, rk.rpc.client(made, mode="memory") as client:
        source = Listed(*server.instances())
        async with PlanePoller(client, source, server.endpoints[0], rk.rpc.loads(made), interval_seconds=0.005):
            await until(lambda: cells.polls[PollOutcome.MALFORMED].value)
    assert cells.malformed["pull"].value >= 1
    assert "malformed" in caplog.text


async def test_service_statistics_are_skipped_with_one_line_outside_of_nats(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="rkmetrics.kv")
    server = rk.rpc.server(registry(request_plane="http"))
    server.endpoint("backend.generate", echo)
    rk.rpc.serve_kv(server)
    async with server:
        pass
    lines = [line for line in caplog.messages if line.startswith("Skipping NATS service metrics")]
    assert lines == ["Skipping NATS service metrics collection for 'dynamo_backend' - request plane mode is 'http'"]


# --- our own discovery ------------------------------------------------------------------------------------------------


@pytest.fixture
def balancer() -> Iterator[Node]:
    settings = Settings(port=0, health_check_interval_seconds=0.1, balancer_port=0)
    with balancing(Plan(settings, open=True)) as node:
        yield node


@pytest.mark.parametrize("mode", ["tcp", "http"])
async def test_servers_and_routers_meet_at_a_load_balancer(balancer: Node, mode: str) -> None:
    """The settings name it on both sides, and nobody names an instance."""
    settings = {"load_balancers": (balancer.url,), "request_plane": mode, "announce_interval_seconds": 0.5}
    made, callers = registry(**settings, metrics_enabled=True, metrics_access="open"), registry(**settings)
    made.health.begin_start()
    made.health.start()
    with rk.serve(made, port=0) as metrics_server:
        server = rk.rpc.server(made, metrics_port=metrics_server.port)
        server.endpoint("backend.generate", echo)
        async with rk.rpc.client(callers) as client, rk.rpc.router(client, "backend.generate") as router:
            async with server:
                assert await router.wait_for_instances(30) == (server.instance_id,)
                assert await (await router.generate("x")).one() == "x"
                assert [each.transport for each in router.instances()] == [
                    each.transport for each in server.instances()
                ]
            await until(lambda: router.instance_ids() == ())


def test_all_planes_have_a_server_and_a_client() -> None:
    pytest.importorskip("nats")
    for mode in PLANES:
        assert rk.rpc.server(registry(), mode=mode).mode == mode
        assert rk.rpc.client(registry(), mode=mode).mode == mode


async def generate(request: Any, context: Any) -> AsyncIterator[str]:
    """As the head of rpc.py shows it."""
    for letter in request["prompt"]:
        yield letter


async def test_the_example_of_the_guide_runs() -> None:
    made = registry()
    server = rk.rpc.server(made)
    server.endpoint("backend.generate", generate)
    async with server:
        address = next(iter(server.instances())).transport[1]
        async with (
            rk.rpc.client(made) as client,
            rk.rpc.router(client, "backend.generate", instances=[address]) as router,
        ):
            response = await router.generate({"prompt": "abc"})
            assert [item async for item in response] == ["a", "b", "c"]
