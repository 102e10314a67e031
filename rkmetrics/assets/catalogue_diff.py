"""What changed between two catalogues, and whether it breaks the queries of those who use them.

Catalogues are what `rkmetrics catalogue --json` prints. It breaks when a query that had an answer has none, or
another one: a metric, label or value that is gone, a type or an aggregation that changed. Something more breaks
nothing. What is gone needs an entry that says what became of it (`renamed_from`, or rkmetrics/catalogue/renames.py):
without one nobody can migrate, and the change is an error rather than a breaking change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rkmetrics.catalogue.renames import DROPPED, LABELS, VALUES
from rkmetrics.errors import AssetError

__all__ = ["ADDED", "BREAKS", "CHANGED", "UNEXPLAINED", "CatalogueChange", "diff", "load"]

ADDED, CHANGED, BREAKS, UNEXPLAINED = "added", "changed", "breaks", "unexplained"

Row = Mapping[str, Any]
Explained = tuple[Mapping[str, str], Mapping[tuple[str, str], str], Mapping[tuple[str, str, str], str]]


@dataclass(frozen=True, slots=True)
class CatalogueChange:
    """One difference. effect: ADDED, CHANGED (no query breaks), BREAKS, or UNEXPLAINED (and no entry says how to
    go on).
    """

    metric: str
    effect: str
    what: str

    def __str__(self) -> str:
        return f"{self.effect:<11} {self.metric}: {self.what}"


def load(text: str, file: str) -> list[Row]:
    """Read a catalogue as `rkmetrics catalogue --json` prints it. Raises AssetError."""
    try:
        rows: object = json.loads(text)
    except ValueError as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        raise AssetError(file, line, column, f"not JSON: {error}") from None
    if not isinstance(rows, list) or not all(map(_is_row, cast("list[object]", rows))):
        raise AssetError(file, 1, 1, "not a catalogue; expected what `rkmetrics catalogue --json` prints")
    return cast("list[Row]", rows)


def _is_row(row: object) -> bool:
    if not isinstance(row, dict):
        return False
    typed = cast("dict[str, object]", row)
    return isinstance(typed.get("name"), str) and isinstance(typed.get("labels"), dict) and "type" in typed


def diff(
    old: Iterable[Row], new: Iterable[Row], explained: Explained = (DROPPED, LABELS, VALUES)
) -> list[CatalogueChange]:
    """Return what changed, in the order of the old catalogue, then what is new."""
    before, after = ({str(row["name"]): row for row in rows} for rows in (old, new))
    heirs = {former: row for row in after.values() for former in row.get("renamed_from", ())}
    found: list[CatalogueChange] = []
    for name, row in before.items():
        if name in after:
            found += _within(row, after[name], explained)
        elif name in heirs:
            found.append(CatalogueChange(name, BREAKS, f"renamed to {heirs[name]['name']}: rkmetrics assets migrate"))
            found += _within(row, heirs[name], explained)
        else:
            found.append(_gone(name, "removed", explained[0].get(name)))
    became = {str(row["name"]) for former, row in heirs.items() if former in before}
    found += (
        CatalogueChange(name, ADDED, f"new {after[name]['type']}") for name in after.keys() - before.keys() - became
    )
    return sorted(found, key=lambda change: (_ORDER.index(change.effect), change.metric))


_ORDER: Sequence[str] = (UNEXPLAINED, BREAKS, CHANGED, ADDED)


def _gone(metric: str, what: str, explanation: str | None) -> CatalogueChange:
    if explanation is None:
        return CatalogueChange(metric, UNEXPLAINED, f"{what}, and no entry says what to query instead")
    return CatalogueChange(metric, BREAKS, f"{what}; {explanation or 'nothing takes its place'}")


def _within(old: Row, new: Row, explained: Explained) -> Iterator[CatalogueChange]:
    name = str(new["name"])
    for key, breaks, what in _FIELDS:
        if key in old and key in new and old[key] != new[key]:
            yield CatalogueChange(name, BREAKS if breaks else CHANGED, f"{what}: {old[key]!r} became {new[key]!r}")
    yield from _labels(name, old["labels"], new["labels"], explained)


_FIELDS: Sequence[tuple[str, bool, str]] = (
    ("type", True, "type"),
    ("per_actor_name", True, "labelled by actor_name"),
    ("across", False, "how workers combine"),
    ("buckets", False, "buckets"),
    ("help", False, "help"),
)


def _labels(name: str, old: Row, new: Row, explained: Explained) -> Iterator[CatalogueChange]:
    heirs = {label: explained[1].get((name, label)) for label in old}
    for label, values in old.items():
        today = label if label in new else heirs[label]
        if today and today in new:
            if today != label:
                yield CatalogueChange(name, BREAKS, f"label {label} renamed to {today}: rkmetrics assets migrate")
            yield from _values(name, today, values, new[today], explained)
        else:
            yield _gone(name, f"label {label} removed", today)
    for label in new.keys() - old.keys() - {heir for heir in heirs.values() if heir}:
        yield CatalogueChange(name, CHANGED, f"new label {label}: aggregate it away where sides must match")


def _values(name: str, label: str, old: object, new: object, explained: Explained) -> Iterator[CatalogueChange]:
    if not isinstance(old, list) or not isinstance(new, list):  # open labels are described, not listed
        if isinstance(old, list) != isinstance(new, list):
            yield CatalogueChange(name, CHANGED, f"values of {label}: {old!r} became {new!r}")
        return
    before, after = cast("list[str]", old), cast("list[str]", new)
    for value in before:
        if value not in after:
            heir = explained[2].get((name, label, value))
            said = f"{label}={heir!r} takes its place: rkmetrics assets migrate" if heir else heir
            yield _gone(name, f"value {label}={value!r} removed", said)
    heirs = {explained[2].get((name, label, value)) for value in before}
    for value in after:
        if value not in before and value not in heirs:
            yield CatalogueChange(name, ADDED, f"new value {label}={value!r}")
