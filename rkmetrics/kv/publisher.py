"""What an LLM worker holds: a publisher of its state, and one of its KV cache events.

    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llama-decode", worker_id=7)
    publisher.publish(rk.kv.ForwardPassMetrics(rk.kv.WorkerStats(...), rk.kv.KvStats(...)))

A call hands one value to all who want it, and waits for none: gauges in each mode, the latest value for pull in each
mode, NATS where the settings say so (plane.py). So http mode takes NATS away without a change in the worker.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Self

from rkmetrics.errors import KvValueError
from rkmetrics.kv.base import (
    U64,
    ForwardPassMetrics,
    KvUpdate,
    MetricsSink,
    WorkerKey,
    checked,
    subject_token,
)
from rkmetrics.kv.events import Cleared, KvEvent, Removed, RouterEvent, stored
from rkmetrics.kv.gauges import KindGauges, SpecDecode
from rkmetrics.kv.hashing import block_hashes
from rkmetrics.kv.plane import KvPlane

if TYPE_CHECKING:
    from rkmetrics.kv.nats.service import ServiceEndpoint
    from rkmetrics.kv.plane import EventSink
    from rkmetrics.registry import Registry

__all__ = ["KvEventPublisher", "WorkerMetricsPublisher"]

LOAD_METRICS = "load_metrics"
QUEUE_EVENTS = 10_000
U32 = (1 << 32) - 1


def _worker_id(plane: KvPlane, worker_id: int | None) -> int:
    if worker_id is None:
        return plane.worker_id
    if isinstance(worker_id, bool) or not isinstance(worker_id, int) or not 0 <= worker_id <= U64:
        raise KvValueError("worker_id", worker_id, "a whole number from 0 to 2**64-1, the worker's instance id")
    return worker_id


def _dp_rank(rank: int) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= U32:
        raise KvValueError("dp_rank", rank, "a whole number from 0 to 2**32-1")
    return rank


class _Rank(NamedTuple):
    """One rank of a worker, and the numbers of its publications."""

    key: WorkerKey
    numbers: Iterator[int]


class WorkerMetricsPublisher:
    """Publishes the state of one worker. Close it when the worker ends, or use it as a context manager.

    actor_name: the kind of worker, which labels its metrics. worker_id: its instance id (u64); by default that of
    this process, which suits one worker. dp_rank: for metrics that name no data_parallel_rank. component: as in Dynamo.
    spec_decode: whether SpecDecodeStats count one step ("step", as Dynamo's workers do) or all steps so far ("total").
    Raises KvValueError for what cannot be used, MissingExtraError where NATS is wanted and its client not installed.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        actor_name: str,
        worker_id: int | None = None,
        dp_rank: int = 0,
        component: str = "backend",
        spec_decode: SpecDecode = "step",
    ) -> None:
        if spec_decode not in ("step", "total"):
            raise KvValueError("spec_decode", spec_decode, "'step' or 'total'")
        plane = KvPlane.of(registry)
        self.worker_id, self.dp_rank = _worker_id(plane, worker_id), _dp_rank(dp_rank)
        self._component = subject_token(component, "component")
        self._plane, self._kind = plane, plane.kind(actor_name)
        self._spec_decode: SpecDecode = spec_decode
        self._ranks: dict[int, _Rank] = {}
        push = plane.metrics_sink(self.worker_id)
        self._sinks: tuple[MetricsSink, ...] = (plane.latest, *([push] if push else []))
        latest = self._latest = [b""]  # not by way of `self`, which nobody but its owner keeps
        endpoint = plane.service_endpoint(self._component, LOAD_METRICS, self.worker_id, lambda: latest[0] or None)
        self._end = weakref.finalize(self, _end, plane, self._kind, self._ranks, endpoint)
        self._end.atexit = False

    def publish(self, metrics: ForwardPassMetrics) -> None:
        """Say how the worker is now. From any thread; waits for nobody. After `close()` nobody hears of it.

        Raises KvValueError, counted in rkmetrics_kv_publish_total{outcome="error"}, for metrics that cannot be, and for
        a worker and rank that another publisher of this registry has.
        """
        if self._is_over():
            return
        try:
            metrics, data = checked(metrics)
            rank = metrics.worker_stats.data_parallel_rank
            rank = self.dp_rank if rank is None else rank
            found = self._ranks.get(rank) or self._claimed(rank)
        except KvValueError:
            self._kind.failed.inc()
            raise
        update = KvUpdate(found.key, metrics, data, next(found.numbers))
        self._latest[0] = data
        self._kind.offer(update, self._spec_decode)
        for sink in self._sinks:
            sink.offer(update)
        if self._is_over():  # by now, in another thread
            self._plane.withdraw(found.key, self._kind)

    def _claimed(self, rank: int) -> _Rank:
        key = WorkerKey(self.worker_id, rank)
        self._plane.claim(key, self._ranks)
        return self._ranks.setdefault(rank, _Rank(key, count(1)))

    def _is_over(self) -> bool:
        return not self._end.alive

    def count_prefix_cache(self, queries: int, hits: int) -> None:
        """Count tokens that were looked up in the prefix cache, and those of them that were found there.

        Raises KvValueError unless 0 <= hits <= queries.
        """
        if not 0 <= hits <= queries:
            raise KvValueError("hits", hits, f"0 to the number of queries ({queries!r})")
        self._kind.cells.prefix_cache_queries.inc(queries)
        self._kind.cells.prefix_cache_hits.inc(hits)

    def close(self) -> None:
        """The worker ends: its gauges fall, and no poller hears of it again. What waits for NATS is still sent."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<WorkerMetricsPublisher worker_id={self.worker_id} dp_rank={self.dp_rank}>"


def _end(plane: KvPlane, kind: KindGauges, ranks: dict[int, _Rank], endpoint: ServiceEndpoint | None) -> None:
    """Take a worker's states out of all that shows them; also when its publisher is collected without an end."""
    if endpoint is not None:
        endpoint.remove()
    for rank in list(ranks.values()):
        plane.withdraw(rank.key, kind)


