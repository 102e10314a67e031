"""The lexis, the cached pieces, and what one family may cost the others."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.exposition import FORMATS
from rkmetrics.exposition.base import bound, escape, exemplar_labels, labels, pieces
from rkmetrics.exposition.openmetrics import encode as openmetrics
from rkmetrics.exposition.text import encode as text
from rkmetrics.model import Exemplar, MetricFamily, MetricType, Shape
from tests.exposition.families import HOSTILE, counter, gauge, histogram

BOUNDS = [
    (0.0, "0.0"),
    (0.005, "0.005"),
    (0.1, "0.1"),
    (1.0, "1.0"),
    (-1.0, "-1.0"),
    (2.5, "2.5"),
    (10.0, "10.0"),
    (0.0001, "0.0001"),
    (0.00001, "1e-05"),
    (0.000012, "1.2e-05"),
    (100000.0, "100000.0"),
    (123456.0, "123456.0"),
    (123456.75, "123456.75"),
    (1e6, "1e+06"),
    (-1e6, "-1e+06"),
    (1234567.0, "1.234567e+06"),
    (1234567.5, "1.2345675e+06"),
    (1e9, "1e+09"),
    (2147483648.0, "2.147483648e+09"),
    (1e15, "1e+15"),
    (1e16, "1e+16"),
    (1.5e300, "1.5e+300"),
    (math.inf, "+Inf"),
    (-math.inf, "-Inf"),
    (math.nan, "NaN"),
]


@pytest.mark.parametrize(("value", "shown"), BOUNDS)
def test_a_bound_is_a_canonical_number_of_openmetrics(value: float, shown: str) -> None:
    assert bound(value) == shown


@given(st.floats(allow_nan=False))
def test_a_bound_reads_back_and_says_that_it_is_a_float(value: float) -> None:
    assert float(bound(value)) == value
    assert any(mark in bound(value) for mark in ".eI")


@pytest.mark.parametrize("value", HOSTILE)
def test_an_escaped_value_has_no_newline_and_no_quote_of_its_own(value: str) -> None:
    shown = escape(value)
    assert "\n" not in shown
    assert shown.replace("\\\\", "").replace('\\"', "").count('"') == 0
    assert (
        shown.replace("\\\\", "\0").replace("\\n", "\n").replace('\\"', '"').replace("\0", "\\") == value
        or "\0" in value
    )


def test_labels_are_quoted_and_separated() -> None:
    assert labels([("a", "1"), ("b", 'x"y')]) == 'a="1",b="x\\"y"'
    assert labels([]) == ""


def test_pieces_are_made_once_for_each_shape() -> None:
    shape = gauge("app_x", [1]).shape
    assert pieces(shape) is pieces(shape)


def test_pieces_of_a_histogram_are_its_buckets_its_sum_and_its_count() -> None:
    kept = pieces(histogram("app_seconds", [[]], (0.5,), label_names=("kind",), combos=(("a",),)).shape)
    assert kept.bounds == 1
    assert list(zip(kept.pres, kept.posts, strict=True)) == [
        (b'app_seconds_bucket{actor_name="', b'",kind="a",le="0.5"} '),
        (b'app_seconds_bucket{actor_name="', b'",kind="a",le="+Inf"} '),
        (b'app_seconds_sum{actor_name="', b'",kind="a"} '),
        (b'app_seconds_count{actor_name="', b'",kind="a"} '),
    ]


BAD_FAMILIES = [
    counter("not a name", [1]),
    counter("new\nline", [1]),
    counter("", [1]),
    counter("app_x_total", [1], label_names=("not a label",), combos=(("a",),)),
    counter("app_x_total", [1], label_names=("a", "b"), combos=(("only one",),)),
    counter("app_x_total", [1], label_names=("a",), combos=(("\ud800",),)),
    counter("app_x_total", [1], help="\ud800"),
    counter("app_x_total", [1], ["\ud800"]),
    counter("app_x_total", [1, 2, 3]),
    counter("app_x_total", []),
    MetricFamily(Shape("app_x_total", MetricType.COUNTER, ""), ("a",), ["one"], (0.0,)),  # type: ignore[list-item]
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: str(format.name))
@pytest.mark.parametrize("bad", BAD_FAMILIES, ids=lambda family: repr(family.name))
def test_a_family_that_cannot_be_written_costs_itself_only(format: object, bad: MetricFamily) -> None:
    encode = format.encode  # type: ignore[attr-defined]
    page = encode((gauge("app_before", [1]), bad, gauge("app_after", [2])))
    whole = encode((gauge("app_before", [1]), gauge("app_after", [2])))
    readable_there = bad.actor_names == ("\ud800",) and encode is FORMATS[2].encode  # protobuf says "?" for it
    assert page == whole or readable_there


@pytest.mark.parametrize("kind", ["text", "openmetrics"])
def test_values_may_be_any_sequence_of_floats(kind: str) -> None:
    shape = Shape("app_x", MetricType.GAUGE, "")
    encode = {"text": text, "openmetrics": openmetrics}[kind]
    listed = MetricFamily(shape, ("a", "b"), [1, 2.5], (0.0, 0.0))
    assert encode([listed]).startswith(b'# TYPE app_x gauge\napp_x{actor_name="a"} 1\napp_x{actor_name="b"} 2.5\n')


@pytest.mark.parametrize(
    ("pairs", "taken"),
    [
        ((), True),
        ((("trace_id", "x" * 120),), True),
        ((("trace_id", "x" * 121),), False),
        ((("trace_id", "東" * 120),), True),
        ((("not a name", "x"),), False),
        ((("a", "1"), ("a", "2")), False),
    ],
)
def test_exemplars_are_taken_up_to_what_readers_allow(pairs: tuple[tuple[str, str], ...], taken: bool) -> None:
    assert (exemplar_labels(Exemplar(pairs, 1.0, 1.0)) == pairs) is taken


def test_an_exemplar_that_no_reader_takes_leaves_its_sample() -> None:
    family = counter("app_x_total", [3])
    marked = MetricFamily(
        family.shape, family.actor_names, family.values, family.start_times, {0: Exemplar((("", ""),), 1.0, 1.0)}
    )
    assert openmetrics([marked]) == openmetrics([family])


@pytest.mark.parametrize("position", [-1, 1, 10**9])
def test_an_exemplar_that_belongs_nowhere_is_left_out(position: int) -> None:
    family = histogram("app_seconds", [[0.1]], (), exemplars={position: Exemplar((), 1.0, 1.0)})
    assert b"# {" not in openmetrics([family])


def test_gauges_have_no_exemplars() -> None:
    family = gauge("app_x", [3])
    marked = MetricFamily(
        family.shape, family.actor_names, family.values, family.start_times, {0: Exemplar((), 1.0, 1.0)}
    )
    for format in FORMATS:
        assert format.encode([marked]) == format.encode([family])


def test_no_families_are_an_empty_page() -> None:
    assert [format.encode([]) for format in FORMATS] == [b"", b"# EOF\n", b""]


def test_the_readable_twin_writes_when_it_is_asked_for() -> None:
    script = "from rkmetrics.exposition import base; print(base.encode.__module__)"
    environment = {**os.environ, "RKMETRICS_PURE_PYTHON": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "rkmetrics._lines_py\n"
