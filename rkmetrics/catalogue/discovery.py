"""Service discovery: `rkmetrics_discovery_*`. Declarations only.

No backend is a label: ids and addresses are unbounded, and one backend is looked at through /backends?details=1.
"""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.metricset import Counter, Gauge, Histogram, MetricSet, OneOf

__all__ = ["BackendState", "Balancing", "CheckOutcome", "Departure", "RegisterOutcome"]


class BackendState(StrEnum):
    """What a balancer thinks of a backend."""

    NEW = "new"  # not checked yet, or never found ready so far
    UP = "up"
    DOWN = "down"  # missed `fall` checks in a row
    DRAINING = "draining"  # answers, and says that it is not ready


class CheckOutcome(StrEnum):
    """How one health check ends."""

    READY = "ready"
    NOT_READY = "not_ready"
    REFUSED = "refused"  # the host is there, and nothing listens
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    CLOSED = "closed"  # the connection ended before the answer did
    UNAUTHORIZED = "unauthorized"  # 401 or 403: the token is not the backend's
    WRONG_STATUS = "wrong_status"
    MALFORMED = "malformed"  # no HTTP, or no vitals
    TOO_LARGE = "too_large"
    NOT_SENT = "not_sent"  # the balancer has no socket left, which says nothing of the backend


class RegisterOutcome(StrEnum):
    """What becomes of a registration, or of its end."""

    ADDED = "added"
    REFRESHED = "refreshed"
    REMOVED = "removed"
    UNKNOWN = "unknown"  # to be removed, and not there
    MALFORMED = "malformed"
    FORBIDDEN = "forbidden"  # an address that the policy does not allow
    CONFLICT = "conflict"  # the id or the address is another's
    FULL = "full"
    LIMITED = "limited"  # too many from one caller


class Departure(StrEnum):
    """Why a backend leaves the pool."""

    UNREACHABLE = "unreachable"
    NOT_READY = "not_ready"
    REMOVED = "removed"


class Balancing(MetricSet, per_actor=False):
    """What a balancer knows of its backends."""

    backends = Gauge(
        "rkmetrics_discovery_backends", "Backends that are known.", across="max", state=OneOf(BackendState)
    )
    backends_limit = Gauge("rkmetrics_discovery_backends_limit", "Backends that can be known at most.", across="max")
    pool = Gauge("rkmetrics_discovery_pool_backends", "Backends that get traffic.", across="min")
    panic = Gauge(
        "rkmetrics_discovery_panic",
        "1 while so many backends are silent at once that the balancer doubts itself, and lists them all the same.",
        across="max",
    )
    departures = Counter(
        "rkmetrics_discovery_departures_total", "Backends that left the pool, by why.", reason=OneOf(Departure)
    )
    damped = Gauge(
        "rkmetrics_discovery_damped_backends", "Backends kept out for longer since they come and go.", across="max"
    )
    expired = Counter("rkmetrics_discovery_expired_total", "Dead backends that were forgotten.")
    registrations = Counter(
        "rkmetrics_discovery_registrations_total",
        "Registrations and their ends, by what became of them.",
        outcome=OneOf(RegisterOutcome),
    )
    checks = Counter(
        "rkmetrics_discovery_checks_total", "Health checks, by how they ended.", outcome=OneOf(CheckOutcome)
    )
    check_duration = Histogram(
        "rkmetrics_discovery_check_duration_seconds",
        "Time from a health check to its answer.",
        buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    )
    checks_in_flight = Gauge(
        "rkmetrics_discovery_checks_in_flight", "Health checks that wait for an answer.", across="max"
    )
    checks_waiting = Gauge(
        "rkmetrics_discovery_checks_waiting", "Health checks that are due and wait for a place.", across="max"
    )
    oldest_check_age = Gauge(
        "rkmetrics_discovery_oldest_check_age_seconds",
        "Time since the check that is the longest ago, among the backends that get traffic.",
        across="max",
    )
