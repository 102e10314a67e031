"""The nats plane at a real nats-server: its wire, and what goes wrong there (reliability: F1 to F6, T22)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics import nats_link
from rkmetrics.errors import RpcError, RpcRefusedError, RpcTimeoutError, RpcUnreachableError
from rkmetrics.nats_link import flush
from rkmetrics.planes import nats
from rkmetrics.planes.base import EndpointName
from rkmetrics.planes.frame import TwoPartReader, encode_two_part
from rkmetrics.planes.wire import RequestHeader
from tests.contracts.peers import Peers, peers_of, until
from tests.services.kv import LINES, MakeNats, nats_lines
from tests.services.nats_server import NatsServer

pytest.importorskip("nats", reason="the client of NATS is not installed: pip install 'rkmetrics[nats]'")

CAPTURES = {path.name: path.read_bytes() for path in (Path(__file__).parents[1] / "golden" / "nats").glob("*.bin")}


async def echo(request: Any) -> AsyncIterator[Any]:
    yield request


async def ticks(_: Any) -> AsyncIterator[int]:
    number = 0
    while True:
        yield number
        number += 1
        await asyncio.sleep(0.01)


@asynccontextmanager
async def plane(server: NatsServer, **settings: Any) -> AsyncGenerator[Peers]:
    async with peers_of("nats", **({"nats_server": server.url} | settings)) as peers:
        yield peers


async def works(peers: Peers) -> bool:
    try:
        return await peers.items("echo", 1) == [1]
    except RpcError:
        return False


async def until_it_works(peers: Peers) -> None:
    async with asyncio.timeout(60):  # for bugs only
        while not await works(peers):  # noqa: ASYNC110 - the server does not say when
            await asyncio.sleep(0.02)


def subscriptions(server: NatsServer) -> list[tuple[str, str]]:
    """What is heard there, and by which group."""
    page = server.monitor("connz?subs=detail")
    found = [each for one in page["connections"] for each in one.get("subscriptions_list_detail", ())]
    return [(each["subject"], each.get("qgroup", "")) for each in found if not each["subject"].startswith("$")]


# --- the wire ---------------------------------------------------------------------------------------------------------


def parse(capture: bytes) -> tuple[str, str, str, bytes]:
    """Subject, inbox, traceparent and payload of a captured PUB or HPUB."""
    line, _, rest = capture.partition(b"\r\n")
    command, subject, inbox, *sizes = line.decode().split()
    head = rest[: int(sizes[0])] if command == "HPUB" else b""
    traceparent = head.partition(b"traceparent: ")[2].partition(b"\r\n")[0].decode()
    return subject, inbox, traceparent, rest[len(head) : int(sizes[-1])]


def test_there_are_captures() -> None:
    assert len(CAPTURES) >= 4


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
async def test_a_request_of_dynamos_own_client_is_heard_and_acknowledged(
    nats_server: NatsServer, capture: bytes
) -> None:
    subject, inbox, traceparent, payload = parse(capture)
    id = int(subject.rpartition("-")[2], 16)
    async with plane(nats_server, namespace="dynamo") as peers:
        server = await peers.serve(generate=echo, instance_id=id)
        assert subject == subject_of(peers, "generate")
        taken: list[tuple[str, bytes, str]] = []
        server.take = lambda *request: taken.append(request)  # type: ignore[method-assign]
        reader, writer = await asyncio.open_connection("127.0.0.1", nats_server.port)
        writer.write(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n')
        writer.write(f"SUB {inbox} 1\r\n".encode() + capture)
        assert await reader.readuntil(f"MSG {inbox} 1 0\r\n\r\n".encode())
        writer.close()
        await writer.wait_closed()
    assert taken == [("generate", payload, traceparent)]


def subject_of(peers: Peers, name: str) -> str:
    return peers.instance(name).transport[1]


INFO = b'INFO {"server_id":"x","version":"2.10.0","headers":true,"max_payload":1048576,"proto":1}\r\n'


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
async def test_our_client_writes_what_dynamos_own_does(capture: bytes) -> None:
    subject, inbox, traceparent, payload = parse(capture)
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        while data := await reader.read(65_536):
            heard.extend(data)
            writer.write(b"PONG\r\n" * data.count(b"PING\r\n"))
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with peers_of("nats", nats_server=f"nats://127.0.0.1:{port}") as peers:
        client = await peers.client()
        assert isinstance(client, nats.NatsClient)
        call: Any = SimpleNamespace(begun=asyncio.get_running_loop().create_future(), where=subject)
        client._voice.send(nats._Request(call, payload, traceparent))
        await until(lambda: b"PUB " in heard and heard.endswith(b"\r\n"))
        call.begun.cancel()
        (token,) = client._voice._sent
        mine = client._voice._inbox + token
        assert bytes(heard[heard.index(capture[:4]) :]) == capture.replace(inbox.encode(), mine.encode())
        assert nats._Request(call, payload, traceparent).size_bytes == int(capture.partition(b"\r\n")[0].split()[-1])
    listening.close()


async def test_endpoints_are_heard_in_the_group_q_and_left_at_the_end(make_nats: MakeNats) -> None:
    own = make_nats().start()
    async with plane(own) as peers:
        server = await peers.serve(echo=echo, ticks=ticks, instance_id=0xABC)
        assert sorted(subscriptions(own)) == [("ns_backend.echo-abc", "q"), ("ns_backend.ticks-abc", "q")]
        assert peers.instance("echo").transport == ("nats_tcp", "ns_backend.echo-abc")
        server.renumber(0xDEF)
        await until(lambda: len(subscriptions(own)) == 4)
        assert subject_of(peers, "echo") == "ns_backend.echo-def"
        await server.stop()
        await until(lambda: subscriptions(own) == [])
        assert nats.subject_of(EndpointName("ns", "backend", "echo"), 0xABC) == "ns_backend.echo-abc"


async def test_of_a_group_one_hears_each_request(nats_server: NatsServer) -> None:
    async with plane(nats_server) as peers:
        for _ in range(2):
            await peers.serve(echo=echo, instance_id=1)
        answers = await asyncio.gather(*(peers.items("echo", number) for number in range(40)))
        assert answers == [[number] for number in range(40)]
        await peers.ended(ok=40)


async def test_nobody_at_a_subject_is_said_at_once(nats_server: NatsServer) -> None:
    async with plane(nats_server, tcp_request_timeout_seconds=600.0) as peers:
        await peers.serve(echo=echo)
        client = await peers.client()
        elsewhere = peers.instance("echo")._replace(transport=("nats_tcp", "ns_backend.echo-1234"))
        with pytest.raises(RpcUnreachableError, match="nobody hears that subject") as caught:
            await client.call(elsewhere, 1)
        assert not caught.value.delivered


async def test_a_server_that_drains_is_heard_of_from_nats(nats_server: NatsServer) -> None:
    release = asyncio.Event()

    async def waits(_: Any) -> AsyncIterator[str]:
        yield "began"
        await release.wait()

    async with plane(nats_server) as peers:
        server = await peers.serve(run=waits, echo=echo)
        response = await peers.call("run")
        assert await anext(aiter(response)) == "began"
        stopping = asyncio.create_task(server.stop(30))

        async def nobody() -> bool:
            try:
                await peers.items("echo", 1)
            except RpcRefusedError:
                return False  # it was on its way
            except RpcUnreachableError as error:
                return "nobody hears that subject" in str(error)
            return False

        async with asyncio.timeout(60):
            while not await nobody():
                pass
        release.set()
        assert [item async for item in response] == []
        assert await stopping


class Foreigner:
    """A client that is not ours: it takes any reply for an acknowledgement, and awaits its answer."""

    def __init__(self, server: NatsServer) -> None:
        self.server, self.frames = server, list[Any]()
        self.ended = asyncio.Event()

    async def home(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = TwoPartReader(1_000_000)
        while data := await reader.read(65_536):
            self.frames += frames.feed(data)
        writer.close()
        self.ended.set()

    async def call(self, subject: str) -> bytes:
        from nats import connect

        listening = await asyncio.start_server(self.home, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        header = RequestHeader("their-id", f"127.0.0.1:{port}", "their-subject")
        client = await connect(self.server.url)
        try:
            reply = await client.request(subject, encode_two_part(header.encode(), b'"theirs"'), timeout=30)
            await self.ended.wait()
        finally:
            await client.close()
            listening.close()
        return reply.data


async def test_clients_that_are_not_ours_are_served(nats_server: NatsServer) -> None:
    async with plane(nats_server) as peers:
        await peers.serve(echo=echo)
        foreigner = Foreigner(nats_server)
        assert await foreigner.call(subject_of(peers, "echo")) == b""
        assert [frame.header or frame.body for frame in foreigner.frames] == [
            b'{"subject":"their-subject","stream_type":"response"}',
            b'{"error":null}',
            b'{"data":{"data":"theirs"},"complete_final":false}',
            b'{"complete_final":true}',
            b'"sentinel"',
        ]


async def test_a_refusal_reaches_clients_that_take_any_reply_for_an_acknowledgement(nats_server: NatsServer) -> None:
    async with plane(nats_server) as peers:
        await peers.serve(echo=echo, requests_limit=0)
        foreigner = Foreigner(nats_server)
        assert await foreigner.call(subject_of(peers, "echo")) == b"Too many requests"
        assert [frame.header for frame in foreigner.frames] == [
            b'{"subject":"their-subject","stream_type":"response"}',
            b'{"error":"Too many requests"}',
            b'"sentinel"',
        ]
        with pytest.raises(RpcRefusedError, match="Too many requests"):
            await peers.call("echo")
        assert len(peers.servers[0].homes) == 0  # ours needs no connection to hear of it


@pytest.mark.parametrize(
    "subject",
    ["", ".", "a", "a.", ".b", "a.*", "a.>", ">", "*.*", "a b.c", "$SYS.x", "a.b.c", "a.b\r\nPUB x 0\r\n\r\n", "é.b",
     "a.b\n", "x" * 1_000 + ".y"],
)  # fmt: skip
async def test_a_subject_that_is_none_is_never_used(make_nats: MakeNats, subject: str) -> None:
    own = make_nats(jetstream=False).start()
    async with plane(own) as peers:
        await peers.serve(echo=echo)
        client = await peers.client()
        before = own.traffic()[1]
        with pytest.raises(RpcUnreachableError, match="expected a subject of two names"):
            await client.call(peers.instance("echo")._replace(transport=("nats_tcp", subject)), 1)
        assert own.traffic()[1] == before


async def test_a_request_over_max_payload_says_both_sizes_and_one_at_it_goes(make_nats: MakeNats) -> None:
    own = make_nats(config="max_payload: 4096").start()
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with plane(own) as peers:
        await peers.serve(echo=echo)
        client, sizes = await peers.client(), list[int]()
        push = client._push

        def measured(call: Any, payload: bytes, traceparent: str) -> None:
            sizes.append(nats._Request(call, payload, traceparent).size_bytes)
            push(call, payload, traceparent)

        client._push = measured  # type: ignore[method-assign]
        for carried in (traceparent, ""):
            assert await peers.items("echo", "x", id="id", traceparent=carried) == ["x"]
            room = 4096 - sizes[-1]
            exact = "x" * (room + 1)
            assert await peers.items("echo", exact, id="id", traceparent=carried) == [exact]
            assert sizes[-1] == 4096
            told = r"has 4097 bytes, .*takes 4096 .*raise its max_payload"
            with pytest.raises(RpcRefusedError, match=told) as caught:
                await peers.call("echo", exact + "x", id="id", traceparent=carried)
            assert not caught.value.delivered
        assert peers.called == {"ok": 4, "refused": 2}


async def test_what_strangers_say_to_an_inbox_is_nobodys(nats_server: NatsServer) -> None:
    from nats import connect

    async with plane(nats_server) as peers:
        await peers.serve(ticks=ticks, echo=echo)
        client = await peers.client()
        assert isinstance(client, nats.NatsClient)
        stranger = await connect(nats_server.url)
        async with await peers.call("ticks") as response:
            await anext(aiter(response))
            for token in ("1", "2", "0", "x", "1.2"):
                await stranger.publish(client._voice._inbox + token, b"refused by nobody")
            await stranger.flush()
            assert await peers.items("echo", 1) == [1]
            assert await anext(aiter(response)) > 0
        await stranger.close()


async def test_calls_that_ended_without_an_acknowledgement_are_forgotten(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats, "SWEEP_CALLS", 10)
    async with plane(nats_server) as peers:
        await peers.serve(echo=echo)
        client = await peers.client()
        assert isinstance(client, nats.NatsClient)
        client._voice._sweep_at = 10

        async def never(_: Any) -> None:
            """Hear no acknowledgement."""

        client._voice._hear = never  # type: ignore[method-assign,assignment]
        client._voice._sent |= {f"old {number}": _over() for number in range(9)}
        for number in range(30):
            assert await peers.items("echo", number) == [number]
        assert len(client._voice._sent) <= 20


def _over() -> Any:
    begun = asyncio.get_running_loop().create_future()
    begun.cancel()
    return SimpleNamespace(begun=begun)


# --- NATS is away -----------------------------------------------------------------------------------------------------


async def test_both_start_without_nats_and_are_there_when_it_is(
    make_nats: MakeNats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    monkeypatch.setattr(nats, "START_SECONDS", 0.2)
    monkeypatch.setattr(nats, "AWAY_SECONDS", 0.2)
    own = make_nats()
    async with plane(own) as peers:
        await peers.serve(echo=echo)
        for _ in range(20):
            with pytest.raises(RpcUnreachableError, match="no connection to NATS") as caught:
                await peers.call("echo", 1)
            assert not caught.value.delivered
            assert own.url in str(caught.value)
        own.start()
        await until_it_works(peers)
        said = nats_lines(caplog)
        assert len([line for line in said if "no connection to" in line]) == 2  # of the server, and of the client
        assert len([line for line in said if "connected to" in line]) == 2
        assert len(said) <= LINES


async def test_a_restart_is_bridged_and_answers_that_began_go_on(
    make_nats: MakeNats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    monkeypatch.setattr(nats, "AWAY_SECONDS", 60.0)
    own = make_nats().start()
    async with plane(own, tcp_request_timeout_seconds=60.0) as peers:
        await peers.serve(echo=echo, ticks=ticks)
        held = await peers.call("ticks")
        response = aiter(held)
        first = await anext(response)
        own.stop()
        client = peers.clients[0]
        assert isinstance(client, nats.NatsClient)
        await until(lambda: client._voice.nc is None)
        calls = [asyncio.create_task(peers.items("echo", number)) for number in range(20)]
        assert [await anext(response) for _ in range(50)] == list(range(first + 1, first + 51))
        assert not any(call.done() for call in calls)
        own.start()
        results = await asyncio.gather(*calls, return_exceptions=True)
        served = [number for number, result in enumerate(results) if result == [number]]
        unheard = [result for result in results if isinstance(result, RpcUnreachableError)]
        assert len(served) + len(unheard) == 20  # the client may be back before the server is
        assert all("nobody hears" in str(error) for error in unheard)
        await until_it_works(peers)
        assert await anext(response) == first + 51
        await held.aclose()
        assert len(nats_lines(caplog)) <= LINES


async def test_under_restarts_each_call_ends_and_none_twice(make_nats: MakeNats) -> None:
    own = make_nats().start()
    ran: list[int] = []

    async def once(request: int) -> AsyncIterator[int]:
        ran.append(request)
        yield request

    async with plane(own, tcp_request_timeout_seconds=5.0) as peers:
        await peers.serve(once=once, echo=echo)
        await peers.client()
        done, failed, number = list[int](), dict[int, RpcError](), 0

        async def call(number: int) -> None:
            try:
                assert await peers.items("once", number) == [number]
                done.append(number)
            except RpcError as error:
                failed[number] = error

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                for step in range(100):
                    group.create_task(call(number))
                    number += 1
                    if step == 50:
                        own.stop()
                    await asyncio.sleep(0.005)
                own.start()
                await until_it_works(peers)
        assert len(done) + len(failed) == number
        assert len(ran) == len(set(ran))
        assert set(done) <= set(ran)
        assert all(error.delivered for number, error in failed.items() if number in ran)
        assert peers.in_flight == 0


async def test_what_was_sent_when_the_connection_was_lost_is_unsure(
    make_nats: MakeNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats, "LOST_SECONDS", 0.1)
    own = make_nats().start()
    async with plane(own, tcp_request_timeout_seconds=600.0) as peers:
        server = await peers.serve(echo=echo)
        assert await peers.items("echo", 1) == [1]
        os.kill(own.pid, signal.SIGSTOP)
        os.waitpid(own.pid, os.WUNTRACED)  # noqa: ASYNC222 - its threads do not stop at once
        call = asyncio.create_task(peers.call("echo", 2))
        client = peers.clients[0]
        assert isinstance(client, nats.NatsClient)
        await until(lambda: client._voice._sent)
        os.kill(own.pid, signal.SIGKILL)
        with pytest.raises(RpcUnreachableError, match="ended before the acknowledgement") as caught:
            await call
        assert caught.value.delivered
        assert server.started


async def test_a_frozen_server_is_noticed_and_all_is_well_after_it(
    make_nats: MakeNats, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    own = make_nats().start()
    async with plane(own, tcp_request_timeout_seconds=1.0) as peers:
        await peers.serve(echo=echo, ticks=ticks)
        held = await peers.call("ticks")
        response = aiter(held)
        first = await anext(response)
        with own.frozen():
            with pytest.raises((RpcTimeoutError, RpcUnreachableError)):
                await peers.call("echo", 1)
            assert [await anext(response) for _ in range(20)] == list(range(first + 1, first + 21))
            client = peers.clients[0]
            assert isinstance(client, nats.NatsClient)
            await until(lambda: client._voice.nc is None)
        await until_it_works(peers)
        assert await anext(response) == first + 21
        await held.aclose()
        assert len(nats_lines(caplog)) <= LINES


async def test_wrong_credentials_are_said_once_and_right_ones_mend_it(
    make_nats: MakeNats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "rkmetrics")
    monkeypatch.setattr(nats, "START_SECONDS", 0.2)
    monkeypatch.setattr(nats, "AWAY_SECONDS", 0.2)
    own = make_nats(config='authorization { user: worker, password: "new-s3cret" }').start()
    secret = {"nats_username": "worker", "nats_password": rk.Secret("old-s3cret")}
    async with plane(own, nats_server=f"nats://worker:old-s3cret@127.0.0.1:{own.port}", **secret) as peers:
        await peers.serve(echo=echo)
        await peers.client()
        await until(lambda: peers.count_of("rkmetrics_nats_connects_total", outcome="unauthorized") >= 6)
        with pytest.raises(RpcUnreachableError) as caught:
            await peers.call("echo", 1)
        said = nats_lines(caplog)
        assert len(said) == 2
        assert all("unauthorized" in line for line in said)
        assert "s3cret" not in str(caught.value)
        assert not any("s3cret" in record.getMessage() for record in caplog.records)
        own.stop()
        own.config = 'authorization { user: worker, password: "old-s3cret" }'
        own.start()
        await until_it_works(peers)


async def test_a_token_opens_the_server_that_wants_one(make_nats: MakeNats) -> None:
    own = make_nats(config="authorization { token: t0ken }").start()
    async with plane(own, nats_token=rk.Secret("t0ken")) as peers:
        await peers.serve(echo=echo)
        assert await peers.items("echo", 1) == [1]


async def test_more_than_a_server_can_hold_is_dropped_counted_and_ends_in_time(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nats_link, "LISTEN_MESSAGES", 10)
    async with plane(nats_server, tcp_request_timeout_seconds=1.0) as peers:
        await peers.serve(echo=echo)
        assert await peers.items("echo", 0) == [0]
        calls = [asyncio.create_task(peers.items("echo", number)) for number in range(500)]
        await until(lambda: peers.clients[0].home)
        time.sleep(0.2)  # noqa: ASYNC251 - what an application does, and should not
        results = await asyncio.gather(*calls, return_exceptions=True)
        answered = [result for number, result in enumerate(results) if result == [number]]
        late = [result for result in results if isinstance(result, RpcTimeoutError)]
        assert len(answered) + len(late) == 500
        assert late
        assert peers.count_of("rkmetrics_nats_dropped_messages_total") >= 1
        assert len([line for line in nats_lines(caplog) if "SlowConsumer" in line]) <= 2
        assert await peers.items("echo", 1) == [1]
        assert peers.in_flight == 0


async def test_a_loop_that_was_blocked_goes_on(nats_server: NatsServer) -> None:
    async with plane(nats_server) as peers:
        await peers.serve(echo=echo)
        calls = [asyncio.create_task(peers.items("echo", number)) for number in range(50)]
        await asyncio.sleep(0)
        time.sleep(5)  # noqa: ASYNC251 - what an application does, and should not
        assert await asyncio.gather(*calls) == [[number] for number in range(50)]


async def test_a_round_trip_whose_wait_is_cancelled_leaves_the_connection_alive(nats_server: NatsServer) -> None:
    """nats-py's own flush does not: the PONG finds a cancelled future, and its reader ends."""
    from nats import connect

    client = await connect(nats_server.url)
    for _ in range(20):
        waiting = asyncio.create_task(flush(client))
        await asyncio.sleep(0)
        waiting.cancel()
    heard = await client.subscribe("alive")
    await client.publish("alive", b"yes")
    assert (await heard.next_msg(timeout=30)).data == b"yes"
    await client.close()