class KvEventPublisher:
    """Publishes what happens in the KV cache of one worker, for routers. Close it when the worker ends.

    block_size: tokens of one block. local_indexer: without a stream, as `enable_local_indexer` of Dynamo 0.8 and later.
    queue_events: how many wait while NATS is away; docs/kv.md says what happens past that.
    Raises as WorkerMetricsPublisher does.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        block_size: int,
        worker_id: int | None = None,
        dp_rank: int = 0,
        component: str = "backend",
        local_indexer: bool = False,
        queue_events: int = QUEUE_EVENTS,
    ) -> None:
        plane = KvPlane.of(registry)
        if local_indexer and plane.settings.wire == "0.7":
            raise KvValueError("local_indexer", True, "False with DYN_WIRE=0.7, which has no such form")
        if not isinstance(block_size, int) or block_size < 1:
            raise KvValueError("block_size", block_size, "1 or more, the tokens of one block")
        self.worker_id, self.dp_rank, self.block_size = _worker_id(plane, worker_id), _dp_rank(dp_rank), block_size
        if plane.without_nats is None:
            block_hashes((), block_size)  # raises here, and not with the first event, where the extra is missing
        if queue_events < 2:
            raise KvValueError("queue_events", queue_events, "2 or more")
        self._event_ids = count()
        self._sink: EventSink = plane.event_sink(
            self.worker_id,
            subject_token(component, "component"),
            local_indexer=local_indexer,
            queue_events=queue_events,
        )
        self._forgotten = weakref.finalize(self, self._sink.retire)
        self._forgotten.atexit = False  # what waits then is the link's to send

    def publish_stored(
        self,
        token_ids: Sequence[int],
        block_hashes: Sequence[int],
        *,
        parent_hash: int | None = None,
        event_id: int | None = None,
    ) -> None:
        """Blocks were computed and are kept: the tokens of all of them, and the engine's hash of each (i64 or u64).

        parent_hash: of the block before the first of these; None at the beginning of a sequence. event_id: the
        engine's, or counted here. Raises KvValueError where tokens and hashes do not fit, MissingExtraError without
        the extra `dynamo`, which hashes the tokens.
        """
        self._offer(
            event_id,
            lambda event_id: stored(
                token_ids,
                block_hashes,
                self.block_size,
                parent_hash=parent_hash,
                event_id=event_id,
                dp_rank=self.dp_rank,
            ),
        )

    def publish_removed(self, block_hashes: Iterable[int], *, event_id: int | None = None) -> None:
        """Blocks are gone."""
        removed = Removed(tuple(block_hashes))
        self._offer(event_id, lambda event_id: KvEvent(event_id, removed, self.dp_rank))

    def publish_cleared(self, *, event_id: int | None = None) -> None:
        """All blocks of the worker are gone."""
        self._offer(event_id, lambda event_id: KvEvent(event_id, Cleared(), self.dp_rank))

    def _offer(self, event_id: int | None, make: Callable[[int], KvEvent]) -> None:
        event_id = next(self._event_ids) if event_id is None else event_id
        self._sink.offer(lambda: RouterEvent(self.worker_id, make(event_id)))

    def close(self) -> None:
        """Send what waits, for three seconds at most."""
        if self._forgotten.detach():
            self._sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<KvEventPublisher worker_id={self.worker_id} dp_rank={self.dp_rank} block_size={self.block_size}>"
