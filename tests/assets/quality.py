"""What can be wrong with a dashboard: a check for each item of the list in docs/dashboards.md that a file alone shows.

A check is a function from a dashboard, as it was read, to what is wrong with it. test_dashboard_quality.py runs them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any, cast

import pytest

from rkmetrics.assets.checking import check_documents
from rkmetrics.assets.documents import document
from rkmetrics.errors import PromqlError
from rkmetrics.promql import Ranged, Selector, metric_words, parse, selectors, walk
from tests.assets.mutants import KNOWN

__all__ = ["CHECKS", "DATASOURCE", "EMPTY", "SCHEMA_VERSION", "UIDS", "Board", "asked_for"]

Board = dict[str, Any]

# Links, bookmarks and alerts hold them: a uid never changes, and the file is called after it.
UIDS = frozenset(
    [
        "rkmetrics-actor",
        "rkmetrics-backends",
        "rkmetrics-exporter",
        "rkmetrics-fleet",
        "rkmetrics-kv",
        "rkmetrics-planes",
        "rkmetrics-runtime",
    ]
)
SCHEMA_VERSION = 39  # docs/decisions/0054
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
KINDS = frozenset(("timeseries", "stat", "gauge", "table", "heatmap", "state-timeline", "text"))
WINDOWS = frozenset(("$__rate_interval", "$__range"))
NOW = frozenset(("table", "stat", "gauge"))  # what shows how things are, and nothing of who is gone

# What the preview shows below a panel without data, and people look for: "Empty while nothing starts."
EMPTY = re.compile(r"\bEmpty (?:where|while|when|is) [^.]*\.")

# Series of Prometheus itself that belong to no target, and what they are matched by instead.
NO_TARGET = {"ALERTS": "$job|"}


def targets(board: Board) -> Iterator[tuple[Board, Board]]:
    """Panels with each of their targets."""
    return ((panel, target) for panel in panels(board) for target in panel.get("targets", ()))


def panels(board: Board) -> list[Board]:
    """All panels but for rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def objects(node: object, under: str = "") -> Iterator[tuple[str, Board]]:
    """Every object, with the key that it stands under."""
    if isinstance(node, dict):
        found = cast("Board", node)
        yield under, found
        for key, child in found.items():
            yield from objects(child, key)
    elif isinstance(node, list):
        for child in cast("Iterable[Any]", node):
            yield from objects(child, under)


# --- 2: the official schema -------------------------------------------------------------------------------------------


def schema(board: Board) -> Iterator[str]:
    pytest.importorskip("grafana_foundation_sdk.cog", reason="Grafana's SDK is not installed: make test")
    from tests.assets.official import violations

    return violations(board)


# --- 3: one file for import and provisioning --------------------------------------------------------------------------


def identity(board: Board) -> Iterator[str]:
    if board.get("uid") not in UIDS:
        yield f"its uid {board.get('uid')!r} is not on the list"
    if not board.get("title", "").startswith("rkmetrics / ") or not _is_sentence(board.get("description", "")):
        yield "its title says nothing of rkmetrics, or its description is no sentence"
    if "rkmetrics" not in board.get("tags", ()):
        yield "it has no tag that links lead to"
    if board.get("editable") is not False or board.get("schemaVersion") != SCHEMA_VERSION:
        yield "it can be edited where it is not kept, or is not of the schema that all versions of Grafana read"


def portable(board: Board) -> Iterator[str]:
    """No part that only one way of loading fills in, and nothing of the server that it was made on."""
    yield from (f"has {key}" for key in ("id", "__inputs", "__requires", "__elements") if key in board)
    for key, each in objects(board):
        if "datasource" in each and each["datasource"] != DATASOURCE:
            yield f"{key}: data source {each['datasource']}"
        if "placement" in each and key != "legend":
            yield f"{key}: placement {each['placement']!r}"
        if "libraryPanel" in each:
            yield f"{key}: a panel that is kept elsewhere"
        if "expr" in each and "datasource" not in each:
            yield f"{key}: a query without a data source"


