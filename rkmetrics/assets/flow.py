"""Follow labels through a query: which ones does each part of it still have?

PromQL says it for every operator: an aggregation keeps what it groups by, `on` what it matches on, a function what
its vector has (Prometheus, "Operators", "Functions"). Only names are followed, never values. What cannot be known (a
foreign metric, a variable) may have any label, so nothing is said about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rkmetrics.assets.known import Known
from rkmetrics.promql import (
    Aggregation,
    Binary,
    Call,
    Grouping,
    Literal,
    Node,
    Ranged,
    Selector,
    Word,
    Wrapped,
    metric_words,
)

__all__ = ["ANY", "Flow", "Labels", "Loss", "is_scalar", "labels_of"]


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a part: `names`, with those that targets attach where `target`, or whatever where `any`."""

    names: frozenset[str] = frozenset()
    target: bool = False
    any: bool = False
    removed: frozenset[str] = frozenset()

    def has(self, label: str, known: Known) -> bool:
        """Whether the label may be there."""
        if label in self.removed:
            return False
        return label in self.names or self.any or (self.target and known.attached(label))

    def without(self, labels: frozenset[str]) -> Labels:
        return replace(self, names=self.names - labels, removed=self.removed | labels)

    def with_(self, labels: frozenset[str]) -> Labels:
        return replace(self, names=self.names | labels, removed=self.removed - labels)


ANY = Labels(any=True)
NONE = Labels()

# Where the vector is among a function's arguments, if it is not the first.
_VECTOR: Mapping[str, int] = {"histogram_quantile": 1, "quantile_over_time": 1, "histogram_fraction": 2}
_SCALARS = frozenset(
    [
        "scalar",
        "time",
        "pi",
        "vector",
        "minute",
        "hour",
        "month",
        "year",
        "day_of_month",
        "day_of_week",
        "days_in_month",
    ]
)
_FREE = frozenset(("info",))  # adds labels that nobody can list
_KEEPING = frozenset(["topk", "bottomk", "limitk", "limit_ratio"])
_SETS = frozenset(("and", "or", "unless"))


@dataclass(frozen=True, slots=True)
class Loss:
    """A label that is not there where a query names it, or sides that cannot match (word is None)."""

    node: Node
    word: Word | None
    keyword: str
    labels: tuple[Labels, ...]


class Flow:
    """One walk over a query. `losses` holds what was found, `of` the labels of parts that were asked for."""

    def __init__(self, known: Known, recordings: Mapping[str, Labels] | None = None) -> None:
        self.known, self.recordings = known, recordings or {}
        self.losses: list[Loss] = []
        self.quantiles: list[tuple[Call, Labels]] = []

    def of(self, node: Node) -> Labels:
        """Return the labels of a part, and note what is lost on the way."""
        if isinstance(node, Selector):
            return self._selector(node)
        if isinstance(node, Wrapped | Ranged):
            return self.of(node.inner)
        if isinstance(node, Aggregation):
            return self._aggregation(node)
        if isinstance(node, Binary):
            return self._binary(node)
        return self._call(node) if isinstance(node, Call) else NONE

    def _selector(self, node: Selector) -> Labels:
        return labels_of(node, self.known, self.recordings)

    def _aggregation(self, node: Aggregation) -> Labels:
        operands = [self.of(arg) for arg in node.args]
        operand = operands[-1] if operands else ANY
        grouping = node.grouping
        self._note(node, grouping, operand)
        op = node.op.text.lower()
        if op in _KEEPING:
            return operand
        words = frozenset(word.text for word in grouping.labels) if grouping else frozenset[str]()
        if node.op.opaque or (grouping and any(word.opaque for word in grouping.labels)):
            return ANY
        kept = operand.without(words) if grouping and grouping.keyword == "without" else Labels(words)
        return kept.with_(_text_of(node.args[:1])) if op == "count_values" else kept

    def _call(self, node: Call) -> Labels:
        operands = [self.of(arg) for arg in node.args]
        name = node.function.text
        if node.function.opaque or name in _FREE:
            return ANY
        if name in _SCALARS:
            return NONE
        index = _VECTOR.get(name, 0)
        operand = operands[index] if index < len(operands) else NONE
        if name in ("histogram_quantile", "histogram_fraction"):
            self.quantiles.append((node, operand))
            return operand.without(frozenset(("le",)))
        if name in ("label_replace", "label_join"):
            return operand.with_(_text_of(node.args[1:2]))
        return _asked(node) if name.startswith("absent") else operand

    def _binary(self, node: Binary) -> Labels:
        left, right = self.of(node.left), self.of(node.right)
        if is_scalar(node.left) or is_scalar(node.right):
            return right if is_scalar(node.left) else left
        matching, include = node.matching, node.include
        self._note(node, matching, left, right)
        if matching is None and node.op != "or" and _never_match(left, right, self.known):
            self.losses.append(Loss(node, None, node.op, (left, right)))
        if node.op in _SETS:
            return left if node.op != "or" else _union(left, right)
        if matching is not None and any(word.opaque for word in matching.labels):
            return ANY
        return self._matched(left, right, matching, include)

    def _matched(self, left: Labels, right: Labels, matching: Grouping | None, include: Grouping | None) -> Labels:
        many = right if include and include.keyword == "group_right" else left
        if include:
            one = left if many is right else right
            for word in include.labels:
                if not word.opaque and not one.has(word.text, self.known):
                    self.losses.append(Loss(Node(word.start, word.end), word, include.keyword, (one,)))
            return many.with_(frozenset(word.text for word in include.labels))
        if matching is None:
            return many
        words = frozenset(word.text for word in matching.labels)
        return Labels(words) if matching.keyword == "on" else many.without(words)

    def _note(self, node: Node, grouping: Grouping | None, *operands: Labels) -> None:
        """Note labels of a grouping that are not there: `on` needs them on both sides, the others somewhere."""
        if grouping is None:
            return
        enough = all if grouping.keyword == "on" else any
        for word in grouping.labels:
            if not word.opaque and not enough(operand.has(word.text, self.known) for operand in operands):
                self.losses.append(Loss(node, word, grouping.keyword, operands))


