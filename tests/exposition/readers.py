"""Readers that share no code with the encoders: prometheus_client's parsers, google.protobuf with Prometheus' schema.

All of them answer a `Page`: what a Prometheus would store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from typing import Any

import pytest

pytest.importorskip("google.protobuf", reason="the independent reader of protobuf needs the package protobuf")

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from prometheus_client import parser as text_parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from rkmetrics.model import Exemplar, Family, HistogramValue, MetricFamily, NativeHistogram

__all__ = ["Key", "Page", "expected", "messages", "read_openmetrics", "read_protobuf", "read_text"]

# A series: the name of its samples and its labels, sorted.
Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class Page:
    """types and helps are by family name as the format has it."""

    samples: dict[Key, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    helps: dict[str, str] = field(default_factory=dict)
    exemplars: dict[Key, tuple[tuple[tuple[str, str], ...], float, float]] = field(default_factory=dict)
    natives: dict[Key, NativeHistogram] = field(default_factory=dict)
    created: dict[Key, float] = field(default_factory=dict)

    def add(self, name: str, labels: Mapping[str, str], value: float) -> Key:
        key = (name, tuple(sorted(labels.items())))
        assert key not in self.samples, f"{key} is on the page twice"
        self.samples[key] = "nan" if math.isnan(value) else repr(value + 0.0)  # one reader takes "-0" for the integer 0
        return key


def _le(value: float) -> str:
    """As Prometheus spells bounds that it reads from protobuf (formatOpenMetricsFloat): %g, or ".0" added."""
    if math.isinf(value):
        return "+Inf"
    _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    point = len(digits) + exponent  # the number is 0.digits * 10**point
    shown = "".join(map(str, digits))
    if -4 < point <= 6:
        whole, fraction = shown[: max(point, 0)].ljust(point, "0"), "0" * -point + shown[max(point, 0) :]
        return f"{whole or 0}.{fraction or 0}"
    return f"{shown[0]}{'.' if len(shown) > 1 else ''}{shown[1:]}e{point - 1:+03d}"


# ---- what a page should hold


def expected(families: Iterable[Family]) -> Page:
    """The page of families that keep their types' rules; types and helps are left to the golden files."""
    page = Page()
    for family in families:
        if isinstance(family, MetricFamily):
            for series in family.series():
                _expect(page, family.name, dict(series.labels), series.value, series.exemplars, series.start_time)
        else:
            for one in family.samples:
                key = page.add(one.name, dict(one.labels), one.value)
                _expect_exemplar(page, key, one.exemplar)
    return page


def _expect(
    page: Page, name: str, labels: dict[str, str], value: Any, exemplars: Mapping[int, Exemplar], start: float
) -> None:
    if not isinstance(value, HistogramValue):
        key = page.add(name, labels, value)
        page.created[key] = start
        _expect_exemplar(page, key, exemplars.get(0))
        return
    cumulative = 0
    for k, (upper, count) in enumerate(zip((*value.bounds, math.inf), value.counts, strict=True)):
        cumulative += count
        key = page.add(f"{name}_bucket", {**labels, "le": _le(upper)}, cumulative)
        _expect_exemplar(page, key, exemplars.get(k))
    page.add(f"{name}_sum", labels, value.sum)
    key = page.add(f"{name}_count", labels, cumulative)
    page.created[key] = start
    if value.native is not None:
        page.natives[key] = value.native


def _expect_exemplar(page: Page, key: Key, exemplar: Exemplar | None) -> None:
    if exemplar is not None and sum(len(name) + len(value) for name, value in exemplar.labels) <= 128:
        page.exemplars[key] = (tuple(sorted(exemplar.labels)), exemplar.value, exemplar.timestamp)


# ---- text


def read_text(page: bytes) -> Page:
    parse: Any = text_parser.text_string_to_metric_families
    return _of_parsed(parse(page.decode()))


def read_openmetrics(page: bytes) -> Page:
    parse: Any = openmetrics_parser.text_string_to_metric_families
    return _of_parsed(parse(page.decode()))


def _of_parsed(families: Iterable[Any]) -> Page:
    page = Page()
    for family in families:
        page.types[family.name], page.helps[family.name] = family.type, family.documentation
        for one in family.samples:
            key = page.add(one.name, one.labels, one.value)
            if one.exemplar:
                shown = tuple(sorted(one.exemplar.labels.items()))
                at = math.nan if one.exemplar.timestamp is None else float(one.exemplar.timestamp)
                page.exemplars[key] = (shown, one.exemplar.value, at)
    return page


# ---- protobuf

_SCALARS = {
    "string": Field.TYPE_STRING,
    "double": Field.TYPE_DOUBLE,
    "uint64": Field.TYPE_UINT64,
    "uint32": Field.TYPE_UINT32,
    "int64": Field.TYPE_INT64,
    "sint64": Field.TYPE_SINT64,
    "sint32": Field.TYPE_SINT32,
}

