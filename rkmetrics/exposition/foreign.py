"""Families of other registries, made fit to be written in any format.

What comes through a bridge or a user's collector was checked by nobody. `fit` answers families that keep the formats'
rules, so that the encoders need no doubts: names of the classic character set (others as Prometheus' "underscores"
scheme has them), each label once, numbers that are numbers, and in each family only the sample names that its type
allows. Samples that have no place in their family become families of their own, of unknown type, under their own names:
nothing is lost, and every format gives the same series.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from rkmetrics.exposition.base import METRIC_NAME, bound, exemplar_labels
from rkmetrics.model import Exemplar, ForeignFamily, MetricType, Sample

__all__ = ["SUFFIXES", "fit", "parts"]

# OpenMetrics 1.0, "Metric types": what a sample's name may add to its family's.
SUFFIXES: Mapping[MetricType, tuple[str, ...]] = {
    MetricType.COUNTER: ("_total", "_created"),
    MetricType.GAUGE: ("",),
    MetricType.HISTOGRAM: ("_bucket", "_sum", "_count", "_created"),
    MetricType.SUMMARY: ("", "_sum", "_count", "_created"),
    MetricType.INFO: ("_info",),
    MetricType.STATESET: ("",),
    MetricType.GAUGEHISTOGRAM: ("_bucket", "_gsum", "_gcount"),
    MetricType.UNKNOWN: ("",),
}

# The label that tells samples of one metric apart holds a number, and is spelt like ours.
_NUMBER_LABEL = {
    (MetricType.HISTOGRAM, "_bucket"): "le",
    (MetricType.GAUGEHISTOGRAM, "_bucket"): "le",
    (MetricType.SUMMARY, ""): "quantile",
}

# In text 0.0.4 and protobuf these are families of their own: their types know nothing of such samples.
_APART = ("_created", "_gsum", "_gcount")

_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_:]")
_NOT_IN_LABELS = re.compile(r"[^a-zA-Z0-9_]")


def fit(family: ForeignFamily) -> list[ForeignFamily]:
    """The family as one or more that keep the rules, without those that have no samples left."""
    name = _name(family.name)
    kind = MetricType(family.type)
    own: list[Sample] = []
    strays: dict[str, list[Sample]] = {}
    for sample in map(_sample, family.samples):
        fitted = _fitted(sample, name, kind)
        if fitted is not None:
            own.append(fitted)
        else:
            strays.setdefault(sample.name, []).append(sample)
    help_, unit = _text(family.help), _text(family.unit)
    families = [ForeignFamily(name, kind, help_, unit if name.endswith(f"_{unit}") else "", tuple(own))]
    families += [ForeignFamily(name, MetricType.UNKNOWN, help_, "", tuple(found)) for name, found in strays.items()]
    return [family for family in families if family.samples]


def parts(family: ForeignFamily) -> list[tuple[str, tuple[Sample, ...]]]:
    """The samples by what their family's name gets: first those of its type, under "", then those that stand apart."""
    apart = {suffix: tuple(s for s in family.samples if s.name == family.name + suffix) for suffix in _APART}
    rest = tuple(s for s in family.samples if s.name.removeprefix(family.name) not in _APART)
    return [(suffix, samples) for suffix, samples in (("", rest), *apart.items()) if samples]


def _sample(sample: Sample) -> Sample:
    exemplar = sample.exemplar and _exemplar(sample.exemplar)
    timestamp = None if sample.timestamp is None else float(sample.timestamp)
    if timestamp is not None and not math.isfinite(timestamp):
        timestamp = None
    return Sample(_name(sample.name), _labels(sample.labels), float(sample.value), exemplar, timestamp)


def _fitted(sample: Sample, name: str, kind: MetricType) -> Sample | None:
    """The sample with its number label spelt our way, or None when it is none of this family's."""
    suffix = sample.name.removeprefix(name) if sample.name.startswith(name) else None
    if suffix not in SUFFIXES[kind]:
        return None
    key = _NUMBER_LABEL.get((kind, suffix))
    if key is None:
        return sample
    try:
        pairs = tuple((label, bound(float(value)) if label == key else value) for label, value in sample.labels)
    except ValueError:
        return None
    if key not in dict(pairs):
        return None
    return Sample(sample.name, pairs, sample.value, sample.exemplar, sample.timestamp)


def _exemplar(exemplar: Exemplar) -> Exemplar | None:
    cleaned = Exemplar(_labels(exemplar.labels), float(exemplar.value), float(exemplar.timestamp))
    return cleaned if exemplar_labels(cleaned) is not None else None


def _labels(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Names made valid; of two that are the same then, the first."""
    found: dict[str, str] = {}
    for name, value in pairs:
        found.setdefault(_label_name(name), _text(value))
    return tuple(found.items())


def _label_name(name: str) -> str:
    """Names that start with two underscores are Prometheus' own ("Data model", "Labels")."""
    valid = _leading(_NOT_IN_LABELS.sub("_", name))
    return f"_{valid.lstrip('_')}" if valid.startswith("__") else valid


def _name(name: str) -> str:
    return name if METRIC_NAME.fullmatch(name) else _leading(_NOT_IN_NAMES.sub("_", name))


def _leading(name: str) -> str:
    return f"_{name[1:]}" if name[:1].isdigit() else name or "_"


def _text(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate becomes "?"."""
    return str(text).encode("utf-8", "replace").decode()
