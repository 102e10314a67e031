"""A client and workers that misbehave: each call ends in its own time, nothing leaks, no answer goes astray."""

from __future__ import annotations

import asyncio
import gc
import random
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.errors import (
    RpcClosedError,
    RpcError,
    RpcProtocolError,
    RpcRefusedError,
    RpcRemoteError,
    RpcTimeoutError,
    RpcUnreachableError,
)
from rkmetrics.planes import callhome, calling
from rkmetrics.planes.base import Instance, RpcContext
from rkmetrics.planes.frame import ACCEPTED, encode_ack, encode_two_part
from rkmetrics.planes.tcp import TcpClient, TcpServer, read_target
from rkmetrics.planes.wire import (
    FINAL,
    PROLOGUE,
    SENTINEL,
    RequestHeader,
    encode_error,
    encode_item,
    encode_refusal,
)
from tests.hostile import until
from tests.planes.hostile import Counts, Worker, descriptors, ended, passed, registry, working

Behave = Callable[[Worker, RequestHeader, asyncio.StreamWriter], Awaitable[None]]
ONE, TWO = encode_item(b"1"), encode_item(b"2")


def client_of(of: rk.Registry, **options: Any) -> TcpClient:
    return TcpClient(of, **options)


def answers(*frames: bytes, then: str = "rest", ack: bytes = ACCEPTED) -> Behave:
    """Acknowledge, connect back, send frames after the handshake; then: rest, close or abort."""

    async def behave(worker: Worker, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
        writer.write(ack)
        reader, home = await worker.home(header, *frames)
        if then == "rest":
            with suppress(ConnectionError):
                await reader.read()
        if then == "abort":
            await until(lambda: not home.transport.get_write_buffer_size())
            home.transport.abort()
        home.close()

    return behave


def says(*acks: bytes, close: bool = False) -> Behave:
    """Acknowledge with bytes, and do nothing more."""

    async def behave(_: Worker, __: RequestHeader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(acks))
        if close:
            writer.close()

    return behave


async def late_ack(worker: Worker, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
    reader, _ = await worker.home(header, PROLOGUE, ONE, FINAL, SENTINEL)
    await reader.read(1)
    writer.write(ACCEPTED)


async def drips(worker: Worker, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
    writer.write(ACCEPTED)
    _, home = await worker.home(header)
    for byte in PROLOGUE + ONE + TWO + FINAL + SENTINEL:
        home.write(bytes([byte]))
        await home.drain()
        await asyncio.sleep(0)


async def twice(worker: Worker, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
    """The second one is sent away, and the first one's answer is whole."""
    writer.write(ACCEPTED)
    _, first = await worker.home(header, PROLOGUE, ONE)
    await asyncio.sleep(0.02)
    reader, _ = await worker.home(header, PROLOGUE, TWO, FINAL, SENTINEL)
    assert await reader.read() == b""
    first.write(FINAL + SENTINEL)


async def strangers(worker: Worker, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
    """Connections that know no subject are ended, and the answer comes all the same."""
    writer.write(ACCEPTED)
    for subject, more in (("nobody's", b""), ("", b""), (header.subject.upper(), b""), ("x" * 60_000, b"")):
        reader, _ = await worker.home(header, more, subject=subject)
        with suppress(ConnectionError):
            assert await reader.read() == b""
    host, _, port = header.address.rpartition(":")
    for garbage in (b"GET / HTTP/1.1\r\n\r\n" * 3, bytes(24), b"\xff" * 24, encode_two_part(b"[" * 60_000)):
        reader, home = await asyncio.open_connection(host, int(port))
        home.write(garbage)
        with suppress(ConnectionError):
            assert await reader.read() == b""
        await ended([home])
    await worker.home(header, PROLOGUE, ONE, FINAL, SENTINEL)


# What a worker does -> the items that its caller gets, what is raised then, and a part of what that says.
WORKERS: dict[str, tuple[Behave, list[Any], type[RpcError] | None, str]] = {
    "answers": (answers(PROLOGUE, ONE, TWO, FINAL, SENTINEL), [1, 2], None, ""),
    "answers nothing, in order": (answers(PROLOGUE, FINAL, SENTINEL), [], None, ""),
    "answers byte by byte": (drips, [1, 2], None, ""),
    "acknowledges after the answer": (late_ack, [1], None, ""),
    "acknowledges twice": (answers(PROLOGUE, ONE, FINAL, SENTINEL, ack=ACCEPTED * 2), [1], None, ""),
    "is sent away as strangers are": (strangers, [1], None, ""),
    "calls home twice": (twice, [1], None, ""),
    "acknowledges never": (says(), [], RpcTimeoutError, "no acknowledgement in 0.4 s"),
    "acknowledges and no more": (says(ACCEPTED), [], RpcTimeoutError, "no answer to the acknowledged request in 0.4 s"),
    "acknowledges with garbage": (says(b"\xff" * 4), [], RpcUnreachableError, "not an acknowledgement"),
    "acknowledges with half a word": (says(b"\0\0\0\x09abc"), [], RpcTimeoutError, "no acknowledgement"),
    "refuses": (says(encode_ack("Unknown endpoint: x")), [], RpcRefusedError, "Unknown endpoint: x"),
    "refuses in the prologue": (answers(encode_refusal("not now")), [], RpcRefusedError, "not now"),
    "refuses what it answers": (
        answers(PROLOGUE, ONE, ack=encode_ack("no")),
        [],
        RpcRefusedError,
        "no",
    ),
    "leaves before the acknowledgement": (says(close=True), [], RpcUnreachableError, "before the acknowledgement"),
    "raises": (answers(PROLOGUE, ONE, encode_error("it broke"), FINAL, SENTINEL), [1], RpcRemoteError, "it broke"),
    "has no prologue": (answers(ONE, FINAL, SENTINEL), [], RpcProtocolError, "prologue"),
    "has another first frame": (answers(encode_two_part(b"[]")), [], RpcProtocolError, "prologue"),
    "ends before it began": (answers(SENTINEL), [], RpcClosedError, "before it began"),
    "leaves before it began": (answers(then="close"), [], RpcClosedError, "ended"),
    "has a frame of both": (answers(PROLOGUE, ONE, encode_two_part(b"x", b"y")), [1], RpcProtocolError, "header"),
    "has a last word with more": (
        answers(PROLOGUE, ONE, encode_two_part(b'"sentinel"', b"x")),
        [1],
        RpcProtocolError,
        "header",
    ),
    "has an item that is none": (answers(PROLOGUE, ONE, encode_two_part(b"", b"5")), [1], RpcProtocolError, "item"),
    "has an item that is not wrapped": (
        answers(PROLOGUE, encode_two_part(b"", b'{"data":5,"complete_final":false}')),
        [],
        RpcProtocolError,
        "item",
    ),
    "has an empty frame": (answers(PROLOGUE, ONE, encode_two_part(b"")), [1], RpcProtocolError, "item"),
    "says the last word only": (answers(PROLOGUE, ONE, SENTINEL), [1], RpcClosedError, "without its end"),
    "says the end only, and leaves": (answers(PROLOGUE, ONE, FINAL, then="close"), [1], None, ""),
    "says the end only, and breaks off": (answers(PROLOGUE, ONE, FINAL, then="abort"), [1], None, ""),
    "says the end only, and stays": (answers(PROLOGUE, ONE, FINAL), [1], None, ""),
    "has data in its end": (
        answers(PROLOGUE, ONE, encode_two_part(b"", b'{"data":{"data":2},"complete_final":true}')),
        [1, 2],
        None,
        "",
    ),
    "goes on after its end": (answers(PROLOGUE, ONE, FINAL, TWO, TWO, SENTINEL), [1], None, ""),
    "says the last word twice": (answers(PROLOGUE, ONE, FINAL, SENTINEL, SENTINEL), [1], None, ""),
    "dies in the middle": (answers(PROLOGUE, ONE, TWO[:-3], then="close"), [1], RpcClosedError, "the connection ended"),
    "breaks off in the middle": (answers(PROLOGUE, ONE, then="abort"), [1], RpcClosedError, "the connection ended"),
    "falls silent": (answers(PROLOGUE, ONE), [1], RpcTimeoutError, "silent for 0.5 s"),
    "falls silent in a frame": (answers(PROLOGUE, ONE, TWO[:-3]), [1], RpcTimeoutError, "silent for 0.5 s"),
    "has a frame of 2^60": (
        answers(PROLOGUE, ONE, (2**60).to_bytes(16, "big") + bytes(8)),
        [1],
        RpcClosedError,
        "over the limit",
    ),
    "has a header of 2^60": (
        answers(PROLOGUE, ONE, (2**60).to_bytes(8, "big") + bytes(16)),
        [1],
        RpcClosedError,
        "over the limit",
    ),
}


@pytest.mark.parametrize("case", WORKERS)
async def test_a_call_ends_whatever_its_worker_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that came are read before what went wrong is raised; afterwards nothing is left of the call."""
    monkeypatch.setattr(callhome, "LAST_WORD_SECONDS", 0.05)
    behave, items, error, says = WORKERS[case]
    patient = error is not RpcTimeoutError
    mine = registry(tcp_request_timeout_seconds=20 if patient else 0.4)
    got: list[Any] = []
    async with working(behave) as worker, client_of(mine, silence_seconds=20 if patient else 0.5) as client:
        caught: RpcError | None = None
        try:
            async for item in await client.call(worker.instance(), {}):
                got.append(item)
        except RpcError as raised:
            caught = raised
        assert got == items
        assert type(caught) is (error or type(None))
        if caught is not None:
            assert says in caught.reason
            assert caught.endpoint == "dynamo.backend.echo"
            assert caught.delivered is (error is not RpcRefusedError)
        counts = Counts(mine)
        assert (counts.in_flight, sum(counts.called.values())) == ((0, 0), 1)
        assert client.home._waiting == {}
        await until(lambda: not len(client.home))


@pytest.mark.parametrize("case", WORKERS)
async def test_another_call_beside_it_is_not_harmed(case: str) -> None:
    """The same worker behaves well to calls of another endpoint, over the same connections where they stand."""
    misbehave = WORKERS[case][0]
    good = answers(PROLOGUE, ONE, TWO, FINAL, SENTINEL)

    async def behave(worker: Worker, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
        await (good if header.id.startswith("good") else misbehave)(worker, header, writer)

    async with working(behave) as worker, client_of(registry(tcp_request_timeout_seconds=0.4)) as client:

        async def bad() -> None:
            with suppress(RpcError, TimeoutError):
                async with asyncio.timeout(0.6):
                    async for _ in await client.call(worker.instance(), {}, id="bad"):
                        pass

        first = asyncio.create_task(bad())
        for number in range(20):
            for attempt in range(50):  # a connection that the other one broke may be in use: then it is said
                try:
                    found = [each async for each in await client.call(worker.instance(), {}, id=f"good{number}")]
                except (RpcUnreachableError, RpcTimeoutError):
                    assert attempt < 49
                    continue
                assert found == [1, 2]
                break
        await first


async def test_an_answer_without_end_is_held_back_and_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = 0

    async def endless(worker: Worker, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(ACCEPTED)
        _, home = await worker.home(header, PROLOGUE)
        item = encode_item(b'"%b"' % (b"x" * 1_000))
        while True:
            home.write(item)
            await home.drain()
            sent += 1

    async with working(endless) as worker, client_of(registry()) as client:
        response = await client.call(worker.instance(), {})
        call = response._call  # type: ignore[attr-defined]
        await until(lambda: call._held)
        before = -1
        while before != sent:  # until the worker has to wait
            before = sent
            await asyncio.sleep(0.05)
        chunk = 256 * 1024 // 1_000  # what asyncio reads at once
        assert len(call._items) <= calling.ITEMS_HIGH + 1 + chunk
        assert call._bytes <= calling.BYTES_HIGH + 256 * 1024
        got = 0
        async for _ in response:
            got += 1
            if got == 5_000:
                break
        await response.aclose()
        await until(lambda: not len(client.home))
        with pytest.raises(RpcProtocolError, match="more than one item"):
            await (await client.call(worker.instance(), {})).one()
        await until(lambda: not len(client.home))


async def held(call: Any) -> None:
    """Wait until a call reads no further."""
    await until(lambda: call._held)


async def test_a_reader_that_takes_its_time_is_no_silent_worker() -> None:
    """Where we do not read, the worker cannot be heard: with a deadline for all as without one."""
    many = answers(PROLOGUE, *[encode_item(b"%d" % number) for number in range(5_000)], FINAL, SENTINEL)
    async with working(many) as worker, client_of(registry(), silence_seconds=0.1) as client:
        for deadline in (None, 60.0):
            response = await client.call(worker.instance(), {}, timeout_seconds=deadline)
            call = response._call  # type: ignore[attr-defined]
            await held(call)
            await passed(0.3)
            assert [item async for item in response] == [*range(5_000)]


async def test_a_deadline_is_for_all_of_an_answer() -> None:
    async def slowly(worker: Worker, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED)
        _, home = await worker.home(header, PROLOGUE)
        while True:
            home.write(ONE)
            await home.drain()
            await asyncio.sleep(0.01)

    async with working(slowly) as worker, client_of(registry()) as client:
        response, got = await client.call(worker.instance(), {}, timeout_seconds=0.2), set[int]()
        with pytest.raises(RpcTimeoutError, match=r"not whole in 0\.2 s"):
            got.update([item async for item in response])
        await until(lambda: not len(client.home))
        for none in (0.0, -1.0):
            with pytest.raises(RpcTimeoutError):
                await client.call(worker.instance(), {}, timeout_seconds=none)


async def test_a_worker_that_acknowledges_nothing_is_asked_on_another_connection() -> None:
    """Its requests would wait in line for ever: the connection is given up with the first that is too late."""
    silent = True

    async def behave(worker: Worker, header: RequestHeader, writer: asyncio.StreamWriter) -> None:
        if not silent:
            await answers(PROLOGUE, ONE, FINAL, SENTINEL)(worker, header, writer)

    settings = {"tcp_request_timeout_seconds": 0.2, "tcp_pool_size": 1, "tcp_channel_buffer": 4}
    async with working(behave) as worker, client_of(registry(**settings)) as client:
        for found in await asyncio.gather(
            *(client.call(worker.instance(), {}) for _ in range(20)), return_exceptions=True
        ):
            assert isinstance(found, RpcTimeoutError | RpcUnreachableError)
        (pool,) = client._pools.values()
        await until(lambda: not pool._lines or not pool._lines[0].pending)
        silent = False
        assert [item async for item in await client.call(worker.instance(), {})] == [1]
        assert worker.connections >= 2


async def test_what_was_not_written_was_not_delivered() -> None:
    """`delivered` decides whether a router may ask somebody else."""

    async def leaves(_: Worker, __: RequestHeader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with working(leaves) as worker, client_of(registry()) as client:
        with pytest.raises(RpcUnreachableError) as error:
            await client.call(worker.instance(), {})
        assert error.value.delivered
        await until(lambda: worker.seen)
        line = await _line(client, worker.instance())
        call = asyncio.ensure_future(client.call(worker.instance(), {}))
        await asyncio.sleep(0)
        assert len(line.pending) == len(line._out) == 1
        line.connection_lost(None)  # between the turn in which it was sent and the one in which it is written
        with pytest.raises(RpcUnreachableError) as error:
            await call
        assert not error.value.delivered


async def _line(client: TcpClient, instance: Instance) -> Any:
    """A connection of the client that stands."""
    pool = client._pool(read_target(instance.transport[1]))
    pool._open()
    await until(lambda: pool._lines)
    return pool._lines[0]


PLACES = {
    "nothing there": ("tcp", "127.0.0.1:1/7/echo", "no connection"),
    "no host": ("tcp", ":1/echo", "expected host:port"),
    "no port": ("tcp", "127.0.0.1/echo", "expected host:port"),
    "port 0": ("tcp", "127.0.0.1:0/echo", "expected host:port"),
    "port 65536": ("tcp", "127.0.0.1:65536/echo", "expected host:port"),
    "a port of other digits": ("tcp", "127.0.0.1:\u0661\u0662/echo", "expected host:port"),
    "a power as port": ("tcp", "127.0.0.1:\xb2/echo", "expected host:port"),
    "no path": ("tcp", "127.0.0.1:1", "expected host:port"),
    "an empty path": ("tcp", "127.0.0.1:1/", "expected host:port"),
    "a path without end": ("tcp", "127.0.0.1:1/" + "x" * 70_000, "expected host:port"),
    "a path that is not ASCII": ("tcp", "127.0.0.1:1/\xe4", "expected host:port"),
    "a host that is no name": ("tcp", "x" * 300 + ":1/echo", "no connection"),
    "a host with a zero": ("tcp", "a\0b:1/echo", "no connection"),
    "half a character": ("tcp", "\ud800:1/echo", "no connection"),
    "another plane": ("http", "http://127.0.0.1:1/v1/rpc/echo", "this client speaks tcp"),
    "an unknown plane": ("carrier pigeon", "", "this client speaks tcp"),
}


@pytest.mark.parametrize("case", PLACES)
async def test_an_instance_that_cannot_be_reached_is_a_clear_error(case: str) -> None:
    """What is listed comes from a store that others write to."""
    kind, place, says = PLACES[case]
    mine = registry()
    async with client_of(mine) as client:
        with pytest.raises(RpcUnreachableError) as error:
            await client.call(Instance("dynamo", "backend", "echo", 7, (kind, place)), {})
        assert says in error.value.reason
        assert not error.value.delivered
        assert Counts(mine).called == {"unreachable": 1}
        assert client.home._waiting == {}
        await until(lambda: not client._pools)


async def test_servers_that_are_gone_leave_nothing_behind() -> None:
    """A worker takes another port each time it starts; a client that lives for months met thousands."""
    async with client_of(registry()) as client:
        for _ in range(10):
            async with working(answers(PROLOGUE, ONE, FINAL, SENTINEL)) as worker:
                assert await (await client.call(worker.instance(), {})).one() == 1
                for pool in client._pools.values():
                    for line in pool._lines:
                        line.close()
        await until(lambda: not client._pools)


async def _strangers(address: str, count: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    return [await asyncio.open_connection(host, int(port)) for _ in range(count)]


async def test_who_says_nothing_at_all_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callhome, "HANDSHAKE_SECONDS", 0.1)
    async with client_of(registry()) as client:
        found = await _strangers(client.home.address, 3)
        found[1][1].write(encode_two_part(b"x" * 100)[:60])  # nor half a word
        for reader, _ in found:
            with suppress(ConnectionError):
                assert await reader.read() == b""
        await until(lambda: not len(client.home))
        await ended([writer for _, writer in found])


async def test_strangers_do_not_keep_workers_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many connect and say nothing: the oldest of them goes, and a worker says at once whose answer it has."""
    monkeypatch.setattr(callhome, "STRANGERS_LIMIT", 5)
    async with working(answers(PROLOGUE, ONE, FINAL, SENTINEL)) as worker, client_of(registry()) as client:
        found = await _strangers(client.home.address, 12)
        await until(lambda: len(client.home) == 5)
        for reader, _ in found[:7]:
            with suppress(ConnectionError):
                assert await reader.read() == b""
        for _ in range(3):
            assert await (await client.call(worker.instance(), {})).one() == 1
        await ended([writer for _, writer in found])


async def test_more_connections_than_may_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callhome, "CONNECTIONS_LIMIT", 4)
    async with client_of(registry()) as client:
        found = await _strangers(client.home.address, 6)
        for reader, _ in found[4:]:
            with suppress(ConnectionError):
                assert await reader.read() == b""
        assert len(client.home) == 4
        await ended([writer for _, writer in found])


# --- its life ---------------------------------------------------------------------------------------------------------


async def test_calls_that_come_together_start_a_client_once() -> None:
    before = descriptors()
    async with working(answers(PROLOGUE, ONE, FINAL, SENTINEL)) as worker:
        client = client_of(registry())
        found = await asyncio.gather(*(client.call(worker.instance(), {}) for _ in range(50)))
        assert [await each.one() for each in found] == [1] * 50
        await client.close()
        await client.close()
    await until(lambda: descriptors() <= before)


async def test_a_closed_client_calls_nobody_until_it_is_started_again() -> None:
    async with working(answers(PROLOGUE, ONE, FINAL, SENTINEL)) as worker:
        client = client_of(registry())
        async with client:
            pass
        with pytest.raises(RpcUnreachableError, match="the client was closed"):
            await client.call(worker.instance(), {})
        async with client:
            assert await (await client.call(worker.instance(), {})).one() == 1


async def test_calls_in_flight_fail_when_the_client_is_closed() -> None:
    mine = registry()
    async with working(answers(PROLOGUE, ONE)) as begun, working(says(ACCEPTED)) as waiting:
        client = client_of(mine)
        response = await client.call(begun.instance(), {})
        assert await anext(aiter(response)) == 1
        call = asyncio.ensure_future(client.call(waiting.instance(), {}))
        await until(lambda: waiting.seen)
        nowhere = Instance("dynamo", "backend", "echo", 7, ("tcp", "192.0.2.1:9/x"))
        lost = asyncio.ensure_future(client.call(nowhere, {}))
        await asyncio.sleep(0)
        await client.close()
        for each in (call, lost):
            with pytest.raises(RpcError, match="the client was closed"):
                await each
        with pytest.raises(RpcClosedError, match="the client was closed"):
            await anext(aiter(response))
    assert Counts(mine).in_flight == (0, 0)


async def test_closing_while_it_starts_leaves_it_closed() -> None:
    client = client_of(registry())
    async with working(answers(PROLOGUE, ONE, FINAL, SENTINEL)) as worker:
        call = asyncio.ensure_future(client.call(worker.instance(), {}))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(RpcError):
            await (await call).one()
    assert not client._started
    assert not client._pools


def test_a_client_belongs_to_the_loop_that_it_was_started_in() -> None:
    client = client_of(registry())
    asyncio.run(client.start())
    nowhere = Instance("dynamo", "backend", "echo", 7, ("tcp", "127.0.0.1:1/x"))
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(client.call(nowhere, {}))

    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(client.close())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it was never closed
        del client
        gc.collect()


async def test_one_task_at_a_time_reads_an_answer() -> None:
    async with working(answers(PROLOGUE)) as worker, client_of(registry()) as client:
        response = await client.call(worker.instance(), {})
        first = asyncio.ensure_future(anext(aiter(response)))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one task at a time"):
            await anext(aiter(response))
        first.cancel()


async def test_an_answer_that_is_dropped_ends_its_call() -> None:
    mine = registry()
    async with working(answers(PROLOGUE, ONE)) as worker, client_of(mine) as client:
        response = await client.call(worker.instance(), {})
        assert Counts(mine).in_flight == (0, 1)
        del response
        gc.collect()
        await until(lambda: Counts(mine).in_flight == (0, 0))
        assert Counts(mine).called == {"cancelled": 1}
        await until(lambda: not len(client.home))


async def test_an_error_that_nobody_reads_is_counted_as_what_it_was() -> None:
    mine = registry()
    async with working(answers(PROLOGUE, ONE)) as worker, client_of(mine, silence_seconds=0.05) as client:
        response = await client.call(worker.instance(), {})
        await until(lambda: response._call._error)  # type: ignore[attr-defined]
        await response.aclose()
    assert Counts(mine).called == {"timeout": 1}


# --- all at once ------------------------------------------------------------------------------------------------------


async def echo(request: Any, context: RpcContext) -> AsyncIterator[Any]:
    """Items of the request's number, after pauses that differ."""
    for place in range(request["items"]):
        await asyncio.sleep(request["pause"])
        yield [request["number"], place]


async def test_a_thousand_calls_that_are_cancelled_at_any_moment_leave_nothing_and_meet_no_other() -> None:
    """An answer that reached another caller would have another number in it."""
    mine = registry()
    server, client = TcpServer(mine, instance_id=7), client_of(mine)
    server.endpoint("backend.echo", echo)
    chance = random.Random(5)
    outcomes = {"whole": 0, "cancelled": 0}
    tasks_before = len(asyncio.all_tasks())

    async def one(number: int) -> None:
        request = {"number": number, "items": chance.choice((0, 1, 5)), "pause": chance.choice((0, 0, 0.001, 0.01))}
        for place, item in enumerate([each async for each in await client.call(instance, request)]):
            assert item == [number, place]

    async def some(numbers: range) -> None:
        for number in numbers:
            task = asyncio.create_task(one(number))
            if chance.random() < 0.7:
                for _ in range(chance.randrange(12)):
                    await asyncio.sleep(0)
                await asyncio.sleep(chance.choice((0, 0, 0.0005, 0.003, 0.01)))
                task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()
            outcomes["cancelled" if task.cancelled() else "whole"] += 1

    await client.start()  # the loop's own descriptors are there
    before = descriptors()
    async with server, client:
        (instance,) = server.instances()
        await asyncio.gather(*(some(range(first, first + 50)) for first in range(0, 1_000, 50)))
        assert min(outcomes.values()) > 100
        counts = Counts(mine)
        await until(lambda: counts.in_flight == (0, 0))
        assert client.home._waiting == {}
        assert not server._tasks
        assert not server._answers
        assert sum(counts.called.values()) == 1_000
        response = await client.call(instance, {"number": -1, "items": 2, "pause": 0})
        assert [item async for item in response] == [[-1, 0], [-1, 1]]
    gc.collect()
    await until(lambda: descriptors() <= before)
    await until(lambda: len(asyncio.all_tasks()) == tasks_before)


async def test_two_hundred_callers_survive_a_server_that_is_restarted_again_and_again() -> None:
    mine = registry()
    client, over = client_of(mine), False
    good, failed = 0, 0

    def make(port: int) -> TcpServer:
        server = TcpServer(registry(tcp_rpc_port=port), instance_id=7)
        server.endpoint("backend.echo", echo)
        return server

    async def caller(number: int) -> None:
        nonlocal good, failed
        while not over:
            try:
                request = {"number": number, "items": 2, "pause": 0}
                found = [each async for each in await client.call(instance, request)]
            except (RpcUnreachableError, RpcClosedError, RpcRefusedError, RpcRemoteError):
                failed += 1
                await asyncio.sleep(0.005)
            else:
                assert found == [[number, 0], [number, 1]]
                good += 1

    def more_than(count: int) -> bool:
        return good > count

    server = make(0)
    await server.start()
    (instance,) = server.instances()
    port = int(server.address.rpartition(":")[2])
    async with client:
        callers = [asyncio.create_task(caller(number)) for number in range(200)]
        for _ in range(4):
            before = good
            await until(partial(more_than, before + 200))
            await server.stop(0)
            await asyncio.sleep(0.02)
            server = make(port)
            await server.start()
        before = good
        await until(lambda: good > before + 200)
        over = True
        await asyncio.gather(*callers)
        assert failed
        assert client.home._waiting == {}
        assert Counts(mine).in_flight == (0, 0)
        (pool,) = client._pools.values()
        assert len(pool) <= 50
        assert not pool._waiting
    await server.stop()
