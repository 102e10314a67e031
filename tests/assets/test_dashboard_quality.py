"""What makes a dashboard fit to ship: every check of quality.py on every file, and on files that were spoiled for it.

BROKEN spoils a good dashboard in every way that a check is there for: a check that finds nothing there would be worth
nothing. Two items of the list in docs/dashboards.md are elsewhere, since they need more than a file: that no mutant of
a query survives (test_shipped.py), and that a real Prometheus has data for every panel
(tests/services/test_dashboards.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest

from rkmetrics.catalogue import sets
from rkmetrics.catalogue.kv import KvCache
from rkmetrics.promql import metric_words
from tests.assets.quality import CHECKS, DATASOURCE, SCHEMA_VERSION, UIDS, Board, asked_for

FILES = sorted((Path(__file__).resolve().parents[2] / "dashboards").glob("*.json"))

# Families that no dashboard shows, by what their names begin with, each with the reason.
NOT_SHOWN: Mapping[str, str] = {
    "rkmetrics_kv_prefix_cache_hit_ratio": "a mean of ratios misleads; the counters beside it are shown",
    "rkmetrics_node_uptime_seconds": "process_start_time_seconds is shown, which every exporter has",
    "process_virtual_memory_bytes": "address space says nothing of memory that is used",
}


def read(path: Path) -> Board:
    found = json.loads(path.read_text())
    return cast("dict[str, Any]", found)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_fit_to_ship(path: Path, check: str) -> None:
    assert list(CHECKS[check](read(path))) == []


# --- the checks themselves --------------------------------------------------------------------------------------------

KV_BLOCKS = 'rkmetrics_kv_blocks{job=~"$job", instance=~"$instance", actor_name=~"$actor_name"}'
TASKS = KV_BLOCKS.replace("rkmetrics_kv_blocks", "rivetkit_actor_user_task_duration_seconds_bucket")
MATCHERS = 'job=~"$job", instance=~"$instance"'
ROW = {"h": 1, "w": 24, "x": 0, "y": 0}


def variable(name: str, query: str) -> Board:
    return {
        "type": "query",
        "name": name,
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "refresh": 2,
        "sort": 1,
        "current": {},
    }


def plot(number: int, title: str, expr: str, **defaults: Any) -> Board:
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": "Says what it shows.",
        "datasource": DATASOURCE,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (number - 2), "y": 1},
        "options": {},
        "fieldConfig": {"defaults": {"min": 0, **defaults}, "overrides": []},
        "targets": [{"refId": "A", "datasource": DATASOURCE, "expr": expr, "legendFormat": "x", "range": True}],
    }


GOOD: Board = {
    "uid": "rkmetrics-fleet",
    "title": "rkmetrics / Fleet overview",
    "description": "Two panels of it.",
    "tags": ["rkmetrics"],
    "editable": False,
    "schemaVersion": SCHEMA_VERSION,
    "annotations": {"list": []},
    "templating": {
        "list": [
            {"type": "datasource", "name": "datasource", "query": "prometheus", "current": {}},
            variable("job", "label_values(rkmetrics_build_info, job)"),
            variable("instance", 'label_values(rkmetrics_build_info{job=~"$job"}, instance)'),
            variable("actor_name", 'label_values(rivetkit_actor_started_total{job=~"$job"}, actor_name)'),
        ]
    },
    "panels": [
        {"id": 1, "type": "row", "title": "Row", "collapsed": False, "panels": [], "gridPos": ROW},
        plot(2, "Blocks", f"sum({KV_BLOCKS})", unit="short"),
        plot(3, "Tasks", f"max(rate({TASKS}[$__rate_interval]))", unit="percentunit", max=1),
    ],
}


def asks(expr: str) -> Callable[[Board], object]:
    return lambda board: board["panels"][2]["targets"][0].update(expr=expr)


def panel(**changes: Any) -> Callable[[Board], object]:
    return lambda board: board["panels"][2].update(changes)


def defaults(**changes: Any) -> Callable[[Board], object]:
    return lambda board: board["panels"][2]["fieldConfig"]["defaults"].update(changes)


def target(**changes: Any) -> Callable[[Board], object]:
    return lambda board: board["panels"][2]["targets"][0].update(changes)


def job(**changes: Any) -> Callable[[Board], object]:
    return lambda board: board["templating"]["list"][1].update(changes)


def board(**changes: Any) -> Callable[[Board], object]:
    return lambda found: found.update(changes)


GRID = {"h": 8, "w": 12, "x": 12, "y": 1}

# Check -> what it is there to find, each done to a dashboard that is good.
BROKEN: Mapping[str, tuple[Callable[[Board], object], ...]] = {
    "2 official schema": (
        board(refresh=30),
        board(panes=[]),
        panel(titel="Tasks"),
        panel(gridPos={**GRID, "w": "12"}),
        panel(options={"legend": {"displayMode": "graph"}}),
        panel(options={"legends": {}}),
        panel(transformations=[{"id": "merge", "option": {}}]),
        defaults(custom={"drawStyle": "wavy"}),
        target(exprs="up"),
        job(refresh=7),
    ),
    "3 uid, title, tags, not editable": (
        board(uid="rkmetrics-other"),
        board(title="Fleet"),
        board(description=""),
        board(tags=[]),
        board(editable=True),
        board(schemaVersion=42),
    ),
    "3 import and provisioning alike": (
        board(id=12),
        board(__inputs=[{"name": "DS_PROMETHEUS"}]),
        panel(datasource={"type": "prometheus", "uid": "PBFA97CFB590B2093"}),
        target(datasource="Prometheus"),
        board(links=[{"title": "x", "placement": "inControlsMenu"}]),
        board(annotations={"list": [{"name": "x", "expr": "up"}]}),
        panel(libraryPanel={"uid": "x", "name": "x"}),
    ),
    "3 variables": (
        lambda found: found["templating"]["list"].pop(0),
        lambda found: found["templating"]["list"].pop(1),
        job(current={"text": "fleet", "value": "fleet"}),
        job(allValue=".*"),
        job(multi=False),
        job(refresh=1),
        job(definition="label_values(up, job)"),
    ),
    "4 titles and descriptions": (
        panel(title=""),
        panel(title="Blocks"),
        panel(description="tasks"),
        panel(description=""),
        panel(description="Tasks per second. Empty until the first one."),
        lambda found: found["panels"][0].update(title=""),
    ),
    "4 units, axes and plugins": (
        panel(type="grafana-polystat-panel"),
        defaults(unit="percent-unit"),
        defaults(unit=None),
        defaults(max=100),
        defaults(unit="s", min=10),
        defaults(min=10),
        lambda found: (panel(type="gauge")(found), defaults(max=None)(found)),
    ),
    "4 queries and legends": (
        panel(targets=[]),
        panel(datasource=None),
        target(legendFormat=""),
        target(refId=None),
        target(range=False, instant=True),
        panel(type="table"),
        panel(type="stat"),
        asks(f"histogram_quantile(0.9, max by (le) (rate({TASKS}[$__range])))"),
        lambda found: found["panels"][2]["targets"].append({**found["panels"][2]["targets"][0]}),
    ),
    "4 unique ids": (panel(id=2), panel(id=None)),
    "4 grid": (
        panel(gridPos={**GRID, "x": 13}),
        panel(gridPos={**GRID, "x": 11}),
        panel(gridPos={**GRID, "y": 0}),
        panel(gridPos={**GRID, "h": 0}),
        lambda found: found["panels"][2].pop("gridPos"),
    ),
    "5 names, labels, values and types": (
        asks("sum("),
        asks("rkmetrics_kv_bloks"),
        asks("rivet_actor_queue_depth"),
        asks('rkmetrics_kv_blocks{sate="x"}'),
        asks('rate(rkmetrics_kv_publish_total{outcome="success"}[$__range])'),
        asks("sum by (kind) (rkmetrics_kv_blocks)"),
        asks("sum(rkmetrics_kv_publish_total)"),
        asks("rate(rkmetrics_kv_blocks[$__range])"),
        asks(f"histogram_quantile(0.9, sum(rate({TASKS}[$__range])))"),
        asks("sum by (job) (rkmetrics_kv_blocks) / sum by (actor_name) (rkmetrics_kv_active_blocks)"),
        target(legendFormat="{{kind}}"),
        job(definition="label_values(rkmetrics_build_inf, job)"),
    ),
    "5 job, instance and actor name matched": (
        asks("sum(rkmetrics_kv_blocks)"),
        asks(KV_BLOCKS.replace('job=~"$job", ', "")),
        asks(KV_BLOCKS.replace('instance=~"$instance"', 'instance="$instance"')),
        asks(f"rkmetrics_kv_blocks{{{MATCHERS}}}"),
        asks(f"{KV_BLOCKS} / rkmetrics_kv_blocks"),
        asks("count(ALERTS)"),
        lambda found: found["templating"]["list"].pop(),
        board(annotations={"list": [{"expr": "rkmetrics_build_info"}]}),
    ),
    "5 windows": (
        asks(f"rate({TASKS}[5m])"),
        asks(f"max_over_time({KV_BLOCKS}[1h])"),
        asks(f"max_over_time({KV_BLOCKS}[$__range:1m])"),
        asks(f"rate({TASKS}[$__interval])"),
    ),
    "5 shared names narrowed": (
        asks(f"up{{{MATCHERS}}}"),
        asks(f"sum(rate(process_cpu_seconds_total{{{MATCHERS}}}[$__range]))"),
        asks(f"max(scrape_duration_seconds{{{MATCHERS}}})"),
    ),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_finds_nothing_wrong_with_what_is_right(check: str) -> None:
    assert list(CHECKS[check](deepcopy(GOOD))) == []


EACH = [(check, number) for check in CHECKS for number in range(len(BROKEN[check]))]


@pytest.mark.parametrize(("check", "number"), EACH)
def test_a_check_finds_what_it_is_there_for(check: str, number: int) -> None:
    spoiled = deepcopy(GOOD)
    BROKEN[check][number](spoiled)
    assert list(CHECKS[check](spoiled)) != []


# --- 1 and 7: all files together --------------------------------------------------------------------------------------


def test_1_the_builder_makes_the_same_bytes(root: Path) -> None:
    builder = _builder()
    assert list(builder.stale(root / "dashboards")) == [], "run `make dashboards`"
    assert {path.stem for path in FILES} == {uid.removeprefix("rkmetrics-") for uid in UIDS}


def test_1_a_byte_that_differs_is_found(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = _builder()
    for path in FILES:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "kv.json").write_bytes((root / "dashboards/kv.json").read_bytes() + b"\n")
    (tmp_path / "fleet.json").unlink()
    assert builder.main(["--check", "--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "fleet.json\nkv.json\n"
    assert builder.main(["--folder", str(tmp_path)]) == 0
    assert builder.main(["--check", "--folder", str(tmp_path)]) == 0


def _builder() -> Any:
    pytest.importorskip("grafana_foundation_sdk.cog", reason="Grafana's SDK is not installed: make test")
    from tools.dashboards import __main__ as builder

    return builder


@pytest.mark.parametrize("where", [{"outcome": "failure"}, {"outcom": "error"}, {"actor_name": "lobby"}, {"le": "1"}])
def test_1_the_builder_knows_labels_and_values(where: dict[str, str], root: Path) -> None:
    from tools.dashboards.queries import rate

    with pytest.raises(ValueError, match="rkmetrics_kv_publish_total has no"):
        rate(KvCache.publish, **where)


@pytest.mark.parametrize("by", ["outcomes", "actor", "source"])
def test_1_the_builder_knows_what_can_be_grouped_by(by: str, root: Path) -> None:
    from tools.dashboards.queries import rate

    with pytest.raises(ValueError, match="rkmetrics_kv_publish_total has no label"):
        rate(KvCache.publish, "outcome", by)


def shown(boards: list[Board]) -> set[str]:
    """The families of the catalogue that some panel asks for."""
    names = {word.text for board in boards for _, selector in asked_for(board) for word in metric_words(selector)}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    return names | bases


def missing(boards: list[Board]) -> list[str]:
    """The families that no board shows, and nothing says why."""
    families = {definition.name for each in sets() for definition in each.definitions()}
    return sorted(name for name in families - shown(boards) if not name.startswith(tuple(NOT_SHOWN)))


@pytest.mark.skipif(not FILES, reason="no dashboards here")
def test_7_every_family_is_shown_or_listed_with_the_reason() -> None:
    boards = [read(path) for path in FILES]
    assert missing(boards) == []
    assert [name for name in shown(boards) if name.startswith(tuple(NOT_SHOWN))] == []


@pytest.mark.skipif(not FILES, reason="no dashboards here")
def test_7_a_family_that_is_on_no_dashboard_is_found() -> None:
    boards = [read(path) for path in FILES if path.stem != "exporter"]
    assert "rkmetrics_render_duration_seconds" in missing(boards)
    assert "rkmetrics_kv_blocks" not in missing(boards)
