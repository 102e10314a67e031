"""The dashboards and rules that ship: nothing in them is wrong, and nothing that goes wrong in them stays unseen."""

from __future__ import annotations

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
    queries = sorted({query.scalar.value for each in shipped for query in each.queries if not query.variable})
    changed = [mutant for query in queries for _, mutant in mutants(query)]
    rules = "".join(f"- alert: A{i}\n  expr: |2-\n" + _indented(query) for i, query in enumerate(changed))
    caught = {problem.place for problem in check_documents([*shipped, document("mutants", rules)])}
    assert [query for i, query in enumerate(changed) if f"alert 'A{i}'" not in caught] == []


def _indented(query: str) -> str:
    return "".join(f"    {line}\n" for line in query.split("\n"))
