"""A client of Dynamo takes any acknowledgement for a good one: why no answer comes is told where it awaits that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.planes.base import Instance
from rkmetrics.planes.frame import AckReader, TcpRequest, TwoPartReader, encode_request, encode_two_part
from rkmetrics.planes.tcp import TcpServer
from rkmetrics.planes.wire import Handshake, RequestHeader, read_prologue


class Client:
    """What a client of Dynamo does: it listens, sends its request, and reads what comes home."""

    def __init__(self) -> None:
        self.home: asyncio.Queue[bytes] = asyncio.Queue()
        self.address = ""
        self._writer: asyncio.StreamWriter | None = None

    async def listen(self) -> asyncio.Server:
        async def came(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.home.put_nowait(await reader.read())  # to the end: a refused answer keeps no connection
            writer.close()

        server = await asyncio.start_server(came, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return server

    def request(self, path: str, *, reuse: bool = False, body: bytes = b"1") -> bytes:
        header = RequestHeader("id-1", self.address, "subject-1", reuse).encode()
        return encode_request(TcpRequest(path, b"{}", encode_two_part(header, body)))

    async def send(self, instance: Instance, frame: bytes) -> str:
        """The acknowledgement."""
        host, _, port = instance.transport[1].partition("/")[0].rpartition(":")
        reader, self._writer = await asyncio.open_connection(host, int(port))
        self._writer.write(frame)
        acks, found = AckReader(), list[str]()
        while not found:
            found = list(acks.feed(await reader.read(65_536)))
        return found[0]

    async def told(self) -> str:
        """Why no answer comes, as its prologue says."""
        async with asyncio.timeout(60):
            frames = list(TwoPartReader(1_000).feed(await self.home.get()))
        assert Handshake.decode(frames[0]) == Handshake("subject-1")
        return read_prologue(frames[1])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    made = Client()
    server = await made.listen()
    yield made
    made.close()
    server.close()
    await server.wait_closed()


async def slow(request: Any) -> AsyncIterator[Any]:
    await asyncio.sleep(3600)
    yield request


def serve(**options: Any) -> TcpServer:
    settings = rk.Settings(tcp_rpc_host="127.0.0.1", tcp_max_message_size_bytes=2_000)
    server = TcpServer(rk.Registry(settings, builtin=False), instance_id=5, **options)
    server.endpoint("backend.slow", slow)
    return server


TOLD: dict[str, tuple[dict[str, Any], Callable[[Client, str], bytes], str]] = {
    "unknown endpoint": ({}, lambda client, path: client.request(path + "x"), "Unknown endpoint"),
    "another's id": ({}, lambda client, path: client.request("77/slow"), "Unknown endpoint"),
    "too much to do": ({"requests_limit": 0}, lambda client, path: client.request(path), "Too many requests"),
    "too large": ({}, lambda client, path: client.request(path, body=b"x" * 3_000), "Request too large"),
}


@pytest.mark.parametrize("case", TOLD)
async def test_a_client_of_dynamo_hears_why_no_answer_comes(client: Client, case: str) -> None:
    options, request, reason = TOLD[case]
    async with serve(**options) as server:
        (instance,) = server.instances()
        path = instance.transport[1].partition("/")[2]
        acknowledgement = await client.send(instance, request(client, path))
        assert acknowledgement.startswith(reason)
        assert await client.told() == reason


async def test_one_that_drains_says_so(client: Client) -> None:
    server = serve()
    await server.start()
    (instance,) = server.instances()
    path = instance.transport[1].partition("/")[2]
    running = Client()
    async with await running.listen():
        assert await running.send(instance, running.request(path)) == ""
        stopping = asyncio.create_task(server.stop(0.5))
        await asyncio.sleep(0)
        while not server._draining:  # noqa: ASYNC110 - nobody else is told
            await asyncio.sleep(0.001)
        assert await client.send(instance, client.request(path)) == "Draining"
        assert await client.told() == "Draining"
        assert not await stopping
        running.close()


async def test_one_of_ours_reads_its_acknowledgement_and_is_not_called_at_home(client: Client) -> None:
    async with serve(requests_limit=0) as server:
        (instance,) = server.instances()
        frame = client.request(instance.transport[1].partition("/")[2], reuse=True)
        assert await client.send(instance, frame) == "Too many requests"
        assert len(server.homes) == 0
    assert client.home.empty()


async def test_nobody_is_called_where_no_answer_may_go(client: Client) -> None:
    async with serve(homes_allowed=lambda _: False) as server:
        (instance,) = server.instances()
        frame = client.request(instance.transport[1].partition("/")[2])
        assert await client.send(instance, frame)
        assert len(server.homes) == 0
    assert client.home.empty()
