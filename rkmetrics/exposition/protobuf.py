"""Prometheus' protobuf format: io.prometheus.client.MetricFamily messages, each behind its length (client_model,
metrics.proto).

The only form in which a Prometheus that is released takes native histograms. Written by hand: the messages are few,
what is constant in them is kept encoded, and no protobuf runtime is needed. Field numbers are in the constants'
comments; a field's first byte is its number * 8 plus its wire type (Protocol Buffers "Encoding": 0 varint, 1 eight
bytes, 2 length and bytes).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

from rkmetrics.exposition.base import Format, exemplar_labels, is_time, pieces
from rkmetrics.exposition.foreign import parts
from rkmetrics.exposition.page import together
from rkmetrics.model import (
    NATIVE_BUCKETS,
    NATIVE_MIN_INDEX,
    NATIVE_SCHEMA,
    NATIVE_ZERO_THRESHOLD,
    Exemplar,
    Family,
    ForeignFamily,
    MetricFamily,
    MetricType,
    Sample,
    Shape,
    is_unset,
)

__all__ = ["PROTOBUF", "encode"]

# enum MetricType. Gauge histograms have a number (5), but Prometheus renames their samples; they go as gauges, like in
# text.
_COUNTER, _GAUGE, _SUMMARY, _UNTYPED, _HISTOGRAM = range(5)

_NUMBER_OF = {
    MetricType.COUNTER: _COUNTER,
    MetricType.GAUGE: _GAUGE,
    MetricType.HISTOGRAM: _HISTOGRAM,
    MetricType.SUMMARY: _SUMMARY,
    MetricType.INFO: _GAUGE,
    MetricType.STATESET: _GAUGE,
    MetricType.UNKNOWN: _UNTYPED,
}

# In Metric: gauge = 2, counter = 3, untyped = 5; each holds its number in value = 1.
_SIMPLE_FIELD = {_COUNTER: b"\x1a", _GAUGE: b"\x12", _UNTYPED: b"\x2a"}

# client_golang joins spans over one or two empty buckets: two zero deltas are shorter than one more span.
_LARGEST_GAP = 2

_ONE_BYTE = tuple(bytes([n]) for n in range(128))


def encode(families: Iterable[Family]) -> bytes:
    """A page of families."""
    return together(families, _encode_one)


# ---- wire types


def _varint(n: int) -> bytes:
    if n < 128:
        return _ONE_BYTE[n]
    if n < 16384:  # two bytes: nearly all lengths, and most counts
        return bytes((n & 127 | 128, n >> 7))
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def _zigzag(n: int) -> bytes:
    """A signed number: sint32 and sint64."""
    return _varint(n << 1 if n >= 0 else (-n << 1) - 1)


def _message(tag: bytes, payload: bytes) -> bytes:
    return tag + _varint(len(payload)) + payload


_double = struct.Struct("<d").pack


# ---- small messages


def _pair(name: str, value: str) -> bytes:
    """Metric.label = 1 (and Exemplar.label = 1): LabelPair name = 1, value = 2."""
    return _message(b"\x0a", _message(b"\x0a", name.encode()) + _message(b"\x12", value.encode("utf-8", "replace")))


@lru_cache(maxsize=1024)
def _actor(actor_name: str) -> bytes:
    return _pair("actor_name", actor_name)


@lru_cache(maxsize=1024)
def _timestamp(tag: bytes, seconds: float) -> bytes:
    """google.protobuf.Timestamp: seconds = 1, nanos = 2; nothing for a time that is not known."""
    if not (is_time(seconds) and seconds > 0):
        return b""
    whole, nanos = divmod(round(seconds * 1000) * 1_000_000, 1_000_000_000)
    return _message(tag, (b"\x08" + _varint(whole) if whole else b"") + (b"\x10" + _varint(nanos) if nanos else b""))


def _exemplar(tag: bytes, exemplar: Exemplar | None) -> bytes:
    """Exemplar: label = 1, value = 2, timestamp = 3."""
    pairs = None if exemplar is None else exemplar_labels(exemplar)
    if exemplar is None or pairs is None:
        return b""
    named = b"".join([_pair(name, value) for name, value in pairs])
    return _message(tag, named + b"\x11" + _double(exemplar.value) + _timestamp(b"\x1a", exemplar.timestamp))


def _bucket(cumulative: float, upper: bytes, exemplar: Exemplar | None) -> bytes:
    """Histogram.bucket = 3: cumulative_count = 1 (cumulative_count_float = 4), upper_bound = 2, exemplar = 3."""
    return _message(b"\x1a", _count(b"\x08", b"\x21", cumulative) + upper + _exemplar(b"\x1a", exemplar))


def _upper_bound(value: float) -> bytes:
    return b"\x11" + _double(value)


def _count(whole_tag: bytes, float_tag: bytes, count: float) -> bytes:
    """A count is an integer, but other registries may have fractions, and then a field of its own."""
    if count >= 0 and count == count // 1 and count < 2**63:
        return whole_tag + _varint(int(count))
    return float_tag + _double(count)


# ---- families of our own

# MetricFamily.metric = 4, and the length of what follows, as far as it is mostly small.
_METRIC = tuple([b"\x22" + _varint(size) for size in range(512)])


class _Constants:
    """What is constant in a family's messages."""

    __slots__ = ("combos", "head", "uppers")

    def __init__(self, shape: Shape) -> None:
        pieces(shape)  # raises if a name is bad
        named = (zip(shape.label_names, combo, strict=True) for combo in shape.combos)
        self.combos = [b"".join([_pair(name, value) for name, value in pairs]) for pairs in named]
        self.head = _family_head(shape.name, shape.help, _NUMBER_OF[shape.type], shape.unit)
        self.uppers = [_upper_bound(upper) for upper in (*shape.bounds, math.inf)]


