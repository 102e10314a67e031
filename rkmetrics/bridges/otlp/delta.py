"""Differences between cumulative points, and what of them a receiver has acknowledged. Values only.

A delta point covers the time since the snapshot that was last acknowledged for its series. What a failed request held
is therefore in the next one by itself: nothing is kept for it, nothing is lost, nothing is counted twice. A request
whose fate is unknown (sent, never answered) cannot be merged so, since it may have been taken. It is sent again as it
was, with the same times, by which a receiver knows it; delivery.py does that.

A series restarts when its start time changes or a number in it falls; all of it is then new. A gauge and a sum that is
not monotonic have no delta (OpenTelemetry, "Metrics Data Model", section "Temporality").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Final, cast

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Buckets,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)

from rkmetrics.bridges.otlp.translate import Point

__all__ = ["MAX_WEIGHT", "Key", "Part", "Points", "changes", "key_of", "parts", "since", "subtract"]

Key = tuple[str, tuple[tuple[str, str], ...]]
Points = dict[Key, Point]

# A receiver takes 4 MiB in one gRPC message unless told otherwise. A number's point takes 100 to 300 bytes with its
# attributes, so requests of this many keep far below that; histograms weigh more.
MAX_WEIGHT: Final = 4000


@dataclass(slots=True)
class Part:
    """What one request carries. marks: the cumulative points that count as acknowledged once it is taken."""

    metrics: list[Metric] = field(default_factory=list[Metric])
    marks: Points = field(default_factory=dict[Key, Point])
    points: int = 0
    weight: int = 0


def key_of(metric: Metric, point: Point) -> Key:
    """What names a series: its metric and its attributes, whatever their order."""
    return metric.name, tuple(sorted((name, str(value)) for name, value in (point.attributes or {}).items()))


def subtract(new: Point, old: Point) -> Point | None:
    """new without old, keeping new's times; None when the series has restarted in between."""
    if type(new) is not type(old) or new.start_time_unix_nano != old.start_time_unix_nano:
        return None
    return _SUBTRACT[type(new)](new, old)


def _number(new: NumberDataPoint, old: NumberDataPoint) -> NumberDataPoint | None:
    return replace(new, value=new.value - old.value) if new.value >= old.value else None


def _histogram(new: HistogramDataPoint, old: HistogramDataPoint) -> HistogramDataPoint | None:
    counts = [a - b for a, b in zip_longest(new.bucket_counts, old.bucket_counts, fillvalue=0)]
    if tuple(new.explicit_bounds) != tuple(old.explicit_bounds) or min(counts, default=0) < 0:
        return None
    unset: Any = None
    total = unset if cast("object", new.sum) is None or cast("object", old.sum) is None else new.sum - old.sum
    return replace(new, bucket_counts=tuple(counts), count=sum(counts), sum=total)


def _exponential(
    new: ExponentialHistogramDataPoint, old: ExponentialHistogramDataPoint
) -> ExponentialHistogramDataPoint | None:
    positive, negative = _less(new.positive, old.positive), _less(new.negative, old.negative)
    zero = new.zero_count - old.zero_count
    if new.scale != old.scale or zero < 0 or positive is None or negative is None:
        return None
    count = zero + sum(positive.bucket_counts) + sum(negative.bucket_counts)
    return replace(new, positive=positive, negative=negative, zero_count=zero, count=count, sum=new.sum - old.sum)


def _less(new: Buckets, old: Buckets) -> Buckets | None:
    """Buckets without others of the same scale; None if one would be negative."""
    before = {old.offset + place: count for place, count in enumerate(old.bucket_counts) if count}
    left = {
        index: rest
        for place, count in enumerate(new.bucket_counts)
        if (rest := count - before.pop(index := new.offset + place, 0))
    }
    if before or min(left.values(), default=0) < 0:
        return None
    if not left:
        return Buckets(0, ())
    low, high = min(left), max(left)
    return Buckets(low, tuple(left.get(index, 0) for index in range(low, high + 1)))


_SUBTRACT: Mapping[type, Callable[[Any, Any], Point | None]] = {
    NumberDataPoint: _number,
    HistogramDataPoint: _histogram,
    ExponentialHistogramDataPoint: _exponential,
}


