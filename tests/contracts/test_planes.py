"""What holds over each request plane. A plane whose package or server is missing here is skipped, and says so."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rkmetrics.errors import (
    RpcClosedError,
    RpcError,
    RpcProtocolError,
    RpcRefusedError,
    RpcRemoteError,
    RpcTimeoutError,
    RpcUnreachableError,
    ServeError,
)
from rkmetrics.planes.base import RpcContext, RpcResponse
from rkmetrics.planes.frame import encode_two_part
from rkmetrics.planes.wire import RequestHeader
from tests.contracts.peers import Peers, free_port, peers_of, until

MIB = 1024 * 1024


# --- handlers ---------------------------------------------------------------------------------------------------------


async def echo(request: Any) -> AsyncIterator[Any]:
    yield request


async def unary(request: Any) -> Any:
    return request


async def count_to(request: Any) -> AsyncIterator[int]:
    for number in range(request):
        yield number


class Endless:
    """Makes items until it is told not to, and knows how that was. pause: between two items."""

    def __init__(self, pause: float = 0.001) -> None:
        self.pause, self.made, self.ends = pause, 0, list[str]()
        self.contexts: list[RpcContext] = []

    async def __call__(self, request: Any, context: RpcContext) -> AsyncIterator[int]:
        self.contexts.append(context)
        try:
            while not context.is_stopped():
                yield self.made
                self.made += 1
                await asyncio.sleep(self.pause)
            self.ends.append("stopped")
        except asyncio.CancelledError:
            self.ends.append("killed" if context.is_killed() else "cancelled")
            raise
        except GeneratorExit:
            self.ends.append("closed")
            raise


async def read(response: RpcResponse, found: list[Any]) -> None:
    """Read an answer; what came is found also where it ends with an error."""
    async for item in response:
        found.append(item)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2, 10_000])
async def test_items_come_in_order_and_all(peers: Peers, number: int) -> None:
    await peers.serve(count=count_to)
    assert await peers.items("count", number) == list(range(number))
    await peers.ended(ok=1)
    assert peers.called == {"ok": 1}
    assert peers.count("server_items_total") == peers.count("client_items_total") == number
    assert peers.count("server_duration_seconds") == peers.count("client_duration_seconds") == 1
    assert peers.count("client_first_item_seconds") == min(number, 1)


@pytest.mark.parametrize(
    "value",
    [
        None,
        False,
        0,
        "",
        [],
        {},
        "zażółć gęślą jaźń 😀 \x00 \u2028 \"'\\/\r\n\t",
        2**64 - 1,
        -(2**63),
        1.5,
        1e308,
        5e-324,
        0.1,
        {"a": [1, {"b": None}], "": {"complete_final": True, "data": {"event": "error"}}},
        {"event": "error", "comment": ["not one"]},
        "sentinel",
        [[[[[[]]]]]],
    ],
)
async def test_json_goes_there_and_back_unchanged(peers: Peers, value: Any) -> None:
    await peers.serve(echo=echo, one=unary)
    found = await peers.items("echo", value)
    assert found == [value]
    assert type(found[0]) is type(value)
    assert await (await peers.call("one", value)).one() == value


@pytest.mark.parametrize("megabytes", [1, 5])
async def test_big_items_and_requests_go_through(peers: Peers, megabytes: int) -> None:
    async def grow(request: str) -> AsyncIterator[str]:
        for letter in "abc":
            yield letter * megabytes * MIB
        yield request

    await peers.serve(grow=grow)
    request = "é" * (MIB // 4)  # NATS takes 1 MiB
    found = await peers.items("grow", request)
    assert [item[0] for item in found] == list("abcé")
    assert [len(item) for item in found] == [megabytes * MIB] * 3 + [MIB // 4]
    assert peers.count("server_response_bytes_total") > 3 * megabytes * MIB


@pytest.mark.parametrize("value", ["\ud800", object(), iter([1])])
async def test_a_request_that_is_no_json_is_refused_before_it_goes(peers: Peers, value: Any) -> None:
    await peers.serve(echo=echo)
    with pytest.raises((ValueError, TypeError)):
        await peers.call("echo", value)
    assert peers.in_flight == 0
    assert await peers.items("echo", 1) == [1]
    await peers.ended(ok=1)


@pytest.mark.parametrize("value", ["\ud800", object()])
async def test_a_result_that_is_no_json_is_an_error_of_the_handler(peers: Peers, value: Any) -> None:
    async def bad(_: Any) -> AsyncIterator[Any]:
        yield 1
        yield value

    async def bad_one(_: Any) -> Any:
        return value

    await peers.serve(bad=bad, one=bad_one)
    found: list[Any] = []
    with pytest.raises(RpcRemoteError, match="Error: "):
        await read(await peers.call("bad"), found)
    assert found == [1]
    with pytest.raises(RpcRemoteError, match="Error: "):
        await (await peers.call("one")).one()
    await peers.ended(error=2)
    assert peers.called == {"remote_error": 2}


async def test_numbers_that_json_has_not_are_null(peers: Peers) -> None:
    await peers.serve(echo=echo)
    assert await peers.items("echo", [math.nan, math.inf]) == [[None, None]]


class Prompt(msgspec.Struct):
    text: str
    tokens: int = 7


class Token(msgspec.Struct):
    text: str
    id: int


async def test_requests_and_items_are_of_their_types(peers: Peers) -> None:
    seen: list[Prompt] = []

    async def generate(request: Prompt) -> AsyncIterator[Token]:
        seen.append(request)
        for number, letter in enumerate(request.text):
            yield Token(letter, number)

    await peers.serve(Prompt, generate=generate)
    found = [item async for item in await peers.call("generate", Prompt("hé"), type=Token)]
    assert found == [Token("h", 0), Token("é", 1)]
    assert seen == [Prompt("hé", 7)]
    assert await peers.items("generate", {"text": "x"}) == [{"text": "x", "id": 0}]


async def test_a_request_of_another_type_is_an_error_that_says_where(peers: Peers) -> None:
    await peers.serve(Prompt, generate=echo)
    with pytest.raises(RpcRemoteError, match=r"Expected `str`, got `int` - at `\$.text`"):
        await peers.items("generate", {"text": 5})
    await peers.ended(error=1)


async def test_items_of_another_type_are_a_protocol_error(peers: Peers) -> None:
    server = await peers.serve(echo=echo)
    with pytest.raises(RpcProtocolError, match=r"got `int` - at `\$\.data\.data`"):
        await peers.items("echo", 5, type=Token)
    await until(lambda: not peers.in_flight)
    assert peers.called == {"protocol": 1}
    assert server.started


# --- forms of handlers ------------------------------------------------------------------------------------------------


async def with_context(request: Any, context: RpcContext) -> AsyncIterator[Any]:
    yield [request, context.id()]


async def one_with_context(request: Any, context: RpcContext) -> Any:
    return [request, context.id()]


async def more_arguments(prefix: str, request: Any, context: RpcContext) -> AsyncIterator[Any]:
    yield [request, prefix + context.id()]


class Callable_:
    async def __call__(self, request: Any, context: RpcContext) -> AsyncIterator[Any]:
        yield [request, context.id()]

    async def method(self, request: Any, context: RpcContext) -> Any:
        return [request, context.id()]

    @staticmethod
    async def static(*arguments: Any) -> Any:
        return [arguments[0], arguments[1].id()]


class Iterator_:
    """Neither a generator nor closable."""

    def __init__(self, request: Any, context: RpcContext) -> None:
        self.left = [[request, context.id()]]

    def __aiter__(self) -> Iterator_:
        return self

    async def __anext__(self) -> Any:
        if not self.left:
            raise StopAsyncIteration
        return self.left.pop()


async def returns_a_generator(request: Any, context: RpcContext) -> AsyncIterator[Any]:
    return with_context(request, context)


@pytest.mark.parametrize(
    "handler",
    [
        with_context,
        one_with_context,
        partial(more_arguments, ""),
        Callable_(),
        Callable_().method,
        Callable_.static,
        Iterator_,
        returns_a_generator,
        lambda request, context: with_context(request, context),
        lambda request, context: one_with_context(request, context),
    ],
)
async def test_a_handler_may_have_each_form(peers: Peers, handler: Callable[..., Any]) -> None:
    await peers.serve(run=handler)
    assert await peers.items("run", "x", id="the-id") == [["x", "the-id"]]
    await peers.ended(ok=1)


@pytest.mark.parametrize("handler", [echo, unary, partial(echo), lambda request: unary(request)])
async def test_a_handler_may_want_no_context(peers: Peers, handler: Callable[..., Any]) -> None:
    await peers.serve(run=handler)
    assert await peers.items("run", "x") == ["x"]


async def test_a_handler_that_is_not_asynchronous_is_an_error_that_says_so(peers: Peers) -> None:
    await peers.serve(run=lambda request: request)
    with pytest.raises(RpcRemoteError, match="made str, which is neither awaitable nor an async iterator"):
        await peers.items("run", "x")


# --- a handler raises -------------------------------------------------------------------------------------------------

NASTY = "no \ud800 \x00 \"}],'\\ \r\n\t \u2028 😀 " + "{" * 5_000


@pytest.mark.parametrize("before", [0, 1, 100])
@pytest.mark.parametrize("text", ["no", "", NASTY])
async def test_what_a_handler_raises_reaches_the_caller_after_its_items(peers: Peers, before: int, text: str) -> None:
    async def raises(_: Any) -> AsyncIterator[int]:
        for number in range(before):
            yield number
        raise ValueError(text)

    await peers.serve(run=raises)
    response, found = await peers.call("run"), list[Any]()
    with pytest.raises(RpcRemoteError) as caught:
        await read(response, found)
    assert found == list(range(before))
    assert caught.value.delivered
    assert caught.value.endpoint == "ns.backend.run"
    assert caught.value.reason.startswith(f"ValueError: {text[:3]}")
    assert len(caught.value.reason) <= RpcError.REASON_CHARACTERS + 3
    await peers.ended(error=1)
    assert peers.called == {"remote_error": 1}


async def test_a_coroutine_that_raises_does_so_at_the_caller(peers: Peers) -> None:
    async def raises(_: Any) -> None:
        raise KeyError("x")

    await peers.serve(run=raises, echo=echo)
    with pytest.raises(RpcRemoteError, match="KeyError: 'x'"):
        await (await peers.call("run")).one()
    assert await peers.items("echo", 1) == [1]
    await peers.ended(error=1, ok=1)


async def test_annotated_items_have_the_error_among_them(peers: Peers) -> None:
    async def raises(_: Any) -> AsyncIterator[int]:
        yield 1
        raise ValueError("no")

    await peers.serve(run=raises)
    response = await peers.call("run")
    found = [item async for item in response.annotated()]
    assert [item.data for item in found] == [1, None]
    assert [item.is_error for item in found] == [False, True]
    assert found[1].comment == ["ValueError: no"]
    await peers.ended(error=1)


async def test_one_wants_one(peers: Peers) -> None:
    await peers.serve(count=count_to)
    assert await (await peers.call("count", 1)).one() == 0
    for number, found in ((0, "no item"), (2, "more than one item"), (10**9, "more than one item")):
        with pytest.raises(RpcProtocolError, match=f"{found} came, where one was expected"):
            await (await peers.call("count", number)).one()
    await until(lambda: not peers.in_flight)


# --- who wants no more ------------------------------------------------------------------------------------------------


async def test_stop_is_seen_by_the_handler_which_ends_in_order(peers: Peers) -> None:
    endless = Endless()
    await peers.serve(run=endless)
    response, found = await peers.call("run"), list[Any]()
    async for item in response:
        found.append(item)
        if item == 3:
            response.stop()
    assert found == list(range(len(found)))
    assert len(found) >= 4
    await peers.ended(stopped=1)
    assert endless.ends in (["stopped"], ["closed"])
    assert not endless.contexts[0].is_killed()
    assert peers.called == {"cancelled": 1}


async def test_a_handler_waits_for_stop_as_well(peers: Peers) -> None:
    async def waits(_: Any, context: RpcContext) -> AsyncIterator[str]:
        yield "before"
        await context.stopped()
        yield "after"

    await peers.serve(run=waits)
    response, found = await peers.call("run"), list[Any]()
    async for item in response:
        found.append(item)
        response.stop()
    assert found == ["before", "after"]
    await peers.ended(stopped=1)


async def test_a_handler_may_stop_itself(peers: Peers) -> None:
    async def stops(_: Any, context: RpcContext) -> AsyncIterator[int]:
        yield 1
        context.stop_generating()
        yield 2
        yield 3

    await peers.serve(run=stops)
    found: list[int] = []
    with pytest.raises(RpcClosedError, match="without its end"):
        await read(await peers.call("run"), found)
    assert found == [1, 2]
    await peers.ended(stopped=1)


async def leave_by_aclose(peers: Peers, ready: Callable[[], object]) -> None:
    response = await peers.call("run")
    await anext(aiter(response))
    await response.aclose()
    await response.aclose()


async def leave_by_async_with(peers: Peers, ready: Callable[[], object]) -> None:
    async with await peers.call("run") as response:
        await anext(aiter(response))


async def leave_by_an_error(peers: Peers, ready: Callable[[], object]) -> None:
    async def fail() -> None:
        async with await peers.call("run") as response:
            async for _ in response:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()


async def leave_by_dropping_it(peers: Peers, ready: Callable[[], object]) -> None:
    response = await peers.call("run")
    await anext(aiter(response))
    del response
    gc.collect()


async def leave_by_break(peers: Peers, ready: Callable[[], object]) -> None:
    async for _ in await peers.call("run"):
        break
    gc.collect()


async def leave_by_cancelling_the_reader(peers: Peers, ready: Callable[[], object]) -> None:
    async def read() -> None:
        async with await peers.call("run") as response:
            async for _ in response:
                pass

    task = asyncio.create_task(read())
    await until(ready)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def leave_by_a_timeout_of_ones_own(peers: Peers, ready: Callable[[], object]) -> None:
    async def wait() -> None:
        async with await peers.call("run") as response, asyncio.timeout(0.1):
            await read(response, [])

    with pytest.raises(TimeoutError):
        await wait()


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_aclose,
        leave_by_async_with,
        leave_by_an_error,
        leave_by_dropping_it,
        leave_by_break,
        leave_by_cancelling_the_reader,
        leave_by_a_timeout_of_ones_own,
    ],
)
async def test_who_leaves_has_the_handler_cancelled(
    peers: Peers, leave: Callable[[Peers, Callable[[], object]], Awaitable[None]]
) -> None:
    endless = Endless()
    await peers.serve(run=endless)
    await leave(peers, lambda: endless.made > 3)
    await peers.ended(killed=1)
    assert endless.ends == ["killed"]
    assert endless.contexts[0].is_stopped()
    assert peers.called == {"cancelled": 1}


async def test_a_call_that_is_cancelled_before_its_answer_has_the_handler_cancelled(peers: Peers) -> None:
    began, ends = asyncio.Event(), list[str]()

    async def slow(_: Any) -> AsyncIterator[int]:
        began.set()
        try:
            await asyncio.Event().wait()
            yield 1
        finally:
            ends.append("cleaned up")

    await peers.serve(run=slow)
    client = await peers.client()

    async def call() -> None:
        async for _ in await client.call(peers.instance("run"), 1):
            pass

    task = asyncio.create_task(call())
    await began.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    del task
    gc.collect()
    await peers.ended(killed=1)
    assert ends == ["cleaned up"]
    assert peers.called == {"cancelled": 1}


async def test_a_handler_that_ignores_its_cancellation_hurts_nobody_else(peers: Peers) -> None:
    release, ignored = asyncio.Event(), 0

    async def stubborn(_: Any) -> AsyncIterator[int]:
        nonlocal ignored
        yield 1
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                ignored += 1
        yield 2

    await peers.serve(run=stubborn, echo=echo)
    async with await peers.call("run") as response:
        await anext(aiter(response))
    await until(lambda: ignored)
    assert await peers.items("echo", "fine") == ["fine"]
    assert peers.count("client_calls_in_flight") == 0
    assert peers.count("server_requests_in_flight") == 1
    release.set()
    await until(lambda: not peers.in_flight)
    assert await peers.items("echo", "still") == ["still"]


# --- back-pressure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", [True, False])
async def test_a_slow_reader_holds_the_handler_and_loses_nothing(peers: Peers, *, pause: bool) -> None:
    made = 0

    async def floods(number: int) -> AsyncIterator[Any]:
        nonlocal made
        for made in range(1, number + 1):
            yield [made, "x" * 10_000]
            if pause:
                await asyncio.sleep(0)

    await peers.serve(run=floods)
    number, highest = 10_000, 3_000  # 100 MB; what lies between is far less
    response = await peers.call("run", number)
    await anext(aiter(response))
    seen = -1
    while seen != made:  # until it stands still
        seen = made
        await asyncio.sleep(0.2)
    assert made < highest
    assert [item[0] async for item in response] == list(range(2, number + 1))
    await peers.ended(ok=1)


async def test_a_slow_reader_holds_no_other_answer(peers: Peers) -> None:
    async def floods(_: Any) -> AsyncIterator[Any]:
        while True:
            yield "x" * 10_000

    await peers.serve(run=floods, count=count_to)
    async with await peers.call("run") as held:
        await anext(aiter(held))
        assert await peers.items("count", 10_000) == list(range(10_000))
    await peers.ended(killed=1, ok=1)


async def test_a_fast_reader_waits_for_each_item(peers: Peers) -> None:
    given: asyncio.Queue[int] = asyncio.Queue()

    async def hands_on(_: Any) -> AsyncIterator[int]:
        while item := await given.get():
            yield item

    await peers.serve(run=hands_on)
    response = aiter(await peers.call("run"))
    for number in range(1, 100):
        given.put_nowait(number)
        assert await anext(response) == number
    given.put_nowait(0)
    assert await anext(response, "end") == "end"
    await peers.ended(ok=1)


async def test_a_handler_that_never_rests_leaves_the_loop_to_others(peers: Peers) -> None:
    """A generator that awaits nothing would else hold all its items, and everybody."""
    await peers.serve(count=count_to)
    response = await peers.call("count", 10_000_000)
    assert await anext(aiter(response)) == 0
    await response.aclose()
    await peers.ended(killed=1)
    assert peers.count("server_items_total") < 1_000_000


# --- many -------------------------------------------------------------------------------------------------------------


async def test_of_many_calls_each_gets_its_own_items(peers: Peers) -> None:
    async def numbers(request: Any, context: RpcContext) -> AsyncIterator[Any]:
        for number in range(20):
            yield [context.id(), request, number]
            await asyncio.sleep(0.001 * (request % 7))

    await peers.serve(run=numbers)
    client = await peers.client()

    async def call(number: int) -> None:
        id = f"call {number}"
        response = await client.call(peers.instance("run"), number, id=id)
        assert response.id == id
        assert [item async for item in response] == [[id, number, each] for each in range(20)]

    await asyncio.gather(*map(call, range(500)))
    await peers.ended(ok=500)
    assert peers.called == {"ok": 500}


async def test_two_clients_and_two_servers_do_not_get_in_each_others_way(peers: Peers) -> None:
    async def named(name: str, request: Any) -> AsyncIterator[Any]:
        yield [name, request]

    servers = [await peers.serve(run=partial(named, name)) for name in "ab"]
    clients = [await peers.client() for _ in range(2)]

    async def call(number: int) -> None:
        server, client = servers[number % 2], clients[number // 2 % 2]
        response = await client.call(peers.instance("run", server), number)
        assert await response.one() == ["ab"[number % 2], number]

    for _ in range(3):
        await asyncio.gather(*map(call, range(40)))
    await peers.ended(ok=120)


async def test_request_ids_are_the_callers_or_new_ones(peers: Peers) -> None:
    await peers.serve(run=with_context)
    found = [(await peers.items("run"))[0][1] for _ in range(3)]
    assert len(set(found)) == 3
    hostile = 'id "\\ \n é 😀'
    assert (await peers.items("run", id=hostile))[0][1] == hostile


async def test_the_same_id_twice_at_once_confuses_nobody(peers: Peers) -> None:
    await peers.serve(echo=echo)
    answers = await asyncio.gather(*(peers.items("echo", number, id="same") for number in range(20)))
    assert answers == [[number] for number in range(20)]


# --- time -------------------------------------------------------------------------------------------------------------


async def test_an_answer_that_is_not_whole_in_time_ends(peers: Peers) -> None:
    endless = Endless()
    await peers.serve(run=endless)
    response, found = await peers.call("run", timeout_seconds=0.2), list[Any]()
    with pytest.raises(RpcTimeoutError, match=r"not whole in 0\.2 s") as caught:
        await read(response, found)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.delivered
    assert found == list(range(len(found)))
    await peers.ended(killed=1)
    assert peers.called == {"timeout": 1}


async def test_an_answer_that_falls_silent_ends(peers: Peers) -> None:
    async def falls_silent(_: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    await peers.serve(run=falls_silent)
    await peers.client(silence_seconds=0.2)
    response, found = await peers.call("run"), list[Any]()
    with pytest.raises(RpcTimeoutError, match=r"silent for 0\.2 s"):
        await read(response, found)
    assert found == [1]
    await peers.ended(killed=1)


async def test_an_answer_that_is_slow_but_not_silent_goes_on(peers: Peers) -> None:
    async def slow(_: Any) -> AsyncIterator[int]:
        for number in range(8):
            yield number
            await asyncio.sleep(0.1)

    await peers.serve(run=slow)
    await peers.client(silence_seconds=0.4)
    assert await peers.items("run") == list(range(8))


async def test_a_reader_that_takes_its_time_is_no_silence(peers: Peers) -> None:
    async def floods(_: Any) -> AsyncIterator[Any]:
        for number in range(5_000):
            yield [number, "x" * 2_000]

    await peers.serve(run=floods)
    await peers.client(silence_seconds=0.2)
    response = aiter(await peers.call("run"))
    assert (await anext(response))[0] == 0
    await asyncio.sleep(0.6)  # three times the limit, as we do not listen
    assert [item[0] async for item in response] == list(range(1, 5_000))


async def test_an_answer_that_never_begins_ends(mode: str, plane_settings: dict[str, Any]) -> None:
    limits = {"tcp_request_timeout_seconds": 0.3, "http_request_timeout_seconds": 0.3}
    async with peers_of(mode, **(plane_settings | limits)) as peers:
        server = await peers.serve(echo=echo)
        server.take = lambda *_: None  # type: ignore[method-assign] # acknowledges, and does no more
        with pytest.raises(RpcTimeoutError, match=r"no answer to the acknowledged request in 0.3 s"):
            await peers.call("echo")
        assert peers.called == {"timeout": 1}
        assert peers.served == {}


# --- not taken --------------------------------------------------------------------------------------------------------


async def test_an_unknown_endpoint_is_refused(peers: Peers) -> None:
    await peers.serve(echo=echo)
    instance = peers.instance("echo")
    kind, place = instance.transport
    nowhere = instance._replace(endpoint="nope", transport=(kind, place.replace("echo", "nope")))
    client = await peers.client()
    with pytest.raises((RpcRefusedError, RpcUnreachableError)) as caught:
        await client.call(nowhere, 1)
    assert not caught.value.delivered
    assert caught.value.endpoint == "ns.backend.nope"
    assert caught.value.instance in str(caught.value)
    assert peers.in_flight == 0
    assert await peers.items("echo", 1) == [1]


async def test_an_instance_that_is_gone_is_not_reached(peers: Peers) -> None:
    server = await peers.serve(echo=echo)
    assert await peers.items("echo", 1) == [1]
    await server.stop()
    while True:
        with pytest.raises((RpcUnreachableError, RpcRefusedError)) as caught:
            await peers.call("echo", 1)
        if not caught.value.delivered:
            break  # a connection that seemed to stand may have taken one
    assert peers.called.pop("ok") == 1
    assert peers.served == {"ok": 1}


async def test_a_probe_says_whether_somebody_is_there_and_runs_nothing(peers: Peers) -> None:
    ran: list[Any] = []

    async def run(request: Any) -> None:
        ran.append(request)

    server = await peers.serve(run=run)
    instance, client = peers.instance("run"), await peers.client()
    assert await client.probe(instance)
    await server.stop()
    assert not await client.probe(instance)
    assert (ran, peers.served, peers.called) == ([], {}, {})


async def test_another_kind_of_transport_is_not_reached(peers: Peers) -> None:
    await peers.serve(echo=echo)
    client = await peers.client()
    for transport in (("pigeon", "coop 7"), (peers.instance("echo").transport[0], ""), ("", "")):
        with pytest.raises(RpcUnreachableError):
            await client.call(peers.instance("echo")._replace(transport=transport), 1)
    assert peers.called == {"unreachable": 3}


async def test_more_than_the_limit_is_refused_and_what_runs_goes_on(peers: Peers) -> None:
    release = asyncio.Event()

    async def waits(request: Any) -> AsyncIterator[Any]:
        yield "began"
        await release.wait()
        yield request

    await peers.serve(run=waits, requests_limit=3)
    running = [await peers.call("run", number) for number in range(3)]
    for response in running:
        assert await anext(aiter(response)) == "began"
    for _ in range(2):
        with pytest.raises(RpcRefusedError, match="Too many requests") as caught:
            await peers.call("run")
        assert not caught.value.delivered
    release.set()
    assert [await response.one() for response in running] == [0, 1, 2]
    await peers.ended(ok=3)
    assert peers.called == {"ok": 3, "refused": 2}
    assert peers.count("refused_total", reason="busy") == 2
    assert await peers.items("run", 9) == ["began", 9]


HEADER = RequestHeader("a", "127.0.0.1:1", "s").encode()


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\x00", "malformed"),
        (b"\xff" * 24, "malformed"),
        (b"\xff" * 10_000, "malformed"),
        (encode_two_part(b"{}", b"1"), "malformed"),
        (encode_two_part(b"", b"1"), "malformed"),
        (encode_two_part(HEADER, b""), "malformed"),
        (encode_two_part(HEADER.replace(b'\\"a\\"', b'\\"b\\"'), b"1"), "malformed"),
        (encode_two_part(b"[" * 5_000, b"1"), "malformed"),
    ],
)
async def test_a_payload_that_is_no_request_is_refused_and_counted(peers: Peers, payload: bytes, reason: str) -> None:
    server = await peers.serve(echo=echo)
    client = await peers.client()
    push = client._push
    client._push = lambda call, _, traceparent: push(call, payload, traceparent)  # type: ignore[method-assign,assignment]
    with pytest.raises(RpcRefusedError, match="Malformed request"):
        await client.call(peers.instance("echo"), 1)
    client._push = push  # type: ignore[method-assign]
    assert peers.count("refused_total", reason=reason) == 1
    assert await peers.items("echo", 1) == [1]
    assert server.started


@pytest.mark.parametrize("body", [b"{", b"\xff", b"nul", b"[" * 50_000, b'"\\ud800"'])
async def test_a_body_that_is_no_json_is_an_error_of_the_call(peers: Peers, body: bytes) -> None:
    await peers.serve(echo=echo)
    client = await peers.client()
    push = client._push

    def spoil(call: Any, _: bytes, traceparent: str) -> None:
        header = RequestHeader(call.id, client.home.address, call.subject, reuse=True)
        push(call, encode_two_part(header.encode(), body), traceparent)

    client._push = spoil  # type: ignore[method-assign,assignment]
    with pytest.raises(RpcRemoteError, match="not a request of that endpoint"):
        await (await client.call(peers.instance("echo"), 1)).one()
    await peers.ended(error=1)


async def test_a_way_home_that_leads_nowhere_is_counted_and_nothing_runs(peers: Peers) -> None:
    ran: list[Any] = []

    async def run(request: Any) -> None:
        ran.append(request)

    server = await peers.serve(run=run)
    for address in ("127.0.0.1:1", "[::1]:1"):
        header = RequestHeader("id", address, "subject")
        assert server.take("run", encode_two_part(header.encode(), b"1"), "") is None
    await peers.ended(no_way_home=2)
    assert ran == []


async def test_an_answer_with_a_refusal_for_a_prologue_is_refused(peers: Peers) -> None:
    """As Dynamo's workers refuse what they have acknowledged."""
    server = await peers.serve(echo=echo)

    def refuses(name: str, payload: bytes, traceparent: str) -> None:
        from rkmetrics.planes.frame import read_two_part

        header = RequestHeader.decode(read_two_part(payload).header)

        async def answer() -> None:
            home = await server.homes.open(header.address)
            home.begin(header, lambda _: None, "no room at the inn")
            home.end(final=False)

        tasks.append(asyncio.create_task(answer()))

    tasks: list[asyncio.Task[None]] = []
    server.take = refuses  # type: ignore[method-assign]
    with pytest.raises(RpcRefusedError, match="no room at the inn"):
        await peers.call("echo")
    await asyncio.gather(*tasks)
    assert peers.called == {"refused": 1}


