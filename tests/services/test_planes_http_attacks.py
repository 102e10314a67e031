"""Attacks on the http plane, beside which an honest client is served (reliability, T16 to T20): whoever attacks loses
the connection and nothing else happens; memory follows neither claims nor floods."""

from __future__ import annotations

import asyncio
import tracemalloc
from contextlib import suppress
from typing import cast

import pytest

from rkmetrics.planes.http import HttpServer
from rkmetrics.planes.http_base import Patience
from tests.contracts.peers import until
from tests.planes.test_http import FLOODS, frame
from tests.services.http_peers import (
    HEAD,
    PREFACE,
    attacked,
    over_either,
    payload,
    post,
    said,
)

QUICK = Patience(head_seconds=0.3, body_seconds=0.6, idle_seconds=0.6)
SLOW: dict[str, tuple[list[bytes], bool]] = {
    "nothing": ([], False),
    "half a preface": ([b"PRI * HT"], True),
    "half a head": ([b"POST /v1/rpc/honest HTTP/1.1\r\nho"], True),
    "a byte of a head now and then": (
        [bytes([each]) for each in b"POST /v1/rpc/honest HTTP/1.1\r\nhost: aaaaaaaaaaa"],
        True,
    ),
    "a byte of a body now and then": ([post(b"", "content-length: 1000"), *[b"x"] * 50], True),
    "chunks without end": ([post(b"", "transfer-encoding: chunked"), *[b"1\r\nx\r\n"] * 50], True),
    "half of headers of HTTP/2": ([PREFACE + frame(1, HEAD, 0, 1)], True),
    "half a frame of HTTP/2": ([PREFACE + frame(1, HEAD, 5, 1)[:12]], True),
}


def need_http2() -> None:
    """A server without the library says no to the preface at once."""
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")


@pytest.mark.parametrize("name", SLOW)
@over_either
async def test_who_is_slow_is_ended_and_others_are_served(name: str, prior: bool) -> None:
    if "HTTP/2" in name:
        need_http2()
    """T16: connections that would go on and on. One that had no time to say anything is ended without being counted."""
    pieces, counted = SLOW[name]

    async def drip() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", under.port)
        try:
            for piece in pieces:
                writer.write(piece)
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.03):
                        if await reader.read(1) and reader.at_eof():
                            break
            async with asyncio.timeout(60):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.transport.abort()

    async with attacked(prior, patience=QUICK) as under:
        await under.beside(*(drip() for _ in range(50)))
        assert under.refused("too_slow") in (range(1, 51) if counted else [0])


@over_either
async def test_a_body_of_http_2_that_does_not_end_is_ended(prior: bool) -> None:
    need_http2()
    async with attacked(prior, patience=QUICK) as under:
        _, writer = await asyncio.open_connection("127.0.0.1", under.port)
        writer.write(PREFACE + frame(1, HEAD, 4, 1) + frame(0, b"x" * 200, 0, 1))
        await until(lambda: under.refused("too_slow"))
        await under.serves()
        writer.transport.abort()


@over_either
async def test_connections_without_end_make_room_for_those_that_ask(prior: bool) -> None:
    async with attacked(prior, connections_limit=50) as under:
        await under.serves(1)
        held = [await asyncio.open_connection("127.0.0.1", under.port) for _ in range(200)]
        for at, (_, writer) in enumerate(held):
            with suppress(ConnectionError):
                writer.write(b"POST /" if at % 2 else b"")
        await under.serves()
        assert under.peers.count("server_connections") <= 50
        assert under.refused("busy") >= 150
        for _, writer in held:
            writer.transport.abort()


@over_either
async def test_incomplete_bodies_share_what_memory_they_may_take(prior: bool) -> None:
    limit = 4_000_000
    async with attacked(prior, tcp_max_message_size_bytes=limit, kept_limit_bytes=1) as under:
        server = cast("HttpServer", under.peers.servers[0])
        writers: list[asyncio.StreamWriter] = []
        tracemalloc.start()
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", under.port)
            writer.write(post(b"", f"content-length: {limit}") + b"x" * (limit - 1_000_000))
            writers.append(writer)
        await until(lambda: under.refused("busy") >= 15)
        assert server.kept_bytes <= 2 * limit + 20 * 70_000
        tracemalloc.stop()
        await under.serves()
        for writer in writers:
            writer.transport.abort()


async def test_a_claim_of_a_large_body_costs_nothing() -> None:
    async with attacked() as under:
        head = post(b"", "content-length: 33554432")
        pairs = [await asyncio.open_connection("127.0.0.1", under.port) for _ in range(100)]
        await under.serves(5)
        tracemalloc.start()
        for _, writer in pairs:
            writer.write(head)
        server = cast("HttpServer", under.peers.servers[0])
        await until(lambda: server.kept_bytes >= 100 * 512)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000
        for _, writer in pairs:
            writer.transport.abort()


SMUGGLED = post(payload(id="smuggled"))


