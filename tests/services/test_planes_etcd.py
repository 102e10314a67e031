"""Instances in a real etcd: how they come, go, and come back by themselves (reliability: F8, F9)."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.etcd import Etcd as EtcdCells
from rkmetrics.etcd.client import Etcd
from rkmetrics.planes.base import Instance
from rkmetrics.planes.instances import EtcdInstances
from rkmetrics.planes.listing import EtcdLister
from rkmetrics.planes.router import PushRouter
from rkmetrics.planes.serving import PlaneServer
from rkmetrics.settings import Settings
from tests.hostile import until
from tests.services.etcd_server import EtcdServer, cable

MakeEtcd = Callable[..., EtcdServer]
TTL_SECONDS = 2  # the least that etcd grants
_numbers = count()


@pytest.fixture
def namespace() -> str:
    """Keys of a test's own."""
    return f"test-{os.getpid()}-{next(_numbers)}"


def registry(namespace: str, **more: Any) -> rk.Registry:
    return rk.Registry(Settings(tcp_rpc_host="127.0.0.1", namespace=namespace, **more), strict=True, builtin=False)


async def echo(request: Any) -> Any:
    return request


@asynccontextmanager
async def serving(namespace: str, url: str, ttl_seconds: int = TTL_SECONDS) -> AsyncGenerator[PlaneServer]:
    made = registry(namespace)
    lister = EtcdLister(Etcd([url]), ttl_seconds=ttl_seconds, metrics=made.bind(EtcdCells))
    server = rk.rpc.server(made, lister=lister)
    server.endpoint("backend.generate", echo)
    async with server:
        await until(lambda: lister.listed)
        yield server


@asynccontextmanager
async def routing(namespace: str, url: str) -> AsyncGenerator[PushRouter]:
    made = registry(namespace)
    async with rk.rpc.client(made) as client:
        async with rk.rpc.router(client, "backend.generate", instances=EtcdInstances(Etcd([url]))) as router:
            yield router


