"""What is known: samples of each type, labels that targets attach, and what a slip of the fingers is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.assets.known import Known, close, distance, misused_suffix
from rkmetrics.catalogue import sets


class Stall(rk.MetricSet, per_actor=False):
    """A set with each type."""

    sales = rk.Counter("stall_sales_total", "Sales.", what=rk.OneOf("fruit", "bread"))
    stock = rk.Gauge("stall_stock", "Stock.", across="sum")
    queue = rk.Histogram("stall_queue_seconds", "Queueing.", buckets=rk.LATENCY)
    served = rk.Histogram("stall_serving_seconds", "Serving.", buckets=rk.LATENCY, native=True)


KNOWN = Known(Stall.definitions())


def test_a_sample_is_known_as_a_scrape_stores_it() -> None:
    own = {name: sample.kind for name, sample in KNOWN.samples.items() if name.startswith("stall_")}
    assert own == {
        "stall_sales_total": "counter",
        "stall_sales_created": "gauge",
        "stall_stock": "gauge",
        **{f"stall_{part}_seconds_{end}": "counter" for part in ("queue", "serving") for end in ("sum", "count")},
        **{f"stall_{part}_seconds_bucket": "bucket" for part in ("queue", "serving")},
        **{f"stall_{part}_seconds_created": "gauge" for part in ("queue", "serving")},
        "stall_serving_seconds": "bucket",
    }
    assert KNOWN.samples["stall_sales_total"].labels == {"what": ("fruit", "bread")}
    assert (KNOWN.samples["stall_queue_seconds_bucket"].labels, KNOWN.samples["stall_serving_seconds"].labels) == (
        {"le": ()},
        {},
    )


def test_prefixes_that_others_use_too_are_not_owned() -> None:
    ours = Known(definition for each in sets() for definition in each.definitions())
    names = ("stall_x", "process_x", "up", "rkmetrics_x", "rivetkit_actor_x", "rivetkit_x", "pegboard_actor_kv_x")
    assert [name for name in names if KNOWN.owned(name)] == ["stall_x"]
    assert [name for name in names if ours.owned(name)] == ["rkmetrics_x", "rivetkit_actor_x", "pegboard_actor_kv_x"]


def test_labels_of_targets_are_there_always() -> None:
    labels = ("job", "exported_job", "__name__", "squad")
    assert [KNOWN.attached(label) for label in labels] == [True, True, True, False]
    assert Known((), labels=["squad"]).attached("squad")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stall_stock_sum", "stall_stock is a gauge: it has no _sum"),
        ("stall_sales", "stall_sales is a counter: its sample is stall_sales_total"),
        ("stall_queue_seconds", "stall_queue_seconds is a histogram: its samples are stall_queue_seconds_bucket, "
         "stall_queue_seconds_sum, stall_queue_seconds_count"),
        ("stall_stock", ""),
        ("other_sum", ""),
    ],
)  # fmt: skip
def test_a_wrong_ending_is_told_by_type(name: str, said: str) -> None:
    assert misused_suffix(name, KNOWN) == said


@pytest.mark.parametrize(
    ("word", "words", "found"),
    [
        ("sate", ["state"], "state"),
        ("staet", ["state"], "state"),
        ("stats", ["state"], "state"),
        ("sttes", ["state"], ""),
        ("instnace", ["instance"], "instance"),
        ("instnce_", ["instance"], "instance"),
        ("state", ["state"], ""),
        ("x", [], ""),
    ],
)
def test_a_slip_is_one_letter_or_two_in_a_long_word(word: str, words: list[str], found: str) -> None:
    assert close(word, words) == found


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_distances_are_distances(a: str, b: str) -> None:
    assert distance(a, b, 20) == distance(b, a, 20)
    assert (distance(a, b, 20) == 0) == (a == b)
    assert distance(a, b, 2) == distance(a, b, 20) or min(distance(a, b, 2), distance(a, b, 20)) > 2