# client_model's io/prometheus/client/metrics.proto: message, then name, number, type; * is repeated.
_SCHEMA: Mapping[str, str] = {
    "LabelPair": "name 1 string, value 2 string",
    "Gauge": "value 1 double",
    "Counter": "value 1 double, exemplar 2 Exemplar, created_timestamp 3 Timestamp",
    "Quantile": "quantile 1 double, value 2 double",
    "Summary": "sample_count 1 uint64, sample_sum 2 double, quantile 3 *Quantile, created_timestamp 4 Timestamp",
    "Untyped": "value 1 double",
    "Histogram": "sample_count 1 uint64, sample_count_float 4 double, sample_sum 2 double, bucket 3 *Bucket,"
    "created_timestamp 15 Timestamp, schema 5 sint32, zero_threshold 6 double, zero_count 7 uint64,"
    "zero_count_float 8 double, negative_span 9 *BucketSpan, negative_delta 10 *sint64, negative_count 11 *double,"
    "positive_span 12 *BucketSpan, positive_delta 13 *sint64, positive_count 14 *double, exemplars 16 *Exemplar",
    "Bucket": "cumulative_count 1 uint64, cumulative_count_float 4 double, upper_bound 2 double, exemplar 3 Exemplar",
    "BucketSpan": "offset 1 sint32, length 2 uint32",
    "Exemplar": "label 1 *LabelPair, value 2 double, timestamp 3 Timestamp",
    "Metric": "label 1 *LabelPair, gauge 2 Gauge, counter 3 Counter, summary 4 Summary, untyped 5 Untyped,"
    "histogram 7 Histogram, timestamp_ms 6 int64",
    "MetricFamily": "name 1 string, help 2 string, type 3 int64, metric 4 *Metric, unit 5 string",
}
_TYPES = ("counter", "gauge", "summary", "unknown", "histogram", "gaugehistogram")


@cache
def _message_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="metrics.proto", package="io.prometheus.client", syntax="proto2")
    file.dependency.append("google/protobuf/timestamp.proto")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for declared in fields.split(","):
            field_name, number, kind = declared.split()
            plain = kind.lstrip("*")
            added = message.field.add(name=field_name, number=int(number))
            added.label = Field.LABEL_REPEATED if kind != plain else Field.LABEL_OPTIONAL
            if plain in _SCALARS:
                added.type = _SCALARS[plain]
            else:
                added.type = Field.TYPE_MESSAGE
                added.type_name = (
                    ".google.protobuf.Timestamp" if plain == "Timestamp" else f".io.prometheus.client.{plain}"
                )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("io.prometheus.client.MetricFamily"))


def messages(page: bytes) -> list[Any]:
    """The MetricFamily messages of a delimited stream; each must be known in full and exactly as long as it says."""
    found, position = [], 0
    while position < len(page):
        size = shift = 0
        while True:
            byte = page[position]
            position += 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        message = _message_class().FromString(page[position : position + size])
        assert message.ByteSize() == size, "there are fields that the schema does not know"
        assert len(page) >= position + size
        position += size
        found.append(message)
    return found


def read_protobuf(data: bytes) -> Page:
    page = Page()
    for family in messages(data):
        page.types[family.name], page.helps[family.name] = _TYPES[family.type], family.help
        for metric in family.metric:
            _read_metric(page, family.name, metric)
    return page


def _read_metric(page: Page, name: str, metric: Any) -> None:
    labels = {pair.name: pair.value for pair in metric.label}
    assert len(labels) == len(metric.label)
    (kind,) = [each for each in ("gauge", "counter", "summary", "untyped", "histogram") if metric.HasField(each)]
    value = getattr(metric, kind)
    if kind == "histogram":
        _read_histogram(page, name, labels, value)
    elif kind == "summary":
        for quantile in value.quantile:
            page.add(name, {**labels, "quantile": _le(quantile.quantile)}, quantile.value)
        page.add(f"{name}_sum", labels, value.sample_sum)
        page.add(f"{name}_count", labels, value.sample_count)
    else:
        key = page.add(name, labels, value.value)
        if kind == "counter":
            _read_exemplar(page, key, value)
            _read_created(page, key, value)


def _read_histogram(page: Page, name: str, labels: dict[str, str], value: Any) -> None:
    for bucket in value.bucket:
        count = bucket.cumulative_count_float if bucket.HasField("cumulative_count_float") else bucket.cumulative_count
        key = page.add(f"{name}_bucket", {**labels, "le": _le(bucket.upper_bound)}, count)
        _read_exemplar(page, key, bucket)
    page.add(f"{name}_sum", labels, value.sample_sum)
    count = value.sample_count_float if value.HasField("sample_count_float") else value.sample_count
    key = page.add(f"{name}_count", labels, count)
    _read_created(page, key, value)
    if value.HasField("schema"):
        page.natives[key] = _read_native(value)


def _read_native(value: Any) -> NativeHistogram:
    buckets: dict[int, int] = {}
    deltas = iter(value.positive_delta)
    index = count = 0
    for span in value.positive_span:
        index += span.offset
        for _ in range(span.length):
            count += next(deltas)
            buckets[index] = count
            index += 1
    assert next(deltas, None) is None, "there are more deltas than the spans are long"
    filled = {index: count for index, count in buckets.items() if count}
    return NativeHistogram(value.zero_count, filled, value.schema, value.zero_threshold)


def _read_exemplar(page: Page, key: Key, holder: Any) -> None:
    if holder.HasField("exemplar"):
        exemplar = holder.exemplar
        shown = tuple(sorted((pair.name, pair.value) for pair in exemplar.label))
        page.exemplars[key] = (shown, exemplar.value, _seconds(exemplar.timestamp))


def _read_created(page: Page, key: Key, value: Any) -> None:
    if value.HasField("created_timestamp"):
        page.created[key] = _seconds(value.created_timestamp)


def _seconds(timestamp: Any) -> float:
    return float(round(timestamp.seconds + timestamp.nanos / 1e9, 3))
