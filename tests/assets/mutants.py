"""Ways in which a query goes wrong by one slip or one forgotten edit: what checks are there to find.

`mutants` yields each kind for each place of a query. What a variable of Grafana stands in is left alone, as nobody can
tell; so are values of open labels.
"""

from __future__ import annotations

from collections.abc import Iterator

from rkmetrics.assets.known import TARGET_LABELS, Known
from rkmetrics.catalogue import sets
from rkmetrics.promql import (
    Aggregation,
    Call,
    Edit,
    Ranged,
    Selector,
    Word,
    alternatives,
    apply,
    label_words,
    metric_words,
    parse,
    selectors,
    walk,
)

__all__ = ["mutants", "slips"]

KNOWN = Known(definition for each in sets() for definition in each.definitions())


def slips(word: str) -> Iterator[str]:
    """Yield a word with a letter too few, too many, twisted or wrong, near its beginning, middle and end."""
    for at in sorted({1, len(word) // 2, len(word) - 2}):
        if 0 < at < len(word) - 1:
            yield word[:at] + word[at + 1 :]
            yield word[:at] + word[at] + word[at:]
            yield word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            yield word[:at] + "q" + word[at + 1 :]


def mutants(query: str) -> Iterator[tuple[str, str]]:
    """Yield the kind of each mutant and its text; none says what the query said."""
    node = parse(query)
    for selector in selectors(node):
        for word in metric_words(selector):
            yield from _each(query, "metric", word, frozenset(KNOWN.samples))
        yield from _values(query, selector)
    for word in label_words(node):
        yield from _each(query, "label", word, TARGET_LABELS)
    for found in walk(node):
        if isinstance(found, Aggregation) and found.grouping and found.grouping.labels:
            yield from _groupings(query, found)
        if isinstance(found, Call):
            yield from _functions(query, found)


def _each(query: str, kind: str, word: Word, taken: frozenset[str]) -> Iterator[tuple[str, str]]:
    if not word.opaque:
        for slip in slips(word.text):
            if slip not in taken and slip != word.text:
                yield kind, apply(query, [Edit(word.start, word.end, slip)])


def _values(query: str, selector: Selector) -> Iterator[tuple[str, str]]:
    sample = next((KNOWN.samples.get(word.text) for word in metric_words(selector)), None)
    for matcher in selector.matchers if sample else ():
        declared = sample.labels.get(matcher.label.text, ()) if sample else ()
        for word in alternatives(matcher) or () if declared else ():
            yield from _each(query, "value", word, frozenset(declared))


def _groupings(query: str, node: Aggregation) -> Iterator[tuple[str, str]]:
    """A label that belongs to another metric, and buckets without le."""
    assert node.grouping is not None
    first, last = node.grouping.labels[0], node.grouping.labels[-1]
    names = [word.text for selector in selectors(node) for word in metric_words(selector)]
    if all(name in KNOWN.samples and KNOWN.samples[name].owned for name in names):
        yield "grouping", apply(query, [Edit(last.end, last.end, ", no_such_label")])
    for word in node.grouping.labels:
        if word.text == "le":
            yield "le", apply(query, [Edit(first.start, last.end, "actor_name")])


def _functions(query: str, call: Call) -> Iterator[tuple[str, str]]:
    """A counter without its rate, a gauge with one."""
    name = call.function
    if name.text in ("rate", "increase"):
        ranged = call.args[0]
        if isinstance(ranged, Ranged) and "histogram_quantile" not in query and "> " not in query:
            yield "function", apply(query, [Edit(call.start, call.end, query[ranged.inner.start : ranged.inner.end])])
        yield "function", apply(query, [Edit(name.start, name.end, "deriv")])
    if name.text == "deriv":
        yield "function", apply(query, [Edit(name.start, name.end, "rate")])
