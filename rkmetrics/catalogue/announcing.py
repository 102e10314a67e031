"""What a backend does to be found: `rkmetrics_announce_*`. Declarations only; discovery.py has the balancer's side."""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.metricset import Counter, Gauge, MetricSet, OneOf

__all__ = ["AnnounceOutcome", "Announcing", "WithdrawOutcome"]


class AnnounceOutcome(StrEnum):
    """How one announcement at a balancer ends."""

    OK = "ok"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    UNAUTHORIZED = "unauthorized"  # 401 or 403: the token is not the balancer's, or the address is not allowed
    CONFLICT = "conflict"  # 409: the id or the address is another's there
    BUSY = "busy"  # 429, 503 or 507: too many at once, or no place left
    REFUSED = "refused"  # any other status, a redirect too
    MALFORMED = "malformed"  # no HTTP, or no balancer's answer


class WithdrawOutcome(StrEnum):
    """How taking back an announcement ends."""

    OK = "ok"
    FAILED = "failed"  # the balancer finds out by its checks


class Announcing(MetricSet, per_actor=False):
    """Announcements of this process to load balancers; nothing of it has a series where there are none."""

    announcements = Counter(
        "rkmetrics_announce_total",
        "Announcements to load balancers, by how they ended.",
        outcome=OneOf(AnnounceOutcome),
    )
    withdrawals = Counter(
        "rkmetrics_announce_withdrawals_total",
        "Announcements that were taken back at the end, by how that went.",
        outcome=OneOf(WithdrawOutcome),
    )
    balancers = Gauge("rkmetrics_announce_balancers", "Load balancers that took the last announcement.", across="sum")
    balancers_wanted = Gauge(
        "rkmetrics_announce_balancers_wanted", "Load balancers that this process announces itself to.", across="sum"
    )
    last_success = Gauge(
        "rkmetrics_announce_last_success_timestamp_seconds",
        "When a load balancer last took an announcement, in Unix time; absent until then.",
        across="max",
    )
