"""Families that nobody checked: whatever they hold, the page stays readable and the other families stay whole."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkmetrics.exposition.foreign import fit
from rkmetrics.exposition.openmetrics import encode as openmetrics
from rkmetrics.exposition.protobuf import encode as protobuf
from rkmetrics.exposition.text import encode as text
from rkmetrics.model import Exemplar, ForeignFamily, MetricType, Sample
from tests.exposition.families import gauge, sample
from tests.exposition.readers import messages, read_openmetrics, read_protobuf, read_text


def family(kind: str, name: str, *samples: Sample, help: str = "Help.", unit: str = "") -> ForeignFamily:
    return ForeignFamily(name, MetricType(kind), help, unit, samples)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        # Names become valid the way Prometheus' "underscores" scheme makes them.
        (family("gauge", "http.requests", sample("http.requests", 1)), {"http_requests": "gauge"}),
        (family("gauge", "7up", sample("7up", 1)), {"_up": "gauge"}),
        (family("gauge", "", sample("", 1)), {"_": "gauge"}),
        (family("gauge", "a\nb", sample("a\nb", 1)), {"a_b": "gauge"}),
        # Samples that their type does not allow are families of their own.
        (family("counter", "x", sample("x", 1)), {"x": "unknown"}),
        (family("counter", "x", sample("x_total", 1), sample("y", 2)), {"x": "counter", "y": "unknown"}),
        (family("gauge", "x", sample("x_extra", 1)), {"x_extra": "unknown"}),
        (
            family("histogram", "x", sample("x_bucket", 1), sample("x_count", 1)),
            {"x": "histogram", "x_bucket": "unknown"},
        ),
        (family("histogram", "x", sample("x_bucket", 1, le="wide")), {"x_bucket": "unknown"}),
        (family("summary", "x", sample("x", 1)), {"x": "unknown"}),
        (family("summary", "x", sample("x", 1, quantile="0.5")), {"x": "summary"}),
        (family("gauge", "x"), {}),
    ],
)
def test_a_family_is_made_to_keep_the_rules(given: ForeignFamily, names: dict[str, str]) -> None:
    assert {one.name: one.type for one in fit(given)} == names


@pytest.mark.parametrize(
    ("labels", "fitted"),
    [
        ((("a.b", "1"),), (("a_b", "1"),)),
        ((("", "1"),), (("_", "1"),)),
        ((("a\n", "1"),), (("a_", "1"),)),
        ((("9", "1"),), (("_", "1"),)),
        ((("a:b", "1"),), (("a_b", "1"),)),
        ((("__name__", "1"),), (("_name__", "1"),)),
        ((("::", "1"),), (("_", "1"),)),
        ((("a", "1"), ("a", "2")), (("a", "1"),)),
        ((("a.b", "1"), ("a_b", "2")), (("a_b", "1"),)),
        ((("a", "\ud800"),), (("a", "?"),)),
    ],
)
def test_labels_are_made_valid_and_single(
    labels: tuple[tuple[str, str], ...], fitted: tuple[tuple[str, str], ...]
) -> None:
    (found,) = fit(family("gauge", "x", Sample("x", labels, 1)))
    assert found.samples[0].labels == fitted


@pytest.mark.parametrize(
    ("spelt", "canonical"), [("1", "1.0"), ("1e6", "1e+06"), ("inf", "+Inf"), ("0.50", "0.5"), ("-2", "-2.0")]
)
def test_bounds_are_spelt_like_ours(spelt: str, canonical: str) -> None:
    (buckets,) = fit(family("histogram", "x", sample("x_bucket", 1, le=spelt), sample("x_count", 1)))
    assert buckets.samples[0].labels == (("le", canonical),)


@pytest.mark.parametrize(("spelt", "canonical"), [("1", "1.0"), ("0.50", "0.5"), ("1e-7", "1e-07")])
def test_quantiles_are_spelt_like_ours(spelt: str, canonical: str) -> None:
    (quantiles,) = fit(family("summary", "x", sample("x", 1, quantile=spelt)))
    assert quantiles.samples[0].labels == (("quantile", canonical),)


def test_a_unit_that_the_name_does_not_end_in_is_dropped() -> None:
    assert fit(family("gauge", "x", sample("x", 1), unit="seconds"))[0].unit == ""
    assert fit(family("gauge", "x_seconds", sample("x_seconds", 1), unit="seconds"))[0].unit == "seconds"


@pytest.mark.parametrize(
    "exemplar",
    [
        Exemplar((("a", "x" * 128),), 1.0, 1.0),
        Exemplar((("a", "1"), ("b", "x" * 126)), 1.0, 1.0),
    ],
)
def test_exemplars_that_no_reader_takes_are_left_out_and_the_sample_stays(exemplar: Exemplar) -> None:
    page = openmetrics([family("counter", "x", sample("x_total", 1, exemplar=exemplar))])
    assert b"x_total 1\n# EOF\n" in page


def test_times_that_are_none_are_left_out() -> None:
    exemplar = Exemplar((("a", "1"),), 1.0, math.nan)
    given = family("counter", "x", sample("x_total", 1, exemplar=exemplar, timestamp=math.inf))
    assert b'x_total 1 # {a="1"} 1\n' in openmetrics([given])
    assert b"x_total 1\n" in text([given])
    (message,) = messages(protobuf([given]))
    assert not message.metric[0].HasField("timestamp_ms")
    assert not message.metric[0].counter.exemplar.HasField("timestamp")


def test_timestamps_are_milliseconds_in_text_and_protobuf_and_seconds_in_openmetrics() -> None:
    given = family("gauge", "x", sample("x", 1, timestamp=-1.5), sample("x", 2, timestamp=1_700_000_000.1234, a="b"))
    assert b'x 1 -1500\nx{a="b"} 2 1700000000123\n' in text([given])
    assert b'x 1 -1.500\nx{a="b"} 2 1700000000.123\n' in openmetrics([given])
    (message,) = messages(protobuf([given]))
    assert [metric.timestamp_ms for metric in message.metric] == [-1500, 1_700_000_000_123]


def test_fractions_in_counts_are_kept() -> None:
    """Some exporters scale their histograms."""
    given = family(
        "histogram",
        "x",
        sample("x_bucket", 0.5, le="1"),
        sample("x_bucket", 2, le="+Inf"),
        sample("x_count", 2),
        sample("x_sum", -1),
    )
    (message,) = messages(protobuf([given]))
    assert message.metric[0].histogram.bucket[0].cumulative_count_float == 0.5
    assert message.metric[0].histogram.bucket[1].cumulative_count == 2


def test_a_histogram_without_its_count_takes_that_of_its_last_bucket() -> None:
    given = family("histogram", "x", sample("x_bucket", 9, le="+Inf"), sample("x_bucket", 1, le="1"))
    histogram = messages(protobuf([given]))[0].metric[0].histogram
    assert histogram.sample_count == 9
    assert [bucket.upper_bound for bucket in histogram.bucket] == [1.0, math.inf]


def test_one_that_cannot_be_written_costs_itself_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    broken = family("gauge", "broken_by_its_value", Sample("broken_by_its_value", (), "many"))  # type: ignore[arg-type]
    families = (gauge("app_before", [1]), broken, gauge("app_after", [2]))
    for encode in (text, openmetrics, protobuf):
        page = encode(families)
        assert b"app_before" in page
        assert b"app_after" in page
        assert b"broken" not in page
    assert ["broken_by_its_value" in record.getMessage() for record in caplog.records] == [True]


# ---- anything at all

_any_text = st.one_of(
    st.sampled_from(["", "x", "x_total", "x_bucket", "le", "quantile", "a\n", "\ud800", '"']), st.text(max_size=6)
)
_any_number = st.one_of(st.floats(), st.integers(), st.sampled_from(["7", "x", None, object()]))
_any_exemplar = st.none() | st.builds(
    Exemplar, st.lists(st.tuples(_any_text, _any_text), max_size=3).map(tuple), st.floats(), st.floats()
)
_any_sample = st.builds(
    Sample,
    _any_text,
    st.lists(st.tuples(_any_text, st.one_of(_any_text, st.just("1")))).map(tuple),
    _any_number,
    _any_exemplar,
    st.none() | st.floats(),
)
_any_family = st.builds(
    ForeignFamily,
    _any_text,
    st.sampled_from(MetricType),
    _any_text,
    _any_text,
    st.lists(_any_sample, max_size=4).map(tuple),
)
WITNESS = gauge("witness", [12.5])


@settings(deadline=None, max_examples=300)
@given(_any_family)
def test_whatever_a_family_holds_the_others_are_read_unchanged(hostile: ForeignFamily) -> None:
    key, value = ("witness", (("actor_name", "lobby"),)), "12.5"
    in_protobuf = messages(protobuf([hostile, WITNESS]))[-1]
    assert (in_protobuf.name, in_protobuf.metric[0].gauge.value) == ("witness", 12.5)
    page = text([hostile, WITNESS])
    page.decode()
    assert page.endswith(b'witness{actor_name="lobby"} 12.5\n')
    assert openmetrics([hostile, WITNESS]).endswith(b'witness{actor_name="lobby"} 12.5\n# EOF\n')
    assert read_text(page[page.index(b"# HELP witness") :]).samples == {key: value}


@settings(deadline=None, max_examples=300)
@given(_any_family)
def test_whatever_a_family_holds_each_line_is_one_that_a_reader_takes(hostile: ForeignFamily) -> None:
    """Line by line, since a family may well hold the same series twice; that is for Prometheus to say."""
    for line in text([hostile]).decode().split("\n")[:-1]:
        if not line.startswith("#"):
            assert len(read_text(f"{line}\n".encode()).samples) == 1


def test_readers_of_whole_pages_agree_about_a_family_that_was_made_fit() -> None:
    strange = (
        family(
            "counter",
            "http.requests",
            Sample("http.requests_total", (("status.code", "200"), ("path", '/"\n\ud800')), 5),
        ),
        family(
            "summary",
            "9lives",
            sample("9lives", 0.5, quantile="0.9"),
            sample("9lives_count", 3),
            sample("9lives_sum", 4),
        ),
    )
    pages = (read_text(text(strange)), read_openmetrics(openmetrics(strange)), read_protobuf(protobuf(strange)))
    assert pages[0].samples == pages[1].samples == pages[2].samples
    assert set(pages[0].samples) == {
        ("http_requests_total", (("path", '/"\n?'), ("status_code", "200"))),
        ("_lives", (("quantile", "0.9"),)),
        ("_lives_count", ()),
        ("_lives_sum", ()),
    }
