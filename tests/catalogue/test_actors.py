"""The actor families against RivetKit's, and each of them, value by value, against the calls that reach it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.actor import ActorMetrics
from rkmetrics.catalogue.actors import (
    ActorKv,
    Actors,
    Inbox,
    KeepAwake,
    KvOp,
    Phase,
    ShutdownReason,
    StateWrite,
    StopReason,
    Subsystem,
    TaskKind,
)
from rkmetrics.definition import OTHER, MetricDefinition
from rkmetrics.model import HistogramValue, MetricFamily

HERE = Path(__file__).resolve()
COPY: dict[str, Any] = json.loads((HERE.parents[1] / "data/rivetkit_actor_catalog.json").read_text())
SHARED = HERE.parents[3] / "shared/fixtures/rivetkit/catalog.json"

OURS: Mapping[str, MetricDefinition] = {definition.name: definition for definition in Actors.definitions()}
KV: Mapping[str, MetricDefinition] = {definition.name: definition for definition in ActorKv.definitions()}

# What differs from RivetKit, and nothing else does (docs/decisions/0010-actor-families.md).
NEW_FAMILIES = {"rivetkit_actor_active_peak", "rivetkit_actor_action_calls_total"}
NEW_LABELS = {"rivetkit_actor_stopped_total": ["reason"], "rivetkit_actor_user_task_duration_seconds": ["outcome"]}
NEW_VALUES = {
    ("rivetkit_actor_startup_phase_duration_seconds", "phase"): {"create_state", "create_vars"},
    ("rivetkit_actor_state_mutation_total", "reason"): {"user_write"},
    ("rivetkit_actor_direct_subsystem_shutdown_warning_total", "operation"): {"sleep_drain"},
}
LEFT_OUT = {("rivetkit_actor_startup_phase_duration_seconds", "phase"): {"unknown"}}


def reduced(metric: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the full catalogue as the copy has it."""
    labels = {name: metric["labels"][name]["values"] for name in metric["label_names"] if name != "actor_name"}
    return {"name": metric["name"], "type": metric["type"], "labels": labels, "buckets": metric.get("buckets", [])}


class TestRivetKit:
    def test_the_copy_says_what_the_fixture_says(self) -> None:
        if not SHARED.exists():
            pytest.skip(f"{SHARED} is not here; the copy in tests/data stands for it")
        full = json.loads(SHARED.read_text())["metrics"]
        assert [reduced(metric) for metric in full if metric["group"] == "actor"] == COPY["families"]

    def test_all_21_families_are_declared_and_two_more(self) -> None:
        theirs = {family["name"] for family in COPY["families"]}
        assert len(theirs) == 21
        assert set(OURS) - theirs == NEW_FAMILIES
        assert theirs - set(OURS) == set()

    @pytest.mark.parametrize("family", COPY["families"], ids=lambda family: family["name"])
    def test_type_labels_values_and_buckets_are_the_same(self, family: Mapping[str, Any]) -> None:
        name, ours = family["name"], OURS[family["name"]]
        assert (ours.type.value, list(ours.bounds)) == (family["type"], family["buckets"])
        assert [label.name for label in ours.labels] == [*family["labels"], *NEW_LABELS.get(name, [])]
        for label in ours.labels:
            if label.name in family["labels"]:
                theirs = set(family["labels"][label.name]) - LEFT_OUT.get((name, label.name), set())
                assert set(label.values) == theirs | NEW_VALUES.get((name, label.name), set())

    def test_label_values_are_lower_snake_words(self) -> None:
        values = [v for d in (*OURS.values(), *KV.values()) for label in d.labels for v in label.values]
        assert [value for value in values if not value.replace("_", "").isalpha() or value != value.lower()] == []

    def test_the_one_name_that_lint_frowns_at_says_why(self) -> None:
        assert [name for name, definition in OURS.items() if definition.exception] == ["rivetkit_actor_active_count"]

    def test_old_names_become_one_new_name_each(self) -> None:
        old = [rename.name for d in (*OURS.values(), *KV.values()) for rename in d.renamed_from]
        assert len(old) == len(set(old))
        assert {f"rivet_{family['name']}" for family in COPY["families"]} <= set(old)  # the prefix that came twice
        assert not set(old) & {*OURS, *KV}


# --- every value is reached by a public call --------------------------------------------------------------------------


class Broken(Exception):
    pass


ENDS: Mapping[str, BaseException | None] = {"success": None, "error": Broken(), "cancelled": GeneratorExit()}