# --- who answers ------------------------------------------------------------------------------------------------------


async def test_an_answer_under_a_subject_that_nobody_waits_for_goes_nowhere(peers: Peers) -> None:
    endless = Endless()
    server = await peers.serve(run=endless, echo=echo)
    client = await peers.client()
    async with await peers.call("run") as response:
        await anext(aiter(response))
        (taken,) = (endless.contexts[0].request.id,)
        for subject in ("", "x", taken, response._call.subject):  # type: ignore[attr-defined] # spent, as it is in use
            header = RequestHeader("forged", client.home.address, subject)
            assert server.take("echo", encode_two_part(header.encode(), b'"forged"'), "") is None
        await until(lambda: sum(peers.served.values()) == 4)
        before = endless.made
        async for item in response:
            assert item != "forged"
            if item > before + 3:
                break
    await until(lambda: not peers.in_flight)


async def test_a_worker_that_answers_garbage_ends_its_own_call_only(peers: Peers) -> None:
    server = await peers.serve(run=Endless(), echo=echo)

    async def garbage(request: Any, context: RpcContext) -> AsyncIterator[Any]:
        yield 1
        for answer in list(server.homes._all):
            if answer._told is not None and answer._told.__self__ is context:  # type: ignore[attr-defined]
                answer.send(request.encode())
        await asyncio.sleep(0.01)
        yield 2

    other = await peers.serve(garbage=garbage)
    server = other
    client = await peers.client()
    for bad in ("\x00" * 100, "\x7f" * 100, "\x00" * 7 + "\x01" + "\x00" * 15 + "\x01" + "\x00" * 8 + "xy"):
        with pytest.raises((RpcClosedError, RpcProtocolError)):
            async for _ in await client.call(peers.instance("garbage", other), bad):
                pass
        assert await peers.items("echo", "fine") == ["fine"]
    await until(lambda: not peers.in_flight)


