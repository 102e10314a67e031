"""Backends as values and on the wire: one spelling for each address, and no bytes that raise anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.discovery.base import BODY_LIMIT_BYTES, Address, Backend, Registered
from rkmetrics.errors import BackendError, PayloadError

GOOD = {"id": "backend-1", "address": "10.0.1.5:3000", "metrics_port": 9090}

ADDRESSES = [
    ("10.0.1.5:3000", "10.0.1.5:3000"),
    ("[fd00::5]:3000", "[fd00::5]:3000"),
    ("[FD00:0:0::0005]:3000", "[fd00::5]:3000"),
    ("Backend-1.Internal:80", "backend-1.internal:80"),
    ("localhost:65535", "localhost:65535"),
    ("1-2-3-4.example:1", "1-2-3-4.example:1"),
]
# Each of these reaches some address through some resolver (T13); none of them is the address's one spelling.
REFUSED = [
    "2130706433:80",
    "0x7f000001:80",
    "0x7f.1:80",
    "127.1:80",
    "0177.0.0.1:80",
    "127.0.0.01:80",
    "127.0.0.0x1:80",
    "1.2.3:80",
    "foo.1:80",
    "foo.0x1f:80",
    "[::ffff:127.0.0.1]:80",
    "[::ffff:7f00:1]:80",
    "[::127.0.0.1]:80",
    "[64:ff9b::10.0.0.1]:80",
    "[fe80::1%eth0]:80",
    "0.0.0.0:80",
    "[::]:80",
    "10.0.1.5:0",
    "10.0.1.5:65536",
    "10.0.1.5:080",
    "10.0.1.5:+80",
    "10.0.1.5: 80",
    "10.0.1.5",
    ":80",
    "",
    "fd00::5:3000",
    "[fd00::5]",
    "[10.0.1.5]:80",
    "user@10.0.1.5:80",
    "user:password@10.0.1.5:80",
    "http://10.0.1.5:80",
    "10.0.1.5:80/path",
    "10.0.1.5/path:80",
    "10.0.1.5#:80",
    "10.0.1.5?:80",
    "10.0.1.5\\@evil:80",
    "10.0.1.5\t:80",
    "10.0.1.5\n:80",
    "10.0.1.5,10.0.1.6:80",
    "example.com.:80",
    "-a.example:80",
    "a..example:80",
    "a_b.example:80",
    "ⓛocalhost:80",
    "127。0。0。1:80",
    "١٢٧.0.0.1:80",
    "10.0.1.5:\uff18\uff10",
    "a" * 64 + ":80",
    ".".join(["a" * 60] * 5) + ":80",
]


@pytest.mark.parametrize(("text", "canonical"), ADDRESSES)
def test_an_address_has_one_spelling(text: str, canonical: str) -> None:
    found = Address.parse(text)
    assert str(found) == canonical
    assert Address.parse(canonical) == found


@pytest.mark.parametrize("text", REFUSED)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(BackendError, match="expected host:port"):
        Address.parse(text)


@given(st.text(max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        found = Address.parse(text)
    except BackendError:
        return
    assert Address.parse(str(found)) == found


def test_the_protocols_body_is_read_and_written() -> None:
    backend = Backend.decode(json.dumps(GOOD).encode())
    assert backend == Backend.checked("backend-1", "10.0.1.5:3000", 9090)
    assert json.loads(backend.encode()) == GOOD
    assert str(backend.metrics_address) == "10.0.1.5:9090"


def test_what_we_add_is_optional_and_what_nobody_knows_is_ignored() -> None:
    more = {**GOOD, "announce_interval_seconds": 30, "labels": {"zone": "eu-1a"}, "weight": {"of": ["tomorrow"]}}
    backend = Backend.decode(json.dumps(more).encode())
    assert (backend.announce_interval_seconds, backend.labels) == (30, (("zone", "eu-1a"),))
    assert Backend.decode(backend.encode()) == backend


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""},
        {"id": "a b"},
        {"id": "a/b"},
        {"id": "../x"},
        {"id": 'a"}'},
        {"id": "a\n"},
        {"id": "x" * 129},
        {"id": 7},
        {"id": None},
        {"metrics_port": "9090"},
        {"metrics_port": 9090.5},
        {"metrics_port": True},
        {"metrics_port": 0},
        {"metrics_port": -1},
        {"metrics_port": 65_536},
        {"metrics_port": 10**30},
        {"address": 5},
        {"address": "x" * 400},
        {"announce_interval_seconds": 0},
        {"announce_interval_seconds": "30"},
        {"announce_interval_seconds": 1e9},
        {"labels": []},
        {"labels": {"zone": 1}},
        {"labels": {"Zone": "x"}},
        {"labels": {'a"b': "x"}},
        {"labels": {"__name__": "x"}},
        {"labels": {"zone": "a\nb"}},
        {"labels": {"zone": "x" * 129}},
        {"labels": {f"a{number}": "" for number in range(17)}},
    ],
)
def test_a_field_that_cannot_be_used_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((BackendError, PayloadError)):
        Backend.decode(json.dumps({**GOOD, **change}).encode())


@given(st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)))
def test_no_bytes_raise_anything_else(data: bytes | str) -> None:
    with pytest.raises((BackendError, PayloadError)):
        Backend.decode(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))


def test_size_and_depth_are_bounded() -> None:
    largest = Backend.checked(
        "i" * 128,
        ".".join(["a" * 62] * 4)[:253] + ":65535",
        65_535,
        announce_interval_seconds=12345.678,
        labels={f"{number:02}".join("lx") * 16: "\U0001f600" * 128 for number in range(16)},
    )
    assert len(largest.encode()) < BODY_LIMIT_BYTES * 1.5
    for data in (b"[" * 8_000, b" " * (BODY_LIMIT_BYTES + 1)):
        with pytest.raises(PayloadError):
            Backend.decode(data)


def test_an_error_shows_the_beginning_of_a_long_value_only() -> None:
    with pytest.raises(BackendError) as raised:
        Address.parse("x" * 5_000)
    assert len(str(raised.value)) < 400


def test_the_answer_goes_both_ways() -> None:
    answer = Registered("b", "up", 90.0)
    assert Registered.decode(answer.encode()) == answer
    with pytest.raises(PayloadError):
        Registered.decode(b"<html>")
