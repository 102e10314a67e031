"""Families of other registries, made fit to be written in any format.

What comes through a bridge or a user's collector was checked by nobody. `fit` answers families that keep the formats'
rules, so that the encoders need no doubts: names of the classic character set (others as Prometheus' "underscores"
scheme has them), each label once, numbers that are numbers, in each family only the sample names that its type
allows, each series once and in one piece. Samples that have no place in their family become families of their own, of
unknown type, under their own names, if these are free (see `page`), and every format gives the same series.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import TypeAlias

from rkmetrics.exposition.base import METRIC_NAME, bound, exemplar_labels, is_time, say_once
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

# The label that tells samples of one series apart, and the sample that has it. A state set's has its family's name.
_KEYED = {
    MetricType.HISTOGRAM: ("_bucket", "le"),
    MetricType.GAUGEHISTOGRAM: ("_bucket", "le"),
    MetricType.SUMMARY: ("", "quantile"),
}

# What each sample's number may be ("Metric types"); others may be any.
_Check: TypeAlias = Callable[[float], bool]
_NUMBERS: Mapping[tuple[MetricType, str], _Check] = {
    (MetricType.COUNTER, "_total"): lambda value: value >= 0,
    (MetricType.HISTOGRAM, "_bucket"): lambda value: 0 <= value < math.inf,
    (MetricType.HISTOGRAM, "_count"): lambda value: 0 <= value < math.inf,
    (MetricType.GAUGEHISTOGRAM, "_bucket"): lambda value: 0 <= value < math.inf,
    (MetricType.GAUGEHISTOGRAM, "_gcount"): lambda value: 0 <= value < math.inf,
    (MetricType.SUMMARY, ""): lambda value: not value < 0,
    (MetricType.SUMMARY, "_count"): lambda value: 0 <= value < math.inf,
    (MetricType.SUMMARY, "_sum"): lambda value: value >= 0,
    (MetricType.INFO, "_info"): lambda value: value == 1,
    (MetricType.STATESET, ""): lambda value: value in (0, 1),
}
_KEYS: Mapping[str, _Check] = {
    "le": lambda key: not math.isnan(key),
    "quantile": lambda key: 0 <= key <= 1,
}

_Labels: TypeAlias = "tuple[tuple[str, str], ...]"

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
    if not name.endswith(f"_{unit}") or kind in (MetricType.INFO, MetricType.STATESET):
        unit = ""
    families = [ForeignFamily(name, kind, help_, unit, _series(own, name, kind))]
    for stray, found in strays.items():
        samples = _series(found, stray, MetricType.UNKNOWN)
        families.append(ForeignFamily(stray, MetricType.UNKNOWN, help_, "", samples))
    return [family for family in families if family.samples]


def parts(family: ForeignFamily) -> list[tuple[str, tuple[Sample, ...]]]:
    """The samples by what their family's name gets: first those of its type, under "", then those that stand apart."""
    apart = {suffix: tuple(s for s in family.samples if s.name == family.name + suffix) for suffix in _APART}
    rest = tuple(s for s in family.samples if s.name.removeprefix(family.name) not in _APART)
    return [(suffix, samples) for suffix, samples in (("", rest), *apart.items()) if samples]


def _sample(sample: Sample) -> Sample:
    exemplar = sample.exemplar and _exemplar(sample.exemplar)
    timestamp = None if sample.timestamp is None else float(sample.timestamp)
    if timestamp is not None and not is_time(timestamp):
        timestamp = None
    return Sample(_name(sample.name), _labels(sample.labels), float(sample.value), exemplar, timestamp)


def _key_of(name: str, kind: MetricType) -> tuple[str, str]:
    """The suffix of samples that have a key label, and that label; "" where there is none."""
    return ("", name) if kind is MetricType.STATESET else _KEYED.get(kind, ("", ""))


