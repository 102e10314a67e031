"""KV metrics as bytes: what real workers sent is read in each form, and ours is theirs to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.errors import KvValueError, PayloadError
from rkmetrics.kv.base import (
    U64,
    Envelope,
    ForwardPassMetrics,
    KvReport,
    KvStats,
    KvUpdate,
    SpecDecodeStats,
    WorkerKey,
    WorkerStats,
    checked,
    subject_token,
    unsigned,
)
from rkmetrics.kv.wire import ENCODERS, decode_metrics, metrics_subject

DATA = Path(__file__).parents[1] / "data" / "dynamo"
WORKER_08, WORKER_09 = 9041998779987581867, 9041998779987581882


def metrics(active: int = 100, waiting: int = 0, rank: int | None = 0, **spec: Any) -> ForwardPassMetrics:
    return ForwardPassMetrics(
        WorkerStats(
            data_parallel_rank=rank, request_active_slots=2, request_total_slots=64, num_requests_waiting=waiting
        ),
        KvStats(
            kv_active_blocks=active,
            kv_total_blocks=1000,
            gpu_cache_usage_perc=active / 1000,
            gpu_prefix_cache_hit_rate=0.25,
        ),
        SpecDecodeStats(**spec) if spec else None,
    )


def update(found: ForwardPassMetrics, worker_id: int, dp_rank: int = 0) -> KvUpdate:
    return KvUpdate(WorkerKey(worker_id, dp_rank), *checked(found), 1)


def lines(version: str) -> list[bytes]:
    return (DATA / version / "kv_metrics.jsonl").read_bytes().splitlines()


# --- captured bytes, both ways ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [*lines("0.6.0"), *lines("0.7.1")])
def test_messages_of_07_come_back_to_the_byte(line: bytes) -> None:
    report = decode_metrics(line)
    assert report.metrics is not None
    assert ENCODERS["0.7"](update(report.metrics, report.key.worker_id), 0, 0) == line


def test_all_that_a_07_message_says_is_read() -> None:
    report = decode_metrics(lines("0.7.1")[0])
    spec: dict[str, Any] = {
        "num_spec_tokens": 3,
        "num_drafts": 10,
        "num_draft_tokens": 30,
        "num_accepted_tokens": 20,
        "num_accepted_tokens_per_pos": (12, 6, 2),
    }
    assert report == KvReport(WorkerKey(9041998779987581852, 0), 100, metrics(100, **spec))


@pytest.mark.parametrize(("line", "blocks"), [*zip(lines("0.8.1.post3"), (100, 101, 102), strict=True)])
def test_messages_of_08_come_back_to_the_byte(line: bytes, blocks: int) -> None:
    assert decode_metrics(line) == KvReport(WorkerKey(WORKER_08, 0), blocks)
    assert ENCODERS["0.8"](update(metrics(blocks), WORKER_08), 0, 0) == line


@pytest.mark.parametrize("number", [0, 1])
def test_messages_of_09_come_back_to_the_byte(number: int) -> None:
    data = (DATA / "0.9.1" / f"kv_metrics.{number}.msgpack").read_bytes()
    report, envelope = decode_metrics(data), Envelope.decode(data)
    assert (report.key, report.sequence) == (WorkerKey(WORKER_09, 0), number)
    stamp = (envelope.sequence, envelope.published_at)
    assert ENCODERS["0.9"](update(metrics(report.active_blocks), WORKER_09), *stamp) == data


@pytest.mark.parametrize("wire", ENCODERS)
@given(
    worker_id=st.integers(0, U64),
    rank=st.integers(0, 2**32 - 1),
    active=st.integers(0, 2**63 - 1),
    waiting=st.integers(0, 2**63 - 1),
)
def test_what_is_sent_is_what_is_read(wire: str, worker_id: int, rank: int, active: int, waiting: int) -> None:
    found = ForwardPassMetrics(
        WorkerStats(
            data_parallel_rank=rank, request_active_slots=0, request_total_slots=1, num_requests_waiting=waiting
        ),
        KvStats(
            kv_active_blocks=active, kv_total_blocks=2**63 - 1, gpu_cache_usage_perc=0.5, gpu_prefix_cache_hit_rate=1.0
        ),
    )
    report = decode_metrics(ENCODERS[wire](update(found, worker_id, rank), 3, 1_700_000_000_000))
    assert (report.key, report.active_blocks) == (WorkerKey(worker_id, rank), active)
    assert report.metrics == (found if wire == "0.7" else None)


# --- what strangers send ----------------------------------------------------------------------------------------------


def test_fields_of_later_releases_are_passed_over() -> None:
    message = json.loads(lines("0.8.1.post3")[0]) | {"kv_used_blocks": 7, "more": {"deep": [1]}}
    assert decode_metrics(json.dumps(message).encode()).active_blocks == 100
    inner = msgspec.msgpack.encode(message)
    envelope = msgspec.msgpack.encode(
        {"publisher_id": 1, "sequence": 0, "published_at": 0, "topic": "kv_metrics", "payload": inner, "later": True}
    )
    assert decode_metrics(envelope).active_blocks == 100


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"{}", "worker_id"),
        (b'{"worker_id":1}', "neither"),
        (b'{"worker_id":-1,"active_decode_blocks":1}', "worker_id"),
        (b'{"worker_id":"1","active_decode_blocks":1}', "worker_id"),
        (b'{"worker_id":18446744073709551616,"active_decode_blocks":1}', "64 bits"),
        (b'{"worker_id":1,"active_decode_blocks":1.5}', "active_decode_blocks"),
        (b'{"worker_id":1,"active_decode_blocks":-1}', "active_decode_blocks"),
        (b'{"worker_id":1,"data":{"worker_stats":{}}}', "data"),
        (b'{"worker_id":1,"data":' + b"[" * 100_000, "Expected `object"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        (b'{"worker_id":1,"active_decode_blocks":1%s}' % (b"0" * 400), "active_decode_blocks"),
        (b'{"worker_id":1,"active_decode_blocks":1}garbage', "trailing"),
        (b'{"worker_id":\xff}', "malformed"),
        (b"\x81\xa1a\x01", "publisher_id"),
        (b"\xc1", "malformed"),
    ],
)
def test_what_is_no_message_is_refused_by_one_error(data: bytes, reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        decode_metrics(data)


def test_an_envelope_of_another_topic_is_none_of_ours() -> None:
    data = Envelope(1, 0, 0, "kv-events", b"\x80").encode()
    with pytest.raises(PayloadError, match="kv-events"):
        decode_metrics(data)


@given(data=st.binary(max_size=300))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    _survives(data)


@given(
    line=st.sampled_from([*lines("0.7.1"), *lines("0.8.1.post3"), (DATA / "0.9.1/kv_metrics.0.msgpack").read_bytes()]),
    at=st.integers(0, 400),
    replacement=st.binary(max_size=8),
)
def test_no_spoiled_message_raises_anything_else(line: bytes, at: int, replacement: bytes) -> None:
    _survives(line[:at] + replacement + line[at + len(replacement) :])


def _survives(data: bytes) -> None:
    try:
        report = decode_metrics(data)
    except PayloadError:
        return
    assert 0 <= report.key.worker_id <= U64
    assert report.active_blocks >= 0


def test_an_error_shows_the_first_bytes_only() -> None:
    with pytest.raises(PayloadError) as caught:
        decode_metrics(b'{"worker_id":"' + b"x" * 10_000)
    assert len(str(caught.value)) < 300


# --- what users hand over ---------------------------------------------------------------------------------------------


class Number:
    """As numpy's and torch's scalars are."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value


