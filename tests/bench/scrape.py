"""One scrape: a snapshot of the registry, and a page of about 10,000 sample lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rkmetrics.exposition import CODINGS
from rkmetrics.exposition.openmetrics import OPENMETRICS
from rkmetrics.exposition.protobuf import PROTOBUF
from rkmetrics.exposition.text import TEXT
from tests.bench import page
from tests.bench.base import Case, Scale, Subject, cpu_seconds, interleave
from tests.bench.peers import peer, present
from tests.bench.updates import OURS, PURE

__all__ = ["CASES"]

_TIMES = 5  # pages of ours for one of theirs


def _milliseconds(render: Callable[[], Any], times: int = 1) -> Subject:
    return lambda: cpu_seconds(render, times) * 1e3


def _ours(content: page.Content, names: int, format: Any = TEXT) -> Callable[[], bytes]:
    registry, _ = page.ours(content, names)
    return lambda: format.encode(registry.collect())


def _prometheus(registry: Any, module: str = "prometheus_client") -> Callable[[], bytes]:
    generate = peer(module).generate_latest
    return lambda: generate(registry)


def _pytheus(content: page.Content, names: int) -> Callable[[], bytes]:
    generate, registry = peer("pytheus.exposition").generate_metrics, page.pytheus(content, names)
    return lambda: generate(registry).encode()


def _aio(content: page.Content, names: int) -> Callable[[], bytes]:
    formatter, registry = peer("aioprometheus.formats.text").TextFormatter(), page.aio(content, names)
    return lambda: formatter.marshall(registry)


def _check_equal(ours: bytes, theirs: bytes) -> None:
    """Nothing is compared that does not say the same."""
    read, expected = page.samples(ours), page.samples(theirs)
    if read != expected:
        raise AssertionError(f"the pages differ: {len(read)} samples and {len(expected)}")


def measure_text(content: str) -> Callable[[Scale], Mapping[str, Sequence[float]]]:
    """Text 0.0.4 of one content in all libraries."""

    def measure(scale: Scale) -> Mapping[str, Sequence[float]]:
        of, names = page.CONTENTS[content], scale.names
        renderers = present(
            {
                OURS: lambda: _ours(of, names),
                "prometheus_client": lambda: _prometheus(page.prometheus(of, names)),
                "pytheus": lambda: _pytheus(of, names),
                "aioprometheus": lambda: _aio(of, names),
                "opentelemetry exporter": lambda: _prometheus(page.otel_prometheus(of, names)),
            }
        )
        _check_equal(renderers[OURS](), renderers["prometheus_client"]())
        times = {OURS: _TIMES}
        return interleave(
            scale.rounds, {name: _milliseconds(render, times.get(name, 1)) for name, render in renderers.items()}
        )

    return measure


def measure_formats(scale: Scale) -> Mapping[str, Sequence[float]]:
    """The mix in every format; prometheus_client writes text and OpenMetrics."""
    of, names = page.CONTENTS["mix"], scale.names
    theirs = page.prometheus(of, names)
    return interleave(
        scale.rounds,
        {
            "text": _milliseconds(_ours(of, names, TEXT), _TIMES),
            "openmetrics": _milliseconds(_ours(of, names, OPENMETRICS), _TIMES),
            "protobuf": _milliseconds(_ours(of, names, PROTOBUF)),
            "prometheus_client, text": _milliseconds(_prometheus(theirs)),
            "prometheus_client, openmetrics": _milliseconds(
                _prometheus(theirs, "prometheus_client.openmetrics.exposition")
            ),
        },
    )


def measure_parts(scale: Scale) -> Mapping[str, Sequence[float]]:
    """Where the time of a text page goes, and what packing adds."""
    registry, _ = page.ours(page.CONTENTS["mix"], scale.names)
    families = registry.collect()
    text = TEXT.encode(families)
    codings = {coding.name: coding for coding in CODINGS if coding.name != "identity"}
    subjects = {
        "collect": _milliseconds(registry.collect, _TIMES),
        "encode": _milliseconds(lambda: TEXT.encode(families), _TIMES),
        "gzip": _milliseconds(lambda: codings["gzip"].compress(text)),
    }
    try:
        codings["zstd"].compress(text)
    except AssertionError:  # neither Python's own nor the extra
        pass
    else:
        subjects["zstd"] = _milliseconds(lambda: codings["zstd"].compress(text))
    return interleave(scale.rounds, subjects)


def measure_new_name(scale: Scale) -> Mapping[str, Sequence[float]]:
    """A page after a new actor name was bound, so that no two pages have the same names."""
    content = page.CONTENTS["mix"]
    registry, declared = page.ours(content, scale.names, room=1)
    plain = _ours(content, scale.names)
    numbers = iter(range(1_000_000))
    last = [""]

    def render() -> bytes:
        registry.release(last[0])
        last[0] = f"new-{next(numbers)}"
        registry.bind(declared, actor_name=last[0])
        return TEXT.encode(registry.collect())

    return interleave(
        scale.rounds,
        {"the same names": _milliseconds(plain, _TIMES), "one name is new each time": _milliseconds(render, _TIMES)},
    )


def measure_bytes(scale: Scale) -> Mapping[str, Sequence[float]]:
    """Sizes of one page, everything on it included."""
    of, names = page.CONTENTS["mix"], scale.names
    theirs = page.prometheus(of, names)
    text = _ours(of, names)()
    gzip = next(coding for coding in CODINGS if coding.name == "gzip")
    pages = {
        "text": text,
        "text, gzip": gzip.compress(text),
        "openmetrics": _ours(of, names, OPENMETRICS)(),
        "protobuf": _ours(of, names, PROTOBUF)(),
        "prometheus_client, text": _prometheus(theirs)(),
        "prometheus_client, openmetrics": _prometheus(theirs, "prometheus_client.openmetrics.exposition")(),
    }
    return {name: [float(len(made))] for name, made in pages.items()}


CASES = (
    Case("text counters", "text page, counters, whole numbers", "ms", measure_text("counters")),
    Case("text floats", "text page, gauges, random floats", "ms", measure_text("floats")),
    Case("text histograms", "text page, histograms", "ms", measure_text("histograms")),
    Case("text mix", "text page, a service's mix", "ms", measure_text("mix")),
    Case("formats", "the mix in each format", "ms", measure_formats),
    Case("parts", "the mix: where the time goes", "ms", measure_parts),
    Case("new name", "text page after a new actor name", "ms", measure_new_name),
    Case("bytes", "the mix: size of the page", "bytes", measure_bytes),
    Case("pure text mix", "pure Python: text page, a service's mix", "ms", measure_text("mix"), environment=PURE),
)
