"""The checks: what can be wrong with a query, a function for each, listed in CHECKS and explained in docs/checks.md.

A check gets an Inspection (the query's tree, what is known, where labels go) and yields findings: a span, a sentence,
and what to write instead. It says nothing where it cannot know: a metric of another exporter, a variable of Grafana, a
pattern that cannot be listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rkmetrics.assets.base import Document, Problem, Query, Scalar, spanned
from rkmetrics.assets.flow import ANY, Flow, Labels, Loss, is_scalar
from rkmetrics.assets.known import Known, Sample, close, misused_suffix, shown
from rkmetrics.definition import OTHER
from rkmetrics.errors import AssetError, PromqlError
from rkmetrics.promql import (
    Aggregation,
    Binary,
    Call,
    Matcher,
    Node,
    Ranged,
    Selector,
    Word,
    Wrapped,
    alternatives,
    groupings,
    metric_words,
    parse,
    parse_variable,
    selectors,
    walk,
)

__all__ = ["CHECKS", "SYNTAX", "UNREADABLE", "Check", "Finding", "Inspection", "check", "recordings", "unreadable"]


class Finding(NamedTuple):
    """What is wrong with text[start:end] of a query (or of its legend, where `of` names that)."""

    start: int
    end: int
    what: str
    mend: str = ""
    of: Scalar | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """One query under inspection. node: its tree, None for a variable that asks for a label only; asked: that label."""

    query: Query
    node: Node | None
    asked: tuple[Word, ...]
    known: Known
    flow: Flow
    result: Labels

    def selectors(self) -> Iterator[Selector]:
        return iter(()) if self.node is None else selectors(self.node)

    def nodes(self) -> Iterator[Node]:
        return iter(()) if self.node is None else walk(self.node)

    def samples(self, selector: Selector) -> list[Sample]:
        """What a selector asks for, as far as it is known; nothing when a part of it is not."""
        found = [self.known.samples.get(word.text) for word in metric_words(selector)]
        return [sample for sample in found if sample is not None] if None not in found else []


class Check(NamedTuple):
    """One check: its name in reports, what it does, and what it is about in one line."""

    name: str
    find: Callable[[Inspection], Iterable[Finding]]
    about: str


# --- names ------------------------------------------------------------------------------------------------------------


def _unknown_name(names: Callable[[Inspection, Word], Finding | None]) -> Callable[[Inspection], Iterator[Finding]]:
    """Make a check of each name that is not known."""

    def find(inspection: Inspection) -> Iterator[Finding]:
        known = inspection.known
        for selector in inspection.selectors():
            for word in metric_words(selector):
                if not word.opaque and word.text not in known.samples and word.text not in known.recordings:
                    finding = names(inspection, word)
                    if finding is not None:
                        yield finding

    return find


def _renamed(inspection: Inspection, word: Word) -> Finding | None:
    found = inspection.known.renamed(word.text)
    if found is None:
        return None
    table, change, suffix = found
    if not change.new:
        return Finding(word.start, word.end, f"removed metric {word.text!r}: {change.why}")
    if change.cannot:
        return Finding(
            word.start, word.end, f"replaced metric {word.text!r}: {change.why}", f"query {change.new!r} anew"
        )
    asked = ", ".join(f'{label}="{value}"' for label, value in change.adds)
    new = f"{change.new}{suffix}" + (f"{{{asked}}}" if asked else "")
    mend = f"renamed to {new!r}: rkmetrics assets migrate --table {table.name}"
    return Finding(word.start, word.end, f"old metric {word.text!r}", mend)


def _suffix(inspection: Inspection, word: Word) -> Finding | None:
    if inspection.known.renamed(word.text) is not None:
        return None
    wrong = misused_suffix(word.text, inspection.known)
    return Finding(word.start, word.end, f"no such sample: {wrong}") if wrong else None


def _mistyped(inspection: Inspection, word: Word) -> Finding | None:
    known = inspection.known
    if known.renamed(word.text) is not None or misused_suffix(word.text, known):
        return None
    if known.owned(word.text) and known.exported_elsewhere(word.text):
        return Finding(word.start, word.end, f"unknown metric {word.text!r}", "RivetKit has it, rkmetrics does not")
    near = known.near(word.text)
    if near:
        return Finding(word.start, word.end, f"unknown metric {word.text!r}", f"did you mean {near!r}?")
    if known.owned(word.text):
        return Finding(word.start, word.end, f"unknown metric {word.text!r}", "the catalogue has no such name")
    recorded = ":" in word.text and known.recordings and any(known.owned(part) for part in word.text.split(":"))
    return Finding(word.start, word.end, f"unknown recording {word.text!r}", "no rule records it") if recorded else None


# --- labels and values ------------------------------------------------------------------------------------------------


def _unknown_label(inspection: Inspection) -> Iterator[Finding]:
    """Labels in matchers, and the one that label_values() asks for."""
    for selector in inspection.selectors():
        samples = inspection.samples(selector)
        if samples:
            words = [matcher.label for matcher in selector.matchers if not _asks_absence(matcher)]
            yield from _labels_not_of(inspection, samples, words)
    root = inspection.node
    if isinstance(root, Selector) and (samples := inspection.samples(root)):
        yield from _labels_not_of(inspection, samples, inspection.asked)


def _asks_absence(matcher: Matcher) -> bool:
    return matcher.op == "=" and not matcher.value.text


def _labels_not_of(inspection: Inspection, samples: Sequence[Sample], words: Iterable[Word]) -> Iterator[Finding]:
    there = {label for sample in samples for label in sample.labels}
    for word in words:
        label = word.text
        if word.opaque or label in there or inspection.known.attached(label):
            continue
        became = inspection.known.relabelled(samples[0].name, label)
        near = close(label, (*there, *inspection.known.target_labels))
        if became or near or all(sample.owned for sample in samples):
            what = f"unknown label {label!r} of {samples[0].name!r}"
            has = f"did you mean {near!r}?" if near else f"its labels: {shown(sorted(there)) or 'none'}"
            yield Finding(word.start, word.end, what, became or has)


def _unknown_value(inspection: Inspection) -> Iterator[Finding]:
    for selector in inspection.selectors():
        samples = inspection.samples(selector)
        for matcher in selector.matchers:
            declared = _declared(samples, matcher.label.text)
            for word in alternatives(matcher) or () if declared else ():
                if not word.opaque and word.text not in (*declared, OTHER, ""):
                    yield _value(inspection.known, samples[0].name, matcher.label.text, word, declared)


def _value(known: Known, name: str, label: str, word: Word, declared: Sequence[str]) -> Finding:
    near = close(word.text, declared)
    mend = f"did you mean {near!r}?" if near else f"expected one of: {shown(declared)}"
    became = known.relabelled(name, label, word.text)
    return Finding(word.start, word.end, f"unknown value {label}={word.text!r} of {name!r}", became or mend)


def _declared(samples: Sequence[Sample], label: str) -> tuple[str, ...]:
    """The values that a label can have; none where it is open for one of the samples."""
    found = [sample.labels[label] for sample in samples if label in sample.labels]
    return tuple(dict.fromkeys(value for values in found for value in values)) if all(found) else ()


def _lost_label(inspection: Inspection) -> Iterator[Finding]:
    for loss in inspection.flow.losses:
        word = loss.word
        if word is not None:
            yield Finding(word.start, word.end, f"no label {word.text!r} here to use in {loss.keyword}", _left(loss))
    yield from _shared_typos(inspection)


def _left(loss: Loss) -> str:
    names = sorted({name for labels in loss.labels for name in labels.names})
    near = close(loss.word.text, names) if loss.word else ""
    return f"did you mean {near!r}?" if near else f"there are: {shown(names) or 'none'}"


def _shared_typos(inspection: Inspection) -> Iterator[Finding]:
    """Slips in groupings of metrics that others export too, whose labels nobody can list."""
    known = inspection.known
    for node in inspection.nodes():
        below = [inspection.samples(selector) for selector in selectors(node)]
        if not below or not all(below) or all(sample.owned for samples in below for sample in samples):
            continue
        there = {label for samples in below for sample in samples for label in sample.labels}
        for word in (word for grouping in groupings(node) for word in grouping.labels if not word.opaque):
            near = "" if known.attached(word.text) or word.text in there else close(word.text, known.target_labels)
            if near:
                yield Finding(word.start, word.end, f"unknown label {word.text!r}", f"did you mean {near!r}?")


def _unmatched(inspection: Inspection) -> Iterator[Finding]:
    for loss in inspection.flow.losses:
        if loss.word is None:
            sides = " and ".join(f"({shown(sorted(labels.names)) or 'no labels'})" for labels in loss.labels)
            what = f"the sides of {loss.keyword!r} never match: their labels are {sides}"
            yield Finding(
                loss.node.start, loss.node.end, what, "aggregate both alike, or say on (...) or ignoring (...)"
            )


_LEGEND = re.compile(r"\{\{\s*([A-Za-z_][\w]*)\s*\}\}")


def _lost_in_legend(inspection: Inspection) -> Iterator[Finding]:
    legend = inspection.query.legend
    for match in _LEGEND.finditer(legend.value) if legend else ():
        label = match[1]
        if not label.startswith("__") and not inspection.result.has(label, inspection.known):
            there = f"there are: {shown(sorted(inspection.result.names)) or 'none'}"
            yield Finding(*match.span(1), f"no label {label!r} in the result for its legend", there, legend)


_TEMPLATE = re.compile(r"\$labels\.([A-Za-z_]\w*)")


def _lost_in_template(inspection: Inspection) -> Iterator[Finding]:
    for template in inspection.query.templates:
        for match in _TEMPLATE.finditer(template.value):
            if not inspection.result.has(match[1], inspection.known):
                there = f"there are: {shown(sorted(inspection.result.names)) or 'none'}"
                yield Finding(*match.span(1), f"no label {match[1]!r} in the result for $labels", there, template)


# --- types ------------------------------------------------------------------------------------------------------------

_OF_COUNTERS = frozenset(["rate", "irate", "increase", "resets"])
_OF_GAUGES = frozenset(["delta", "idelta", "deriv", "predict_linear", "holt_winters", "double_exponential_smoothing"])


def _wrong_function(
    functions: frozenset[str], kinds: Sequence[str], mend: str
) -> Callable[[Inspection], Iterator[Finding]]:
    """Make a check for functions that make no sense of a kind of metric."""

    def find(inspection: Inspection) -> Iterator[Finding]:
        for call in inspection.nodes():
            if not (isinstance(call, Call) and call.function.text in functions and call.args):
                continue
            selector = _inside(call.args[0])
            samples = inspection.samples(selector) if selector else []
            if samples and all(sample.kind in kinds and not sample.native for sample in samples):
                what = f"{call.function.text}() of the {kinds[0]} {samples[0].name!r}"
                yield Finding(call.function.start, call.function.end, what, mend)

    return find


def _inside(node: Node) -> Selector | None:
    while isinstance(node, Wrapped | Ranged):
        node = node.inner
    return node if isinstance(node, Selector) else None


def _quantile(inspection: Inspection) -> Iterator[Finding]:
    for call, labels in inspection.flow.quantiles:
        name = call.function
        index = 1 if name.text == "histogram_quantile" else 2
        if labels == ANY:
            continue
        kinds = {_histogram(inspection, selector) for selector in selectors(call.args[index])}
        if kinds == {"classic"} and not labels.has("le", inspection.known):
            mend = "keep it: sum by (le, ...) (rate(..._bucket[...]))"
            yield Finding(name.start, name.end, f"{name.text}() of buckets without their label 'le'", mend)
        elif kinds == {"other"}:
            yield Finding(name.start, name.end, f"{name.text}() of what has no buckets", "query a histogram's _bucket")


def _histogram(inspection: Inspection, selector: Selector) -> str:
    """Whether a selector asks for classic buckets, a native histogram, something else, or who knows what."""
    samples = inspection.samples(selector)
    if not samples:
        words = list(metric_words(selector))
        return "classic" if words and all(word.text.endswith("_bucket") for word in words) else "unknown"
    if all(sample.kind == "bucket" and not sample.native for sample in samples):
        return "classic"
    return "native" if any(sample.native for sample in samples) else "other"


_INDIFFERENT = frozenset(
    ["absent", "timestamp", "count", "group"]
)  # what asks whether a series is there, not for its number
_COMPARING = frozenset(["and", "or", "unless", "==", "!=", ">", "<", ">=", "<="])


def _bare_counter(inspection: Inspection) -> Iterator[Finding]:
    if inspection.node is None or inspection.query.variable:
        return
    waiting: list[Node] = [inspection.node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Selector):
            yield from _counter(inspection, node)
        elif isinstance(node, Wrapped):
            waiting.append(node.inner)
        elif isinstance(node, Call | Aggregation):
            name = node.function.text if isinstance(node, Call) else node.op.text.lower()
            waiting.extend(node.args if name not in _INDIFFERENT else ())
        elif isinstance(node, Binary) and node.op not in _COMPARING and not _mean_since_start(node):
            waiting.extend((node.right, node.left))


def _counter(inspection: Inspection, selector: Selector) -> Iterator[Finding]:
    samples = inspection.samples(selector)
    if samples and all(sample.kind in ("counter", "bucket") and not sample.native for sample in samples):
        what = f"the counter {samples[0].name!r} as it is, which falls to 0 at each restart"
        yield Finding(selector.start, selector.end, what, "ask for rate(...[...]) or increase(...[...])")


def _mean_since_start(node: Binary) -> bool:
    """x_sum / x_count, aggregated or not: both fall together."""
    names = [word.text for selector in selectors(node) for word in metric_words(selector)]
    halves = {name.removesuffix("_sum").removesuffix("_count") for name in names}
    bare = node.op == "/" and not any(isinstance(below, Ranged) for below in walk(node))
    return bare and len(names) == 2 and names[0] != names[1] and len(halves) == 1


CHECKS: tuple[Check, ...] = (
    Check("renamed-metric", _unknown_name(_renamed), "a metric by a name that it had once"),
    Check("wrong-suffix", _unknown_name(_suffix), "a sample that a metric of this type does not have"),
    Check("unknown-metric", _unknown_name(_mistyped), "a metric or recording that does not exist, mistyped most often"),
    Check("unknown-label", _unknown_label, "a matcher on a label that the metric does not have"),
    Check("unknown-value", _unknown_value, "a matcher on a value that the label cannot have"),
    Check("lost-label", _lost_label, "a grouping by a label that is not there, or not there any more"),
    Check("never-matches", _unmatched, "an operator between sides whose labels differ"),
    Check("lost-in-legend", _lost_in_legend, "a legend with a label that the result does not have"),
    Check("lost-in-template", _lost_in_template, "a text of an alert with a label that the result does not have"),
    Check(
        "rate-of-gauge",
        _wrong_function(
            _OF_COUNTERS, ("gauge",), "a gauge has no rate: ask for it as it is, or for deriv() or delta()"
        ),
        "rate, increase or resets of a gauge",
    ),
    Check(
        "delta-of-counter",
        _wrong_function(_OF_GAUGES, ("counter", "bucket"), "ask for rate() or increase(), which know of restarts"),
        "delta or deriv of a counter",
    ),
    Check("quantile-without-le", _quantile, "histogram_quantile() of something without buckets, or without `le`"),
    Check("bare-counter", _bare_counter, "a counter whose number is shown as it is"),
)
SYNTAX, UNREADABLE = "syntax", "unreadable-file"


# --- running them -----------------------------------------------------------------------------------------------------


def check(
    document: Document, known: Known, recorded: Mapping[str, Labels], ignore: Iterable[str] = ()
) -> list[Problem]:
    """Return what is wrong with the queries of a document, in its order. recorded: labels of recordings."""
    ignored = frozenset(ignore)
    found: dict[tuple[object, ...], Problem] = {}
    for query in document.queries:
        for name, finding in _findings(query, known, recorded):
            if name not in ignored:
                problem = _problem(document, query, name, finding)
                found.setdefault((problem.check, problem.place, problem.line, problem.column, problem.what), problem)
    return list(found.values())


def _findings(query: Query, known: Known, recorded: Mapping[str, Labels]) -> Iterator[tuple[str, Finding]]:
    text = query.scalar.value
    try:
        node, asked = _read(query)
    except PromqlError as error:
        at = max(0, min(error.position, len(text) - 1))
        yield SYNTAX, Finding(at, min(at + 1, len(text)), f"cannot be read: {error.expected}")
        return
    flow = Flow(known, recorded)
    result = ANY if node is None else flow.of(node)
    inspection = Inspection(query, node, asked, known, flow, result)
    for each in CHECKS:
        for finding in each.find(inspection):
            yield each.name, finding


def _read(query: Query) -> tuple[Node | None, tuple[Word, ...]]:
    text = query.scalar.value
    return parse_variable(text) if query.variable else (parse(text), ())


def _problem(document: Document, query: Query, name: str, finding: Finding) -> Problem:
    where = Query(query.place, finding.of) if finding.of else query
    line, column, end_line, end_column = spanned(document, where, finding.start, finding.end)
    return Problem(name, document.file, line, column, query.place, finding.what, finding.mend, end_line, end_column)


def unreadable(error: AssetError) -> Problem:
    """Make the problem of a file that cannot be read."""
    end = error.column + 1
    return Problem(UNREADABLE, error.file, error.line, error.column, "", error.reason, "", error.line, end)


def recordings(documents: Iterable[Document], known: Known) -> dict[str, Labels]:
    """Return the labels of each recording in some documents. Those that rest on others settle in a few rounds."""
    rules = [(query.record.value, query) for document in documents for query in document.queries if query.record]
    found: dict[str, Labels] = {name: ANY for name, _ in rules}
    for _ in range(5):
        before = dict(found)
        for name, query in rules:
            found[name] = _recorded(query, known, before)
        if found == before:
            break
    return found


def _recorded(query: Query, known: Known, recorded: Mapping[str, Labels]) -> Labels:
    try:
        node, _ = _read(query)
    except PromqlError:
        return ANY
    return ANY if node is None or is_scalar(node) else Flow(known, recorded).of(node).with_(frozenset(query.labels))
