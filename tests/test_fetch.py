"""The small HTTP client: bytes to answers, however they are cut, and peers that misbehave."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.errors import FetchError
from rkmetrics.fetch import Channel, Endpoint, Failure, get, request_head, send
from rkmetrics.http_answer import (
    BODY_LIMIT_BYTES,
    CHUNKS_LIMIT,
    HEAD_LIMIT_BYTES,
    Answer,
    AnswerParser,
    Reason,
    Refused,
)
from rkmetrics.settings import Settings
from tests.hostile import BEHAVIOURS, answering, response, serving, until

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

# Bytes, and whether the peer closes after them -> status, body, whether the connection can be used again.
ANSWERS: dict[str, tuple[bytes, bool, int, bytes, bool]] = {
    "sized": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", False, 200, b"hello", True),
    "empty": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", False, 200, b"", True),
    "no phrase": (b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n", False, 200, b"", True),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", False, 204, b"", True),
    "304": (b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\n\r\n', False, 304, b"", True),
    "304 with the length of the body": (b"HTTP/1.1 304 x\r\ncontent-length: 5\r\n\r\n", False, 304, b"", True),
    "closing": (b"HTTP/1.1 200 OK\r\nconnection: Close\r\ncontent-length: 2\r\n\r\n{}", False, 200, b"{}", False),
    "one of several options": (
        b"HTTP/1.1 200 OK\r\nconnection: x, close\r\ncontent-length: 2\r\n\r\n{}",
        False,
        200,
        b"{}",
        False,
    ),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}", False, 200, b"{}", False),
    "until close": (b"HTTP/1.1 200 OK\r\n\r\nhello", True, 200, b"hello", False),
    "until close, empty": (b"HTTP/1.1 404 Not Found\r\n\r\n", True, 404, b"", False),
    "chunked": (CHUNKED + b"5\r\nhello\r\n1;a=b\r\n!\r\n0\r\n\r\n", False, 200, b"hello!", True),
    "chunked, in capitals": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\nA\r\n0123456789\r\n000\r\n\r\n",
        False,
        200,
        b"0123456789",
        True,
    ),
    "chunked, trailers": (CHUNKED + b"2\r\n{}\r\n0\r\nx-sum: 1\r\ny:\r\n\r\n", False, 200, b"{}", True),
    "interim": (
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1",
        False,
        200,
        b"1",
        True,
    ),
    "identity": (
        b"HTTP/1.1 200 OK\r\ncontent-encoding: identity\r\ncontent-length: 1\r\n\r\n1",
        False,
        200,
        b"1",
        True,
    ),
}

REFUSALS: dict[str, tuple[bytes, Reason]] = {
    "garbage": (b"\x00\x01\x02", Reason.MALFORMED),
    "HTTP/2": (b"HTTP/2 200\r\n\r\n", Reason.MALFORMED),
    "HTTP/1.2": (b"HTTP/1.2 200 OK\r\n\r\n", Reason.MALFORMED),
    "no status": (b"HTTP/1.1 OK\r\n\r\n", Reason.MALFORMED),
    "status of two digits": (b"HTTP/1.1 20 OK\r\n\r\n", Reason.MALFORMED),
    "status 600": (b"HTTP/1.1 600 OK\r\n\r\n", Reason.MALFORMED),
    "folded": (b"HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n", Reason.MALFORMED),
    "space before the colon": (b"HTTP/1.1 200 OK\r\ncontent-length : 1\r\n\r\n1", Reason.MALFORMED),
    "NUL": (b"HTTP/1.1 200 OK\r\na: \0\r\n\r\n", Reason.MALFORMED),
    "bare CR": (b"HTTP/1.1 200 OK\r\na: b\rc: d\r\n\r\n", Reason.MALFORMED),
    "two lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n1", Reason.MALFORMED),
    "list of lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 1, 1\r\n\r\n1", Reason.MALFORMED),
    "signed length": (b"HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\n1", Reason.MALFORMED),
    "length and chunks": (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n" + CHUNKED[17:], Reason.MALFORMED),
    "chunks of HTTP/1.0": (b"HTTP/1.0" + CHUNKED[8:], Reason.MALFORMED),
    "gzip, chunked": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n", Reason.MALFORMED),
    "gzip": (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\n1", Reason.ENCODED),
    "upgrade": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", Reason.MALFORMED),
    "interim without end": (b"HTTP/1.1 100 Continue\r\n\r\n" * 5, Reason.MALFORMED),
    "chunk of no number": (CHUNKED + b"five\r\n", Reason.MALFORMED),
    "chunk of nothing": (CHUNKED + b"\r\n", Reason.MALFORMED),
    "negative chunk": (CHUNKED + b"-1\r\n", Reason.MALFORMED),
    "longer than its chunk": (CHUNKED + b"1\r\nhe\r\n", Reason.MALFORMED),
    "bad trailers": (CHUNKED + b"0\r\nx y\r\n\r\n", Reason.MALFORMED),
    "1 GiB": (b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n", Reason.TOO_LARGE),
    "1 GiB in a chunk": (CHUNKED + b"40000000\r\n", Reason.TOO_LARGE),
    "a long line of a chunk": (CHUNKED + b"1;" + b"x" * 300 + b"\r\n", Reason.TOO_LARGE),
    "101 headers": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 101 + b"\r\n", Reason.TOO_LARGE),
    "a long head": (b"HTTP/1.1 200 OK\r\na: " + b"x" * HEAD_LIMIT_BYTES + b"\r\n\r\n", Reason.TOO_LARGE),
    "a long head that has no end": (b"HTTP/1.1 200 OK\r\na: " + b"x" * HEAD_LIMIT_BYTES, Reason.TOO_LARGE),
    "until close, too much": (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(BODY_LIMIT_BYTES + 1), Reason.TOO_LARGE),
    "cut head": (b"HTTP/1.1 200 O", Reason.CLOSED),
    "nothing": (b"", Reason.CLOSED),
    "cut body": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell", Reason.CLOSED),
    "cut chunks": (CHUNKED + b"5\r\nhello\r\n", Reason.CLOSED),
    "cut trailers": (CHUNKED + b"0\r\n", Reason.CLOSED),
}


def parsed(pieces: Iterator[bytes], *, closes: bool = True) -> Answer | Reason:
    parser = AnswerParser()
    try:
        for piece in pieces:
            if (answer := parser.feed(piece)) is not None:
                return answer
        assert closes, "the answer has no end"
        return parser.finish()
    except Refused as refused:
        return refused.reason


def cut(data: bytes, at: list[int]) -> Iterator[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    yield from (data[begin:end] for begin, end in pairwise(edges))


# --- the parser -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read_whole_and_byte_by_byte(name: str) -> None:
    data, closes, status, body, keep_alive = ANSWERS[name]
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        answer = parsed(iter(pieces), closes=closes)
        assert isinstance(answer, Answer)
        assert (answer.status, answer.body, answer.keep_alive) == (status, body, keep_alive)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_clear_is_refused(name: str) -> None:
    data, reason = REFUSALS[name]
    assert parsed(iter([data])) is reason


@settings(deadline=None)
@given(name=st.sampled_from(sorted(ANSWERS)), at=st.lists(st.integers(0, 500), max_size=12))
def test_any_cut_of_the_bytes_gives_the_same_answer(name: str, at: list[int]) -> None:
    data = ANSWERS[name][0]
    assert parsed(cut(data, at)) == parsed(iter([data]))


@settings(deadline=None)
@given(name=st.sampled_from(sorted(REFUSALS)), at=st.lists(st.integers(0, 20_000), max_size=12))
def test_any_cut_of_the_bytes_gives_the_same_refusal(name: str, at: list[int]) -> None:
    data, reason = REFUSALS[name]
    assert parsed(cut(data, at)) is reason


@settings(deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=8))
def test_garbage_raises_nothing_but_a_refusal(pieces: list[bytes]) -> None:
    assert isinstance(parsed(iter(pieces)), Reason | Answer)


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted({**ANSWERS, **REFUSALS})),
    place=st.integers(0, 300),
    change=st.binary(max_size=4),
    at=st.lists(st.integers(0, 500), max_size=6),
)
def test_an_answer_with_a_few_wrong_bytes_raises_nothing_but_a_refusal_and_always_the_same(
    name: str, place: int, change: bytes, at: list[int]
) -> None:
    data = (ANSWERS.get(name) or REFUSALS[name])[0]
    spoiled = data[:place] + change + data[place + len(change) :]
    assert parsed(cut(spoiled, at)) == parsed(iter([spoiled]))


def test_headers_keep_their_bytes_and_order_with_names_in_lower_case() -> None:
    data = b'HTTP/1.1 200 OK\r\nETag:  "\xe9" \t\r\nX-A: 1\r\nx-a:2\r\ncontent-length: 0\r\n\r\n'
    answer = AnswerParser().feed(data)
    assert answer is not None
    assert answer.headers == ((b"etag", b'"\xe9"'), (b"x-a", b"1"), (b"x-a", b"2"), (b"content-length", b"0"))
    assert (answer.value(b"x-a"), answer.value(b"x-b")) == (b"1", None)


def test_one_parser_reads_one_answer_after_the_other() -> None:
    parser = AnswerParser()
    for name in ("sized", "304", "chunked", "304", "304", "chunked, trailers"):
        parser.reset()
        answer = parser.feed(ANSWERS[name][0])
        assert answer is not None
        assert answer.body == ANSWERS[name][3]


def test_bytes_after_an_answer_are_seen() -> None:
    parser = AnswerParser()
    assert parser.feed(ANSWERS["sized"][0] + b"HTTP") is not None
    assert parser.surplus


@pytest.mark.parametrize("framing", ["sized", "chunked", "until close"])
def test_a_body_of_exactly_the_limit_is_taken_and_one_more_byte_is_not(framing: str) -> None:
    def whole(size: int) -> Answer:
        body, parser = bytes(size), AnswerParser(limit_bytes=100)
        data = {
            "sized": b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (size, body),
            "chunked": CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (size, body),
            "until close": b"HTTP/1.1 200 OK\r\n\r\n" + body,
        }[framing]
        return parser.feed(data) or parser.finish()

    assert len(whole(100).body) == 100
    with pytest.raises(Refused) as raised:
        whole(101)
    assert raised.value.reason is Reason.TOO_LARGE


def test_tiny_chunks_are_not_taken_for_ever() -> None:
    parser = AnswerParser()
    parser.feed(CHUNKED + b"1\r\nx\r\n" * CHUNKS_LIMIT)
    with pytest.raises(Refused, match="chunks"):
        parser.feed(b"1\r\nx\r\n")


# --- requests ---------------------------------------------------------------------------------------------------------

URLS = [
    ("http://h", ("http", "h", 80, "/", "h")),
    ("http://h:9090/kv_metrics", ("http", "h", 9090, "/kv_metrics", "h:9090")),
    ("HTTPS://H.example/x?y=z#f", ("https", "h.example", 443, "/x?y=z", "h.example")),
    ("http://[::1]:80/", ("http", "::1", 80, "/", "[::1]:80")),
    ("http://[fe80::1%25eth0]/", ("http", "fe80::1%eth0", 80, "/", "[fe80::1]")),
    ("http://user:pw@h:1/", ("http", "h", 1, "/", "h:1")),
]

BAD_URLS = [
    "", "h:80", "/path", "ftp://h/", "http://", "http:///x", "http://h:0", "http://h:99999", "http://h:x",
    "http://h/a b", "http://h/\r\nx: y", "http://h\n", "http://ü/", "http://h/ü", "http://[::1", "http://[1.2.3.4]/",
    "http://a_b!/", "http://h%2f/",
]  # fmt: skip


@pytest.mark.parametrize(("url", "expected"), URLS)
def test_a_url_says_where_to_go(url: str, expected: tuple[object, ...]) -> None:
    endpoint = Endpoint.parse(url)
    assert endpoint[:5] == expected
    assert endpoint.address == endpoint.host


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_cannot_be_asked_is_an_error_value(url: str) -> None:
    with pytest.raises(FetchError) as raised:
        Endpoint.parse(url)
    assert raised.value.reason == Reason.REQUEST


def test_neither_credentials_nor_a_query_are_shown_and_credentials_are_not_sent() -> None:
    endpoint = Endpoint.parse("http://me:hunter2@h/p?key=secret")
    assert endpoint.shown == "http://h/p"
    assert request_head(endpoint) == b"GET /p?key=secret HTTP/1.1\r\nhost: h\r\naccept-encoding: identity\r\n\r\n"


@pytest.mark.parametrize(
    "url", ["http://me:hunter2@h:x/", "http://hunter2:hun?ter2@h:x", "h?key=hunter2", "http://me:hun/ter2@h"]
)
def test_a_bad_url_shows_nothing_that_may_be_a_secret(url: str) -> None:
    with pytest.raises(FetchError) as raised:
        Endpoint.parse(url)
    assert "hun" not in str(raised.value) + repr(raised.value)


@pytest.mark.parametrize(
    "header", [(b"x", b"a\r\nb: c"), (b"x\r\ny", b"a"), (b"", b"a"), (b"x y", b"a"), (b"x", b"\0"), (b"Host", b"other")]
)
def test_a_header_cannot_become_another_one(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(FetchError):
        request_head(Endpoint.parse("http://h/"), [header])


# --- peers ------------------------------------------------------------------------------------------------------------

ENDS: dict[str, Reason | int] = {
    "hangs": Reason.TIMEOUT,
    "drips its headers": Reason.TIMEOUT,
    "drips its body": Reason.TIMEOUT,
    "garbage": Reason.MALFORMED,
    "another protocol": Reason.MALFORMED,
    "redirect": 302,
    "gzip": Reason.ENCODED,
    "a length of 1 GiB": Reason.TOO_LARGE,
    "a body without end": Reason.TOO_LARGE,
    "headers without end": Reason.TOO_LARGE,
    "chunks without end": Reason.TOO_LARGE,
    "tiny chunks without end": Reason.TOO_LARGE,
    "two lengths": Reason.MALFORMED,
    "vanishes": Reason.CLOSED,
    "resets": Reason.CLOSED,
    "half a head": Reason.CLOSED,
    "half a body": Reason.CLOSED,
    "unauthorized": 401,
    "forbidden": 403,
    "broken": 500,
    "not modified, unasked": 304,
}


@pytest.mark.parametrize("name", ENDS)
async def test_a_peer_that_misbehaves_is_an_error_value(name: str) -> None:
    expected = ENDS[name]
    async with serving(BEHAVIOURS[name]) as peer:
        timeout = 0.3 if expected is Reason.TIMEOUT else 20
        try:
            found: object = (await get(peer.url, timeout_seconds=timeout)).status
        except FetchError as error:
            found = error.reason
        assert found == expected
        assert peer.connections == 1


async def test_get_answers_with_what_our_own_server_says() -> None:
    registry = rk.Registry(Settings(), builtin=False)
    with rk.serve(registry, port=0) as server:
        answer = await get(f"{server.url}/health", timeout_seconds=10)
    assert (answer.status, answer.value(b"content-type")) == (200, b"application/json")
    assert answer.body.startswith(b'{"status":"ok"')


async def test_a_request_says_host_headers_and_that_the_connection_ends() -> None:
    async with serving(answering(response("200 OK", b"{}"))) as peer:
        await get(f"http://me:pw@127.0.0.1:{peer.port}/p?q=1#f", headers=[(b"x-a", b"1")], timeout_seconds=10)
    head, *lines = peer.requests[0].split(b"\r\n")
    assert head == b"GET /p?q=1 HTTP/1.1"
    assert set(lines) == {
        b"host: 127.0.0.1:%d" % peer.port,
        b"accept-encoding: identity",
        b"x-a: 1",
        b"connection: close",
        b"",
    }


async def test_a_checked_address_is_what_is_connected_to() -> None:
    async with serving(answering(response("200 OK"))) as peer:
        url = f"http://no-such-name.invalid:{peer.port}/"
        await get(url, timeout_seconds=10, address="127.0.0.1")
    assert b"host: no-such-name.invalid:" in peer.requests[0]


async def test_nobody_at_the_port_is_unreachable() -> None:
    async with serving(answering(b"")) as peer:
        pass
    with pytest.raises(FetchError) as raised:
        await get(peer.url, timeout_seconds=10)
    assert raised.value.reason == Reason.UNREACHABLE


async def test_ipv6_is_spoken() -> None:
    try:
        async with serving(answering(response("200 OK", b"six")), host="::1") as peer:
            assert (await get(f"http://[::1]:{peer.port}/", timeout_seconds=10)).body == b"six"
    except OSError as error:
        if isinstance(error, FetchError):
            raise
        pytest.skip(f"no IPv6 here: {error}")
    assert b"host: [::1]:%d\r\n" % peer.port in peer.requests[0]


async def test_a_get_that_is_cancelled_leaves_no_connection() -> None:
    async with serving(BEHAVIOURS["hangs"]) as peer:
        task = asyncio.create_task(get(peer.url, timeout_seconds=60))
        await until(lambda: peer.connections)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1, signed by itself, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate of this test, and is not here")
    where = tmp_path_factory.mktemp("tls")
    command = [
        openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
        "-keyout", str(where / "key.pem"), "-out", str(where / "certificate.pem"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (where / "both.pem").write_text((where / "key.pem").read_text() + (where / "certificate.pem").read_text())
    return where / "both.pem"


def tls_server(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_https_is_spoken_with_a_context(certificate: Path) -> None:
    context = ssl.create_default_context(cafile=str(certificate.parent / "certificate.pem"))
    async with serving(answering(response("200 OK", b"safe")), ssl=tls_server(certificate)) as peer:
        answer = await get(f"https://127.0.0.1:{peer.port}/", timeout_seconds=10, ssl=context)
    assert answer.body == b"safe"


async def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: Path) -> None:
    async with serving(answering(response("200 OK")), ssl=tls_server(certificate)) as peer:
        with pytest.raises(FetchError) as raised:
            await get(f"https://127.0.0.1:{peer.port}/", timeout_seconds=10)
    assert raised.value.reason == Reason.TLS
    assert peer.requests == []


async def test_a_server_without_tls_is_refused() -> None:
    async with serving(answering(response("200 OK"))) as peer:
        with pytest.raises(FetchError) as raised:
            await get(f"https://127.0.0.1:{peer.port}/", timeout_seconds=0.5)
    assert raised.value.reason in (Reason.TLS, Reason.TIMEOUT, Reason.UNREACHABLE)


# --- channels ---------------------------------------------------------------------------------------------------------


class Asked:
    """A channel whose answers are waited for."""

    def __init__(self, url: str) -> None:
        self.endpoint = Endpoint.parse(url)
        self.found: asyncio.Queue[Answer | Failure] = asyncio.Queue()
        self.channel = Channel(self.endpoint, self.found.put_nowait, self.found.put_nowait)

    async def ask(self) -> Answer | Failure:
        self.channel.request(request_head(self.endpoint))
        async with asyncio.timeout(20):
            return await self.found.get()


async def test_a_connection_is_kept() -> None:
    async with serving(answering(response("200 OK", b"1"), response("200 OK", b"2"))) as peer:
        asked = Asked(peer.url)
        bodies = [answer.body for _ in range(3) if isinstance(answer := await asked.ask(), Answer)]
        asked.channel.close()
    assert (bodies, peer.connections) == ([b"1", b"2", b"2"], 1)


async def test_a_connection_that_was_closed_in_between_costs_nothing_but_a_new_one() -> None:
    async with serving(answering(response("200 OK", b"1"))) as peer:
        asked = Asked(peer.url)
        for _ in range(3):
            assert isinstance(await asked.ask(), Answer)
            await peer.cut()
        asked.channel.close()
    assert peer.connections == 3


async def test_a_request_that_crossed_the_end_of_its_connection_is_sent_once_more() -> None:
    """RFC 9112, 9.3.1: the server closes an idle connection while a request is on its way there."""

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response("200 OK", b"1"))
        await reader.readuntil(b"\r\n\r\n")  # and closes without a word

    async with serving(once) as peer:
        asked = Asked(peer.url)
        assert isinstance(await asked.ask(), Answer)
        assert isinstance(await asked.ask(), Answer)
        asked.channel.close()
    assert (peer.connections, len(peer.requests)) == (2, 3)


async def test_a_new_connection_that_ends_without_an_answer_is_a_failure_and_not_tried_for_ever() -> None:
    async with serving(BEHAVIOURS["vanishes"]) as peer:
        asked = Asked(peer.url)
        failure = await asked.ask()
        assert isinstance(failure, Failure)
        assert failure.reason is Reason.CLOSED
    assert peer.connections == 1


async def test_bytes_that_nobody_asked_for_end_the_connection() -> None:
    async with serving(answering(response("200 OK", b"1") + b"HTTP/1.1 200 OK\r\n")) as peer:
        asked = Asked(peer.url)
        assert isinstance(await asked.ask(), Answer)
        assert isinstance(await asked.ask(), Answer)
        asked.channel.close()
    assert peer.connections == 2


async def test_only_one_request_is_in_flight() -> None:
    async with serving(BEHAVIOURS["hangs"]) as peer:
        asked = Asked(peer.url)
        asked.channel.request(request_head(asked.endpoint))
        with pytest.raises(RuntimeError, match="in flight"):
            asked.channel.request(request_head(asked.endpoint))
        asked.channel.expire()
        failure = asked.found.get_nowait()
        assert isinstance(failure, Failure)
        assert failure.reason is Reason.TIMEOUT
        assert not asked.channel.busy
        asked.channel.close()


async def test_after_a_time_out_the_next_request_has_a_connection_of_its_own() -> None:
    """A late answer to the request before must not be taken for the answer to this one."""
    async with serving(BEHAVIOURS["hangs"]) as peer:
        asked = Asked(peer.url)
        asked.channel.request(request_head(asked.endpoint))
        await until(lambda: peer.connections)
        asked.channel.expire()
        asked.found.get_nowait()
        peer.behave = answering(response("200 OK", b"new"))
        answer = await asked.ask()
        asked.channel.close()
    assert isinstance(answer, Answer)
    assert (answer.body, peer.connections) == (b"new", 2)


# --- other methods ----------------------------------------------------------------------------------------------------


async def test_a_body_is_sent_with_its_length_and_once() -> None:
    received: list[bytes] = []

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        received.append(await reader.readexactly(5))
        writer.write(response("201 Created", b"made"))
        await writer.drain()

    async with serving(behave) as peer:
        answer = await send("POST", f"{peer.url}/a?b", body=b"hello", headers=[(b"content-type", b"text/plain")])
    assert (answer.status, answer.body, received) == (201, b"made", [b"hello"])
    assert peer.requests[0].startswith(b"POST /a?b HTTP/1.1\r\n")
    assert b"content-length: 5\r\n" in peer.requests[0]


async def test_a_method_without_a_body_has_no_length() -> None:
    async with serving(answering(response("204 No Content"))) as peer:
        assert (await send("DELETE", peer.url)).status == 204
    assert peer.requests[0].startswith(b"DELETE / HTTP/1.1\r\n")
    assert b"content-length" not in peer.requests[0]


async def test_an_error_names_the_method() -> None:
    with pytest.raises(FetchError, match=r"^POST http://127.0.0.1:1/: unreachable"):
        await send("POST", "http://127.0.0.1:1/", body=b"")
    async with serving(BEHAVIOURS["resets"]) as peer:
        with pytest.raises(FetchError, match=r"^POST http://127"):
            await send("POST", peer.url, body=b"{}")
    assert len(peer.requests) == 1
