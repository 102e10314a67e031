"""The rules on names, labels and values, as tables; and what ships keeps them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics import catalogue
from rkmetrics.definition import LabelDefinition, MetricDefinition, findings
from rkmetrics.metricset import Registered
from rkmetrics.model import MetricType


class Kind(StrEnum):
    TEXT = "text"
    IMAGE = "image"


ok = rk.OneOf("a", "b")

BAD_NAMES = [
    (rk.Counter, "Chat_messages_total", "lower-case words"),
    (rk.Counter, "chat__messages_total", "single underscores"),
    (rk.Counter, "chat_messages_total_", "single underscores"),
    (rk.Counter, "chat:messages_total", "lower-case words"),
    (rk.Counter, "9lives_total", "lower-case words"),
    (rk.Counter, "chat_mes\u0301sages_total", "lower-case words"),
    (rk.Counter, "chat_messages_total\n", "lower-case words"),
    (rk.Counter, "chat_" + "x" * 200 + "_total", "200 characters"),
    (rk.Counter, "chat_messages", "ends in _total; write 'chat_messages_total'"),
    (rk.Counter, "messages_total", "prefix; write 'yourapp_messages_total'"),
    (rk.Counter, "chat_chat_messages_total", "'chat' occurs twice; write 'chat_messages_total'"),
    (rk.Counter, "my_app_my_app_x_total", "'my_app' occurs twice"),
    (rk.Counter, "rivet_rivetkit_actor_x_total", "'rivet' and 'rivetkit' stack"),
    (rk.Counter, "chat_count_total", "does not end in _count"),
    (rk.Gauge, "chat_members_total", "a gauge's name does not end in _total"),
    (rk.Gauge, "chat_members_count", "a gauge's name does not end in _count"),
    (rk.Gauge, "chat_members_sum", "does not end in _sum"),
    (rk.Gauge, "chat_version_info", "does not end in _info"),
    (rk.Histogram, "chat_reply_bucket", "does not end in _bucket"),
    (rk.Histogram, "chat_reply_duration_milliseconds", "not a base unit; use 'seconds'"),
    (rk.Histogram, "chat_reply_ms", "not a base unit; use 'seconds'"),
    (rk.Gauge, "chat_cpu_percent", "not a base unit; use 'ratio'"),
    (rk.Gauge, "chat_cache_megabytes", "not a base unit; use 'bytes'"),
    (rk.Histogram, "chat_seconds_reply", "the unit ends the name"),
    (rk.Gauge, "chat_members_gauge", "says its type"),
]


@pytest.mark.parametrize(("kind", "name", "message"), BAD_NAMES)
def test_a_bad_name_raises_where_it_is_written_with_metric_rule_and_mend(kind: Any, name: str, message: str) -> None:
    options = {"across": "sum"} if kind is rk.Gauge else {}
    with pytest.raises(rk.DefinitionError) as caught:
        kind(name, "Help.", **options)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("label", "values", "message"),
    [
        ("le", ok, "reserved: histogram buckets use it"),
        ("quantile", ok, "reserved"),
        ("actor_name", ok, "given when the set is bound"),
        ("job", ok, "Prometheus attaches it"),
        ("instance", ok, "Prometheus attaches it"),
        ("__kind", ok, "lower-case words"),
        ("Kind", ok, "lower-case words"),
        ("kind\n", ok, "lower-case words"),
        ("user_id", "text", "unbounded"),
        ("user_id", None, "unbounded"),
        ("user_id", ["a", "b"], "unbounded"),
        ("kind", rk.OneOf(), "no values"),
        ("kind", rk.OneOf("a", "a"), "twice"),
        ("kind", rk.OneOf("a", ""), "1 to 128 bytes"),
        ("kind", rk.OneOf("a", "x" * 129), "1 to 128 bytes"),
        ("kind", rk.OneOf("a", "\ud800"), "not valid UTF-8"),
        ("kind", rk.OneOf("a", "__other__"), "stands for undeclared values"),
    ],
)
def test_a_bad_label_raises_where_it_is_written(label: str, values: Any, message: str) -> None:
    with pytest.raises(rk.DefinitionError, match=message):
        rk.Counter("chat_messages_total", "Help.", **{label: values})


def test_one_of_takes_words_and_enumerations_and_nothing_else() -> None:
    assert rk.OneOf("text", "image").values == rk.OneOf(Kind).values == rk.OneOf(Kind.TEXT, Kind.IMAGE).values
    with pytest.raises(rk.DefinitionError, match="neither text nor an enumeration"):
        rk.OneOf(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("help", ["", " ", " Help.", "Help.\n", "a\ud800"])
def test_a_help_text_is_a_sentence(help: str) -> None:
    with pytest.raises(rk.DefinitionError):
        rk.Counter("chat_messages_total", help)


@pytest.mark.parametrize("across", ["", "average", "all", "SUM"])
def test_a_gauge_says_how_workers_combine(across: Any) -> None:
    with pytest.raises(rk.DefinitionError, match="one of: sum, max, min, mean, latest"):
        rk.Gauge("chat_members", "Help.", across=across)


@pytest.mark.parametrize(
    "buckets", [(), (1.0, 1.0), (2.0, 1.0), (float("inf"),), (float("nan"), 1.0), tuple(float(i) for i in range(101))]
)
def test_bucket_bounds_are_few_finite_and_increase(buckets: tuple[float, ...]) -> None:
    with pytest.raises(rk.DefinitionError):
        rk.Histogram("chat_reply_duration_seconds", "Help.", buckets=buckets)


def test_a_product_of_labels_that_is_too_large_is_refused_with_its_size() -> None:
    many = rk.OneOf(*(f"v{i}" for i in range(70)))
    with pytest.raises(rk.DefinitionError, match=r"5,041 series for each actor name \(limit 4,096\)"):
        rk.Counter("chat_messages_total", "Help.", a=many, b=many)


def test_infinity_is_left_out_of_bounds_and_native_buckets_are_not_for_negative_values() -> None:
    with pytest.raises(rk.DefinitionError, match="leave it out; it is added"):
        rk.Histogram("chat_reply_duration_seconds", "Help.", buckets=(1.0, float("inf")))
    with pytest.raises(rk.DefinitionError, match="values of 0 or more"):
        rk.Histogram("chat_drift_seconds", "Help.", buckets=(-1.0, 1.0), native=True)


@pytest.mark.parametrize("name", ["rkmetrics_mine_total", "rivetkit_actor_mine_total", "process_cpu_seconds_total"])
def test_names_of_this_package_are_its_own(name: str) -> None:
    with pytest.raises(rk.DefinitionError, match="use your own prefix"):
        type("Mine", (rk.MetricSet,), {"x": rk.Counter(name, "Help.")})


def test_an_exception_lifts_rules_of_style_and_no_other() -> None:
    rk.Gauge("rivetkit_actor_active_count", "Help.", across="sum", exception="RivetKit's name")
    with pytest.raises(rk.DefinitionError):
        rk.Gauge("Rivetkit_Actor", "Help.", across="sum", exception="RivetKit's name")


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("a_b_seconds", "seconds"),
        ("a_b_bytes_total", "bytes"),
        ("a_b_ratio", "ratio"),
        ("a_b", ""),
        ("a_seconds_total", "seconds"),
    ],
)
def test_the_unit_is_the_names_last_word(name: str, unit: str) -> None:
    assert MetricDefinition(name, MetricType.COUNTER, "Help.").unit == unit


def test_combinations_count_other_and_zero_start_is_for_small_products() -> None:
    small = MetricDefinition("a_total", MetricType.COUNTER, "x", (LabelDefinition("k", ("a", "b")),))
    assert (small.declared_combos, small.worst_combos, small.starts_at_zero) == (2, 3, True)
    assert small.combos() == (("a",), ("b",), ("__other__",))
    bounds = tuple(float(i) for i in range(15))
    large = MetricDefinition("a_seconds", MetricType.HISTOGRAM, "x", (LabelDefinition("k", tuple("abcd")),), bounds)
    assert (large.lines_per_series, large.starts_at_zero) == (18, False)
    assert not MetricDefinition("a", MetricType.GAUGE, "x").starts_at_zero


def test_what_ships_keeps_the_rules_and_has_reasons_where_not() -> None:
    for shipped in catalogue.sets():
        for definition in shipped.definitions():
            assert list(findings(definition)) == []
            if definition.exception:
                assert len(definition.exception) > 10


def test_names_are_unique_over_all_that_ships() -> None:
    names = [name for shipped in catalogue.sets() for d in shipped.definitions() for name in d.sample_names()]
    assert sorted(names) == sorted(set(names))


def test_the_catalogue_version_follows_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    version = catalogue.catalog_version.__wrapped__()
    assert version == catalogue.catalog_version.__wrapped__()
    monkeypatch.setattr(catalogue, "SETS", catalogue.SETS[1:])
    assert catalogue.catalog_version.__wrapped__() != version


def test_labels_registered_at_run_time_are_for_sets_without_actor_name() -> None:
    with pytest.raises(rk.DefinitionError, match="per_actor=False"):

        class Bad(rk.MetricSet):
            x = rk.Counter("bad_x_total", "Help.", name=Registered("things"))
