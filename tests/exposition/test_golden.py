"""The pages of one fleet in each format, byte for byte.

`python -m tests.exposition.test_golden` rewrites them; commit only what you can explain.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rkmetrics.exposition import FORMATS, Format
from tests.exposition.readers import messages, read_openmetrics, read_protobuf
from tests.golden.exposition import FAMILIES

PAGES = {
    format.name: Path(__file__).parents[1] / "golden" / f"exposition.{format.name}.{suffix}"
    for format, suffix in zip(FORMATS, ("txt", "txt", "bin"), strict=True)
}


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: str(format.name))
def test_the_page_is_the_golden_one(format: Format) -> None:
    assert format.encode(FAMILIES) == PAGES[format.name].read_bytes()


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: str(format.name))
def test_the_golden_families_all_come_through(format: Format, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left out because it could not be written, but the two that have no series."""
    page = format.encode(FAMILIES)
    assert caplog.records == []
    shown = [family.name.removesuffix("_total").encode() in page for family in FAMILIES]
    assert [family.name for family, there in zip(FAMILIES, shown, strict=True) if not there] == [
        "app_nothing",
        "other_empty",
    ]


def test_series_have_the_same_names_in_all_formats() -> None:
    """All of them but start times, which protobuf has in a field."""
    found = [
        line.rpartition(" ")[0] for line in PAGES["text"].read_text().split("\n") if line and not line.startswith("#")
    ]
    in_text = {line.partition("{")[0] for line in found}
    in_protobuf = read_protobuf(PAGES["protobuf"].read_bytes()).samples
    assert {name for name, _ in in_protobuf} >= {
        name.split(" ")[0] for name in in_text if not name.endswith("_created")
    }
    lines = PAGES["openmetrics"].read_text().split("\n")
    assert {line.partition("{")[0].split(" ")[0] for line in lines if line and line[0] != "#"} == {
        n.split(" ")[0] for n in in_text
    }


def test_a_strict_reader_takes_the_golden_openmetrics_page() -> None:
    """Without the exemplars: prometheus_client's parser miscounts escaped quotes in them."""
    page = PAGES["openmetrics"].read_text().replace('room-\\"81f\\"', "room-81f")
    found = read_openmetrics(page.encode())
    assert found.types["app_without_suffix"] == "unknown"
    assert found.types["chat_messages"] == "counter"
    assert len(found.exemplars) == 4


def test_native_histograms_are_sparse() -> None:
    (family,) = (each for each in messages(PAGES["protobuf"].read_bytes()) if each.name == "app_native_seconds")
    histogram = family.metric[0].histogram
    assert (histogram.schema, histogram.zero_count, histogram.sample_count) == (3, 2, 8)
    spans = [(span.offset, span.length) for span in histogram.positive_span]
    # 0.5 is in bucket -8, 1.0 in 0, 1.09 in 1, 1.3 in 4 (two empty ones are bridged), 60.0 in 48, 1e9 in the last, 160.
    assert spans == [(-8, 1), (7, 5), (43, 1), (111, 1)]
    assert list(histogram.positive_delta) == [1, 0, 0, -1, 0, 1, 0, 0]


if __name__ == "__main__":
    for _format in FORMATS:
        PAGES[_format.name].write_bytes(_format.encode(FAMILIES))
