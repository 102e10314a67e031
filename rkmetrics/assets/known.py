"""What a query may name: samples of the catalogue, of an application's own sets, of Prometheus itself, and recordings.

A sample is what a scrape stores: a histogram is four names. `owned` samples have a prefix that is ours or the
application's alone, so that a name of that prefix which is not here does not exist, nor does a label. Names that others
export as well (`process_*`, `up`) are known by type; what labels others give them is not ours to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from rkmetrics.assets.tables import SUFFIXES, Change, Table, bases
from rkmetrics.definition import RESERVED, MetricDefinition
from rkmetrics.model import MetricType

__all__ = ["TARGET_LABELS", "Known", "Sample", "close", "distance", "misused_suffix", "shown"]

# Labels that Prometheus, service discovery and usual relabelling attach to every series of a target.
TARGET_LABELS = frozenset(
    [
        "job",
        "instance",
        "cluster",
        "namespace",
        "pod",
        "container",
        "node",
        "service",
        "endpoint",
        "prometheus",
        "prometheus_replica",
        "replica",
        "environment",
        "env",
        "stage",
        "region",
        "zone",
        "datacenter",
        "host",
        "hostname",
        "team",
        "app",
        "monitor",
        "tenant",
    ]
)
_ATTACHED = ("exported_", "__")  # a clash with a target's label (honor_labels: false); labels of the server's own

# First words that many exporters share: no application owns them.
_SHARED = frozenset(("http", "grpc", "process", "python", "node", "go", "up", "jvm", "kube", "container"))


@dataclass(frozen=True, slots=True)
class Sample:
    """A name as a scrape stores it. kind: counter, gauge or bucket. labels: values of each, empty where they are open.

    native: whether it is a native histogram, whose one name has buckets without `le`.
    """

    name: str
    kind: str
    labels: Mapping[str, tuple[str, ...]]
    owned: bool = True
    native: bool = False


# Prometheus, "Automatically generated labels and time series".
_ALERT = {"alertname": (), "alertstate": ("firing", "pending"), "severity": ()}
_PROMETHEUS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "up": {},
    "scrape_duration_seconds": {},
    "scrape_samples_scraped": {},
    "scrape_samples_post_metric_relabeling": {},
    "scrape_series_added": {},
    "ALERTS": _ALERT,
    "ALERTS_FOR_STATE": _ALERT,
}


class Known:
    """All names that queries may have, and what became of those that they may have no more."""

    def __init__(
        self,
        definitions: Iterable[MetricDefinition],
        tables: Iterable[Table] = (),
        *,
        labels: Iterable[str] = (),
        recordings: Iterable[str] = (),
        foreign: Iterable[str] = (),
    ) -> None:
        definitions = tuple(definitions)
        own = tuple(dict.fromkeys(prefix for definition in definitions if (prefix := _prefix(definition.name))))
        self.prefixes = own
        self.samples = {sample.name: sample for d in definitions for sample in _samples(d, own)}
        self.samples.update((name, Sample(name, "gauge", labels, owned=False)) for name, labels in _PROMETHEUS.items())
        self.families = {definition.name: definition for definition in definitions}
        self.target_labels = TARGET_LABELS | set(labels)
        self.recordings = frozenset(recordings)
        self.foreign = frozenset(foreign)
        self._tables = tuple(tables)
        self._near: dict[str, str] = {}

    def attached(self, label: str) -> bool:
        """Whether a label may be there whatever the metric is."""
        return label in self.target_labels or label.startswith(_ATTACHED)

    def owned(self, name: str) -> bool:
        """Whether nobody else exports a metric of such a name."""
        return name.startswith(self.prefixes)

    def renamed(self, name: str) -> tuple[Table, Change, str] | None:
        """What became of a name that was one of ours, or leads to one: table, change and suffix."""
        for table in self._tables:
            found, suffix = table.find(name)
            for change in found:
                if change.old != change.new and (change.new in self.families or not change.new):
                    return table, change, suffix
        return None

    def relabelled(self, name: str, label: str, value: str | None = None) -> str:
        """Say what became of a sample's label, or of a value of it; "" where nothing is known."""
        for table in self._tables:
            for change in table.find(name)[0]:
                values = {old: new for of, old, new in change.values if of == label}
                new = dict(change.labels).get(label) if value is None else values.get(value)
                if new is not None:
                    return f"renamed to {new!r}: rkmetrics assets migrate --table {table.name}" if new else "removed"
        return ""

    def near(self, name: str) -> str:
        """Return the known name that this one most likely should be; "" where none is near."""
        if name not in self._near:
            names = [*self.samples, *self.recordings]
            likely = get_close_matches(name, names, 1, 0.75) if self.owned(name) else [close(name, names)]
            self._near[name] = next(iter(likely), "")
        return self._near[name]

    def exported_elsewhere(self, name: str) -> bool:
        """Whether RivetKit itself has a metric of such a name, with a prefix that is ours otherwise."""
        return not self.foreign.isdisjoint(bases(name))


