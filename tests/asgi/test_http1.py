"""Heads of requests: what is read, and what is refused because it could be read in two ways (T17, T19)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkmetrics.asgi.base import text_response
from rkmetrics.asgi.http1 import Refused, parse_head, response_head

HOST = b"\r\nHost: a"


def test_a_head_is_read() -> None:
    head = parse_head(b"GET /metrics?name[]=a HTTP/1.1\r\nHost: a:1\r\nAuthorization:  Bearer x \r\nX: \xff\xfe\r\nE:")
    assert (head.request.method, head.request.path, head.request.query) == ("GET", "/metrics", b"name[]=a")
    assert head.request.headers == (
        (b"host", b"a:1"),
        (b"authorization", b"Bearer x"),
        (b"x", b"\xff\xfe"),
        (b"e", b""),
    )
    assert (head.length, head.keep_alive) == (0, True)


PATHS: list[tuple[bytes, str, bytes]] = [
    (b"/", "/", b""),
    (b"/metrics?", "/metrics", b""),
    (b"/a?b?c", "/a", b"b?c"),
    (b"/%6detrics", "/%6detrics", b""),
    (b"//metrics", "//metrics", b""),
    (b"/metrics#x", "/metrics#x", b""),
    (b"*", "*", b""),
    (b"http://host:1/metrics?a", "/metrics", b"a"),
    (b"HTTPS://user@host/metrics", "/metrics", b""),
    (b"http://host", "", b""),
    (b"http:///metrics", "http:///metrics", b""),
    (b"metrics", "metrics", b""),
]


@pytest.mark.parametrize(("target", "path", "query"), PATHS)
def test_the_target_is_taken_as_it_is_written(target: bytes, path: str, query: bytes) -> None:
    request = parse_head(b"GET " + target + b" HTTP/1.1" + HOST).request
    assert (request.path, request.query) == (path, query)


CONNECTIONS: list[tuple[bytes, bool]] = [
    (b"HTTP/1.1" + HOST, True),
    (b"HTTP/1.1" + HOST + b"\r\nConnection: close", False),
    (b"HTTP/1.1" + HOST + b"\r\nConnection: foo , CLOSE", False),
    (b"HTTP/1.1" + HOST + b"\r\nConnection: keep-alive", True),
    (b"HTTP/1.1" + HOST + b"\r\nExpect: 100-continue", False),
    (b"HTTP/1.0", False),
    (b"HTTP/1.0" + HOST, False),
]


@pytest.mark.parametrize(("rest", "keep_alive"), CONNECTIONS)
def test_who_may_ask_again_on_one_connection(rest: bytes, keep_alive: bool) -> None:
    assert parse_head(b"GET / " + rest).keep_alive is keep_alive


GET = b"GET / HTTP/1.1" + HOST
BAD: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"GET", 400),
    (b"GET /", 400),
    (b"GET / HTTP/2.0" + HOST, 400),
    (b"PRI * HTTP/2.0", 400),
    (b"GET  / HTTP/1.1" + HOST, 400),
    (b"GET /a b HTTP/1.1" + HOST, 400),
    (b"GET /\xff HTTP/1.1" + HOST, 400),
    (b"GET /\x00 HTTP/1.1" + HOST, 400),
    (b"G\xffT / HTTP/1.1" + HOST, 400),
    (b"GET / HTTP/1.1 " + HOST, 400),
    (b"GET / http/1.1" + HOST, 400),
    (b"GET / HTTP/1.1", 400),
    (b"GET / HTTP/1.1" + HOST + HOST, 400),
    (b"GET / HTTP/1.0" + HOST + HOST, 400),
    (GET + b"\r\nno colon", 400),
    (GET + b"\r\nName : value", 400),
    (GET + b"\r\n folded: line", 400),
    (GET + b"\r\nA: b\r\n\tc", 400),
    (GET + b"\r\n: value", 400),
    (GET + b"\r\nA: b\nC: d", 400),
    (GET + b"\r\nA: b\rC: d", 400),
    (GET + b"\r\nA: \x00", 400),
    (GET + b"\r\nA: \x7f", 400),
    (GET + b"\nA: b", 400),
    (GET + b"\r\nContent-Length: -1", 400),
    (GET + b"\r\nContent-Length: +1", 400),
    (GET + b"\r\nContent-Length: 0x1", 400),
    (GET + b"\r\nContent-Length: \xb2", 400),
    (GET + b"\r\nContent-Length:", 400),
    (GET + b"\r\nContent-Length: 1, 1", 400),
    (GET + b"\r\nContent-Length: 1\r\nContent-Length: 1", 400),
    (GET + b"\r\nContent-Length: " + b"9" * 5000, 400),
    (GET + b"\r\nContent-Length: 65537", 413),
    (GET + b"\r\nContent-Length: 99999999999999999", 413),
    (GET + b"\r\nTransfer-Encoding: chunked", 400),
    (GET + b"\r\nTransfer-Encoding: identity\r\nContent-Length: 1", 400),
    (GET + b"".join(b"\r\nX-%d: a" % n for n in range(100)), 431),
]


@pytest.mark.parametrize(("head", "status"), BAD)
def test_what_could_be_read_in_two_ways_is_refused(head: bytes, status: int) -> None:
    with pytest.raises(Refused) as refused:
        parse_head(head)
    assert refused.value.status == status


def test_a_body_up_to_the_limit_is_announced() -> None:
    assert parse_head(GET + b"\r\nContent-Length: 65536").length == 65536


@given(st.binary(max_size=300), st.booleans())
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(head: bytes, realistic: bool) -> None:
    assert _verdict(GET + b"\r\n" + head if realistic else head) in (200, 400, 413, 431)


def _verdict(head: bytes) -> int:
    try:
        parse_head(head)
    except Refused as refused:
        return refused.status
    return 200


def test_an_answers_head_says_whether_the_connection_stays() -> None:
    for keep_alive, word in ((True, b"keep-alive"), (False, b"close")):
        head = response_head(text_response(404, "no"), keep_alive=keep_alive, date="Sat, 21 Nov 2026 04:00:00 GMT")
        assert head.startswith(b"HTTP/1.1 404 Not Found\r\ncontent-type: text/plain; charset=utf-8\r\n")
        assert head.endswith(b"\r\ndate: Sat, 21 Nov 2026 04:00:00 GMT\r\nconnection: " + word + b"\r\n\r\n")
