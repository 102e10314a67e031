"""KV events and their index: how long one block takes on its way in and out, what a look-up takes, what an entry costs.

Events have 16 blocks, paths 64 (1,024 tokens at 16 a block); hashes are random, as real ones are. Nothing here has a
peer: Dynamo's own index is compiled and not a library.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rkmetrics.kv.events import (
    KvEvent,
    Removed,
    RouterEvent,
    Stored,
    StoredBlock,
    decode_event,
    encode_event,
    encode_local,
)
from rkmetrics.kv.hashing import block_hashes, sequence_hashes
from rkmetrics.kv.index import KvIndex
from tests.bench.base import Case, Scale, Subject, cpu_seconds, interleave
from tests.bench.peers import peer, present

__all__ = ["CASES"]

_BLOCKS = 16  # of an event
_PATH = 64
_BLOCK_SIZE = 16
_WORKERS = 4


def _paths(blocks: int, seed: int = 7) -> list[list[StoredBlock]]:
    """Paths that have nothing in common."""
    rng = random.Random(seed)
    return [
        [StoredBlock(rng.getrandbits(64), rng.getrandbits(64)) for _ in range(_PATH)]
        for _ in range(max(blocks // _PATH, 1))
    ]


def _stored(paths: Iterable[list[StoredBlock]], worker: int = 0) -> list[RouterEvent]:
    return [
        RouterEvent(worker, KvEvent(0, Stored(tuple(path[i : i + _BLOCKS]), path[i - 1].block_hash if i else None)))
        for path in paths
        for i in range(0, _PATH, _BLOCKS)
    ]


def _removed(paths: Iterable[list[StoredBlock]], worker: int = 0) -> list[RouterEvent]:
    """The last first, as engines do."""
    return [
        RouterEvent(worker, KvEvent(0, Removed(tuple(block.block_hash for block in path[i : i + _BLOCKS][::-1]))))
        for path in paths
        for i in reversed(range(0, _PATH, _BLOCKS))
    ]


def _fed(*feeds: Sequence[RouterEvent]) -> KvIndex:
    index = KvIndex()
    for events in feeds:
        _feed(index, events)
    return index


def _feed(index: KvIndex, events: Iterable[RouterEvent]) -> None:
    for event in events:
        index.apply(event)


# --- blocks -----------------------------------------------------------------------------------------------------------


def measure_blocks(scale: Scale) -> Mapping[str, Sequence[float]]:
    """One block, in events of 16: into the index, known from another worker, known from its own, and out."""
    paths = _paths(scale.updates)
    blocks = len(paths) * _PATH
    others = [_stored(paths, worker) for worker in range(1, _WORKERS)]

    def fed(events: list[RouterEvent], *feeds: list[RouterEvent]) -> Subject:
        def measure() -> float:
            index = _fed(*feeds)
            return cpu_seconds(lambda: _feed(index, events)) / blocks * 1e9

        return measure

    return interleave(
        scale.rounds,
        {
            "stored, a new block": fed(_stored(paths)),
            f"stored, held by {_WORKERS - 1} others": fed(_stored(paths), *others),
            "stored, held already": fed(_stored(paths), _stored(paths)),
            "removed, its only holder": fed(_removed(paths), _stored(paths)),
            f"removed, held by {_WORKERS - 1} others": fed(_removed(paths), _stored(paths), *others),
        },
    )


def measure_codec(scale: Scale) -> Mapping[str, Sequence[float]]:
    """One block of an event of 16 to bytes and back, and its hash; in all three, a message's own cost is in it."""
    (event, *_) = _stored(_paths(_PATH))
    payload, envelope = encode_event(event, "0.7"), encode_local(event, "0.9", 0, 0)
    tokens = list(range(100_000, 100_000 + _PATH * _BLOCK_SIZE))
    runs = max(scale.updates // _PATH, 1)

    def each(run: Callable[[], Any], blocks: int) -> Subject:
        return lambda: cpu_seconds(run, runs) / blocks * 1e9

    subjects: dict[str, Callable[[], Subject]] = {
        "to JSON, 0.7": lambda: each(lambda: encode_event(event, "0.7"), _BLOCKS),
        "to JSON, 0.8": lambda: each(lambda: encode_event(event, "0.8"), _BLOCKS),
        "to msgpack, 0.9": lambda: each(lambda: encode_local(event, "0.9", 0, 0), _BLOCKS),
        "from JSON": lambda: each(lambda: decode_event(payload), _BLOCKS),
        "from msgpack": lambda: each(lambda: decode_event(envelope), _BLOCKS),
        "hash of 16 tokens in a list": lambda: _hashed(each(lambda: block_hashes(tokens, _BLOCK_SIZE), _PATH)),
        "hash of 16 tokens as bytes": lambda: _hashed(each(lambda: block_hashes(packed, _BLOCK_SIZE), _PATH)),
        "sequence hash": lambda: _hashed(each(lambda: sequence_hashes(tokens[:_PATH]), _PATH)),
    }
    packed = b"".join(token.to_bytes(4, "little") for token in tokens)
    return interleave(scale.rounds, present(subjects))


def _hashed(subject: Subject) -> Subject:
    peer("xxhash")
    return subject


# --- look-ups ---------------------------------------------------------------------------------------------------------


def measure_matches(scale: Scale) -> Mapping[str, Sequence[float]]:
    """A look-up of a path of 64 blocks, by how many hold it, in an index of other paths too."""
    paths = _paths(scale.updates)
    path = paths[len(paths) // 2]
    hashes = [block.tokens_hash for block in path]
    runs = max(scale.updates // 100, 1)
    alone = _fed(_stored(paths))
    shared = _fed(_stored(paths), *(_stored([path], worker) for worker in range(1, _WORKERS)))
    halves = _fed(_stored(paths), *(_stored([path], worker)[: 4 - worker] for worker in range(1, _WORKERS)))

    def each(index: KvIndex, wanted: list[int]) -> Subject:
        return lambda: cpu_seconds(lambda: index.find_matches(wanted), runs) * 1e6

    return interleave(
        scale.rounds,
        {
            "held by 1": each(alone, hashes),
            f"held by {_WORKERS}": each(shared, hashes),
            f"held by {_WORKERS}, not by all to its end": each(halves, hashes),
            "not held, from its last block on": each(alone, [*hashes[:-1], 1]),
            "not held, from its first block on": each(alone, [1, *hashes[1:]]),
        },
    )


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(scale: Scale) -> Mapping[str, Sequence[float]]:
    """Bytes for each block of each worker, with the two hashes that came in the event, as Python counts them."""
    return {
        "held by 1": [_bytes(scale.series, 1)],
        f"held by {_WORKERS}": [_bytes(scale.series // _WORKERS, _WORKERS)],
    }


def _bytes(blocks: int, workers: int) -> float:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = KvIndex()
        for worker in range(workers):
            _feed(index, _stored(_paths(blocks), worker))
        return (tracemalloc.get_traced_memory()[0] - before) / len(index)
    finally:
        tracemalloc.stop()


CASES = (
    Case("kv blocks", "KV index: one block, in events of 16", "ns", measure_blocks),
    Case("kv matches", "KV index: look-up of a path of 64 blocks", "us", measure_matches),
    Case("kv memory", "KV index: memory of a block of one worker, tracemalloc", "bytes", measure_memory),
    Case("kv codec", "KV events: one block, in events of 16", "ns", measure_codec),
)