def live(actor: ActorMetrics) -> None:
    """Call everything that ActorMetrics offers, with every declared value."""
    run = actor.running(actor_id="room-1").begin()
    for reason in StopReason:
        if reason is not StopReason.LOST:
            actor.running().begin().stop(reason)
    actor.running().begin()  # dropped: lost
    for is_new, end in product((True, False, None), ("success", "error")):
        startup = run.startup(is_new).begin()
        for phase in Phase:
            if phase is not Phase.TOTAL:
                startup.phase(phase).begin().end(ENDS[end])
        startup.end(ENDS[end])
    for kind, error in product(TaskKind, ENDS.values()):
        run.task(kind).begin().end(error)
    for share in (run.queue_depth, *(run.inbox_depth(inbox) for inbox in Inbox)):
        share.set(2)
    for held in (run.connection(), run.http_request(), run.shutdown_task(), *map(run.keep_awake, KeepAwake)):
        held.begin()
    actor.queue_sent.inc()
    actor.queue_received.inc()
    for write in StateWrite:
        actor.state_written(write)
    for why in ShutdownReason:
        with run.shutdown(why) as shutdown:
            shutdown.timed_out()
            for subsystem in Subsystem:
                shutdown.undrained(subsystem)
    for op in KvOp:
        actor.kv(op, keys=3).begin().end()
    run.end()


def updated(registry: rk.Registry, definition: MetricDefinition) -> Iterator[tuple[str, ...]]:
    """The label values of the series that some call has changed: gauges that were set, counts that are not 0."""
    (family,) = registry.collect([definition.name])
    assert isinstance(family, MetricFamily)
    for series in family.series():
        value = series.value.count if isinstance(series.value, HistogramValue) else series.value
        if value or definition.type.value == "gauge":
            yield tuple(value for name, value in series.labels if name != "actor_name")


@pytest.fixture(scope="module")
def driven() -> rk.Registry:
    registry = rk.Registry(rk.Settings(), builtin=False, strict=True)
    live(registry.actor("lobby"))
    return registry


@pytest.mark.parametrize("definition", [*OURS.values(), *KV.values()], ids=lambda definition: definition.name)
def test_each_declared_combination_of_values_is_reachable(driven: rk.Registry, definition: MetricDefinition) -> None:
    declared = set(product(*(label.values for label in definition.labels)))
    assert set(updated(driven, definition)) == declared


def test_an_actor_that_only_exists_exposes_counters_at_zero_and_no_gauge() -> None:
    registry = rk.Registry(rk.Settings(), builtin=False)
    registry.actor("lobby")
    families = [family for family in registry.collect([*OURS, *KV]) if isinstance(family, MetricFamily)]
    series = {family.name: list(family.series()) for family in families}
    assert [family.name for family in families if family.shape.type.value == "gauge" and series[family.name]] == []
    assert len(series["rivetkit_actor_stopped_total"]) == len(StopReason)
    assert sum(len(found) * OURS[name].lines_per_series for name, found in series.items() if name in OURS) <= 100


class TestBudget:
    """An actor name costs a bounded number of lines, and no value of a label can change that."""

    def test_the_worst_case_for_one_name_is_what_the_decision_says(self) -> None:
        registry = rk.Registry(rk.Settings(), builtin=False)
        actor = registry.actor("lobby")
        lines = {metric.metric: metric.lines_per_name for metric in registry.budget().metrics}
        assert sum(lines[name] for name in OURS) <= 2600
        assert sum(lines[name] for name in KV) <= 250
        live(actor)
        assert self.lines(registry) <= 1600

    def test_values_that_nobody_declared_stay_within_it(self) -> None:
        registry = rk.Registry(rk.Settings(), builtin=False)
        actor = registry.actor("lobby")
        live(actor)
        run = actor.running().begin()
        for i in range(50):
            word = f"made_up_{i}"
            run.task(word).begin().end()
            run.startup().begin().phase(word).begin().end()
            run.shutdown(word).begin().undrained(word)
            run.keep_awake(word).begin()
            run.inbox_depth(word).set(1)
            actor.state_written(word)
            actor.kv(word, keys=1).begin().end()
            actor.running().begin().stop(word)
        assert self.lines(registry) <= sum(
            metric.lines_per_name for metric in registry.budget().metrics if metric.metric in {*OURS, *KV}
        )
        assert registry.overflows()["rivetkit_actor_user_tasks_active", "kind"].count == 50
        (tasks,) = registry.collect(["rivetkit_actor_user_tasks_active"])
        assert isinstance(tasks, MetricFamily)
        assert {series.labels[1][1] for series in tasks.series()} == {*TaskKind, OTHER}

    @staticmethod
    def lines(registry: rk.Registry) -> int:
        known = {**OURS, **KV}
        families = [family for family in registry.collect([*known]) if isinstance(family, MetricFamily)]
        return sum(known[family.name].lines_per_series for family in families for _ in family.series())