@pytest.mark.parametrize(
    "data",
    [
        post(b"0\r\n\r\n" + SMUGGLED, "content-length: 5", "transfer-encoding: chunked"),
        post(b"0\r\n\r\n" + SMUGGLED, "transfer-encoding: chunked", "transfer-encoding: identity"),
        post(b"0\r\n\r\n" + SMUGGLED, "transfer-encoding : chunked"),
        post(SMUGGLED, "content-length: 0", f"content-length: {len(SMUGGLED)}"),
        post(SMUGGLED, f"content-length: {len(SMUGGLED)}", "content-length: 0"),
        post(SMUGGLED, "content-length: 0", "x: y\r\n content-length: 9"),
        post(SMUGGLED, "content-length: 0\n"),
        post(SMUGGLED, "content-length: 0", "x: y\rz"),
    ],
)
@over_either
async def test_a_request_hidden_in_another_is_not_seen(data: bytes, prior: bool) -> None:
    """T19: what stands after a request that can be read in two ways is nobody's."""
    async with attacked(prior) as under:
        answers = await under.beside(*(said(under.port, data) for _ in range(5)))
        assert {each[:12] for each in answers} == {b"HTTP/1.1 400"}
        assert {each.count(b"HTTP/1.1 ") for each in answers} == {1}
        assert under.refused("malformed") == 5
        assert under.peers.served == {"ok": 20}


@over_either
async def test_heads_that_are_too_large_are_refused(prior: bool) -> None:
    async with attacked(prior) as under:
        many = b"POST /v1/rpc/honest HTTP/1.1\r\n" + b"a: b\r\n" * 50_000
        long = b"POST /" + b"x" * 1_000_000
        answers = await under.beside(*(said(under.port, data) for data in (many, long)))
        assert under.refused("too_large") == 2
        assert {each[:12] for each in answers} <= {b"HTTP/1.1 431", b""}


async def flood(port: int, piece: bytes, begin: bytes = PREFACE) -> bytes:
    """Send a piece again and again, until the server ends the connection; the last that it said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    last = b""

    async def hear() -> None:
        nonlocal last
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                last = (last + data)[-2_000:]

    hearing = asyncio.create_task(hear())
    writer.write(begin)
    with suppress(ConnectionError):
        async with asyncio.timeout(60):
            while not hearing.done():
                writer.write(piece * 50)
                await writer.drain()
                await asyncio.sleep(0)
    await hearing
    writer.transport.abort()
    return last


@pytest.mark.parametrize("name", FLOODS)
@over_either
async def test_floods_of_frames_end_their_connection_alone(name: str, prior: bool) -> None:
    """T18. The stream that they are about is open and half done."""
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    piece, _ = FLOODS[name]
    begin = PREFACE + frame(1, HEAD, 4, 1)
    async with attacked(prior) as under:
        found = await under.beside(*(flood(under.port, piece, begin) for _ in range(3)))
        assert under.refused("flood") + under.refused("malformed") == 3
        if name not in ("settings", "window updates", "resets"):
            assert under.refused("flood") == 3
        assert all(each == b"" or frame(7, b"")[3:9] in each for each in found)


@over_either
async def test_continuations_without_end_end_their_connection_alone(prior: bool) -> None:
    """CVE-2024-27316 and its kin."""
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    async with attacked(prior) as under:
        tracemalloc.start()
        begin = PREFACE + frame(1, HEAD, 0, 1)
        await under.beside(*(flood(under.port, frame(9, b"x" * 1_000, 0, 1), begin) for _ in range(5)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert under.refused("flood") == 5
        assert peak < 20_000_000


@over_either
async def test_rapid_resets_end_their_connection_alone(prior: bool) -> None:
    """CVE-2023-44487."""
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")

    async def attack() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", under.port)
        writer.write(PREFACE)
        sent = 0
        with suppress(ConnectionError):
            for id in range(1, 40_000, 2):
                writer.write(frame(1, HEAD, 4, id) + frame(3, b"\0\0\0\x08", 0, id))
                sent += 1
                if id % 100 == 1:
                    await writer.drain()
                    await asyncio.sleep(0)
                    if reader.at_eof():
                        break
            async with asyncio.timeout(60):
                await reader.read()
        writer.transport.abort()
        return sent

    async with attacked(prior) as under:
        await under.beside(attack(), attack())
        assert under.refused("flood") == 2
        assert under.peers.served == {"ok": 20}


@over_either
async def test_streams_beyond_the_limit_take_no_memory(prior: bool) -> None:
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    async with attacked(prior, http2_max_concurrent_streams=10) as under:
        _, writer = await asyncio.open_connection("127.0.0.1", under.port)
        writer.write(PREFACE + b"".join(frame(1, HEAD, 4, id) for id in range(1, 401, 2)))
        await until(lambda: under.refused("busy") == 190)
        server = cast("HttpServer", under.peers.servers[0])
        assert server.kept_bytes <= 10 * 16 * 1024
        await under.serves()
        writer.transport.abort()


@over_either
async def test_a_peer_that_reads_nothing_is_not_read(prior: bool) -> None:
    """Pipelined requests whose answers nobody reads: what waits to be sent stays small."""
    async with attacked(prior) as under:
        _, writer = await asyncio.open_connection("127.0.0.1", under.port)
        cast("asyncio.Transport", writer.transport).pause_reading()
        tracemalloc.start()
        with suppress(TimeoutError):  # it is not read: that is what ends it
            while True:
                writer.write(post(b"", path="/nowhere") * 200)
                async with asyncio.timeout(0.5):
                    await writer.drain()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30_000_000
        await under.serves()
        writer.transport.abort()
