"""What a metric is, as data, and the rules that its name and labels must keep.

The rules are Prometheus' own ("Metric and label naming", and what promtool's lint says), OpenMetrics' on units and
reserved suffixes, and ours on cardinality. They are a table of small functions: each answers None, or (what is wrong,
what to do). They run where a metric is declared, so that a bad name never reaches the wire; nothing is repaired at
scrape time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from rkmetrics.errors import DefinitionError
from rkmetrics.model import MetricType, Shape

__all__ = [
    "ACROSS",
    "MAX_COMBOS",
    "OTHER",
    "RESERVED",
    "RESERVED_NAMES",
    "LabelDefinition",
    "MetricDefinition",
    "Rename",
    "check",
    "findings",
]

# The value that stands for what was not declared or not admitted. It can be neither declared nor admitted itself.
OTHER = "__other__"

# How worker processes combine a gauge: there is no default, since every default is wrong for somebody.
ACROSS = ("sum", "max", "min", "mean", "latest")

# Names that this package has or will have. A program's own metric of such a name would break with some later version.
RESERVED = ("rkmetrics_", "rivetkit_actor_", "pegboard_actor_kv_")
RESERVED_NAMES = frozenset(
    f"process_{what}"
    for what in (
        "cpu_seconds_total",
        "max_fds",
        "open_fds",
        "resident_memory_bytes",
        "start_time_seconds",
        "threads",
        "virtual_memory_bytes",
    )
)

# More series than this for one metric of one actor name is not "low cardinality" under any reading: 200 names of it
# would be 800,000 series, ten times what Prometheus' own guidance allows one target.
MAX_COMBOS = 4096

UNITS = ("seconds", "bytes", "ratio", "celsius", "meters", "volts", "amperes", "joules", "grams")


@dataclass(frozen=True, slots=True)
class Rename:
    """An old name of a metric. since: the version of the program in which the new name came."""

    name: str
    since: str


@dataclass(frozen=True, slots=True)
class LabelDefinition:
    """A label and its values. `values` is empty when the program registers them at run time (`described` says
    which)."""

    name: str
    values: tuple[str, ...]
    described: str = ""


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """One metric as declared.

    exception: why a rule on names is not kept (a name that another system fixed); shown in the catalogue.
    window_seconds: of a peak, how long a maximum stays visible.
    """

    name: str
    type: MetricType
    help: str
    labels: tuple[LabelDefinition, ...] = ()
    bounds: tuple[float, ...] = ()
    native: bool = False
    across: str = "sum"
    per_actor: bool = True
    renamed_from: tuple[Rename, ...] = ()
    exception: str = ""
    window_seconds: float = 0.0

    @property
    def unit(self) -> str:
        """The OpenMetrics unit: the base unit that ends the name (before _total), or empty."""
        last = self.name.removesuffix("_total").rsplit("_", 1)[-1]
        return last if last in UNITS else ""

    @property
    def dynamic(self) -> bool:
        """Whether label values are registered at run time by the program."""
        return any(not label.values for label in self.labels)

    @property
    def lines_per_series(self) -> int:
        """Sample lines of one series in text: a histogram has its buckets, +Inf, sum and count."""
        return len(self.bounds) + 3 if self.type is MetricType.HISTOGRAM else 1

    @property
    def declared_combos(self) -> int:
        """How many combinations of declared label values there are."""
        return math.prod(len(label.values) for label in self.labels)

    @property
    def worst_combos(self) -> int:
        """The same with __other__ as one more value of each label: what can exist at most."""
        return math.prod(len(label.values) + 1 for label in self.labels)

    @property
    def starts_at_zero(self) -> bool:
        """Whether declared series exist from the start. Gauges never do; nor do products of over 64 sample lines."""
        return self.type is not MetricType.GAUGE and self.declared_combos * self.lines_per_series <= 64

    def combos(self) -> tuple[tuple[str, ...], ...]:
        """All combinations in memory's order: the last label varies fastest, __other__ is each label's last value."""
        return tuple(product(*((*label.values, OTHER) for label in self.labels)))

    def shape(self) -> Shape:
        """The constant part of this metric's snapshots."""
        return Shape(
            name=self.name,
            type=self.type,
            help=self.help,
            unit=self.unit,
            label_names=tuple(label.name for label in self.labels),
            combos=() if self.dynamic else self.combos(),
            bounds=self.bounds,
            per_actor=self.per_actor,
            native=self.native,
            across=self.across,
        )

    def sample_names(self) -> tuple[str, ...]:
        """Every name that a sample of this metric, or its family in OpenMetrics, has."""
        if self.type is MetricType.HISTOGRAM:
            return (self.name, *(self.name + suffix for suffix in ("_bucket", "_sum", "_count")))
        if self.type is MetricType.COUNTER:
            return (self.name, self.name.removesuffix("_total"))
        return (self.name,)