def labels_of(node: Selector, known: Known, recordings: Mapping[str, Labels]) -> Labels:
    """Return the labels of what a selector asks for; ANY unless all of its names are known."""
    found: list[Labels] = []
    for word in metric_words(node):
        sample = known.samples.get(word.text)
        if word.text in recordings:
            found.append(recordings[word.text])
        elif sample is None:
            return ANY
        else:
            found.append(Labels(frozenset(sample.labels), target=True, any=not sample.owned))
    if not found:
        return ANY
    merged = found[0]
    for labels in found[1:]:
        merged = _union(merged, labels)
    return merged


def is_scalar(node: Node) -> bool:
    """Whether a part is a number rather than series; a variable alone counts as one."""
    if isinstance(node, Wrapped):
        return is_scalar(node.inner)
    if isinstance(node, Binary):
        return is_scalar(node.left) and is_scalar(node.right)
    if isinstance(node, Call):
        return node.function.text in ("scalar", "time", "pi")
    if isinstance(node, Selector):
        return node.name is not None and node.name.opaque and not node.matchers
    return isinstance(node, Literal)


def _union(a: Labels, b: Labels) -> Labels:
    return Labels(a.names | b.names, a.target or b.target, a.any or b.any, a.removed & b.removed)


def _never_match(a: Labels, b: Labels, known: Known) -> bool:
    """Whether two sides can have no series with equal labels: one surely has a label that the other cannot have."""
    if a.any or b.any:
        return False
    lacks_a = any(not a.has(label, known) for label in _sure(b, known))
    return lacks_a or any(not b.has(label, known) for label in _sure(a, known))


def _sure(labels: Labels, known: Known) -> frozenset[str]:
    """The labels that are there and not empty. Every target has job and instance; cluster and the like, perhaps."""
    names = labels.names | (_ALWAYS - labels.removed if labels.target else NONE.names)
    return frozenset(name for name in names if name in _ALWAYS or not known.attached(name))


_ALWAYS = frozenset(("job", "instance"))


def _text_of(args: tuple[Node, ...]) -> frozenset[str]:
    return frozenset(arg.value.text for arg in args if isinstance(arg, Literal) and arg.value.quote)


def _asked(node: Call) -> Labels:
    """absent() has the labels that its selector compares by `=`."""
    return Labels(frozenset(_equal(node.args)))


def _equal(args: tuple[Node, ...]) -> Iterator[str]:
    for arg in args:
        while isinstance(arg, Wrapped | Ranged):
            arg = arg.inner
        if isinstance(arg, Selector):
            yield from (matcher.label.text for matcher in arg.matchers if matcher.op == "=")
