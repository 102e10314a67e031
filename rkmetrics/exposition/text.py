"""Prometheus' text format 0.0.4 (Prometheus "Exposition formats", section "Text-based format").

Families without a series are left out, as client_golang does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rkmetrics.exposition.base import Format, labels, number, sample_lines
from rkmetrics.exposition.foreign import parts
from rkmetrics.exposition.page import together
from rkmetrics.model import Family, ForeignFamily, MetricFamily, MetricType, Sample, Shape

__all__ = ["TEXT", "encode"]

# The format has no other types; what an info or a state set holds are gauges.
_TYPES = {
    MetricType.COUNTER: "counter",
    MetricType.GAUGE: "gauge",
    MetricType.HISTOGRAM: "histogram",
    MetricType.SUMMARY: "summary",
    MetricType.INFO: "gauge",
    MetricType.STATESET: "gauge",
    MetricType.GAUGEHISTOGRAM: "histogram",
    MetricType.UNKNOWN: "untyped",
}
_FAMILY_SUFFIX = {MetricType.COUNTER: "_total", MetricType.INFO: "_info"}


def encode(families: Iterable[Family]) -> bytes:
    """A page of families."""
    return together(families, _encode_one)


def _encode_one(family: Family) -> bytes:
    if isinstance(family, MetricFamily):
        return sample_lines(family, _head_of(family.shape))
    return "".join(_foreign(family)).encode()


def _head_of(shape: Shape) -> bytes:
    found = shape.memo.get("text.head")
    if found is None:
        found = shape.memo["text.head"] = _head(shape.name, _TYPES[shape.type], shape.help).encode()
    assert isinstance(found, bytes)
    return found


def _head(name: str, kind: str, help_: str) -> str:
    shown = help_.replace("\\", "\\\\").replace("\n", "\\n")
    return f"# HELP {name} {shown}\n# TYPE {name} {kind}\n" if shown else f"# TYPE {name} {kind}\n"


def _foreign(family: ForeignFamily) -> Iterator[str]:
    for suffix, samples in parts(family):
        kind = "gauge" if suffix else _TYPES[family.type]
        yield _head(family.name + (suffix or _FAMILY_SUFFIX.get(family.type, "")), kind, family.help)
        yield from map(_line, samples)


def _line(sample: Sample) -> str:
    braced = f"{{{labels(sample.labels)}}}" if sample.labels else ""
    milliseconds = "" if sample.timestamp is None else f" {round(sample.timestamp * 1000)}"
    return f"{sample.name}{braced} {number(sample.value).decode()}{milliseconds}\n"


TEXT = Format(
    name="text",
    content_type="text/plain; version=0.0.4; charset=utf-8",
    media_type="text/plain",
    parameters={
        "version": (
            "",
            "0.0.4",
        ),
        "charset": ("", "utf-8", "utf8"),
    },
    encode=encode,
)
