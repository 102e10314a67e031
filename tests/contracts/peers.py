"""Servers and clients of one plane, for the tests of what holds over each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import rkmetrics as rk
from rkmetrics.planes import client_class, server_class
from rkmetrics.planes.base import Handler, Instance, RpcResponse
from rkmetrics.planes.calling import PlaneClient
from rkmetrics.planes.serving import PlaneServer
from tests.waiting import counted, free_port, until

__all__ = ["Peers", "counted", "free_port", "peers_of", "until"]

#: What a server takes; all else that `serve` is given is a handler.
OPTIONS = {"instance_id", "lister", "served", "requests_limit", "homes_allowed"}


def outcomes(registry: rk.Registry, name: str) -> dict[str, int]:
    family: Any
    found: dict[str, int] = {}
    for family in registry.collect({name}):  # none before the first call
        for series in family.series():
            if series.value:
                key = dict(series.labels)["outcome"]
                found[key] = found.get(key, 0) + int(series.value)
    return found


class Peers:
    """What a test needs of a plane. The first server, and the first client, are those that are meant by default."""

    def __init__(self, mode: str, **settings: Any) -> None:
        self.mode = mode
        here = {"tcp_rpc_host": "127.0.0.1", "http_rpc_host": "127.0.0.1", "http_rpc_port": 0, "namespace": "ns"}
        self.settings = rk.Settings(**(here | settings))  # type: ignore[arg-type]
        self.registry = self.make_registry()
        self.servers: list[PlaneServer] = []
        self.clients: list[PlaneClient] = []
        self.ids = iter(range(0x7D7BA1FBD0159306, 2**63))

    def make_registry(self) -> rk.Registry:
        return rk.Registry(self.settings, strict=True, builtin=False)

    async def serve(self, type: Any = Any, **more: Any) -> PlaneServer:
        """A server that runs; options of the server, and handlers by their endpoints' names."""
        options = {name: more.pop(name) for name in OPTIONS & set(more)}
        handlers: dict[str, Handler] = more
        options.setdefault("instance_id", next(self.ids))
        server = server_class(self.mode)(self.registry, **options)
        self.servers.append(server)
        for name, handler in handlers.items():
            server.endpoint(f"backend.{name}", handler, type=type)
        await server.start()
        return server

    async def client(self, **options: Any) -> PlaneClient:
        client = client_class(self.mode)(self.registry, **options)
        self.clients.append(client)
        await client.start()
        return client

    def instance(self, name: str, server: PlaneServer | None = None) -> Instance:
        """Where an endpoint is, or would be."""
        server = server or self.servers[0]
        (found,) = [each for each in server.instances() if each.endpoint == name]
        return found

    async def call(self, name: str, request: Any = None, **options: Any) -> RpcResponse:
        if not self.clients:
            await self.client()
        return await self.clients[0].call(self.instance(name), request, **options)

    async def items(self, name: str, request: Any = None, **options: Any) -> list[Any]:
        """All of an answer."""
        return [item async for item in await self.call(name, request, **options)]

    # --- what is counted ----------------------------------------------------------------------------------------------

    def count(self, name: str, **labels: str) -> float:
        return counted(self.registry, f"rkmetrics_rpc_{name}", **labels)

    def count_of(self, name: str, **labels: str) -> float:
        """The same of any metric."""
        return counted(self.registry, name, **labels)

    @property
    def served(self) -> dict[str, int]:
        """How often serving ended in which way."""
        return outcomes(self.registry, "rkmetrics_rpc_server_requests_total")

    @property
    def called(self) -> dict[str, int]:
        """How often calls ended in which way."""
        return outcomes(self.registry, "rkmetrics_rpc_client_calls_total")

    @property
    def in_flight(self) -> float:
        return self.count("server_requests_in_flight") + self.count("client_calls_in_flight")

    async def ended(self, **served: int) -> None:
        """Wait until serving has ended in these ways and no other, and nothing is in flight."""
        await until(lambda: self.served == served and not self.in_flight)

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
        for server in self.servers:
            await server.stop(0.5)


@asynccontextmanager
async def peers_of(mode: str, **settings: Any) -> AsyncGenerator[Peers]:
    """Peers that are closed at the end, and must have left nothing."""
    before = asyncio.all_tasks()
    peers = Peers(mode, **settings)
    try:
        yield peers
    finally:
        await peers.close()
    assert peers.in_flight == 0
    await until(lambda: not peers.count("server_connections"))
    before |= {task for task in (asyncio.current_task(),) if task}  # a fixture's end is another task than its beginning
    await until(lambda: asyncio.all_tasks() <= before)
