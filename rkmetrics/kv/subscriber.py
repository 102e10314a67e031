"""Hears what workers publish over NATS, in the event loop of who listens.

    async with rk.kv.KvMetricsSubscriber(registry, aggregator):
        ...

Each connection is the listener's own, made again when lost. In a mode without NATS nothing is connected, one DEBUG line
says so, and the aggregator is fed by a KvMetricsPoller beside it; the code stays the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from rkmetrics.kv.base import KvReport
from rkmetrics.kv.plane import NO_LISTENING, KvPlane

if TYPE_CHECKING:
    from rkmetrics.kv.aggregator import KvMetricsAggregator
    from rkmetrics.nats_link import Link, Rider
    from rkmetrics.registry import Registry

__all__ = ["KvMetricsSubscriber", "Riding"]

#: A worker that is idle publishes nothing, so that silence says little; who must know whether it lives asks discovery.
STALE_AFTER_SECONDS = 60.0
STOP_SECONDS = 2.0


class Riding:
    """A link and its riders, from here to `end()`."""

    def __init__(self, link: Link, *riders: Rider) -> None:
        for rider in riders:
            link.add(rider)
        self._link = link
        self._task = asyncio.create_task(link.run(), name="rkmetrics NATS link")

    async def end(self) -> None:
        """Leave NATS."""
        self._link.stop(STOP_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS * 2):
                await asyncio.shield(self._task)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class KvMetricsSubscriber:
    """Feeds an aggregator with what the workers of a namespace publish. An asynchronous context manager.

    worker_ids: only these workers; None for all of them. stale_after_seconds: when a silent worker counts as stale.
    Raises MissingExtraError on entering, where NATS is used and its client is not installed.
    """

    def __init__(
        self,
        registry: Registry,
        aggregator: KvMetricsAggregator,
        *,
        worker_ids: Collection[int] | None = None,
        stale_after_seconds: float = STALE_AFTER_SECONDS,
    ) -> None:
        self._plane, self._aggregator = KvPlane.of(registry), aggregator
        self._wanted = None if worker_ids is None else frozenset(worker_ids)
        self._stale_after_seconds = stale_after_seconds
        self._riding: Riding | None = None

    async def __aenter__(self) -> Self:
        plane = self._plane
        if plane.without_nats is not None:
            plane.skip(NO_LISTENING, plane.without_nats)
            return self
        link = plane.link("subscriber", "KV metrics over NATS")
        from rkmetrics.kv.nats.metrics import MetricsListener

        listener = MetricsListener(
            plane.settings.namespace,
            self._aggregator,
            stale_after_seconds=self._stale_after_seconds,
            accept=None if self._wanted is None else self._accept,
        )
        self._riding = Riding(link, listener)
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._riding is not None:
            await self._riding.end()
            self._riding = None

    def _accept(self, report: KvReport) -> bool:
        return self._wanted is None or report.key.worker_id in self._wanted