def test_numbers_of_other_libraries_are_numbers() -> None:
    given = metrics()
    odd = msgspec.structs.replace(
        given, kv_stats=msgspec.structs.replace(given.kv_stats, gpu_cache_usage_perc=Number(0.5))
    )
    assert checked(odd)[0].kv_stats.gpu_cache_usage_perc == 0.5


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("kv_active_blocks", -1, "kv_active_blocks"),
        ("kv_active_blocks", "many", "kv_active_blocks"),
        ("kv_active_blocks", 2**64, "kv_active_blocks"),
        ("gpu_cache_usage_perc", float("nan"), "gpu_cache_usage_perc"),
        ("gpu_cache_usage_perc", float("inf"), "gpu_cache_usage_perc"),
        ("gpu_cache_usage_perc", 57.0, "a ratio from 0 to 1"),
        ("gpu_prefix_cache_hit_rate", -0.1, "gpu_prefix_cache_hit_rate"),
        ("gpu_prefix_cache_hit_rate", object(), "no number"),
    ],
)
def test_metrics_that_cannot_be_are_refused_with_their_field(field: str, value: Any, told: str) -> None:
    given = metrics()
    odd = msgspec.structs.replace(given, kv_stats=msgspec.structs.replace(given.kv_stats, **{field: value}))
    with pytest.raises(KvValueError, match=told):
        checked(odd)


def test_only_metrics_are_metrics() -> None:
    with pytest.raises(KvValueError, match="ForwardPassMetrics"):
        checked({"worker_stats": {}})  # type: ignore[arg-type]


@pytest.mark.parametrize(("number", "found"), [(0, 0), (U64, U64), (-1, U64), (-(2**63), 2**63)])
def test_hashes_are_unsigned_on_the_wire(number: int, found: int) -> None:
    assert unsigned(number) == found


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1])
def test_hashes_past_64_bits_are_refused(number: int) -> None:
    with pytest.raises(KvValueError, match="64 bits"):
        unsigned(number)


@pytest.mark.parametrize("name", ["", "a.b", "a*", ">", "a b", "a\r\nPUB x 0", "ä", "a" * 3 + "\x00"])
def test_names_that_would_be_more_than_a_part_of_a_subject_are_refused(name: str) -> None:
    with pytest.raises(KvValueError, match="NATS subject"):
        subject_token(name, "namespace")
    with pytest.raises(KvValueError):
        metrics_subject(name)


def test_the_subject_is_of_the_namespace() -> None:
    assert metrics_subject("dynamo") == "namespace.dynamo.kv_metrics"
