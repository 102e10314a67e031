"""Rewrite queries from old names to new ones, in place: what a rename table says is changed, every other byte stays.

Nothing is guessed. A query is rewritten as a whole or not at all, so that none is left half old; what stands in the
way is reported with its place and its reason, and the next run reports it again. Refused are, for instance, a label
that has no successor, a gauge that became a histogram, a pattern that may mean an old name, a name put together from
variables, and a merged metric whose new label would keep two sides of an operator from matching.

A step goes through one table; several (RivetKit's A to C) go one after the other over the text of each query, and
only what all of them could do is written. At the end the new file is read again: if a query does not say what it
should, nothing is written.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rkmetrics.assets.base import Document, Problem, Query, Scalar, spanned
from rkmetrics.assets.documents import document
from rkmetrics.assets.tables import Change, PrefixRule, Table
from rkmetrics.errors import AssetError, PromqlError
from rkmetrics.promql import (
    Aggregation,
    Binary,
    Call,
    Edit,
    Grouping,
    Literal,
    Matcher,
    Node,
    Selector,
    Word,
    alternatives,
    apply,
    children,
    escape,
    groupings,
    metric_words,
    parse,
    parse_variable,
    selectors,
    walk,
)

__all__ = ["NOT_MIGRATED", "Migrated", "Refusal", "Step", "migrate", "rewrite", "write"]

NOT_MIGRATED = "not-migrated"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a query stays as it is, and which part of it is in the way."""

    start: int
    end: int
    why: str


@dataclass(slots=True)
class Migrated:
    """A file after its migration. queries: how many were rewritten; problems: those that could not be."""

    file: str
    before: str
    text: str
    queries: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])

    @property
    def changed(self) -> bool:
        return self.text != self.before


def migrate(before: Document, tables: Sequence[Table], labels: Mapping[str, str] | None = None) -> Migrated:
    """Rewrite the queries of a document. labels: what labels without a successor shall become, as its owner says."""
    edits: list[Edit] = []
    wanted: list[str] = []
    problems: list[Problem] = []
    count = 0
    for query in before.queries:
        text, found, refusal = _through(query, tables, labels or {})
        placed = [query.scalar.edit(edit) for edit in found]
        if None in placed:
            refusal = Refusal(found[0].start, found[0].end, "the way it is written cannot hold the new text; quote it")
        if refusal is not None:
            problems.append(_problem(before, query, refusal))
            wanted.append(query.scalar.value)
            continue
        edits += [edit for edit in placed if edit is not None]
        edits += _legend_edits(query, tables, labels or {}) if found else []
        wanted.append(text)
        count += bool(found)
    return _verified(before, apply(before.text, edits), wanted, Migrated(before.file, before.text, "", count, problems))


