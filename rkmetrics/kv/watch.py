"""A table of workers for a terminal, from NATS or by polling; and a worker that is not there, for trying out.

`frame` is text from values. `watch` feeds an aggregator until it is cancelled and hands frames to whoever prints them;
`simulate` publishes through the same publisher as a real worker.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from rkmetrics.kv.aggregator import KvMetricsAggregator, KvTotal, WorkerState
from rkmetrics.kv.base import ForwardPassMetrics, KvStats, WorkerStats
from rkmetrics.kv.publisher import WorkerMetricsPublisher
from rkmetrics.kv.pull import KvMetricsPoller
from rkmetrics.kv.subscriber import KvMetricsSubscriber

if TYPE_CHECKING:
    from rkmetrics.registry import Registry
    from rkmetrics.settings import Secret

__all__ = ["document", "frame", "simulate", "watch"]

FRAME_SECONDS = 0.5
FIRST_SECONDS = 2.0

HEAD = ("worker", "rank", "from", "state", "blocks", "usage", "slots", "waiting", "hits", "age", "missed")
NOTHING = "-"


def frame(states: Iterable[WorkerState], total: KvTotal) -> str:
    """Return the table, by worker and rank, with a line of sums below. What nobody said is a dash."""
    rows = [HEAD, *(_row(state) for state in sorted(states, key=lambda state: state.key)), _sums(total)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEAD))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(state: WorkerState) -> tuple[str, ...]:
    metrics = state.metrics
    worker, cache = (metrics.worker_stats, metrics.kv_stats) if metrics else (None, None)
    return (
        str(state.key.worker_id),
        str(state.key.dp_rank),
        state.source.value,
        "stale" if state.stale else "fresh",
        f"{state.active_blocks}/{cache.kv_total_blocks if cache else NOTHING}",
        _percent(cache.gpu_cache_usage_perc if cache else None),
        f"{worker.request_active_slots}/{worker.request_total_slots}" if worker else NOTHING,
        str(worker.num_requests_waiting) if worker else NOTHING,
        _percent(cache.gpu_prefix_cache_hit_rate if cache else None),
        _age(state.age_seconds),
        str(state.missed),
    )


def _sums(total: KvTotal) -> tuple[str, ...]:
    return (
        f"{total.workers} fresh",
        "",
        "",
        "",
        f"{total.active_blocks}/{_or_nothing(total.total_blocks)}",
        _percent(total.usage),
        f"{_or_nothing(total.active_slots)}/{_or_nothing(total.total_slots)}",
        _or_nothing(total.waiting),
        "",
        "",
        "",
    )


def _or_nothing(number: int | None) -> str:
    return NOTHING if number is None else str(number)


def _percent(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.1%}"


def _age(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 100 else f"{seconds / 60:.0f}m"


def document(states: Iterable[WorkerState], total: KvTotal) -> dict[str, Any]:
    """Return the same as JSON has it."""
    import msgspec

    workers = [
        {
            "worker_id": state.key.worker_id,
            "dp_rank": state.key.dp_rank,
            "source": state.source.value,
            "stale": state.stale,
            "age_seconds": round(state.age_seconds, 3),
            "missed": state.missed,
            "active_blocks": state.active_blocks,
            "data": None if state.metrics is None else msgspec.to_builtins(state.metrics),
        }
        for state in sorted(states, key=lambda state: state.key)
    ]
    return {"workers": workers, "total": total._asdict()}


async def watch(
    registry: Registry,
    show: Callable[[list[WorkerState], KvTotal], object],
    *,
    urls: Sequence[str] = (),
    token: Secret | None = None,
    interval_seconds: float = FRAME_SECONDS,
    once: bool = False,
) -> bool:
    """Show what is known each interval, until cancelled; once: as soon as somebody was heard, or nobody is.

    urls: poll these with the token, and else listen on NATS. Returns whether any worker is known.
    """
    aggregator = KvMetricsAggregator(registry)
    async with AsyncExitStack() as stack:
        if urls:
            await stack.enter_async_context(KvMetricsPoller(urls, aggregator, token=token))
        else:
            await stack.enter_async_context(KvMetricsSubscriber(registry, aggregator))
        if once:
            await _first(aggregator)
        while True:
            states = list(aggregator.workers().values())
            show(states, aggregator.total())
            if once:
                return bool(states)
            await asyncio.sleep(interval_seconds)


async def _first(aggregator: KvMetricsAggregator) -> None:
    """Wait for the first worker, and a moment for the others."""
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    forget = aggregator.on_update(lambda _: loop.call_soon_threadsafe(heard.set))
    try:
        async with asyncio.timeout(FIRST_SECONDS):
            await heard.wait()
            await asyncio.sleep(FIRST_SECONDS / 4)
    except TimeoutError:
        return
    finally:
        forget()


async def simulate(publisher: WorkerMetricsPublisher, *, blocks: int, count: int, interval_seconds: float) -> None:
    """Publish states whose load rises and falls; count: how many, 0 for no end."""
    for state in _states(blocks, count):
        publisher.publish(state)
        await asyncio.sleep(interval_seconds)


def _states(blocks: int, count: int) -> Iterator[ForwardPassMetrics]:
    number = 0
    while not count or number < count:
        usage = 0.5 - 0.5 * math.cos(number / 10)
        active = round(usage * blocks)
        yield ForwardPassMetrics(
            WorkerStats(
                data_parallel_rank=0,
                request_active_slots=round(usage * 64),
                request_total_slots=64,
                num_requests_waiting=max(0, round(usage * 80) - 64),
            ),
            KvStats(
                kv_active_blocks=active,
                kv_total_blocks=blocks,
                gpu_cache_usage_perc=active / blocks,
                gpu_prefix_cache_hit_rate=0.4,
            ),
        )
        number += 1
