"""Rename tables: what they say, that today's names exist, and that each has its inverse."""

from __future__ import annotations

import pytest

from rkmetrics.assets.tables import Table, bases, named, names
from rkmetrics.catalogue import sets

OURS = {definition.name: definition for each in sets() for definition in each.definitions()}


def test_tables_are_known_by_name() -> None:
    assert len(names()) == 15
    assert [[step.name for step in named(name)] for name in ("rivetkit:A-D", "rivetkit:D-B", "vllm")] == [
        ["rivetkit:A-B", "rivetkit:B-C", "rivetkit:C-D"],
        ["rivetkit:D-C", "rivetkit:C-B"],
        ["vllm"],
    ]
    with pytest.raises(KeyError):
        named("rivetkit:A-A")


@pytest.mark.parametrize("name", ["catalogue", "dynamo", "vllm"])
def test_tables_that_lead_to_ours_lead_to_metrics_that_exist(name: str) -> None:
    changes = [change for (step,) in [named(name)] for found in step.changes.values() for change in found]
    assert [change.new for change in changes if change.new and change.new not in OURS] == []
    assert [change.old for change in changes if not change.new and not change.why] == []


def test_the_catalogues_table_is_what_definitions_say() -> None:
    (table,) = named("catalogue")
    said = {rename.name: definition.name for definition in OURS.values() for rename in definition.renamed_from}
    assert {old: found[0].new for old, found in table.changes.items()} == said


def test_rivetkits_era_c_has_our_names() -> None:
    """What became of a name of era B is what our catalogue says became of it."""
    (table,) = named("rivetkit:B-C")
    said = {rename.name: definition.name for definition in OURS.values() for rename in definition.renamed_from}
    wrong = {old: new for old, new in said.items() if old in table.changes and table.changes[old][0].new != new}
    assert wrong == {}
    prefix = table.prefix
    assert prefix is not None
    stripped = {old: prefix.apply(old) for old in said if old not in table.changes}
    assert {old: new for old, new in stripped.items() if new != said[old]} == {}


def pairs(table: Table) -> set[tuple[str, str]]:
    return {(change.old, change.new) for found in table.changes.values() for change in found if change.new}


@pytest.mark.parametrize("step", ["A-B", "B-C", "C-D"])
def test_each_step_has_its_inverse(step: str) -> None:
    (there,), (back,) = named(f"rivetkit:{step}"), named(f"rivetkit:{step[::-1]}")
    assert pairs(back) == {(new, old) for old, new in pairs(there)}
    assert (dict(there.gone), dict(there.added)) == (dict(back.added), dict(back.gone))


def test_one_old_name_has_one_successor_unless_matchers_tell_them_apart() -> None:
    for name in names():
        for step in named(name):
            several = [found for found in step.changes.values() if len(found) > 1]
            assert [found for found in several if len({change.needs for change in found}) != len(found)] == []


def test_a_sample_is_found_by_its_family_where_that_is_a_histogram() -> None:
    (table,) = named("rivetkit:B-C")
    assert table.find("rivet_actor_shutdown_wait_seconds_sum")[1] == "_sum"
    assert table.find("rivet_actor_queue_depth_sum") == ((), "")
    assert list(bases("a_sum_count")) == ["a_sum_count", "a_sum"]
