"""The memory plane, as tests of others use it: no port, no thread, the same order each time."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.errors import RpcClosedError, RpcRefusedError, RpcUnreachableError, ServeError
from rkmetrics.planes import memory
from rkmetrics.planes.memory import MemoryClient, MemoryServer


def registry(**settings: Any) -> rk.Registry:
    return rk.Registry(rk.Settings(**settings), strict=True, builtin=False)


async def letters(request: dict[str, str]) -> AsyncIterator[str]:
    for letter in request["prompt"]:
        yield letter


def server_of(here: rk.Registry, id: int = 1, **handlers: Any) -> MemoryServer:
    server = MemoryServer(here, instance_id=id)
    for name, handler in handlers.items():
        server.endpoint(f"backend.{name}", handler)
    return server


async def test_as_its_page_shows_it() -> None:
    here = registry()
    server = server_of(here, generate=letters)
    async with server, MemoryClient(here) as client:
        (instance,) = server.instances()
        response = await client.call(instance, {"prompt": "hello"})
        assert [item async for item in response] == ["h", "e", "l", "l", "o"]


async def test_its_place_is_its_id_and_endpoint() -> None:
    server = server_of(registry(), 0xABC, generate=letters)
    assert [instance.transport for instance in server.instances()] == [("memory", "abc/generate")]


def test_there_is_no_socket_nor_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[str]:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("a socket")

        loop = asyncio.get_running_loop()
        for name in ("create_server", "create_connection", "sock_connect", "run_in_executor"):
            monkeypatch.setattr(loop, name, refuse, raising=True)
        here = registry()
        server = server_of(here, generate=letters)
        async with server, MemoryClient(here) as client:
            (instance,) = server.instances()
            return [item async for item in await client.call(instance, {"prompt": "hi"})]

    before = threading.active_count()
    assert asyncio.run(run()) == ["h", "i"]
    assert threading.active_count() == before


def test_what_happens_is_in_the_same_order_each_time() -> None:
    async def run() -> list[Any]:
        happened: list[Any] = []

        async def handler(request: int) -> AsyncIterator[int]:
            happened.append(["begins", request])
            for number in range(3):
                happened.append(["makes", request, number])
                yield number
                await asyncio.sleep(0)

        here = registry()
        server = server_of(here, run=handler)
        async with server, MemoryClient(here) as client:
            (instance,) = server.instances()

            async def call(number: int) -> None:
                async for item in await client.call(instance, number):
                    happened.append(["gets", number, item])

            await asyncio.gather(*map(call, range(5)))
        return happened

    first = asyncio.run(run())
    assert len(first) == 5 * 7
    assert all(asyncio.run(run()) == first for _ in range(10))


async def test_two_servers_have_two_ids() -> None:
    here = registry()
    async with server_of(here, 1, generate=letters):
        second = server_of(here, 1, generate=letters)
        with pytest.raises(ServeError, match="instance_id=1: another memory server of this event loop has it"):
            await second.start()
    async with second:
        assert second.started


async def test_who_is_not_there_is_not_reached() -> None:
    here = registry()
    server = server_of(here, generate=letters)
    (instance,) = server.instances()
    async with MemoryClient(here) as client:
        for place in ("1/generate", "2/generate", "x/generate", "", "/", "1"):
            with pytest.raises(RpcUnreachableError, match="no memory server of this event loop is at"):
                await client.call(instance._replace(transport=("memory", place)), {})
        async with server:
            with pytest.raises(RpcRefusedError, match="Unknown endpoint: 1/nope"):
                await client.call(instance._replace(transport=("memory", "1/nope")), {})
            assert await (await client.call(instance, {"prompt": "x"})).one() == "x"
        with pytest.raises(RpcUnreachableError):
            await client.call(instance, {})


def test_a_server_of_another_loop_is_another_world() -> None:
    here = registry()
    server = server_of(here, generate=letters)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(server.start())

    async def call() -> None:
        async with MemoryClient(here) as client:
            (instance,) = server.instances()
            with pytest.raises(RpcUnreachableError, match="of this event loop"):
                await client.call(instance, {})

    asyncio.run(call())
    assert loop.run_until_complete(server.stop())
    loop.close()


async def test_it_breaks_off_as_a_crash_does() -> None:
    ends: list[str] = []

    async def endless(_: Any) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            ends.append("cancelled")

    here = registry()
    server = server_of(here, run=endless)
    async with server, MemoryClient(here) as client:
        (instance,) = server.instances()
        response = await client.call(instance, None)
        await anext(aiter(response))
        server.cut()
        with pytest.raises(RpcClosedError, match="the connection ended"):
            async for _ in response:
                pass
        assert ends == ["cancelled"]
        async with await client.call(instance, None) as again:
            assert await anext(aiter(again)) == 1


async def test_a_request_that_is_too_large_is_refused() -> None:
    here = registry(tcp_max_message_size_bytes=1_024)
    server = server_of(here, generate=letters)
    async with server, MemoryClient(here) as client:
        (instance,) = server.instances()
        with pytest.raises(RpcRefusedError, match="Request too large"):
            await client.call(instance, {"prompt": "x" * 1_024})
        assert len([item async for item in await client.call(instance, {"prompt": "x" * 100})]) == 100


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="the server's")


async def test_a_handler_does_not_see_its_callers_context() -> None:
    """As over a socket, where nothing comes along but what is sent."""

    async def sees(_: Any) -> str:
        return VARIABLE.get()

    here = registry()
    server = server_of(here, run=sees)
    async with server, MemoryClient(here) as client:
        (instance,) = server.instances()
        VARIABLE.set("the caller's")
        assert await (await client.call(instance, None)).one() == "the server's"


async def test_what_is_gone_is_forgotten() -> None:
    here = registry()
    async with server_of(here, generate=letters), MemoryClient(here):
        places = memory._places[asyncio.get_running_loop()]
        assert (len(places.servers), len(places.callers)) == (1, 1)
    assert (len(places.servers), len(places.callers)) == (0, 0)


def test_loops_that_are_gone_are_forgotten() -> None:
    gc.collect()
    before = len(memory._places)

    async def run() -> None:
        here = registry()
        async with server_of(here, generate=letters), MemoryClient(here):
            await asyncio.sleep(0)

    for _ in range(3):
        asyncio.run(run())
    gc.collect()
    assert len(memory._places) <= before