def _family_head(name: str, help_: str, kind: int, unit: str) -> bytes:
    """MetricFamily: name = 1, help = 2, type = 3, unit = 5."""
    head = _message(b"\x0a", name.encode()) + (_message(b"\x12", help_.encode()) if help_ else b"")
    return head + b"\x18" + _varint(kind) + (_message(b"\x2a", unit.encode()) if unit else b"")


def _family(head: bytes, metrics: Iterable[bytes]) -> bytes:
    """A family behind its length; metrics are MetricFamily.metric = 4. Nothing without them."""
    body = b"".join(metrics)
    return _varint(len(head) + len(body)) + head + body if body else b""


def _encode_one(family: Family) -> bytes:
    if isinstance(family, MetricFamily):
        return _family(_constants(family.shape).head, _own(family))
    return b"".join(_foreign(family))


def _constants(shape: Shape) -> _Constants:
    found = shape.memo.get(_Constants)
    if found is None:
        found = shape.memo[_Constants] = _Constants(shape)
    assert isinstance(found, _Constants)
    return found


def _own(family: MetricFamily) -> Iterator[bytes]:
    shape, values, width = family.shape, family.values, family.shape.width
    constants = _constants(shape)
    expected = len(family.actor_names) * len(shape.combos) * width
    if len(values) != expected:
        raise ValueError(f"{shape.name}: {len(values)} values; expected {expected}")
    position = 0
    for actor_name, start_time in zip(family.actor_names, family.start_times, strict=True):
        named = _actor(actor_name) if shape.per_actor else b""
        created = _created(shape.type, start_time)
        head = _simple_head(shape.type, created)
        for combo in constants.combos:
            value = values[position]
            if value == value or not is_unset(value):
                if shape.type is MetricType.HISTOGRAM:
                    number = _histogram(family, position, constants.uppers, created)
                elif position in family.exemplars:
                    number = _with_exemplar(shape.type, value, family.exemplars[position], created)
                else:
                    number = head + _double(value) + created
                size = len(named) + len(combo) + len(number)
                yield (_METRIC[size] if size < 512 else b"\x22" + _varint(size)) + named + combo + number
            position += width


def _created(kind: MetricType, start_time: float) -> bytes:
    """Counter.created_timestamp = 3, Histogram.created_timestamp = 15."""
    if kind is MetricType.GAUGE:
        return b""
    return _timestamp(b"\x7a" if kind is MetricType.HISTOGRAM else b"\x1a", start_time)


