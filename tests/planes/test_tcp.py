"""The tcp plane's server and callers that misbehave: answered or closed, counted, bounded; honest ones are served."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from struct import pack
from typing import Any

import pytest

from rkmetrics.errors import (
    RpcClosedError,
    RpcError,
    RpcRefusedError,
    RpcRemoteError,
    RpcTimeoutError,
    RpcUnreachableError,
    ServeError,
    SettingsError,
)
from rkmetrics.planes import callhome, listening, serving, tcp
from rkmetrics.planes.base import Instance, RpcContext
from rkmetrics.planes.frame import TcpRequest, encode_request, encode_two_part
from rkmetrics.planes.tcp import TcpClient, TcpServer
from rkmetrics.planes.wire import AGAIN, KILL, STOP
from rkmetrics.settings import Settings
from tests.hostile import until
from tests.planes.hostile import Caller, Counts, awaiting, descriptors, passed, registry

ID = 0x7D7BA1FBDCACD743
PATH = f"{ID:x}/echo"


class Handlers:
    """What is served, and what became of it."""

    def __init__(self) -> None:
        self.begun = self.cancelled = self.made = 0
        self.go_on = asyncio.Event()
        self.contexts: list[RpcContext] = []

    async def echo(self, request: Any) -> AsyncIterator[Any]:
        self.begun += 1
        yield request

    async def wait(self, request: Any, context: RpcContext) -> AsyncIterator[Any]:
        """An item, then nothing until the test says so."""
        self.begun += 1
        self.contexts.append(context)
        try:
            yield 1
            await self.go_on.wait()
            yield 2
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def endless(self, request: Any) -> AsyncIterator[Any]:
        """As fast as it goes, and never awaits anything itself."""
        self.begun += 1
        while True:
            self.made += 1
            yield "x" * 1_000

    async def stubborn(self, request: Any) -> AsyncIterator[Any]:
        """Swallows its cancellation."""
        self.begun += 1
        while True:
            try:
                await self.go_on.wait()
                return
            except asyncio.CancelledError:
                self.cancelled += 1
            yield "still here"

    async def deaf(self, request: Any) -> Any:
        """Swallows it too, and says nothing."""
        self.begun += 1
        while not self.go_on.is_set():
            with suppress(asyncio.CancelledError):
                await self.go_on.wait()

    async def turns(self, request: Any) -> Any:
        """Makes another error of its cancellation."""
        self.begun += 1
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            raise ValueError("something else") from None

    async def within(self, request: Any) -> Any:
        """Awaits what somebody else cancels."""
        task = asyncio.ensure_future(asyncio.Event().wait())
        asyncio.get_running_loop().call_soon(task.cancel)
        return await task


NAMES = ("echo", "wait", "endless", "stubborn", "deaf", "turns", "within")


class Serving:
    """A server with all handlers, and what it counts."""

    def __init__(self, *, settings: dict[str, Any] | None = None, **options: Any) -> None:
        self.registry = registry(**(settings or {}))
        self.handlers, self.counts = Handlers(), Counts(self.registry)
        self.server = TcpServer(self.registry, instance_id=ID, **options)
        for name in NAMES:
            self.server.endpoint(f"backend.{name}", getattr(self.handlers, name))

    def client(self, **settings: Any) -> TcpClient:
        return TcpClient(registry(**settings))

    def __getitem__(self, name: str) -> Instance:
        return next(each for each in self.server.instances() if each.endpoint == name)

    async def __aenter__(self) -> Serving:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.handlers.go_on.set()
        await self.server.stop(1)

    async def serves(self) -> None:
        """Fail where an honest caller is not served."""
        async with self.client() as client:
            assert await (await client.call(self["echo"], "honest")).one() == "honest"


# --- requests, however they come --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (PATH, b"{}"),
        (PATH, b'{"x-endpoint-path":"another"}'),
        (PATH, b""),
        (PATH, b"no JSON"),
        (PATH, None),
        ("echo", None),
        ("echo", b"{}"),
        ("/echo", b"{}"),
        (f"{ID:X}/echo", b"{}"),
    ],
)
async def test_one_server_takes_both_forms(path: str, headers: bytes | None) -> None:
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        for byte in encode_request(TcpRequest(path, headers, caller.payload(b'{"n":1}'))):
            caller.writer.write(bytes([byte]))
            await caller.writer.drain()
        await caller.answers()
        (connection,) = caller.connections
        assert caller.acks == [""]
        assert connection.bodies == [b'{"data":{"data":{"n":1}},"complete_final":false}', b'{"complete_final":true}']
        assert connection.headers == [b'{"subject":"s","stream_type":"response"}', b'{"error":null}', b'"sentinel"']
        await until(lambda: connection.over)  # a caller that does not say "again" has a connection for each answer


async def test_pipelined_requests_are_acknowledged_in_their_order() -> None:
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        expected = []
        for number in range(60):
            path, says = [
                (PATH, ""),
                ("missing", "Unknown endpoint: missing"),
                (f"{ID + 1:x}/echo", f"Unknown endpoint: {ID + 1:x}/echo"),
                ("echo", ""),
                ("x/y/echo", "Unknown endpoint: x/y/echo"),
                (f"{ID:x}/", f"Unknown endpoint: {ID:x}/"),
            ][number % 6]
            expected.append(says)
            caller.send(path, caller.payload(b"%d" % number, id=str(number)), b"{}" if "/" in path else None)
        await until(lambda: len(caller.acks) == 60)
        assert caller.acks == expected
        await caller.answers(20)
        got = sorted(int(body[16:].split(b"}")[0]) for c in caller.connections for body in c.bodies if b"data" in body)
        assert got == [number for number in range(60) if number % 6 in (0, 3)]
        assert serving.counts.refused == {"unknown_endpoint": 40}


MALFORMED: dict[str, Callable[[Caller], bytes]] = {
    "no two parts": lambda _: b"x" * 64,
    "empty": lambda _: b"",
    "no header": lambda _: encode_two_part(b"", b"{}"),
    "no body": lambda caller: caller.payload(b""),
    "a header that is no JSON": lambda _: encode_two_part(b"{", b"{}"),
    "lengths of 2^63": lambda _: pack(">QQQ", 2**63, 2**63, 0) + bytes(64),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_request_that_nobody_understands_is_refused_and_the_next_one_taken(case: str) -> None:
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        caller.send(PATH, MALFORMED[case](caller), b"{}")
        caller.send(PATH, caller.payload(), b"{}")
        await until(lambda: len(caller.acks) == 2)
        assert caller.acks == ["Malformed request", ""]
        assert serving.counts.refused == {"malformed": 1}


ENDING: dict[str, tuple[bytes, str, str]] = {
    "garbage": (b"\xff" * 64, "Malformed request", "malformed"),
    "http": (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", "Malformed request", "malformed"),
    "a path without end": (b"\x10\x00" + b"x" * 100, "Malformed request", "malformed"),
    "too large": (pack(">H4sI", 4, b"echo", 1 << 30) + bytes(40), "Request too large", "too_large"),
    "too large, with headers": (
        pack(">H21sH2sI", 21, PATH.encode(), 2, b"{}", 1 << 30) + bytes(40),
        "Request too large",
        "too_large",
    ),
}


@pytest.mark.parametrize("case", ENDING)
async def test_what_can_be_no_request_ends_the_connection_after_what_came_before(case: str) -> None:
    """All in one piece: the acknowledgement of the good request is there, then the reason, then the end."""
    data, says, counted = ENDING[case]
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        good = encode_request(TcpRequest(PATH, b"{}", caller.payload()))
        caller.writer.write(good + data)
        await until(lambda: caller.over)
        assert caller.acks == ["", says]
        await caller.answers()
        assert serving.counts.refused == {counted: 1}
        await serving.serves()


async def test_who_goes_on_sending_what_is_too_large_still_reads_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing at once, with bytes unread, would make TCP take the answer back; waiting for ever would be another."""
    monkeypatch.setattr(listening, "LINGER_SECONDS", 0.2)
    async with Serving(settings={"tcp_max_message_size_bytes": 100_000}) as serving:
        async with awaiting(serving.server.address) as caller:
            caller.writer.write(pack(">H4sI", 4, b"echo", 100_001))
            with suppress(ConnectionError):
                for _ in range(200):
                    caller.writer.write(bytes(20_000))
                    await caller.writer.drain()
            await until(lambda: caller.over)
            assert caller.acks == ["Request too large"]
            await until(lambda: not serving.counts.connections)
            assert serving.server.kept_bytes == 0