def keys(server: EtcdServer, namespace: str) -> dict[str, Any]:
    """What etcd has of a namespace, by other means than what is tested: key to value and lease."""

    def field(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    start = f"v1/instances/{namespace}/"
    found = server.call("kv/range", key=field(start), range_end=field(f"{start[:-1]}0")).get("kvs", [])
    return {
        base64.b64decode(each["key"]).decode(): (json.loads(base64.b64decode(each["value"])), int(each["lease"]))
        for each in found
    }


async def works(router: PushRouter) -> bool:
    return bool(await (await router.generate("x")).one() == "x")


# --- how they come and go ---------------------------------------------------------------------------------------------


async def test_a_server_is_listed_as_dynamo_lists_its_own(etcd_server: EtcdServer, namespace: str) -> None:
    async with serving(namespace, etcd_server.url, ttl_seconds=10) as server:
        found = keys(etcd_server, namespace)
        key = f"v1/instances/{namespace}/backend/generate/{server.instance_id:x}"
        (instance,) = server.instances()
        assert found == {
            key: (
                {
                    "type": "Endpoint",
                    "component": "backend",
                    "endpoint": "generate",
                    "namespace": namespace,
                    "instance_id": server.instance_id,
                    "transport": {"tcp": instance.transport[1]},
                },
                server.instance_id,  # the id of the lease
            )
        }
        lease = etcd_server.call("lease/timetolive", ID=str(server.instance_id))
        assert lease["grantedTTL"] == "10"
        assert server.instance_id == rk.kv.KvPlane.of(server.registry).worker_id  # one number for all
    assert keys(etcd_server, namespace) == {}


async def test_all_endpoints_of_a_server_are_under_one_lease(etcd_server: EtcdServer, namespace: str) -> None:
    server = rk.rpc.server(registry(namespace), etcd=Etcd([etcd_server.url]))
    server.endpoint("backend.generate", echo)
    server.endpoint("other.stats", echo)
    rk.rpc.serve_kv(server, stats=None)
    async with server:
        await until(lambda: len(keys(etcd_server, namespace)) == 3)
        assert {lease for _, lease in keys(etcd_server, namespace).values()} == {server.instance_id}


async def test_two_servers_of_a_process_do_not_share_a_lease(etcd_server: EtcdServer, namespace: str) -> None:
    made = registry(namespace)
    servers = [rk.rpc.server(made, etcd=Etcd([etcd_server.url])) for _ in range(2)]
    for server in servers:
        server.endpoint("backend.generate", echo)
    async with servers[0]:
        async with servers[1]:
            await until(lambda: len(keys(etcd_server, namespace)) == 2)
        assert [lease for _, lease in keys(etcd_server, namespace).values()] == [servers[0].instance_id]


async def test_a_router_hears_of_those_that_come_and_go(etcd_server: EtcdServer, namespace: str) -> None:
    async with routing(namespace, etcd_server.url) as router:
        async with serving(namespace, etcd_server.url) as one:
            began = time.perf_counter()
            await until(lambda: len(router.instance_ids()) == 1)
            logging.getLogger("figures").info("heard of in %.0f ms", 1e3 * (time.perf_counter() - began))
            async with serving(namespace, etcd_server.url) as other:
                await until(lambda: len(router.instance_ids()) == 2)
                assert set(router.instance_ids()) == {one.instance_id, other.instance_id}
                assert await works(router)
            await until(lambda: router.instance_ids() == (one.instance_id,))
            assert await works(router)
        await until(lambda: router.instance_ids() == ())


async def test_a_server_leaves_the_list_before_it_takes_no_more(etcd_server: EtcdServer, namespace: str) -> None:
    made = registry(namespace)
    server = rk.rpc.server(made, etcd=Etcd([etcd_server.url]))
    going_on = asyncio.Event()

    async def slow(request: Any) -> Any:
        await going_on.wait()
        return request

    server.endpoint("backend.generate", slow)
    await server.start()
    async with routing(namespace, etcd_server.url) as router:
        await router.wait_for_instances(30)
        response = await router.generate("x")
        stopping = asyncio.create_task(server.stop(30))
        await until(lambda: router.instance_ids() == ())
        assert keys(etcd_server, namespace) == {}
        assert not stopping.done()  # it answers what it has
        going_on.set()
        assert await response.one() == "x"
        assert await stopping


async def test_what_is_no_instance_is_passed_over(
    etcd_server: EtcdServer, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = Etcd([etcd_server.url])
    prefix = f"v1/instances/{namespace}/backend/generate/"
    other = Instance(namespace, "backend", "generate", 5, ("nats_tcp", "x.generate-5"))
    await client.put(f"{prefix}1".encode(), b"\xff no json")
    await client.put(other.key.encode(), other.encode())
    async with serving(namespace, etcd_server.url) as server, routing(namespace, etcd_server.url) as router:
        assert await router.wait_for_instances(30) == (server.instance_id,)
        await client.put(f"{prefix}1".encode(), b"{}")
        await client.put(f"{prefix}2".encode(), other.encode())  # it speaks of another key
        await until(lambda: sum("is no instance" in line for line in caplog.messages) == 3)
        assert await works(router)
    assert sum("plane 'nats'" in line for line in caplog.messages) == 1


# --- how they come back -----------------------------------------------------------------------------------------------


async def test_a_lease_that_was_revoked_is_granted_again(etcd_server: EtcdServer, namespace: str) -> None:
    async with serving(namespace, etcd_server.url) as server, routing(namespace, etcd_server.url) as router:
        await router.wait_for_instances(30)
        etcd_server.call("lease/revoke", ID=str(server.instance_id))
        await until(lambda: router.instance_ids() == ())
        await until(lambda: router.instance_ids() == (server.instance_id,))
        assert await works(router)
        assert server.registry.bind(EtcdCells).leases_lost.value == 1


async def test_a_key_that_was_deleted_is_written_again(etcd_server: EtcdServer, namespace: str) -> None:
    async with serving(namespace, etcd_server.url) as server, routing(namespace, etcd_server.url) as router:
        await router.wait_for_instances(30)
        (instance,) = server.instances()
        assert await Etcd([etcd_server.url]).delete(instance.key.encode())
        await until(lambda: router.instance_ids() == ())
        await until(lambda: router.instance_ids() == (server.instance_id,))
        assert await works(router)


async def test_calls_go_on_while_etcd_is_away_and_when_it_is_back(make_etcd: MakeEtcd, namespace: str) -> None:
    etcd = make_etcd().start()
    async with serving(namespace, etcd.url) as server, routing(namespace, etcd.url) as router:
        await router.wait_for_instances(30)
        etcd.stop()
        began = time.monotonic()
        while time.monotonic() < began + 2 * TTL_SECONDS:  # longer than the lease
            assert await works(router)
            assert router.instance_ids() == (server.instance_id,)
            await asyncio.sleep(0.05)
        etcd.start()
        began = time.monotonic()
        await until(lambda: keys(etcd, namespace))
        logging.getLogger("figures").info("listed again %.1f s after etcd came back", time.monotonic() - began)
        assert await works(router)
        async with serving(namespace, etcd.url):  # the watch lives as well
            await until(lambda: len(router.instance_ids()) == 2)


async def test_an_etcd_that_has_forgotten_everything_is_told_again(make_etcd: MakeEtcd, namespace: str) -> None:
    etcd = make_etcd().start()
    for _ in range(20):  # it forgets a revision that the watcher has seen
        await Etcd([etcd.url]).put(b"x", b"")
    async with serving(namespace, etcd.url) as server, routing(namespace, etcd.url) as router:
        await router.wait_for_instances(30)
        etcd.stop()
        etcd.forget()
        etcd.start()
        began = time.monotonic()
        await until(lambda: keys(etcd, namespace))
        logging.getLogger("figures").info("listed in a new etcd after %.1f s", time.monotonic() - began)
        async with serving(namespace, etcd.url):
            await until(lambda: len(router.instance_ids()) == 2)
            assert server.instance_id in router.instance_ids()
            assert await works(router)


async def test_a_lease_that_ended_behind_a_cut_cable_is_granted_again(etcd_server: EtcdServer, namespace: str) -> None:
    async with cable(etcd_server) as line, serving(namespace, line.url) as server:
        async with routing(namespace, etcd_server.url) as router:
            await router.wait_for_instances(30)
            line.cut()
            await until(lambda: router.instance_ids() == ())  # its lease ended, although it lives
            line.mend()
            await until(lambda: router.instance_ids() == (server.instance_id,))
            assert await works(router)


# --- how they die -----------------------------------------------------------------------------------------------------


@pytest.fixture
def start_worker(etcd_server: EtcdServer, namespace: str) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start workers as processes of their own; returned when they say that they are ready."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        environ = {
            **os.environ,
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_NAMESPACE": namespace,
            "ETCD_ENDPOINTS": etcd_server.url,
        }
        command = [sys.executable, "-m", "tests.services.rpc_app", "worker"]
        started.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
        stdout = started[-1].stdout
        assert stdout is not None
        assert json.loads(stdout.readline())["pid"] == started[-1].pid
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


async def test_a_server_that_is_killed_is_gone_with_its_lease_and_missed_by_nobody(
    etcd_server: EtcdServer, namespace: str, start_worker: Callable[[], subprocess.Popen[str]]
) -> None:
    workers = [await asyncio.to_thread(start_worker) for _ in range(2)]
    async with routing(namespace, etcd_server.url) as router:
        await until(lambda: len(router.instance_ids()) == 2)
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        began = time.monotonic()
        answers = 0
        while len(router.instance_ids()) == 2:  # until its lease of 10 s ends
            response = await router.generate({"n": 1})
            assert len([item async for item in response]) == 1
            answers += 1
            await asyncio.sleep(0.01)
        seconds = time.monotonic() - began
        logging.getLogger("figures").info("gone after %.1f s; %d calls meanwhile, none failed", seconds, answers)
        assert answers > 0
        assert len(keys(etcd_server, namespace)) == 2  # endpoints of the other one; a third is in the namespace nim
