"""Values of the KV plane: what a worker says of itself, what is known of it elsewhere, and what a sink is. Pure.

ForwardPassMetrics and its parts are Dynamo's, field by field in its order, since that is the order of the wire (of 0.6
and 0.7; later releases send less, and we keep the type as ours). Ratios are 0 to 1, as Dynamo's "perc" fields are too.
What strangers send is decoded into these types and checked by msgspec; what our own users hand over goes the same way
once, in `checked`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple, Protocol, SupportsFloat, SupportsIndex, TypeVar

import msgspec

from rkmetrics.errors import KvValueError, PayloadError
from rkmetrics.settings import SUBJECT_TOKEN

__all__ = [
    "U64",
    "Amount",
    "Envelope",
    "ForwardPassMetrics",
    "Id",
    "KvReport",
    "KvStats",
    "KvUpdate",
    "MetricsSink",
    "SpecDecodeStats",
    "WorkerKey",
    "WorkerStats",
    "checked",
    "decoded",
    "subject_token",
    "unsigned",
]

#: Hashes and ids are u64 on the wire; engines hand them over as i64 too.
U64 = (1 << 64) - 1

# msgspec's limits fit into i64, and no number of blocks comes near it: without a limit, a peer's number may be one that
# no float can hold. Ids use all 64 bits, and are looked at by hand.
Amount = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Id = Annotated[int, msgspec.Meta(ge=0)]
_Ratio = Annotated[float, msgspec.Meta(ge=0)]
T = TypeVar("T")


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one worker: those that are computed, how many can be, those that wait. data_parallel_rank: u32."""

    data_parallel_rank: Amount | None = None
    request_active_slots: Amount
    request_total_slots: Amount
    num_requests_waiting: Amount


class KvStats(msgspec.Struct, frozen=True, kw_only=True):
    """The KV cache of one worker, in blocks, and two ratios from 0 to 1 (not percent)."""

    kv_active_blocks: Amount
    kv_total_blocks: Amount
    gpu_cache_usage_perc: _Ratio
    gpu_prefix_cache_hit_rate: _Ratio


class SpecDecodeStats(msgspec.Struct, frozen=True, kw_only=True):
    """Speculative decoding. Dynamo's own workers fill it in for one engine step at a time."""

    num_spec_tokens: Amount | None = None
    num_drafts: Amount | None = None
    num_draft_tokens: Amount | None = None
    num_accepted_tokens: Amount | None = None
    num_accepted_tokens_per_pos: tuple[Amount, ...] | None = None


class ForwardPassMetrics(msgspec.Struct, frozen=True):
    """The state of one worker after a forward pass."""

    worker_stats: WorkerStats
    kv_stats: KvStats
    spec_decode_stats: SpecDecodeStats | None = None


class WorkerKey(NamedTuple):
    """Who a state is of: the worker (its instance id, u64) and its data-parallel rank."""

    worker_id: int
    dp_rank: int = 0


class KvUpdate(NamedTuple):
    """One publication of a local worker. data: the metrics as JSON; sequence counts this worker's from 1."""

    key: WorkerKey
    metrics: ForwardPassMetrics
    data: bytes
    sequence: int


class MetricsSink(Protocol):
    """Where publications go. Neither call waits, and neither raises because of a peer."""

    def offer(self, update: KvUpdate) -> None:
        """Take the latest state of a worker; an earlier one that is not sent yet may be forgotten."""

    def withdraw(self, key: WorkerKey) -> None:
        """Forget a worker that ended."""


class KvReport(NamedTuple):
    """What one message or answer of a peer says about one worker.

    metrics: None where the peer's version sends only a part (0.8 and later); active_blocks is there in each.
    sequence: of the publication, where the peer counts them; incarnation: changes when the count begins again.
    age_seconds: how old the state was when it was said.
    """

    key: WorkerKey
    active_blocks: int
    metrics: ForwardPassMetrics | None = None
    active_prefill_tokens: int | None = None
    sequence: int | None = None
    incarnation: str = ""
    age_seconds: float = 0.0


class Envelope(msgspec.Struct, frozen=True):
    """What carries metrics and events from release 0.9 on, as a msgpack map. published_at: ms since the epoch."""

    publisher_id: Id
    sequence: Amount
    published_at: Amount
    topic: str
    payload: bytes

    def encode(self) -> bytes:
        return _pack(self)

    @classmethod
    def decode(cls, data: bytes) -> Envelope:
        """Raises PayloadError."""
        return decoded(_unpack.decode, data, "an event-plane envelope")


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Envelope)


# --- what comes in ----------------------------------------------------------------------------------------------------


def decoded(decode: Callable[[bytes], T], data: bytes, what: str) -> T:
    """Return decode(data). Raises PayloadError for whatever is wrong with bytes of a peer."""
    try:
        return decode(data)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        # ValueError: invalid UTF-8; RecursionError: nested past any use
        raise PayloadError(what, data, str(error)) from None


def unsigned(number: int) -> int:
    """Return a hash or id as u64; a negative one is an i64 in two's complement. Raises KvValueError past 64 bits."""
    if 0 <= number <= U64:
        return number
    if -(1 << 63) <= number < 0:
        return number & U64
    raise KvValueError("hash", number, "an integer of 64 bits")


def subject_token(name: str, what: str) -> str:
    """Return a name that becomes part of a NATS subject. Raises KvValueError for one that could be more (T22)."""
    if not SUBJECT_TOKEN.holds(name):
        raise KvValueError(what, name, f"{SUBJECT_TOKEN.expected} only, as it becomes part of a NATS subject")
    return name


# --- what goes out ----------------------------------------------------------------------------------------------------


def _number(value: object) -> object:
    """Numbers of other libraries (numpy's, torch's) are numbers too."""
    if isinstance(value, SupportsIndex):
        return value.__index__()
    if isinstance(value, SupportsFloat):
        return value.__float__()
    raise TypeError(f"{type(value).__name__} is no number")


_encoder = msgspec.json.Encoder(enc_hook=_number)
_decoder = msgspec.json.Decoder(ForwardPassMetrics)


def checked(metrics: ForwardPassMetrics) -> tuple[ForwardPassMetrics, bytes]:
    """Return metrics that hold what their types say, and their JSON. Raises KvValueError with the field.

    Encoding and decoding again checks all fields at the speed of C, and the JSON is wanted anyway.
    """
    if type(metrics) is not ForwardPassMetrics:
        raise KvValueError("metrics", metrics, "a rk.kv.ForwardPassMetrics")
    try:
        data = _encoder.encode(metrics)
        found = _decoder.decode(data)
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise KvValueError("metrics", metrics, str(error)) from None
    kv = found.kv_stats
    for field in ("gpu_cache_usage_perc", "gpu_prefix_cache_hit_rate"):
        if getattr(kv, field) > 1:
            raise KvValueError(field, getattr(kv, field), "a ratio from 0 to 1 (the name says perc, and means a part)")
    return found, data
