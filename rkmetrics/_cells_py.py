"""The readable cells: the specification that _cells.c obeys, and what runs where no compiler was.

A cell is a place in a Block's memory and one method that changes it. Nothing here takes a lock. CPython switches
threads, runs signal handlers and collects garbage at calls and at backward jumps, and nowhere else: a stretch of
lines without either happens whole, by itself and for exceptions of signal handlers too. So each update ends in such a
stretch ("whole" below): sums of exact floats, item and attribute access. What needs a call (checks, conversions,
finding the bucket) comes before it.

Unset numbers are compared by their bits, in a second view of the memory: for that no call is needed either. Without
the GIL all this does not hold, and updates take a reentrant lock: reentrant, so that a finaliser that interrupts one
goes on.
"""

from __future__ import annotations

import math
import struct
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar, cast, final

from rkmetrics.model import (
    NATIVE_BUCKETS,
    NATIVE_MAX_INDEX,
    NATIVE_MIN_INDEX,
    NATIVE_ZERO_THRESHOLD,
    UNSET,
    UNSET_BYTES,
    is_unset,
)

__all__ = [
    "PEAK_REGION",
    "PEAK_SLOTS",
    "Block",
    "Bounds",
    "Counter",
    "Gauge",
    "GaugeShare",
    "Histogram",
    "existing",
    "gather",
    "peaks",
    "time_with",
]

# A peak's region: the seconds of a slot, then PEAK_SLOTS pairs of (slot number, highest value). Eight past slots and
# the current one cover the window whatever the moment.
PEAK_SLOTS = 9
PEAK_REGION = 1 + 2 * PEAK_SLOTS

Labels: TypeAlias = Mapping[str, str]
_Offer: TypeAlias = Callable[[int, float, Labels], None]
_F = TypeVar("_F", bound=Callable[..., Any])

_NAN = float("nan")
_UNSET_BITS = int.from_bytes(UNSET_BYTES, sys.byteorder)
# 2 ** (k / 8) / 2: the steps within one power of two, halved as frexp's fraction lies in [0.5, 1).
_STEPS = tuple(2 ** (k / 8 - 1) for k in range(8))
_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
_lock = threading.RLock()


def _whole(update: _F) -> _F:
    """Make an update happen whole: as it is under the GIL, under a reentrant lock without."""
    if _GIL:
        return update

    @wraps(update)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with _lock:
            return update(*args, **kwargs)

    return cast("_F", locked)


def _refuse(what: str, value: float, expected: str) -> ValueError:
    return ValueError(f"{what}({value!r}): expected {expected}; nothing was counted")


@final
class Block:
    """Memory for cells: a writable buffer of float64, kept exported while the block lives."""

    __slots__ = ("__weakref__", "bits", "numbers", "offer")

    def __init__(self, buffer: Any, offer: _Offer | None = None) -> None:
        view = memoryview(buffer)
        if view.readonly:
            raise BufferError("a Block's buffer is writable")
        if view.nbytes % 8:
            raise ValueError("a Block's buffer is aligned to 8 bytes and a multiple of 8 long")
        self.numbers = view.cast("B").cast("d")
        self.bits = view.cast("B").cast("Q")
        self.offer = offer

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> float:
        return self.numbers[index]

    def at(self, offset: int, width: int) -> memoryview[float]:
        """The block's numbers, once it is sure that `width` of them lie at `offset`. Raises IndexError."""
        if offset < 0 or width < 0 or offset > len(self.numbers) - width:
            raise IndexError(f"{width} numbers at {offset} are outside a block of {len(self.numbers)}")
        return self.numbers

    def exemplar(self, offset: int, value: float, labels: Labels) -> None:
        """Hand an exemplar on. The observation is counted already, so a failing offer is reported only."""
        if self.offer is not None:
            try:
                self.offer(offset, value, labels)
            except Exception as error:  # as the interpreter does where an exception has nowhere to go
                report = SimpleNamespace(
                    exc_type=type(error),
                    exc_value=error,
                    exc_traceback=error.__traceback__,
                    err_msg=None,
                    object=self.offer,
                )
                sys.unraisablehook(cast("Any", report))


