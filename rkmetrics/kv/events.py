"""KV events: which blocks a worker's cache took in or let go, as values and as bytes. Pure.

    to a JetStream stream, each release    {"worker_id":W,"event":{"event_id":0,"data":...,"dp_rank":0}}      JSON
    to a local indexer (core NATS), 0.8    the same                                                           JSON
    to a local indexer, 0.9                an Envelope of topic "kv-events" with the same map     msgpack in msgpack

`data` is {"stored":{"parent_hash":...,"blocks":[...]}}, {"removed":{"block_hashes":[...]}} or "cleared". 0.6 has no
dp_rank, and blocks have mm_extra_info from 0.8 on. As with metrics, what is sent is a setting (DYN_WIRE), and what
comes in is told apart by its first byte.

A block has two names. `block_hash` is the engine's own: nobody else can compute it, and events link to each other by it
(parent_hash, block_hashes). `tokens_hash` says which tokens are in the block, is the same in every worker, and is what
a request is looked up by (see hashing.py). Both are u64; engines hand theirs over as i64 too, which is brought to u64
wherever it comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from rkmetrics.errors import KvValueError, PayloadError
from rkmetrics.kv.base import U64, Envelope, decoded, subject_token, unsigned
from rkmetrics.kv.hashing import block_hashes as hashes_of_tokens

__all__ = [
    "TOPIC",
    "Cleared",
    "KvEvent",
    "Removed",
    "RouterEvent",
    "Stored",
    "StoredBlock",
    "decode_event",
    "encode_event",
    "encode_local",
    "event_subject",
    "local_subject",
    "stored",
    "stream_config",
    "stream_name",
]

TOPIC = "kv-events"

_U32 = (1 << 32) - 1
_WHAT = "a KV event"


class StoredBlock(msgspec.Struct, frozen=True):
    """One block that a worker took in. mm_extra_info: what an engine says of images and the like in it; passed on."""

    block_hash: int
    tokens_hash: int
    mm_extra_info: Any = None


class Stored(msgspec.Struct, frozen=True):
    """Blocks that follow each other, and the block hash of the one before the first; None where a sequence begins."""

    blocks: tuple[StoredBlock, ...]
    parent_hash: int | None = None


class Removed(msgspec.Struct, frozen=True):
    """Blocks that a worker let go."""

    block_hashes: tuple[int, ...]


class Cleared(msgspec.Struct, frozen=True):
    """The worker let go of everything."""


class KvEvent(msgspec.Struct, frozen=True):
    """One event of one data-parallel rank. event_id: u64, the engine's own count."""

    event_id: int
    data: Stored | Removed | Cleared
    dp_rank: int = 0


class RouterEvent(msgspec.Struct, frozen=True):
    """An event with the worker it is of: what travels."""

    worker_id: int
    event: KvEvent


def stored(
    token_ids: Iterable[int],
    block_hashes: Sequence[int],
    block_size: int,
    *,
    event_id: int,
    parent_hash: int | None = None,
    dp_rank: int = 0,
) -> KvEvent:
    """Return the event for whole blocks of tokens, and the engine's hashes of them (i64 or u64).

    Tokens after the last whole block belong to none. Raises KvValueError where hashes and blocks are not as many:
    Dynamo's own publisher then sends an event without blocks, and the router never learns of them. Needs xxhash.
    """
    tokens_hashes = hashes_of_tokens(token_ids, block_size)
    if len(tokens_hashes) != len(block_hashes):
        whole = len(tokens_hashes)
        raise KvValueError("block_hashes", len(block_hashes), f"one for each whole block of token_ids, that is {whole}")
    blocks = tuple(
        StoredBlock(_u64(block_hash, "block hash"), tokens_hash)
        for block_hash, tokens_hash in zip(block_hashes, tokens_hashes, strict=True)
    )
    parent = None if parent_hash is None else _u64(parent_hash, "parent_hash")
    return KvEvent(event_id, Stored(blocks, parent), dp_rank)


def _u64(number: int, what: str) -> int:
    try:
        return unsigned(index(number))
    except (TypeError, KvValueError):
        raise KvValueError(what, number, "an integer of 64 bits") from None


def _upto(limit: int, number: int, what: str) -> int:
    try:
        if 0 <= (found := index(number)) <= limit:
            return found
    except TypeError:
        pass
    raise KvValueError(what, number, f"an integer from 0 to {limit}")


