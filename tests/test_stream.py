"""Answers that are read while they come: pieces, lines, and peers that misbehave."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.errors import FetchError
from rkmetrics.stream import HELD_BYTES, LineCutter, Stream
from tests.hostile import BEHAVIOURS, Behave, response, serving, until

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDED = ("vanishes", "resets", "half a head", "half a body", "garbage", "another protocol", "gzip")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def sending(*pieces: bytes) -> Behave:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)

    return behave


async def read_all(stream: Stream) -> bytes:
    pieces: list[bytes] = []
    while piece := await stream.read():
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize(
    "pieces",
    [
        (CHUNKED + chunk(b"hel"), chunk(b"lo"), b"0\r\n\r\n"),
        (CHUNKED + b"5\r\nhe", b"llo\r", b"\n0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel", b"lo"),
        (b"HTTP/1.1 200 OK\r\n\r\nhel", b"lo"),
    ],
)
async def test_pieces_come_while_the_answer_goes_on(pieces: tuple[bytes, ...]) -> None:
    async with serving(sending(*pieces)) as peer:
        async with Stream("POST", f"{peer.url}/watch", body=b"{}") as stream:
            assert await stream.read() != b"hello"
            assert stream.status == 200
            await read_all(stream)
            assert await stream.read() == b""  # and again
    assert b"content-length: 2\r\n" in peer.requests[0]


async def test_an_answer_without_a_body_has_a_status() -> None:
    async with serving(sending(response("503 Service Unavailable"))) as peer:
        async with Stream("GET", peer.url) as stream:
            assert await stream.read() == b""
            assert stream.status == 503


async def test_more_chunks_than_an_answer_may_have_are_fine_in_a_stream() -> None:
    async with serving(sending(CHUNKED + chunk(b"x") * 10_000 + b"0\r\n\r\n")) as peer:
        async with Stream("GET", peer.url) as stream:
            assert await read_all(stream) == b"x" * 10_000


async def test_who_reads_slowly_makes_the_peer_wait() -> None:
    sent = 0

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED)
        for _ in range(1_000):
            writer.write(chunk(bytes(65_536)))
            await writer.drain()
            sent += 65_536
        writer.write(b"0\r\n\r\n")

    async with serving(behave) as peer:
        async with Stream("GET", peer.url) as stream:
            await stream.read()
            before = -1
            while sent != before:  # until nothing moves any more
                before = sent
                await asyncio.sleep(0.2)
            assert HELD_BYTES < sent < 65_536_000
            await read_all(stream)
            assert sent == 65_536_000


@pytest.mark.parametrize("name", ENDED)
async def test_what_is_no_answer_is_an_error(name: str) -> None:
    async with serving(BEHAVIOURS[name]) as peer:
        async with Stream("GET", peer.url) as stream:
            with pytest.raises(FetchError, match=r"^GET http://127"):
                await read_all(stream)


async def test_nobody_there_is_an_error() -> None:
    async with Stream("POST", "http://127.0.0.1:1/watch") as stream:
        with pytest.raises(FetchError, match=r"^POST http://127.0.0.1:1/watch: unreachable"):
            await stream.read()


async def test_leaving_a_stream_ends_its_connection() -> None:
    async with serving(BEHAVIOURS["drips its body"]) as peer:
        async with Stream("GET", peer.url) as stream:
            await stream.read()
        async with Stream("GET", peer.url):
            pass
        await until(lambda: peer.connections >= 1)


@given(st.lists(st.binary(max_size=8)), st.integers(1, 7))
def test_lines_are_the_same_however_they_are_cut(lines: list[bytes], size: int) -> None:
    lines = [line.replace(b"\n", b"") for line in lines]
    data = b"\n".join([*lines, b"rest"])
    cutter = LineCutter(100)
    found = [line for at in range(0, len(data), size) for line in cutter.feed(data[at : at + size])]
    assert found == lines
    assert cutter.finish() == b"rest"


def test_a_line_that_is_too_long_is_refused_before_it_ends() -> None:
    cutter = LineCutter(10)
    assert cutter.feed(b"0123456789\n01234") == [b"0123456789"]
    with pytest.raises(ValueError, match="a line of more than 10 bytes"):
        cutter.feed(b"567890")
