"""What this process does at etcd: `rkmetrics_etcd_*`. Declarations only; none has a series without etcd."""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.metricset import Counter, Gauge, MetricSet, OneOf

__all__ = ["Etcd", "ResyncReason", "StepOutcome"]


class StepOutcome(StrEnum):
    """How one round of keeping keys in etcd, or of asking whether it is there, ends."""

    OK = "ok"
    UNAVAILABLE = "unavailable"  # no endpoint answered in time
    CONFLICT = "conflict"  # another process has the key
    REFUSED = "refused"  # etcd said no: no permission, no space


class ResyncReason(StrEnum):
    """Why a watcher lists all keys instead of going on from the last change."""

    START = "start"
    COMPACTED = "compacted"  # the changes since the last one are gone from etcd's history
    REWOUND = "rewound"  # etcd's history is shorter than what was seen of it: restored, or made anew


class Etcd(MetricSet, per_actor=False):
    """Keys that this process keeps in etcd, and prefixes that it follows there."""

    keys = Gauge("rkmetrics_etcd_keys", "Keys that this process keeps in etcd and that are there.", across="sum")
    keys_wanted = Gauge("rkmetrics_etcd_keys_wanted", "Keys that this process means to keep in etcd.", across="sum")
    steps = Counter(
        "rkmetrics_etcd_registrations_total",
        "Rounds of renewing a lease and looking after its keys, by how they ended.",
        outcome=OneOf(StepOutcome),
    )
    leases_lost = Counter("rkmetrics_etcd_leases_lost_total", "Leases that ended before the process did.")
    watches = Gauge("rkmetrics_etcd_watches", "Prefixes that are followed and up to date.", across="sum")
    watches_wanted = Gauge("rkmetrics_etcd_watches_wanted", "Prefixes that should be followed.", across="sum")
    resyncs = Counter(
        "rkmetrics_etcd_resyncs_total", "Times that a watcher listed all keys, by reason.", reason=OneOf(ResyncReason)
    )
    events = Counter("rkmetrics_etcd_events_total", "Changes of keys that were seen.")