class Counter:
    """A number that only rises."""

    __slots__ = ("_block", "_numbers", "_offset")

    def __init__(self, block: Block, offset: int) -> None:
        self._block, self._numbers, self._offset = block, block.at(offset, 1), offset
        bits, numbers = block.bits, self._numbers
        if bits[offset] == _UNSET_BITS:  # whole
            numbers[offset] = 0.0

    @_whole
    def inc(self, amount: float = 1.0, *, exemplar: Labels | None = None) -> None:
        """Add a finite amount of 0 or more. Raises ValueError otherwise, and nothing is counted."""
        if type(amount) is not float:
            amount = float(amount)
        if not 0.0 <= amount < math.inf:
            raise _refuse("inc", amount, "a finite amount of 0 or more (counters only rise)")
        self._numbers[self._offset] += amount
        if exemplar is not None:
            self._block.exemplar(self._offset, amount, exemplar)

    @property
    def value(self) -> float | None:
        """What was counted so far."""
        value = self._numbers[self._offset]
        return None if is_unset(value) else value


class Gauge:
    """A number that goes up and down, or is unset."""

    __slots__ = ("_bits", "_numbers", "_offset", "_peak")

    def __init__(self, block: Block, offset: int, peak: int = -1) -> None:
        self._numbers, self._bits, self._offset, self._peak = block.at(offset, 1), block.bits, offset, peak
        if peak >= 0:
            block.at(peak, PEAK_REGION)
            if not self._numbers[peak] > 0:
                raise ValueError("a peak's region starts with the seconds of a slot, more than 0")

    @_whole
    def set(self, value: float, /) -> None:
        """Replace the value; NaN and infinities are values."""
        value = float(value)
        if value != value:
            value = _NAN
        if self._peak >= 0:
            before = self._numbers[self._offset]
            self._note(before if before > value else value)  # an unset one is greater than nothing
        self._numbers[self._offset] = value

    @_whole
    def inc(self, amount: float = 1.0) -> None:
        """Add to the value; an unset gauge counts as 0."""
        amount = float(amount)
        self._add(amount if amount == amount else _NAN)

    @_whole
    def dec(self, amount: float = 1.0) -> None:
        """Subtract from the value; an unset gauge counts as 0."""
        amount = -float(amount)
        self._add(amount if amount == amount else _NAN)

    def clear(self) -> None:
        """Take the series away until the next update."""
        self._numbers[self._offset] = UNSET

    def share(self) -> GaugeShare:
        """One instance's part of the value, withdrawn when it is closed or collected."""
        return GaugeShare(self)

    @property
    def value(self) -> float | None:
        """The value, or None while the gauge is unset."""
        value = self._numbers[self._offset]
        return None if is_unset(value) else value

    def _add(self, amount: float) -> None:
        numbers, bits, offset = self._numbers, self._bits, self._offset
        if bits[offset] == _UNSET_BITS:  # whole, to the sum
            numbers[offset] = 0.0
        before = numbers[offset]
        numbers[offset] = after = before + amount
        if after != after:
            numbers[offset] = _NAN
        if self._peak >= 0:
            self._note(after if after > before else before)

    def _note(self, value: float) -> None:
        numbers, peak = self._numbers, self._peak
        slot = _peak_slot(numbers[peak], time.monotonic())
        if slot < 0 or value != value:
            return
        pair = peak + 1 + 2 * (slot % PEAK_SLOTS)
        if numbers[pair] != slot:  # whole
            numbers[pair + 1] = value
            numbers[pair] = slot
        elif not numbers[pair + 1] >= value:
            numbers[pair + 1] = value


