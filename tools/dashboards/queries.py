"""PromQL from the catalogue's metrics: each function names its metric by the object, labels and values are looked up.

Every selector follows the variables `job` and `instance`, and `actor_name` where the metric has it. Windows are
$__rate_interval, which follows the scrape interval that the data source is told, or $__range, all that is on the
screen. Shares divide sums, so that an idle target weighs nothing. What has no answer is empty and never NaN: shares
where there is nothing to divide by, quantiles where nothing was seen.
"""

from __future__ import annotations

from typing import Any

from rkmetrics.catalogue.exporter import Exporter
from rkmetrics.metricset import Metric
from rkmetrics.model import MetricType

__all__ = [
    "TARGET",
    "Not",
    "Source",
    "buckets",
    "either",
    "highest",
    "increase",
    "lowest",
    "mean",
    "ours",
    "quantile",
    "rate",
    "scraped",
    "series",
    "share",
    "summed",
    "total",
]

TARGET = 'job=~"$job", instance=~"$instance"'
RATE, RANGE = "$__rate_interval", "$__range"

Source = Metric[Any]


class Not(str):
    """A value, or several of `either`, that the label must not have."""


def either(*values: str) -> str:
    """Values of which the label has one."""
    return "|".join(values)


def series(metric: Source, sample: str = "", **where: str) -> str:
    """Return the selector of a metric. sample: "bucket", "sum" or "count" of a histogram.

    Raises ValueError for a label or a value that the metric does not have.
    """
    definition = metric.definition
    name = f"{definition.name}_{sample}" if sample else definition.name
    actor = ', actor_name=~"$actor_name"' if definition.per_actor else ""
    return f"{name}{{{TARGET}{actor}{''.join(_matcher(metric, *each) for each in where.items())}}}"


def _matcher(metric: Source, label: str, value: str) -> str:
    declared = {each.name: each.values for each in metric.definition.labels}
    values = value.split("|")
    if label not in declared or (declared[label] and not set(values) <= set(declared[label])):
        raise ValueError(f"{metric.definition.name} has no {label}={value!r}; it has: {declared}")
    first = "!" if isinstance(value, Not) else "="
    second = "~" if len(values) > 1 else "=" if first == "!" else ""
    return f', {label}{first}{second}"{value}"'


def _by(operation: str, metric: Source, by: tuple[str, ...], inner: str) -> str:
    there = {each.name for each in metric.definition.labels} | {"le", "job", "instance"}
    lost = set(by) - there - ({"actor_name"} if metric.definition.per_actor else set[str]())
    if lost:
        raise ValueError(f"{metric.definition.name} has no label {sorted(lost)}")
    return f"{operation} by ({', '.join(by)}) ({inner})" if by else f"{operation}({inner})"


def total(metric: Source, *by: str, **where: str) -> str:
    """The sum of a gauge."""
    return _by("sum", metric, by, series(metric, **where))


def highest(metric: Source, *by: str, **where: str) -> str:
    """The highest of a gauge."""
    return _by("max", metric, by, series(metric, **where))


def lowest(metric: Source, *by: str, **where: str) -> str:
    """The lowest of a gauge."""
    return _by("min", metric, by, series(metric, **where))


def _counted(metric: Source, function: str, window: str, by: tuple[str, ...], where: dict[str, str]) -> str:
    sample = "count" if metric.definition.type is MetricType.HISTOGRAM else ""
    return _by("sum", metric, by, f"{function}({series(metric, sample, **where)}[{window}])")


def rate(metric: Source, *by: str, **where: str) -> str:
    """How much a counter grows per second, or how many values a histogram sees."""
    return _counted(metric, "rate", RATE, by, where)


def increase(metric: Source, *by: str, **where: str) -> str:
    """How much a counter, or a histogram's count, grew within the time on the screen."""
    return _counted(metric, "increase", RANGE, by, where)


def share(part: str, whole: str) -> str:
    """A ratio; empty where the whole is zero."""
    return f"{part} / ({whole} > 0)"


def buckets(metric: Source, *by: str, **where: str) -> str:
    """The rate of each bucket of a histogram."""
    return _by("sum", metric, ("le", *by), f"rate({series(metric, 'bucket', **where)}[{RATE}])")


def quantile(q: float, metric: Source, *by: str, **where: str) -> str:
    """The value of a histogram that a share q of all is below; empty where it saw nothing, as NaN is not 0 or more."""
    return f"histogram_quantile({q}, {buckets(metric, *by, **where)}) >= 0"


def summed(metric: Source, *by: str, **where: str) -> str:
    """The rate of a histogram's sum: of durations, the share of time that they take."""
    return _by("sum", metric, by, f"rate({series(metric, 'sum', **where)}[{RATE}])")


def mean(metric: Source, *by: str, **where: str) -> str:
    """The mean of what a histogram saw."""
    return share(summed(metric, *by, **where), rate(metric, *by, **where))


def scraped(name: str) -> str:
    """The selector of a metric that Prometheus itself writes about a target."""
    return f"{name}{{{TARGET}}}"


def ours(expr: str, *, ever: bool = False) -> str:
    """Keep the series of our targets, for names that other exporters have too; "All" of the variables is any job.

    ever: also of targets that are down now, and were up within the time on the screen. Times one rather than `and`:
    there assets check looks no further, and a counter without its rate would stay unseen.
    """
    known = f"last_over_time({series(Exporter.build_info)}[{RANGE}])" if ever else series(Exporter.build_info)
    return f"{expr} * on (job, instance) group_left () group by (job, instance) ({known})"
