"""What etcd's gateway is asked and answers, as bytes; and whatever else may come from there."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.errors import CompactedError, EtcdError, EtcdUnavailableError, LeaseLostError, PayloadError
from rkmetrics.etcd import wire
from rkmetrics.etcd.client import Etcd
from rkmetrics.etcd.wire import KeyValue
from tests.hostile import BEHAVIOURS, answering, response, serving

HEADER = '"header":{"cluster_id":"324952591200643719","member_id":"3319814642761637952","revision":"7","raft_term":"2"}'


def test_a_page_is_read_as_etcd_writes_it() -> None:
    """3.4.23."""
    data = (
        f"{{{HEADER},"
        '"kvs":[{"key":"YQ==","create_revision":"2","mod_revision":"5","version":"1","value":"YmI=","lease":"99"},'
        '{"key":"Yg==","create_revision":"3","mod_revision":"3","version":"1"}],"more":true,"count":"9"}'
    )
    page = wire.page_of(wire.decode(data.encode()))
    assert page.items == (KeyValue(b"a", b"bb", 99, 2, 5), KeyValue(b"b", b"", 0, 3, 3))
    assert (page.more, page.revision) == (True, 7)


def test_news_are_read_as_etcd_writes_them() -> None:
    found = wire.decode(
        b'{"header":{"revision":"7"},"events":[{"kv":{"key":"YQ==","mod_revision":"6","value":"YQ=="}},'
        b'{"type":"DELETE","kv":{"key":"YQ==","mod_revision":"7"}}]}'
    )
    news = wire.watch_news(found)
    assert [(item.key, item.value, item.modified, deleted) for item, deleted in news.events] == [
        (b"a", b"a", 6, False),
        (b"a", b"", 7, True),
    ]
    assert (news.revision, news.created, news.canceled, news.compacted) == (7, False, False, 0)


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"a", b"b"), (b"a/", b"a0"), (b"a\xff", b"b"), (b"\xff\xff", b"\0"), (b"", b"\0")]
)
def test_a_prefix_has_an_end(prefix: bytes, end: bytes) -> None:
    assert wire.prefix_end(prefix) == end


@given(st.binary(min_size=1), st.binary())
def test_the_end_of_a_prefix_is_behind_all_that_begin_so(prefix: bytes, more: bytes) -> None:
    end = wire.prefix_end(prefix)
    assert prefix + more < end or end == b"\0"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"error":"etcdserver: requested lease not found","message":"etcdserver: ...","code":5}', 5),
        (b'{"error":{"grpc_code":14,"http_code":503,"message":"no leader"}}', 14),
        (b'{"code":"x","message":1}', 2),
        (b'{"error":null,"code":3}', 3),
    ],
)
def test_errors_of_both_forms_have_a_code(data: bytes, expected: int) -> None:
    error = wire.error_of(wire.decode(data))
    assert error is not None
    assert error[0] == expected


JUNK: list[bytes] = [
    b"",
    b"[]",
    b"7",
    b"{",
    b"\xff\xff",
    b"[" * 100_000,
    b'{"header":7,"kvs":[],"events":[]}',
    b'{"header":{"revision":"x"}}',
    b'{"header":{"revision":true}}',
    b'{"header":{"revision":"99999999999999999999999"}}',
    b'{"kvs":7,"events":7}',
    b'{"kvs":[7],"events":[7]}',
    b'{"kvs":[{"key":"?"}],"events":[{"kv":{"key":"?"}}]}',
    b'{"kvs":[{"key":7}],"events":[{"kv":7}]}',
]


@pytest.mark.parametrize("data", JUNK)
def test_junk_is_an_error_of_one_kind(data: bytes) -> None:
    for read in (wire.page_of, wire.watch_news):
        with pytest.raises(PayloadError):
            read(wire.decode(data))


FIELDS = ["header", "revision", "kvs", "events", "kv", "key", "value", "lease", "responses", "response_range", "error"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS), inner),
)


@given(JSON)
def test_nothing_else_is_raised(value: Any) -> None:
    found = {"kvs": value, "events": value, "header": value, "responses": value, "error": value}
    wire.error_of(found)
    for read in (wire.page_of, wire.watch_news, wire.in_the_way, wire.revision_of):
        with suppress(PayloadError):
            read(found)


# --- the client at servers that are no etcd ---------------------------------------------------------------------------

REFUSED = sorted(set(BEHAVIOURS) - {"other JSON", "wrong JSON"})


@pytest.mark.parametrize("name", REFUSED)
async def test_a_hostile_server_is_an_etcd_that_is_away(name: str) -> None:
    async with serving(BEHAVIOURS[name]) as peer:
        client = Etcd([peer.url], timeout_seconds=0.3)
        with pytest.raises(EtcdUnavailableError):
            await client.keep_alive(7)


# A watch has no limit of time; who watches has one.
ENDLESS = {"hangs", "drips its body", "drips its headers", "a length of 1 GiB", "another protocol"}
SLOW = {"tiny chunks without end"}  # it ends too, after 8 MiB of them


@pytest.mark.parametrize("name", sorted(set(REFUSED) - ENDLESS - SLOW))
async def test_a_hostile_server_ends_a_watch(name: str) -> None:
    async with serving(BEHAVIOURS[name]) as peer:
        watch = Etcd([peer.url]).watch(b"a", 1)
        with pytest.raises(EtcdUnavailableError):
            await anext(watch)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (response("404 Not Found", b'{"error":"x","message":"x","code":5}'), LeaseLostError),
        (response("400 Bad Request", b'{"error":"x","message":"x","code":11}'), CompactedError),
        (response("503 Service Unavailable", b'{"error":"x","message":"x","code":14}'), EtcdUnavailableError),
        (response("403 Forbidden", b'{"error":"x","message":"permission denied","code":7}'), EtcdError),
        (response("200 OK", b'{"result":{"TTL":"0"}}'), LeaseLostError),
        (response("200 OK", b'{"result":{"TTL":{}}}'), EtcdUnavailableError),
        (response("200 OK", b'{"result":[]}'), EtcdUnavailableError),
    ],
)
async def test_answers_become_errors_of_ours(answer: bytes, expected: type[EtcdError]) -> None:
    async with serving(answering(answer)) as peer:
        with pytest.raises(expected) as caught:
            await Etcd([peer.url]).keep_alive(7)
        assert type(caught.value) is expected


async def test_credentials_in_an_endpoint_are_in_no_error() -> None:
    client = Etcd(["http://user:secret@127.0.0.1:1"])
    with pytest.raises(EtcdUnavailableError) as caught:
        await client.get(b"a")
    assert "secret" not in f"{caught.value!r} {caught.value} {client.shown}"


def test_no_endpoint_is_wrong_use() -> None:
    with pytest.raises(ValueError, match=r"endpoints=\(\): expected at least one URL"):
        Etcd([])
