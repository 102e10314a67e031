"""Families as OpenTelemetry SDK data. Values in, values out: no clock, no socket, no environment.

    Prometheus, as in model.py           OpenTelemetry
    family: name, help, unit             Metric: name as it is, description, unit in UCUM
    counter                              Sum, monotonic
    gauge, unknown                       Gauge
    histogram                            Histogram; ExponentialHistogram when it has native buckets
    info, stateset                       Sum, not monotonic
    summary                              Gauge by quantile, and Sums name_count and name_sum (the SDK has no Summary)
    gaugehistogram                       nothing: the specification has it dropped
    labels                               attributes
    _created, start time                 start_time_unix_nano
    exemplar                             exemplar; labels trace_id and span_id its ids, others filtered attributes

The rules are those of the OpenTelemetry specification, "Prometheus and OpenMetrics Compatibility", section "Prometheus
Metric points to OTLP". A counter keeps its `_total` and every name its unit: the section says that a name SHOULD NOT be
altered, and receivers that write Prometheus names add a suffix only where it is lacking. So one query finds a series
whichever way it came.

Two things have no place in the SDK's types: the width of an exponential histogram's zero bucket (receivers take it as
0), and the metadata key `prometheus.type`. Minimum and maximum stay unset: cells do not keep them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from opentelemetry.sdk.metrics import Exemplar as OtelExemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Buckets,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from rkmetrics.model import (
    NATIVE_SCHEMA,
    Exemplar,
    Family,
    ForeignFamily,
    HistogramValue,
    MetricFamily,
    MetricType,
    Sample,
    Series,
)

__all__ = ["UNITS", "Point", "envelope", "metrics_of", "nanoseconds", "ucum"]

Point = NumberDataPoint | HistogramDataPoint | ExponentialHistogramDataPoint
Labels = tuple[tuple[str, str], ...]

CUMULATIVE: Final = AggregationTemporality.CUMULATIVE

# Prometheus' words for units and UCUM's codes, as the specification's "Metric Metadata" asks.
UNITS: Final[Mapping[str, str]] = {
    "days": "d",
    "hours": "h",
    "minutes": "min",
    "seconds": "s",
    "milliseconds": "ms",
    "microseconds": "us",
    "nanoseconds": "ns",
    "bytes": "By",
    "kibibytes": "KiBy",
    "mebibytes": "MiBy",
    "gibibytes": "GiBy",
    "tebibytes": "TiBy",
    "kilobytes": "KBy",
    "megabytes": "MBy",
    "gigabytes": "GBy",
    "terabytes": "TBy",
    "meters": "m",
    "volts": "V",
    "amperes": "A",
    "joules": "J",
    "watts": "W",
    "grams": "g",
    "celsius": "Cel",
    "hertz": "Hz",
    "percent": "%",
    "ratio": "1",
}
_PER: Final[Mapping[str, str]] = {
    "second": "s",
    "minute": "m",
    "hour": "h",
    "day": "d",
    "week": "w",
    "month": "mo",
    "year": "y",
}


def ucum(unit: str) -> str:
    """The UCUM code of a Prometheus unit ("seconds", "meters_per_second"); an unknown word stays as it is."""
    over, per, under = unit.partition("_per_")
    code = UNITS.get(over, over)
    return f"{code}/{_PER.get(under, UNITS.get(under, under))}" if per else code


def nanoseconds(seconds: float) -> int:
    """Unix seconds as OTLP's unsigned nanoseconds; 0, which OTLP reads as unknown, for what is no such time."""
    return max(round(seconds * 1e9), 0) if math.isfinite(seconds) else 0


def envelope(metrics: Sequence[Metric], resource: Resource, scope: InstrumentationScope) -> MetricsData:
    """Metrics of one process, as an exporter takes them."""
    inner = ScopeMetrics(scope=scope, metrics=metrics, schema_url="")
    return MetricsData([ResourceMetrics(resource=resource, scope_metrics=[inner], schema_url=resource.schema_url)])


def metrics_of(family: Family, now: int, start: int) -> Iterator[Metric]:
    """Yield the metrics of one family, cumulative; none when it has no series.

    now: when the family was collected. start: since when a foreign family without _created counts. Both in nanoseconds.
    """
    if isinstance(family, MetricFamily):
        yield from _own(family, now)
    elif family.type in _FOREIGN:
        for metric in _FOREIGN[family.type](family, now, start):
            if metric.data.data_points:
                yield metric


# --- the registry's own families --------------------------------------------------------------------------------------


def _own(family: MetricFamily, now: int) -> Iterator[Metric]:
    shape = family.shape
    series = list(family.series())
    if not series:
        return
    data = _OWN[shape.type, shape.native]([_own_point(one, now) for one in series])
    yield Metric(name=shape.name, description=shape.help, unit=ucum(shape.unit), data=data)


