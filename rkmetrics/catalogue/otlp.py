"""The OTLP push's own metrics: whether it reaches its receiver, and what the receiver says."""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.metricset import LATENCY, Counter, Gauge, Histogram, MetricSet, OneOf

__all__ = ["Otlp", "Outcome"]


class Outcome(StrEnum):
    """How one request to an OTLP receiver ends (bridges/otlp/answers.py says what follows from each)."""

    OK = "ok"
    PARTIAL = "partial"  # taken, but for some points
    REJECTED = "rejected"  # the data are at fault: not sent again
    REFUSED = "refused"  # the request is at fault (token, address, method): tried again at the next interval
    UNAVAILABLE = "unavailable"  # not taken: down, overloaded or throttling
    UNANSWERED = "unanswered"  # sent, and nobody knows whether it was taken
    GARBAGE = "garbage"  # answered, but not in OTLP
    FAILED = "failed"  # the exporter gave up by itself


class Otlp(MetricSet, per_actor=False):
    """The OTLP push, bound when a pusher is made."""

    exports = Counter(
        "rkmetrics_otlp_exports_total", "Requests sent to the OTLP receiver, by outcome.", outcome=OneOf(Outcome)
    )
    points_rejected = Counter(
        "rkmetrics_otlp_points_rejected_total",
        "Data points that the OTLP receiver refused to take, and that are dropped.",
    )
    export_duration = Histogram(
        "rkmetrics_otlp_export_duration_seconds", "Time that one request to the OTLP receiver takes.", buckets=LATENCY
    )
    last_success = Gauge(
        "rkmetrics_otlp_last_success_timestamp_seconds",
        "When the OTLP receiver last took all data of a push, in Unix time; absent until then.",
        across="max",
    )
    failed_attempts = Gauge(
        "rkmetrics_otlp_failed_attempts",
        "Requests to the OTLP receiver that have failed since the last good one.",
        across="max",
    )