def variables(board: Board) -> Iterator[str]:
    listed: list[Board] = board["templating"]["list"]
    source, others = listed[0], listed[1:]
    if (source.get("type"), source.get("name"), source.get("query")) != ("datasource", "datasource", "prometheus"):
        yield "the first variable is not the data source"
    if [each["name"] for each in others] not in (["job", "instance"], ["job", "instance", "actor_name"]):
        yield "its variables are not job, instance and perhaps actor_name"
    if any(each.get("current") for each in (source, *others)):
        yield "a value is pinned"
    wanted = {"type": "query", "multi": True, "includeAll": True, "allValue": ".+", "refresh": 2, "sort": 1}
    for each in others:
        wrong = [key for key, value in wanted.items() if each.get(key) != value]
        if wrong or each.get("definition") != each.get("query", {}).get("query"):
            yield f"variable {each['name']}: {wrong or 'definition and query differ'}"


# --- 4: panels --------------------------------------------------------------------------------------------------------


def _is_sentence(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Z0-9].* .*\.", text))


def explained(board: Board) -> Iterator[str]:
    for panel in board["panels"]:
        if not panel.get("title"):
            yield f"panel {panel.get('id')} has no title"
    for panel in panels(board):
        about = panel.get("description", "")
        if not _is_sentence(about):
            yield f"{panel.get('title')}: no description that is a sentence"
        if "Empty " in about and not EMPTY.search(about):
            yield f"{panel.get('title')}: says when it is empty in words that the preview does not find"
    titles = [panel.get("title") for panel in panels(board)]
    yield from (f"two panels are called {title!r}" for title in titles if titles.count(title) > 1)


def drawn(board: Board) -> Iterator[str]:
    for panel in panels(board):
        title, defaults = panel.get("title"), panel.get("fieldConfig", {}).get("defaults", {})
        if panel["type"] not in KINDS:
            yield f"{title}: a plugin that not everybody has: {panel['type']}"
        if panel["type"] != "text" and defaults.get("unit") not in units():
            yield f"{title}: unknown unit {defaults.get('unit')!r}"
        tops = (1, None) if panel["type"] == "timeseries" else (1,)
        if defaults.get("unit") == "percentunit" and (defaults.get("min") != 0 or defaults.get("max") not in tops):
            yield f"{title}: a ratio that is not drawn from 0, to 1 or as far as it goes"
        if panel["type"] == "timeseries" and defaults.get("min") != 0:
            yield f"{title}: an axis that does not begin at 0"


def units() -> frozenset[str]:
    """Grafana's own list."""
    found = pytest.importorskip("grafana_foundation_sdk.models.units", reason="Grafana's SDK is not installed")
    constants: dict[str, Any] = found.__dict__
    return frozenset(value for value in constants.values() if isinstance(value, str))


def asked(board: Board) -> Iterator[str]:
    for panel in panels(board):
        title, found = panel.get("title"), panel.get("targets", [])
        if panel["type"] != "text" and (not found or panel.get("datasource") != DATASOURCE):
            yield f"{title}: no query, or no data source"
        refs = [target.get("refId") for target in found]
        if len(set(refs)) < len(refs) or None in refs:
            yield f"{title}: queries without a letter of their own"
        yield from (f"{title}: a query without a legend" for target in found if not target.get("legendFormat"))
        instant = panel["type"] in NOW
        if any(bool(target.get("instant")) != instant or target.get("range") == instant for target in found):
            yield f"{title}: a table or a number asks for what holds now, all others for what was"
        if any(re.search(r"histogram_quantile(?!.*\) >= 0$)", target["expr"], re.DOTALL) for target in found):
            yield f"{title}: a quantile that is NaN where nothing was seen"