Finding = tuple[str, str] | None
Rule = Callable[[MetricDefinition], Finding]

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LABEL = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_RESERVED_LABELS = {
    "le": "histogram buckets use it",
    "quantile": "summaries use it",
    "actor_name": "it is given when the set is bound",
    "job": "Prometheus attaches it to the target",
    "instance": "Prometheus attaches it to the target",
}
_SUFFIXES = ("_total", "_count", "_sum", "_bucket", "_created", "_info", "_gcount", "_gsum")
_SUFFIX_OF = {MetricType.COUNTER: "_total", MetricType.INFO: "_info"}
_BASE_UNIT = {
    "milliseconds": "seconds", "microseconds": "seconds", "nanoseconds": "seconds", "minutes": "seconds",
    "hours": "seconds", "days": "seconds", "weeks": "seconds", "kilobytes": "bytes", "megabytes": "bytes",
    "gigabytes": "bytes", "kibibytes": "bytes", "mebibytes": "bytes", "bits": "bytes", "percent": "ratio",
    "percentage": "ratio", "fahrenheit": "celsius", "kelvin": "celsius", "millivolts": "volts", "kilograms": "grams",
    "ms": "seconds", "us": "seconds", "ns": "seconds", "sec": "seconds", "secs": "seconds", "kb": "bytes",
    "mb": "bytes", "gb": "bytes", "pct": "ratio",
}  # fmt: skip
_TYPE_WORDS = ("counter", "gauge", "histogram", "summary")


def _name_is_lower_snake(d: MetricDefinition) -> Finding:
    if not _NAME.fullmatch(d.name):
        return "a metric name has lower-case words of a-z and 0-9 joined by single underscores", "rename it"
    if len(d.name) > 200:
        return "the name is longer than 200 characters", "shorten it"
    return None


def _name_has_a_prefix(d: MetricDefinition) -> Finding:
    if "_" not in d.name.removesuffix("_total"):
        return "a metric name starts with the program's or library's prefix", f"write 'yourapp_{d.name}'"
    return None