# --- slow, silent and many --------------------------------------------------------------------------------------------


async def test_a_request_that_is_not_complete_in_time_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "FRAME_SECONDS", 0.1)
    async with Serving() as serving:
        for half in (1, 2, 10, 40, 200):
            async with awaiting(serving.server.address) as caller:
                caller.writer.write(encode_request(TcpRequest(PATH, b"{}", caller.payload()))[:half])
                await over(caller)
        assert serving.counts.refused == {"too_slow": 5}
        assert serving.server.kept_bytes == 0
        await serving.serves()


async def test_a_busy_connection_that_always_has_half_a_request_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads end in the middle of a request; the one that is incomplete is always another."""
    monkeypatch.setattr(tcp, "FRAME_SECONDS", 0.15)
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        loop = asyncio.get_running_loop()
        request = encode_request(TcpRequest("missing", None, caller.payload()))
        caller.writer.write(request[:50])
        began = loop.time()
        while loop.time() < began + 0.6:
            caller.writer.write(request[50:] + request[:50])
            await asyncio.sleep(0.01)
        assert not caller.over
        assert "too_slow" not in serving.counts.refused
        await until(lambda: caller.over)  # once it really is
        assert serving.counts.refused["too_slow"] == 1


async def test_a_connection_without_a_request_may_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "FRAME_SECONDS", 0.05)
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        caller.send(PATH, caller.payload(), b"{}")
        await caller.answers()
        await passed(0.2)
        caller.send(PATH, caller.payload(), b"{}")
        await caller.answers(2)
        assert not caller.over


async def test_who_does_not_read_acknowledgements_is_not_read_either() -> None:
    async with Serving() as serving, awaiting(serving.server.address, read=False) as caller:
        sock = caller.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        request = encode_request(TcpRequest("x" * 1_000, None, bytes(40)))
        (connection,) = await _callers(serving, 1)
        transport = connection.transport
        while transport.is_reading():
            caller.writer.write(request * 50)
            with suppress(TimeoutError):
                await asyncio.wait_for(caller.writer.drain(), 0.2)
        assert not transport.is_reading()
        largest_answer = 256 * 1024 // len(request) * 1_100  # to what one read can have of requests
        assert transport.get_write_buffer_size() <= 64 * 1024 + largest_answer
        await serving.serves()


async def over(caller: Caller) -> None:
    """Wait until the server has ended the connection of requests."""
    await until(lambda: caller.over)


async def _callers(serving: Serving, count: int) -> list[Any]:
    await until(lambda: len(serving.server._guests) == count)
    return list(serving.server._guests)


async def test_when_there_are_too_many_connections_the_oldest_without_a_request_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TcpServer, "connections_limit", 3)
    async with Serving() as serving:
        async with awaiting(serving.server.address) as honest:
            honest.send(PATH, honest.payload(), b"{}")
            await honest.answers()
            idle = [await asyncio.open_connection(*serving.server.address.split(":")) for _ in range(5)]
            await until(lambda: serving.counts.refused == {"busy": 3})
            assert [await reader.read() for reader, _ in idle[:3]] == [b"", b"", b""]
            assert serving.counts.connections == 3
            honest.send(PATH, honest.payload(), b"{}")
            await honest.answers(2)
            await serving.serves()
            for _, writer in idle:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()


async def test_incomplete_requests_together_take_no_more_memory_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TcpServer, "kept_limit_bytes", 400_000)
    async with Serving(settings={"tcp_max_message_size_bytes": 100_000}) as serving:
        callers = [await asyncio.open_connection(*serving.server.address.split(":")) for _ in range(8)]
        for _, writer in callers:
            writer.write(pack(">H4sI", 4, b"echo", 100_000) + bytes(90_000))
        await until(lambda: serving.counts.refused == {"busy": 4})
        assert serving.server.kept_bytes <= 400_000
        await serving.serves()
        for _, writer in callers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        await until(lambda: serving.server.kept_bytes == 0)


async def test_more_requests_than_may_be_answered_at_once_are_refused() -> None:
    async with Serving(requests_limit=2) as serving, serving.client() as client:
        held = [await client.call(serving["wait"], {}) for _ in range(2)]
        with pytest.raises(RpcRefusedError, match="Too many requests") as error:
            await client.call(serving["echo"], {})
        assert not error.value.delivered
        assert serving.counts.in_flight[0] == 2
        serving.handlers.go_on.set()
        assert [[item async for item in response] for response in held] == [[1, 2], [1, 2]]
        await until(lambda: not serving.server._tasks)
        await serving.serves()
        assert serving.counts.refused == {"busy": 1}


async def test_half_open_callers_are_probed_by_tcp() -> None:
    """A peer whose machine is gone says nothing for ever: the system asks, on each of the four kinds of connection."""
    async with Serving() as serving, serving.client() as client:
        response = await client.call(serving["wait"], {})
        (caller,), (answer,) = await _callers(serving, 1), serving.server.homes._all
        (home,), (pool,) = client.home._homes, client._pools.values()
        for transport in (caller.transport, answer._transport, home._transport, pool._lines[0].transport):
            assert transport is not None
            sock = transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        await response.aclose()


# --- the way home -----------------------------------------------------------------------------------------------------

FORBIDDEN = [
    "0.0.0.0:9",
    "[::]:9",
    "[::ffff:0.0.0.0]:9",
    "224.0.0.1:9",
    "[ff02::1]:9",
    "255.255.255.255:9",
    "240.0.0.1:9",
    "169.254.169.254:80",
    "[::ffff:169.254.169.254]:80",
    "[64:ff9b::a9fe:a9fe]:80",
    "[fe80::1]:9",
    "[fe80::1%lo]:9",
    "[fd00:ec2::254]:80",
    "[fd20:ce::254]:80",
    "168.63.129.16:80",
    "100.100.100.200:80",
    "127.0.0.1:0",
    "127.0.0.1:65536",
    "127.0.0.1:-1",
    "127.0.0.1:+9",
    "127.0.0.1: 9",
    "127.0.0.1:\u0661",
    "127.0.0.1",
    "127.1:9",
    "0x7f000001:9",
    "2130706433:9",
    "localhost:9",
    "metadata.google.internal:80",
    "127.0.0.1:9/x",
    "/tmp/socket",
    ":9",
    "",
]


@pytest.mark.parametrize("address", FORBIDDEN)
async def test_no_answer_goes_where_no_caller_can_be(address: str) -> None:
    """Whoever can send a request chooses where its answer goes: he is told at once that it goes nowhere."""
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        caller.send(PATH, caller.payload(address=address), b"{}")
        await until(lambda: caller.acks)
        assert caller.acks == ["Forbidden address"]
        assert (serving.handlers.begun, serving.counts.refused) == (0, {"forbidden": 1})
        assert serving.counts.served == {}


async def test_addresses_may_be_limited_further() -> None:
    asked: list[str] = []

    def allowed(address: str) -> bool:
        asked.append(address)
        return address.startswith("10.")

    async with Serving(homes_allowed=allowed) as serving:
        async with awaiting(serving.server.address) as caller:
            for address in (caller.address, f"[::ffff:{caller.address.replace(':', ']:')}"):
                caller.send(PATH, caller.payload(address=address), b"{}")
            await until(lambda: len(caller.acks) == 2)
            assert caller.acks == ["Forbidden address"] * 2
            assert asked == ["127.0.0.1", "127.0.0.1"]
        async with serving.client() as client:
            with pytest.raises(RpcRefusedError, match="Forbidden address"):
                await client.call(serving["echo"], {})


async def test_a_caller_that_cannot_be_reached_costs_a_request_and_no_more() -> None:
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        with socket.socket() as sock:  # bound, and nobody listens
            sock.bind(("127.0.0.1", 0))
            caller.send(PATH, caller.payload(address=f"127.0.0.1:{sock.getsockname()[1]}"), b"{}")
            await until(lambda: serving.counts.served == {"no_way_home": 1})
        assert (caller.acks, serving.handlers.begun, serving.counts.in_flight) == ([""], 0, (0, 0))


async def test_connections_to_callers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callhome, "CONNECTIONS_LIMIT", 2)
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        for number in range(4):
            caller.send(f"{ID:x}/wait", caller.payload(id=str(number)), b"{}")
        await until(lambda: serving.counts.served == {"no_way_home": 2})
        assert len(serving.server.homes) == 2


async def test_a_caller_that_dies_has_its_handler_cancelled() -> None:
    async with Serving() as serving:
        async with awaiting(serving.server.address) as caller:
            caller.send(f"{ID:x}/wait", caller.payload(), b"{}")
            await until(lambda: caller.connections and caller.connections[0].bodies)
            caller.connections[0].writer.transport.abort()
            await until(lambda: serving.counts.served == {"killed": 1})
        assert (serving.handlers.cancelled, serving.counts.in_flight) == (1, (0, 0))
        assert serving.handlers.contexts[0].is_killed()
        assert not len(serving.server.homes)


async def test_a_caller_that_says_kill_has_its_handler_cancelled() -> None:
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        caller.send(f"{ID:x}/wait", caller.payload(), b"{}")
        await until(lambda: caller.connections and caller.connections[0].bodies)
        caller.connections[0].writer.write(encode_two_part(b"what?") + encode_two_part(b"", b"x") + KILL + KILL)
        await caller.answers()
        assert serving.counts.served == {"killed": 1}
        assert caller.connections[0].bodies == [b'{"data":{"data":1},"complete_final":false}']


async def test_a_caller_that_says_stop_gets_the_last_word_without_the_end() -> None:
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        caller.send(f"{ID:x}/wait", caller.payload(), b"{}")
        await until(lambda: caller.connections and caller.connections[0].bodies)
        caller.connections[0].writer.write(STOP)
        await until(lambda: serving.handlers.contexts[0].is_stopped())
        assert not serving.handlers.contexts[0].is_killed()
        serving.handlers.go_on.set()
        await caller.answers()
        assert b'{"complete_final":true}' not in caller.connections[0].bodies
        assert serving.counts.served == {"stopped": 1}


@pytest.mark.parametrize("garbage", [b"\xff" * 24, encode_two_part(b"x" * 5_000), b"GET / HTTP/1.1\r\n\r\nxxxxxx"])
async def test_a_caller_that_says_what_is_no_frame_is_left(garbage: bytes) -> None:
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        caller.send(f"{ID:x}/wait", caller.payload(), b"{}")
        await until(lambda: caller.connections and caller.connections[0].bodies)
        caller.connections[0].writer.write(garbage)
        await until(lambda: serving.counts.served == {"killed": 1})


async def test_a_handler_that_never_pauses_lets_others_in_and_its_slow_caller_holds_it() -> None:
    async with Serving() as serving:
        async with awaiting(serving.server.address, read=False) as caller:
            caller.send(f"{ID:x}/endless", caller.payload(), b"{}")
            await until(lambda: caller.connections)
            before = -1
            while before != serving.handlers.made:
                before = serving.handlers.made
                await serving.serves()
                await asyncio.sleep(0.05)
            (answer,) = [each for each in serving.server.homes._all if not each.over]
            assert answer._transport is not None
            assert answer._transport.get_write_buffer_size() <= 64 * 1024 + 2 * callhome.TURN_BYTES
            assert not answer._out
            assert serving.counts.in_flight[0] == 1
        await until(lambda: serving.counts.served.get("killed") == 1)


async def test_a_caller_that_reads_nothing_at_all_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callhome, "SLOW_SECONDS", 0.1)
    async with Serving() as serving, awaiting(serving.server.address, read=False) as caller:
        caller.send(f"{ID:x}/endless", caller.payload(), b"{}")
        await until(lambda: serving.counts.served == {"killed": 1})
        assert not len(serving.server.homes)


# --- one connection for many answers ----------------------------------------------------------------------------------


async def _again(caller: Caller, *words: bytes) -> None:
    """A caller of ours: it may say "again"."""
    caller.send(PATH, caller.payload(reuse=True), b"{}")
    await caller.answers(caller.whole + 1)
    caller.connections[-1].writer.write(b"".join(words))


async def test_a_connection_is_used_again_once_its_caller_says_so() -> None:
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        for _ in range(5):
            await _again(caller, AGAIN)
            await until(lambda: serving.server.homes._idle.get(caller.address))
        assert len(caller.connections) == 1
        assert caller.connections[0].headers.count(b'"sentinel"') == 5


async def test_who_never_says_again_gets_another_connection_and_the_first_one_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callhome, "WORKER_IDLE_SECONDS", 0.1)
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        for _ in range(3):
            await _again(caller)
        assert len(caller.connections) == 3
        await until(lambda: all(connection.over for connection in caller.connections))
        assert not len(serving.server.homes)
        assert serving.server.homes._sweep is None or not len(serving.server.homes)


async def test_a_connection_that_rests_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callhome, "WORKER_IDLE_SECONDS", 0.1)
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        await _again(caller, AGAIN)
        await until(lambda: caller.connections[0].over)
        assert serving.server.homes._idle == {}
        await _again(caller, AGAIN)
        assert len(caller.connections) == 2


async def test_a_caller_ends_what_a_worker_lets_rest_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callhome, "CALLER_IDLE_SECONDS", 0.1)
    async with Serving() as serving, serving.client() as client:
        assert await (await client.call(serving["echo"], 1)).one() == 1
        await until(lambda: not len(client.home))
        held = await client.call(serving["wait"], 1)  # what carries an answer does not rest
        assert await anext(aiter(held)) == 1
        await passed(0.3)
        assert len(client.home) == 1
        serving.handlers.go_on.set()
        assert [item async for item in held] == [2]


async def test_again_said_twice_is_no_second_connection() -> None:
    """Two answers at once would share it."""
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        await _again(caller, AGAIN, AGAIN, AGAIN)
        await until(lambda: serving.server.homes._idle.get(caller.address))
        await asyncio.sleep(0.02)
        assert len(serving.server.homes._idle[caller.address]) == 1
        for _ in range(3):
            caller.send(f"{ID:x}/wait", caller.payload(reuse=True), b"{}")
        await until(lambda: sum(len(c.bodies) for c in caller.connections) == 2 + 3)
        assert len(caller.connections) == 3


async def test_again_said_too_early_is_not_heard() -> None:
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        caller.send(f"{ID:x}/wait", caller.payload(reuse=True), b"{}")
        await until(lambda: caller.connections and caller.connections[0].bodies)
        caller.connections[0].writer.write(AGAIN)
        await serving.serves()
        assert not serving.server.homes._idle.get(caller.address)
        await _again(caller)
        assert len(caller.connections) == 2
        serving.handlers.go_on.set()
        await caller.answers(2)


@pytest.mark.parametrize("late", [STOP, KILL])
async def test_a_late_word_meets_no_other_answer(late: bytes) -> None:
    """It was said before the sentinel was read: such a caller does not say "again"; one that does harms itself only."""
    async with Serving() as serving, awaiting(serving.server.address) as caller:
        await _again(caller, late)
        caller.send(f"{ID:x}/wait", caller.payload(reuse=True), b"{}")
        await until(lambda: len(caller.connections) == 2 and caller.connections[1].bodies)
        assert not serving.handlers.contexts[0].is_stopped()


async def test_our_own_client_ends_a_connection_on_which_it_said_stop() -> None:
    async with Serving() as serving, serving.client() as client:
        for number in range(200):
            response = await client.call(serving["echo"], number)
            if number % 3 == 0:
                response.stop()
            assert [item async for item in response] == [number]
            if number % 3 == 1:
                stopped = await client.call(serving["wait"], number)
                await stopped.aclose()
        assert serving.counts.served.get("ok", 0) + serving.counts.served.get("stopped", 0) >= 200


# --- handlers that misbehave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stubborn", "turns"])
async def test_a_handler_that_swallows_its_cancellation_is_counted_as_killed(name: str) -> None:
    async with Serving() as serving, serving.client() as client:
        response = await client.call(serving[name], {})
        await until(lambda: serving.handlers.begun)
        await response.aclose()
        await until(lambda: serving.counts.served == {"killed": 1})
        assert serving.counts.in_flight == (0, 0)


async def test_a_handler_that_awaits_what_others_cancel_raises_and_is_not_cut_off() -> None:
    async with Serving() as serving, serving.client() as client:
        with pytest.raises(RpcRemoteError, match="cancelled from within"):
            await (await client.call(serving["within"], {})).one()
        assert serving.counts.served == {"error": 1}


class Odd(Exception):
    """Cannot be written out."""

    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (ValueError("no"), "ValueError: no"),
        (Odd(), "Odd"),
        (ValueError("x" * 10_000_000), "ValueError: xxxx"),
        (ValueError("\ud800"), "ValueError: ?"),
        (KeyError(), "KeyError"),
    ],
)
async def test_what_a_handler_raises_is_told_to_its_caller(raised: Exception, says: str) -> None:
    async def fails(request: Any) -> Any:
        raise raised

    found = Serving(settings={"tcp_max_message_size_bytes": 100_000})
    found.server.endpoint("backend.fails", fails)
    async with found as serving, serving.client(tcp_max_message_size_bytes=100_000) as client:
        with pytest.raises(RpcRemoteError) as error:
            await (await client.call(serving["fails"], {})).one()
        assert error.value.reason.startswith(says)
        assert serving.counts.served == {"error": 1}


# --- its life ---------------------------------------------------------------------------------------------------------


async def test_stop_waits_for_answers_and_refuses_new_requests() -> None:
    async with Serving() as serving, serving.client() as client:
        response = await client.call(serving["wait"], {})
        instance = serving["echo"]
        stopping = asyncio.ensure_future(serving.server.stop(30))
        await until(lambda: serving.server._draining)
        with pytest.raises(RpcRefusedError, match="Draining"):
            await client.call(instance, {})
        serving.handlers.go_on.set()
        assert [item async for item in response] == [1, 2]
        assert await stopping
        with pytest.raises(RpcUnreachableError):
            await client.call(instance, {})


async def test_what_does_not_end_in_time_is_cut_off_and_its_caller_hears_of_it() -> None:
    async with Serving() as serving, serving.client() as client:
        response = await client.call(serving["wait"], {})
        assert not await serving.server.stop(0)
        with pytest.raises(RpcRemoteError, match="the server stops"):
            assert [item async for item in response] == []
        assert serving.counts.served == {"cut_off": 1}
        assert serving.counts.in_flight == (0, 0)


async def test_a_request_whose_handler_has_not_begun_is_not_lost_without_a_word() -> None:
    """It was acknowledged: its caller would wait for all of its time-out, and could have asked somebody else."""
    async with Serving() as serving, serving.client() as client:
        connect, reached = serving.server.homes._connect, asyncio.Event()

        async def slowly(answer: callhome.Answer) -> None:
            await reached.wait()
            await connect(answer)

        serving.server.homes._connect = slowly  # type: ignore[method-assign]
        calls = [asyncio.ensure_future(client.call(serving["echo"], {})) for _ in range(3)]
        await until(lambda: len(serving.server._tasks) == 3)
        stopping = asyncio.ensure_future(serving.server.stop(0))
        await until(lambda: serving.server._cut)
        reached.set()
        for call in calls:
            with pytest.raises(RpcRefusedError, match="Draining") as error:
                await call
            assert not error.value.delivered
        assert not await stopping
        assert (serving.counts.served, serving.handlers.begun) == ({"cut_off": 3}, 0)


async def test_stopping_does_not_wait_for_callers_that_are_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ENDED_SECONDS", 0.1)
    async with Serving() as found, awaiting(found.server.address) as caller:

        async def never(answer: callhome.Answer) -> None:
            await asyncio.Event().wait()

        found.server.homes._connect = never  # type: ignore[method-assign]
        caller.send(PATH, caller.payload(), b"{}")
        await until(lambda: found.server._tasks)
        assert not await found.server.stop(0)
        assert not found.server._tasks
        assert found.counts.served == {"cut_off": 1}


@pytest.mark.parametrize("name", ["stubborn", "deaf", "turns"])
async def test_a_handler_that_ignores_the_end_does_not_keep_the_server(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "ENDED_SECONDS", 0.1)
    async with Serving() as found, found.client() as client:
        response = await client.call(found[name], {})
        await until(lambda: found.handlers.begun)
        assert not await found.server.stop(0)
        with pytest.raises((RpcRemoteError, RpcClosedError)):
            assert {item async for item in response} == {"still here"}
        found.handlers.go_on.set()
        await until(lambda: not found.server._tasks)


async def test_stopping_does_not_cut_what_a_slow_caller_has_still_to_read() -> None:
    """The handler is done; what it made lies in the server's memory, larger than what the system buffers."""

    async def large(request: Any) -> Any:
        return "x" * 20_000_000

    found = Serving()
    found.server.endpoint("backend.large", large)
    async with found as serving, awaiting(serving.server.address, read=False) as caller:
        caller.send(f"{ID:x}/large", caller.payload(), b"{}")
        await until(lambda: serving.counts.served == {"ok": 1})
        (answer,) = serving.server.homes._all
        assert answer._transport is not None
        assert answer._transport.get_write_buffer_size() > 1_000_000
        stopping = asyncio.ensure_future(serving.server.stop(30))
        await asyncio.sleep(0.05)
        await caller.connections[0].read()
        assert caller.connections[0].headers[-1] == b'"sentinel"'
        assert len(caller.connections[0].bodies[0]) > 20_000_000
        assert await stopping


