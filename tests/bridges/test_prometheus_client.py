"""Both worlds in one scrape, either way round, and no name twice."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, exposition
from prometheus_client import Counter as TheirCounter
from prometheus_client import Enum as TheirEnum
from prometheus_client import Gauge as TheirGauge
from prometheus_client import Histogram as TheirHistogram
from prometheus_client import Info as TheirInfo
from prometheus_client import Summary as TheirSummary
from prometheus_client.core import GaugeHistogramMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.registry import Collector as CollectorProtocol
from prometheus_client.samples import Exemplar, NativeHistogram, Sample, Timestamp

import rkmetrics as rk
from rkmetrics import model
from rkmetrics.bridges.prometheus_client import DEFAULTS, Collector, attach, foreign
from rkmetrics.errors import RegistryError
from rkmetrics.exposition import FORMATS
from rkmetrics.exposition.openmetrics import encode as openmetrics
from rkmetrics.exposition.protobuf import encode as protobuf
from rkmetrics.exposition.text import encode as text
from tests.exposition.readers import Page, read_openmetrics, read_protobuf, read_text

generate_latest: Any = exposition.generate_latest
generate_openmetrics: Any = openmetrics_exposition.generate_latest


class Fleet(rk.MetricSet):
    jobs = rk.Counter("fleet_jobs_total", "Jobs done.", kind=rk.OneOf("text", "image"))
    busy = rk.Gauge("fleet_busy_workers", "Workers that are busy.", across="sum")
    wait = rk.Histogram("fleet_wait_seconds", "Time in the queue.", buckets=(0.1, 1.0))


@pytest.fixture
def registry() -> rk.Registry:
    made = rk.Registry(rk.Settings(), builtin=False)
    lobby = made.bind(Fleet, actor_name='lo"bby\n')
    lobby.jobs["text"].inc(3, exemplar={"trace_id": "abc"})
    lobby.busy.set(2)
    lobby.wait.observe(0.25, exemplar={"trace_id": "def"})
    return made


@pytest.fixture
def theirs() -> CollectorRegistry:
    """One metric of each of their types."""
    made = CollectorRegistry()
    TheirCounter("other_jobs", "Jobs.", ["queue"], registry=made).labels('a"b').inc(2, exemplar={"trace_id": "ghi"})
    TheirGauge("other_busy", "Busy.", registry=made).set(math.inf)
    TheirHistogram("other_wait_seconds", "Waits.", buckets=(0.5, 2), registry=made).observe(1.5)
    TheirSummary("other_size_bytes", "Sizes.", registry=made).observe(7)
    TheirInfo("other_build", "Build.", registry=made).info({"version": "3"})
    TheirEnum("other_state", "State.", states=["on", "off"], registry=made).state("off")
    return made


def own(page: Page, prefix: str = "fleet_") -> dict[object, str]:
    return {key: value for key, value in page.samples.items() if key[0].startswith(prefix)}


# ---- ours on their page


def test_our_families_on_their_page_are_those_of_ours(registry: rk.Registry) -> None:
    page = CollectorRegistry()
    page.register(Collector(registry))
    ours = own(read_text(text(registry.collect())))
    assert len(ours) == 8
    assert own(read_text(generate_latest(page))) == ours
    assert own(read_openmetrics(generate_openmetrics(page))) == ours


def test_exemplars_go_along(registry: rk.Registry) -> None:
    page = CollectorRegistry()
    page.register(Collector(registry))
    ours = read_openmetrics(openmetrics(registry.collect()))
    shown = read_openmetrics(generate_openmetrics(page))
    assert {key: value[:2] for key, value in shown.exemplars.items()} == {k: v[:2] for k, v in ours.exemplars.items()}
    assert len(shown.exemplars) == 2


def test_types_and_units_are_theirs_too(registry: rk.Registry) -> None:
    found = {metric.name: metric for metric in Collector(registry).collect()}
    assert {name: found[name].type for name in ("fleet_jobs", "fleet_busy_workers", "fleet_wait_seconds")} == {
        "fleet_jobs": "counter",
        "fleet_busy_workers": "gauge",
        "fleet_wait_seconds": "histogram",
    }
    assert found["fleet_wait_seconds"].unit == "seconds"


def test_their_registry_refuses_a_name_that_it_has(registry: rk.Registry) -> None:
    page = CollectorRegistry()
    TheirCounter("fleet_jobs", "Taken.", registry=page)
    with pytest.raises(ValueError, match="fleet_jobs"):
        page.register(Collector(registry))


def test_their_registry_refuses_a_name_that_we_have(registry: rk.Registry) -> None:
    page = CollectorRegistry()
    page.register(Collector(registry))
    with pytest.raises(ValueError, match="fleet_busy_workers"):
        TheirGauge("fleet_busy_workers", "Taken.", registry=page)


def test_their_default_registry_takes_a_registry_that_measures_the_process_as_well() -> None:
    registry = rk.Registry(rk.Settings())
    registry.collect()  # loads what a registry measures by itself
    collector = Collector(registry)
    REGISTRY.register(collector)
    try:
        page = generate_latest(REGISTRY).decode()
    finally:
        REGISTRY.unregister(collector)
    types = [line for line in page.split("\n") if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    assert "process_threads" in page, "what only we measure is there"
    everything = {metric.name for metric in Collector(registry, leave_out=()).collect()}
    assert "process_cpu_seconds" in everything


def test_families_of_a_users_collector_are_passed_on(registry: rk.Registry) -> None:
    family = model.ForeignFamily(
        "users.own", model.MetricType.GAUGE, "Own.", "", (model.Sample("users.own", (("a", "1"),), 2.5),)
    )
    registry.add_collector(lambda: [family], name="users")
    page = CollectorRegistry()
    page.register(Collector(registry))
    assert own(read_text(generate_latest(page)), "users") == {("users_own", (("a", "1"),)): "2.5"}


def test_families_that_cannot_be_on_a_page_are_not_passed_on(registry: rk.Registry) -> None:
    labelled = model.Shape("users_twice", model.MetricType.GAUGE, "", "", ("a", "a"), (("1", "2"),), per_actor=False)
    bad = model.MetricFamily(labelled, ("",), [1.0], (0.0,))
    clashing = model.ForeignFamily("fleet_jobs", model.MetricType.GAUGE, "", "", (model.Sample("fleet_jobs", (), 1),))
    registry.add_collector(lambda: [bad, clashing], name="users")
    page = CollectorRegistry()
    page.register(Collector(registry))
    assert len(own(read_openmetrics(generate_openmetrics(page)))) == 8
    assert b"users_twice" not in generate_latest(page)


# ---- theirs on our page


def test_their_families_on_our_page_are_those_of_theirs(registry: rk.Registry, theirs: CollectorRegistry) -> None:
    attach(registry, theirs)
    wanted = read_openmetrics(generate_openmetrics(theirs))
    families = registry.collect()
    for page in (read_text(text(families)), read_openmetrics(openmetrics(families))):
        assert own(page, "other_") == wanted.samples
        assert len(own(page)) == 8
    in_protobuf = own(read_protobuf(protobuf(families)), "other_")
    assert in_protobuf == {key: value for key, value in wanted.samples.items() if not key[0].endswith("_created")}


def test_their_page_keeps_its_types_and_exemplars(registry: rk.Registry, theirs: CollectorRegistry) -> None:
    attach(registry, theirs)
    wanted = read_openmetrics(generate_openmetrics(theirs))
    found = read_openmetrics(openmetrics(registry.collect()))
    assert {name: kind for name, kind in found.types.items() if name.startswith("other_")} == wanted.types
    ((key, exemplar),) = wanted.exemplars.items()
    assert found.exemplars[key][:2] == exemplar[:2]
    assert abs(found.exemplars[key][2] - exemplar[2]) < 0.001


@pytest.mark.parametrize(
    ("register", "names"),
    [
        (lambda page: TheirCounter("fleet_jobs", "Taken.", registry=page), "fleet_jobs"),
        (lambda page: TheirGauge("fleet_jobs_total", "Taken.", registry=page), "fleet_jobs_total"),
        (lambda page: TheirGauge("fleet_wait_seconds_count", "Taken.", registry=page), "fleet_wait_seconds_count"),
        (lambda page: TheirHistogram("fleet_wait_seconds", "Taken.", registry=page), "fleet_wait_seconds"),
        (lambda page: TheirGauge("rkmetrics_series", "Taken.", registry=page), "rkmetrics_series"),
    ],
)
def test_a_name_that_our_sets_have_is_refused(registry: rk.Registry, register: object, names: str) -> None:
    page = CollectorRegistry()
    register(page)  # type: ignore[operator]
    with pytest.raises(RegistryError, match=f"prometheus_client: {names}: the registry has metrics of that name"):
        attach(registry, page)
    assert b"Taken" not in text(registry.collect())


def test_a_name_that_another_collector_gives_is_refused(registry: rk.Registry, theirs: CollectorRegistry) -> None:
    attach(registry, theirs, name="first")
    page = CollectorRegistry()
    TheirGauge("other_jobs_created", "Taken.", registry=page)
    with pytest.raises(RegistryError, match="second: other_jobs_created: the registry has metrics of that name"):
        attach(registry, page, name="second")
    assert b"Taken" not in text(registry.collect())


def test_of_two_attached_registries_with_one_name_the_first_is_shown(registry: rk.Registry) -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    attach(registry, first, name="first")
    attach(registry, second, name="second")
    TheirGauge("other_depth", "Depth.", registry=second).set(2)
    TheirGauge("other_depth", "Depth.", registry=first).set(1)
    for read, encode in ((read_text, text), (read_openmetrics, openmetrics), (read_protobuf, protobuf)):
        assert own(read(encode(registry.collect())), "other_") == {("other_depth", ()): "1.0"}


def test_a_name_that_comes_to_clash_later_costs_the_foreign_family(
    registry: rk.Registry, theirs: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    attach(registry, theirs)
    TheirGauge("fleet_busy_workers", "Taken.", registry=theirs)
    for _ in range(3):
        page = text(registry.collect())
    assert page.count(b"# TYPE fleet_busy_workers ") == 1
    assert b"Taken" not in page
    assert b"other_jobs_total" in page
    assert [record.getMessage() for record in caplog.records] == [
        "prometheus_client: fleet_busy_workers is left out: the registry has metrics of that name by now"
    ]


def test_their_default_registry_is_attached_without_the_process_metrics_that_we_have() -> None:
    registry = rk.Registry(rk.Settings())
    attach(registry, REGISTRY)
    for _ in range(2):
        page = text(registry.collect()).decode()
        types = [line for line in page.split("\n") if line.startswith("# TYPE")]
        assert len(types) == len(set(types))
    assert "python_info" in page
    assert "# TYPE process_cpu_seconds_total counter\n" in page


def test_the_left_out_names_are_those_of_their_default_collectors() -> None:
    """In a process of its own, where nothing else is registered."""
    script = "import prometheus_client as p; print(*sorted({m.name for m in p.REGISTRY.collect()}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) <= DEFAULTS


def test_both_ways_at_once_do_not_go_round_in_circles(registry: rk.Registry, theirs: CollectorRegistry) -> None:
    attach(registry, theirs)
    theirs.register(Collector(registry))
    ours = read_text(text(registry.collect()))
    assert (len(own(ours)), len(own(ours, "other_"))) == (8, 15)
    page = read_text(generate_latest(theirs))  # fails where a series is on the page twice
    assert (len(own(page)), len(own(page, "other_"))) == (8, 15)
    other = rk.Registry(rk.Settings(), builtin=False)
    attach(other, theirs)
    assert registry.exporter.collector_errors.keys() == other.exporter.collector_errors.keys()


class Strange(CollectorProtocol):
    """What a collector written by hand may give."""

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("strange_gauge", "Strange.", labels=["a"])
        family.add_metric(["\ud800"], 1.0, timestamp=Timestamp(1_700_000_000, 500_000_000))
        yield family
        sizes = GaugeHistogramMetricFamily("strange_sizes", "Sizes.")
        sizes.add_metric([], buckets=[("1", 2.0), ("+Inf", 3.0)], gsum_value=9.0)
        yield sizes
        native = Metric("strange_native", "Native.", "histogram")
        native.samples = [Sample("strange_native", {}, 0.0, native_histogram=NativeHistogram(1, 1, 0, 0, 1))]
        yield native
        marked = Metric("strange_jobs", "Jobs.", "counter")
        marked.samples = [Sample("strange_jobs_total", {}, 1.0, exemplar=Exemplar({"a": "1"}, 2.0, Timestamp(7, 0)))]
        yield marked


def test_what_collectors_by_hand_give_is_carried_as_far_as_formats_go(registry: rk.Registry) -> None:
    page = CollectorRegistry()
    page.register(Strange())
    attach(registry, page)
    families = registry.collect()
    assert b'strange_gauge{a="?"} 1 1700000000500\n' in text(families)
    found = openmetrics(families)
    assert b'strange_sizes_bucket{le="1.0"} 2\n' in found
    assert b'strange_jobs_total 1 # {a="1"} 2 7.000\n' in found
    assert b"strange_native" not in found


def test_a_collector_of_theirs_that_raises_costs_their_families_only(registry: rk.Registry) -> None:
    class Broken(CollectorProtocol):
        broken = False

        def collect(self) -> Iterable[Metric]:
            if self.broken:
                raise RuntimeError("no metrics today")
            return ()

    page, broken = CollectorRegistry(), Broken()
    page.register(broken)
    attach(registry, page, name="theirs")
    broken.broken = True
    shown = text(registry.collect())
    assert b"fleet_jobs_total" in shown
    assert b'rkmetrics_collector_errors_total{collector="theirs",reason="raised"} 1\n' in shown


def test_foreign_answers_families_without_a_registry(theirs: CollectorRegistry) -> None:
    families = foreign(theirs)()
    assert {family.name: family.type for family in families} == {
        "other_jobs": "counter",
        "other_busy": "gauge",
        "other_wait_seconds": "histogram",
        "other_size_bytes": "summary",
        "other_build": "info",
        "other_state": "stateset",
    }
    assert all(format.encode(families) for format in FORMATS)


def test_the_bridges_are_loaded_when_they_are_named() -> None:
    script = (
        "import sys, rkmetrics as rk; assert 'prometheus_client' not in sys.modules;"
        "rk.bridges; assert 'prometheus_client' not in sys.modules;"
        "rk.bridges.prometheus_client.Collector; assert 'prometheus_client' in sys.modules;"
        "assert 'opentelemetry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], env=os.environ, timeout=60, check=True)


def test_an_unknown_bridge_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="statsd"):
        rk.bridges.statsd  # noqa: B018
    assert {"otlp", "prometheus_client"} <= set(dir(rk.bridges))
