"""What a board is made of: values, without a word of Grafana's JSON.

A panel's description says what its lines mean, and begins a sentence with "Empty" when no data is no fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from rkmetrics.definition import MetricDefinition

__all__ = ["Board", "Panel", "Query", "Row", "gauge", "heatmap", "lines", "stat", "table", "timeline"]

Steps = tuple[tuple[float, str], ...]  # from which value on there is which colour; what is below the first is green


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and the name of its lines; of a table, the name of its column."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. kind: Grafana's name of the visualization. unit: Grafana's name of it.

    base: the colour below the first step. no_value: what a number says when there is none. low and high: ends of the
    axis; None leaves them to the data. names: whether numbers are shown with their names. values: words for numbers.
    """

    kind: str
    title: str
    unit: str
    about: str
    queries: tuple[Query, ...]
    width: int = 8
    height: int = 8
    low: float | None = 0
    high: float | None = None
    base: str = "green"
    steps: Steps = ()
    no_value: str = ""
    names: bool = False
    values: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Panels below a title, from left to right, 24 columns in a line."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """A dashboard. actors: the counters that list the values of the variable `actor_name`; none for a board without.

    Counters that start at zero, as gauges have no series on an idle fleet.
    """

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    actors: tuple[MetricDefinition, ...] = ()
    actors_label: str = "Actor name"


def _queries(found: tuple[tuple[str, str], ...]) -> tuple[Query, ...]:
    return tuple(Query(expr, legend) for expr, legend in found)


def _top(unit: str) -> float | None:
    return 1 if unit == "percentunit" else None


def lines(
    title: str, unit: str, about: str, *queries: tuple[str, str], width: int = 8, height: int = 8, full: bool = True
) -> Panel:
    """A plot over time, from zero. full: whether the axis of a ratio always goes to 1, or only as far as the data."""
    return Panel("timeseries", title, unit, about, _queries(queries), width, height, high=_top(unit) if full else None)


def stat(
    title: str,
    unit: str,
    about: str,
    *queries: tuple[str, str],
    width: int = 6,
    height: int = 5,
    low: float | None = 0,
    base: str = "green",
    steps: Steps = (),
    no_value: str = "",
    names: bool = False,
) -> Panel:
    """One number, or few with their names, as they are now: nothing where the last process is gone."""
    found = _queries(queries)
    return Panel("stat", title, unit, about, found, width, height, low, _top(unit), base, steps, no_value, names)


def gauge(title: str, about: str, *queries: tuple[str, str], width: int, steps: Steps, no_value: str) -> Panel:
    """Ratios, of which 1 is full."""
    return Panel(
        "gauge", title, "percentunit", about, _queries(queries), width, 6, high=1, steps=steps, no_value=no_value
    )


def heatmap(title: str, unit: str, about: str, buckets: str, width: int = 12) -> Panel:
    """How values are spread, over time. buckets: the rate of each bucket, by `le`."""
    return Panel("heatmap", title, unit, about, _queries(((buckets, "{{le}}"),)), width)


def table(title: str, unit: str, about: str, *queries: tuple[str, str], width: int = 12, height: int = 8) -> Panel:
    """What holds now: a line for each series, a column for each query."""
    return Panel("table", title, unit, about, _queries(queries), width, height, low=None)


def timeline(
    title: str,
    unit: str,
    about: str,
    *queries: tuple[str, str],
    values: tuple[tuple[str, str, str], ...],
    width: int = 24,
) -> Panel:
    """Bars of states over time. values: number, word and colour of each."""
    return Panel("state-timeline", title, unit, about, _queries(queries), width, values=values)