def _simple_head(kind: MetricType, created: bytes) -> bytes:
    """Metric.counter, gauge or untyped, up to the number; nothing for a histogram."""
    if kind is MetricType.HISTOGRAM:
        return b""
    return _SIMPLE_FIELD[_NUMBER_OF[kind]] + _varint(9 + len(created)) + b"\x09"


def _with_exemplar(kind: MetricType, value: float, exemplar: Exemplar, created: bytes) -> bytes:
    """Metric.counter, gauge or untyped; Counter.exemplar = 2."""
    number = b"\x09" + _double(value)
    if kind is MetricType.COUNTER:
        number += _exemplar(b"\x12", exemplar)
    return _message(_SIMPLE_FIELD[_NUMBER_OF[kind]], number + created)


@lru_cache(maxsize=4096)
def _bucket_head(cumulative: float) -> bytes:
    """A bucket without exemplar, up to its bound, which takes 9 bytes."""
    count = _count(b"\x08", b"\x21", cumulative)
    return b"\x1a" + _varint(len(count) + 9) + count


def _buckets(family: MetricFamily, position: int, uppers: Sequence[bytes], cumulative: Sequence[float]) -> bytes:
    """Histogram.bucket = 3, one after another."""
    exemplars = family.exemplars
    if not exemplars:
        return b"".join([_bucket_head(count) + upper for count, upper in zip(cumulative, uppers, strict=True)])
    rows = zip(range(position, position + len(uppers)), cumulative, uppers, strict=True)
    return b"".join([_bucket(count, upper, exemplars.get(at)) for at, count, upper in rows])


def _histogram(family: MetricFamily, position: int, uppers: Sequence[bytes], created: bytes) -> bytes:
    """Metric.histogram = 7: sample_count = 1, sample_sum = 2, bucket = 3, and the native fields."""
    shape, values = family.shape, family.values
    end = position + len(uppers)
    cumulative = tuple(accumulate(values[position:end]))
    buckets, count = _buckets(family, position, uppers, cumulative), cumulative[-1]
    native = b""
    if shape.native:
        counts = [int(each) for each in values[end + 2 : end + 2 + NATIVE_BUCKETS]]
        zeros = int(values[end + 1])
        native = _native(zeros, {NATIVE_MIN_INDEX + k: each for k, each in enumerate(counts) if each})
        # Prometheus refuses a native histogram whose count is not its buckets' sum; while others count, a snapshot may
        # be an observation apart.
        count = zeros + sum(counts)
    whole = _count(b"\x08", b"\x21", count) + b"\x11" + _double(values[end]) + buckets + native + created
    return _message(b"\x3a", whole)


def _native(zeros: int, buckets: Mapping[int, int]) -> bytes:
    """schema = 5, zero_threshold = 6, zero_count = 7, positive_span = 12, positive_delta = 13 of Histogram.

    BucketSpan: offset = 1 from the end of the span before (of the first: its index), length = 2.
    A threshold above zero tells readers that the histogram is native, also while it is empty.
    """
    spans: list[tuple[int, int]] = []
    deltas: list[int] = []
    following, last = 0, 0
    for index in sorted(buckets):
        gap = index - following
        if not spans or gap > _LARGEST_GAP:
            spans.append((gap, 1))
        else:
            for _ in range(gap):
                deltas.append(-last)
                last = 0
            spans[-1] = (spans[-1][0], spans[-1][1] + gap + 1)
        deltas.append(buckets[index] - last)
        following, last = index + 1, buckets[index]
    fixed = b"\x28" + _zigzag(NATIVE_SCHEMA) + b"\x31" + _double(NATIVE_ZERO_THRESHOLD) + b"\x38" + _varint(zeros)
    sparse = [_message(b"\x62", b"\x08" + _zigzag(offset) + b"\x10" + _varint(length)) for offset, length in spans]
    return fixed + b"".join(sparse) + b"".join([b"\x68" + _zigzag(delta) for delta in deltas])


# ---- families of others


