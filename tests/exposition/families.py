"""Families to encode: short builders for tables, and strategies for properties."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import product

from hypothesis import strategies as st

from rkmetrics import model
from rkmetrics.model import Exemplar, ForeignFamily, MetricFamily, MetricType, Sample, Shape

__all__ = [
    "HOSTILE",
    "counter",
    "foreign_families",
    "gauge",
    "histogram",
    "native_index",
    "own_families",
    "sample",
]

# What must not harm another series (reliability, T23). Surrogates are not among them: they are refused at admission.
HOSTILE = (
    "a\nb",
    'say "hi"',
    "back\\slash",
    "\\n",
    "\x00",
    "# EOF",
    "\n# EOF\n",
    '"} 1\nx_total 7',
    "Zürich-東京-🎲",
    " ",
    "\r",
    "a,b={}",
)


def counter(
    name: str, values: Sequence[float], actor_names: Sequence[str] = ("lobby",), **shape: object
) -> MetricFamily:
    return _simple(MetricType.COUNTER, name, values, actor_names, shape)


def gauge(name: str, values: Sequence[float], actor_names: Sequence[str] = ("lobby",), **shape: object) -> MetricFamily:
    return _simple(MetricType.GAUGE, name, values, actor_names, shape)


def _simple(
    kind: MetricType, name: str, values: Sequence[float], actor_names: Sequence[str], shape: Mapping[str, object]
) -> MetricFamily:
    constants = Shape(**{"name": name, "type": kind, "help": f"Help of {name}.", **shape})  # type: ignore[arg-type]
    return MetricFamily(constants, tuple(actor_names), array("d", values), (1_700_000_000.25,) * len(actor_names))


def native_index(value: float) -> int:
    """The index of the schema 3 bucket that value is in, by the definition: the least i with value <= 2**(i/8)."""
    guess = math.ceil(math.log2(value) * 8)
    while 2 ** ((guess - 1) / 8) >= value:
        guess -= 1
    while 2 ** (guess / 8) < value:
        guess += 1
    return min(max(guess, model.NATIVE_MIN_INDEX), model.NATIVE_MAX_INDEX)


def histogram(
    name: str,
    observed: Sequence[Sequence[float] | None],
    bounds: Sequence[float],
    actor_names: Sequence[str] = ("lobby",),
    exemplars: Mapping[int, Exemplar] | None = None,
    **shape: object,
) -> MetricFamily:
    """A histogram with the observations of each of its series in turn; None for a series that does not exist."""
    given = {"name": name, "type": MetricType.HISTOGRAM, "help": f"Help of {name}.", "bounds": tuple(bounds), **shape}
    constants = Shape(**given)  # type: ignore[arg-type]
    values = array("d")
    for observations in observed:
        row = [0.0] * constants.width
        if observations is None:
            row[0] = model.UNSET
        for value in observations or ():
            row[bisect_left(constants.bounds, value)] += 1
            row[len(bounds) + 1] += value
            if constants.native:
                small = value <= model.NATIVE_ZERO_THRESHOLD
                row[len(bounds) + 2 + (0 if small else 1 + native_index(value) - model.NATIVE_MIN_INDEX)] += 1
        values.extend(row)
    starts = (1_700_000_000.25,) * len(actor_names)
    return MetricFamily(constants, tuple(actor_names), values, starts, exemplars or {})


def sample(
    name: str, value: float, *, exemplar: Exemplar | None = None, timestamp: float | None = None, **labels: str
) -> Sample:
    return Sample(name, tuple(labels.items()), value, exemplar, timestamp)


# ---- strategies

texts = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
helps = st.one_of(st.just(""), texts)
numbers = st.floats(allow_nan=True, allow_infinity=True)
counts = st.one_of(st.integers(0, 2**53).map(float), st.floats(0, allow_infinity=False))
existing = st.booleans()
times = st.floats(1.0, 4e9).map(lambda seconds: round(seconds, 3))
label_values = st.lists(texts, min_size=1, max_size=3, unique=True).map(tuple)


@st.composite
def exemplars(draw: st.DrawFn) -> Exemplar:
    names = draw(st.lists(st.sampled_from(["trace_id", "span_id", "actor_id"]), max_size=3, unique=True))
    # Without quotes: the reader that is asked (prometheus_client 0.26) miscounts escaped ones in exemplars.
    labels = tuple((name, draw(texts).replace('"', "'")) for name in names)
    return Exemplar(labels, draw(st.floats(allow_nan=False, allow_infinity=False)), draw(times))


@st.composite
def own_families(draw: st.DrawFn) -> tuple[MetricFamily, ...]:
    """Families as a registry gives them: names apart from each other, series that come and go, hostile text."""
    count = draw(st.integers(0, 4))
    return tuple(draw(_own_family(number)) for number in range(count))


@st.composite
def _own_family(draw: st.DrawFn, number: int) -> MetricFamily:
    kind = draw(st.sampled_from([MetricType.COUNTER, MetricType.GAUGE, MetricType.HISTOGRAM]))
    per_actor = draw(st.booleans())
    actor_names = draw(st.lists(texts, max_size=3, unique=True)) if per_actor else [""]
    label_names = tuple(draw(st.lists(st.sampled_from(["kind", "outcome", "phase"]), max_size=2, unique=True)))
    combos = tuple(product(*(draw(label_values) for _ in label_names)))
    unit = draw(st.sampled_from(["", "seconds"]))
    name = f"app_family{number}" + (f"_{unit}" if unit else "") + ("_total" if kind is MetricType.COUNTER else "")
    bounds = st.lists(st.floats(1e-9, 1e9), max_size=4, unique=True).map(sorted)
    shape = Shape(
        name=name,
        type=kind,
        help=draw(helps),
        unit=unit,
        label_names=label_names,
        combos=combos,
        bounds=tuple(draw(bounds)) if kind is MetricType.HISTOGRAM else (),
        per_actor=per_actor,
        native=kind is MetricType.HISTOGRAM and draw(st.booleans()),
    )
    values, found = array("d"), dict[int, Exemplar]()
    for _ in range(len(actor_names) * len(combos)):
        if kind is not MetricType.GAUGE and draw(existing):
            found[len(values)] = draw(exemplars())
        values.extend(draw(_row(shape)))
    starts = tuple(draw(times) for _ in actor_names)
    return MetricFamily(shape, tuple(actor_names), values, starts, found)


@st.composite
def _row(draw: st.DrawFn, shape: Shape) -> list[float]:
    """The numbers of one series."""
    if not draw(existing):
        return [model.UNSET] + [0.0] * (shape.width - 1)
    if shape.type is MetricType.COUNTER:
        return [draw(counts)]
    if shape.type is MetricType.GAUGE:
        return [draw(numbers)]
    observed = draw(st.lists(st.floats(0.0, 2e9), max_size=5))
    return list(histogram("app_any", [observed], shape.bounds, native=shape.native).values)


@st.composite
def foreign_families(draw: st.DrawFn) -> tuple[ForeignFamily, ...]:
    """Families of another registry that keep the rules of their types."""
    kinds = draw(st.lists(st.sampled_from(sorted(_FOREIGN)), max_size=4))
    return tuple(_foreign(draw, kind, f"other_family{number}") for number, kind in enumerate(kinds))


def _foreign(draw: st.DrawFn, kind: str, name: str) -> ForeignFamily:
    series = draw(st.lists(texts, max_size=3, unique=True))
    samples = tuple(sample for label in series for sample in _FOREIGN[kind](draw, name, label))
    return ForeignFamily(name, MetricType(kind), draw(helps), "", samples)


def _counter(draw: st.DrawFn, name: str, label: str) -> list[Sample]:
    exemplar = draw(st.none() | exemplars())
    return [
        sample(f"{name}_total", draw(counts), exemplar=exemplar, path=label),
        sample(f"{name}_created", draw(times), path=label),
    ]


def _histogram(draw: st.DrawFn, name: str, label: str) -> list[Sample]:
    low, high = sorted((draw(st.integers(0, 99)), draw(st.integers(0, 99))))
    buckets = [
        sample(f"{name}_bucket", low, path=label, le="0.5"),
        sample(f"{name}_bucket", high, path=label, le="+Inf"),
    ]
    return [*buckets, sample(f"{name}_count", high, path=label), sample(f"{name}_sum", draw(counts), path=label)]


def _summary(draw: st.DrawFn, name: str, label: str) -> list[Sample]:
    quantile = sample(name, draw(counts), path=label, quantile="0.5")
    total = [
        sample(f"{name}_count", draw(st.integers(0, 99)), path=label),
        sample(f"{name}_sum", draw(counts), path=label),
    ]
    return [quantile, *total]


_FOREIGN: dict[str, Callable[[st.DrawFn, str, str], list[Sample]]] = {
    "counter": _counter,
    "gauge": lambda draw, name, label: [sample(name, draw(numbers), path=label)],
    "histogram": _histogram,
    "summary": _summary,
    "info": lambda draw, name, label: [sample(f"{name}_info", 1, path=label)],
    "stateset": lambda draw, name, label: [Sample(name, ((name, "on"), ("path", label)), 1)],
    "unknown": lambda draw, name, label: [sample(name, draw(numbers), path=label)],
}