def _own_point(series: Series, now: int) -> Any:
    start = nanoseconds(series.start_time)
    attributes = dict(series.labels)
    exemplars = [_exemplar(found, now) for _, found in sorted(series.exemplars.items())]
    value = series.value
    if not isinstance(value, HistogramValue):
        return NumberDataPoint(attributes, start, now, value, exemplars)
    if value.native is not None:
        return _exponential_point(value, attributes, start, now, exemplars)
    return _histogram_point(value.bounds, value.counts, value.sum, attributes, start, now, exemplars)


def _histogram_point(
    bounds: Sequence[float],
    counts: Sequence[int],
    total: float | None,
    attributes: dict[str, str],
    start: int,
    now: int,
    exemplars: list[OtelExemplar],
) -> HistogramDataPoint:
    unset: Any = None  # the protobuf fields are optional; the SDK's types do not say so
    return HistogramDataPoint(
        attributes=attributes,
        start_time_unix_nano=start,
        time_unix_nano=now,
        count=sum(counts),
        sum=unset if total is None else total,
        bucket_counts=tuple(counts),
        explicit_bounds=tuple(bounds),
        min=unset,
        max=unset,
        exemplars=exemplars,
    )


def _exponential_point(
    value: HistogramValue, attributes: dict[str, str], start: int, now: int, exemplars: list[OtelExemplar]
) -> ExponentialHistogramDataPoint:
    assert value.native is not None
    unset: Any = None
    return ExponentialHistogramDataPoint(
        attributes=attributes,
        start_time_unix_nano=start,
        time_unix_nano=now,
        count=value.native.zero_count + sum(value.native.buckets.values()),
        sum=value.sum,
        scale=NATIVE_SCHEMA,
        zero_count=value.native.zero_count,
        positive=_buckets(value.native.buckets),
        negative=Buckets(0, ()),
        flags=0,
        min=unset,
        max=unset,
        exemplars=exemplars,
    )


def _buckets(counts: Mapping[int, int]) -> Buckets:
    """Dense buckets. Prometheus' index names a bucket's upper bound, OTLP's its lower one: they differ by one."""
    if not counts:
        return Buckets(0, ())
    low, high = min(counts), max(counts)
    return Buckets(low - 1, tuple(counts.get(index, 0) for index in range(low, high + 1)))


# By type, and whether there are native buckets.
_OWN: Mapping[tuple[MetricType, bool], Callable[[list[Any]], Any]] = {
    (MetricType.COUNTER, False): lambda points: Sum(points, CUMULATIVE, is_monotonic=True),
    (MetricType.GAUGE, False): Gauge,
    (MetricType.HISTOGRAM, False): lambda points: Histogram(points, CUMULATIVE),
    (MetricType.HISTOGRAM, True): lambda points: ExponentialHistogram(points, CUMULATIVE),
}


# --- exemplars --------------------------------------------------------------------------------------------------------

_IDS: Final = {"trace_id": 32, "span_id": 16}  # hexadecimal digits (W3C Trace Context, "trace-id" and "parent-id")


def _exemplar(exemplar: Exemplar, now: int) -> OtelExemplar:
    labels = {_utf8(name): _utf8(value) for name, value in exemplar.labels}
    ids = {name: found for name in _IDS if (found := _identifier(name, labels.get(name, "")))}
    if len(ids) == len(_IDS):  # the exporters' encoder drops either without the other
        labels = {name: value for name, value in labels.items() if name not in ids}
    else:
        ids = {}
    return OtelExemplar(
        filtered_attributes=labels,
        value=float(exemplar.value),
        time_unix_nano=nanoseconds(exemplar.timestamp) or now,
        span_id=ids.get("span_id"),
        trace_id=ids.get("trace_id"),
    )


def _identifier(name: str, text: str) -> int:
    """The id as a number; 0, which is no valid id, when text is not one."""
    if len(text) != _IDS[name]:
        return 0
    try:
        return int.from_bytes(bytes.fromhex(text), "big")
    except ValueError:
        return 0


def _utf8(text: str) -> str:
    """Text that protobuf can carry: foreign text and exemplars may hold lone surrogates, and one spoils a request."""
    return text.encode("utf-8", "replace").decode()


# --- foreign families -------------------------------------------------------------------------------------------------


def _metric(family: ForeignFamily, name: str, data: Any, *, unit: bool = True) -> Metric:
    return Metric(
        name=_utf8(name), description=_utf8(family.help), unit=ucum(_utf8(family.unit)) if unit else "", data=data
    )


