"""KV metrics as bytes, in the three forms that Dynamo's releases put on one subject. Pure.

    0.7   {"worker_id":W,"data":{ForwardPassMetrics}}                                          JSON
    0.8   {"worker_id":W,"dp_rank":0,"active_decode_blocks":100,"active_prefill_tokens":null}  JSON
    0.9   an Envelope of topic "kv_metrics" whose payload is the map of 0.8                    msgpack in msgpack

A consumer gets a form it does not know without a sign, so what is sent is a setting (DYN_WIRE); what comes in is told
apart by its first byte and its fields, since a namespace may hold workers of several releases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from rkmetrics.errors import PayloadError
from rkmetrics.kv.base import (
    U64,
    Amount,
    Envelope,
    ForwardPassMetrics,
    Id,
    KvReport,
    KvUpdate,
    WorkerKey,
    decoded,
    subject_token,
)

__all__ = ["ENCODERS", "TOPIC", "decode_metrics", "metrics_subject"]

TOPIC = "kv_metrics"


class _Load(msgspec.Struct):
    worker_id: Id
    dp_rank: Amount
    active_decode_blocks: Amount
    active_prefill_tokens: Amount | None = None


class _Message(msgspec.Struct):
    """All that a message may have; the fields of later releases are passed over."""

    worker_id: Id
    data: ForwardPassMetrics | None = None
    dp_rank: Amount | None = None
    active_decode_blocks: Amount | None = None
    active_prefill_tokens: Amount | None = None


def metrics_subject(namespace: str) -> str:
    """Where the metrics of a namespace are published, of all its components."""
    return f"namespace.{subject_token(namespace, 'namespace')}.{TOPIC}"


# --- out --------------------------------------------------------------------------------------------------------------


def _encode_07(update: KvUpdate, _sequence: int, _published_at: int) -> bytes:
    return b'{"worker_id":%d,"data":%b}' % (update.key.worker_id, update.data)


def _encode_08(update: KvUpdate, _sequence: int, _published_at: int) -> bytes:
    worker_id, dp_rank = update.key
    blocks = update.metrics.kv_stats.kv_active_blocks
    return b'{"worker_id":%d,"dp_rank":%d,"active_decode_blocks":%d,"active_prefill_tokens":null}' % (
        worker_id,
        dp_rank,
        blocks,
    )


def _encode_09(update: KvUpdate, sequence: int, published_at: int) -> bytes:
    load = _pack(_Load(*update.key, update.metrics.kv_stats.kv_active_blocks))
    return Envelope(update.key.worker_id, sequence, published_at, TOPIC, load).encode()


_pack = msgspec.msgpack.Encoder().encode

#: DYN_WIRE to the form it sends, of (update, its number at the publisher from 0, ms since the epoch).
ENCODERS: Mapping[str, Callable[[KvUpdate, int, int], bytes]] = {
    "0.7": _encode_07,
    "0.8": _encode_08,
    "0.9": _encode_09,
}


# --- in ---------------------------------------------------------------------------------------------------------------

_from_json = msgspec.json.Decoder(_Message).decode
_from_msgpack = msgspec.msgpack.Decoder(_Message).decode


def decode_metrics(data: bytes) -> KvReport:
    """Return what a message says, in whichever form. Raises PayloadError, and nothing else."""
    if data[:1] == b"{":
        return _report(decoded(_from_json, data, "a KV metrics message"), data)
    envelope = Envelope.decode(data)
    if envelope.topic != TOPIC:
        raise PayloadError("a KV metrics message", data, f"its topic is {envelope.topic[:40]!r}")
    report = _report(decoded(_from_msgpack, envelope.payload, "a KV metrics message"), data)
    return report._replace(sequence=envelope.sequence, incarnation=f"{envelope.publisher_id:x}")


def _report(message: _Message, data: bytes) -> KvReport:
    metrics, rank = message.data, message.dp_rank
    blocks = message.active_decode_blocks
    if metrics is not None:
        blocks, rank = metrics.kv_stats.kv_active_blocks, metrics.worker_stats.data_parallel_rank
    if blocks is None:
        raise PayloadError("a KV metrics message", data, "neither `data` nor `active_decode_blocks` is there")
    if message.worker_id > U64:
        raise PayloadError("a KV metrics message", data, "worker_id has more than 64 bits")
    return KvReport(WorkerKey(message.worker_id, rank or 0), blocks, metrics, message.active_prefill_tokens)