async def test_a_client_that_is_closed_while_nats_is_away_closes_and_fails_what_waits(make_nats: MakeNats) -> None:
    own = make_nats().start()
    async with plane(own, tcp_request_timeout_seconds=600.0) as peers:
        server = await peers.serve(echo=echo)
        assert await peers.items("echo", 1) == [1]
        own.stop()
        client = peers.clients[0]
        assert isinstance(client, nats.NatsClient)
        await until(lambda: client._voice.nc is None)
        call = asyncio.create_task(peers.call("echo", 2))
        await until(lambda: client._voice._waiting)
        await client.close()
        with pytest.raises(RpcUnreachableError, match="the client was closed") as caught:
            await call
        assert not caught.value.delivered
        assert await server.stop()


async def test_after_a_round_trip_a_subscription_is_there(nats_server: NatsServer) -> None:
    """nats-py's own flush lets its PING overtake the SUB."""
    from nats import connect

    asks = await connect(nats_server.url)
    for number in range(50):
        client = await connect(nats_server.url)

        async def hear(message: Any) -> None:
            await message.respond(b"here")

        await nats_link.listen(client, f"there.{number}", hear)
        await flush(client)
        assert (await asks.request(f"there.{number}", b"", timeout=30)).data == b"here"
        await client.close()
    await asks.close()
