"""The two envelopes of a request over tcp, told apart: real clients send theirs with whatever path is listed."""

from __future__ import annotations

import random

import pytest

from rkmetrics.errors import PayloadError
from rkmetrics.planes.frame import (
    FrameTooLargeError,
    RequestReader,
    TcpRequest,
    encode_request,
    encode_two_part,
    read_header,
)

LIMIT = 32 * 1024 * 1024
HEADERS = b'{"x-endpoint-path":"generate"}'
PATHS = ("generate", "7d7ba1fbdcacd743/generate")


def payload(size: int) -> bytes:
    """Two parts of so many bytes."""
    header = b'{"id":"1"}'
    return encode_two_part(header, b"x" * (size - 24 - len(header)))


# Sizes at which the bytes of one form look most like the other: 0x7b is '{'.
SIZES = (34, 400, 0x7B22, 0x7BFF, 0xFFFF, 0x10000, 0x27B7D, 0x2B7B22, 1 << 20)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("headers", [None, b"", b"{}", HEADERS])
@pytest.mark.parametrize("path", PATHS)
def test_either_form_is_read_with_either_path(path: str, headers: bytes | None, size: int) -> None:
    """Without headers and without a '/' nothing says that it is of 0.8; but no client of 0.8 sends that."""
    if headers == b"" and "/" not in path:
        headers = HEADERS
    request = TcpRequest(path, headers, payload(size))
    assert list(RequestReader(LIMIT).feed(encode_request(request))) == [request]


@pytest.mark.parametrize("headers", [None, HEADERS])
@pytest.mark.parametrize("path", PATHS)
def test_either_form_is_read_wherever_it_is_cut(path: str, headers: bytes | None) -> None:
    """A length that only looks too large, as the rest is not there yet, is no reason to refuse it."""
    requests = [TcpRequest(path, headers, payload(size)) for size in (600, 0x7B22)]
    first, second = map(encode_request, requests)
    data = first + second
    for cut in (*range(1, 120), *range(len(first), len(first) + 120)):
        reader = RequestReader(len(requests[1].payload))
        assert [*reader.feed(data[:cut]), *reader.feed(data[cut:])] == requests, cut


def test_a_mixed_stream_is_read_in_pieces_of_any_size() -> None:
    dice = random.Random(3)
    requests = [
        TcpRequest(dice.choice(PATHS), dice.choice((None, HEADERS)), payload(dice.choice(SIZES[:4]))) for _ in range(40)
    ]
    data, reader, found = b"".join(map(encode_request, requests)), RequestReader(LIMIT), list[TcpRequest]()
    while data:
        size = dice.choice((1, 2, 19, 64, 4096, 65536))
        found += reader.feed(data[:size])
        data = data[size:]
    assert found == requests
    assert reader.rest == 0


@pytest.mark.parametrize("headers", [None, HEADERS])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_too_large_is_refused_before_it_comes(path: str, headers: bytes | None) -> None:
    begin = encode_request(TcpRequest(path, headers, payload(2_000)))[:-1_900]
    with pytest.raises(FrameTooLargeError, match="2000 bytes are over the limit of 1000"):
        list(RequestReader(1_000).feed(begin))


@pytest.mark.parametrize("headers", [None, HEADERS])
@pytest.mark.parametrize("path", PATHS)
def test_of_what_is_too_large_the_header_can_be_read_that_says_who_waits(path: str, headers: bytes | None) -> None:
    whole = encode_request(TcpRequest(path, headers, payload(2_000)))
    with pytest.raises(FrameTooLargeError) as caught:
        list(RequestReader(1_000).feed(whole[:-1_900]))
    assert read_header(caught.value.begin) == b'{"id":"1"}'


@pytest.mark.parametrize("size", [0, 23, 24, 33])
def test_a_header_that_is_not_whole_is_none(size: int) -> None:
    with pytest.raises(PayloadError):
        read_header(payload(2_000)[:size])
