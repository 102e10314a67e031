"""The input of the golden pages: each case of the formats once, in a fleet that could be."""

from __future__ import annotations

import math

from rkmetrics.model import UNSET, Exemplar, Family, ForeignFamily, MetricType
from tests.exposition.families import counter, gauge, histogram, sample

__all__ = ["FAMILIES"]

EXEMPLAR = Exemplar(
    (("actor_id", 'room-"81f"\\\n'), ("trace_id", "4bf92f3577b34da6a3ce929d0e0e4736")), 0.012, 1_700_000_123.5
)

FAMILIES: tuple[Family, ...] = (
    counter("chat_messages_total", [12, 0.5, UNSET, 1e16, 7, 0], ["lobby", 'quo"te\\\n# EOF'],
            help='Messages "handled".\nOr \\not.', label_names=("kind",),
            combos=(("text",), ("image",), ("__other__",))),
    gauge("chat_members", [3, UNSET, math.nan, -math.inf], ["lobby", "unset", "東京", "\x00"], across="sum"),
    gauge("app_nothing", [UNSET], help="No series, no family."),
    gauge("app_ready", [1], [""], per_actor=False, help=""),
    gauge("app_build_info", [1], [""], per_actor=False, label_names=("version",), combos=(("1.2.3",),)),
    counter("app_cpu_seconds_total", [0.1 + 0.2], [""], per_actor=False, unit="seconds"),
    counter("app_without_suffix", [5], [""], per_actor=False, help="Its name is older than the rule."),
    histogram("chat_reply_duration_seconds", [[0.004, 0.2, 0.2, 3.0], None, [], [0.005]], (0.005, 0.25, 1.0),
              ["lobby", "arena"], {0: EXEMPLAR, 3: EXEMPLAR}, unit="seconds", label_names=("outcome",),
              combos=(("ok",), ("error",))),
    histogram("app_size_bytes", [[1.0, 1024.0, 1e9]], (1024.0, 1e6, 1.5e7), [""], per_actor=False),
    histogram("app_native_seconds", [[0.0, 1e-7, 0.5, 1.0, 1.09, 1.3, 60.0, 1e9]], (1.0,), native=True),
    histogram("app_idle_seconds", [[]], (), [""], per_actor=False, native=True),
    ForeignFamily("other_jobs", MetricType.COUNTER, "Jobs.", "", (
        sample("other_jobs_total", 3, exemplar=EXEMPLAR, queue="a"), sample("other_jobs_created", 1.7e9, queue="a"),
        sample("other_jobs_total", 4, timestamp=1_700_000_000.5, queue="b"),
    )),
    ForeignFamily("other_latency_seconds", MetricType.HISTOGRAM, "Latency.", "seconds", (
        sample("other_latency_seconds_bucket", 1, exemplar=EXEMPLAR, le="1"),
        sample("other_latency_seconds_bucket", 2, le="+Inf"),
        sample("other_latency_seconds_count", 2), sample("other_latency_seconds_sum", 5.5),
        sample("other_latency_seconds_created", 1.7e9),
    )),
    ForeignFamily("other_wait_seconds", MetricType.SUMMARY, "Waits.", "seconds", (
        sample("other_wait_seconds", 0.25, quantile="0.5"), sample("other_wait_seconds", math.nan, quantile="0.99"),
        sample("other_wait_seconds_count", 2), sample("other_wait_seconds_sum", 0.75),
    )),
    ForeignFamily("other_build", MetricType.INFO, "Build.", "", (sample("other_build_info", 1, version="3"),)),
    ForeignFamily("other_state", MetricType.STATESET, "State.", "", (
        sample("other_state", 1, other_state="on"), sample("other_state", 0, other_state="off"),
    )),
    ForeignFamily("other_sizes", MetricType.GAUGEHISTOGRAM, "Sizes.", "", (
        sample("other_sizes_bucket", 3, le="10.0"), sample("other_sizes_bucket", 4, le="+Inf"),
        sample("other_sizes_gcount", 4), sample("other_sizes_gsum", 40),
    )),
    ForeignFamily("other_thing", MetricType.UNKNOWN, "", "", (sample("other_thing", -1.5),)),
    ForeignFamily("other_empty", MetricType.GAUGE, "Empty.", "", ()),
)  # fmt: skip