@final
class GaugeShare:
    """One instance's part of a gauge; withdrawn when closed or collected."""

    __slots__ = ("_closed", "_gauge", "_part")

    def __init__(self, gauge: Gauge) -> None:
        self._closed, self._part, self._gauge = False, 0.0, gauge

    @_whole
    def set(self, value: float, /) -> None:
        """Make this instance's part a finite value."""
        value = float(value)
        if not math.isfinite(value):
            raise _refuse("set", value, "a finite number (an infinite part could never be withdrawn)")
        gauge = self._gauge
        numbers, bits, offset = gauge._numbers, gauge._bits, gauge._offset
        if not self._closed:  # whole, to the sum
            if bits[offset] == _UNSET_BITS:
                numbers[offset] = 0.0
            before = numbers[offset]
            numbers[offset] = before + (value - self._part)
            self._part = value
            if gauge._peak >= 0:
                gauge._note(max(before, numbers[offset]))

    @_whole
    def inc(self, amount: float = 1.0) -> None:
        """Add to this instance's part."""
        amount = float(amount)
        if not math.isfinite(amount):
            raise _refuse("inc", amount, "a finite number (an infinite part could never be withdrawn)")
        gauge = self._gauge
        numbers, bits, offset = gauge._numbers, gauge._bits, gauge._offset
        if not self._closed:  # whole, to the sum
            if bits[offset] == _UNSET_BITS:
                numbers[offset] = 0.0
            before, part = numbers[offset], self._part
            self._part = part + amount
            numbers[offset] = before + (self._part - part)
            if gauge._peak >= 0:
                gauge._note(max(before, numbers[offset]))

    def dec(self, amount: float = 1.0) -> None:
        """Subtract from this instance's part."""
        self.inc(-float(amount))

    @_whole
    def close(self) -> bool:
        """Withdraw the part for good; True the first time, and every later update is ignored."""
        gauge = self._gauge
        numbers, bits, offset = gauge._numbers, gauge._bits, gauge._offset
        if self._closed:  # whole, to the sum
            return False
        self._closed = True
        part = self._part
        if part:
            self._part = 0.0
            if bits[offset] == _UNSET_BITS:
                numbers[offset] = 0.0
            before = numbers[offset]
            numbers[offset] = before - part
            if gauge._peak >= 0:
                gauge._note(max(before, numbers[offset]))
        return True

    @property
    def value(self) -> float:
        """This instance's part."""
        return self._part

    @property
    def closed(self) -> bool:
        """Whether the part was withdrawn for good."""
        return self._closed

    def __del__(self) -> None:
        try:
            self.close()
        except AttributeError:  # __init__ did not come so far
            return


@final
class Bounds:
    """Upper bounds of buckets without +Inf; one object serves all series of a histogram."""

    __slots__ = ("native", "upper")

    def __init__(self, bounds: tuple[float, ...], native: bool = False) -> None:
        if not isinstance(bounds, tuple):
            raise TypeError("bounds are a tuple")
        self.upper, self.native = tuple(float(bound) for bound in bounds), bool(native)
        finite = all(math.isfinite(bound) for bound in self.upper)
        if not finite or any(a >= b for a, b in zip(self.upper, self.upper[1:], strict=False)):
            raise ValueError("bucket bounds are finite and increase strictly")

    def __len__(self) -> int:
        return len(self.upper)

    @property
    def width(self) -> int:
        """Numbers that a histogram with these bounds takes."""
        return len(self.upper) + 2 + (1 + NATIVE_BUCKETS if self.native else 0)


