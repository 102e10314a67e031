"""OpenMetrics 1.0.0 text.

Differs from text 0.0.4 in the comments, in exemplars, and in its end mark; the sample lines are the same, so that a
series has one name whatever was negotiated. `_created` lines are not written for families of our own: they double the
lines of counters, and Prometheus takes start times from protobuf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rkmetrics.exposition.base import Format, escape, exemplar_labels, is_time, labels, number, sample_lines
from rkmetrics.exposition.page import together
from rkmetrics.model import Exemplar, Family, ForeignFamily, MetricFamily, MetricType, Sample, Shape

__all__ = ["OPENMETRICS", "encode", "tails"]

# "Exemplars": "only valid on" counters' totals and histograms' buckets.
_EXEMPLAR_SUFFIXES = {
    MetricType.COUNTER: "_total",
    MetricType.HISTOGRAM: "_bucket",
    MetricType.GAUGEHISTOGRAM: "_bucket",
}


def encode(families: Iterable[Family]) -> bytes:
    """A page of families and the end mark."""
    return together(families, _encode_one, b"# EOF\n")


def _encode_one(family: Family) -> bytes:
    if isinstance(family, MetricFamily):
        return sample_lines(family, _head_of(family.shape), tails(family) if family.exemplars else ())
    return "".join(_foreign(family)).encode()


def _head_of(shape: Shape) -> bytes:
    found = shape.memo.get("openmetrics.head")
    if found is None:
        found = shape.memo["openmetrics.head"] = _head_of_own(shape).encode()
    assert isinstance(found, bytes)
    return found


def _head_of_own(shape: Shape) -> str:
    kind = _type(shape)
    name = shape.name.removesuffix("_total") if kind is MetricType.COUNTER else shape.name
    return _head(name, kind, shape.help, shape.unit)


def _type(shape: Shape) -> MetricType:
    """A counter without _total cannot be one here: its samples would have another name than in the other formats."""
    nameless = shape.type is MetricType.COUNTER and not shape.name.endswith("_total")
    return MetricType.UNKNOWN if nameless else shape.type


def _head(name: str, kind: str, help_: str, unit: str) -> str:
    lines = [f"# HELP {name} {escape(help_)}\n"] if help_ else []
    lines.append(f"# TYPE {name} {kind}\n")
    if unit and name.endswith(f"_{unit}"):  # "Unit": "MUST be a suffix of the MetricFamily name"
        lines.append(f"# UNIT {name} {unit}\n")
    return "".join(lines)


def tails(family: MetricFamily) -> tuple[tuple[int, bytes], ...]:
    """What follows the numbers of a family's counters or buckets that have an exemplar."""
    shape = family.shape
    if _type(shape) not in _EXEMPLAR_SUFFIXES:
        return ()
    places = len(shape.bounds) + 1 if shape.type is MetricType.HISTOGRAM else 1
    found = sorted(family.exemplars.items(), key=lambda item: item[0])
    return tuple(
        [(at, _tail(exemplar).encode("utf-8", "replace")) for at, exemplar in found if at % shape.width < places]
    )


def _tail(exemplar: Exemplar) -> str:
    pairs = exemplar_labels(exemplar)
    if pairs is None:
        return ""
    timestamp = f" {exemplar.timestamp:.3f}" if is_time(exemplar.timestamp) else ""
    return f" # {{{labels(pairs)}}} {number(exemplar.value).decode()}{timestamp}"


def _foreign(family: ForeignFamily) -> Iterator[str]:
    yield _head(family.name, family.type, family.help, family.unit)
    with_exemplars = family.name + _EXEMPLAR_SUFFIXES.get(family.type, "\n")
    for sample in family.samples:
        yield _line(sample, _tail(sample.exemplar) if sample.exemplar and sample.name == with_exemplars else "")


def _line(sample: Sample, tail: str) -> str:
    braced = f"{{{labels(sample.labels)}}}" if sample.labels else ""
    seconds = "" if sample.timestamp is None else f" {sample.timestamp:.3f}"
    return f"{sample.name}{braced} {number(sample.value).decode()}{seconds}{tail}\n"


OPENMETRICS = Format(
    name="openmetrics",
    content_type="application/openmetrics-text; version=1.0.0; charset=utf-8",
    media_type="application/openmetrics-text",
    parameters={
        "version": (
            "",
            "1.0.0",
        ),
        "charset": ("", "utf-8", "utf8"),
    },
    encode=encode,
)
