"""Accept and Accept-Encoding by RFC 9110, with the headers that are really sent, and with any bytes."""

from __future__ import annotations

import gzip
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkmetrics.exposition import CODINGS, FORMATS, choose_coding, coding, negotiate, prefers

PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
OPENMETRICS = "application/openmetrics-text"

ACCEPT = [
    # What Prometheus sends: 2.42; 2.42 with native histograms; 3.x; 3.x with native histograms; 2.5.
    (
        f"{OPENMETRICS};version=1.0.0,{OPENMETRICS};version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "openmetrics",
    ),
    (
        f"{PROTOBUF},{OPENMETRICS};version=1.0.0;q=0.8,{OPENMETRICS};version=0.0.1;q=0.75,"
        "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "protobuf",
    ),
    (
        f"{OPENMETRICS};version=1.0.0;escaping=allow-utf-8;q=0.5,{OPENMETRICS};version=0.0.1;q=0.4,"
        "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
        "openmetrics",
    ),
    (
        f"{PROTOBUF};q=0.6,{OPENMETRICS};version=1.0.0;escaping=allow-utf-8;q=0.5,{OPENMETRICS};version=0.0.1;q=0.4,"
        "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
        "protobuf",
    ),
    (f"{OPENMETRICS}; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "text"),
    # Browsers, curl, nothing.
    ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", "text"),
    ("*/*", "text"),
    ("", "text"),
    # Weights, and not the order, decide; at equal weights a name comes before a wildcard, then the client's order.
    (f"{OPENMETRICS};q=0.5, text/plain;q=0.9", "text"),
    (f"text/plain;q=0.5, {OPENMETRICS};q=0.9", "openmetrics"),
    (f"text/plain, {OPENMETRICS}", "text"),
    (f"{OPENMETRICS}, text/plain", "openmetrics"),
    (f"*/*, {OPENMETRICS}", "openmetrics"),
    (f"{OPENMETRICS}, */*", "openmetrics"),
    ("application/*", "openmetrics"),
    ("text/*", "text"),
    # The most specific range decides about a representation, q=0 refuses it.
    ("text/plain;q=0, */*;q=0.1", "openmetrics"),
    (f"text/plain;q=0, {OPENMETRICS};q=0, */*", "protobuf"),
    (f"{OPENMETRICS};q=0, application/*", "protobuf"),
    (f"{OPENMETRICS};q=0.1, {OPENMETRICS};version=1.0.0;q=0.9, text/plain;q=0.5", "openmetrics"),
    (f"{OPENMETRICS};q=0.0, text/plain;q=0.001", "text"),
    # Versions are never claimed that are not spoken.
    (f"{OPENMETRICS};version=0.0.1", "text"),
    (f"{OPENMETRICS};version=2.0.0", "text"),
    (f"{OPENMETRICS};version=99.0.0", "text"),
    (f"{OPENMETRICS};version=abc", "text"),
    (f"{OPENMETRICS};version=", "text"),
    (f"{OPENMETRICS};version=2.0.0, {OPENMETRICS};version=1.0.0;q=0.1", "openmetrics"),
    (f'{OPENMETRICS};version="1.0.0"', "openmetrics"),
    (f'{OPENMETRICS};version="1\\.0.0"', "openmetrics"),
    (f"{OPENMETRICS};VERSION=1.0.0;CharSet=UTF-8", "openmetrics"),
    (f"{OPENMETRICS.upper()} ; version=1.0.0 ; q=0.5", "openmetrics"),
    (f"{OPENMETRICS};charset=iso-8859-1", "text"),
    (f"{OPENMETRICS};escaping=values", "openmetrics"),
    ("text/plain;version=1.0.0", "text"),
    (f"text/plain;version=1.0.0, {OPENMETRICS};q=0.1", "openmetrics"),
    # Protobuf is one message type in one framing.
    (PROTOBUF, "protobuf"),
    (PROTOBUF.replace(";", " ; ").replace("=delimited", '="delimited"'), "protobuf"),
    ("application/vnd.google.protobuf", "text"),
    ("application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text", "text"),
    ("application/vnd.google.protobuf;proto=other.Message;encoding=delimited", "text"),
    # Nothing of ours: text all the same.
    ("image/png", "text"),
    ("*/*;q=0", "text"),
    ("text/plain;q=0", "text"),
    # An element that is not well formed counts as if it were not there.
    (f"{OPENMETRICS};q=2, text/plain;q=0.1", "text"),
    (f"{OPENMETRICS};q=high, text/plain;q=0.1", "text"),
    (f"{OPENMETRICS};q=-1, text/plain;q=0.1", "text"),
    (f"{OPENMETRICS};q=0.1234, text/plain;q=0.1", "text"),
    (f"{OPENMETRICS};q=, text/plain;q=0.1", "text"),
    (f"{OPENMETRICS};=, text/plain;q=0.1", "text"),
    (f"{OPENMETRICS} version=1.0.0, text/plain;q=0.1", "text"),
    (f"/, ;, =,,, text, text/, /plain, */plain, {OPENMETRICS}", "openmetrics"),
    (f'text/plain;a="{OPENMETRICS};q=1, {PROTOBUF}";q=0.1', "text"),
    (f'text/plain;a="no end, {OPENMETRICS}', "text"),
    (f"{OPENMETRICS};;;version=1.0.0;", "openmetrics"),
]


@pytest.mark.parametrize(("header", "format"), ACCEPT)
def test_the_format_is_what_was_asked_for(header: str, format: str) -> None:
    assert negotiate(header.encode()).name == format


def test_no_header_gets_text() -> None:
    assert negotiate(None).name == "text"


def test_each_format_says_its_version_and_never_echoes_one() -> None:
    assert [format.content_type for format in FORMATS] == [
        "text/plain; version=0.0.4; charset=utf-8",
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
        "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited",
    ]


@pytest.mark.parametrize(
    ("header", "json"),
    [
        ("application/json", True),
        ("application/json, text/plain;q=0.5", True),
        ("application/json, text/plain", True),
        ("text/plain, application/json", False),
        ("text/plain, application/json;q=0.9", False),
        ("application/json;q=0.5, */*", False),
        ("application/json, */*", True),
        ("application/*", False),
        ("*/*", False),
        ("application/json;q=0", False),
        ("", False),
    ],
)
def test_another_media_type_is_preferred_when_it_is_named_and_ranks_first(header: str, json: bool) -> None:
    assert prefers(header.encode(), "application/json") is json


ENCODING = [
    ("gzip", "gzip"),
    ("x-gzip", "gzip"),
    ("GZip", "gzip"),
    ("deflate, br", "identity"),
    ("gzip, deflate, br, zstd", "zstd"),
    ("zstd", "zstd"),
    ("gzip;q=1.0, zstd;q=0.5", "gzip"),
    ("gzip;q=0", "identity"),
    ("gzip;q=0.0, identity", "identity"),
    ("gzip;q=0, *", "identity"),
    ("*", "gzip"),
    ("*;q=0", "identity"),
    ("*;q=0, gzip", "gzip"),
    ("identity;q=0", "identity"),
    ("identity;q=0, gzip;q=0.001", "gzip"),
    ("identity;q=0, *;q=0", "identity"),
    ("gzip;q=0.5, identity;q=0.9", "identity"),
    ("gzip;q=0.1", "gzip"),
    ("gzip;q=high", "identity"),
    ("gzip;q=1.001", "identity"),
    ("gzip;level=9;q=0.5", "gzip"),
    ("", "identity"),
    (",,;,", "identity"),
]


@pytest.mark.parametrize(("header", "name"), ENCODING)
def test_the_coding_is_what_was_asked_for(header: str, name: str) -> None:
    if name == "zstd":
        pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "zstandard")
    assert choose_coding(header.encode()).name == name


