"""A real Prometheus takes each of the formats, and holds what the snapshot holds."""

from __future__ import annotations

import math
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.exposition import FORMATS, choose_coding, negotiate
from rkmetrics.exposition.text import encode as text
from rkmetrics.model import Exemplar, Family, MetricFamily, MetricType
from tests.exposition.families import HOSTILE, counter, gauge, histogram
from tests.exposition.readers import Page, expected

NOW = time.time()
# Nothing to escape in it: Prometheus' OpenMetrics parser keeps the backslashes of exemplars (seen in 2.42).
EXEMPLAR = Exemplar((("actor_id", "room-81f"), ("trace_id", "4bf9")), 0.2, round(NOW, 3))
KINDS = {"label_names": ("kind",), "combos": (("text",), ("image",))}

jobs = counter("fleet_jobs_total", [float(k) / 7 for k in range(2 * len(HOSTILE))], HOSTILE, **KINDS)
FAMILIES: tuple[Family, ...] = (
    MetricFamily(jobs.shape, jobs.actor_names, jobs.values, jobs.start_times, {0: EXEMPLAR}),
    gauge("fleet_busy_workers", [math.nan, math.inf, -math.inf, -0.0, 1e300, 5e-324], list("abcdef")),
    counter("fleet_cpu_seconds_total", [1e16], [""], per_actor=False, unit="seconds"),
    histogram("fleet_wait_seconds", [[0.1, 0.2, 5e6], []], (0.005, 0.25, 1.0, 1e6), ["lobby", "arena"], {1: EXEMPLAR}),
    histogram("fleet_native_seconds", [[0.0, 0.5, 0.5, 1.3, 1.3, 1.3, 60.0, 1e9]], (1.0,), native=True),
)


@dataclass
class Target:
    """Serves the families under /<format> in that format, elsewhere in the one that is asked for."""

    url: str = ""
    answered: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        accept = (handler.headers.get("Accept") or "").encode()
        forced = {format.name: format for format in FORMATS}
        format = forced.get(handler.path.strip("/")) or negotiate(accept)
        coding = choose_coding((handler.headers.get("Accept-Encoding") or "").encode())
        page = coding.compress(format.encode(FAMILIES))
        handler.send_response(200)
        handler.send_header("Content-Type", format.content_type)
        handler.send_header("Content-Length", str(len(page)))
        if coding.name != "identity":
            handler.send_header("Content-Encoding", coding.name)
        handler.end_headers()
        handler.wfile.write(page)
        self.answered.append((handler.path, f"{format.name} {coding.name}"))


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    made = Target()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            made.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def servers(start_prometheus: Callable[..., Any], target: Target) -> tuple[Any, Any]:
    """One that may take protobuf, with a job for each format, and one as it comes; each scrapes after 5 seconds."""
    jobs = {name: f"{target.url}/{name}" for name in (*(format.name for format in FORMATS), "negotiated-natively")}
    able = start_prometheus(jobs, "--enable-feature=native-histograms,exemplar-storage")
    plain = start_prometheus({"negotiated": f"{target.url}/negotiated"})
    able.wait(lambda: len(able.query("up == 1")) == len(jobs))
    plain.wait(lambda: len(plain.query("up == 1")) == 1)
    return able, plain


@pytest.fixture(scope="module")
def prometheus(servers: tuple[Any, Any]) -> Any:
    return servers[0]


def stored(prometheus: Any, job: str) -> Page:
    page = Page()
    for one in prometheus.query(f'{{job="{job}",__name__=~"fleet_.*"}}'):
        labels = {name: value for name, value in one["metric"].items() if name not in ("job", "instance", "__name__")}
        if "value" in one:
            page.add(one["metric"]["__name__"], labels, float(one["value"][1]))
    return page


def without_native(page: Page) -> dict[Any, str]:
    return {key: value for key, value in page.samples.items() if not key[0].startswith("fleet_native")}


@pytest.mark.parametrize("job", [format.name for format in FORMATS])
def test_it_stores_every_series_as_it_is_in_the_snapshot(prometheus: Any, job: str) -> None:
    """Names, labels with hostile values, and every bit of the numbers; the names do not depend on the format."""
    assert without_native(stored(prometheus, job)) == without_native(expected(FAMILIES))