async def test_stopping_does_not_wait_for_a_caller_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ENDED_SECONDS", 0.1)

    async def large(request: Any) -> Any:
        return "x" * 20_000_000

    found = Serving()
    found.server.endpoint("backend.large", large)
    async with found as serves, awaiting(serves.server.address, read=False) as caller:
        caller.send(f"{ID:x}/large", caller.payload(), b"{}")
        await until(lambda: serves.counts.served == {"ok": 1})
        assert await serves.server.stop(0.1)
        assert not len(serves.server.homes)


async def test_a_handler_may_stop_its_own_server_and_its_caller_gets_the_answer() -> None:
    found = Serving()

    async def last(request: Any) -> Any:
        return await found.server.stop(5)

    found.server.endpoint("backend.last", last)
    async with found as serving, serving.client() as client:
        assert await (await client.call(serving["last"], {})).one() is True
        await until(lambda: not serving.server._tasks)
        assert not serving.server.started


async def test_a_server_starts_again_and_uses_connections_again() -> None:
    found = Serving()
    for _ in range(3):
        async with found as serving, serving.client() as client:
            for number in range(5):
                assert await (await client.call(serving["echo"], number)).one() == number
            assert len(serving.server.homes) == 1
    assert (await found.server.stop(), await found.server.stop()) == (True, True)


