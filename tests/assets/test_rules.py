"""The checks, on files whose names say the verdict: `<check>.bad.*` has the problem in each query, `*.good.*` none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.assets import tables
from rkmetrics.assets.base import Problem
from rkmetrics.assets.checking import check_documents, check_files
from rkmetrics.assets.documents import document, read
from rkmetrics.assets.rules import CHECKS, SYNTAX
from tests.assets.corpus import CORRECT, RECORDED
from tests.assets.mutants import mutants

FILES = sorted((Path(__file__).parent / "checks").iterdir())
BAD = [path for path in FILES if ".bad." in path.name]
GOOD = [path for path in FILES if ".good." in path.name]


def problems(*queries: str, **options: object) -> list[Problem]:
    """What is wrong with queries, written one by one into a rule file."""
    rules = "".join(f"  - alert: A{i}\n    expr: |-\n      {query}\n" for i, query in enumerate(queries))
    text = f"groups:\n- name: g\n  rules:\n{RECORDED}{rules}"
    return check_documents([document("rules.yaml", text)], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.name)
def test_nothing_is_wrong_with_what_is_good(path: Path) -> None:
    found = check_files([path])
    assert (found, found.queries > 0) == ([], True)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.name)
def test_each_bad_query_is_found_with_its_check_and_its_place(path: Path) -> None:
    expected = path.name.partition(".")[0]
    found = [problem for problem in check_files([path]) if problem.check == expected]
    places = {problem.place for problem in found}
    queries = [query for query in read(path).queries if query.record is None and "annotation" not in query.place]
    assert [query.scalar.value for query in queries if query.place not in places] == []
    assert [problem for problem in found if problem.end_column <= problem.column] == []


def test_each_check_has_good_and_bad_files() -> None:
    names = {check.name for check in CHECKS} | {SYNTAX}
    assert {path.name.partition(".")[0] for path in BAD} == names
    assert names <= {path.name.partition(".")[0] for path in GOOD}


WORDS = """
a rkmetrics_kv_blocks rkmetrics_kv_workers{state="fresh"} rivet_actor_queue_depth sum by (le ) ( , on group_left rate(
[5m] histogram_quantile(0.9, label_replace( "x" or / * - > 1 $x {{ }} { } =~ "a|b" count_values( without
"""


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(WORDS.split()), max_size=25).map(" ".join)
    | st.lists(st.sampled_from(CORRECT), max_size=3).map(" + ".join)
)
def test_any_query_is_checked(query: str) -> None:
    panel = {"title": "P", "targets": [{"expr": query, "legendFormat": "{{x}}"}]}
    check_documents([document("f", json.dumps({"panels": [panel]}))])


@pytest.mark.parametrize(
    "query",
    [
        "rkmetrics_kv_blocks" + " + rkmetrics_kv_blocks" * 200,
        "sum(" * 58 + "rkmetrics_kv_blocks" + ")" * 58,
        "(" * 58 + "rkmetrics_kv_blocks" + " + 1)" * 58 + " + 1" * 140,
        "rkmetrics_kv_blocks ^ " * 58 + "1",
    ],
)
def test_the_deepest_queries_that_are_read_are_checked(query: str) -> None:
    assert problems(query) == []


@pytest.mark.parametrize("query", CORRECT)
def test_correct_queries_pass(query: str) -> None:
    assert problems(query) == []


def all_mutants() -> Iterator[tuple[str, str, str]]:
    return ((query, kind, mutant) for query in CORRECT for kind, mutant in mutants(query))


def test_no_mutant_of_a_correct_query_survives() -> None:
    found = list(all_mutants())
    rules = problems(*(mutant for _, _, mutant in found))
    caught = {problem.place for problem in rules}
    survivors = [mutant for i, mutant in enumerate(found) if f"alert 'A{i}'" not in caught]
    assert survivors == []
    assert len(found) > 1000
    assert {kind for _, kind, _ in found} == {"metric", "label", "value", "grouping", "function", "le"}


def test_a_problem_says_place_and_mend() -> None:
    (problem,) = problems('rkmetrics_kv_workers{state="frsh"}')
    assert (problem.line, problem.column, problem.end_column) == (8, 35, 39)
    assert problem.place == "alert 'A0'"
    assert problem.what == "unknown value state='frsh' of 'rkmetrics_kv_workers'"
    assert problem.mend == "did you mean 'fresh'?"


def test_an_old_name_is_led_to_the_new_one() -> None:
    (problem,) = problems("rivet_actor_lifecycle_inbox_depth")
    assert "'rivetkit_actor_inbox_depth{inbox=\"lifecycle\"}'" in problem.mend
    assert problem.mend.endswith("rkmetrics assets migrate --table rivetkit:B-C")
    assert problems("vllm:num_requests_running") == []
    (problem,) = problems("rivetkit_actor_sqlite_workers_active")
    assert problem.mend == "RivetKit has it, rkmetrics does not"
    (problem,) = problems("vllm:num_requests_running", tables=["vllm"])
    assert "rkmetrics_worker_request_active_slots" in problem.mend


def test_labels_of_relabelling_and_checks_to_leave_out_are_options() -> None:
    assert [problem.check for problem in problems('rkmetrics_kv_blocks{squad="x"}')] == ["unknown-label"]
    assert problems('rkmetrics_kv_blocks{squad="x"}', labels=["squad"]) == []
    assert problems('rkmetrics_kv_blocks{squad="x"}', ignore=["unknown-label"]) == []


def test_labels_and_values_that_were_renamed_lead_to_the_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LABELS", {("rkmetrics_kv_workers", "freshness"): "state"})
    monkeypatch.setattr(tables, "VALUES", {("rkmetrics_kv_workers", "state", "old"): "stale"})
    found = problems('rkmetrics_kv_workers{freshness="fresh"}', 'rkmetrics_kv_workers{state="old"}')
    assert [problem.mend for problem in found] == [
        "renamed to 'state': rkmetrics assets migrate --table catalogue",
        "renamed to 'stale': rkmetrics assets migrate --table catalogue",
    ]


def test_recordings_are_known_across_files_with_the_labels_that_they_have() -> None:
    rule = "record: 'kind:rivetkit_actor_user_tasks_active:sum', expr: sum by (kind) (rivetkit_actor_user_tasks_active)"
    rules = f"groups: [{{name: g, rules: [{{{rule}}}]}}]"
    panel = '{"title": "T", "panels": [{"title": "P", "targets": [{"expr": "sum by (actor_name) (%s)"}]}]}'
    documents = [
        document("rules.yaml", rules),
        document("a.json", panel % "kind:rivetkit_actor_user_tasks_active:sum"),
        document("b.json", panel % "kind:rivetkit_actor_user_tasks_active:summ"),
    ]
    found = check_documents(documents)
    assert [(problem.file, problem.check) for problem in found] == [
        ("a.json", "lost-label"),
        ("b.json", "unknown-metric"),
    ]


class Lobby(rk.MetricSet):
    """An application's own set."""

    joins = rk.Counter("lobby_joins_total", "Joins.", how=rk.OneOf("link", "code"))
    wait = rk.Histogram("lobby_wait_seconds", "Waiting.", buckets=rk.LATENCY, native=True)


def test_an_applications_own_metrics_are_known_beside_ours() -> None:
    own = Lobby.definitions()
    good = ['rate(lobby_joins_total{how="link"}[5m])', "rkmetrics_kv_blocks", "lobby_unknown"]
    assert [problem.check for problem in problems(*good, definitions=own)] == ["unknown-metric"]
    assert problems("lobby_unknown") == []
    native = "histogram_quantile(0.9, sum by (job) (rate(lobby_wait_seconds[5m])))"
    assert problems(native, definitions=own) == []
    (problem,) = problems('rate(lobby_joins_total{how="cod"}[5m])', definitions=own)
    assert problem.mend == "did you mean 'code'?"
