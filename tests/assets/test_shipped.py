"""The dashboards and rules that ship: nothing in them is wrong, and nothing that goes wrong in them stays unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rkmetrics.assets.base import Document
from rkmetrics.assets.checking import check_documents
from rkmetrics.assets.documents import document, found, read
from tests.assets.mutants import mutants


@pytest.fixture(scope="module")
def shipped(root: Path) -> list[Document]:
    folders = [root / name for name in ("dashboards", "alerts") if (root / name).is_dir()]
    if not folders:
        pytest.skip("no dashboards or rules here")
    return [read(path) for path in found(folders)]


def test_the_checks_find_nothing(shipped: list[Document]) -> None:
    assert check_documents(shipped) == []


def test_no_mutant_of_their_queries_survives(shipped: list[Document]) -> None:
    """A mutant keeps its legend: buckets without `le` are nothing to a heatmap, and its legend says so."""
    queries = sorted(
        {
            (query.scalar.value, query.legend.value if query.legend else "")
            for each in shipped
            for query in each.queries
            if not query.variable
        }
    )
    changed = [(mutant, legend) for query, legend in queries for _, mutant in mutants(query)]
    panels = [
        {"title": f"A{i}", "targets": [{"expr": mutant, "legendFormat": legend}]}
        for i, (mutant, legend) in enumerate(changed)
    ]
    found = check_documents([*shipped, document("mutants", json.dumps({"panels": panels}))])
    caught = {problem.place for problem in found}
    assert [query for i, (query, _) in enumerate(changed) if f"panel 'A{i}'" not in caught] == []
    assert len(changed) > len(queries)
