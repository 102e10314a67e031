"""The dashboards that ship: they import anywhere, every panel explains itself, and nothing overlaps.

What their queries name is checked against the catalogue in test_shipped.py. No Grafana is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

UIDS = {"backends": "rkmetrics-backends", "kv": "rkmetrics-kv"}  # links and bookmarks hold them: they stay
VARIABLES = {"backends": ("job", "instance"), "kv": ("job", "instance", "actor_name")}
KINDS = {"row", "stat", "gauge", "timeseries", "state-timeline"}
UNITS = {"short", "percentunit", "s", "cps", "reqps", "bool_yes_no"}
WINDOW = re.compile(r"\[([^\]]*)\]")
SELECTOR = re.compile(r"\brkmetrics_\w+(\{[^}]*\})?")

pytestmark = pytest.mark.parametrize("file", UIDS)


def board(root: Path, file: str) -> dict[str, Any]:
    found = json.loads((root / f"dashboards/{file}.json").read_text())
    assert isinstance(found, dict)
    return found


def panels(root: Path, file: str) -> list[dict[str, Any]]:
    """All panels but for rows."""
    return [panel for panel in board(root, file)["panels"] if panel["type"] != "row"]


def targets(root: Path, file: str) -> list[dict[str, Any]]:
    return [target for panel in panels(root, file) for target in panel["targets"]]


def objects(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from objects(child)


def test_it_imports_and_is_provisioned_alike(file: str, root: Path) -> None:
    found = board(root, file)
    assert (found["uid"], found["schemaVersion"], found["tags"]) == (UIDS[file], 39, ["rkmetrics"])
    assert (found["title"][:12], bool(found["description"]), found["editable"]) == ("rkmetrics / ", True, False)
    assert not {"id", "__inputs", "__requires", "__elements"} & found.keys()


def test_its_data_source_is_a_variable(file: str, root: Path) -> None:
    sources = [each["datasource"] for each in objects(board(root, file)) if "datasource" in each]
    assert sources
    assert [source for source in sources if source != {"type": "prometheus", "uid": "${datasource}"}] == []


def test_its_variables_offer_all_and_follow_the_time_range(file: str, root: Path) -> None:
    source, *others = board(root, file)["templating"]["list"]
    assert (source["type"], source["name"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert tuple(each["name"] for each in others) == VARIABLES[file]
    for each in others:
        assert (each["type"], each["multi"], each["includeAll"], each["allValue"]) == ("query", True, True, ".+")
        assert (each["refresh"], each["current"], each["definition"]) == (2, {}, each["query"]["query"])


def test_it_has_some_panels_and_not_too_many(file: str, root: Path) -> None:
    assert 8 <= len(panels(root, file)) <= 32
    assert {panel["type"] for panel in board(root, file)["panels"]} <= KINDS


def test_every_panel_says_what_it_shows_and_in_which_unit(file: str, root: Path) -> None:
    found = panels(root, file)
    assert len({panel["title"] for panel in found}) == len(found)
    for panel in found:
        assert re.fullmatch(r"[A-Z].*\.", panel["description"]), panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in UNITS, panel["title"]
        if defaults["unit"] == "percentunit":
            assert (defaults["min"], defaults.get("max", 1)) == (0, 1), panel["title"]
        assert panel["targets"], panel["title"]


def test_ids_are_unique(file: str, root: Path) -> None:
    ids = [panel["id"] for panel in board(root, file)["panels"]]
    assert sorted(set(ids)) == sorted(ids)
    for panel in panels(root, file):
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs), panel["title"]


def test_panels_lie_in_the_grid_and_do_not_overlap(file: str, root: Path) -> None:
    places = {panel["title"]: panel["gridPos"] for panel in board(root, file)["panels"]}
    assert [title for title, at in places.items() if at["x"] < 0 or at["x"] + at["w"] > 24 or at["h"] < 1] == []
    assert [(a, b) for a, b in combinations(places, 2) if _overlap(places[a], places[b])] == []


def _overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    across = a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"]
    return across and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]


def test_every_window_follows_the_scrape_interval_or_the_time_range(file: str, root: Path) -> None:
    windows = {window for target in targets(root, file) for window in WINDOW.findall(target["expr"])}
    assert windows <= {"$__rate_interval", "$__range"}


def test_every_selector_follows_the_variables(file: str, root: Path) -> None:
    """actor_name too, where the metric has it: a panel that ignores its dashboard's variable misleads."""
    for target in targets(root, file):
        matchers = [found[1] or "" for found in SELECTOR.finditer(target["expr"])]
        assert matchers, target["expr"]
        assert all('job=~"$job", instance=~"$instance"' in each for each in matchers), target["expr"]
        assert len({"$actor_name" in each for each in matchers}) == 1, target["expr"]


def test_every_series_has_a_legend(file: str, root: Path) -> None:
    assert [target["expr"] for target in targets(root, file) if not target["legendFormat"]] == []
