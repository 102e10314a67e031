"""What the exporter says about itself: `rkmetrics_*`. Declarations only."""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.health import Status
from rkmetrics.metricset import Counter, Gauge, Histogram, Info, MetricSet, OneOf, Registered

__all__ = ["AuthFailure", "Exporter", "Route", "StatusCode"]


class Route(StrEnum):
    """The routes that are served; anything else is "other"."""

    HEALTH = "health"
    METADATA = "metadata"
    METRICS = "metrics"
    TELEMETRY = "telemetry"
    VITALS = "vitals"
    KV_METRICS = "kv_metrics"
    REGISTER = "register"
    BACKENDS = "backends"
    SD = "sd"
    OTHER = "other"


class StatusCode(StrEnum):
    """The answers that our routes give."""

    OK = "200"
    CREATED = "201"
    NOT_MODIFIED = "304"
    BAD_REQUEST = "400"
    UNAUTHORIZED = "401"
    FORBIDDEN = "403"
    NOT_FOUND = "404"
    METHOD_NOT_ALLOWED = "405"
    TIMEOUT = "408"
    CONFLICT = "409"
    TOO_LARGE = "413"
    URI_TOO_LONG = "414"
    TOO_MANY = "429"
    HEADERS_TOO_LARGE = "431"
    ERROR = "500"
    UNAVAILABLE = "503"
    FULL = "507"


class AuthFailure(StrEnum):
    """Why a request to a gated route got 401."""

    MISSING = "missing"
    WRONG_SCHEME = "wrong_scheme"
    MALFORMED = "malformed"
    SEVERAL_HEADERS = "several_headers"
    WRONG_TOKEN = "wrong_token"  # noqa: S105 - a reason, not a secret
    QUERY_TOKEN = "query_token"  # noqa: S105


class Exporter(MetricSet, per_actor=False):
    """The exporter itself: what it is, how much it serves, what it refused."""

    build_info = Info(
        "rkmetrics_build_info",
        "The exporter's version and the version of its metric catalogue.",
        version=Registered("version of rkmetrics"),
        catalog=Registered("version of the catalogue"),
    )
    series = Gauge("rkmetrics_series", "Series that exist in this registry.", across="sum")
    series_limit = Gauge(
        "rkmetrics_series_limit", "Series that can exist at most: the worst case of the budget.", across="sum"
    )
    actor_names = Gauge("rkmetrics_actor_names", "Actor names that are admitted.", across="max")
    actor_names_limit = Gauge("rkmetrics_actor_names_limit", "Actor names that can be admitted at most.", across="max")
    label_overflow = Counter(
        "rkmetrics_label_overflow_total",
        "Label values that were not declared, and actor names past the limit; they count as __other__.",
        metric=Registered("declared metrics, or * for an actor name"),
        label=Registered("their labels"),
    )
    collector_errors = Counter(
        "rkmetrics_collector_errors_total",
        "Collections that went without a collector's families.",
        collector=Registered("registered collectors"),
        reason=Registered("raised or timeout"),
    )
    exemplars_dropped = Counter(
        "rkmetrics_exemplars_dropped_total", "Exemplars left out because their labels were not short text."
    )
    auth_failures = Counter(
        "rkmetrics_auth_failures_total", "Requests to gated routes without a valid token.", reason=OneOf(AuthFailure)
    )
    http_requests = Counter(
        "rkmetrics_http_requests_total",
        "Requests to the exporter's routes.",
        route=OneOf(Route),
        code=OneOf(StatusCode),
    )
    render_duration = Histogram(
        "rkmetrics_render_duration_seconds",
        "Time to collect and render one answer to a scrape.",
        buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    )
    health_state = Gauge(
        "rkmetrics_health_state",
        "1 for the state that /health reports, 0 for the others.",
        across="sum",
        state=OneOf(Status),
    )
