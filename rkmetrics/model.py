"""Snapshots: what every reader of a registry starts from. Values only; nothing here knows cells, sockets or settings.

A family is columnar. Its `Shape` is constant (name, type, help, label values, bucket bounds) and shared by all
snapshots, so that an encoder may keep what it derives from it in `Shape.memo`; a snapshot adds the actor names and
one array of numbers:

    values[(actor * len(shape.combos) + combo) * shape.width + k]

`width` is 1 for counters and gauges. A histogram of n bounds has n + 1 bucket counts that are *not* cumulative (the
last is +Inf), then the sum; with native buckets (`shape.native`) follow the zero bucket and NATIVE_BUCKETS
exponential ones. A series whose first number is UNSET does not exist (a gauge never set, a series not started) and is
not exposed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = [
    "NATIVE_BUCKETS",
    "NATIVE_MAX_INDEX",
    "NATIVE_MIN_INDEX",
    "NATIVE_SCHEMA",
    "NATIVE_ZERO_THRESHOLD",
    "UNSET",
    "UNSET_BYTES",
    "Exemplar",
    "Family",
    "ForeignFamily",
    "HistogramValue",
    "MetricFamily",
    "MetricType",
    "NativeHistogram",
    "Sample",
    "Series",
    "Shape",
    "is_unset",
]

# A quiet NaN with a payload of ours ("RKM1"): cells canonicalise a NaN that a user sets, so no user value has these
# bits.
UNSET_BYTES = struct.pack("=Q", 0x7FF8_0000_524B_4D31)
UNSET: float = struct.unpack("=d", UNSET_BYTES)[0]

# Native histograms have one schema, so that any two merge by addition (Prometheus "Native Histograms", section
# "Schema"): schema 3 is eight buckets to a power of two, at most 9 % wide. Bucket i covers (2**((i-1)/8), 2**(i/8)];
# indexes run from 2**-20 (about a microsecond) to 2**20; smaller values count in the zero bucket, larger ones in the
# last.
NATIVE_SCHEMA = 3
NATIVE_MIN_INDEX = -159
NATIVE_MAX_INDEX = 160
NATIVE_BUCKETS = NATIVE_MAX_INDEX - NATIVE_MIN_INDEX + 1
NATIVE_ZERO_THRESHOLD = 2.0**-20


def is_unset(value: float) -> bool:
    """Whether value is the mark of a series that does not exist (any other NaN is a value)."""
    return value != value and struct.pack("=d", value) == UNSET_BYTES


class MetricType(StrEnum):
    """Prometheus metric types; a registry's own families are counters, gauges and histograms."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"
    INFO = "info"
    STATESET = "stateset"
    GAUGEHISTOGRAM = "gaugehistogram"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One observation that stands for others (OpenMetrics 1.0, "Exemplars").

    labels: at most 128 characters of names and values together. timestamp: Unix seconds.
    """

    labels: tuple[tuple[str, str], ...]
    value: float
    timestamp: float


@dataclass(frozen=True, slots=True)
class NativeHistogram:
    """Sparse exponential buckets: `buckets` maps Prometheus' bucket index to its (absolute) count."""

    zero_count: int
    buckets: Mapping[int, int]
    schema: int = NATIVE_SCHEMA
    zero_threshold: float = NATIVE_ZERO_THRESHOLD


@dataclass(frozen=True, slots=True)
class HistogramValue:
    """One histogram series. counts: len(bounds) + 1, not cumulative, the last is +Inf; their sum is the count."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float
    native: NativeHistogram | None = None

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Series:
    """One series: all its labels, actor_name first, and its number (or histogram).

    exemplars: bucket index (0 for a counter) to exemplar. start_time: Unix seconds at which counting began.
    """

    labels: tuple[tuple[str, str], ...]
    value: float | HistogramValue
    exemplars: Mapping[int, Exemplar]
    start_time: float


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """What is constant about a family. Two snapshots of one family share the very same Shape.

    name: as in text 0.0.4 (counters end in _total). label_names: without actor_name. combos: the label values of each
    series of one actor name. bounds: upper bounds of classic buckets without +Inf. across: how worker processes
    combine.
    memo: for encoders, keyed by themselves; holds derived constants, never numbers.
    """

    name: str
    type: MetricType
    help: str
    unit: str = ""
    label_names: tuple[str, ...] = ()
    combos: tuple[tuple[str, ...], ...] = ((),)
    bounds: tuple[float, ...] = ()
    per_actor: bool = True
    native: bool = False
    across: str = "sum"
    memo: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False)

    @property
    def width(self) -> int:
        """Numbers per series."""
        if self.type is not MetricType.HISTOGRAM:
            return 1
        return len(self.bounds) + 2 + (1 + NATIVE_BUCKETS if self.native else 0)


@dataclass(frozen=True, slots=True, eq=False)
class MetricFamily:
    """A snapshot of one family; immutable, safe to hand to any thread.

    actor_names: one entry, "", when the shape is not per actor. values: float64, laid out as the module's head says.
    exemplars: position in values to exemplar (for a histogram: of its bucket). start_times: one for each actor name.
    """

    shape: Shape
    actor_names: tuple[str, ...]
    values: Sequence[float]
    start_times: tuple[float, ...]
    exemplars: Mapping[int, Exemplar] = field(default_factory=dict[int, Exemplar])

    @property
    def name(self) -> str:
        return self.shape.name

    def series(self) -> Iterator[Series]:
        """Yield the series that exist; readable and general, where columns are not needed."""
        shape, width = self.shape, self.shape.width
        position = 0
        for actor_name, start_time in zip(self.actor_names, self.start_times, strict=True):
            head = (("actor_name", actor_name),) if shape.per_actor else ()
            for combo in shape.combos:
                if not is_unset(self.values[position]):
                    labels = head + tuple(zip(shape.label_names, combo, strict=True))
                    yield Series(labels, self._value(position), self._exemplars(position, width), start_time)
                position += width

    def _value(self, position: int) -> float | HistogramValue:
        shape = self.shape
        if shape.type is not MetricType.HISTOGRAM:
            return self.values[position]
        end = position + len(shape.bounds) + 1
        counts = tuple(int(count) for count in self.values[position:end])
        native = None
        if shape.native:
            buckets = self.values[end + 2 : end + 2 + NATIVE_BUCKETS]
            native = NativeHistogram(
                zero_count=int(self.values[end + 1]),
                buckets={NATIVE_MIN_INDEX + k: int(count) for k, count in enumerate(buckets) if count},
            )
        return HistogramValue(shape.bounds, counts, self.values[end], native)

    def _exemplars(self, position: int, width: int) -> Mapping[int, Exemplar]:
        if not self.exemplars:
            return {}
        return {k: found for k in range(width) if (found := self.exemplars.get(position + k)) is not None}


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a foreign family, as its owner names it (with _bucket, _sum, _total and so on)."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float
    exemplar: Exemplar | None = None
    timestamp: float | None = None


@dataclass(frozen=True, slots=True)
class ForeignFamily:
    """A family of another registry (a bridge's or a user's collector's), exposed as it is.

    name: the OpenMetrics family name (a counter's without _total), as prometheus_client's Metric has it.
    """

    name: str
    type: MetricType
    help: str
    unit: str
    samples: tuple[Sample, ...]


Family = MetricFamily | ForeignFamily