class Histogram:
    """Counts of observations in buckets, and their sum."""

    __slots__ = ("_block", "_bounds", "_numbers", "_offset")

    def __init__(self, block: Block, offset: int, bounds: Bounds) -> None:
        width = bounds.width
        self._block, self._bounds = block, bounds
        self._numbers, self._offset = block.at(offset, width), offset
        bits, numbers = block.bits, self._numbers
        whole, zeros = slice(offset, offset + width), memoryview(bytes(8 * width)).cast("d")
        if bits[offset] == _UNSET_BITS:  # whole
            numbers[whole] = zeros

    @_whole
    def observe(self, value: float, *, exemplar: Labels | None = None) -> None:
        """Count one observation, in the base unit of the metric's name.

        value: finite; negative only where the lowest bound is, since the sum is a counter (OpenMetrics 1.0,
        "Histogram"). Raises ValueError and leaves the cell unchanged.
        """
        if type(value) is not float:
            value = float(value)
        numbers, offset, upper = self._numbers, self._offset, self._bounds.upper
        if not -math.inf < value < math.inf or (value < 0.0 and not (upper and upper[0] < 0.0)):
            raise _refuse("observe", value, self._expected(value))
        at, total = offset + bisect_left(upper, value), offset + len(upper) + 1
        native = total + 1 + _native_bucket(value) if self._bounds.native else -1
        numbers[total] += value  # whole, to the last sum
        numbers[at] += 1.0
        if native >= 0:
            numbers[native] += 1.0
        if exemplar is not None:
            self._block.exemplar(at, value, exemplar)

    def time(self, *, exemplar: Labels | None = None) -> Any:
        """A timer that observes the seconds a block, or each call of a function, takes; also when it raises.

        `with cell.time(): ...`, `async with cell.time(): ...`, `@cell.time()` on functions and coroutine functions.
        """
        if _timer is None:
            raise RuntimeError("time() before time_with()")
        return _timer(self, exemplar)

    @staticmethod
    def _expected(value: float) -> str:
        if math.isfinite(value):
            return "0 or more, as the lowest bucket bound is (the sum is a counter)"
        return "a finite number"

    @property
    def counts(self) -> tuple[int, ...]:
        """Observations in each bucket, not cumulative, the last above all bounds."""
        end = self._offset + len(self._bounds) + 1
        return tuple(int(count) for count in self._numbers[self._offset : end])

    @property
    def count(self) -> int:
        """How many observations there were."""
        return sum(self.counts)

    @property
    def sum(self) -> float:
        """The sum of all observations."""
        return self._numbers[self._offset + len(self._bounds) + 1]


def _native_bucket(value: float) -> int:
    """Which number, from the zero bucket on, counts a value. Buckets include their upper bound."""
    if value <= NATIVE_ZERO_THRESHOLD:
        return 0
    fraction, exponent = math.frexp(value)
    index = min((exponent - 1) * 8 + bisect_left(_STEPS, fraction), NATIVE_MAX_INDEX)
    return 1 + index - NATIVE_MIN_INDEX


_timer: Callable[[Histogram, Labels | None], Any] | None = None


def time_with(timer: Callable[[Histogram, Labels | None], Any], /) -> None:
    """Name what Histogram.time() makes, called with the cell and the exemplar.

    So a cell has the method without a class derived from it: CPython calls methods of a type's own instances faster.
    """
    global _timer
    _timer = timer


def gather(blocks: Sequence[Block], offset: int, count: int, /) -> bytes:
    """The same numbers of every block, as bytes of float64."""
    if offset < 0 or count < 0:
        raise ValueError("gather() takes an offset and a count of 0 or more")
    return b"".join([block.at(offset, count)[offset : offset + count].tobytes() for block in blocks])


def existing(blocks: Sequence[Block], offset: int, count: int, width: int, /) -> int:
    """How many series of a column exist, over all blocks."""
    if offset < 0 or count < 0 or width < 1:
        raise ValueError("existing() takes an offset and a count of 0 or more, and a width of 1 or more")
    firsts = [block.at(offset, count)[offset : offset + count : width].tobytes() for block in blocks]
    return sum(len(first) // 8 - first.count(UNSET_BYTES) for first in firsts)


def peaks(blocks: Sequence[Block], gauge: int, peak: int, now: float, /) -> bytes:
    """The highest recent value of every block's gauge, as bytes of float64."""
    return b"".join([_peak(block.at(peak, PEAK_REGION), block[gauge], peak, now) for block in blocks])


def _peak(numbers: memoryview[float], current: float, peak: int, now: float) -> bytes:
    slot = _peak_slot(numbers[peak], now)
    pairs = zip(numbers[peak + 1 : peak + PEAK_REGION : 2], numbers[peak + 2 : peak + PEAK_REGION : 2], strict=True)
    highest = -math.inf if is_unset(current) else current
    for number, value in pairs if slot >= 0 else ():
        if number >= 0 and number > slot - PEAK_SLOTS and not highest >= value:
            highest = value
    return UNSET_BYTES if highest == -math.inf and is_unset(current) else struct.pack("=d", highest)


def _peak_slot(seconds: float, now: float) -> int:
    """The number of the slot that `now` lies in, or -1 where the region does not say how long a slot is."""
    slot = now / seconds if 0 < seconds < math.inf else -1.0
    return math.floor(slot) if 0 <= slot < 9e15 else -1
