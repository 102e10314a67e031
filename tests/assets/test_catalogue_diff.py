"""What changed between two catalogues: each kind of change, and whether it breaks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rkmetrics.assets.catalogue_diff import ADDED, BREAKS, CHANGED, UNEXPLAINED, diff, load
from rkmetrics.cli import main
from rkmetrics.errors import AssetError


def row(name: str = "a", **more: object) -> dict[str, Any]:
    whole = {"name": name, "type": "gauge", "labels": {"k": ["x", "y"]}, "per_actor_name": True, "across": "sum"}
    return {**whole, "help": "h", "renamed_from": [], **more}


@pytest.mark.parametrize(
    ("new", "effects"),
    [
        ([row()], []),
        ([row(), row("b")], [("b", ADDED)]),
        ([], [("a", UNEXPLAINED)]),
        ([row("b")], [("a", UNEXPLAINED), ("b", ADDED)]),
        ([row("b", renamed_from=["a"])], [("a", BREAKS)]),
        ([row("b", renamed_from=["a"], type="counter")], [("a", BREAKS), ("b", BREAKS)]),
        ([row(type="counter")], [("a", BREAKS)]),
        ([row(per_actor_name=False)], [("a", BREAKS)]),
        ([row(across="max")], [("a", CHANGED)]),
        ([row(help="i")], [("a", CHANGED)]),
        ([row(buckets=[1.0])], []),  # catalogues of before said nothing about them
        ([row(labels={})], [("a", UNEXPLAINED)]),
        ([row(labels={"k": ["x", "y"], "l": ["z"]})], [("a", CHANGED)]),
        ([row(labels={"k": ["x"]})], [("a", UNEXPLAINED)]),
        ([row(labels={"k": ["x", "y", "z"]})], [("a", ADDED)]),
        ([row(labels={"k": "whatever"})], [("a", CHANGED)]),
    ],
)
def test_each_kind_of_change(new: list[dict[str, Any]], effects: list[tuple[str, str]]) -> None:
    assert [(change.metric, change.effect) for change in diff([row()], new)] == effects


def test_an_entry_explains_what_is_gone() -> None:
    def effects(new: list[dict[str, Any]], *explained: Mapping[Any, str]) -> list[str]:
        dropped, labels, values = (*explained, {}, {}, {})[:3]
        return [str(change) for change in diff([row()], new, (dropped, labels, values))]

    assert effects([], {"a": "query b instead"}) == ["breaks      a: removed; query b instead"]
    renamed = [row(labels={"l": ["x", "y"]})]
    assert effects(renamed, {}, {("a", "k"): "l"}) == ["breaks      a: label k renamed to l: rkmetrics assets migrate"]
    assert effects([row(labels={"k": ["x", "z"]})], {}, {}, {("a", "k", "y"): "z"}) == [
        "breaks      a: value k='y' removed; k='z' takes its place: rkmetrics assets migrate"
    ]
    assert effects([row(labels={})], {}, {("a", "k"): ""}) == [
        "breaks      a: label k removed; nothing takes its place"
    ]


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"name": 1}]', '[{"name": "a", "type": "gauge"}]'])
def test_what_is_no_catalogue_is_refused(text: str) -> None:
    with pytest.raises(AssetError, match=r"^f:1:"):
        load(text, "f")


def test_nothing_left_the_catalogue_without_saying_where_to(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/catalogue.json is the last release's: each writes it with `rkmetrics catalogue --json`."""
    assert main(["catalogue", "--json"], {}) == 0
    today = load(capsys.readouterr().out, "today")
    changes = diff(load((root / "docs/catalogue.json").read_text(), "released"), today)
    gone = [str(change) for change in changes if change.effect == UNEXPLAINED]
    assert gone == [], "add a Rename to the metric's renamed_from, or a row to rkmetrics/catalogue/renames.py"


def test_a_removal_would_be_refused(root: Path) -> None:
    rows = json.loads((root / "docs/catalogue.json").read_text())
    for i in range(len(rows)):
        assert diff(rows, rows[:i] + rows[i + 1 :])[0].effect == UNEXPLAINED