def _accumulates(metric: Metric) -> bool:
    data = metric.data
    return not isinstance(data, Gauge) and not (isinstance(data, Sum) and not data.is_monotonic)


def since(metrics: Iterable[Metric], origin: Points, origin_time: int) -> Iterator[Metric]:
    """Cumulative metrics as if counting had begun at origin_time, when the points were those of origin.

    For a forked child: it inherits its parent's numbers, which the parent has to report.
    """
    for metric in metrics:
        if not origin or not _accumulates(metric):
            yield metric
            continue
        points: list[Point] = []
        for point in metric.data.data_points:
            old = origin.get(key_of(metric, point))
            rest = None if old is None else subtract(point, old)
            points.append(point if rest is None else replace(rest, start_time_unix_nano=origin_time))
        yield _with(metric, points, AggregationTemporality.CUMULATIVE)


def changes(metric: Metric, acknowledged: Points) -> Iterator[tuple[Point, Key, Point]]:
    """For each point that has something new: what is new in it, its key, and itself.

    A series is sent once at least, even at zero, so that the receiver knows of it.
    """
    for point in metric.data.data_points:
        key = key_of(metric, point)
        old = acknowledged.get(key)
        if old is None:
            yield point, key, point
            continue
        new = subtract(point, old)
        if new is None:
            restarted = point.start_time_unix_nano > old.start_time_unix_nano
            start = point.start_time_unix_nano if restarted else old.time_unix_nano
            yield replace(point, start_time_unix_nano=start), key, point
        elif _counts(new):
            start = old.time_unix_nano
            fresh = [found for found in new.exemplars if found.time_unix_nano >= start]
            yield replace(new, start_time_unix_nano=start, exemplars=fresh), key, point


def _counts(point: Point) -> bool:
    return bool(point.value) if isinstance(point, NumberDataPoint) else point.count > 0


def parts(metrics: Iterable[tuple[Metric, bool]], acknowledged: Points) -> Iterator[Part]:
    """Cut metrics into requests of MAX_WEIGHT at most. Of each pair, the flag says whether it goes as a delta."""
    part = Part()
    for metric, as_delta in metrics:
        delta = as_delta and _accumulates(metric)
        for point, key, mark in _rows(metric, acknowledged, delta):
            weight = _weight(point)
            if part.points and part.weight + weight > MAX_WEIGHT:
                yield part
                part = Part()
            if not part.metrics or part.metrics[-1].name != metric.name:
                part.metrics.append(_with(metric, [], AggregationTemporality.DELTA if delta else None))
            _points(part.metrics[-1]).append(_in_order(point))
            part.points += 1
            part.weight += weight
            if key is not None:
                part.marks[key] = mark
    if part.points:
        yield part


def _rows(metric: Metric, acknowledged: Points, delta: bool) -> Iterator[tuple[Point, Key | None, Point]]:
    if delta:
        yield from changes(metric, acknowledged)
    else:
        yield from ((point, None, point) for point in metric.data.data_points)


def _in_order(point: Point) -> Point:
    """The point with a start that is not after its time: the clock may have been set back."""
    late = point.start_time_unix_nano > point.time_unix_nano
    return replace(point, start_time_unix_nano=point.time_unix_nano) if late else point


def _weight(point: Point) -> int:
    if isinstance(point, HistogramDataPoint):
        return 1 + len(point.bucket_counts) // 8
    if isinstance(point, ExponentialHistogramDataPoint):
        return 2 + len(point.positive.bucket_counts) // 64
    return 1


def _with(metric: Metric, points: list[Point], temporality: AggregationTemporality | None) -> Metric:
    """The metric with other points (a list that may still grow), and another temporality unless None."""
    changed: dict[str, Any] = {"data_points": points}
    if temporality is not None and isinstance(metric.data, Sum | Histogram | ExponentialHistogram):
        changed["aggregation_temporality"] = temporality
    return replace(metric, data=replace(metric.data, **changed))


def _points(metric: Metric) -> list[Any]:
    points = metric.data.data_points
    assert isinstance(points, list)
    return points
