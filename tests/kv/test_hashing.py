"""Hashes of token blocks: the vectors that the real runtime confirmed, and what is no token."""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.errors import KvValueError, MissingExtraError
from rkmetrics.kv import hashing
from rkmetrics.kv.hashing import block_hashes, sequence_hashes

xxhash = pytest.importorskip("xxhash", reason="hashes are XXH3: pip install 'rkmetrics[dynamo]'")

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "dynamo" / "block_hash_vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["single"])
def test_a_block_has_the_hash_that_dynamo_gives_it(vector: dict[str, Any]) -> None:
    assert block_hashes(vector["tokens"], vector["block_size"]) == [vector["tokens_hash"]]


@pytest.mark.parametrize("vector", VECTORS["sequences"])
def test_a_sequence_has_the_hashes_of_its_whole_blocks(vector: dict[str, Any]) -> None:
    assert block_hashes(vector["tokens"], vector["block_size"]) == vector["block_hashes"]


tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(tokens, st.integers(1, 8))
def test_each_block_is_hashed_by_itself(token_ids: list[int], size: int) -> None:
    whole = [token_ids[i : i + size] for i in range(0, len(token_ids) - size + 1, size)]
    packed = [struct.pack(f"<{size}I", *block) for block in whole]
    assert block_hashes(token_ids, size) == [xxhash.xxh3_64_intdigest(block, seed=1337) for block in packed]


def _little_endian(token_ids: list[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


FORMS: dict[str, Callable[[list[int]], Iterable[int]]] = {
    "tuple": tuple,
    "generator": lambda token_ids: (token for token in token_ids),
    "array of u32": lambda token_ids: array("I", token_ids),
    "array of i64": lambda token_ids: array("q", token_ids),
    "bytes": _little_endian,
    "bytearray": lambda token_ids: bytearray(_little_endian(token_ids)),
    "memoryview of bytes": lambda token_ids: memoryview(_little_endian(token_ids)),
    "memoryview of u32": lambda token_ids: memoryview(array("I", token_ids)),
    "every second u32": lambda token_ids: memoryview(array("I", [t for token in token_ids for t in (token, 7)]))[::2],
}


@pytest.mark.parametrize("form", FORMS)
@given(tokens)
def test_tokens_may_come_in_any_form(form: str, token_ids: list[int]) -> None:
    assert block_hashes(FORMS[form](token_ids), 4) == block_hashes(token_ids, 4)


def test_an_array_of_small_numbers_holds_tokens_and_not_bytes_of_them() -> None:
    assert block_hashes(array("B", range(8)), 4) == block_hashes(list(range(8)), 4)


@pytest.mark.parametrize("kind", ["uint32", "int64", ">u4", "object", "uint8"])
def test_numpy_arrays_are_tokens(kind: str) -> None:
    numpy = pytest.importorskip("numpy", reason="arrays of numpy are taken too, where it is installed")
    assert block_hashes(numpy.array(range(64), dtype=kind), 4) == block_hashes(range(64), 4)
    assert block_hashes(numpy.array(range(64), dtype=kind)[::2], 4) == block_hashes(range(0, 64, 2), 4)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([1, -1, 2], r"token id=-1: expected an integer from 0 to 4294967295"),
        ([1, 2**32], r"token id=4294967296"),
        ([1, 2.0], r"token id=2\.0"),
        ([1, None], r"token id=None"),
        (iter([1, "x"]), r"token id='x'"),
        ("ab", r"token id='a'"),
        (array("q", [-5]), r"token id=-5"),
        (array("d", [1.5]), r"token id=1\.5"),
        (7, r"token_ids=7: expected integers"),
        (b"12345", r"token_ids=5: expected a length that is a multiple of 4"),
        (memoryview(bytes(8)).cast("B", (2, 4)), r"token_ids=\(2, 4\): expected one dimension"),
    ],
)
def test_what_is_no_token_is_named(token_ids: Any, message: str) -> None:
    with pytest.raises(KvValueError, match=message):
        block_hashes(token_ids, 1)


@pytest.mark.parametrize("size", [0, -1, 1.0, "4", None])
def test_a_block_has_a_token_at_least(size: Any) -> None:
    with pytest.raises(KvValueError, match=f"block_size={size!r}: expected a number of tokens"):
        block_hashes([1, 2], size)


def test_a_block_may_be_larger_than_all_tokens() -> None:
    assert block_hashes([1, 2, 3], 10**30) == []


# --- rolling ----------------------------------------------------------------------------------------------------------


def test_a_sequence_hash_is_of_the_one_before_and_the_block() -> None:
    blocks = [11, 2**64 - 1, 13]
    second = xxhash.xxh3_64_intdigest(struct.pack("<2Q", 11, 2**64 - 1), seed=1337)
    assert sequence_hashes(blocks) == [11, second, xxhash.xxh3_64_intdigest(struct.pack("<2Q", second, 13), seed=1337)]
    assert sequence_hashes([]) == []


@given(st.lists(st.integers(0, 2**64 - 1), max_size=8), st.integers(0, 8))
def test_sequence_hashes_of_a_prefix_are_a_prefix(blocks: list[int], cut: int) -> None:
    assert sequence_hashes(blocks[:cut]) == sequence_hashes(blocks)[:cut]


@pytest.mark.parametrize("bad", [-1, 2**64, 1.5, "x", None])
def test_what_is_no_block_hash_is_named(bad: Any) -> None:
    for blocks in ([bad], [1, bad]):
        with pytest.raises(KvValueError, match=r"block hash=.*: expected an integer from 0 to 2\*\*64 - 1"):
            sequence_hashes(blocks)


# --- without the package ----------------------------------------------------------------------------------------------


def test_without_xxhash_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    hashing._xxh3.cache_clear()
    with pytest.raises(MissingExtraError, match=r"'xxhash'; install it with: pip install 'rkmetrics\[dynamo\]'"):
        block_hashes([1, 2], 1)
    monkeypatch.undo()
    assert len(block_hashes([1, 2], 1)) == 2, "and found as soon as it is there"
