"""Signs of life, and the word that a call is over: what a router needs of a client beside calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.planes import CallOutcome, IntakeRefusal, Plane, RpcIntake
from rkmetrics.errors import RpcRemoteError
from rkmetrics.planes.base import Instance
from rkmetrics.planes.calling import PlaneClient
from rkmetrics.planes.memory import MemoryClient, MemoryServer
from rkmetrics.settings import Settings
from tests.hostile import serving

SETTINGS = Settings(
    tcp_rpc_host="127.0.0.1",
    http_rpc_host="127.0.0.1",
    http_rpc_port=0,
    tcp_connect_timeout_seconds=0.2,
    http_request_timeout_seconds=0.2,
)
PLACES = {"tcp": "127.0.0.1:{}/1f/generate", "http": "http://127.0.0.1:{}/v1/rpc/generate"}


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(SETTINGS, strict=True, builtin=False)


@pytest.fixture(params=["tcp", "http"])
def client(request: pytest.FixtureRequest, registry: rk.Registry) -> PlaneClient:
    return rk.rpc.client(registry, mode=request.param)


def at(mode: str, port: int) -> Instance:
    return Instance("dynamo", "backend", "generate", 31, (mode, PLACES[mode].format(port)))


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def leaving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """It reacts, if only by leaving."""


async def test_a_server_that_lives_answers_and_runs_nothing(registry: rk.Registry, client: PlaneClient) -> None:
    ran: list[Any] = []

    async def generate(request: Any) -> None:
        ran.append(request)

    server = rk.rpc.server(registry, mode=client.mode)
    server.endpoint("backend.generate", generate)
    async with server:
        (instance,) = server.instances()
        for _ in range(3):
            assert await client.probe(instance)
        if client.mode == "tcp":
            older = instance._replace(transport=("tcp", instance.transport[1].replace(f"/{server.instance_id:x}", "")))
            assert await client.probe(older)
            refused = registry.bind(RpcIntake).refused
            assert [refused[Plane.TCP, reason].value for reason in IntakeRefusal] == [0] * len(IntakeRefusal)
    assert ran == []
    assert not await client.probe(instance)  # it is gone


async def test_who_takes_connections_and_says_nothing_does_not_live(client: PlaneClient) -> None:
    async with serving(silent) as peer:
        assert not await client.probe(at(client.mode, peer.port))
        assert peer.connections == 1


async def test_who_leaves_lives(client: PlaneClient) -> None:
    async with serving(leaving) as peer:
        assert await client.probe(at(client.mode, peer.port))


async def test_what_is_no_place_does_not_live(client: PlaneClient) -> None:
    for place in ("", "nowhere", "host:0/1/generate", "http://host/generate"):
        assert not await client.probe(at(client.mode, 1)._replace(transport=(client.mode, place)))


@pytest.mark.parametrize(
    ("request_", "outcome"),
    [("read", CallOutcome.OK), ("raise", CallOutcome.REMOTE_ERROR), ("leave", CallOutcome.CANCELLED)],
)
async def test_the_end_of_a_call_is_told_once(registry: rk.Registry, request_: str, outcome: CallOutcome) -> None:
    async def generate(request: str) -> AsyncIterator[int]:
        yield 1
        if request == "raise":
            raise ValueError
        if request == "leave":
            await asyncio.Event().wait()

    server = MemoryServer(registry, instance_id=1)
    server.endpoint("backend.generate", generate)
    async with server, MemoryClient(registry) as client:
        response = await client.call(next(iter(server.instances())), request_)
        told: list[CallOutcome] = []
        response.when_over(told.append)
        items = aiter(response)
        assert await anext(items) == 1
        assert told == []
        if request_ == "read":
            assert [item async for item in items] == []
        elif request_ == "raise":
            with pytest.raises(RpcRemoteError):
                await anext(items)
        await response.aclose()
        assert told == [outcome]
        response.when_over(told.append)  # it is over already
        assert told == [outcome, outcome]