async def test_starts_and_stops_that_come_together_are_done_in_turn() -> None:
    before = descriptors()
    found = Serving()
    server = found.server
    await asyncio.gather(server.start(), server.start(), server.stop(), server.start(), server.stop(1), server.stop(1))
    assert not server.started
    await asyncio.gather(server.start(), server.start())
    await found.serves()
    await asyncio.gather(server.stop(), server.stop())
    await until(lambda: descriptors() <= before)


async def test_a_stop_that_is_cancelled_leaves_nothing_open() -> None:
    before = descriptors()
    async with Serving() as serving, serving.client() as client:
        response = await client.call(serving["wait"], {})
        stopping = asyncio.ensure_future(serving.server.stop(60))
        await until(lambda: serving.server._draining)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        with pytest.raises(RpcError):
            assert [item async for item in response] == []
        assert not serving.server.started
    await until(lambda: descriptors() <= before)


def test_a_server_belongs_to_the_loop_that_it_was_started_in() -> None:
    async def start() -> Serving:
        return await Serving().__aenter__()

    with asyncio.Runner() as runner:
        found = runner.run(start())
        with pytest.raises(RuntimeError, match="another event loop"):
            asyncio.run(found.server.start())
        runner.run(found.server.stop())


class Lists(serving.Lister):
    """A lister that misbehaves as it is told."""

    def __init__(self, run: Exception | None = None, withdraw: Exception | None = None, hang: bool = False) -> None:
        self._run, self._withdraw, self._hang = run, withdraw, hang

    async def run(self, server: serving.PlaneServer) -> None:
        if self._run is not None:
            raise self._run
        await asyncio.Event().wait()

    async def withdraw(self) -> None:
        if self._hang:
            await asyncio.Event().wait()
        if self._withdraw is not None:
            raise self._withdraw