# --- the ends of servers and clients ----------------------------------------------------------------------------------


async def test_a_server_that_drains_ends_what_it_began_and_takes_nothing_new(peers: Peers) -> None:
    release = asyncio.Event()

    async def waits(request: Any) -> AsyncIterator[Any]:
        yield "began"
        await release.wait()
        yield request

    server = await peers.serve(run=waits)
    response = aiter(await peers.call("run", 7))
    assert await anext(response) == "began"
    stopping = asyncio.create_task(server.stop(30))
    await until(lambda: server._draining)
    with pytest.raises((RpcRefusedError, RpcUnreachableError)) as caught:
        await peers.call("run", 8)
    assert not caught.value.delivered
    assert not stopping.done()
    release.set()
    assert await anext(response) == 7
    assert await anext(response, "end") == "end"
    assert await stopping
    assert peers.served == {"ok": 1}
    assert await server.stop()  # once more is nothing


async def test_what_does_not_end_in_time_is_cut_off_and_its_callers_hear_of_it(peers: Peers) -> None:
    endless = Endless()
    server = await peers.serve(run=endless)
    response = await peers.call("run")
    await anext(aiter(response))
    stopping = asyncio.create_task(server.stop(0.2))
    with pytest.raises(RpcRemoteError, match="the server stops before the answer is whole"):
        async for _ in response:
            pass
    assert not await stopping
    assert endless.ends == ["cancelled"]
    assert peers.served == {"cut_off": 1}
    assert peers.in_flight == 0