def test_no_accept_encoding_gets_the_page_as_it_is() -> None:
    assert choose_coding(None).name == "identity"


@pytest.mark.parametrize("page", [b"", b"x 1\n", b"metric_total 12345\n" * 10_000])
def test_a_packed_page_unpacks_to_itself(page: bytes) -> None:
    assert choose_coding(b"identity").compress(page) == page
    assert gzip.decompress(choose_coding(b"gzip").compress(page)) == page


def test_gzip_of_a_page_depends_on_nothing_but_the_page() -> None:
    packed = choose_coding(b"gzip").compress(b"x 1\n")
    assert packed[4:8] == bytes(4), "the header holds no time"


def test_zstd_unpacks_to_the_page() -> None:
    page = b"metric_total 12345\n" * 10_000
    packed = choose_coding(b"zstd")
    if packed.name != "zstd":
        pytest.skip("no zstd here: pip install 'rkmetrics[zstd]'")
    if sys.version_info >= (3, 14):
        from compression.zstd import decompress  # type: ignore[import-not-found, unused-ignore]
    else:
        from zstandard import decompress
    assert decompress(packed.compress(page)) == page


def test_without_a_zstd_package_gzip_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_zstd_compressor", lambda: None)
    assert choose_coding(b"zstd, gzip").name == "gzip"
    assert choose_coding(b"zstd").name == "identity"


# ---- any bytes

_words = st.sampled_from(
    [
        b"text/plain",
        b"*/*",
        OPENMETRICS.encode(),
        PROTOBUF.encode(),
        b"q=0.5",
        b"q=0",
        b"version=1.0.0",
        b"gzip",
        b"zstd",
        b"*",
    ]
)
_bytes = st.one_of(
    _words, st.sampled_from([b",", b";", b'"', b"\\", b" ", b"\t", b"=", b"/", b"\r\n", b"\0", b"\xff"]), st.binary()
)
headers = st.lists(_bytes, max_size=40).map(b"".join)


@settings(deadline=None, max_examples=500)
@given(headers)
def test_no_bytes_in_a_header_raise(header: bytes) -> None:
    assert negotiate(header) in FORMATS
    assert choose_coding(header) in CODINGS
    assert prefers(header, "application/json") in (True, False)


@pytest.mark.parametrize(
    "piece",
    [
        b",",
        b";",
        b'"',
        b"\\",
        b'"\\',
        b'\\"',
        b' "',
        b"a/b;",
        b"a/b,",
        b"*/*;q=0.5,",
        b'a/b;c="',
        b"\xff",
        b"q=1;",
        b"gzip;q=0.5,",
    ],
)
def test_a_header_of_64_kib_is_bounded_work(piece: bytes) -> None:
    """Counted in steps of the interpreter and in memory, not in seconds."""
    header = (piece * (65536 // len(piece) + 1))[:65536]
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    tracemalloc.start()
    sys.setprofile(count)
    try:
        negotiate(header)
        choose_coding(header)
    finally:
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert steps < 10_000
    assert peak < 500_000


def test_an_element_cut_off_by_the_limit_does_not_count() -> None:
    filler = b"x/y, " * 12 + b'a/b;c="' + b"z" * 4000
    assert negotiate(filler[:4080] + b'", ' + OPENMETRICS.encode()).name == "text"
    assert negotiate(b"x/y, " * 60 + OPENMETRICS.encode()).name == "openmetrics"
    assert negotiate(b"x/y, " * 64 + OPENMETRICS.encode()).name == "text"