def _number(sample: Sample, labels: Labels, start: int, now: int) -> NumberDataPoint:
    time = nanoseconds(sample.timestamp) or now if sample.timestamp is not None else now
    exemplars = [] if sample.exemplar is None else [_exemplar(sample.exemplar, now)]
    return NumberDataPoint(_attributes(labels), start, time, float(sample.value), exemplars)


def _attributes(labels: Labels) -> dict[str, str]:
    return {_utf8(name): _utf8(value) for name, value in labels}


def _created(family: ForeignFamily) -> Mapping[Labels, int]:
    """When each series began, by its labels in order of name."""
    return {
        tuple(sorted(sample.labels)): nanoseconds(sample.value)
        for sample in family.samples
        if sample.name == family.name + "_created"
    }


def _by_name(family: ForeignFamily, *skip: str) -> Iterator[tuple[str, list[Sample]]]:
    """The samples of each sample name, but for those that end in one of skip."""
    groups: dict[str, list[Sample]] = {}
    for sample in family.samples:
        if not sample.name.endswith(skip):
            groups.setdefault(sample.name, []).append(sample)
    yield from groups.items()


def _counters(family: ForeignFamily, now: int, start: int) -> Iterator[Metric]:
    created = _created(family)
    for name, samples in _by_name(family, "_created"):
        points = [
            _number(sample, sample.labels, created.get(tuple(sorted(sample.labels)), start), now) for sample in samples
        ]
        yield _metric(family, name, Sum(points, CUMULATIVE, is_monotonic=True))


def _gauges(family: ForeignFamily, now: int, start: int) -> Iterator[Metric]:
    for name, samples in _by_name(family):
        yield _metric(family, name, Gauge([_number(sample, sample.labels, start, now) for sample in samples]))


def _states(family: ForeignFamily, now: int, start: int) -> Iterator[Metric]:
    for name, samples in _by_name(family):
        points = [_number(sample, sample.labels, start, now) for sample in samples]
        yield _metric(family, name, Sum(points, CUMULATIVE, is_monotonic=False))


def _summaries(family: ForeignFamily, now: int, start: int) -> Iterator[Metric]:
    created = _created(family)
    for name, samples in _by_name(family, "_created"):
        starts = [created.get(tuple(sorted(sample.labels)), start) for sample in samples]
        points = [_number(sample, sample.labels, since, now) for sample, since in zip(samples, starts, strict=True)]
        counts = name != family.name
        data = Sum(points, CUMULATIVE, is_monotonic=True) if counts else Gauge(points)
        yield _metric(family, name, data, unit=not name.endswith("_count"))


def _histograms(family: ForeignFamily, now: int, start: int) -> Iterator[Metric]:
    created = _created(family)
    buckets: dict[Labels, list[tuple[float, Sample]]] = {}
    sums: dict[Labels, float] = {}
    for sample in family.samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels if name != "le"))
        if sample.name == family.name + "_bucket":
            buckets.setdefault(labels, []).append((_bound(sample), sample))
        elif sample.name == family.name + "_sum":
            sums[labels] = sample.value
    points = [
        point
        for labels, found in buckets.items()
        if (point := _foreign_histogram(labels, found, sums.get(labels), created.get(labels, start), now)) is not None
    ]
    yield _metric(family, family.name, Histogram(points, CUMULATIVE))


def _bound(sample: Sample) -> float:
    try:
        return float(dict(sample.labels)["le"])
    except (KeyError, ValueError):
        return math.nan


def _foreign_histogram(
    labels: Labels, found: Iterable[tuple[float, Sample]], total: float | None, start: int, now: int
) -> HistogramDataPoint | None:
    """One series; None when its buckets are no histogram (a foreign collector may yield anything)."""
    rows = sorted(found, key=lambda row: row[0])
    bounds = [bound for bound, _ in rows]
    running = [sample.value for _, sample in rows]
    sound = all(map(math.isfinite, (*bounds[:-1], *running))) and bounds[-1] == math.inf
    if not sound or any(a > b for a, b in zip([0.0, *running], running, strict=False)):
        return None
    counts = [int(b) - int(a) for a, b in zip([0.0, *running], running, strict=False)]
    exemplars = [_exemplar(sample.exemplar, now) for _, sample in rows if sample.exemplar is not None]
    return _histogram_point(bounds[:-1], counts, total, _attributes(labels), start, now, exemplars)


_FOREIGN: Mapping[MetricType, Callable[[ForeignFamily, int, int], Iterator[Metric]]] = {
    MetricType.COUNTER: _counters,
    MetricType.GAUGE: _gauges,
    MetricType.UNKNOWN: _gauges,
    MetricType.INFO: _states,
    MetricType.STATESET: _states,
    MetricType.SUMMARY: _summaries,
    MetricType.HISTOGRAM: _histograms,
}
