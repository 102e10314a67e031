from __future__ import annotations

import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("opentelemetry.sdk.metrics")
encoder: Any = pytest.importorskip("opentelemetry.exporter.otlp.proto.common.metrics_encoder")

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest  # noqa: E402
from opentelemetry.sdk.resources import Resource  # noqa: E402
from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: E402

from rkmetrics.bridges.otlp.translate import envelope, metrics_of, nanoseconds, ucum  # noqa: E402
from rkmetrics.model import (  # noqa: E402
    NATIVE_BUCKETS,
    NATIVE_MIN_INDEX,
    UNSET,
    Exemplar,
    ForeignFamily,
    HistogramValue,
    MetricFamily,
    MetricType,
    Sample,
    Series,
    Shape,
)

NOW = 1_700_000_000_000_000_000
START = 1_600_000_000_000_000_000
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def sent(*families: MetricFamily | ForeignFamily) -> dict[str, Any]:
    """What a receiver decodes, by name, after the exporters' own encoder."""
    metrics = [metric for family in families for metric in metrics_of(family, NOW, START)]
    data = envelope(metrics, Resource({}), InstrumentationScope("test"))
    decoded = ExportMetricsServiceRequest.FromString(encoder.encode_metrics(data).SerializeToString())
    found = {m.name: m for resource in decoded.resource_metrics for s in resource.scope_metrics for m in s.metrics}
    assert len(found) == len(metrics)
    return found


def labels_of(point: Any) -> frozenset[tuple[str, str]]:
    return frozenset((item.key, item.value.string_value) for item in point.attributes)


# --- any snapshot arrives as it is ------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
# Numbers of any kind, NaN and infinities too; a gauge may be any of them.
numbers = st.floats()
counts = st.integers(0, 2**53)
moments = st.floats(1e9, 2e9)
exemplars = st.builds(
    Exemplar,
    labels=st.lists(
        st.tuples(st.sampled_from(["trace_id", "span_id", "actor_id"]), texts), unique_by=lambda x: x[0]
    ).map(tuple)
    | st.just((("trace_id", TRACE), ("span_id", SPAN), ("actor_id", "a"))),
    value=st.floats(allow_nan=False),
    timestamp=moments,
)


@st.composite
def families(draw: st.DrawFn, name: str) -> MetricFamily:
    kind = draw(st.sampled_from([MetricType.COUNTER, MetricType.GAUGE, MetricType.HISTOGRAM]))
    histogram = kind is MetricType.HISTOGRAM
    label_names = draw(st.sampled_from([(), ("kind",), ("kind", "outcome")]))
    combo = st.tuples(*[texts for _ in label_names])
    per_actor = draw(st.booleans())
    shape = Shape(
        name=name,
        type=kind,
        help=draw(texts),
        unit=draw(st.sampled_from(["", "seconds", "bytes", "ratio", "parsecs"])),
        label_names=label_names,
        combos=tuple(draw(st.lists(combo, min_size=1, max_size=3, unique=True))),
        bounds=tuple(sorted(draw(st.sets(st.floats(-1e9, 1e9), min_size=1, max_size=4)))) if histogram else (),
        per_actor=per_actor,
        native=histogram and draw(st.booleans()),
    )
    actors = tuple(draw(st.lists(texts, max_size=3, unique=True))) if per_actor else ("",)
    values: list[float] = []
    found: dict[int, Exemplar] = {}
    for _ in range(len(actors) * len(shape.combos)):
        if draw(st.booleans()):
            found[len(values)] = draw(exemplars)
        values += draw(one_series(shape))
    return MetricFamily(shape, actors, values, tuple(draw(moments) for _ in actors), found)


def one_series(shape: Shape) -> st.SearchStrategy[list[float]]:
    if shape.type is not MetricType.HISTOGRAM:
        return st.just([UNSET]) | numbers.map(lambda number: [number])
    size = len(shape.bounds) + 1
    classic = st.tuples(*[counts] * size, st.floats(allow_nan=False)).map(list)
    if shape.native:
        few = st.dictionaries(st.integers(0, NATIVE_BUCKETS), counts, max_size=5)
        native = few.map(lambda rows: [float(rows.get(place, 0)) for place in range(NATIVE_BUCKETS + 1)])
        full = st.tuples(classic, native).map(lambda both: [*map(float, both[0]), *both[1]])
    else:
        full = classic.map(lambda row: [*map(float, row)])
    return full | st.just([UNSET] + [0.0] * (shape.width - 1))


@settings(deadline=None)
@given(families("a_total"), families("b_seconds"))
def test_a_receiver_decodes_the_snapshot(one: MetricFamily, other: MetricFamily) -> None:
    found = sent(one, other)
    for family in (one, other):
        series = list(family.series())
        assert (family.name in found) == bool(series)
        if series:
            check_family(family.shape, series, found[family.name])


