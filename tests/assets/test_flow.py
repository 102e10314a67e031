"""Which labels are left: each operator and function as Prometheus defines it."""

from __future__ import annotations

import pytest

from rkmetrics.assets.flow import ANY, Flow, Labels
from rkmetrics.assets.known import Known
from rkmetrics.catalogue import sets
from rkmetrics.promql import parse

KNOWN = Known(definition for each in sets() for definition in each.definitions())
TASKS = "rivetkit_actor_user_tasks_active"  # actor_name, kind
BUCKET = "rivetkit_actor_user_task_duration_seconds_bucket"  # actor_name, kind, outcome, le


def labels(query: str) -> Labels:
    return Flow(KNOWN, {"a:b:sum": Labels(frozenset({"kind"}))}).of(parse(query))


@pytest.mark.parametrize(
    ("query", "names"),
    [
        (TASKS, "actor_name kind target"),
        (f"{TASKS} offset 5m", "actor_name kind target"),
        (f"-({TASKS})", "actor_name kind target"),
        (f"rate({BUCKET}[5m])", "actor_name kind le outcome target"),
        (f"sum({TASKS})", ""),
        (f"sum by (kind, job) ({TASKS})", "job kind"),
        (f"sum without (kind) ({TASKS})", "actor_name target"),
        (f"topk by (job) (3, {TASKS})", "actor_name kind target"),
        (f"quantile by (kind) (0.5, {TASKS})", "kind"),
        (f'count_values by (kind) ("n", {TASKS})', "kind n"),
        (f"histogram_quantile(0.5, {BUCKET})", "actor_name kind outcome target"),
        (f'label_replace({TASKS}, "new", "$1", "job", "(.*)")', "actor_name kind new target"),
        (f"max_over_time({TASKS}[5m])", "actor_name kind target"),
        (f"quantile_over_time(0.5, {TASKS}[5m])", "actor_name kind target"),
        (f'absent({TASKS}{{kind="http", job=~"x"}})', "kind"),
        (f"scalar(sum({TASKS}))", ""),
        ("vector(1)", ""),
        (f"{TASKS} > 5", "actor_name kind target"),
        (f"5 - {TASKS}", "actor_name kind target"),
        (f"time() - {TASKS}", "actor_name kind target"),
        (f"{TASKS} and on (job) up", "actor_name kind target"),
        (f"sum by (kind) ({TASKS}) or sum by (job) ({TASKS})", "job kind"),
        (f"{TASKS} / on (kind) sum by (kind) ({TASKS})", "kind"),
        (f"{TASKS} / ignoring (actor_name) sum by (kind) ({TASKS})", "kind target"),
        (f"{TASKS} / on (kind) group_left sum by (kind) ({TASKS})", "actor_name kind target"),
        (f"{TASKS} * on (job) group_left (version) rkmetrics_build_info", "actor_name kind target version"),
        (f"sum by (kind) ({TASKS}) * on (kind) group_right {TASKS}", "actor_name kind target"),
        ("a:b:sum", "kind"),
        ('{__name__=~"rkmetrics_kv_blocks|rkmetrics_kv_workers"}', "actor_name state target"),
    ],
)
def test_what_is_left(query: str, names: str) -> None:
    found = labels(query)
    assert sorted([*found.names, *(["target"] if found.target else [])]) == sorted(names.split())


@pytest.mark.parametrize(
    "query",
    [
        "foreign",
        "$x",
        f"sum by ($by) ({TASKS})",
        f"$agg({TASKS})",
        f"info({TASKS})",
        f'{{__name__=~"{TASKS}|foreign"}}',
        '{job="a"}',
    ],
)
def test_what_cannot_be_known_may_have_any_label(query: str) -> None:
    assert labels(query) == ANY


def test_what_was_taken_away_is_gone_even_from_targets() -> None:
    found = labels("sum without (job) (rkmetrics_kv_blocks)")
    asked = ("job", "instance", "actor_name", "kind")
    assert [label for label in asked if found.has(label, KNOWN)] == ["instance", "actor_name"]
