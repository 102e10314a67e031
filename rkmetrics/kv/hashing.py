"""Hashes of token blocks, as Dynamo's routers compute them: XXH3-64 with seed 1337. Pure.

A block is `block_size` consecutive tokens, and its hash is that of the token ids as little-endian u32. It says what is
in the block and nothing of what stands before it. The rolling hash over the blocks does, and may be a block hash where
no engine gives one.

All tokens are packed at once, and struct cuts the blocks out: cut and hashed, 16 tokens take 75 ns so, 105 ns as slices
of bytes and 125 ns as slices of a memoryview. Packing a list takes another 95 ns; an array or numpy array of u32 is
taken as it lies in memory.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Iterable
from functools import cache
from operator import index
from typing import Any

from rkmetrics.errors import KvValueError, MissingExtraError

__all__ = ["SEED", "block_hashes", "sequence_hashes"]

#: Of every hash (Dynamo, XXH3_SEED).
SEED = 1337

_TOKEN_BYTES = 4
_MAX_TOKEN = (1 << 32) - 1
# Formats of a buffer of u32 (struct, "Format Characters"), where they lie in memory as they are hashed.
_U32 = frozenset("IL" if sys.byteorder == "little" else "")

_pair = struct.Struct("<QQ").pack


def block_hashes(token_ids: Iterable[int], block_size: int) -> list[int]:
    """Return the hash of each whole block, in order; the tokens after the last one give none.

    token_ids: of u32, as a list, an array, a numpy array, ...; bytes, a bytearray or a memoryview of bytes are
    little-endian u32 already. Raises KvValueError naming what is none, MissingExtraError without xxhash.
    """
    size = _size(block_size) * _TOKEN_BYTES
    data = _packed(token_ids)
    end = len(data) // size * size
    xxh3 = _xxh3()
    return [xxh3(block, SEED) for (block,) in struct.iter_unpack(f"{size}s", data[:end])] if end else []


def sequence_hashes(block_hashes: Iterable[int]) -> list[int]:
    """Return for each block the hash of all up to it: the first is its block hash, then hash(the one before, its own).

    block_hashes: u64. Raises KvValueError, and MissingExtraError without xxhash.
    """
    hashes = list(block_hashes)
    xxh3 = _xxh3()
    found: list[int] = []
    try:
        for own in hashes:
            found.append(xxh3(_pair(found[-1], own), SEED) if found else _first(own))
    except struct.error:
        raise KvValueError("block hash", hashes[len(found)], "an integer from 0 to 2**64 - 1") from None
    return found


def _first(block_hash: int) -> int:
    _pair(0, block_hash)  # is it a u64?
    return index(block_hash)


@cache
def _xxh3() -> Callable[[bytes, int], int]:
    """Loaded when first used: nobody else needs the package."""
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError as error:
        raise MissingExtraError("hashing token blocks", "dynamo", error.name or "xxhash") from error
    return xxh3_64_intdigest


def _size(block_size: int) -> int:
    try:
        if (size := index(block_size)) >= 1:
            return size
    except TypeError:
        pass
    raise KvValueError("block_size", block_size, "a number of tokens, 1 or more")


# --- tokens as bytes --------------------------------------------------------------------------------------------------


def _packed(token_ids: Iterable[int]) -> bytes | memoryview:
    try:
        view = memoryview(token_ids)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    except TypeError:
        return _from_numbers(token_ids)
    if view.ndim != 1:
        raise KvValueError("token_ids", view.shape, "one dimension, where this is the shape")
    if view.format in _U32 and view.itemsize == _TOKEN_BYTES and view.contiguous:
        return view.cast("B")
    if isinstance(token_ids, bytes | bytearray | memoryview) and view.format == "B":
        return _whole(view)
    return _from_numbers(_numbers(view, token_ids))


def _whole(view: memoryview) -> memoryview:
    if len(view) % _TOKEN_BYTES:
        raise KvValueError("token_ids", len(view), "a length that is a multiple of 4, as these bytes are u32")
    return view if view.contiguous else memoryview(view.tobytes())


def _numbers(view: memoryview, token_ids: Iterable[int]) -> Iterable[Any]:
    try:
        return view.tolist()
    except NotImplementedError:  # of Python objects, or in the other byte order
        return token_ids


def _from_numbers(token_ids: Iterable[int]) -> bytes:
    numbers = token_ids if isinstance(token_ids, list | tuple) else _listed(token_ids)
    try:
        packed = array("I", numbers)
    except (TypeError, OverflowError):
        bad = next(number for number in numbers if not _is_token(number))
        raise KvValueError("token id", bad, f"an integer from 0 to {_MAX_TOKEN}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _listed(token_ids: Iterable[int]) -> list[int]:
    try:
        return list(token_ids)
    except TypeError:
        raise KvValueError("token_ids", token_ids, "integers of 32 bits in a row") from None


def _is_token(number: object) -> bool:
    try:
        return 0 <= index(number) <= _MAX_TOKEN  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    except TypeError:
        return False