def numbered(board: Board) -> Iterator[str]:
    ids = [panel.get("id") for panel in board["panels"]]
    if None in ids or len(set(ids)) < len(ids):
        yield f"ids are missing, or given twice: {ids}"


def placed(board: Board) -> Iterator[str]:
    places = {panel["id"]: panel["gridPos"] for panel in board["panels"] if "gridPos" in panel}
    if len(places) < len(board["panels"]):
        yield "a panel has no place"
    for panel, at in places.items():
        if at["x"] < 0 or at["y"] < 0 or at["w"] < 1 or at["h"] < 1 or at["x"] + at["w"] > 24:
            yield f"panel {panel} lies outside of the grid"
    yield from (f"panels {a} and {b} overlap" for a, b in combinations(places, 2) if _overlap(places[a], places[b]))


def _overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    across = a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"]
    return across and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]


# --- 5: queries -------------------------------------------------------------------------------------------------------


def known(board: Board) -> Iterator[str]:
    """What `rkmetrics assets check` says: syntax, names, labels, values, types, buckets, sides that match."""
    return (
        f"{problem.place}: {problem.what} [{problem.check}]"
        for problem in check_documents([document("board.json", json.dumps(board))])
    )


def asked_for(board: Board) -> Iterator[tuple[str, Selector]]:
    """All selectors of panels and annotations, each with its place; none of what cannot be read, which `known` says."""
    annotations = [(each, each) for each in board["annotations"]["list"]]
    for panel, target in (*targets(board), *annotations):
        try:
            yield from ((panel.get("title", ""), each) for each in selectors(parse(target["expr"])))
        except PromqlError:
            continue


def filtered(board: Board) -> Iterator[str]:
    """Each selector follows the variables; a panel that ignores one of its dashboard's misleads."""
    has_actors = any(each["name"] == "actor_name" for each in board["templating"]["list"])
    for title, selector in asked_for(board):
        name = next(iter(metric_words(selector))).text
        matched = {matcher.label.text: matcher.value.text for matcher in selector.matchers if matcher.op == "=~"}
        wanted = {"job": "$job", "instance": "$instance"}
        if name in NO_TARGET:
            wanted = {"job": NO_TARGET[name]}
        if name in KNOWN.samples and "actor_name" in KNOWN.samples[name].labels:
            wanted["actor_name"] = "$actor_name"
            if not has_actors:
                yield f"{title}: {name} has actor names, and the dashboard no variable for them"
        ignored = [value for label, value in wanted.items() if matched.get(label) != value]
        yield from (f"{title}: {name} ignores {value}" for value in ignored)


def windowed(board: Board) -> Iterator[str]:
    for panel, target in targets(board):
        try:
            nodes = list(walk(parse(target["expr"])))
        except PromqlError:
            continue
        found = {node.window for node in nodes if isinstance(node, Ranged)}
        yield from (f"{panel.get('title')}: a window of {window}" for window in sorted(found - WINDOWS))


def shared(board: Board) -> Iterator[str]:
    """Names that other exporters have too are narrowed to our targets: the variables' "All" is any job there is."""
    for panel, target in targets(board):
        expr = target["expr"]
        foreign = re.search(r"\b(process_\w+|up|scrape_\w+)\{", expr)
        if foreign and "rkmetrics_build_info" not in expr:
            yield f"{panel.get('title')}: {foreign[1]} of whoever has it"


CHECKS: Mapping[str, Callable[[Board], Iterator[str]]] = {
    "2 official schema": schema,
    "3 uid, title, tags, not editable": identity,
    "3 import and provisioning alike": portable,
    "3 variables": variables,
    "4 titles and descriptions": explained,
    "4 units, axes and plugins": drawn,
    "4 queries and legends": asked,
    "4 unique ids": numbered,
    "4 grid": placed,
    "5 names, labels, values and types": known,
    "5 job, instance and actor name matched": filtered,
    "5 windows": windowed,
    "5 shared names narrowed": shared,
}
