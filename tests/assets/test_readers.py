"""Where queries are found: dashboards of both schemas, library panels, rules, and what is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rkmetrics.assets.base import Document
from rkmetrics.assets.documents import document, found, read
from rkmetrics.assets.migrate import migrate
from rkmetrics.assets.tables import named
from rkmetrics.errors import AssetError

CHECKS = Path(__file__).parent / "checks"


def places(read: Document) -> list[tuple[str, bool]]:
    return [(query.place, query.variable) for query in read.queries]


def test_a_classic_dashboard() -> None:
    dashboard = read(CHECKS / "classic.good.json")
    assert places(dashboard) == [
        ("annotation 'Restarts'", False),
        ("variable 'job'", True),
        ("variable 'job'", True),
        ("variable 'instance'", True),
        ("panel 'Actors', target A", False),
        ("panel 'Actors', target B", False),
        ("panel 'Latency', target A", False),
        ("panel 'Mixed', target B", False),
    ]
    assert dashboard.position(dashboard.queries[0].scalar.offsets[0]) == (15, 18)
    assert [query.legend.value for query in dashboard.queries if query.legend] == [
        "{{actor_name}}",
        "start",
        "{{kind}} {{ $x }}",
    ]


def test_a_dashboard_of_the_v2_schema() -> None:
    assert places(read(CHECKS / "v2.good.json")) == [
        ("panel 'Depth', target A", False),
        ("variable 'job'", True),
        ("annotation 'R'", False),
    ]


def test_the_first_v2_schema_names_the_source_in_the_kind_of_its_query() -> None:
    for kind, count in (("prometheus", 1), ("loki", 0)):
        query = {"kind": "PanelQuery", "spec": {"refId": "A", "query": {"kind": kind, "spec": {"expr": "up"}}}}
        text = json.dumps({"kind": "Dashboard", "spec": {"elements": {"p": {"spec": {"data": [query]}}}}})
        assert len(document("f", text).queries) == count


def test_a_library_panel_an_api_answer_and_an_alert_of_grafana() -> None:
    assert places(read(CHECKS / "unknown-metric.library.bad.json")) == [("panel 'Depth', target A", False)]
    panel = {"title": "P", "targets": [{"refId": "A", "expr": "up"}]}
    answer = {"meta": {}, "dashboard": {"title": "D", "panels": [panel]}}
    assert places(document("f", json.dumps(answer))) == [("panel 'P', target A", False)]
    alert = {"title": "R", "condition": "C", "data": [{"refId": "A", "model": {"expr": "up", "refId": "A"}}]}
    assert places(document("f", json.dumps({"groups": [{"rules": [alert]}]}))) == [("alert 'R'", False)]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ({"type": "prometheus"}, 1),
        ({"type": "grafana-amazonprometheus-datasource"}, 1),
        ({"uid": "${DS_PROMETHEUS}"}, 1),
        ("Prometheus", 1),
        (None, 1),
        ({"type": "loki"}, 0),
        ({"type": "mysql"}, 0),
        ("My Loki", 0),
    ],
)
def test_queries_of_other_sources_are_left_alone(source: object, count: int) -> None:
    target = {"refId": "A", "expr": "up", **({} if source is None else {"datasource": source})}
    text = json.dumps({"title": "D", "panels": [{"title": "P", "targets": [target]}]})
    assert len(document("f", text).queries) == count


def test_rules_of_each_style_say_their_names() -> None:
    rules = read(CHECKS / "styles.good.yaml")
    assert [place for place, _ in places(rules)] == [
        "record 'job:rkmetrics_kv_blocks:sum'",
        *(f"alert {name!r}" for name in ("Plain", "Flow", "Single", "Double", "Folded", "Literal", "Templated")),
    ]
    assert rules.queries[0].labels == ("team",)


CONFIG_MAP = """\
apiVersion: v1
kind: ConfigMap
data:
  depth.json: |-
    {
      "panels": [
        {"title": "P", "targets": [{"refId": "A", "expr": "sum(rivet_actor_queue_depth{job=\\"a\\"})"}]}
      ]
    }
  rules.yaml: |
    groups:
      - name: g
        rules:
          - alert: A
            expr: |
              rivet_actor_dispatch_inbox_depth
                > 5
  notes.txt: |
    expr: rivet_actor_queue_depth
"""


def test_files_inside_a_config_map_are_read_and_migrated() -> None:
    found = document("f", CONFIG_MAP)
    assert places(found) == [("depth.json: panel 'P', target A", False), ("rules.yaml: alert 'A'", False)]
    assert [found.position(query.scalar.offsets[0])[0] for query in found.queries] == [7, 16]
    there = migrate(found, named("rivetkit:B-C")).text
    expected = CONFIG_MAP.replace("sum(rivet_", "sum(rivetkit_")
    assert there == expected.replace("rivet_actor_dispatch_inbox_depth", 'rivetkit_actor_inbox_depth{inbox="dispatch"}')


def test_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.json", "c.txt", "sub/d.yml", "sub/e.rules", ".git/f.yaml", "node_modules/g.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("- expr: up")
    assert [path.relative_to(tmp_path).as_posix() for path in found([tmp_path, tmp_path / "c.txt"])] == [
        "a.json",
        "b.yaml",
        "sub/d.yml",
        "sub/e.rules",
        "c.txt",
    ]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: b\nc: \xff")
    with pytest.raises(AssetError, match="2:1: not UTF-8"):
        read(path)
