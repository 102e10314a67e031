"""A server that was withdrawn goes on for as long as callers may not have heard of it."""

from __future__ import annotations

import asyncio

import pytest

import rkmetrics as rk
from rkmetrics.errors import RpcError
from rkmetrics.planes.serving import Lister, PlaneServer
from rkmetrics.planes.tcp import TcpClient, TcpServer


class Withdrawn(Lister):
    heard_seconds = 0.4

    def __init__(self) -> None:
        self.withdrawn = asyncio.Event()

    async def run(self, server: PlaneServer) -> None:
        await asyncio.Event().wait()

    async def withdraw(self) -> None:
        self.withdrawn.set()


async def answer(request: object) -> object:
    return request


async def test_who_has_not_heard_of_the_withdrawal_is_answered_and_then_nobody() -> None:
    lister, registry = Withdrawn(), rk.Registry(rk.Settings(tcp_rpc_host="127.0.0.1"), builtin=False)
    server = TcpServer(registry, instance_id=5, lister=lister)
    server.endpoint("backend.answer", answer)
    await server.start()
    (instance,) = server.instances()
    async with TcpClient(registry) as client:
        stopping = asyncio.create_task(server.stop())
        await lister.withdrawn.wait()
        assert await (await client.call(instance, 7)).one() == 7
        assert await stopping
        with pytest.raises(RpcError) as caught:
            await client.call(instance, 7)
        assert not caught.value.delivered


async def test_who_waits_for_less_gets_half_of_it_for_the_requests_in_hand() -> None:
    lister, registry = Withdrawn(), rk.Registry(rk.Settings(tcp_rpc_host="127.0.0.1"), builtin=False)
    lister.heard_seconds = 3600.0
    server = TcpServer(registry, instance_id=5, lister=lister)
    server.endpoint("backend.answer", answer)
    await server.start()
    async with asyncio.timeout(60):  # for bugs only
        assert await server.stop(0.2)
