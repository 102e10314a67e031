"""What independent readers find on a page is the snapshot that was encoded, whatever its text and numbers are."""

from __future__ import annotations

from hypothesis import given, settings

from rkmetrics.exposition import FORMATS
from rkmetrics.exposition.openmetrics import encode as openmetrics
from rkmetrics.exposition.protobuf import encode as protobuf
from rkmetrics.exposition.text import encode as text
from rkmetrics.model import ForeignFamily, MetricFamily, MetricType
from tests.exposition.families import foreign_families, own_families
from tests.exposition.readers import expected, read_openmetrics, read_protobuf, read_text


@settings(deadline=None)
@given(own_families())
def test_text_holds_the_snapshot(families: tuple[MetricFamily, ...]) -> None:
    found = read_text(text(families))
    assert found.samples == expected(families).samples
    for family in families:
        shown = family.name.removesuffix("_total")
        if shown in found.types:
            assert found.types[shown] == family.shape.type


@settings(deadline=None)
@given(own_families())
def test_openmetrics_holds_the_snapshot_and_its_exemplars(families: tuple[MetricFamily, ...]) -> None:
    found, wanted = read_openmetrics(openmetrics(families)), expected(families)
    assert found.samples == wanted.samples
    assert found.exemplars == wanted.exemplars
    for family in families:
        shown = family.name.removesuffix("_total")
        if shown in found.types:
            assert found.types[shown] == family.shape.type
            assert found.helps[shown].strip() == family.shape.help.strip()


@settings(deadline=None)
@given(own_families())
def test_protobuf_holds_the_snapshot_with_exemplars_start_times_and_native_buckets(
    families: tuple[MetricFamily, ...],
) -> None:
    found, wanted = read_protobuf(protobuf(families)), expected(families)
    gauges = {family.name for family in families if family.shape.type is MetricType.GAUGE}
    assert found.samples == wanted.samples
    assert found.exemplars == wanted.exemplars
    assert found.natives == wanted.natives
    assert found.created == {key: start for key, start in wanted.created.items() if key[0] not in gauges}
    for family in families:
        if family.name in found.types:
            assert (found.types[family.name], found.helps[family.name]) == (family.shape.type, family.shape.help)


@settings(deadline=None)
@given(foreign_families())
def test_families_of_others_are_the_same_in_all_formats(families: tuple[ForeignFamily, ...]) -> None:
    wanted = expected(families)
    assert read_text(text(families)).samples == wanted.samples
    in_openmetrics = read_openmetrics(openmetrics(families))
    assert in_openmetrics.samples == wanted.samples
    assert in_openmetrics.exemplars == wanted.exemplars
    created = {key for key in wanted.samples if key[0].endswith("_created")}  # protobuf has a field for them
    in_protobuf = read_protobuf(protobuf(families))
    assert in_protobuf.samples == {key: value for key, value in wanted.samples.items() if key not in created}
    assert {(f"{name.removesuffix('_total')}_created", labels) for name, labels in in_protobuf.created} == created


@settings(deadline=None, max_examples=30)
@given(own_families())
def test_a_second_rendering_of_the_same_shapes_is_the_same(families: tuple[MetricFamily, ...]) -> None:
    for format in FORMATS:
        assert format.encode(families) == format.encode(families)
