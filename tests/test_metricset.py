"""Declaring sets, and the cells that a bound set gives."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.metricset import Cells, Registered


class Kind(StrEnum):
    TEXT = "text"
    IMAGE = "image"


class Chat(rk.MetricSet):
    messages = rk.Counter("tchat_messages_total", "Messages handled.", kind=rk.OneOf(Kind))
    calls = rk.Counter("tchat_calls_total", "Calls.", kind=rk.OneOf(Kind), outcome=rk.OneOf("ok", "error"))
    members = rk.Gauge("tchat_members", "Members in rooms.", across="sum")
    peak = rk.Peak("tchat_members_peak", "Most members of late.", of=members)
    reply = rk.Histogram("tchat_reply_duration_seconds", "Time to reply.", buckets=rk.LATENCY)


def registry(**kwargs: Any) -> rk.Registry:
    return rk.Registry(rk.Settings(), builtin=False, **kwargs)


def values(registry: rk.Registry, name: str) -> dict[tuple[str, ...], Any]:
    family: Any
    (family,) = registry.collect([name])
    return {tuple(value for _, value in series.labels): series.value for series in family.series()}


def test_the_attribute_is_the_cell_itself_and_stays_the_same() -> None:
    lobby = registry().bind(Chat, actor_name="lobby")
    assert type(lobby.members) is rk.GaugeCell
    assert lobby.members is lobby.members
    assert isinstance(lobby.messages, Cells)
    assert lobby.messages["text"] is lobby.messages[Kind.TEXT]
    assert type(lobby.reply) is rk.HistogramCell


def test_closed_counters_and_histograms_start_at_zero_and_gauges_do_not() -> None:
    r = registry()
    r.bind(Chat, actor_name="lobby")
    assert values(r, "tchat_messages_total") == {("lobby", "text"): 0.0, ("lobby", "image"): 0.0}
    assert len(values(r, "tchat_calls_total")) == 4
    assert values(r, "tchat_members") == {}
    assert values(r, "tchat_members_peak") == {}
    assert values(r, "tchat_reply_duration_seconds")[("lobby",)].count == 0


def test_a_large_product_starts_series_by_series() -> None:
    class Large(rk.MetricSet):
        took = rk.Histogram("tlarge_duration_seconds", "Time.", kind=rk.OneOf("a", "b", "c", "d"))

    r = registry()
    bound = r.bind(Large, actor_name="x")
    assert values(r, "tlarge_duration_seconds") == {}
    bound.took["a"].observe(1)
    assert list(values(r, "tlarge_duration_seconds")) == [("x", "a")]


def test_several_labels_are_indexed_in_their_declared_order() -> None:
    r = registry()
    bound = r.bind(Chat, actor_name="lobby")
    bound.calls["text", "ok"].inc(2)
    bound.calls[Kind.IMAGE, "error"].inc(3)
    got = values(r, "tchat_calls_total")
    assert (got[("lobby", "text", "ok")], got[("lobby", "image", "error")]) == (2.0, 3.0)


@pytest.mark.parametrize("key", ["text", ("text",), ("text", "ok", "x"), ()])
def test_a_key_with_the_wrong_number_of_values_raises(key: Any) -> None:
    bound = registry().bind(Chat, actor_name="lobby")
    with pytest.raises(TypeError, match=r"\(kind, outcome\)"):
        bound.calls[key]


@pytest.mark.parametrize("value", ["video", "TEXT", "", "text\n", 1, None, True, "\ud800", "x" * 10_000])
def test_an_undeclared_value_counts_as_other_of_that_label_only(value: Any) -> None:
    r = registry()
    bound = r.bind(Chat, actor_name="lobby")
    bound.calls[value, "error"].inc()
    bound.calls["text", value].inc(2)
    got = values(r, "tchat_calls_total")
    assert (got[("lobby", "__other__", "error")], got[("lobby", "text", "__other__")]) == (1.0, 2.0)
    assert {key: o.count for key, o in r.overflows().items()} == {
        ("tchat_calls_total", "kind"): 1,
        ("tchat_calls_total", "outcome"): 1,
    }
    counted = values(r, "rkmetrics_label_overflow_total")
    assert (counted[("tchat_calls_total", "kind")], counted[("tchat_calls_total", "outcome")]) == (1.0, 1.0)
    assert counted[("*", "actor_name")] == 0.0  # there before its first event, for increase() to see that
    assert all(len(sample) <= 64 for o in r.overflows().values() for sample in o.samples)


def test_strict_raises_for_an_undeclared_value_with_what_is_expected() -> None:
    bound = registry(strict=True).bind(Chat, actor_name="lobby")
    with pytest.raises(rk.LabelValueError) as caught:
        bound.messages["video"]
    assert str(caught.value) == "tchat_messages_total: kind='video' is not declared; expected one of: text, image"


def test_undeclared_values_cost_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    r = registry()
    bound = r.bind(Chat, actor_name="lobby")
    for i in range(2_000):
        bound.messages[f"bogus-{i}"].inc()
    assert len(bound.messages) == 1
    assert values(r, "tchat_messages_total")[("lobby", "__other__")] == 2_000.0
    (overflow,) = r.overflows().values()
    assert (overflow.count, len(overflow.samples)) == (2_000, 5)
    assert len([record for record in caplog.records if "tchat_messages_total" in record.getMessage()]) == 1


def test_a_set_is_bound_and_not_made() -> None:
    with pytest.raises(TypeError, match=r"registry\.bind\(Chat, actor_name='\.\.\.'\)"):
        Chat()


def test_an_unknown_attribute_is_an_error() -> None:
    bound = registry().bind(Chat, actor_name="lobby")
    with pytest.raises(AttributeError):
        bound.mesages  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="read from the gauge"):
        bound.peak  # noqa: B018


def test_a_peak_follows_its_gauge() -> None:
    r = registry()
    bound = r.bind(Chat, actor_name="lobby")
    bound.members.set(9)
    bound.members.set(2)
    assert (values(r, "tchat_members"), values(r, "tchat_members_peak")) == ({("lobby",): 2.0}, {("lobby",): 9.0})


def test_a_name_with_another_shape_is_refused_at_import() -> None:
    with pytest.raises(rk.DefinitionError, match=r"declared with another shape in .*Chat"):

        class Other(rk.MetricSet):
            messages = rk.Gauge("tchat_members", "Other.", across="max")


def test_a_class_that_is_run_again_replaces_itself() -> None:
    def declare(kind: str) -> type[rk.MetricSet]:
        class Notebook(rk.MetricSet):
            x = rk.Counter("tnotebook_x_total", "Help.", kind=rk.OneOf(kind))

        return Notebook

    first, second = declare("a"), declare("b")
    assert first.definitions() != second.definitions()


def test_a_derived_set_has_the_metrics_of_its_base_as_well() -> None:
    class Base(rk.MetricSet):
        a = rk.Counter("tderived_a_total", "Help.")

    class Derived(Base):
        b = rk.Counter("tderived_b_total", "Help.")

    assert [d.name for d in Derived.definitions()] == ["tderived_a_total", "tderived_b_total"]
    r = registry()
    r.bind(Derived, actor_name="x").a.inc()
    assert values(r, "tderived_a_total") == {("x",): 1.0}
    with pytest.raises(rk.RegistryError, match=r"tderived_a_total of Base is taken by Derived"):
        r.bind(Base, actor_name="x")


@pytest.mark.parametrize("name", ["layout", "actor_name", "per_actor", "definitions", "_block", "start_time"])
def test_an_attribute_that_sets_have_already_is_refused(name: str) -> None:
    with pytest.raises(rk.DefinitionError, match="belongs to MetricSet"):
        type("Bad", (rk.MetricSet,), {name: rk.Counter("tbad_x_total", "Help.")})


def test_a_metric_lives_in_a_set() -> None:
    with pytest.raises((rk.DefinitionError, RuntimeError)):

        class Loose:
            x = rk.Counter("tloose_x_total", "Help.")


def test_a_set_without_actor_name() -> None:
    class Node(rk.MetricSet, per_actor=False):
        up = rk.Gauge("tnode_up", "Help.", across="max")

    r = registry()
    r.bind(Node).up.set(1)
    (family,) = r.collect(["tnode_up"])
    assert [series.labels for series in family.series()] == [()]  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="no actor_name label"):
        r.bind(Node, actor_name="x")
    with pytest.raises(TypeError, match="there is no default"):
        r.bind(Chat)


def test_labels_registered_at_run_time_are_limited() -> None:
    class Things(rk.MetricSet, per_actor=False):
        seen = rk.Counter("tthings_seen_total", "Help.", name=Registered("things"))

    r = registry()
    cells: Any = r.bind(Things).seen
    cells["a"].inc()
    cells["a"].inc()
    cells["b"].inc()
    assert values(r, "tthings_seen_total") == {("a",): 2.0, ("b",): 1.0}
    for i in range(cells.LIMIT):
        cells[f"n{i}"].inc()
    got = values(r, "tthings_seen_total")
    assert (len(got), got[("__other__",)]) == (cells.LIMIT + 1, 2.0)


def test_members_of_any_enumeration_are_the_words_that_they_declare() -> None:
    class Plain(Enum):
        A = "a"
        B = 2

    class Words(rk.MetricSet):
        x = rk.Counter("tplain_x_total", "Help.", kind=rk.OneOf(Plain))

    r = registry()
    cells = r.bind(Words, actor_name="n").x
    for key in (Plain.A, Plain.B, "a", "2"):
        cells[key].inc()  # type: ignore[index]
    assert values(r, "tplain_x_total") == {("n", "a"): 2.0, ("n", "2"): 2.0}


@pytest.mark.parametrize("name", ["ttwice_x_total", "ttwice_x"])
def test_a_name_twice_in_one_set_is_refused_at_import(name: str) -> None:
    made = rk.Counter if name.endswith("_total") else lambda *given: rk.Gauge(*given, across="sum")
    with pytest.raises(rk.DefinitionError, match=r"has the name 'ttwice_x.*' already, in 'a'"):
        type("Twice", (rk.MetricSet,), {"a": rk.Counter("ttwice_x_total", "x"), "b": made(name, "x")})


def test_cells_cannot_be_replaced_by_mistake() -> None:
    lobby = registry().bind(Chat, actor_name="lobby")
    with pytest.raises(AttributeError, match=r"Chat\.members cannot be assigned; update the cell"):
        lobby.members = 7  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="declare it in the class"):
        lobby.typo = 7  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="cells are not replaced"):
        lobby.messages["text"] = lobby.messages["image"]


def test_what_was_forgotten_is_in_the_error() -> None:
    lobby = registry().bind(Chat, actor_name="lobby")
    with pytest.raises(AttributeError, match=r"choose their values before \.inc, as in \['text', 'ok'\]"):
        lobby.calls.inc()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="bind its set first"):
        Chat.members.set(7)  # type: ignore[attr-defined]


def test_cells_contain_the_declared_values_whether_used_or_not() -> None:
    lobby = registry().bind(Chat, actor_name="lobby")
    assert "text" in lobby.messages
    assert "video" not in lobby.messages
    assert ("text", "error") in lobby.calls
    assert "text" not in lobby.calls
    assert repr(lobby) == "<Chat actor_name='lobby'>"
    assert repr(lobby.calls) == "<tchat_calls_total by kind, outcome>"