@pytest.mark.parametrize("job", ["text", "openmetrics"])
def test_text_has_the_classic_buckets_of_native_histograms(prometheus: Any, job: str) -> None:
    assert stored(prometheus, job).samples == expected(FAMILIES).samples


def test_protobuf_has_native_histograms(prometheus: Any) -> None:
    (found,) = prometheus.query('fleet_native_seconds{job="protobuf"}')
    value = found["histogram"][1]
    assert (value["count"], float(value["sum"])) == ("8", sum([0.0, 0.5, 0.5, 1.3, 1.3, 1.3, 60.0, 1e9]))
    bounds = {(float(low), float(high)): count for _, low, high, count in value["buckets"]}
    holding = {each: count for each in (0.5, 1.3, 60.0) for (low, high), count in bounds.items() if low < each <= high}
    assert holding == {0.5: "2", 1.3: "3", 60.0: "1"}
    (quantile,) = prometheus.query('histogram_quantile(0.5, fleet_native_seconds{job="protobuf"})')
    assert 1.3 / 1.1 < float(quantile["value"][1]) < 1.3 * 1.1


@pytest.mark.parametrize("job", ["openmetrics", "protobuf"])
def test_exemplars_arrive(prometheus: Any, job: str) -> None:
    def found() -> list[Any]:
        asked = {"start": str(NOW - 600), "end": str(NOW + 600)}
        return list(prometheus.get("/api/v1/query_exemplars", query=f'{{job="{job}"}}', **asked))

    prometheus.wait(lambda: len(found()) == 2)
    series = {one["seriesLabels"]["__name__"]: one for one in found()}
    assert set(series) == {"fleet_jobs_total", "fleet_wait_seconds_bucket"}
    for one in series.values():
        assert one["exemplars"][0]["labels"] == dict(EXEMPLAR.labels)
        assert float(one["exemplars"][0]["value"]) == EXEMPLAR.value
        assert one["exemplars"][0]["timestamp"] == EXEMPLAR.timestamp
    assert series["fleet_wait_seconds_bucket"]["seriesLabels"]["le"] == "0.25"


@pytest.mark.parametrize("job", [format.name for format in FORMATS])
def test_it_knows_types_and_help(prometheus: Any, job: str) -> None:
    metadata = prometheus.get("/api/v1/targets/metadata", match_target=f'{{job="{job}"}}')
    found = {one["metric"]: (one["type"], one["help"]) for one in metadata}
    for family in FAMILIES:
        assert isinstance(family, MetricFamily)
        total = family.shape.type is MetricType.COUNTER and job == "openmetrics"
        name = family.name.removesuffix("_total") if total else family.name
        assert found[name] == (family.shape.type, family.shape.help)


def test_it_says_nothing_bad_about_the_scrapes(prometheus: Any) -> None:
    assert [line for line in prometheus.log().split("\n") if "level=warn" in line or "level=error" in line] == []


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize(("path", "answer"), [("/negotiated", "openmetrics"), ("/negotiated-natively", "protobuf")])
def test_what_it_asks_for_is_answered(target: Target, path: str, answer: str) -> None:
    """Its own Accept headers, without the feature flag and with it."""
    assert {answered for asked, answered in target.answered if asked == path} == {f"{answer} gzip"}


def test_promtool_finds_nothing_to_mend_but_the_names_that_are_listed_as_exceptions(promtool: str) -> None:
    registry = rk.Registry(rk.Settings())
    actor = registry.actor("lobby")
    with actor.running(actor_id="room-1"):
        page = text(registry.collect())
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, timeout=60, check=False)
    definitions = [definition for known in registry.sets() for definition in known.definitions()]
    exceptions = {definition.name for definition in definitions if definition.exception}
    found = {line.split(" ")[0] for line in (done.stdout + done.stderr).decode().split("\n") if line}
    assert found <= exceptions
    assert done.returncode == (3 if found else 0)


def test_promtool_reads_hostile_values(promtool: str) -> None:
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text(FAMILIES), capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