def write(path: Path, text: str) -> None:
    """Put a new text into a file: all of it or nothing, and the file keeps its mode."""
    path = path.resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
        os.chmod(name, path.stat().st_mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _verified(before: Document, text: str, wanted: Sequence[str], migrated: Migrated) -> Migrated:
    """Read the new text as a file: it says what it should, or all stays as it was."""
    migrated.text = text
    try:
        says = [query.scalar.value for query in document(before.file, text).queries]
    except AssetError as error:
        says = [str(error)]
    if says != list(wanted):
        migrated.text, migrated.queries = before.text, 0
        why = "the rewritten file would not say what it should; nothing is written (quote its queries)"
        migrated.problems = [Problem(NOT_MIGRATED, before.file, 1, 1, "", why)]
    return migrated


def _problem(before: Document, query: Query, refusal: Refusal) -> Problem:
    line, column, end_line, end_column = spanned(before, query, refusal.start, refusal.end)
    return Problem(NOT_MIGRATED, before.file, line, column, query.place, refusal.why, "", end_line, end_column)


# --- one query through all tables -------------------------------------------------------------------------------------


def rewrite(
    text: str, tables: Iterable[Table], labels: Mapping[str, str] | None = None, *, variable: bool = False
) -> tuple[str, list[Edit], Refusal | None]:
    """Return a query after all tables, the edits of the original that lead there, and what refused them.

    A query that cannot be read is left alone: it may not be PromQL. If it has a name that changed, that is said. With a
    refusal the text is the original.
    """
    tables = tuple(tables)
    now, origin = text, list(range(len(text)))
    for table in tables:
        try:
            node, asked = parse_variable(now) if variable else (parse(now), ())
        except PromqlError as error:
            return text, [], _unread(text, tables, error)
        step = Step(now, node, asked, table, labels or {})
        edits = step.edits()
        if step.refusals:
            first = step.refusals[0]
            return text, [], Refusal(*_original(origin, first.start, first.end, len(text)), first.why)
        origin = _composed(origin, edits)
        now = apply(now, edits)
    return now, _edits(now, origin, len(text)), None


def _through(
    query: Query, tables: Iterable[Table], labels: Mapping[str, str]
) -> tuple[str, list[Edit], Refusal | None]:
    return rewrite(query.scalar.value, tables, labels, variable=query.variable)


_WORD = re.compile(r"[A-Za-z_:][\w:]*")


def _unread(text: str, tables: Iterable[Table], error: PromqlError) -> Refusal | None:
    for word in _WORD.finditer(text):
        if any(table.concerns(word[0]) for table in tables):
            return Refusal(*word.span(), f"{word[0]!r} changed, but the query cannot be read: {error.expected}")
    return None


_NEW = -1  # the origin of a character that was not in the original


def _composed(origin: list[int], edits: Iterable[Edit]) -> list[int]:
    """The origins of characters after some edits."""
    found: list[int] = []
    at = 0
    for edit in sorted(set(edits)):
        found += origin[at : edit.start]
        found += [_NEW] * len(edit.text)
        at = edit.end
    return found + origin[at:]


def _edits(now: str, origin: Sequence[int], length: int) -> list[Edit]:
    """Return the edits of the original that make the text of today."""
    found: list[Edit] = []
    at, new = 0, ""
    for character, where in zip(f"{now}\0", (*origin, length), strict=True):
        if where == _NEW:
            new += character
            continue
        if new or where > at:
            found.append(Edit(at, where, new))
        at, new = where + 1, ""
    return found


def _original(origin: Sequence[int], start: int, end: int, length: int) -> tuple[int, int]:
    """The span of the original that a span of today came from, as nearly as it is still there."""
    kept = [where for where in origin[start:end] if where != _NEW]
    if kept:
        return kept[0], kept[-1] + 1
    before = next((where for where in reversed(origin[:start]) if where != _NEW), -1) + 1
    return before, min(before + 1, length)


# --- one query, one table ---------------------------------------------------------------------------------------------


class Step:
    """One query on its way through one table. `edits` says what to do; `refusals`, filled by then, what forbids it."""

    def __init__(
        self, text: str, node: Node | None, asked: Sequence[Word], table: Table, labels: Mapping[str, str]
    ) -> None:
        self.text, self.node, self.asked, self.table, self.labels = text, node, asked, table, labels
        self.refusals: list[Refusal] = []
        self._nodes = [] if node is None else list(walk(node))
        self._parents = {id(child): parent for parent in self._nodes for child in children(parent)}
        self._changes: dict[int, list[Change]] = {}

    def edits(self) -> list[Edit]:
        """Return what to change. Nothing of it may be done if there are refusals."""
        found: list[Edit] = []
        for selector in self._nodes:
            if isinstance(selector, Selector):
                found += self._of_selector(selector)
        for node in self._nodes:
            found += (edit for grouping in groupings(node) for edit in self._of_grouping(node, grouping))
            self._look_at_strings(node)
        return [*found, *self._of_asked()]

    def _refuse(self, where: Word | Node | Matcher, why: str) -> None:
        self.refusals.append(Refusal(where.start, where.end, why))

    # --- selectors ----------------------------------------------------------------------------------------------------

    def _of_selector(self, selector: Selector) -> Iterator[Edit]:
        self._look_at_patterns(selector)
        words = list(metric_words(selector))
        for word in words:
            if word.opaque:
                self._look_at_variable(word)
                continue
            new = self._new_name(selector, word, alone=len(words) == 1)
            written = None if new is None or new == word.text else escape(new, word.quote)
            if written is not None:
                yield Edit(word.start, word.end, written)
        for change in self._changes.get(id(selector), ()):
            yield from self._matchers(selector, change)
            yield from self._merged(selector, change)

    def _new_name(self, selector: Selector, word: Word, *, alone: bool) -> str | None:
        if word.text in self.table.dead:
            self._refuse(word, f"no version exported {word.text!r}: the query was always empty")
            return None
        candidates, suffix = self.table.find(word.text)
        if not candidates:
            return self._without_prefix(word, self.table.prefix) if self.table.prefix else None
        change = self._chosen(selector, word, candidates)
        if change is None or not self._allowed(selector, word, change, alone=alone):
            return None
        self._changes.setdefault(id(selector), []).append(change)
        return change.new + suffix

    def _without_prefix(self, word: Word, rule: PrefixRule) -> str | None:
        if rule.unknown(word.text):
            self._refuse(word, f"{word.text!r} begins like names that lost {rule.strip!r}, but is none that is known")
            return None
        return rule.apply(word.text)

    def _chosen(self, selector: Selector, word: Word, candidates: Sequence[Change]) -> Change | None:
        """Of several metrics that became one, the one that the matchers ask for."""
        fitting = [change for change in candidates if all(_asks(selector, *need) for need in change.needs)]
        if len(fitting) == 1:
            return fitting[0]
        known = " or ".join(f'{label}="{value}"' for change in candidates for label, value in change.needs)
        self._refuse(word, f"{word.text!r} is made of several metrics: say which by {known or 'a matcher'}")
        return None

    def _allowed(self, selector: Selector, word: Word, change: Change, *, alone: bool) -> bool:
        before = len(self.refusals)
        if not change.new:
            self._refuse(word, f"{word.text!r} has no successor: {change.why or 'it was removed'}")
        elif change.cannot:
            self._refuse(word, f"{word.text!r} became {change.new!r}, but {change.why}: write the query anew")
        elif change.only_in and self._aggregation(selector) not in change.only_in:
            only = " or ".join(f"{name}()" for name in change.only_in)
            self._refuse(
                word, f"{word.text!r} became {change.new!r}, which means the same inside {only} only: {change.why}"
            )
        elif (change.adds or change.needs) and not alone:
            self._refuse(word, f"{word.text!r} needs matchers of its own, and is one of several names here")
        return len(self.refusals) == before

    def _aggregation(self, node: Node) -> str:
        """The aggregation that a selector is directly in."""
        parent = self._parents.get(id(node))
        while parent is not None and not isinstance(parent, Aggregation | Binary | Call):
            parent = self._parents.get(id(parent))
        return parent.op.text.lower() if isinstance(parent, Aggregation) else ""

    def _look_at_patterns(self, selector: Selector) -> None:
        for matcher in selector.matchers:
            if matcher.label.text == "__name__" and alternatives(matcher) is None:
                head = re.split(r"[\\^$.|?*+()\[\]{}]", matcher.value.text.lstrip("^("), maxsplit=1)[0]
                if self._may_begin(head):
                    self._refuse(matcher, f"the pattern {matcher.value.text!r} may mean names that changed")

    def _look_at_variable(self, word: Word) -> None:
        if self._may_begin(re.split(r"\$|\[\[", word.text, maxsplit=1)[0]):
            self._refuse(word, f"the name {word.text!r} is put together from variables, and may be one that changed")

    def _may_begin(self, head: str) -> bool:
        """Whether a name that changed may begin like this."""
        if len(head) < 2:
            return False
        strip = self.table.prefix.strip if self.table.prefix else ""
        families = self.table.prefix.families if self.table.prefix and self.table.prefix.add else ()
        names = (*self.table.changes, *families)
        return bool(strip and head.startswith(strip)) or any(name.startswith(head) for name in names)

    # --- matchers -----------------------------------------------------------------------------------------------------

    def _new_label(self, change: Change, label: str) -> tuple[str, str] | None:
        """What became of a label: (new name, ""), ("", why it has none), or None where it stays as it is."""
        renamed = dict(change.labels)
        if label in renamed:
            return (renamed[label], "") if renamed[label] else self._told(label, "it was removed")
        if label in self.table.gone:
            return self._told(label, self.table.gone[label])
        if any(label == need for need, _ in change.needs):
            return "", f"{change.new!r} has no such label"
        return None

    def _told(self, label: str, why: str) -> tuple[str, str]:
        return (self.labels[label], "") if label in self.labels else ("", why)

    def _matchers(self, selector: Selector, change: Change) -> Iterator[Edit]:
        for matcher in selector.matchers:
            label = matcher.label
            if (label.text, matcher.value.text) in change.needs and matcher.op == "=":
                yield self._without(selector, matcher)
                continue
            new = self._new_label(change, label.text)
            yield from self._label(label, new)
            yield from self._values(matcher, change, new[0] if new and new[0] else label.text)

    def _label(self, word: Word, new: tuple[str, str] | None) -> Iterator[Edit]:
        if new is None:
            return
        name, why = new
        written = escape(name, word.quote) if name else None
        if written is None:
            self._refuse(word, f"label {word.text!r} has no successor: {why}")
        else:
            yield Edit(word.start, word.end, written)

    def _values(self, matcher: Matcher, change: Change, label: str) -> Iterator[Edit]:
        table = {old: new for name, old, new in change.values if name == label}
        words = alternatives(matcher) if table else ()
        if words is None:
            self._refuse(matcher, f"the pattern {matcher.value.text!r} may mean values of {label!r} that changed")
        for word in words or ():
            if word.text not in table or word.opaque:
                continue
            written = escape(table[word.text], word.quote) if table[word.text] else None
            if written is None:
                self._refuse(word, f"value {label}={word.text!r} has no successor")
            else:
                yield Edit(word.start, word.end, written)

    def _without(self, selector: Selector, matcher: Matcher) -> Edit:
        """Take a matcher out, with a comma, or with the braces where it was alone in them."""
        after = re.compile(r"[ \t\r\n]*,").match(self.text, matcher.end)
        if after:
            return Edit(matcher.start, after.end(), "")
        before = re.compile(r",[ \t\r\n]*\Z").search(self.text, 0, matcher.start)
        if before and before.start() >= selector.brace:
            return Edit(before.start(), matcher.end, "")
        alone = len(selector.matchers) == 1 and selector.name is not None and selector.name.end < selector.brace
        return Edit(selector.brace - 1, selector.end, "") if alone else Edit(matcher.start, matcher.end, "")

    def _merged(self, selector: Selector, change: Change) -> Iterator[Edit]:
        """Ask the new name for what the old one was."""
        if not change.adds:
            return
        for label, _ in change.adds:
            if any(matcher.label.text == label for matcher in selector.matchers):
                self._refuse(
                    selector, f"the new name {change.new!r} is asked for {label!r}, which the query has already"
                )
            self._look_at_operators(selector, label, change)
        asked = ",".join(f'{label}="{value}"' for label, value in change.adds)
        if selector.brace >= 0:
            yield Edit(selector.brace, selector.brace, f"{asked},")
        else:
            yield Edit(selector.end, selector.end, f"{{{asked}}}")

    def _look_at_operators(self, selector: Selector, label: str, change: Change) -> None:
        """A label more on one side keeps it from matching the other, unless it is aggregated away before."""
        node: Node = selector
        while (parent := self._parents.get(id(node))) is not None:
            if isinstance(parent, Aggregation) and not _keeps(parent, label):
                return
            if isinstance(parent, Binary) and _matches_on(parent, label) and _series_on(parent, node):
                why = f"{change.new!r} has the label {label!r} more, so the sides of {parent.op!r} would not match"
                self._refuse(selector, f"{why}: write sum without ({label}) (...) around it first")
                return
            node = parent

    # --- labels elsewhere ---------------------------------------------------------------------------------------------

    def _of_grouping(self, node: Node, grouping: Grouping) -> Iterator[Edit]:
        for word in grouping.labels:
            if not word.opaque:
                yield from self._of_label(word, node)

    def _of_label(self, word: Word, node: Node) -> Iterator[Edit]:
        """A label that belongs to all selectors below a node: all changed alike, or it cannot be told whose it is."""
        fates = {self._fate(selector, word.text) for selector in selectors(node)}
        lost = next((fate for fate in fates if fate and not fate[0]), None)
        if lost:
            yield from self._label(word, lost)
        elif len(fates) > 1:
            self._refuse(word, f"label {word.text!r} belongs to metrics that changed and to others that did not")
        else:
            yield from self._label(word, next(iter(fates), None))

    def _fate(self, selector: Selector, label: str) -> tuple[str, str] | None:
        fates = (self._new_label(change, label) for change in self._changes.get(id(selector), ()))
        return next((fate for fate in fates if fate is not None), None)

    def _look_at_strings(self, node: Node) -> None:
        """label_replace(), label_join() and others name labels in strings, of which nobody rewrites a part."""
        if isinstance(node, Call) and node.function.text in _NAMING:
            for arg in node.args:
                text = arg.value.text if isinstance(arg, Literal) and arg.value.quote else ""
                if text and any(self._fate(selector, text) for selector in selectors(node)):
                    self._refuse(arg, f"label {text!r} changed, and {node.function.text}() has it in a string")

    def _of_asked(self) -> Iterator[Edit]:
        for word in self.asked:
            if self.node is not None:
                yield from self._of_label(word, self.node)
            elif word.text in self.table.gone:
                yield from self._label(word, self._told(word.text, self.table.gone[word.text]))


_NAMING = frozenset(["label_replace", "label_join", "sort_by_label", "sort_by_label_desc"])
_KEEPING = frozenset(["topk", "bottomk", "limitk", "limit_ratio"])


def _asks(selector: Selector, label: str, value: str) -> bool:
    return any(m.label.text == label and m.op == "=" and m.value.text == value for m in selector.matchers)


def _keeps(node: Aggregation, label: str) -> bool:
    """Whether a label is still there after an aggregation."""
    if node.op.opaque or node.op.text.lower() in _KEEPING:
        return True
    words = {word.text for word in node.grouping.labels} if node.grouping else set[str]()
    by = node.grouping is None or node.grouping.keyword == "by"
    return (label in words or any(word.opaque for word in (node.grouping.labels if node.grouping else ()))) == by


def _matches_on(node: Binary, label: str) -> bool:
    """Whether an operator compares this label of its sides."""
    if node.matching is None:
        return node.op != "or"
    words = {word.text for word in node.matching.labels}
    return (label in words) == (node.matching.keyword == "on")


def _series_on(node: Binary, side: Node) -> bool:
    """Whether there are series on the other side."""
    other = node.right if side is node.left else node.left
    return any(True for _ in selectors(other))


# --- legends ----------------------------------------------------------------------------------------------------------

_LEGEND = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


def _legend_edits(query: Query, tables: Iterable[Table], labels: Mapping[str, str]) -> list[Edit]:
    """A legend's {{label}} follows its query: only where the whole query renamed the label."""
    legend = query.legend
    if legend is None:
        return []
    names = _names(query.scalar)
    renamed: dict[str, str] = {}
    for table in tables:
        used = [change for name in names for change in table.find(name)[0]]
        renamed.update((old, labels[old]) for old in table.gone if used and old in labels)
        renamed.update((old, new) for change in used for old, new in change.labels if new)
    matches = (match for match in _LEGEND.finditer(legend.value) if match[1] in renamed)
    found = (legend.edit(Edit(*match.span(1), renamed[match[1]])) for match in matches)
    return [edit for edit in found if edit is not None]


def _names(scalar: Scalar) -> list[str]:
    return [word.text for selector in selectors(parse(scalar.value)) for word in metric_words(selector)]