async def test_a_server_may_start_again_under_the_same_clients(mode: str, plane_settings: dict[str, Any]) -> None:
    ports = {"tcp_rpc_port": free_port(), "http_rpc_port": free_port()}
    async with peers_of(mode, **(plane_settings | ports)) as peers:
        server = await peers.serve(echo=echo)
        instance = peers.instance("echo")
        for number in range(3):
            assert await peers.items("echo", number) == [number]
            await server.stop()
            with pytest.raises((RpcUnreachableError, RpcRefusedError)):
                await peers.call("echo")
            await server.start()
            assert peers.instance("echo") == instance
        assert await peers.items("echo", "again") == ["again"]
        await peers.ended(ok=4)


async def test_a_server_that_breaks_off_in_mid_stream_is_heard_of(peers: Peers) -> None:
    endless = Endless()
    server = await peers.serve(run=endless)
    responses = [await peers.call("run") for _ in range(20)]
    for response in responses:
        await anext(aiter(response))
    server.homes.close()
    for response in responses:
        with pytest.raises(RpcClosedError) as caught:
            async for _ in response:
                pass
        assert caught.value.delivered
    await peers.ended(killed=20)
    assert endless.ends == ["killed"] * 20
    assert peers.called == {"closed": 20}
    async with await peers.call("run") as response:  # and goes on
        await anext(aiter(response))


