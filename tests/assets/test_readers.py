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


def test_what_is_wrong_inside_a_config_map_is_found_in_the_file_around_it() -> None:
    with pytest.raises(AssetError, match=r"f:8:\d+: depth.json: not JSON: expected ','"):
        document("f", CONFIG_MAP.replace('"}]}', '"}]'))


@pytest.mark.parametrize(
    "text",
    [
        "local g = import 'g.libsonnet';\n{ expr: 'up' }\n",
        "# c\n\nlocal f(x) =\n  { expr: x };\nf('up')\n",
        "// c\n{ expr: 'up' }\n",
        "/* c */ { expr: 'up' }\n",
        "(import 'a.libsonnet') + { expr: 'up' }\n",
        "function(x) { expr: x }\n",
    ],
)
def test_jsonnet_is_refused_rather_than_taken_for_one_long_text(text: str) -> None:
    with pytest.raises(AssetError, match="Jsonnet is not read"):
        document("f", text)


@pytest.mark.parametrize("text", ["local: x\nexpr: up", "local = x", "import x", "# c\n- expr: up\n", ""])
def test_yaml_is_not_taken_for_jsonnet(text: str) -> None:
    assert [query.scalar.value for query in document("f", text).queries] == ["up"] * text.count("up")


def test_rules_in_other_languages_are_left_alone() -> None:
    def group(kind: str) -> str:
        return f"groups:\n- type: {kind}\n  rules:\n  - expr: up\n"

    assert [len(document("f", group(kind)).queries) for kind in ("prometheus", "graphite", "vlogs")] == [1, 0, 0]
    for kind, count in (("prometheus", 1), ("loki", 0), ("__expr__", 0)):
        text = f"data:\n- model:\n    datasource: {{type: {kind}}}\n    expr: up\n"
        assert len(document("f", text).queries) == count


def test_both_branches_of_a_template_are_read() -> None:
    text = """\
{{- if .Values.each }}
groups:
- rules:
  - alert: A
    {{- if .a }}
    expr: one
    {{- else if .b }}
    expr: two
    {{- else }}
    expr: three
    {{- end }}
    labels:
      {{- if .a }}
      team: a
      {{- else }}
      team: b
      {{- end }}
{{- else }}
groups: []
{{- end }}
"""
    found = document("f", text)
    assert [(query.scalar.value, query.labels) for query in found.queries] == [
        ("one", ("team",)),
        ("two", ("team",)),
        ("three", ("team",)),
    ]


def test_an_alias_is_the_query_at_its_anchor() -> None:
    text = "x: &e rivet_actor_queue_depth > 1\nrules:\n- expr: *e\n- expr: &f up\n- expr: *f\n- expr: *g\n- <<: *h\n"
    rules = document("f", text)
    assert [query.scalar.value for query in rules.queries] == ["rivet_actor_queue_depth > 1", "up", "up", "*g"]
    assert migrate(rules, named("rivetkit:B-C")).text == text.replace("rivet_", "rivetkit_")


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