def _prefix_occurs_once(d: MetricDefinition) -> Finding:
    words = d.name.split("_")
    for length in range(1, len(words) // 2 + 1):
        if words[:length] == words[length : 2 * length]:
            return f"the prefix {'_'.join(words[:length])!r} occurs twice", f"write {'_'.join(words[length:])!r}"
    if len(words) > 1 and len(words[0]) > 4 and words[1].startswith(words[0]):
        return f"the prefixes {words[0]!r} and {words[1]!r} stack", f"write {'_'.join(words[1:])!r}"
    return None


def _suffix_fits_the_type(d: MetricDefinition) -> Finding:
    own = _SUFFIX_OF.get(d.type)
    if own == "_total" and not d.name.endswith(own):
        return "a counter's name ends in _total", f"write '{d.name}_total'"
    for suffix in _SUFFIXES:
        if suffix != own and d.name.removesuffix("_total" if own == "_total" else "").endswith(suffix):
            return f"a {d.type}'s name does not end in {suffix}", "choose another last word"
    return None


def _units_are_base_units(d: MetricDefinition) -> Finding:
    for word in d.name.split("_"):
        if word in _BASE_UNIT:
            return f"{word!r} is not a base unit", f"use {_BASE_UNIT[word]!r} and convert the numbers"
    return None


def _unit_comes_last(d: MetricDefinition) -> Finding:
    words = d.name.removesuffix("_total").split("_")
    if "seconds" in words[:-1] and words[-1] not in UNITS:
        return "the unit ends the name", "move 'seconds' to the end"
    return None


def _no_type_word(d: MetricDefinition) -> Finding:
    for word in d.name.split("_"):
        if word in _TYPE_WORDS:
            return f"the name says its type ({word!r})", "leave the word out; the TYPE line says it"
    return None


def _help_is_a_sentence(d: MetricDefinition) -> Finding:
    if not d.help.strip() or d.help != d.help.strip():
        return "a help text is a sentence without space around it", "say what is counted or measured"
    try:
        d.help.encode()
    except UnicodeEncodeError:
        return "the help text is not valid UTF-8", "remove the surrogates"
    return None


def _labels_are_named_well(d: MetricDefinition) -> Finding:
    for label in d.labels:
        if label.name in _RESERVED_LABELS:
            return f"label {label.name!r} is reserved: {_RESERVED_LABELS[label.name]}", "choose another name"
        if not _LABEL.fullmatch(label.name):
            return f"label {label.name!r} is not lower-case words joined by single underscores", "rename it"
    return None


def _label_values_are_closed(d: MetricDefinition) -> Finding:
    for label in d.labels:
        if label.described:
            continue
        if not label.values:
            return f"label {label.name!r} has no values", "list them: rk.OneOf('a', 'b')"
        if len(set(label.values)) != len(label.values):
            return f"label {label.name!r} lists a value twice", "list each once"
        for value in label.values:
            finding = _label_value(label.name, value)
            if finding:
                return finding
    return None


def _label_value(label: str, value: str) -> Finding:
    if value == OTHER:
        return f"label {label!r} declares {OTHER!r}, which stands for undeclared values", "leave it out; it is there"
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return f"label {label!r} has the value {value!r}, which is not valid UTF-8", "remove the surrogates"
    if not 0 < size <= 128:
        return f"label {label!r} has a value of {size} bytes", "use 1 to 128 bytes"
    return None


def _series_are_few(d: MetricDefinition) -> Finding:
    if not d.dynamic and d.worst_combos > MAX_COMBOS:
        return (
            f"{d.worst_combos:,} series for each actor name (limit {MAX_COMBOS:,})",
            "drop a label, or split the metric in two",
        )
    return None


def _bounds_increase(d: MetricDefinition) -> Finding:
    if d.type is not MetricType.HISTOGRAM:
        return None
    if math.inf in d.bounds:
        return "+Inf is among the bucket bounds", "leave it out; it is added"
    if not d.bounds or not all(math.isfinite(bound) for bound in d.bounds):
        return (
            "a histogram has one finite bucket bound at least (+Inf is added)",
            "pass buckets=rk.LATENCY, or your own",
        )
    if any(a >= b for a, b in zip(d.bounds, d.bounds[1:], strict=False)):
        return "bucket bounds increase strictly", "sort them and drop repeats"
    if d.native and d.bounds[0] < 0:
        return "native buckets for negative values", "native=True is for values of 0 or more"
    if len(d.bounds) > 100:
        return f"{len(d.bounds)} buckets", "use 100 at most, or native=True"
    return None


def _gauges_say_how_workers_combine(d: MetricDefinition) -> Finding:
    if d.type is MetricType.GAUGE and not d.across:
        return "a gauge says how worker processes combine", f"pass across=, one of: {', '.join(ACROSS)}"
    if d.type is MetricType.GAUGE and d.across not in ACROSS:
        return f"across={d.across!r} is not a way to combine worker processes", f"use one of: {', '.join(ACROSS)}"
    return None


# The rules that a reasoned `exception` lifts: they concern how a name reads, never whether it works.
_STYLE_RULES: tuple[Rule, ...] = (
    _name_has_a_prefix,
    _suffix_fits_the_type,
    _units_are_base_units,
    _unit_comes_last,
    _no_type_word,
)
_RULES: tuple[Rule, ...] = (
    _name_is_lower_snake,
    _prefix_occurs_once,
    _help_is_a_sentence,
    _labels_are_named_well,
    _label_values_are_closed,
    _series_are_few,
    _bounds_increase,
    _gauges_say_how_workers_combine,
)


def findings(definition: MetricDefinition) -> Iterator[tuple[str, str]]:
    """Yield (rule, mend) for each rule that a definition breaks."""
    rules = _RULES if definition.exception else (*_RULES[:1], *_STYLE_RULES, *_RULES[1:])
    for rule in rules:
        found = rule(definition)
        if found:
            yield found


def check(definition: MetricDefinition) -> MetricDefinition:
    """Return the definition. Raises DefinitionError, with the first rule that it breaks."""
    for rule, mend in findings(definition):
        raise DefinitionError(definition.name, rule, mend)
    return definition
