"""Check files: read them all, learn what they record, then look at each query. `rkmetrics assets check` is this."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rkmetrics.assets.base import Document, Problem
from rkmetrics.assets.documents import found, read
from rkmetrics.assets.known import Known
from rkmetrics.assets.rules import check, recordings, unreadable
from rkmetrics.assets.tables import named, rivetkit_families
from rkmetrics.catalogue import sets as shipped
from rkmetrics.definition import MetricDefinition
from rkmetrics.errors import AssetError

__all__ = ["Checked", "check_documents", "check_files"]


class Checked(list[Problem]):
    """The problems found. files and queries: how much was looked at."""

    files = 0
    queries = 0


def check_files(
    paths: Iterable[Path],
    definitions: Iterable[MetricDefinition] = (),
    *,
    tables: Sequence[str] = (),
    labels: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Checked:
    """Check files, and what is below folders. definitions: an application's own, beside those that ship.

    tables: further rename tables whose old names are reported. labels: what relabelling attaches. Raises OSError for
    a file that is not there.
    """
    documents: list[Document] = []
    broken: list[Problem] = []
    for path in found(paths):
        try:
            documents.append(read(path))
        except AssetError as error:
            broken.append(unreadable(error))
    ignored = frozenset(ignore)
    checked = check_documents(documents, definitions, tables=tables, labels=labels, ignore=ignored)
    checked.files = len(documents) + len(broken)
    checked[:0] = [problem for problem in broken if problem.check not in ignored]
    return checked


def check_documents(
    documents: Sequence[Document],
    definitions: Iterable[MetricDefinition] = (),
    *,
    tables: Sequence[str] = (),
    labels: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Checked:
    """Check documents that were read; each may name what another records."""
    known_definitions = _with_shipped(definitions)
    steps = [step for name in ("catalogue", *tables, "rivetkit:B-C") for step in named(name, known_definitions)]
    names = {query.record.value for document in documents for query in document.queries if query.record}
    known = Known(known_definitions, steps, labels=labels, recordings=names, foreign=rivetkit_families())
    recorded = recordings(documents, known)
    ignored = tuple(ignore)
    checked = Checked(problem for document in documents for problem in check(document, known, recorded, ignored))
    checked.files, checked.queries = len(documents), sum(len(document.queries) for document in documents)
    return checked


def _with_shipped(definitions: Iterable[MetricDefinition]) -> tuple[MetricDefinition, ...]:
    every = [definition for each in shipped() for definition in each.definitions()]
    return tuple({definition.name: definition for definition in (*every, *definitions)}.values())
