"""What readers of dashboards and rule files hand over: strings that know where they stand, and queries made of them.

A Scalar maps each of its characters to the file, through escapes and folded lines, so that what is found inside a query
has a line and a column, and an edit inside it becomes an edit of the file that leaves every other byte alone.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rkmetrics.promql import Edit

__all__ = ["Document", "Node", "Problem", "Query", "Scalar", "spanned", "trees"]


def _json(text: str) -> str | None:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _single(text: str) -> str | None:
    return None if "\n" in text else text.replace("'", "''")


def _plain(text: str) -> str | None:
    return None if any(mark in text for mark in ("\n", ": ", " #")) else text


def _flow(text: str) -> str | None:
    return None if set(",[]{}") & set(text) else _plain(text)


def _block(text: str) -> str | None:
    return None if "\n" in text else text


# How a string is written, and how a text stands inside such a one; None where it cannot.
STYLES: Mapping[str, Callable[[str], str | None]] = {
    "json": _json,
    "double": _json,  # YAML 1.2, 7.3.1: JSON's escapes are among its own
    "single": _single,
    "plain": _plain,
    "flow": _flow,  # plain inside { } or [ ]
    "block": _block,
}


@dataclass(frozen=True, slots=True)
class Scalar:
    """A string in a file. offsets: where each character of it begins in the file, and where the last one ends."""

    value: str
    offsets: Sequence[int]
    style: str

    def edit(self, edit: Edit) -> Edit | None:
        """Turn an edit of the string into one of the file; None where its style cannot hold the new text."""
        encoded = STYLES[self.style](edit.text)
        return None if encoded is None else Edit(self.offsets[edit.start], self.offsets[edit.end], encoded)


# A file as a tree: mappings, sequences, and scalars for all else (numbers too, as they are written).
Node = dict[str, "Node"] | list["Node"] | Scalar


@dataclass(frozen=True, slots=True)
class Query:
    """A query in a file, and what goes with it.

    place: "panel 'Queue depth', target A". variable: whether it is a dashboard variable's. record: the name that a
    recording rule gives it. legend: text with {{label}} in it. labels: those that a rule adds. templates: texts with
    {{ $labels.label }} in them.
    """

    place: str
    scalar: Scalar
    variable: bool = False
    record: Scalar | None = None
    legend: Scalar | None = None
    labels: tuple[str, ...] = ()
    templates: tuple[Scalar, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A file that was read. kind: "dashboard" or "rules"."""

    file: str
    text: str
    kind: str
    queries: tuple[Query, ...]
    _lines: list[int] = field(default_factory=list[int], compare=False, repr=False)

    def position(self, offset: int) -> tuple[int, int]:
        """Return line and column of an offset, both from 1."""
        line = bisect_right(self._begins(), offset)
        return line, offset - self._lines[line - 1] + 1

    def offset(self, line: int, column: int) -> int:
        """Return the offset of a line and column."""
        return self._begins()[line - 1] + column - 1

    def _begins(self) -> list[int]:
        if not self._lines:
            self._lines.extend([0, *(i + 1 for i, character in enumerate(self.text) if character == "\n")])
        return self._lines


@dataclass(frozen=True, slots=True)
class Problem:
    """What a check found: where, what is wrong, and what to write instead. mend: "" where nobody can say."""

    check: str
    file: str
    line: int
    column: int
    place: str
    what: str
    mend: str = ""
    end_line: int = 0
    end_column: int = 0


def spanned(document: Document, query: Query, start: int, end: int) -> tuple[int, int, int, int]:
    """Return line, column, end line and end column of a part of a query."""
    offsets = query.scalar.offsets
    last = len(offsets) - 1
    return (*document.position(offsets[min(start, last)]), *document.position(offsets[min(end, last)]))


def trees(node: Node) -> Iterable[dict[str, Node]]:
    """Yield every mapping of a tree, outer ones first, in the order of the file."""
    waiting: list[Node] = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(reversed(list(node.values())))
        elif isinstance(node, list):
            waiting.extend(reversed(node))