def _prefix(name: str) -> str:
    reserved = next((prefix for prefix in RESERVED if name.startswith(prefix)), "")
    first = name.partition("_")[0]
    return reserved or ("" if first in _SHARED else f"{first}_")


def _samples(definition: MetricDefinition, prefixes: tuple[str, ...]) -> Iterator[Sample]:
    labels = {label.name: label.values for label in definition.labels}
    if definition.per_actor:
        labels["actor_name"] = ()
    owned, name = definition.name.startswith(prefixes), definition.name
    if definition.type is MetricType.HISTOGRAM:
        yield Sample(f"{name}_bucket", "bucket", {**labels, "le": ()}, owned)
        yield Sample(f"{name}_sum", "counter", labels, owned)
        yield Sample(f"{name}_count", "counter", labels, owned)
        if definition.native:
            yield Sample(name, "bucket", labels, owned, native=True)
    else:
        yield Sample(name, "counter" if definition.type is MetricType.COUNTER else "gauge", labels, owned)
    if definition.type in (MetricType.HISTOGRAM, MetricType.COUNTER):
        yield Sample(f"{name.removesuffix('_total')}_created", "gauge", labels, owned)


def close(word: str, words: Iterable[str]) -> str:
    """Return the word that is one slip of the fingers away, or two in a long one; "" where there is none."""
    allowed = 1 if len(word) < 8 else 2
    found = [(distance(word, other, allowed), other) for other in words if abs(len(word) - len(other)) <= allowed]
    nearest = min(found, default=(allowed + 1, ""))
    return nearest[1] if 0 < nearest[0] <= allowed else ""


def distance(a: str, b: str, most: int) -> int:
    """Return how many letters to insert, remove, replace or swap make b of a; more than `most` is not counted out."""
    before, last = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        if min(row) > most:
            return most + 1
        before, last = last, row
    return last[-1]


def misused_suffix(name: str, known: Known) -> str:
    """Say what is wrong with a name that is a known metric but for its ending; "" where it is none."""
    for base in bases(name):
        family = known.families.get(base)
        if family is not None and base != name:
            return f"{base} is a {family.type}: it has no {name.removeprefix(base)}"
    family = known.families.get(name)
    if family is not None and family.type is MetricType.HISTOGRAM and name not in known.samples:
        return f"{name} is a histogram: its samples are {_either(name)}"
    total = known.families.get(f"{name}_total")
    if total is not None:
        return f"{name} is a counter: its sample is {name}_total"
    return ""


def _either(name: str) -> str:
    return ", ".join(name + suffix for suffix in SUFFIXES)


def shown(words: Sequence[str], most: int = 12) -> str:
    """List words for a reader, who does not want a hundred."""
    return ", ".join(words[:most]) + (f", and {len(words) - most} more" if len(words) > most else "")