@pytest.mark.parametrize(
    ("lister", "says"),
    [
        (Lists(run=OSError("etcd is away")), "listed no more"),
        (Lists(withdraw=OSError("etcd is away")), "could not be withdrawn"),
        (Lists(hang=True), "could not be withdrawn"),
    ],
)
async def test_a_lister_that_fails_does_not_keep_a_server_from_serving_or_stopping(
    lister: Lists, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Serving(lister=lister) as found:
        await found.serves()
        await found.server.stop(0.2)
        assert not found.server.started
    assert says in caplog.text


# --- settings: each has an effect -------------------------------------------------------------------------------------


def settings_of(**variables: str) -> dict[str, Any]:
    """What the environment says, as Settings takes it; but for the host always loopback."""
    found = Settings.from_env(variables)
    return {name: getattr(found, name) for name in Settings.__dataclass_fields__ if name.startswith(("tcp_", "wire"))}


def local(**variables: str) -> dict[str, Any]:
    return settings_of(**{"DYN_TCP_RPC_HOST": "127.0.0.1"} | variables)


async def test_rpc_host_is_where_a_server_and_its_clients_listen() -> None:
    async with Serving(settings=settings_of(DYN_TCP_RPC_HOST="127.0.0.2")) as serving:
        assert serving.server.address.startswith("127.0.0.2:")
        assert serving["echo"].transport[1].startswith("127.0.0.2:")
        async with serving.client(**settings_of(DYN_TCP_RPC_HOST="127.0.0.3")) as client:
            assert client.home.address.startswith("127.0.0.3:")
            assert await (await client.call(serving["echo"], 1)).one() == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "::"])