def _fitted(sample: Sample, name: str, kind: MetricType) -> Sample | None:
    """The sample with its key label spelt our way, or None when it is none of this family's."""
    suffix = sample.name.removeprefix(name) if sample.name.startswith(name) else None
    if suffix not in SUFFIXES[kind]:
        return None
    check = _NUMBERS.get((kind, suffix))
    if check is not None and not check(sample.value):
        return None
    keyed, key = _key_of(name, kind)
    if not key:
        return sample
    given = [value for label, value in sample.labels if label == key]
    if suffix != keyed:
        return None if given else sample  # such as a _count with le: readers take it for a bucket's
    if not given or kind is MetricType.STATESET:
        return sample if given else None
    try:
        number = float(given[0])
    except ValueError:
        return None
    if not _KEYS[key](number):
        return None
    pairs = tuple([(label, bound(number) if label == key else value) for label, value in sample.labels])
    return Sample(sample.name, pairs, sample.value, sample.exemplar, sample.timestamp)


def _series(samples: Iterable[Sample], name: str, kind: MetricType) -> tuple[Sample, ...]:
    """The samples, those of one series together, with the same labels in the same order and at the same time.

    Of samples that are the same series, the first. A series that lacks what makes it one is left out.
    """
    key = _key_of(name, kind)[1]
    groups: dict[frozenset[tuple[str, str]], dict[tuple[str, str], Sample]] = {}
    firsts: dict[frozenset[tuple[str, str]], tuple[_Labels, float | None]] = {}
    for sample in samples:
        labels = tuple([pair for pair in sample.labels if pair[0] != key]) if key else sample.labels
        keys = tuple([pair for pair in sample.labels if pair[0] == key]) if key else ()
        identity = frozenset([pair for pair in labels if pair[1]])  # to Prometheus, "" is a label that is not there
        time = None if kind is MetricType.INFO else sample.timestamp
        first, at = firsts.setdefault(identity, (labels, time))
        if labels != first or sample.timestamp != at:
            sample = Sample(sample.name, first + keys, sample.value, sample.exemplar, at)
        groups.setdefault(identity, {}).setdefault((sample.name, keys[0][1] if keys else ""), sample)
    found: list[Sample] = []
    for identity, group in groups.items():
        kept = _whole(list(group.values()), name, kind, firsts[identity][0])
        if not kept:
            say_once(name, "one of its series, or more, lacks buckets, a count or a total")
        found += kept
    return tuple(found)


def _whole(samples: list[Sample], name: str, kind: MetricType, labels: _Labels) -> list[Sample]:
    """The samples of one series, completed; none when they are no series of their type."""
    if all(sample.name == f"{name}_created" for sample in samples):
        return []
    if kind is MetricType.COUNTER:
        return samples if any(sample.name == f"{name}_total" for sample in samples) else []
    if kind in (MetricType.HISTOGRAM, MetricType.GAUGEHISTOGRAM):
        return _histogram(samples, name, "g" if kind is MetricType.GAUGEHISTOGRAM else "", labels)
    return samples


def _histogram(samples: list[Sample], name: str, mark: str, labels: _Labels) -> list[Sample]:
    """One histogram series. What +Inf counts is the count; count and sum go together, or readers refuse the page."""
    single = {sample.name.removeprefix(name): sample for sample in samples}
    buckets = sorted([sample for sample in samples if sample.name == f"{name}_bucket"], key=_le)
    count, total, at = single.get(f"_{mark}count"), single.get(f"_{mark}sum"), samples[0].timestamp
    if not buckets or _le(buckets[-1]) != math.inf:
        if count is None:
            return []
        buckets.append(Sample(f"{name}_bucket", (*labels, ("le", "+Inf")), count.value, None, at))
    if any(low.value > high.value for low, high in pairwise(buckets)):
        return []
    kept = [sample for suffix, sample in single.items() if suffix == "_created"]
    if total is not None and _may_be_sum(total.value, gauge=bool(mark), negative=_le(buckets[0]) < 0):
        kept = [Sample(f"{name}_{mark}count", labels, buckets[-1].value, None, at), total, *kept]
    return [*buckets, *kept]


def _may_be_sum(value: float, *, gauge: bool, negative: bool) -> bool:
    """OpenMetrics 1.0, "Histogram" and "GaugeHistogram": a sum that may go down is no counter. negative: of buckets."""
    return value >= 0 or (negative and value < 0) if gauge else value >= 0 and not negative


def _le(bucket: Sample) -> float:
    return float(dict(bucket.labels)["le"])


def _exemplar(exemplar: Exemplar) -> Exemplar | None:
    timestamp = float(exemplar.timestamp)
    cleaned = Exemplar(_labels(exemplar.labels), float(exemplar.value), timestamp if is_time(timestamp) else math.nan)
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
