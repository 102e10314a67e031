"""Migration: what is written is right to the byte, what cannot be is said, twice is once, and there is a way back."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkmetrics.assets import tables
from rkmetrics.assets.checking import check_documents
from rkmetrics.assets.documents import document, read
from rkmetrics.assets.migrate import Migrated, migrate, rewrite, write
from rkmetrics.assets.migrating import migrate_files, unified
from rkmetrics.assets.tables import Change, Table, named
from rkmetrics.catalogue import sets
from rkmetrics.definition import MetricDefinition
from rkmetrics.model import MetricType

DATA = Path(__file__).resolve().parents[1] / "data" / "rivetkit"
DASHBOARDS = [DATA / f"{name}.json" for name in ("api", "operation", "pegboard")]
QUERIES = {"api": 15, "operation": 9, "pegboard": 10}  # of the engine: texts that name one of its metrics
DEAD = {"pegboard": 2}  # of them, queries that no version could answer


def migrated(text: str, table: str, labels: dict[str, str] | None = None, file: str = "f") -> Migrated:
    return migrate(document(file, text), named(table), labels)


def rewritten(query: str, *steps: Table, labels: dict[str, str] | None = None) -> str:
    """The query after the steps; "refused: why" where it stays."""
    text, _, refusal = rewrite(query, steps, labels)
    return text if refusal is None else f"refused: {refusal.why}"


# --- RivetKit's own dashboards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("there", "back"), [("B-C", "C-B"), ("D-C", "C-D"), ("B-D", "D-B")])
def test_rivetkits_dashboards_go_through_the_eras_and_back(path: Path, there: str, back: str) -> None:
    before = read(path)
    first = migrate(before, named(f"rivetkit:{there}"))
    dead = DEAD.get(path.stem, 0)
    assert (first.queries, len(first.problems)) == (QUERIES[path.stem], dead)
    again = migrated(first.text, f"rivetkit:{there}")
    assert (again.changed, len(again.problems)) == (False, dead)
    home = migrated(first.text, f"rivetkit:{back}")
    assert (home.text == before.text, home.queries) == (True, QUERIES[path.stem])


def test_what_no_version_exported_is_told_apart() -> None:
    (first, second) = migrated((DATA / "pegboard.json").read_text(), "rivetkit:B-C").problems
    assert first.what == "no version exported 'rivet_pegboard_event_multiplexer_count': the query was always empty"
    assert (first.place, first.line, first.column) == ("panel 'Event Multiplexer Count', target A", 904, 42)
    assert "rivet_pegboard_ingested_events_total" in second.what


def test_all_names_of_all_109_expressions_are_migrated_or_refused() -> None:
    rows = json.loads((DATA / "dashboard-breakage.json").read_text())
    dead = next(check["missing"] for check in rows["checks"] if check["missing"] != "all")
    refused = 0
    for row in rows["expressions"]:
        text, _, refusal = rewrite(row["expr"], named("rivetkit:B-C"), variable=True)
        names = [name for name in row["metrics"] if name.startswith("rivet_")]
        assert (refusal is not None) == bool(set(names) & set(dead)), row["expr"]
        refused += refusal is not None
        assert refusal is not None or not any(name in text for name in names)
    assert refused == 19


def test_rules_are_rewritten_in_every_style_and_nothing_beside() -> None:
    for there, back, old, new in (("B-C", "C-B", "b", "c"), ("C-B", "B-C", "c", "b")):
        found = migrated((DATA / f"alerts.{old}.yaml").read_text(), f"rivetkit:{there}")
        assert (found.problems, found.text) == ([], (DATA / f"alerts.{new}.yaml").read_text())
        assert migrated(found.text, f"rivetkit:{back}").text == (DATA / f"alerts.{old}.yaml").read_text()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_rules_before_and_after() -> None:
    command = ["promtool", "check", "rules", str(DATA / "alerts.b.yaml"), str(DATA / "alerts.c.yaml")]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout.count("SUCCESS: 9 rules found")) == (0, 2), out.stderr


def sample_queries(definition: MetricDefinition, name: str) -> list[str]:
    """Right queries for a metric, under one of its names."""
    if definition.type is MetricType.HISTOGRAM:
        return [f"rate({name}{suffix}[5m])" for suffix in tables.SUFFIXES]
    return [f"rate({name}[5m])"] if definition.type is MetricType.COUNTER else [name]


def test_every_old_name_is_found_by_the_checks_and_gone_after_the_migration() -> None:
    renamed = [(d, rename.name) for each in sets() for d in each.definitions() for rename in d.renamed_from]
    queries = [query for definition, name in renamed for query in sample_queries(definition, name)]
    before = document("f", in_yaml(queries))
    assert {problem.check for problem in check_documents([before])} == {"renamed-metric"}
    assert len(check_documents([before])) == len(before.queries) == 2 * len(queries) > 100
    after = migrate(before, named("catalogue"))
    assert (after.queries, after.problems) == (len(before.queries), [])
    assert check_documents([document("f", after.text)]) == []


# --- one query --------------------------------------------------------------------------------------------------------

B_C = named("rivetkit:B-C")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("rivet_actor_queue_depth", "rivetkit_actor_queue_depth"),
        ("sum(rivet_actor_active)", "sum(rivetkit_actor_active_count)"),
        ("rivet_actor_dispatch_inbox_depth{}", 'rivetkit_actor_inbox_depth{inbox="dispatch",}'),
        (
            "sum by (job) (rivet_actor_dispatch_inbox_depth) / sum by (job) (rivet_actor_queue_depth)",
            'sum by (job) (rivetkit_actor_inbox_depth{inbox="dispatch"}) / sum by (job) (rivetkit_actor_queue_depth)',
        ),
        (
            "rivet_actor_dispatch_inbox_depth + on (job) rivet_actor_queue_depth",
            'rivetkit_actor_inbox_depth{inbox="dispatch"} + on (job) rivetkit_actor_queue_depth',
        ),
        ("rivet_actor_dispatch_inbox_depth > 5", 'rivetkit_actor_inbox_depth{inbox="dispatch"} > 5'),
        ("rivetkit_actor_queue_depth + up", "rivetkit_actor_queue_depth + up"),
        ("sum by (rivet_project) (rivet_api_request_pending)", "sum by (rivet_project) (api_request_pending)"),
        ("$metric + foo_$bar", "$metric + foo_$bar"),
        ("not promql at all", "not promql at all"),
    ],
)
def test_a_query_is_rewritten(query: str, expected: str) -> None:
    assert rewritten(query, *B_C) == expected


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("rivet_actor_create_state_ms", "gauge in milliseconds became a histogram in seconds"),
        ("rivet_actor_active", "means the same inside sum() only"),
        ("count(rivet_actor_active)", "means the same inside sum() only"),
        ("sum by (actor_key) (rivet_actor_queue_depth)", "label 'actor_key' has no successor"),
        ('rivet_actor_queue_depth{actor_key="x"}', "label 'actor_key' has no successor"),
        ('{__name__=~"rivet_actor_.*"}', "may mean names that changed"),
        ("rivet_actor_$what", "put together from variables"),
        ("rivet_rivetkit_envoy_ping_healthy", "has no successor"),
        ('rivet_actor_dispatch_inbox_depth{inbox="x"}', "which the query has already"),
        ("rivet_actor_dispatch_inbox_depth + rivet_actor_lifecycle_inbox_depth", "would not match"),
        ('{__name__=~"rivet_actor_dispatch_inbox_depth|up"}', "one of several names"),
        ("rivet_actor_queue_depth + rivet_actor_create_vars_ms", "write the query anew"),
        ("rivet_of_somebody_else", "begins like names that lost 'rivet_', but is none that is known"),
        ("rivet_actor_queue_depth default 0", "changed, but the query cannot be read: expected an operator or the end"),
        ("x | rivet_api_request_pending", "'rivet_api_request_pending' changed, but the query cannot be read"),
    ],
)
def test_what_cannot_be_rewritten_says_why_and_the_whole_query_stays(query: str, why: str) -> None:
    text, edits, refusal = rewrite(query, B_C)
    assert refusal is not None
    assert why in refusal.why
    assert (text, edits) == (query, [])


def test_the_way_back_asks_which_of_several_it_was() -> None:
    back = named("rivetkit:C-B")
    assert rewritten('rivetkit_actor_inbox_depth{inbox="dispatch"}', *back) == "rivet_actor_dispatch_inbox_depth"
    assert rewritten('rivetkit_actor_inbox_depth{job="a", inbox="dispatch"}', *back) == (
        'rivet_actor_dispatch_inbox_depth{job="a"}'
    )
    assert "is made of several metrics" in rewritten("sum by (inbox) (rivetkit_actor_inbox_depth)", *back)
    assert "no such label" in rewritten('sum by (inbox) (rivetkit_actor_inbox_depth{inbox="dispatch"})', *back)


def test_names_of_another_era_are_left_as_they_are() -> None:
    for query, table in (("rivet_actor_queue_depth", "D-C"), ("rivet_actor_queue_depth", "D-B"), ("up", "D-A")):
        assert rewritten(query, *named(f"rivetkit:{table}")) == query
    assert rewritten("rivet_rivetkit_actor_queue_depth", *named("rivetkit:B-D")) == "rivet_rivetkit_actor_queue_depth"


def test_what_is_new_in_an_era_has_no_way_back() -> None:
    back = rewritten("rate(rivet_rivetkit_actor_started_total[5m])", *named("rivetkit:D-B"))
    assert back == "refused: 'rivetkit_actor_started_total' has no successor: nothing like it was there before"


def test_several_steps_are_one_for_the_query() -> None:
    steps = named("rivetkit:A-C")
    assert rewritten("dispatch_inbox_depth", *steps) == 'rivetkit_actor_inbox_depth{inbox="dispatch"}'
    assert "milliseconds" in rewritten("create_state_ms + queue_depth", *steps)
    assert rewritten('rivetkit_actor_inbox_depth{inbox="dispatch"}', *named("rivetkit:C-A")) == "dispatch_inbox_depth"


def test_other_systems_names_lead_to_ours_and_their_labels_where_their_owner_says() -> None:
    query = 'sum by (model_name) (vllm:num_requests_waiting{model_name="m"})'
    assert "--label model_name=actor_name" in rewritten(query, *named("vllm"))
    assert rewritten(query, *named("vllm"), labels={"model_name": "actor_name"}) == (
        'sum by (actor_name) (rkmetrics_worker_requests_waiting{actor_name="m"})'
    )
    assert rewritten("dynamo_component_kvstats_total_blocks", *named("dynamo")) == "rkmetrics_kv_blocks"


# --- labels and values ------------------------------------------------------------------------------------------------

NEXT = Table(
    "next",
    "made up",
    {
        "a_total": (
            Change(
                "a_total",
                "a_total",
                labels=(("why", "reason"), ("who", "")),
                values=(("reason", "x", "y"), ("reason", "z", "")),
            ),
        ),
        "b_seconds": (Change("b_seconds", "c_seconds", histogram=True, labels=(("why", "reason"),)),),
    },
)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ('a_total{why="x"}', 'a_total{reason="y"}'),
        ('a_total{why=~"x|w"}', 'a_total{reason=~"y|w"}'),
        ('a_total{why=~"$w"}', 'a_total{reason=~"$w"}'),
        ("sum by (why) (a_total)", "sum by (reason) (a_total)"),
        ("sum by (why, le) (b_seconds_bucket)", "sum by (reason, le) (c_seconds_bucket)"),
        (
            "sum by (why) (a_total) / on (why) sum by (why) (b_seconds_sum)",
            "sum by (reason) (a_total) / on (reason) sum by (reason) (c_seconds_sum)",
        ),
        ("sum by (why) (other)", "sum by (why) (other)"),
        ('a_total{why="z"}', "refused: value reason='z' has no successor"),
        ('a_total{why=~"x.*"}', "refused: the pattern 'x.*' may mean values of 'reason' that changed"),
        ('a_total{who="z"}', "refused: label 'who' has no successor: it was removed"),
        (
            "sum by (why) (a_total + other)",
            "refused: label 'why' belongs to metrics that changed and to others that did not",
        ),
        (
            'label_replace(a_total, "w", "$1", "why", "(.*)")',
            "refused: label 'why' changed, and label_replace() has it in a string",
        ),
    ],
)
def test_labels_and_values_follow_their_metric(query: str, expected: str) -> None:
    assert rewritten(query, NEXT) == expected
    assert rewritten(rewritten(query, NEXT), NEXT) in (expected, rewritten(expected, NEXT))


def test_label_changes_have_a_way_back() -> None:
    query = 'sum by (why) (rate(b_seconds_bucket{why="x"}[5m])) / on (why) rate(a_total{why="x"}[5m])'
    there = rewritten(query, NEXT)
    assert rewritten(there, NEXT.inverse("back")) == query


def test_legends_and_variables_follow_the_labels() -> None:
    target = {"expr": "sum by (why) (a_total)", "legendFormat": "{{why}} {{ why }} {{other}}"}
    variable = {
        "name": "v",
        "type": "query",
        "definition": "label_values(a_total, why)",
        "query": {"query": "label_values(a_total, why)"},
    }
    text = json.dumps(
        {"title": "T", "panels": [{"title": "P", "targets": [target]}], "templating": {"list": [variable]}}
    )
    found = migrate(document("f", text), [NEXT])
    assert found.text == text.replace("(why)", "(reason)").replace(
        "{{why}} {{ why }}", "{{reason}} {{ reason }}"
    ).replace(", why)", ", reason)")


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_stands_around_a_query_keeps_its_bytes() -> None:
    text = (
        '\ufeff{"a" : "\\u003crivet_actor_queue_depth",\r\n'
        '\t"panels":[{"expr":"\\u0073um(rivet_actor_queue_depth)\\t\\u003e 1"}] }\r\n\r\n'
    )
    assert migrated(text, "rivetkit:B-C").text == text.replace("(rivet_", "(rivetkit_")


def test_where_the_style_cannot_hold_it_nothing_is_written() -> None:
    text = "- {alert: A, expr: rivet_actor_dispatch_inbox_depth > 1}\n- {alert: B, expr: rivet_actor_queue_depth > 1}\n"
    found = migrated(text, "rivetkit:B-C")
    assert [problem.what for problem in found.problems] == ["the way it is written cannot hold the new text; quote it"]
    assert found.text == text.replace("rivet_actor_queue", "rivetkit_actor_queue")


def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path, link = tmp_path / "a.yaml", tmp_path / "link.yaml"
    path.write_text("- expr: rivet_actor_queue_depth\r\n", newline="")
    path.chmod(0o640)
    link.symlink_to(path)
    (found,) = migrate_files([link], ["rivetkit:B-C"])
    write(Path(found.file), found.text)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"- expr: rivetkit_actor_queue_depth\r\n", 0o640)
    assert (link.is_symlink(), sorted(entry.name for entry in tmp_path.iterdir())) == (True, ["a.yaml", "link.yaml"])


def test_a_diff_is_one_that_patch_takes() -> None:
    found = migrated("- expr: rivet_actor_queue_depth", "rivetkit:B-C", file="x.yaml")
    assert unified(found) == (
        "--- a/x.yaml\n+++ b/x.yaml\n@@ -1 +1 @@\n-- expr: rivet_actor_queue_depth\n\\ No newline at end of file\n"
        "+- expr: rivetkit_actor_queue_depth\n\\ No newline at end of file\n"
    )


def test_only_a_line_feed_ends_a_line_of_a_diff() -> None:
    found = migrated('{"title": "\u2028\x85", "expr": "rivet_actor_queue_depth"}\n', "rivetkit:B-C", file="x.json")
    assert unified(found).split("\n") == [
        "--- a/x.json",
        "+++ b/x.json",
        "@@ -1 +1 @@",
        '-{"title": "\u2028\x85", "expr": "rivet_actor_queue_depth"}',
        '+{"title": "\u2028\x85", "expr": "rivetkit_actor_queue_depth"}',
        "",
    ]


# --- any query --------------------------------------------------------------------------------------------------------

C_B = named("rivetkit:C-B")
PLAIN = sorted(
    change.old + suffix
    for changes in B_C[0].changes.values()
    for change in changes
    if change.new and not change.cannot and not change.only_in
    for suffix in (tables.SUFFIXES if change.histogram else ("",))
) + [
    f"rivet_{name}"
    for name in sorted(C_B[0].prefix.families if C_B[0].prefix else ())[:40]
    if f"rivet_{name}" not in B_C[0].changes
]
NAMES = st.sampled_from([*PLAIN, "up", "node_load1", "foreign:rate5m"])
MATCHERS = st.sampled_from(["", "{}", '{job="a"}', "{ job = 'a' , x!=`b` }", '{job=~"$job",}'])
SELECTORS = st.tuples(NAMES, MATCHERS).map("".join) | NAMES.map('{{__name__="{0}"}}'.format)
EXPRESSIONS = st.recursive(
    SELECTORS,
    lambda inner: st.one_of(
        inner.map("sum by (job) ({})".format),
        inner.map("( {} ) # (rivet_actor_queue_depth)\n".format),
        inner.map("rate({}[5m:1m])".format),
        st.tuples(inner, inner).map(lambda pair: f"{pair[0]} + on (job) {pair[1]}"),
        st.tuples(inner, inner).map(lambda pair: f"{pair[0]}\n/ {pair[1]}"),
    ),
    max_leaves=4,
)


def in_json(queries: list[str]) -> str:
    return json.dumps(
        {"panels": [{"title": "rivet_actor_queue_depth", "targets": [{"expr": query}]} for query in queries]}, indent=1
    )


def in_yaml(queries: list[str]) -> str:
    literal = "".join(
        "- alert: A\n  expr: |2\n" + "".join(f"    {line}\n" for line in query.split("\n")) for query in queries
    )
    return literal + "".join(f"- expr: {json.dumps(query)} # rivet_actor_queue_depth\n" for query in queries)


@settings(deadline=None)
@given(st.lists(EXPRESSIONS, min_size=1, max_size=4), st.sampled_from([in_json, in_yaml]))
def test_migrating_twice_is_migrating_once_and_the_inverse_restores_the_bytes(queries: list[str], form: object) -> None:
    assert callable(form)
    text = str(form(queries))
    there = migrated(text, "rivetkit:B-C")
    again = migrated(there.text, "rivetkit:B-C")
    assert (again.changed, len(again.problems)) == (False, len(there.problems))
    assert migrated(there.text, "rivetkit:C-B").text == text
    assert migrate(document("f", text), [Table("none", "", {})]).text == text


@settings(deadline=None)
@given(EXPRESSIONS)
def test_edits_lead_from_the_original_to_what_is_said(query: str) -> None:
    from rkmetrics.promql import apply

    for name in ("rivetkit:B-C", "rivetkit:B-D", "rivetkit:B-A"):
        text, edits, refusal = rewrite(query, named(name))
        assert apply(query, edits) == text
        assert refusal is None or 0 <= refusal.start < refusal.end <= len(query)
