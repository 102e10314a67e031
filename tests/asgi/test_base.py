"""Requests and answers as values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.asgi.base import Request, Response, is_exact, json_response, text_response

HEADERS = ((b"Accept", b" text/plain\t"), (b"X-Other", b"1"), (b"ACCEPT", b"*/*"))


def test_values_of_a_header_come_in_order_whatever_the_case_and_trimmed() -> None:
    assert Request("GET", "/", headers=HEADERS).values(b"accept") == [b"text/plain", b"*/*"]


def test_the_lines_of_a_list_header_are_one_list() -> None:
    assert Request("GET", "/", headers=HEADERS).combined(b"accept") == b"text/plain, */*"
    assert Request("GET", "/").combined(b"accept") is None


FIELDS: list[tuple[bytes, list[tuple[bytes, bytes]]]] = [
    (b"", []),
    (b"a=1&b=2", [(b"a", b"1"), (b"b", b"2")]),
    (b"a", [(b"a", b"")]),
    (b"&&a=1&", [(b"a", b"1")]),
    (b"name%5B%5D=x+y%20z", [(b"name[]", b"x y z")]),
    (b"a=b=c", [(b"a", b"b=c")]),
    (b"a=%zz%4", [(b"a", b"%zz%4")]),
    (b"a=\xff%ff", [(b"a", b"\xff\xff")]),
]


@pytest.mark.parametrize(("query", "fields"), FIELDS)
def test_a_query_is_read_as_fields(query: bytes, fields: list[tuple[bytes, bytes]]) -> None:
    assert Request("GET", "/", query).fields() == fields


@given(st.binary())
def test_any_query_can_be_read(query: bytes) -> None:
    Request("GET", "/", query).fields()


def test_neither_headers_nor_query_are_in_the_repr() -> None:
    request = Request("GET", "/metrics", b"token=t0ken", ((b"authorization", b"Bearer s3cret"),))
    assert repr(request) == "Request(method='GET', path='/metrics')"


EXACT: list[tuple[str, bytes | None, bool]] = [
    ("/metrics", None, True),
    ("/metrics", b"/metrics", True),
    ("/metrics", b"/internal/metrics", True),
    ("/metrics", b"/caf%C3%A9/metrics", True),
    ("/metrics", b"/metrics?a=b", True),
    ("/metrics", b"/%6detrics", False),
    ("/metrics", b"/internal%2Fmetrics", False),
    ("/metrics", b"/metrics/", False),
    ("/metrics", b"/metrics%2F", False),
    ("/metrics", b"/rewritten/by/a/middleware", True),
    ("/metrics", b"\xff\xfe", True),
]


@pytest.mark.parametrize(("path", "raw_path", "exact"), EXACT)
def test_a_path_is_exact_when_the_client_wrote_it_so(path: str, raw_path: bytes | None, exact: bool) -> None:
    assert is_exact(path, raw_path) is exact


def test_an_answer_carries_its_length_and_what_caches_need() -> None:
    headers = dict(text_response(405, "no\n", ((b"allow", b"GET"),)).raw_headers())
    assert headers == {
        b"content-type": b"text/plain; charset=utf-8",
        b"content-length": b"3",
        b"cache-control": b"no-store",
        b"vary": b"Accept, Accept-Encoding, Authorization",
        b"x-content-type-options": b"nosniff",
        b"allow": b"GET",
    }


def test_json_is_one_line() -> None:
    response = json_response(503, {"status": "stale", "text": "a\nb\u2028é"})
    assert (response.status, response.content_type) == (503, "application/json")
    assert response.body.count(b"\n") == 1
    assert json.loads(response.body) == {"status": "stale", "text": "a\nb\u2028é"}


def test_an_empty_answer_says_that_it_is_empty() -> None:
    assert dict(Response(200, b"").raw_headers())[b"content-length"] == b"0"
