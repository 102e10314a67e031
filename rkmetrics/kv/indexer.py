"""Which worker holds which blocks, kept by the workers' events: what a KV-aware router asks, and its background task.

    async with rk.kv.KvIndexer(registry, block_size=16, instances=live_workers) as indexer:
        await indexer.caught_up()
        scores = indexer.find_matches(token_ids)       # {WorkerKey: blocks of the prefix that it holds}

Over NATS the index is built from the stream and follows it. In a mode without NATS only the instances are watched; then
the index stays empty, and a router goes by load.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Self

from rkmetrics.catalogue.kv import KvIndexing
from rkmetrics.kv.base import WorkerKey, subject_token
from rkmetrics.kv.index import MAX_BLOCKS, KvIndex
from rkmetrics.kv.plane import NO_ROUTER_TASK, KvPlane
from rkmetrics.kv.subscriber import Riding

if TYPE_CHECKING:
    from rkmetrics.kv.nats.reader import EventReader
    from rkmetrics.registry import Registry

__all__ = ["KvIndexer"]

log = logging.getLogger("rkmetrics.kv")

WATCH_SECONDS = 1.0


class KvIndexer:
    """An index that follows the workers of a component. An asynchronous context manager.

    instances: the ids of the workers that live, asked for each second; the blocks of others leave the index. Without it
    call `worker_left(id)`. Raises MissingExtraError on entering, where NATS is used and its client is not installed.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        block_size: int,
        component: str = "backend",
        instances: Callable[[], Collection[int]] | None = None,
        max_blocks: int = MAX_BLOCKS,
    ) -> None:
        self._plane, self._component = KvPlane.of(registry), subject_token(component, "component")
        self.block_size, self._instances = block_size, instances
        self.index = KvIndex(registry=registry, max_blocks=max_blocks)
        self._riding: Riding | None = None
        self._reader: EventReader | None = None
        self._watching: asyncio.Task[None] | None = None
        self._resyncs = registry.bind(KvIndexing).resyncs

    async def __aenter__(self) -> Self:
        plane = self._plane
        if plane.without_nats is not None:
            plane.skip(NO_ROUTER_TASK, plane.without_nats)
        else:
            link = plane.link("indexer", "KV events over NATS")
            from rkmetrics.kv.nats.reader import EventReader

            self._reader = EventReader(plane.settings.namespace, self._component, self.index.receive, self._reset)
            self._riding = Riding(link, self._reader)
        if self._instances is not None:
            self._watching = asyncio.create_task(self._watch(self._instances), name="rkmetrics KV instances")
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._riding is not None:
            await self._riding.end()
            self._riding = None

    # --- what a router asks -------------------------------------------------------------------------------------------

    def find_matches(self, token_ids: Sequence[int]) -> dict[WorkerKey, int]:
        """Return how many blocks of the prompt's prefix each worker holds; who holds none is not in it."""
        return self.index.find_matches_for_tokens(token_ids, self.block_size)

    async def caught_up(self) -> None:
        """Return when the index is as new as the stream; at once where there is none."""
        if self._reader is not None:
            await self._reader.caught_up.wait()

    def worker_left(self, worker_id: int) -> None:
        """Take all blocks of a worker out."""
        self.index.remove_worker(worker_id)

    # --- events and instances -----------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self.index.clear()
        self._resyncs.inc()

    async def _watch(self, instances: Callable[[], Collection[int]]) -> None:
        failing = False
        while True:
            try:
                self.index.retain(instances())
                failing = False
            except Exception:
                if not failing:
                    log.exception("the instances of %s cannot be had; none is taken out", self._component)
                failing = True
            await asyncio.sleep(WATCH_SECONDS)