WORKER = """
import asyncio, json, sys
import rkmetrics as rk
from rkmetrics.planes import server_class

async def run(request):
    number = 0
    while True:
        yield number
        number += 1
        await asyncio.sleep(0.001)

async def main():
    mode, settings = sys.argv[1], json.loads(sys.argv[2])
    server = server_class(mode)(rk.Registry(rk.Settings(**settings), builtin=False), instance_id=7)
    server.endpoint("backend.run", run)
    await server.start()
    (instance,) = server.instances()
    print(json.dumps(instance), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_worker_that_is_killed_in_mid_stream_is_heard_of(mode: str, plane_settings: dict[str, Any]) -> None:
    if mode == "memory":
        pytest.skip("the memory plane ends with its process")
    from rkmetrics.planes.base import Instance

    own = {"tcp_rpc_host": "127.0.0.1", "http_rpc_host": "127.0.0.1", "http_rpc_port": 0, "namespace": "ns"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DYN_", "NATS_"))}
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, mode, json.dumps(own | plane_settings),
        stdout=asyncio.subprocess.PIPE, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert worker.stdout is not None
    async with peers_of(mode, **plane_settings) as peers:
        namespace, component, endpoint, id, transport = json.loads(await worker.stdout.readline())
        client = await peers.client()
        instance = Instance(namespace, component, endpoint, id, (transport[0], transport[1]))
        responses = [await client.call(instance, None) for _ in range(5)]
        for response in responses:
            await anext(aiter(response))
        worker.send_signal(signal.SIGKILL)
        for response in responses:
            with pytest.raises(RpcClosedError):
                async for _ in response:
                    pass
        await worker.wait()
        assert peers.called == {"closed": 5}
        assert peers.in_flight == 0
    worker._transport.close()  # type: ignore[attr-defined] # else its collection warns


async def test_a_client_that_is_closed_ends_its_calls(peers: Peers) -> None:
    endless = Endless()
    await peers.serve(run=endless)
    client = await peers.client()
    responses = [await client.call(peers.instance("run"), 1) for _ in range(5)]
    for response in responses:
        await anext(aiter(response))
    await client.close()
    for response in responses:
        with pytest.raises(RpcClosedError, match="the client was closed"):
            async for _ in response:
                pass
    await peers.ended(killed=5)
    assert peers.called == {"closed": 5}
    async with client, await client.call(peers.instance("run"), 1) as response:  # and may begin anew
        await anext(aiter(response))


async def test_a_client_that_is_closed_ends_calls_that_have_not_begun(peers: Peers) -> None:
    server = await peers.serve(echo=echo)
    server.take = lambda *_: None  # type: ignore[method-assign] # acknowledges, and does no more
    client = await peers.client()
    calls = [asyncio.create_task(client.call(peers.instance("echo"), 1)) for _ in range(5)]
    await asyncio.sleep(0.05)
    await client.close()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, RpcError) for result in results)
    assert peers.in_flight == 0


async def test_a_server_needs_endpoints_before_it_starts_and_none_twice(peers: Peers) -> None:
    with pytest.raises(ValueError, match="without endpoints"):
        await peers.serve()
    server = await peers.serve(echo=echo)
    with pytest.raises(ValueError, match="the server runs"):
        server.endpoint("backend.other", echo)
    await server.stop()
    with pytest.raises(ValueError, match=r"has 'ns\.backend\.echo' already"):
        server.endpoint("other.echo", echo)
    for name in ("echo", "a.b.c.d", "a.*", "a.b c", "a.>", "a.é", ""):
        with pytest.raises(ValueError, match=r"expected component\.endpoint"):
            server.endpoint(name, echo)


async def test_it_is_never_listed_where_nobody_reaches_it(peers: Peers) -> None:
    server = await peers.serve(echo=echo, count=count_to)
    found = list(server.instances())
    assert [each.endpoint for each in found] == ["echo", "count"]
    assert {each.instance_id for each in found} == {server.instance_id}
    assert all("0.0.0.0" not in each.transport[1] and ":0/" not in each.transport[1] for each in found)


async def test_after_renumbering_both_ids_are_served(peers: Peers) -> None:
    server = await peers.serve(echo=echo)
    old = peers.instance("echo")
    server.renumber(0xABC)
    new = peers.instance("echo")
    client = await peers.client()
    assert new.instance_id == server.instance_id == 0xABC

    async def answers(instance: Any) -> bool:
        try:
            return bool(await (await client.call(instance, "x")).one() == "x")
        except (RpcUnreachableError, RpcRefusedError):
            return False  # a subscription may be on its way

    for instance in (old, new):
        async with asyncio.timeout(60):
            while not await answers(instance):  # noqa: ASYNC110 - it may be on its way
                await asyncio.sleep(0.01)


async def test_what_a_server_answered_is_told(peers: Peers) -> None:
    told: list[tuple[str, str]] = []

    async def raises(_: Any) -> None:
        raise ValueError("no")

    def served(endpoint: Any, seconds: float, error: str) -> None:
        assert seconds > 0
        told.append((str(endpoint), error))

    await peers.serve(echo=echo, bad=raises, served=served)
    await peers.items("echo", 1)
    with pytest.raises(RpcRemoteError):
        await peers.items("bad", 1)
    await peers.ended(ok=1, error=1)
    assert told == [("ns.backend.echo", ""), ("ns.backend.bad", "ValueError: no")]


async def test_errors_of_handlers_are_logged_once(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    async def raises(_: Any) -> None:
        raise ValueError("the same again")

    caplog.set_level(logging.INFO, "rkmetrics")
    await peers.serve(bad=raises)
    for _ in range(20):
        with pytest.raises(RpcRemoteError):
            await peers.items("bad", 1)
    assert len([record for record in caplog.records if "the same again" in record.getMessage()]) == 1


# --- traces -----------------------------------------------------------------------------------------------------------

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"


async def traced(_: Any, context: RpcContext) -> AsyncIterator[Any]:
    yield [context.request.traceparent, context.trace_id]


async def test_a_trace_is_carried(peers: Peers) -> None:
    await peers.serve(run=traced)
    assert await peers.items("run", traceparent=TRACEPARENT) == [[TRACEPARENT, TRACE]]


@pytest.mark.parametrize(
    "bad", ["", "x", TRACEPARENT + "\r\nx: y", TRACEPARENT.upper(), "00-" + "0" * 32 + TRACEPARENT[35:]]
)
async def test_what_is_no_trace_is_not_carried(peers: Peers, bad: str) -> None:
    await peers.serve(run=traced)
    assert await peers.items("run", traceparent=bad) == [["", None]]


async def test_a_trace_is_passed_on_to_calls_that_a_handler_makes(peers: Peers) -> None:
    async def outer(_: Any) -> AsyncIterator[Any]:
        async for item in await peers.call("inner"):
            yield item

    await peers.serve(outer=outer, inner=traced)
    found = await peers.items("outer", traceparent=TRACEPARENT)
    assert found[0][1] == TRACE
    assert await peers.items("inner") != found  # what calls from outside carry is none of it


@pytest.fixture
def spans() -> Any:
    """Where finished spans are."""
    pytest.importorskip("opentelemetry.sdk.trace", reason="spans: pip install 'rkmetrics[otlp]'")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


async def test_spans_continue_over_the_wire(peers: Peers, spans: Any) -> None:
    async def outer(_: Any) -> AsyncIterator[Any]:
        async for item in await peers.call("inner"):
            yield item

    await peers.serve(outer=outer, inner=traced)
    await peers.items("outer")
    await peers.ended(ok=2)
    found = {(span.name, span.kind.name): span for span in spans.get_finished_spans()}
    chain = [
        found["ns.backend.inner", "SERVER"],
        found["ns.backend.inner", "CLIENT"],
        found["ns.backend.outer", "SERVER"],
        found["ns.backend.outer", "CLIENT"],
    ]
    assert len({span.context.trace_id for span in chain}) == 1
    for inner, outer_span in pairwise(chain):
        assert inner.parent.span_id == outer_span.context.span_id
    assert chain[3].parent is None
    assert chain[0].attributes["network.transport"] == peers.mode
    assert chain[1].attributes["rpc.outcome"] == "ok"


async def test_two_servers_with_one_address_is_said_at_the_start(mode: str, plane_settings: dict[str, Any]) -> None:
    if mode == "nats":
        pytest.skip("a subject may have several subscribers: the queue group")
    port = free_port()
    async with peers_of(mode, **plane_settings, tcp_rpc_port=port, http_rpc_port=port) as peers:
        await peers.serve(echo=echo, instance_id=1)
        with pytest.raises(ServeError):
            await peers.serve(echo=echo, instance_id=1)
