"""Migrate files: what `rkmetrics assets migrate` does, but for the writing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rkmetrics.assets.base import Problem
from rkmetrics.assets.documents import found, read
from rkmetrics.assets.migrate import Migrated, migrate
from rkmetrics.assets.rules import unreadable
from rkmetrics.assets.tables import named
from rkmetrics.catalogue import sets as shipped
from rkmetrics.definition import MetricDefinition
from rkmetrics.errors import AssetError

__all__ = ["migrate_files", "unified"]


def migrate_files(
    paths: Iterable[Path],
    tables: Sequence[str] = ("catalogue",),
    labels: Mapping[str, str] | None = None,
    definitions: Iterable[MetricDefinition] = (),
) -> Iterator[Migrated]:
    """Yield each file as it would be after its migration through the tables, in their order. Writes nothing.

    definitions: an application's own, whose old names the table "catalogue" then has too. Raises KeyError for a table
    that is not there, OSError for a file that is not.
    """
    every = [*(definition for each in shipped() for definition in each.definitions()), *definitions]
    steps = [step for name in tables for step in named(name, every)]
    for path in found(paths):
        try:
            yield migrate(read(path), steps, labels)
        except AssetError as error:
            problems: list[Problem] = [unreadable(error)]
            yield Migrated(str(path), "", "", problems=problems)


def unified(migrated: Migrated) -> str:
    """Return the change of a file as a unified diff, which `patch` takes."""
    lines = difflib.unified_diff(
        _lines(migrated.before),
        _lines(migrated.text),
        f"a/{migrated.file}",
        f"b/{migrated.file}",
    )
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _lines(text: str) -> list[str]:
    """The lines of a text as `patch` counts them: U+2028 and others end none, as they do for str.splitlines()."""
    return [line for line in re.split(r"(?<=\n)", text) if line]