def check_family(shape: Shape, series: list[Series], metric: Any) -> None:
    assert (metric.name, metric.description) == (shape.name, shape.help)
    assert metric.unit == {"seconds": "s", "bytes": "By", "ratio": "1"}.get(shape.unit, shape.unit)
    field = metric.WhichOneof("data")
    expected = {MetricType.COUNTER: "sum", MetricType.GAUGE: "gauge", MetricType.HISTOGRAM: "histogram"}[shape.type]
    assert field == ("exponential_histogram" if shape.native else expected)
    data = getattr(metric, field)
    if field != "gauge":
        assert data.aggregation_temporality == 2
    if field == "sum":
        assert data.is_monotonic
    points = {labels_of(point): point for point in data.data_points}
    assert len(points) == len(series)
    for one in series:
        check_point(one, points[frozenset(one.labels)], field)


def check_point(series: Series, point: Any, field: str) -> None:
    assert point.time_unix_nano == NOW
    assert [exemplar.as_double for exemplar in point.exemplars] == [
        found.value for _, found in sorted(series.exemplars.items())
    ]
    if field != "gauge":
        assert point.start_time_unix_nano == nanoseconds(series.start_time)
    if not isinstance(series.value, HistogramValue):
        assert struct.pack("d", point.as_double) == struct.pack("d", series.value)
        return
    assert struct.pack("d", point.sum) == struct.pack("d", series.value.sum)
    assert not point.HasField("min")
    assert not point.HasField("max")
    if series.value.native is None:
        assert tuple(point.explicit_bounds) == series.value.bounds
        assert tuple(point.bucket_counts) == series.value.counts
        assert point.count == series.value.count
        return
    native = series.value.native
    filled = enumerate(point.positive.bucket_counts, point.positive.offset + 1)
    assert {index: count for index, count in filled if count} == native.buckets
    assert (point.scale, point.zero_count) == (native.schema, native.zero_count)
    assert point.count == native.zero_count + sum(native.buckets.values())


# --- single rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "code"),
    [
        ("", ""),
        ("seconds", "s"),
        ("bytes", "By"),
        ("ratio", "1"),
        ("celsius", "Cel"),
        ("meters_per_second", "m/s"),
        ("bytes_per_hour", "By/h"),
        ("parsecs", "parsecs"),
    ],
)
def test_units_become_ucum(unit: str, code: str) -> None:
    assert ucum(unit) == code


def test_a_bucket_keeps_its_bounds() -> None:
    """Prometheus' bucket i is (2**((i-1)/8), 2**(i/8)]; OTLP's bucket i at scale 3 is (2**(i/8), 2**((i+1)/8)]."""
    shape = Shape("x_seconds", MetricType.HISTOGRAM, "Help.", bounds=(1.0,), per_actor=False, native=True)
    values = [1.0, 0.0, 1.0] + [0.0] * (NATIVE_BUCKETS + 1)
    values[len(shape.bounds) + 2 + 1 + (0 - NATIVE_MIN_INDEX)] = 1.0  # index 0 holds 1.0, its upper bound
    point = sent(MetricFamily(shape, ("",), values, (1.6e9,)))["x_seconds"].exponential_histogram.data_points[0]
    upper = 2.0 ** ((point.positive.offset + 1) / 2**point.scale)
    assert upper == 1.0


def counter_with(exemplar: Exemplar) -> Any:
    shape = Shape("x_total", MetricType.COUNTER, "Help.", per_actor=False)
    family = MetricFamily(shape, ("",), [1.0], (1.6e9,), {0: exemplar})
    return sent(family)["x_total"].sum.data_points[0].exemplars[0]


@pytest.mark.parametrize(
    "labels",
    [
        {"trace_id": TRACE},  # the encoder would drop one without the other
        {"span_id": SPAN},
        {"trace_id": TRACE, "span_id": "short"},
        {"trace_id": "g" * 32, "span_id": SPAN},
        {"trace_id": "0" * 32, "span_id": SPAN},  # not a valid id (W3C Trace Context)
        {"actor_id": "room-81f"},
    ],
)
def test_ids_that_are_not_a_whole_and_valid_pair_stay_attributes(labels: dict[str, str]) -> None:
    exemplar = counter_with(Exemplar(tuple(labels.items()), 0.25, 1.65e9))
    assert (exemplar.trace_id, exemplar.span_id) == (b"", b"")
    assert {item.key: item.value.string_value for item in exemplar.filtered_attributes} == labels


def test_ids_become_the_exemplars_own() -> None:
    exemplar = counter_with(Exemplar((("trace_id", TRACE), ("span_id", SPAN), ("actor_id", "a")), 0.25, 1.65e9))
    assert (exemplar.trace_id.hex(), exemplar.span_id.hex()) == (TRACE, SPAN)
    assert [item.key for item in exemplar.filtered_attributes] == ["actor_id"]
    assert exemplar.time_unix_nano == nanoseconds(1.65e9)


