"""prometheus_client, both ways.

    prometheus_client.REGISTRY.register(Collector(registry))     our families on its page
    attach(registry, prometheus_client.REGISTRY)                 its families on our page

Both at once do not go round in circles: what came from prometheus_client is not given back to it. Names never occur
twice. prometheus_client refuses ours where `describe` shows a clash, `attach` refuses its; only what both measure of
the process itself (DEFAULTS) is no clash but something to leave out: of the two, the page's own is kept.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as CollectorProtocol
from prometheus_client.registry import CollectorRegistry
from prometheus_client.samples import Exemplar as TheirExemplar
from prometheus_client.samples import Sample as TheirSample

from rkmetrics.errors import RegistryError
from rkmetrics.exposition.base import bound, exemplar_labels
from rkmetrics.exposition.page import shown, taken
from rkmetrics.model import (
    Exemplar,
    Family,
    ForeignFamily,
    HistogramValue,
    MetricFamily,
    MetricType,
    Sample,
    Series,
    Shape,
)

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["DEFAULTS", "Collector", "attach", "foreign"]

_log = logging.getLogger(__name__)

#: Families of the collectors that prometheus_client's default registry has from the start.
DEFAULTS = frozenset(
    {
        "process_cpu_seconds",
        "process_max_fds",
        "process_open_fds",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
        "process_virtual_memory_bytes",
        "python_gc_collections",
        "python_gc_objects_collected",
        "python_gc_objects_uncollectable",
        "python_info",
    }
)


class _Bridged(ForeignFamily):
    """A family that came from prometheus_client."""

    __slots__ = ()


class _Thread(threading.local):
    """Whether this thread is collecting from a CollectorRegistry for a registry of ours."""

    collecting = False


_thread = _Thread()


# ---- ours for them


class Collector(CollectorProtocol):
    """A registry as a prometheus_client collector.

    leave_out: OpenMetrics names of families that the other page has already. By default what prometheus_client's
    default registry measures by itself; pass () for a CollectorRegistry of your own.
    """

    def __init__(self, registry: Registry, *, leave_out: Collection[str] = DEFAULTS) -> None:
        self._registry, self._leave_out = registry, frozenset(leave_out)

    def describe(self) -> Iterable[Metric]:
        """The families of all known sets, so that `register` refuses a name that is taken (with ValueError)."""
        shapes = (definition.shape() for known in self._registry.sets() for definition in known.definitions())
        return [metric for metric in map(_metric, shapes) if metric.name not in self._leave_out]

    def collect(self) -> Iterable[Metric]:
        """A snapshot of the registry."""
        if _thread.collecting:  # our own page is being made, and has our families
            return ()
        families = (family for family in self._registry.collect() if not isinstance(family, _Bridged))
        found = map(_theirs, shown(families))
        return [metric for metric in found if metric.name not in self._leave_out]


def _theirs(family: Family) -> Metric:
    if isinstance(family, MetricFamily):
        metric = _metric(family.shape)
        metric.samples = [sample for series in family.series() for sample in _samples(family.shape.name, series)]
    else:
        metric = Metric(family.name, family.help, family.type, family.unit)
        metric.samples = [_their_sample(sample) for sample in family.samples]
    return metric


def _metric(shape: Shape) -> Metric:
    """Counters without _total are not counters to prometheus_client: it would add it."""
    counter = shape.type is MetricType.COUNTER and shape.name.endswith("_total")
    name = shape.name.removesuffix("_total") if counter else shape.name
    kind = "unknown" if shape.type is MetricType.COUNTER and not counter else shape.type.value
    return Metric(name, shape.help, kind, shape.unit if name.endswith(f"_{shape.unit}") else "")


def _samples(name: str, series: Series) -> Iterator[TheirSample]:
    labels = dict(series.labels)
    value = series.value
    if not isinstance(value, HistogramValue):
        yield TheirSample(name, labels, value, exemplar=_their_exemplar(series.exemplars.get(0)))
        return
    bounds = (*value.bounds, math.inf)
    for k, (upper, count) in enumerate(zip(bounds, accumulate(value.counts), strict=True)):
        exemplar = _their_exemplar(series.exemplars.get(k))
        yield TheirSample(f"{name}_bucket", {**labels, "le": bound(upper)}, float(count), exemplar=exemplar)
    yield TheirSample(f"{name}_count", labels, float(value.count))
    yield TheirSample(f"{name}_sum", labels, value.sum)


def _their_sample(sample: Sample) -> TheirSample:
    exemplar = _their_exemplar(sample.exemplar)
    return TheirSample(sample.name, dict(sample.labels), sample.value, sample.timestamp, exemplar)


def _their_exemplar(exemplar: Exemplar | None) -> TheirExemplar | None:
    if exemplar is None or (pairs := exemplar_labels(exemplar)) is None:
        return None
    return TheirExemplar(dict(pairs), exemplar.value, exemplar.timestamp if math.isfinite(exemplar.timestamp) else None)


# ---- theirs for us


def foreign(collector_registry: CollectorRegistry) -> Callable[[], tuple[ForeignFamily, ...]]:
    """What `Registry.add_collector` takes: a function that answers all families of a CollectorRegistry.

    Their native histograms are left out: only collectors written by hand have them, in a form that no released
    Prometheus asks.
    """

    def collect() -> tuple[ForeignFamily, ...]:
        before, _thread.collecting = _thread.collecting, True
        try:
            return tuple(map(_ours, collector_registry.collect()))
        finally:
            _thread.collecting = before

    return collect


def attach(
    registry: Registry,
    collector_registry: CollectorRegistry,
    *,
    name: str = "prometheus_client",
    timeout_seconds: float = 1.0,
) -> None:
    """Append the families of a CollectorRegistry to our page, now and as they come.

    Raises RegistryError when it has a name that one of our sets has, or that another collector has given just now. A
    clash that comes about later costs the foreign family.
    """
    collect = foreign(collector_registry)
    there = taken(registry.collect())  # some sets are bound at the first collection: their names are taken from then on
    there |= set(registry.sample_names())
    clashes = {family.name for family in _clashing(there, collect()) if family.name not in DEFAULTS}
    if clashes:
        listed = ", ".join(sorted(clashes))
        raise RegistryError(
            f"{name}: {listed}: the registry has metrics of that name; rename one of the two, or drop it"
        )
    said: set[str] = set()

    def collect_without_clashes() -> tuple[ForeignFamily, ...]:
        families = collect()
        clashing = {family.name for family in _clashing(registry.sample_names(), families)}
        for new in sorted(clashing - said - DEFAULTS)[:100]:
            said.add(new)
            _log.warning("%s: %s is left out: the registry has metrics of that name by now", name, new)
        return tuple(family for family in families if family.name not in clashing)

    registry.add_collector(collect_without_clashes, name=name, timeout_seconds=timeout_seconds)


def _clashing(names: Collection[str], families: Iterable[ForeignFamily]) -> list[ForeignFamily]:
    return [f for f in families if f.name in names or any(sample.name in names for sample in f.samples)]


def _ours(metric: Metric) -> ForeignFamily:
    samples = tuple(_our_sample(sample) for sample in metric.samples if not sample.native_histogram)
    return _Bridged(metric.name, MetricType(metric.type), metric.documentation, metric.unit, samples)


def _our_sample(sample: TheirSample) -> Sample:
    exemplar = sample.exemplar
    if exemplar is None:
        ours = None
    else:
        timestamp = math.nan if exemplar.timestamp is None else float(exemplar.timestamp)
        ours = Exemplar(tuple(exemplar.labels.items()), exemplar.value, timestamp)
    timestamp_seconds = None if sample.timestamp is None else float(sample.timestamp)
    return Sample(sample.name, tuple(sample.labels.items()), sample.value, ours, timestamp_seconds)
