"""The picture of rings in one place: imports point inwards, families meet at the root, and there is no cycle.

Read from the source, lazy imports inside functions included, imports for type checkers left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

DATA, CORE, CODEC, EDGE, ROOT = range(5)

# Longest prefix wins. `rkmetrics` alone is the package's front door: it names everything, and only the root may import it.
RINGS: Mapping[str, int] = {
    "rkmetrics": ROOT,
    "rkmetrics.errors": DATA,
    "rkmetrics.definition": DATA,
    "rkmetrics.model": DATA,
    "rkmetrics.settings": DATA,
}


def ring(module: str) -> int:
    while module not in RINGS:
        module = module.rpartition(".")[0]
    return RINGS[module]