# --- out --------------------------------------------------------------------------------------------------------------

_to_json = msgspec.json.Encoder().encode
_to_msgpack = msgspec.msgpack.Encoder().encode


def encode_event(event: RouterEvent, wire: str) -> bytes:
    """Return what goes to the stream. wire: "0.7", "0.8" or "0.9". Raises KvValueError for what no event can hold."""
    return _encoded(_to_json, _document(event, _wire(wire)))


def encode_local(event: RouterEvent, wire: str, sequence: int, published_at_ms: int) -> bytes:
    """Return what goes to a local indexer. sequence: from 0; published_at_ms: since the epoch; 0.9 sends both.

    Raises KvValueError, also for "0.7", which knows no local indexer.
    """
    row = _wire(wire)
    if row.local is None:
        raise KvValueError("wire", wire, f"a release with a local indexer: {', '.join(_WITH_LOCAL)}")
    return row.local(_document(event, row), sequence, published_at_ms)


def _document(event: RouterEvent, wire: _Wire) -> dict[str, Any]:
    inner = event.event
    try:
        data = _DATA[type(inner.data)](inner.data, wire)
    except KeyError:
        raise KvValueError("data", inner.data, "Stored, Removed or Cleared") from None
    return {
        "worker_id": _u64(event.worker_id, "worker_id"),
        "event": {
            "event_id": _upto(U64, inner.event_id, "event_id"),
            "data": data,
            "dp_rank": _upto(_U32, inner.dp_rank, "dp_rank"),
        },
    }


def _stored(data: Stored, wire: _Wire) -> Any:
    parent = None if data.parent_hash is None else _u64(data.parent_hash, "parent_hash")
    return {"stored": {"parent_hash": parent, "blocks": [wire.block(block) for block in data.blocks]}}


def _removed(data: Removed, _: _Wire) -> Any:
    return {"removed": {"block_hashes": [_u64(block_hash, "block hash") for block_hash in data.block_hashes]}}


def _cleared(_data: Cleared, _: _Wire) -> Any:
    return "cleared"


_DATA: Mapping[type, Callable[[Any, _Wire], Any]] = {Stored: _stored, Removed: _removed, Cleared: _cleared}


def _bare_block(block: StoredBlock) -> dict[str, Any]:
    return {
        "block_hash": _u64(block.block_hash, "block hash"),
        "tokens_hash": _u64(block.tokens_hash, "tokens hash"),
    }


def _block(block: StoredBlock) -> dict[str, Any]:
    return {**_bare_block(block), "mm_extra_info": block.mm_extra_info}


def _local_json(document: dict[str, Any], _sequence: int, _published_at_ms: int) -> bytes:
    return _encoded(_to_json, document)


def _local_envelope(document: dict[str, Any], sequence: int, published_at_ms: int) -> bytes:
    payload = _encoded(_to_msgpack, document)
    return Envelope(document["worker_id"], sequence, published_at_ms, TOPIC, payload).encode()


def _encoded(encode: Callable[[Any], bytes], document: dict[str, Any]) -> bytes:
    try:
        return encode(document)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise KvValueError("mm_extra_info", document["event"]["data"], f"plain data ({error})") from None


class _Wire(NamedTuple):
    """What differs between releases: blocks, the last part of the stream's subject, the local indexer's form."""

    block: Callable[[StoredBlock], dict[str, Any]]
    tail: str
    local: Callable[[dict[str, Any], int, int], bytes] | None


_WIRES: Mapping[str, _Wire] = {
    "0.7": _Wire(_bare_block, "queue", None),
    "0.8": _Wire(_block, "kv-events", _local_json),
    "0.9": _Wire(_block, "kv-events", _local_envelope),
}
_WITH_LOCAL = tuple(name for name, wire in _WIRES.items() if wire.local)


def _wire(name: str) -> _Wire:
    try:
        return _WIRES[name]
    except KeyError:
        raise KvValueError("wire", name, f"one of: {', '.join(_WIRES)}") from None


# --- in ---------------------------------------------------------------------------------------------------------------


class _Data(msgspec.Struct, forbid_unknown_fields=True):
    """One of these is there. A kind that only a later release knows is an unknown field, and so named in the error."""

    stored: Stored | UnsetType = UNSET
    removed: Removed | UnsetType = UNSET
    cleared: UnsetType | None = UNSET


class _Event(msgspec.Struct):
    event_id: int
    data: _Data | str
    dp_rank: int | None = None