def _foreign(family: ForeignFamily) -> Iterator[bytes]:
    if family.type in (MetricType.HISTOGRAM, MetricType.SUMMARY):
        yield _foreign_distribution(family)
        return
    if family.type is MetricType.GAUGEHISTOGRAM:
        for name in dict.fromkeys(sample.name for sample in family.samples):
            yield _foreign_simple(name, family, _GAUGE, [s for s in family.samples if s.name == name])
        return
    for suffix, samples in parts(family):
        if not suffix:
            yield _foreign_simple(samples[0].name, family, _NUMBER_OF[family.type], samples)


def _foreign_simple(name: str, family: ForeignFamily, kind: int, samples: Sequence[Sample]) -> bytes:
    starts = _starts(family)
    metrics: list[bytes] = []
    for sample in samples:
        number = b"\x09" + _double(sample.value)
        if kind == _COUNTER:
            number += _exemplar(b"\x12", sample.exemplar) + _timestamp(b"\x1a", starts.get(sample.labels, 0.0))
        metrics.append(_metric(sample.labels, _message(_SIMPLE_FIELD[kind], number), sample.timestamp))
    return _family(_family_head(name, family.help, kind, family.unit), metrics)


def _metric(labels: Iterable[tuple[str, str]], number: bytes, timestamp: float | None) -> bytes:
    """Metric: label = 1, timestamp_ms = 6 (negative ones as the 64 bits of their two's complement)."""
    named = b"".join([_pair(name, value) for name, value in labels])
    at = b"" if timestamp is None else b"\x30" + _varint(round(timestamp * 1000) & (2**64 - 1))
    return _message(b"\x22", named + number + at)


def _starts(family: ForeignFamily) -> dict[tuple[tuple[str, str], ...], float]:
    return {s.labels: s.value for s in family.samples if s.name == f"{family.name}_created"}


def _foreign_distribution(family: ForeignFamily) -> bytes:
    """Histograms and summaries: one metric for all samples whose labels, but for le or quantile, are the same."""
    apart = "le" if family.type is MetricType.HISTOGRAM else "quantile"
    grouped: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in family.samples:
        grouped.setdefault(tuple(pair for pair in sample.labels if pair[0] != apart), []).append(sample)
    write = _foreign_histogram if family.type is MetricType.HISTOGRAM else _foreign_summary
    metrics = [
        _metric(labels, write(family.name, samples), samples[0].timestamp) for labels, samples in grouped.items()
    ]
    return _family(_family_head(family.name, family.help, _NUMBER_OF[family.type], family.unit), metrics)


def _foreign_histogram(name: str, samples: Sequence[Sample]) -> bytes:
    single = {sample.name.removeprefix(name): sample.value for sample in samples}
    found = [(float(dict(s.labels)["le"]), s.value, s.exemplar) for s in samples if s.name == f"{name}_bucket"]
    buckets = sorted(found, key=lambda bucket: bucket[0])
    count = single.get("_count", buckets[-1][1] if buckets else 0.0)
    return _message(
        b"\x3a",
        _count(b"\x08", b"\x21", count)
        + (b"\x11" + _double(single["_sum"]) if "_sum" in single else b"")
        + b"".join([_bucket(value, _upper_bound(upper), exemplar) for upper, value, exemplar in buckets])
        + _timestamp(b"\x7a", single.get("_created", 0.0)),
    )


def _foreign_summary(name: str, samples: Sequence[Sample]) -> bytes:
    """Metric.summary = 4: sample_count = 1, sample_sum = 2, quantile = 3 (and value = 2), created_timestamp = 4."""
    single = {sample.name.removeprefix(name): sample.value for sample in samples}
    count = single.get("_count", 0.0)
    quantiles = [
        _message(b"\x1a", b"\x09" + _double(float(dict(s.labels)["quantile"])) + b"\x11" + _double(s.value))
        for s in samples
        if s.name == name
    ]
    return _message(
        b"\x22",
        b"\x08"
        + _varint(int(count) if 0 <= count < 2**63 else 0)
        + (b"\x11" + _double(single["_sum"]) if "_sum" in single else b"")
        + b"".join(quantiles)
        + _timestamp(b"\x22", single.get("_created", 0.0)),
    )


PROTOBUF = Format(
    name="protobuf",
    content_type="application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited",
    media_type="application/vnd.google.protobuf",
    parameters={"proto": ("io.prometheus.client.metricfamily",), "encoding": ("delimited",)},
    encode=encode,
)
