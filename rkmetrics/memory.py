"""Where cells live. One kind so far: this process' own memory.

A `Memory` hands out one Block for each bound set (a set of metrics, and an actor name). Whoever reads a snapshot asks
the registry for blocks and never a Memory, so a file that several worker processes map is one more class here, and
nothing else: `key` is what says that two workers' blocks belong together, `image` what a new one starts as.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from rkmetrics.cells import Block, CounterCell
from rkmetrics.model import Exemplar

__all__ = ["Exemplars", "Memory", "PrivateMemory"]

# OpenMetrics 1.0, "Exemplars": names and values together MUST NOT exceed 128 UTF-8 characters.
EXEMPLAR_CHARACTERS = 128

# An exemplar is replaced at most this often: whoever looks wants a recent one, not each one, and the hot path is not
# for that.
EXEMPLAR_SECONDS = 0.1

# What all have that never had an exemplar, which is most of them; never written to.
_NEVER: dict[int, Exemplar] = {}
_NEXT: dict[int, float] = {}


class Exemplars:
    """The latest exemplar at each place of a block; what a Block calls when an update carries one.

    Sampled: a place keeps its exemplar for EXEMPLAR_SECONDS. Labels that are not short text are dropped, and
    `dropped` is
    told: they are data, so they must not make an update fail that is right otherwise.

    `dropped` must not lead back to the block's own cells: the garbage collector does not see through cells, and what it
    cannot see through it never frees.
    """

    __slots__ = ("_dropped", "_next", "latest")

    def __init__(self, dropped: CounterCell) -> None:
        self.latest: dict[int, Exemplar] = _NEVER
        self._dropped = dropped
        self._next: dict[int, float] = _NEXT

    def __call__(self, offset: int, value: float, labels: Mapping[str, str]) -> None:
        now = time.monotonic()
        if now < self._next.get(offset, 0.0):
            return
        pairs = _pairs(labels)
        if pairs is None:
            self._dropped.inc()
            return
        if self.latest is _NEVER:
            self._next = {}  # before `latest`: whoever comes in between then writes to neither of the shared ones
            self.latest = {}
        self._next[offset] = now + EXEMPLAR_SECONDS
        self.latest[offset] = Exemplar(pairs, value, time.time())


def _pairs(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...] | None:
    """The labels as pairs, or None where OpenMetrics does not allow them."""
    try:
        pairs = tuple((name, value if type(value) is str else str(value)) for name, value in labels.items())
        size = sum(len(name) + len(value) for name, value in pairs)
        if size > EXEMPLAR_CHARACTERS or not all(name.isidentifier() and name.isascii() for name, _ in pairs):
            return None
        for _, value in pairs:
            value.encode()
    except Exception:  # not a mapping of text: the caller's data is wrong, its observation is not
        return None
    return pairs


class Memory(Protocol):
    """Hands out the memory of bound sets."""

    def block(self, key: str, image: bytes, exemplars: Exemplars | None) -> Block:
        """A block that starts as `image` (bytes of float64) and offers the exemplars of its cells to `exemplars`."""
        ...


class PrivateMemory:
    """This process' own memory: blocks are counted by Python's reference counts, so nothing has to be given back.

    A forked child has a copy, as of all its memory; it counts on from there.
    """

    def block(self, key: str, image: bytes, exemplars: Exemplars | None) -> Block:
        return Block(bytearray(image), exemplars)