class _Message(msgspec.Struct):
    worker_id: int
    event: _Event


_from_json = msgspec.json.Decoder(_Message).decode
_from_msgpack = msgspec.msgpack.Decoder(_Message).decode
# What JSON may begin with: an object, after white space (RFC 8259, section 2). No msgpack map begins so.
_JSON = b"{ \t\r\n"


def decode_event(payload: bytes) -> RouterEvent:
    """Return what an event says, in whichever form it came; hashes and the worker id as u64.

    Fields that are not known are passed over. Raises PayloadError, and nothing else.
    """
    message = decoded(_from_json, payload, _WHAT) if payload[:1] in _JSON else _unpacked(payload)
    inner = message.event
    try:
        data = _text(inner.data) if isinstance(inner.data, str) else _one(inner.data)
        event_id, dp_rank = _upto(U64, inner.event_id, "event_id"), _upto(_U32, inner.dp_rank or 0, "dp_rank")
        return RouterEvent(unsigned(message.worker_id), KvEvent(event_id, data, dp_rank))
    except KvValueError as error:
        raise PayloadError(_WHAT, payload, str(error)) from None


def _unpacked(payload: bytes) -> _Message:
    envelope = Envelope.decode(payload)
    if envelope.topic != TOPIC:
        raise PayloadError(_WHAT, payload, f"its topic is {envelope.topic[:40]!r}")
    return decoded(_from_msgpack, envelope.payload, _WHAT)


def _text(kind: str) -> Cleared:
    if kind == "cleared":
        return Cleared()
    raise KvValueError("kind of event", kind[:40], "stored, removed or cleared")


def _one(data: _Data) -> Stored | Removed | Cleared:
    kinds = [name for name in data.__struct_fields__ if getattr(data, name) is not UNSET]
    if len(kinds) != 1:
        raise KvValueError("kinds of event", kinds, "one of: stored, removed, cleared")
    if data.stored:
        return _with_u64(data.stored)
    if data.removed:
        return Removed(_all_u64(data.removed.block_hashes))
    return Cleared()


def _with_u64(data: Stored) -> Stored:
    """Most of what comes in is in order, and so returned as it is."""
    parent = data.parent_hash
    for block in data.blocks:
        if not (0 <= block.block_hash <= U64 and 0 <= block.tokens_hash <= U64):
            break
    else:
        if parent is None or 0 <= parent <= U64:
            return data
    blocks = tuple(
        StoredBlock(unsigned(block.block_hash), unsigned(block.tokens_hash), block.mm_extra_info)
        for block in data.blocks
    )
    return Stored(blocks, None if parent is None else unsigned(parent))


def _all_u64(hashes: tuple[int, ...]) -> tuple[int, ...]:
    return hashes if not hashes or 0 <= min(hashes) <= max(hashes) <= U64 else tuple(map(unsigned, hashes))


# --- names ------------------------------------------------------------------------------------------------------------


def stream_name(namespace: str, component: str) -> str:
    """Return the name of a component's stream.

    Dynamo makes it of `namespace.{ns}.component.{comp}.kv_events`: in lower case, and `.` and `_` become `-`. Raises
    KvValueError for a part that is none.
    """
    return f"{_subject(namespace, component)}.kv_events".lower().replace(".", "-").replace("_", "-")


def event_subject(namespace: str, component: str, wire: str) -> str:
    """Return where events of the stream are published. Raises KvValueError."""
    return f"{stream_name(namespace, component)}.{_wire(wire).tail}"


def local_subject(namespace: str, component: str) -> str:
    """Return where events for local indexers are published. Raises KvValueError."""
    return f"{_subject(namespace, component)}.{TOPIC}"


def _subject(namespace: str, component: str) -> str:
    return f"namespace.{subject_token(namespace, 'namespace')}.component.{subject_token(component, 'component')}"


_HOUR_NS = 3600 * 10**9


def stream_config(name: str) -> bytes:
    """Return the request that creates a stream, as Dynamo's workers do: on disk, an hour long, of any size."""
    return _to_json(
        {
            "name": name,
            "max_bytes": 0,
            "max_msgs": 0,
            "max_msgs_per_subject": 0,
            "discard": "old",
            "subjects": [f"{name}.*"],
            "retention": "limits",
            "max_consumers": 0,
            "max_age": _HOUR_NS,
            "storage": "file",
            "num_replicas": 0,
            "consumer_limits": None,
        }
    )
