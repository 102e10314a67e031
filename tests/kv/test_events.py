"""KV events: the bytes of the real runtime both ways, what else is read, and that nothing else gets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rkmetrics.errors import KvValueError, PayloadError
from rkmetrics.kv.base import U64, Envelope
from rkmetrics.kv.events import (
    Cleared,
    KvEvent,
    Removed,
    RouterEvent,
    Stored,
    StoredBlock,
    decode_event,
    encode_event,
    encode_local,
    event_subject,
    local_subject,
    stored,
    stream_config,
    stream_name,
)

DATA = Path(__file__).parents[1] / "data" / "dynamo"

#: Release that was captured, what it sent, and the wire that sends the same; 0.6 is read, and not sent.
CAPTURES = [
    ("0.6.0", "kv_events.jsonl", None),
    ("0.7.1", "kv_events.jsonl", "0.7"),
    ("0.7.1", "kv_events_from_zmq.jsonl", "0.7"),
    ("0.8.1.post3", "kv_events.jsonl", "0.8"),
    ("0.8.1.post3", "kv_events_from_zmq.jsonl", "0.8"),
    ("0.9.1", "kv_events.jsonl", "0.9"),
]
LOCAL_08 = (DATA / "0.8.1.post3" / "tcp_local_indexer" / "kv_events.jsonl").read_bytes().splitlines()
LOCAL_09 = (DATA / "0.9.1" / "tcp_local_indexer" / "kv_event.0.msgpack").read_bytes()


def captured(release: str, name: str) -> list[bytes]:
    return (DATA / release / name).read_bytes().splitlines()


ALL = [payload for release, name, _ in CAPTURES for payload in captured(release, name)] + [*LOCAL_08, LOCAL_09]

# --- the real runtime -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("release", "name", "wire"), [row for row in CAPTURES if row[2]])
def test_captured_stream_events_are_read_and_written_byte_by_byte(release: str, name: str, wire: str) -> None:
    payloads = captured(release, name)
    assert payloads
    assert [encode_event(decode_event(payload), wire) for payload in payloads] == payloads


def test_what_the_first_events_say() -> None:
    first, second, *_ = map(decode_event, captured("0.7.1", "kv_events.jsonl"))
    minus_1001 = 2**64 - 1001
    blocks = (StoredBlock(1000, 14643705804678351452), StoredBlock(minus_1001, 16777012769546811212))
    assert first == RouterEvent(9041998779987581852, KvEvent(0, Stored(blocks)))
    assert second == RouterEvent(9041998779987581852, KvEvent(1, Removed((minus_1001,))))


def test_cleared_and_empty_events_and_ranks_are_read() -> None:
    events = [decode_event(payload).event for payload in captured("0.7.1", "kv_events_from_zmq.jsonl")]
    assert events[1].dp_rank == 1
    assert events[2].data == Cleared()
    assert events[3].data == Stored((), 18446744073709551604)


def test_an_event_of_0_6_is_of_rank_0() -> None:
    events = [decode_event(payload).event for payload in captured("0.6.0", "kv_events.jsonl")]
    assert {event.dp_rank for event in events} == {0}
    assert isinstance(events[0].data, Stored)
    assert events[0].data.blocks[0] == StoredBlock(1000, 14643705804678351452)


def test_captured_local_events_are_read_and_written_byte_by_byte() -> None:
    assert [encode_local(decode_event(payload), "0.8", 5, 6) for payload in LOCAL_08] == LOCAL_08
    envelope = Envelope.decode(LOCAL_09)
    assert encode_local(decode_event(LOCAL_09), "0.9", envelope.sequence, envelope.published_at) == LOCAL_09


def test_0_7_knows_no_local_indexer() -> None:
    with pytest.raises(KvValueError, match=r"wire='0\.7': expected a release with a local indexer: 0\.8, 0\.9"):
        encode_local(decode_event(LOCAL_09), "0.7", 0, 0)


def test_the_request_for_a_stream_is_that_of_the_runtime() -> None:
    expected = (DATA / "jetstream_stream_create.json").read_bytes().strip()
    assert stream_config(stream_name("dynamo", "backend")) == expected


@pytest.mark.parametrize(
    ("namespace", "component", "expected"),
    [
        ("dynamo", "backend", "namespace-dynamo-component-backend-kv-events"),
        ("a_b", "c-d_e", "namespace-a-b-component-c-d-e-kv-events"),
        ("Dynamo", "BackEnd", "namespace-dynamo-component-backend-kv-events"),
    ],
)
def test_a_stream_has_the_name_that_dynamo_gives_it(namespace: str, component: str, expected: str) -> None:
    assert stream_name(namespace, component) == expected
    assert event_subject(namespace, component, "0.7") == f"{expected}.queue"
    assert event_subject(namespace, component, "0.8") == f"{expected}.kv-events"
    assert event_subject(namespace, component, "0.9") == f"{expected}.kv-events"


def test_a_local_subject_has_the_names_as_they_are() -> None:
    assert local_subject("Dyn_amo", "backend") == "namespace.Dyn_amo.component.backend.kv-events"


@pytest.mark.parametrize("bad", ["", "a.b", "*", ">", "a b", "a\n", "ä"])
def test_a_name_that_would_be_more_than_a_part_of_a_subject_is_refused(bad: str) -> None:
    for use in (stream_name, local_subject):
        with pytest.raises(KvValueError, match=r"namespace=.*becomes part of a NATS subject"):
            use(bad, "backend")
        with pytest.raises(KvValueError, match=r"component=.*becomes part of a NATS subject"):
            use("dynamo", bad)


# --- both ways --------------------------------------------------------------------------------------------------------

u64 = st.integers(0, U64)
extra = st.none() | st.dictionaries(st.text(max_size=3), st.lists(u64 | st.text(max_size=3), max_size=2), max_size=2)
data = st.one_of(
    st.builds(Stored, st.lists(st.builds(StoredBlock, u64, u64, extra), max_size=3).map(tuple), st.none() | u64),
    st.builds(Removed, st.lists(u64, max_size=3).map(tuple)),
    st.builds(Cleared),
)
events = st.builds(RouterEvent, u64, st.builds(KvEvent, u64, data, st.integers(0, 2**32 - 1)))


@given(events, st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_what_is_sent_is_read_as_it_was(event: RouterEvent, sequence: int, now: int) -> None:
    for wire in ("0.8", "0.9"):
        assert decode_event(encode_event(event, wire)) == event
        assert decode_event(encode_local(event, wire, sequence, now)) == event
    assert without_extra(decode_event(encode_event(event, "0.7"))) == without_extra(event)


def without_extra(event: RouterEvent) -> RouterEvent:
    inner = event.event
    if not isinstance(inner.data, Stored):
        return event
    blocks = tuple(StoredBlock(block.block_hash, block.tokens_hash) for block in inner.data.blocks)
    return RouterEvent(event.worker_id, KvEvent(inner.event_id, Stored(blocks, inner.data.parent_hash), inner.dp_rank))


def test_0_7_has_no_extra_info() -> None:
    event = RouterEvent(1, KvEvent(2, Stored((StoredBlock(3, 4, {"mm_objects": []}),))))
    assert b"mm_" not in encode_event(event, "0.7")
    assert b'"tokens_hash":4,"mm_extra_info":{"mm_objects":[]}}' in encode_event(event, "0.8")


def test_hashes_of_engines_go_out_as_u64() -> None:
    event = RouterEvent(-1, KvEvent(2, Stored((StoredBlock(-3, 4),), -5)))
    inner = decode_event(encode_event(event, "0.8"))
    assert inner == RouterEvent(2**64 - 1, KvEvent(2, Stored((StoredBlock(2**64 - 3, 4),), 2**64 - 5)))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (RouterEvent(2**64, KvEvent(1, Cleared())), "worker_id=18446744073709551616: expected an integer of 64 bits"),
        (RouterEvent(1, KvEvent(-1, Cleared())), "event_id=-1: expected an integer from 0 to 18446744073709551615"),
        (RouterEvent(1, KvEvent(1, Cleared(), 2**32)), "dp_rank=4294967296: expected an integer from 0 to 4294967295"),
        (RouterEvent(1, KvEvent(1, Removed((1, -(2**63) - 1)))), "block hash=-9223372036854775809"),
        (RouterEvent(1, KvEvent(1, Removed((1.0,)))), r"block hash=1\.0"),  # type: ignore[arg-type]
        (RouterEvent(1, KvEvent(1, Stored((StoredBlock(1, 2**64),)))), "tokens hash=18446744073709551616"),
        (RouterEvent(1, KvEvent(1, Stored((), 2**64))), "parent_hash=18446744073709551616"),
        (RouterEvent(1, KvEvent(1, Stored((StoredBlock(1, 2, object()),)))), "mm_extra_info=.*expected plain data"),
        (RouterEvent(1, KvEvent(1, "gone")), "data='gone': expected Stored, Removed or Cleared"),  # type: ignore[arg-type]
    ],
)
def test_what_no_event_can_hold_is_refused(event: RouterEvent, message: str) -> None:
    with pytest.raises(KvValueError, match=message):
        encode_event(event, "0.8")
    with pytest.raises(KvValueError, match=message):
        encode_local(event, "0.9", 0, 0)


@pytest.mark.parametrize("wire", ["0.6", "1.0", "", None])
def test_a_wire_is_one_of_three(wire: Any) -> None:
    event = RouterEvent(1, KvEvent(2, Cleared()))
    with pytest.raises(KvValueError, match=r"expected one of: 0\.7, 0\.8, 0\.9"):
        encode_event(event, wire)
    with pytest.raises(KvValueError, match=r"expected one of: 0\.7, 0\.8, 0\.9"):
        encode_local(event, wire, 0, 0)
    with pytest.raises(KvValueError, match=r"expected one of: 0\.7, 0\.8, 0\.9"):
        event_subject("dynamo", "backend", wire)


# --- what comes in ----------------------------------------------------------------------------------------------------


def message(data: Any = "cleared", *, worker_id: Any = 1, event_id: Any = 2, **more: Any) -> dict[str, Any]:
    return {"worker_id": worker_id, "event": {"event_id": event_id, "data": data, **more}}


def forms(document: dict[str, Any]) -> list[bytes]:
    """A document in each form that a message may have."""
    envelope = Envelope(1, 0, 0, "kv-events", msgspec.msgpack.encode(document))
    return [json.dumps(document).encode(), b" \n" + json.dumps(document, indent=1).encode(), envelope.encode()]


BLOCK = {"block_hash": 3, "tokens_hash": 4}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (message(), KvEvent(2, Cleared())),
        (message({"cleared": None}), KvEvent(2, Cleared())),
        (message(dp_rank=None), KvEvent(2, Cleared())),
        (message(dp_rank=7, later=[{}]) | {"later": {"a": [1]}}, KvEvent(2, Cleared(), 7)),
        (message({"removed": {"block_hashes": [-1], "later": 1}}), KvEvent(2, Removed((2**64 - 1,)))),
        (message({"stored": {"blocks": []}}), KvEvent(2, Stored(()))),
        (message({"stored": {"blocks": [BLOCK | {"later": 1}]}}), KvEvent(2, Stored((StoredBlock(3, 4),)))),
        (
            message({"stored": {"parent_hash": -(2**63), "blocks": [{"block_hash": -1, "tokens_hash": -2}]}}),
            KvEvent(2, Stored((StoredBlock(2**64 - 1, 2**64 - 2),), 2**63)),
        ),
    ],
)
def test_what_other_releases_add_or_leave_out_is_no_matter(document: dict[str, Any], expected: KvEvent) -> None:
    for payload in forms(document):
        assert decode_event(payload) == RouterEvent(1, expected)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({}, "missing required field `worker_id`"),
        ({"worker_id": 1}, "missing required field `event`"),
        ({"worker_id": 1, "event": {"event_id": 1}}, "missing required field `data`"),
        (message(worker_id="1"), "Expected `int`, got `str`"),
        (message(worker_id=None), "Expected `int`, got `(null|None)`"),
        (message(worker_id=1.5), "Expected `int`, got `float`"),
        (message(event_id=True), "Expected `int`, got `bool`"),
        (message(event_id=-1), "event_id=-1: expected an integer from 0"),
        (message(dp_rank=2**32), "dp_rank=4294967296: expected an integer from 0"),
        (message(dp_rank=-1), "dp_rank=-1"),
        (message({}), r"kinds of event=\[\]: expected one of: stored, removed, cleared"),
        (message({"stored": {"blocks": []}, "cleared": None}), r"kinds of event=\['stored', 'cleared'\]"),
        (message("evicted"), "kind of event='evicted'"),
        (message({"evicted": {"block_hashes": []}}), "unknown field `evicted`"),
        (message(["cleared"]), "got `array`"),
        (message({"stored": None}), "Expected `object`, got `(null|None)`"),
        (message({"stored": {}}), "missing required field `blocks`"),
        (message({"stored": {"blocks": [{"block_hash": 1}]}}), "missing required field `tokens_hash`"),
        (message({"stored": {"blocks": BLOCK}}), "Expected `array`, got `object`"),
        (message({"removed": {"block_hashes": ["1"]}}), "Expected `int`, got `str`"),
    ],
)
def test_what_is_no_event_says_why(document: dict[str, Any], reason: str) -> None:
    for payload in forms(document):
        with pytest.raises(PayloadError, match=reason):
            decode_event(payload)


@pytest.mark.parametrize(
    "document",
    [
        message(worker_id=2**64),
        message(event_id=2**64),
        message(worker_id=-(2**63) - 1),
        message({"removed": {"block_hashes": [1, 2**64]}}),
        message({"stored": {"parent_hash": 2**64, "blocks": []}}),
        message({"stored": {"blocks": [BLOCK, {"block_hash": 2**64, "tokens_hash": 1}]}}),
        message({"stored": {"blocks": [{"block_hash": 1, "tokens_hash": 10**4000}]}}),
        message({"stored": {"blocks": [{"block_hash": 1, "tokens_hash": -(10**30)}]}}),
    ],
)
def test_numbers_past_64_bits_are_no_event(document: dict[str, Any]) -> None:
    with pytest.raises(PayloadError, match="expected an integer"):
        decode_event(json.dumps(document).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b" ",
        b"{",
        b"null",
        b"[]",
        b"\x00",
        b"\xc1",
        b"\xff\xfe",
        ALL[0] + b"}",
        ALL[0][:-1],
        LOCAL_09[:-1],
        LOCAL_09 + b"\x00",
        b'{"worker_id":1,"event":{"event_id":1,"data":"\xff"}}',
        b'{"worker_id":' + b"9" * 5000 + b"}",
        msgspec.msgpack.encode(message()),  # msgpack, and no envelope
        Envelope(1, 0, 0, "kv-events", b"").encode(),
        Envelope(1, 0, 0, "kv-events", ALL[0]).encode(),
    ],
)
def test_what_is_broken_is_no_event(payload: bytes) -> None:
    with pytest.raises(PayloadError):
        decode_event(payload)


def test_an_envelope_of_another_topic_is_no_event() -> None:
    payload = Envelope(1, 0, 0, "kv_metrics", msgspec.msgpack.encode(message())).encode()
    with pytest.raises(PayloadError, match="its topic is 'kv_metrics'"):
        decode_event(payload)


DEEP = 1_000_000


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b'{"worker_id":1,"later":' + b"[" * DEEP,
        b'{"worker_id":1,"event":{"event_id":1,"data":{"stored":{"blocks":[{"mm_extra_info":' + b"[" * DEEP,
        b"\x91" * DEEP,
        b"\x81\xa1a" * DEEP,
        Envelope(1, 0, 0, "kv-events", b"\x82\xa5later" + b"\x91" * DEEP).encode(),
        Envelope(1, 0, 0, "kv-events", b"\x82\xa5later" + b"\x81\xa1a" * DEEP).encode(),
    ],
)
def test_depth_is_bounded(payload: bytes) -> None:
    with pytest.raises(PayloadError):
        decode_event(payload)


# --- anything ---------------------------------------------------------------------------------------------------------


def accepted(payload: bytes) -> bool:
    """Whether it is an event; one that is can be sent on."""
    try:
        event = decode_event(payload)
    except PayloadError:
        return False
    assert decode_event(encode_event(event, "0.7")).worker_id == event.worker_id
    return True


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda b: b"{" + b))
def test_bytes_of_any_kind_are_an_event_or_a_payload_error(payload: bytes) -> None:
    accepted(payload)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    payload = bytearray(draw(st.sampled_from(ALL)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(payload) - 1))
        until = draw(st.integers(at, min(at + 12, len(payload))))
        payload[at:until] = draw(
            st.binary(max_size=6) | st.sampled_from([b'"', b"[", b"}", b"-", b"99999999", b"\xc4"])
        )
        if not payload:
            break
    return bytes(payload)


@settings(max_examples=500)
@given(mutated())
def test_mutated_captures_are_an_event_or_a_payload_error(payload: bytes) -> None:
    accepted(payload)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
PLACES = ("worker_id", "event", "event.event_id", "event.dp_rank", "event.data", "event.data.stored")


@settings(max_examples=300)
@given(st.sampled_from([payload for payload in ALL if b"stored" in payload and payload[:1] == b"{"]), st.data())
@example(ALL[0], None)
def test_anything_in_any_place_is_an_event_or_a_payload_error(payload: bytes, draw: st.DataObject | None) -> None:
    document = json.loads(payload)
    if draw is not None:
        *way, last = draw.draw(st.sampled_from(PLACES)).split(".")
        place = document
        for name in way:
            place = place[name]
        place[last] = draw.draw(anything)
    accepted(json.dumps(document).encode())


# --- from tokens ------------------------------------------------------------------------------------------------------


def test_an_event_is_made_of_tokens_and_the_engines_hashes() -> None:
    pytest.importorskip("xxhash", reason="hashes are XXH3: pip install 'rkmetrics[dynamo]'")
    event = stored([1, 2, 3, 4, 5, 6, 7, 8, 9], [1000, -1001], 4, event_id=3, parent_hash=-1, dp_rank=2)
    blocks = (StoredBlock(1000, 14643705804678351452), StoredBlock(2**64 - 1001, 16777012769546811212))
    assert event == KvEvent(3, Stored(blocks, 2**64 - 1), 2)
    (first, *_) = captured("0.7.1", "kv_events.jsonl")
    assert (
        encode_event(RouterEvent(9041998779987581852, stored(range(1, 9), [1000, -1001], 4, event_id=0)), "0.7")
        == first
    )


@pytest.mark.parametrize("block_hashes", [[], [1], [1, 2, 3]])
def test_hashes_for_more_or_fewer_blocks_are_not_sent_without_a_word(block_hashes: list[int]) -> None:
    pytest.importorskip("xxhash", reason="hashes are XXH3: pip install 'rkmetrics[dynamo]'")
    with pytest.raises(
        KvValueError, match=r"block_hashes=.: expected one for each whole block of token_ids, that is 2"
    ):
        stored(range(8), block_hashes, 4, event_id=0)


def test_an_engines_hash_has_64_bits() -> None:
    pytest.importorskip("xxhash", reason="hashes are XXH3: pip install 'rkmetrics[dynamo]'")
    with pytest.raises(KvValueError, match="block hash=18446744073709551616"):
        stored([1], [2**64], 1, event_id=0)
    with pytest.raises(KvValueError, match=r"parent_hash='x'"):
        stored([1], [1], 1, event_id=0, parent_hash="x")  # type: ignore[arg-type]
