"""Frames: what real runtimes sent comes back to the byte, bytes may be cut anywhere, and no claim costs memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from struct import pack
from typing import Any, Protocol

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rkmetrics.errors import PayloadError
from rkmetrics.planes.frame import (
    ACCEPTED,
    ACK_LIMIT_BYTES,
    HEADER_LIMIT_BYTES,
    PATH_LIMIT_BYTES,
    AckReader,
    FrameTooLargeError,
    RequestReader,
    TcpRequest,
    TwoPart,
    TwoPartReader,
    encode_ack,
    encode_request,
    encode_two_part,
    read_two_part,
)
from tests.planes.captures import (
    CALLER_SAYS,
    HTTP,
    NATS,
    TCP_ACKS,
    TCP_REQUESTS,
    TWO_PARTS,
    WORKER_SAYS,
    name,
    payload,
)

LIMIT = 64 * 1024
ID = "7d7ba1fbdcacd743"


class Reader(Protocol):
    """What reads a stream."""

    @property
    def rest(self) -> int: ...

    def feed(self, data: bytes) -> Iterator[Any]: ...


READERS: dict[str, Callable[[], Reader]] = {
    "two parts": lambda: TwoPartReader(LIMIT),
    "requests": lambda: RequestReader(LIMIT),
    "acknowledgements": AckReader,
}


def read(reader: Reader, pieces: Iterable[bytes]) -> tuple[list[Any], str]:
    """All frames, and what was wrong after them."""
    found: list[Any] = []
    try:
        for piece in pieces:
            for frame in reader.feed(piece):
                found.append(frame)
    except PayloadError as error:
        return found, f"{type(error).__name__}: {error.reason}"
    return found, ""


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The pieces between some places."""
    marks = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in pairwise(marks)]


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def two(header: int, body: int, rest: bytes = b"", checksum: int = 0) -> bytes:
    return pack(">QQQ", header, body, checksum) + rest


# --- captured bytes, both ways ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*WORKER_SAYS, *CALLER_SAYS], ids=name)
def test_streams_of_real_peers_come_back_to_the_byte(file: Path) -> None:
    data = file.read_bytes()
    reader = TwoPartReader(LIMIT)
    frames = [*reader.feed(data)]
    assert frames
    assert reader.rest == 0
    assert b"".join(encode_two_part(*frame) for frame in frames) == data


@pytest.mark.parametrize("file", TCP_REQUESTS, ids=name)
def test_requests_of_real_clients_come_back_to_the_byte(file: Path) -> None:
    data = file.read_bytes()
    reader = RequestReader(LIMIT)
    (request,) = reader.feed(data)
    assert reader.rest == 0
    assert (request.headers is None) == (file.parts[-3] == "0.7.1")
    assert ("/" in request.path) == (request.headers is not None)
    assert encode_request(request) == data


@pytest.mark.parametrize("file", TCP_ACKS, ids=name)
def test_acknowledgements_of_real_workers_come_back_to_the_byte(file: Path) -> None:
    reasons = [*AckReader().feed(file.read_bytes())]
    assert reasons == [""] * len(reasons) != []
    assert ACCEPTED * len(reasons) == file.read_bytes()
    assert encode_ack() == ACCEPTED


@pytest.mark.parametrize("file", [*TWO_PARTS, *HTTP, *NATS, *TCP_REQUESTS], ids=name)
def test_messages_of_real_clients_come_back_to_the_byte(file: Path) -> None:
    data = payload(file)
    parts = read_two_part(data)
    assert parts.header.startswith(b'{"id":')
    assert parts.body
    assert encode_two_part(*parts) == data


def test_the_http_message_is_what_was_captured_beside_it() -> None:
    for file in TWO_PARTS:
        assert payload(file.with_name(file.name.replace("twopart", "request"))) == file.read_bytes()


# --- tables: bytes, what comes of them, what is kept, what is wrong ---------------------------------------------------

