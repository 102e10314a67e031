"""What stands in the frames: what real peers said is read, ours is theirs to the byte, and garbage is only refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkmetrics.errors import PayloadError
from rkmetrics.planes.frame import TwoPart, TwoPartReader, encode_two_part, read_two_part
from rkmetrics.planes.wire import (
    AGAIN,
    CONTROLS,
    FINAL,
    KILL,
    PROLOGUE,
    SENTINEL,
    STOP,
    Annotated,
    Control,
    Envelope,
    Handshake,
    RequestHeader,
    encode_error,
    encode_item,
    encode_refusal,
    item_decoder,
    read_item,
    read_prologue,
)
from tests.planes.captures import CALLER_SAYS, HTTP, NATS, TCP_REQUESTS, TWO_PARTS, WORKER_SAYS, name, payload

RAISED = "a python exception was caught while processing the async generator: ValueError: asked to fail"


def frames(data: bytes) -> list[TwoPart]:
    return [*TwoPartReader(1 << 20).feed(data)]


# --- captured bytes, both ways ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*TWO_PARTS, *HTTP, *NATS, *TCP_REQUESTS], ids=name)
def test_headers_of_real_requests_come_back_to_the_byte(file: Path) -> None:
    raw = read_two_part(payload(file)).header
    header = RequestHeader.decode(raw)
    assert header.address.startswith(("192.0.2.10:", "127.0.0.1:"))
    assert len(header.subject) == 36
    assert not header.reuse
    assert header.encode() == raw


@pytest.mark.parametrize("file", WORKER_SAYS, ids=name)
def test_answers_of_real_workers_come_back_to_the_byte(file: Path) -> None:
    """All of a stream is made anew from what was read of it: handshake, prologue, items, errors, end, last word."""
    data = file.read_bytes()
    handshake, prologue, *rest = frames(data)
    assert read_prologue(prologue) == ""
    again = Handshake.decode(handshake).encode() + PROLOGUE
    for frame in rest:
        if frame == frames(SENTINEL)[0]:
            again += SENTINEL
            continue
        assert not frame.header
        found = read_item(frame.body)
        if found.complete_final:
            assert found.data is None
            again += FINAL
        elif found.data is not None and found.data.is_error:
            assert found.data.comment is not None
            again += encode_error(found.data.comment[0])
        else:
            assert found.data is not None
            again += encode_item(msgspec.json.encode(found.data.data))
    assert again == data


ENDINGS = {"ok": (True, False), "traceparent": (True, False), "error_first": (True, True), "error_mid": (True, True)}


@pytest.mark.parametrize("file", WORKER_SAYS, ids=name)
def test_how_real_answers_end(file: Path) -> None:
    """A handler that raised ends in order, after an item that says so; what was stopped or killed has no such end."""
    whole, raised = ENDINGS.get(file.name.removeprefix("rpc_").partition(".")[0], (False, False))
    items = [read_item(frame.body) for frame in frames(file.read_bytes())[2:] if frame.body]
    assert any(item.complete_final for item in items) == whole
    errors = [item.data.reason for item in items if item.data is not None and item.data.is_error]
    assert [error.startswith(RAISED) for error in errors] == [True] * raised


@pytest.mark.parametrize("file", CALLER_SAYS, ids=name)
def test_what_real_clients_say_comes_back_to_the_byte(file: Path) -> None:
    said = [CONTROLS[frame.header] for frame in frames(file.read_bytes())]
    assert said == [Control.STOP if "stop" in file.name else Control.KILL]
    assert b"".join({Control.STOP: STOP, Control.KILL: KILL}[each] for each in said) == file.read_bytes()


def test_our_own_word_is_none_of_theirs() -> None:
    assert CONTROLS[frames(AGAIN)[0].header] is Control.AGAIN
    assert RequestHeader("a", "b:1", "c", reuse=True).encode() != RequestHeader("a", "b:1", "c").encode()
    assert b"reuse" not in RequestHeader("a", "b:1", "c").encode() + Handshake("c").encode()


# --- tables -----------------------------------------------------------------------------------------------------------

GOOD = {
    "id": "a",
    "request_type": "single_in",
    "response_type": "many_out",
    "connection_info": {"transport": "tcp_server"},
}
INFO = {"address": "127.0.0.1:1", "subject": "s", "context": "a", "stream_type": "response"}


def header(change: dict[str, Any] | None = None, fields: dict[str, Any] | None = None, **connection: Any) -> bytes:
    document = {**GOOD, **(change or {})}
    if isinstance(document["connection_info"], dict):
        inner = {"info": json.dumps({**INFO, **(fields or {})}), **document["connection_info"], **connection}
        document = {**document, "connection_info": inner}
    return json.dumps(document).encode()


HEADERS: dict[str, tuple[bytes, RequestHeader | str]] = {
    "as it should be": (header(), RequestHeader("a", "127.0.0.1:1", "s")),
    "what later releases add": (header({"more": [1]}, {"more": {}}), RequestHeader("a", "127.0.0.1:1", "s")),
    "used again": (header(None, {"reuse": True}), RequestHeader("a", "127.0.0.1:1", "s", True)),
    "another context": (header(None, {"context": "b"}), "its context is not its id"),
    "another transport": (header(transport="quic"), "expected the transport tcp_server"),
    "a request stream": (header(None, {"stream_type": "request"}), "expected the transport tcp_server"),
    "no id": (header({"id": None}), "header of a request"),
    "a number as id": (header({"id": 5}), "header of a request"),
    "info that is no text": (header(info=5), "header of a request"),
    "info that is no JSON": (header(info="{"), "connection info"),
    "a bomb in the info": (header(info="[" * 100_000), "connection info"),
    "no address": (header(None, {"address": None}), "connection info"),
    "no connection": (header({"connection_info": None}), "header of a request"),
    "empty": (b"", "header of a request"),
    "a bomb": (b'{"more":' + b"[" * 60_000, "header of a request"),
    "no UTF-8": (b'{"id":"\xff"}', "header of a request"),
    "half a character": (b'{"id":"\\ud800x"}', "header of a request"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_request_says_where_its_answer_is_awaited(case: str) -> None:
    data, expected = HEADERS[case]
    if isinstance(expected, RequestHeader):
        assert RequestHeader.decode(data) == expected
    else:
        with pytest.raises(PayloadError, match=expected):
            RequestHeader.decode(data)


HANDSHAKES: dict[str, tuple[TwoPart, Handshake | str]] = {
    "as it should be": (TwoPart(b'{"subject":"s","stream_type":"response"}', b""), Handshake("s")),
    "used again": (TwoPart(b'{"subject":"s","stream_type":"response","reuse":true}', b""), Handshake("s", True)),
    "more": (TwoPart(b'{"subject":"s","stream_type":"response","x":1}', b""), Handshake("s")),
    "with a body": (TwoPart(b'{"subject":"s","stream_type":"response"}', b"x"), "expected no body"),
    "another stream": (TwoPart(b'{"subject":"s","stream_type":"request"}', b""), "expected no body, and the stream"),
    "an item": (TwoPart(b"", b'{"data":{"data":1},"complete_final":false}'), "handshake"),
    "the last word": (TwoPart(b'"sentinel"', b""), "handshake"),
    "a list": (TwoPart(b"[]", b""), "handshake"),
}


@pytest.mark.parametrize("case", HANDSHAKES)
def test_a_worker_says_whose_answer_it_has(case: str) -> None:
    frame, expected = HANDSHAKES[case]
    if isinstance(expected, Handshake):
        assert Handshake.decode(frame) == expected
    else:
        with pytest.raises(PayloadError, match=expected):
            Handshake.decode(frame)


PROLOGUES: dict[str, tuple[TwoPart, str | None]] = {
    "it comes": (TwoPart(b'{"error":null}', b""), ""),
    "it does not": (TwoPart(b'{"error":"no"}', b""), "no"),
    "with a body": (TwoPart(b'{"error":null}', b"x"), None),
    "an item": (TwoPart(b"", b'{"data":{"data":1}}'), None),
    "nothing in it": (TwoPart(b"{}", b""), None),
    "a number": (TwoPart(b'{"error":1}', b""), None),
    "the last word": (TwoPart(b'"sentinel"', b""), None),
}


@pytest.mark.parametrize("case", PROLOGUES)
def test_a_prologue_says_whether_an_answer_comes(case: str) -> None:
    frame, expected = PROLOGUES[case]
    if expected is None:
        with pytest.raises(PayloadError, match="prologue"):
            read_prologue(frame)
    else:
        assert read_prologue(frame) == expected
        assert read_prologue(frames(encode_refusal(expected) if expected else PROLOGUE)[0]) == expected


ITEMS: dict[str, tuple[bytes, Envelope[Any] | None]] = {
    "an item": (b'{"data":{"data":5},"complete_final":false}', Envelope(Annotated(data=5))),
    "null": (b'{"data":{"data":null},"complete_final":false}', Envelope(Annotated())),
    "without the flag": (b'{"data":{"data":5}}', Envelope(Annotated(data=5))),
    "an event": (b'{"data":{"event":"x","comment":["y"]}}', Envelope(Annotated(event="x", comment=["y"]))),
    "the end": (b'{"complete_final":true}', Envelope(None, True)),
    "an item and the end": (b'{"data":{"data":5},"complete_final":true}', Envelope(Annotated(data=5), True)),
    "neither": (b'{"complete_final":false}', None),
    "nothing": (b"{}", None),
    "not wrapped": (b'{"data":5,"complete_final":false}', None),
    "no JSON": (b"<html>", None),
    "empty": (b"", None),
    "a list": (b"[]", None),
    "a flag that is none": (b'{"complete_final":"true"}', None),
    "comments that are none": (b'{"data":{"comment":"x"}}', None),
    "a bomb": (b'{"data":{"data":' + b"[" * 100_000, None),
}


@pytest.mark.parametrize("case", ITEMS)
def test_items_are_read(case: str) -> None:
    body, expected = ITEMS[case]
    if expected is None:
        with pytest.raises(PayloadError, match="item"):
            read_item(body)
    else:
        assert read_item(body) == expected


def test_an_error_says_what_the_handler_said() -> None:
    found = read_item(frames(encode_error("it\nbroke"))[0].body).data
    assert found is not None
    assert (found.is_error, found.reason) == (True, "it\nbroke")
    assert Annotated[Any](event="error").reason == "it does not say why"
    assert Annotated[Any](event="error", comment=["a", "b"]).reason == "a; b"


class Token(msgspec.Struct):
    """What a caller may want of an item."""

    i: int


def test_items_are_decoded_into_what_the_caller_wants() -> None:
    decode = item_decoder(Token)
    assert read_item(b'{"data":{"data":{"i":1}}}', decode).data == Annotated(data=Token(1))
    assert item_decoder(Token) is decode
    with pytest.raises(PayloadError, match="an item"):
        read_item(b'{"data":{"data":{"i":"1"}}}', decode)


def test_types_that_are_made_for_each_call_are_not_kept_for_ever() -> None:
    for number in range(2_000):
        item_decoder(msgspec.defstruct(f"Made{number}", ["x"]))
    assert item_decoder.cache_info().currsize <= 1_000


# --- whatever comes ---------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(texts, texts, texts, st.booleans())
def test_headers_come_back(id: str, address: str, subject: str, reuse: bool) -> None:
    sent = RequestHeader(id, address, subject, reuse)
    assert RequestHeader.decode(sent.encode()) == sent


@given(texts, st.booleans())
def test_handshakes_come_back(subject: str, reuse: bool) -> None:
    assert Handshake.decode(frames(Handshake(subject, reuse).encode())[0]) == Handshake(subject, reuse)


@given(json_values)
def test_items_come_back(value: Any) -> None:
    found = read_item(frames(encode_item(msgspec.json.encode(value)))[0].body)
    assert found == Envelope(Annotated(data=value))


@given(texts)
def test_errors_and_refusals_come_back(reason: str) -> None:
    found = read_item(frames(encode_error(reason))[0].body).data
    assert found is not None
    assert found.comment == [reason]
    assert read_prologue(frames(encode_refusal(reason))[0]) == reason


SEEDS = [
    *(case[0] for case in HEADERS.values()),
    *(case[0] for case in ITEMS.values()),
    *(part for case in [*HANDSHAKES.values(), *PROLOGUES.values()] for part in case[0]),
    *(part for file in WORKER_SAYS for frame in frames(file.read_bytes()) for part in frame),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from([seed for seed in SEEDS if len(seed) < 5_000])))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(
            st.binary(max_size=3) | st.sampled_from([b"\\ud800", b'"', b"\\"])
        )
    return bytes(data)


@given(damaged() | st.binary(max_size=100) | json_values.map(msgspec.json.encode))
@settings(max_examples=1_000, deadline=None)
def test_garbage_is_refused_and_nothing_else(data: bytes) -> None:
    """A fuzz target for each reader: any other exception than PayloadError fails it."""
    readers: list[Callable[[bytes], object]] = [
        RequestHeader.decode,
        lambda data: Handshake.decode(TwoPart(data, b"")),
        lambda data: read_prologue(TwoPart(data, b"")),
        read_item,
        lambda data: read_item(data, item_decoder(Token)),
    ]
    for reader in readers:
        with suppress(PayloadError):
            assert reader(data) is not None


def test_a_frame_of_ours_carries_no_line_that_a_caller_chose() -> None:
    """A worker connects where a request says, and repeats its subject there: no protocol of lines takes it for one."""
    sent = Handshake("x\r\nSLAVEOF evil 1\r\n").encode()
    assert b"\r\nSLAVEOF" not in sent
    assert b"\n" not in sent[24:]
    assert encode_two_part(b"")[:24] == bytes(24)
