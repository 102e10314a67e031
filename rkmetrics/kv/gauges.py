"""The sink that is always on: a worker's state as the metrics of its kind.

Several workers of one kind may live in a process (data-parallel ranks). What adds up is held in shares, which end with
their worker; the fullest cache and the mean hit ratio are taken over the workers that are there when somebody collects,
so that publishing costs the same for each of a thousand as for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean
from typing import Literal

from rkmetrics.catalogue.kv import KvCache, PublishOutcome
from rkmetrics.cells import CounterCell, GaugeShare
from rkmetrics.kv.base import KvUpdate, SpecDecodeStats, WorkerKey

__all__ = ["KindGauges", "SpecDecode"]

#: What the counts of SpecDecodeStats are of: one engine step (as Dynamo's vLLM workers have it), or all so far.
SpecDecode = Literal["step", "total"]

_SUMS = ("active_blocks", "blocks", "request_active_slots", "request_slots", "requests_waiting")


class _Part:
    """One worker's part of the metrics of its kind."""

    __slots__ = ("hit_ratio", "shares", "totals", "usage")

    def __init__(self, cells: KvCache) -> None:
        self.shares: tuple[GaugeShare, ...] = tuple(getattr(cells, name).share() for name in _SUMS)
        self.usage = self.hit_ratio = 0.0
        self.totals: dict[str, int] = {}


class KindGauges:
    """The workers of one kind (one actor name) in this process. A MetricsSink."""

    def __init__(self, cells: KvCache, clock: Callable[[], float] = time.time) -> None:
        self.cells, self._clock = cells, clock
        self._parts: dict[WorkerKey, _Part] = {}
        self._ok = cells.publish[PublishOutcome.OK]
        self.failed = cells.publish[PublishOutcome.ERROR]
        self._counters: tuple[tuple[str, CounterCell], ...] = (
            ("num_drafts", cells.spec_decode_drafts),
            ("num_draft_tokens", cells.spec_decode_draft_tokens),
            ("num_accepted_tokens", cells.spec_decode_accepted_tokens),
        )

    def offer(self, update: KvUpdate, spec_decode: SpecDecode = "step") -> None:
        """Show a worker's state. spec_decode: what its SpecDecodeStats count."""
        part = self._parts.get(update.key) or self._parts.setdefault(update.key, _Part(self.cells))
        worker, kv = update.metrics.worker_stats, update.metrics.kv_stats
        numbers = (
            kv.kv_active_blocks,
            kv.kv_total_blocks,
            worker.request_active_slots,
            worker.request_total_slots,
            worker.num_requests_waiting,
        )
        for share, number in zip(part.shares, numbers, strict=True):
            share.set(number)
        part.usage, part.hit_ratio = kv.gpu_cache_usage_perc, kv.gpu_prefix_cache_hit_rate
        if update.metrics.spec_decode_stats is not None:
            self._count(part, update.metrics.spec_decode_stats, spec_decode)
        self._ok.inc()
        self.cells.last_publish.set(self._clock())

    def withdraw(self, key: WorkerKey) -> None:
        """Take a worker's part out."""
        part = self._parts.pop(key, None)
        for share in part.shares if part else ():
            share.close()

    def forget(self) -> None:
        """In a forked child: the parent's workers are not its own."""
        for key in list(self._parts):
            self.withdraw(key)

    def refresh(self) -> None:
        """Before a collection: what is no sum is over the workers that are there, and of none there is none."""
        parts = list(self._parts.values())
        if parts:
            self.cells.cache_usage.set(max(part.usage for part in parts))
            self.cells.prefix_cache_hit_ratio.set(fmean(part.hit_ratio for part in parts))
        else:
            self.cells.cache_usage.clear()
            self.cells.prefix_cache_hit_ratio.clear()

    def _count(self, part: _Part, stats: SpecDecodeStats, meaning: SpecDecode) -> None:
        for field, counter in self._counters:
            number = getattr(stats, field)
            if number:
                counter.inc(number if meaning == "step" else _growth(part.totals, field, number))


def _growth(totals: dict[str, int], field: str, number: int) -> int:
    """How much a total grew; one that fell began again at zero."""
    before = totals.get(field, 0)
    totals[field] = number
    return number - before if number >= before else number
