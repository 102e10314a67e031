"""How busy workers are, as a router sees it: their reports, and what it sent there since. Pure but for its own clock.

A report is the worker's last word, from whoever brings it (KvMetricsAggregator). What was routed counts on top of it
from the moment of the pick, until a later report has seen it or its answer ends: a burst does not all go to the one who
was idle in the last report.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from rkmetrics.kv.base import ForwardPassMetrics, WorkerKey
from rkmetrics.planes.base import Instance
from rkmetrics.retry import Backoff

__all__ = ["Load", "Loads", "Member", "Routed", "WorkerLoad", "by_instance"]

PROBE_FIRST_SECONDS, PROBE_CAP_SECONDS = 0.1, 5.0
#: A report that is so much younger than a routed request has seen it.
REPORT_LAG_SECONDS = 0.05


class WorkerLoad(Protocol):
    """What is known of one worker; rk.kv.WorkerState is one."""

    @property
    def active_blocks(self) -> int: ...
    @property
    def metrics(self) -> ForwardPassMetrics | None: ...
    @property
    def heard_seconds(self) -> float: ...
    @property
    def stale(self) -> bool: ...


class Loads(Protocol):
    """Who knows how busy workers are; rk.kv.KvMetricsAggregator does. Their ids are those of the instances."""

    def workers(self) -> Mapping[WorkerKey, WorkerLoad]: ...


class Load(NamedTuple):
    """A worker's last word, over all its ranks. at: when it was heard, by the loop's clock."""

    active: int
    total: int
    waiting: int
    at: float
    stale: bool


class Routed:
    """A prompt that this router sent to a worker, and that no report has seen."""

    __slots__ = ("at", "blocks")

    def __init__(self, at: float, blocks: int) -> None:
        self.at, self.blocks = at, blocks


class Member:
    """One instance, and what this router thinks of it."""

    __slots__ = ("active", "backoff", "busy", "id", "instance", "load", "probing", "routed", "routed_blocks", "waiting")

    def __init__(self, instance: Instance) -> None:
        self.instance, self.id = instance, instance.instance_id
        self.active = self.waiting = 0.0  # of its load, or of the average
        self.probing: asyncio.Task[None] | None = None  # while it is down
        self.backoff = Backoff(PROBE_FIRST_SECONDS, PROBE_CAP_SECONDS)
        self.busy = False
        self.load: Load | None = None
        self.routed: OrderedDict[Routed, None] = OrderedDict()  # one that ends does not wait for one before it
        self.routed_blocks = 0

    def take(self, at: float, blocks: int) -> Routed:
        """Count a prompt in, before a report does."""
        routed = Routed(at, blocks)
        self.routed[routed] = None
        self.routed_blocks += blocks
        return routed

    def give_back(self, routed: Routed) -> None:
        """Its answer ended, or a report counts it."""
        if self.routed.pop(routed, self) is None:  # else both were so
            self.routed_blocks -= routed.blocks

    def hear(self, load: Load | None) -> None:
        """What is known now. A report has seen what was routed a while before it."""
        self.load = load
        while load is not None and self.routed:
            oldest = next(iter(self.routed))
            if oldest.at >= load.at - REPORT_LAG_SECONDS:
                break
            self.give_back(oldest)


def by_instance(workers: Mapping[WorkerKey, WorkerLoad], members: Mapping[int, Member], now: float) -> dict[int, Load]:
    """The sum over a worker's ranks; as old as the oldest of them."""
    found: dict[int, Load] = {}
    for key, state in workers.items():
        if key.worker_id not in members:
            continue
        metrics, at = state.metrics, now - state.heard_seconds
        total = metrics.kv_stats.kv_total_blocks if metrics is not None else 0
        waiting = metrics.worker_stats.num_requests_waiting if metrics is not None else 0
        load = Load(state.active_blocks, total, waiting, at, state.stale)
        other = found.get(key.worker_id)
        found[key.worker_id] = load if other is None else _added(load, other)
    return found


def _added(one: Load, other: Load) -> Load:
    return Load(
        one.active + other.active,
        one.total + other.total,
        one.waiting + other.waiting,
        min(one.at, other.at),
        one.stale or other.stale,
    )