TWO_PART_STREAMS: dict[str, tuple[bytes, list[TwoPart], int, str]] = {
    "nothing": (b"", [], 0, ""),
    "empty": (two(0, 0), [TwoPart(b"", b"")], 0, ""),
    "header": (two(2, 0, b"{}"), [TwoPart(b"{}", b"")], 0, ""),
    "body": (two(0, 2, b"{}"), [TwoPart(b"", b"{}")], 0, ""),
    "both": (two(1, 2, b"abc"), [TwoPart(b"a", b"bc")], 0, ""),
    "any checksum": (two(0, 1, b"x", 2**64 - 1), [TwoPart(b"", b"x")], 0, ""),
    "two": (two(0, 1, b"x") + two(1, 0, b"y"), [TwoPart(b"", b"x"), TwoPart(b"y", b"")], 0, ""),
    "half a head": (two(1, 0)[:23], [], 23, ""),
    "half a body": (two(0, 4, b"abc"), [], 27, ""),
    "one and a half": (two(0, 1, b"x") + two(0, 9, b"y"), [TwoPart(b"", b"x")], 25, ""),
    "at the limit": (two(1, LIMIT - 1, bytes(LIMIT)), [TwoPart(b"\0", bytes(LIMIT - 1))], 0, ""),
    "over it": (two(1, LIMIT), [], 0, "FrameTooLargeError"),
    "header over its own": (two(HEADER_LIMIT_BYTES + 1, 0), [], 0, "FrameTooLargeError"),
    "bomb": (two(2**63, 2**63), [], 0, "FrameTooLargeError"),
    "sum over 2^64": (two(0, 2**64 - 1), [], 0, "FrameTooLargeError"),
    "good, then a bomb": (two(0, 1, b"x") + two(0, 2**60), [TwoPart(b"", b"x")], 0, "FrameTooLargeError"),
    "http": (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", [], 0, "FrameTooLargeError"),
}


@pytest.mark.parametrize("pieces", [lambda data: [data], bytewise], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("case", TWO_PART_STREAMS)
def test_two_parts_are_read(case: str, pieces: Callable[[bytes], list[bytes]]) -> None:
    data, frames, kept, error = TWO_PART_STREAMS[case]
    reader = TwoPartReader(LIMIT)
    found, wrong = read(reader, pieces(data))
    assert (found, wrong.partition(":")[0]) == (frames, error)
    if not error:
        assert reader.rest == kept


MESSAGES: dict[str, tuple[bytes, TwoPart | str]] = {
    "nothing": (b"", "expected 24 bytes or more"),
    "short": (bytes(23), "expected 24 bytes or more"),
    "empty": (two(0, 0), TwoPart(b"", b"")),
    "both": (two(1, 2, b"abc"), TwoPart(b"a", b"bc")),
    "more follows, as real workers allow": (two(1, 2, b"abcdef"), TwoPart(b"a", b"bc")),
    "too little": (two(1, 2, b"ab"), r"it says that it has 1 \+ 2 bytes"),
    "bomb": (two(2**63, 2**63), "it says that it has"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_message_is_read(case: str) -> None:
    data, expected = MESSAGES[case]
    if isinstance(expected, TwoPart):
        assert read_two_part(data) == expected
    else:
        with pytest.raises(PayloadError, match=expected):
            read_two_part(data)


BODY = encode_two_part(b"{}", b"null")
OLD = TcpRequest("generate", None, BODY)
NEW = TcpRequest(f"{ID}/generate", b'{"x-endpoint-path":"x"}', BODY)

REQUEST_STREAMS: dict[str, tuple[bytes, list[TcpRequest], str]] = {
    "nothing": (b"", [], ""),
    "0.7": (encode_request(OLD), [OLD], ""),
    "0.8": (encode_request(NEW), [NEW], ""),
    "0.8, no headers": (encode_request(NEW._replace(headers=b"")), [NEW._replace(headers=b"")], ""),
    "0.8, empty headers": (encode_request(NEW._replace(headers=b"{}")), [NEW._replace(headers=b"{}")], ""),
    "both, pipelined": (encode_request(OLD) + encode_request(NEW) + encode_request(OLD), [OLD, NEW, OLD], ""),
    "0.7's envelope to what 0.8 lists": (
        encode_request(OLD._replace(path=NEW.path)),
        [OLD._replace(path=NEW.path)],
        "",
    ),
    "0.8's envelope to what 0.7 lists": (
        encode_request(NEW._replace(path=OLD.path)),
        [NEW._replace(path=OLD.path)],
        "",
    ),
    "0.7, bytes after the two parts": (
        encode_request(OLD._replace(payload=BODY + b"more")),
        [OLD._replace(payload=BODY + b"more")],
        "",
    ),
    "a slash first": (encode_request(NEW._replace(path="/x")), [NEW._replace(path="/x")], ""),
    "only slashes": (encode_request(NEW._replace(path="///")), [NEW._replace(path="///")], ""),
    "the longest path": (
        encode_request(OLD._replace(path="x" * PATH_LIMIT_BYTES)),
        [OLD._replace(path="x" * PATH_LIMIT_BYTES)],
        "",
    ),
    "a longer path": (pack(">H", PATH_LIMIT_BYTES + 1), [], "PayloadError"),
    "no path": (pack(">H", 0), [], "PayloadError"),
    "a path that is not ASCII": (pack(">H", 2) + b"\xc3\xa4" + bytes(64), [], "PayloadError"),
    "the longest headers": (
        encode_request(NEW._replace(headers=bytes(65_535))),
        [NEW._replace(headers=bytes(65_535))],
        "",
    ),
    "too large": (pack(">H8sI", 8, b"generate", LIMIT + 1) + bytes(24), [], "FrameTooLargeError"),
    "bomb": (pack(">H8sI", 8, b"generate", 2**32 - 1) + bytes(24), [], "FrameTooLargeError"),
    "good, then too large": (
        encode_request(OLD) + pack(">H8sI", 8, b"generate", 2**32 - 1) + bytes(24),
        [OLD],
        "FrameTooLargeError",
    ),
    "http": (b"POST /v1/rpc/generate HTTP/1.1\r\n", [], "PayloadError"),
    "ssh": (b"SSH-2.0-OpenSSH_9.9\r\n", [], "PayloadError"),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [], "PayloadError"),
}


@pytest.mark.parametrize("pieces", [lambda data: [data], bytewise], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("case", REQUEST_STREAMS)
def test_requests_are_read(case: str, pieces: Callable[[bytes], list[bytes]]) -> None:
    data, requests, error = REQUEST_STREAMS[case]
    found, wrong = read(RequestReader(max(LIMIT, len(data))) if not error else RequestReader(LIMIT), pieces(data))
    assert (found, wrong.partition(":")[0]) == (requests, error)


ACK_STREAMS: dict[str, tuple[bytes, list[str], str]] = {
    "taken": (bytes(4), [""], ""),
    "three": (bytes(12), ["", "", ""], ""),
    "refused": (b"\0\0\0\x19Unknown endpoint: missing", ["Unknown endpoint: missing"], ""),
    "taken, refused, taken": (bytes(4) + encode_ack("no") + bytes(4), ["", "no", ""], ""),
    "no UTF-8": (b"\0\0\0\x02\xff\xfe", ["\ufffd\ufffd"], ""),
    "half": (b"\0\0\0\x05ab", [], ""),
    "the longest": (encode_ack("x" * ACK_LIMIT_BYTES), ["x" * ACK_LIMIT_BYTES], ""),
    "a longer one is cut": (encode_ack("x" * (ACK_LIMIT_BYTES + 9)), ["x" * ACK_LIMIT_BYTES], ""),
    "bomb": (b"\xff\xff\xff\xff", [], "PayloadError"),
    "taken, then a bomb": (bytes(4) + b"\xff\xff\xff\xff", [""], "PayloadError"),
}


@pytest.mark.parametrize("pieces", [lambda data: [data], bytewise], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("case", ACK_STREAMS)
def test_acknowledgements_are_read(case: str, pieces: Callable[[bytes], list[bytes]]) -> None:
    data, reasons, error = ACK_STREAMS[case]
    found, wrong = read(AckReader(), pieces(data))
    assert (found, wrong.partition(":")[0]) == (reasons, error)


# --- whatever comes, however it is cut --------------------------------------------------------------------------------

CORPUS: dict[str, list[bytes]] = {
    "two parts": [
        *(file.read_bytes() for file in [*WORKER_SAYS, *CALLER_SAYS]),
        *(case[0] for case in TWO_PART_STREAMS.values()),
    ],
    "requests": [*(file.read_bytes() for file in TCP_REQUESTS), *(case[0] for case in REQUEST_STREAMS.values())],
    "acknowledgements": [*(file.read_bytes() for file in TCP_ACKS), *(case[0] for case in ACK_STREAMS.values())],
}
places = st.lists(st.integers(0, 1 << 20), max_size=8)
paths = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
requests = st.builds(
    TcpRequest,
    paths,
    st.none(),
    st.builds(encode_two_part, st.binary(max_size=40), st.binary(max_size=40)),
) | st.builds(
    TcpRequest,
    paths,
    st.dictionaries(st.sampled_from(["a", "traceparent"]), st.just("x")).map(
        lambda d: repr(d).replace("'", '"').encode()
    ),
    st.builds(encode_two_part, st.binary(max_size=40), st.binary(max_size=40)),
)


@st.composite
def damaged(draw: st.DrawFn, kind: str) -> bytes:
    """A stream of the corpus with some bytes changed, put in or taken out; or several; or anything."""
    data = bytearray(
        b"".join(draw(st.lists(st.sampled_from(CORPUS[kind]), max_size=3))) or draw(st.binary(max_size=200))
    )
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@pytest.mark.parametrize("kind", READERS)
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_stream_is_the_same_however_it_is_cut(kind: str, data: st.DataObject) -> None:
    stream = data.draw(damaged(kind))
    whole = read(READERS[kind](), [stream])
    assert read(READERS[kind](), cut(stream, data.draw(places))) == whole
    assert read(READERS[kind](), bytewise(stream[:3_000])) == read(READERS[kind](), [stream[:3_000]])


@pytest.mark.parametrize("kind", READERS)
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_garbage_waits_or_is_refused_and_nothing_else(kind: str, data: st.DataObject) -> None:
    """A fuzz target for each parser: any other exception than PayloadError fails it."""
    reader = READERS[kind]()
    stream = data.draw(damaged(kind) | st.binary(max_size=400))
    found, wrong = read(reader, [stream])
    assert wrong or sum(map(_size, found)) + reader.rest <= len(stream)
    with suppress(PayloadError):
        assert sum(map(len, read_two_part(stream))) <= len(stream)


def _size(frame: Any) -> int:
    return (
        len(frame) if isinstance(frame, str) else sum(len(part or b"") for part in frame if not isinstance(part, str))
    )


@given(st.lists(st.tuples(st.binary(max_size=50), st.binary(max_size=50))), places)
def test_two_parts_come_back(frames: list[tuple[bytes, bytes]], where: list[int]) -> None:
    data = b"".join(encode_two_part(*frame) for frame in frames)
    assert read(TwoPartReader(LIMIT), cut(data, where)) == (frames, "")


@given(st.lists(requests), places)
@example([TcpRequest("x/y", None, encode_two_part(b"", b"")), TcpRequest("y", b"{}", encode_two_part(b"", b""))], [])
def test_requests_of_both_forms_come_back_whatever_their_path(sent: list[TcpRequest], where: list[int]) -> None:
    data = b"".join(map(encode_request, sent))
    assert read(RequestReader(LIMIT), cut(data, where)) == (sent, "")


@given(st.lists(st.text(max_size=40)), places)
def test_acknowledgements_come_back(reasons: Sequence[str], where: list[int]) -> None:
    clean = [reason.encode("utf-8", "replace").decode() for reason in reasons]
    assert read(AckReader(), cut(b"".join(map(encode_ack, reasons)), where)) == (clean, "")


# --- memory -----------------------------------------------------------------------------------------------------------

BOMBS: dict[str, tuple[Callable[[], Reader], bytes]] = {
    "body of 2^63": (lambda: TwoPartReader(32 << 20), two(0, 2**63)),
    "header of 2^63": (lambda: TwoPartReader(32 << 20), two(2**63, 0)),
    "body at the limit": (lambda: TwoPartReader(32 << 20), two(0, 32 << 20)),
    "header at the limit": (lambda: TwoPartReader(32 << 20), two(HEADER_LIMIT_BYTES, 0)),
    "request of 2^32": (lambda: RequestReader(32 << 20), pack(">H1sI", 1, b"x", 2**32 - 1) + bytes(16)),
    "request at the limit": (lambda: RequestReader(32 << 20), pack(">H1sI", 1, b"x", 32 << 20) + bytes(16)),
    "path of 2^16": (lambda: RequestReader(32 << 20), pack(">H", 2**16 - 1)),
    "path at the limit": (lambda: RequestReader(32 << 20), pack(">H", PATH_LIMIT_BYTES)),
    "headers of 2^16": (lambda: RequestReader(32 << 20), pack(">H1sH", 1, b"/", 2**16 - 1) + b"{" * 32),
    "acknowledgement of 2^32": (AckReader, b"\xff" * 4),
    "acknowledgement at the limit": (AckReader, pack(">I", ACK_LIMIT_BYTES)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_follows_what_came_and_not_what_is_claimed(bomb: str) -> None:
    make, data = BOMBS[bomb]
    read(make(), [data])  # what an error's first one imports and caches is nobody's
    reader = make()
    tracemalloc.start()
    try:
        _, wrong = read(reader, [data])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_192
    assert wrong.startswith(("FrameTooLargeError", "PayloadError")) or reader.rest == len(data)


def test_a_frame_that_comes_in_many_pieces_is_not_copied_for_each() -> None:
    """The pieces of a megabyte, a kilobyte each: were all that came copied for each, it would be half a gigabyte."""
    size, reader, copied = 1 << 20, TwoPartReader(2 << 20), 0
    join = reader._join

    def counted(data: bytes) -> bytes:
        nonlocal copied
        joined = join(data)
        copied += len(joined)
        return joined

    reader._join = counted  # type: ignore[method-assign]
    found, wrong = read(reader, [two(0, size), *[bytes(1_024)] * 1_024])
    assert ([len(frame.body) for frame in found], wrong) == ([size], "")
    assert copied < 3 * size


def test_a_frame_that_is_too_large_says_so_by_its_class() -> None:
    with pytest.raises(FrameTooLargeError, match="over the limit"):
        next(TwoPartReader(10).feed(two(0, 11)))