async def test_all_addresses_are_never_advertised_as_such(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is reached at what is advertised: "::" is bound to IPv6 alone, so an IPv6 address is told."""
    addresses = {"::": ["127.0.0.9", "fd00::9"]}.get(host, ["127.0.0.1", "10.0.1.9", "fd00::9"])
    monkeypatch.setattr("rkmetrics.addresses.local_addresses", lambda: addresses)
    try:
        async with Serving(settings=settings_of(DYN_TCP_RPC_HOST=host)) as serving:
            address, _, port = serving.server.address.rpartition(":")
            assert address == {"::": "[fd00::9]"}.get(host, "10.0.1.9")
            assert int(port)
            client = serving.client(**settings_of(DYN_TCP_RPC_HOST=host))
            async with client:
                assert client.home.address.startswith(f"{address}:")
    except ServeError as error:
        if host == "::":
            pytest.skip(f"no IPv6 here: {error}")
        raise


async def test_what_is_told_to_others_wins_over_what_is_bound() -> None:
    told = {"advertise_address": "203.0.113.7:9090"}
    async with Serving(settings=settings_of(DYN_TCP_RPC_HOST="0.0.0.0") | told) as serving:
        host, _, port = serving.server.address.rpartition(":")
        assert host == "203.0.113.7"
        assert port != "9090"  # which is another server's


async def test_a_machine_without_an_address_says_so_and_listens_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr("rkmetrics.addresses.local_addresses", lambda: ["127.0.0.1"])
    found = Serving(settings=settings_of(DYN_TCP_RPC_HOST="0.0.0.0"))
    for start in (found.server.start, found.client(tcp_rpc_host="0.0.0.0").start):
        with pytest.raises(ValueError, match="RKMETRICS_ADVERTISE_ADDRESS"):
            await start()
    await until(lambda: descriptors() <= before)


async def test_rpc_port_is_fixed_or_any() -> None:
    async with Serving(settings=local(DYN_TCP_RPC_PORT="0")) as any_port:
        port = any_port.server.address.rpartition(":")[2]
        assert int(port)
        taken = Serving(settings=local(DYN_TCP_RPC_PORT=port))
        with pytest.raises(ServeError, match=f"127.0.0.1:{port}.*DYN_TCP_RPC_PORT"):
            await taken.server.start()
        assert not taken.server.started
    async with Serving(settings=local(DYN_TCP_RPC_PORT=port)) as fixed:
        assert fixed.server.address == f"127.0.0.1:{port}"
        await fixed.serves()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "x" * 300])
async def test_a_host_that_is_not_ours_is_a_clear_error(host: str) -> None:
    for start in (Serving(settings={"tcp_rpc_host": host}).server.start, TcpClient(registry(tcp_rpc_host=host)).start):
        with pytest.raises(ServeError, match=host[:20]):
            await start()


async def test_max_message_size_limits_requests_and_items_on_both_sides() -> None:
    small, large = local(DYN_TCP_MAX_MESSAGE_SIZE="10000"), local(DYN_TCP_MAX_MESSAGE_SIZE="1000000")
    async with Serving(settings=small) as serving:
        async with serving.client(**small) as client:
            assert await (await client.call(serving["echo"], "x" * 5_000)).one() == "x" * 5_000
            with pytest.raises(RpcRefusedError, match="DYN_TCP_MAX_MESSAGE_SIZE"):  # it does not leave
                await client.call(serving["echo"], "x" * 20_000)
            assert serving.counts.refused == {}
        async with serving.client(**large) as client:
            with pytest.raises(RpcError, match="too large"):
                await client.call(serving["echo"], "x" * 20_000)
            assert serving.counts.refused == {"too_large": 1}
    async with Serving(settings=large) as serving, serving.client(**small) as client:
        serving.server._endpoints["echo"].handler = lambda _: _large()
        with pytest.raises(RpcClosedError, match="over the limit"):
            await (await client.call(serving["echo"], 1)).one()


async def _large() -> str:
    return "x" * 20_000


@pytest.mark.parametrize("seconds", ["0.2", "300ms"])
async def test_request_timeout_is_for_the_beginning_of_an_answer(seconds: str) -> None:
    limits = local(DYN_TCP_REQUEST_TIMEOUT=seconds)
    shown = limits["tcp_request_timeout_seconds"]
    async with Serving() as serving, serving.client(**limits) as client:
        response = await client.call(serving["wait"], {})
        await passed(shown + 0.1)
        serving.handlers.go_on.set()
        assert [item async for item in response] == [1, 2]  # an answer that has begun may take its time
        with socket.create_server(("127.0.0.1", 0)) as silent:
            place = f"127.0.0.1:{silent.getsockname()[1]}/7/echo"
            with pytest.raises(RpcTimeoutError, match=f"in {shown:g} s"):
                await client.call(serving["echo"]._replace(transport=("tcp", place)), {})


@pytest.mark.parametrize(("size", "buffer"), [(1, 1), (1, 4), (3, 2), (50, 100)])
async def test_pool_size_and_channel_buffer_limit_what_is_on_its_way(size: int, buffer: int) -> None:
    """A server that acknowledges nothing: so many connections, so many requests on each, and the rest waits."""
    limits = local(DYN_TCP_POOL_SIZE=str(size), DYN_TCP_CHANNEL_BUFFER=str(buffer))
    received: list[asyncio.StreamReader] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(reader)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}/7/echo"
    instance = Instance("dynamo", "backend", "echo", 7, ("tcp", place))
    async with TcpClient(registry(**limits)) as client:
        calls = [asyncio.ensure_future(client.call(instance, {})) for _ in range(40)]
        wanted = 1 if buffer >= 40 else size
        await until(lambda: len(received) >= wanted and client._pools)
        (pool,) = client._pools.values()
        sent = min(40, size * buffer)
        await until(lambda: sum(len(line.pending) for line in pool._lines) == sent)
        assert len(pool) <= size
        assert all(len(line.pending) <= buffer for line in pool._lines)
        assert len(pool._waiting) == 40 - sent
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    server.close()
    await asyncio.sleep(0.01)


async def test_connect_timeout_is_for_a_connection() -> None:
    """A listener whose queue is full answers no connection."""
    limits = local(DYN_TCP_CONNECT_TIMEOUT="0.2")
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        queue = []
        for _ in range(4):
            waiting = socket.socket()
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
            queue.append(waiting)
        try:
            async with TcpClient(registry(**limits)) as client:
                place = f"127.0.0.1:{full.getsockname()[1]}/7/echo"
                with pytest.raises(RpcUnreachableError, match=r"no connection in 0\.2 s") as error:
                    await client.call(Instance("dynamo", "backend", "echo", 7, ("tcp", place)), {})
                assert not error.value.delivered
        finally:
            for waiting in queue:
                waiting.close()


@pytest.mark.parametrize(("wire", "path"), [("0.7", "echo"), ("0.8", PATH), ("0.9", PATH)])
async def test_wire_decides_what_is_listed_and_so_what_is_spoken(wire: str, path: str) -> None:
    async with Serving(settings=local(DYN_WIRE=wire)) as serving:
        assert serving["echo"].transport == ("tcp", f"{serving.server.address}/{path}")
        seen: list[TcpRequest] = []
        acknowledge = serving.server.acknowledge
        serving.server.acknowledge = lambda request: (seen.append(request), acknowledge(request))[1]  # type: ignore[method-assign,func-returns-value]
        for other in ("0.7", "0.8"):  # of the client, which speaks what is listed
            async with serving.client(**local(DYN_WIRE=other)) as client:
                assert await (await client.call(serving["echo"], other)).one() == other
        assert [(request.path, request.headers is None) for request in seen] == [(path, wire == "0.7")] * 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DYN_TCP_RPC_HOST", "a b"),
        ("DYN_TCP_RPC_PORT", "65536"),
        ("DYN_TCP_RPC_PORT", "-1"),
        ("DYN_TCP_RPC_PORT", "http"),
        ("DYN_TCP_MAX_MESSAGE_SIZE", "0"),
        ("DYN_TCP_MAX_MESSAGE_SIZE", "32MB"),
        ("DYN_TCP_REQUEST_TIMEOUT", "0"),
        ("DYN_TCP_REQUEST_TIMEOUT", "-1"),
        ("DYN_TCP_REQUEST_TIMEOUT", "soon"),
        ("DYN_TCP_CONNECT_TIMEOUT", "0"),
        ("DYN_TCP_CONNECT_TIMEOUT", "inf"),
        ("DYN_TCP_POOL_SIZE", "0"),
        ("DYN_TCP_POOL_SIZE", "1.5"),
        ("DYN_TCP_CHANNEL_BUFFER", "0"),
        ("DYN_TCP_CHANNEL_BUFFER", "many"),
        ("DYN_WIRE", "0.6"),
        ("DYN_WIRE", "1.0"),
    ],
)
def test_a_bad_value_stops_the_start(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        Settings.from_env({variable: value})