# --- foreign families -------------------------------------------------------------------------------------------------


def foreign(name: str, kind: MetricType, *samples: tuple[str, dict[str, str], float], unit: str = "") -> ForeignFamily:
    rows = tuple(Sample(sample, tuple(labels.items()), value) for sample, labels, value in samples)
    return ForeignFamily(name, kind, "Help.", unit, rows)


def test_a_foreign_counter_keeps_total_and_its_creation_time() -> None:
    family = foreign("jobs", MetricType.COUNTER, ("jobs_total", {"q": "a"}, 3.0), ("jobs_created", {"q": "a"}, 1.5e9))
    metric = sent(family)["jobs_total"]
    (point,) = metric.sum.data_points
    assert metric.sum.is_monotonic
    assert (point.as_double, point.start_time_unix_nano) == (3.0, nanoseconds(1.5e9))


def test_a_foreign_counter_without_creation_time_starts_with_the_pusher() -> None:
    metric = sent(foreign("jobs", MetricType.COUNTER, ("jobs_total", {}, 3.0)))["jobs_total"]
    assert metric.sum.data_points[0].start_time_unix_nano == START


@pytest.mark.parametrize("kind", [MetricType.GAUGE, MetricType.UNKNOWN])
def test_foreign_gauges_and_unknowns_are_gauges(kind: MetricType) -> None:
    metric = sent(foreign("depth", kind, ("depth", {"q": "a"}, math.inf)))["depth"]
    assert metric.gauge.data_points[0].as_double == math.inf


@pytest.mark.parametrize(("kind", "sample"), [(MetricType.INFO, "build_info"), (MetricType.STATESET, "build")])
def test_foreign_infos_and_states_are_sums_that_do_not_grow(kind: MetricType, sample: str) -> None:
    metric = sent(foreign("build", kind, (sample, {"v": "1"}, 1.0)))[sample]
    assert metric.WhichOneof("data") == "sum"
    assert not metric.sum.is_monotonic


def test_a_foreign_summary_becomes_quantiles_count_and_sum() -> None:
    found = sent(
        foreign(
            "wait_seconds",
            MetricType.SUMMARY,
            ("wait_seconds", {"quantile": "0.5"}, 0.2),
            ("wait_seconds_count", {}, 4.0),
            ("wait_seconds_sum", {}, 1.5),
            unit="seconds",
        )
    )
    assert found["wait_seconds"].gauge.data_points[0].as_double == 0.2
    assert found["wait_seconds_count"].sum.data_points[0].as_double == 4.0
    assert found["wait_seconds_sum"].sum.is_monotonic
    assert [found[name].unit for name in ("wait_seconds", "wait_seconds_count", "wait_seconds_sum")] == ["s", "", "s"]


def test_a_foreign_histogram_loses_le_and_accumulation() -> None:
    rows = [("0.1", 1.0), ("+Inf", 6.0), ("1.0", 4.0)]  # in any order
    samples = [("t_bucket", {"q": "a", "le": le}, value) for le, value in rows]
    family = foreign("t", MetricType.HISTOGRAM, *samples, ("t_sum", {"q": "a"}, 9.0), ("t_count", {"q": "a"}, 6.0))
    (point,) = sent(family)["t"].histogram.data_points
    assert list(point.explicit_bounds) == [0.1, 1.0]
    assert list(point.bucket_counts) == [1, 3, 2]
    assert (point.count, point.sum) == (6, 9.0)
    assert labels_of(point) == {("q", "a")}


@pytest.mark.parametrize(
    "buckets",
    [
        [("0.1", 5.0), ("+Inf", 4.0)],
        [("0.1", 5.0)],
        [("soon", 5.0), ("+Inf", 6.0)],
        [("0.1", math.nan), ("+Inf", 6.0)],
        [("0.1", -1.0), ("+Inf", 6.0)],
    ],
)
def test_a_foreign_histogram_that_is_none_costs_only_itself(buckets: list[tuple[str, float]]) -> None:
    bad = foreign("bad", MetricType.HISTOGRAM, *(("bad_bucket", {"le": le}, value) for le, value in buckets))
    good = foreign("good", MetricType.GAUGE, ("good", {}, 1.0))
    assert list(sent(bad, good)) == ["good"]


def test_a_gauge_histogram_is_left_out() -> None:
    """The specification, "Dropped Types"."""
    assert sent(foreign("g", MetricType.GAUGEHISTOGRAM, ("g_bucket", {"le": "+Inf"}, 1.0))) == {}


def test_text_that_is_not_utf8_is_replaced_and_spoils_nothing() -> None:
    metric = sent(foreign("depth", MetricType.GAUGE, ("depth", {"q": "\ud800"}, 1.0)))["depth"]
    assert labels_of(metric.gauge.data_points[0]) == {("q", "?")}
