"""What this process knows of the workers elsewhere, from whoever brings it: the latest state of each, and their sum.

Subscribers (push) and pollers (pull) call `report` from their own threads; readers come from any. A plain lock guards
what a report reads and then writes; callbacks run outside of it, and so do readers, who copy the table in one step: a
scrape in a signal handler or a forked child meets no lock here (decision 0016).

Nothing is ever taken for dead. A worker that says nothing for its time is stale: it stays, flagged, with the age of
what it last said, until somebody who knows that it left says `forget`. Heard and new are two things: an answer that
says "unchanged" keeps a worker fresh while its state grows old.

A message that carries a part only (active blocks, from 0.8 on) leaves the rest as the last full report said it, with an
age of its own. Sequences are followed for each source by itself, since each counts what it publishes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakSet, finalize, ref

from rkmetrics.catalogue.kv import Freshness, KvAggregation, ReportSource
from rkmetrics.kv.base import ForwardPassMetrics, KvReport, WorkerKey

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["MAX_WORKERS", "KvMetricsAggregator", "KvTotal", "KvUpdates", "WorkerState"]

log = logging.getLogger(__name__)

MAX_WORKERS = 10_000
TURN = 64  # states that one consumer takes before others get their turn


class WorkerState(NamedTuple):
    """One worker as it is known at one moment. Ages are seconds before that moment.

    active_blocks: the newest word of any source, age_seconds old. metrics: of the last full report, metrics_age_seconds
    old; both None where no source sends full ones. heard_seconds: since the last sign of life, also an unchanged one.
    missed: publications that were never seen here. source, sequence, incarnation: of the newest word.
    """

    key: WorkerKey
    active_blocks: int
    age_seconds: float
    metrics: ForwardPassMetrics | None
    metrics_age_seconds: float | None
    active_prefill_tokens: int | None
    heard_seconds: float
    stale: bool
    missed: int
    source: ReportSource
    sequence: int | None
    incarnation: str


class KvTotal(NamedTuple):
    """Sums over workers. full_workers: those of them with full reports, over which all but active_blocks are summed.

    Those sums are None where no worker sent a full report. usage: blocks in use of all blocks, 0 to 1; also None where
    there are no blocks.
    """

    workers: int
    full_workers: int
    active_blocks: int
    total_blocks: int | None
    active_slots: int | None
    total_slots: int | None
    waiting: int | None
    usage: float | None


class _Said(NamedTuple):
    """What a worker said, replaced as a whole. at, metrics_at: when, by our clock. counts: last sequence by source."""

    active_blocks: int
    at: float
    metrics: ForwardPassMetrics | None
    metrics_at: float
    active_prefill_tokens: int | None
    source: ReportSource
    counts: Mapping[ReportSource, tuple[str, int | None]]
    missed: int


class _Entry:
    """One worker of the table."""

    __slots__ = ("heard_at", "said", "stale_after")

    def __init__(self, said: _Said) -> None:
        self.said, self.heard_at, self.stale_after = said, said.at, 0.0

    def state(self, key: WorkerKey, now: float) -> WorkerState:
        said, silent = self.said, max(0.0, now - self.heard_at)
        incarnation, sequence = said.counts[said.source]
        return WorkerState(
            key,
            said.active_blocks,
            max(0.0, now - said.at),
            said.metrics,
            None if said.metrics is None else max(0.0, now - said.metrics_at),
            said.active_prefill_tokens,
            silent,
            silent > self.stale_after,
            said.missed,
            said.source,
            sequence,
            incarnation,
        )


class _Taken(NamedTuple):
    """What a report did to the table. consumers: those that must be woken."""

    entry: _Entry
    changed: bool
    missed: int
    consumers: Sequence[KvUpdates]


class KvMetricsAggregator:
    """The latest state of each worker that was ever reported, and not forgotten.

    registry: gets metrics about it (KvAggregation), fresh at each collection; one aggregator for each registry.
    max_workers: more are refused, counted in `refused`, and logged once. All methods may be called from any thread.
    """

    def __init__(
        self,
        registry: Registry | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_workers: int = MAX_WORKERS,
    ) -> None:
        self.max_workers, self.refused, self.closed = max_workers, 0, False
        self.metrics = registry.bind(KvAggregation) if registry else None
        self._clock, self._lock = clock, threading.Lock()
        self._entries: dict[WorkerKey, _Entry] = {}
        self._full = False
        self._callbacks: tuple[_Callback, ...] = ()
        self._consumers: tuple[ref[KvUpdates], ...] = ()  # weak: a loop that was left by `break` just goes away
        self._waiting: set[KvUpdates] = set()
        self._detach = _refresh_at_collection(self, registry) if registry else _nothing
        _aggregators.add(self)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def report(self, report: KvReport, source: ReportSource, stale_after_seconds: float) -> None:
        """Take what a source says of a worker. stale_after_seconds: of silence, from now on."""
        now = self._clock()
        with self._lock:
            known = self._entries.get(report.key)
            if self.closed:
                return
            full = known is None and len(self._entries) >= self.max_workers
            taken = None if full else self._take(known, report, source, now, stale_after_seconds)
        if known is None:
            self._tell_limit(full=full)
        if taken is not None:
            self._tell(report.key, source, taken, now)

    def _take(
        self, known: _Entry | None, report: KvReport, source: ReportSource, now: float, stale_after_seconds: float
    ) -> _Taken:
        """Put a report into the table."""
        entry, missed, changed = known, 0, True
        if entry is None:
            entry = self._entries[report.key] = _Entry(_first(report, source, now))
        elif _is_repeated(entry.said, report, source):
            changed = False
        else:
            before, entry.said = entry.said.missed, _next(entry.said, report, source, now)
            missed = entry.said.missed - before
        entry.heard_at, entry.stale_after = now, stale_after_seconds
        return _Taken(entry, changed, missed, self._noted(report.key) if changed and self._consumers else ())

    def _tell(self, key: WorkerKey, source: ReportSource, taken: _Taken, now: float) -> None:
        """Count a report, and tell who listens."""
        if self.metrics is not None:
            self.metrics.reports[source].inc()
            if taken.missed:
                self.metrics.missed.inc(taken.missed)
        for consumer in taken.consumers:
            consumer.ring()
        if taken.changed and self._callbacks:
            state = taken.entry.state(key, now)
            for callback in self._callbacks:
                callback(state)

    def heard(self, key: WorkerKey) -> bool:
        """Note that a worker gave a sign of life, and nothing new. False when it is not known."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        entry.heard_at = self._clock()
        return True

    def heard_all(self, keys: Iterable[WorkerKey]) -> bool:
        """The same for several. False when one of them is not known."""
        now, entries, known = self._clock(), self._entries, True
        for key in keys:
            entry = entries.get(key)
            if entry is None:
                known = False
            else:
                entry.heard_at = now
        return known

    def forget(self, worker_id: int, dp_rank: int | None = None) -> bool:
        """Forget a worker that left: one rank of it, or all. False when it was not known."""
        with self._lock:
            if dp_rank is not None:
                return self._entries.pop(WorkerKey(worker_id, dp_rank), None) is not None
            keys = [key for key in self._entries if key.worker_id == worker_id]
            for key in keys:
                del self._entries[key]
            return bool(keys)

    def count_malformed(self, source: ReportSource) -> None:
        """Count a message or an answer that is no state of a worker."""
        if self.metrics is not None:
            self.metrics.malformed[source].inc()

    def _tell_limit(self, *, full: bool) -> None:
        """Count who is refused, and log when that begins and ends."""
        self.refused += full
        was, self._full = self._full, full
        if full and not was:
            log.warning("%d workers are known, which is the limit (max_workers); others are left out", self.max_workers)
        elif was and not full:
            log.info("there is room for more workers again (max_workers=%d)", self.max_workers)

    # --- what is known ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def workers(self) -> Mapping[WorkerKey, WorkerState]:
        """All workers as they are now; a copy."""
        now = self._clock()
        return {key: entry.state(key, now) for key, entry in list(self._entries.items())}

    def worker(self, key: WorkerKey) -> WorkerState | None:
        """One worker as it is now."""
        entry = self._entries.get(key)
        return entry.state(key, self._clock()) if entry else None

    def total(self, *, include_stale: bool = False) -> KvTotal:
        """The sums over all workers that are fresh, or over all."""
        states = [state for state in self.workers().values() if include_stale or not state.stale]
        full = [(state.active_blocks, state.metrics) for state in states if state.metrics is not None]
        active = sum(state.active_blocks for state in states)
        if not full:
            return KvTotal(len(states), 0, active, None, None, None, None, None)
        blocks = sum(metrics.kv_stats.kv_total_blocks for _, metrics in full)
        return KvTotal(
            len(states),
            len(full),
            active,
            blocks,
            sum(metrics.worker_stats.request_active_slots for _, metrics in full),
            sum(metrics.worker_stats.request_total_slots for _, metrics in full),
            sum(metrics.worker_stats.num_requests_waiting for _, metrics in full),
            sum(used for used, _ in full) / blocks if blocks else None,
        )

    # --- who listens --------------------------------------------------------------------------------------------------

    def on_update(self, function: Callable[[WorkerState], object]) -> Callable[[], None]:
        """Call a function with each new state, in the thread that reports it; returns what ends that.

        It holds up that thread, an event loop mostly. What it raises is logged when it begins to.
        """
        callback = _Callback(function)
        with self._lock:
            self._callbacks = (*self._callbacks, callback)

        def unsubscribe() -> None:
            with self._lock:
                self._callbacks = tuple(each for each in self._callbacks if each is not callback)

        return unsubscribe

    def updates(self) -> KvUpdates:
        """Iterate over new states in the running event loop: first all known workers, then whoever has news.

        A slow consumer finds the latest state of each worker, once. Ends when the aggregator or the iterator closes.
        """
        updates = KvUpdates(self)
        with self._lock:
            updates.pending.update(dict.fromkeys(self._entries))
            self._consumers = (*(each for each in self._consumers if each() is not None), ref(updates))
        return updates

    def _noted(self, key: WorkerKey) -> list[KvUpdates]:
        """Tell the iterators; those that must be woken."""
        return [found for each in self._consumers if (found := each()) is not None and found.note(key)]

    def close(self) -> None:
        """Take no more reports, end all iterators, and let go of the registry. What is known stays readable."""
        with self._lock:
            self.closed, self._callbacks = True, ()
            consumers, self._consumers = self._consumers, ()
        self._detach()
        for each in consumers:
            if found := each():
                found.ring()
        if self.metrics is not None:
            for state in Freshness:
                self.metrics.workers[state].clear()
            self.metrics.oldest_age.clear()

    def refresh(self) -> None:
        """Bring the gauges up to date; the registry asks for it at each collection."""
        if self.metrics is None or self.closed:
            return
        states = self.workers().values()
        stale = sum(state.stale for state in states)
        self.metrics.workers[Freshness.STALE].set(stale)
        self.metrics.workers[Freshness.FRESH].set(len(states) - stale)
        if states:
            self.metrics.oldest_age.set(max(state.age_seconds for state in states))
        else:
            self.metrics.oldest_age.clear()

    def __repr__(self) -> str:
        return f"<KvMetricsAggregator: {len(self)} workers{', closed' if self.closed else ''}>"


def _first(report: KvReport, source: ReportSource, now: float) -> _Said:
    at, counts = _at(report, now), {source: (report.incarnation, report.sequence)}
    return _Said(report.active_blocks, at, report.metrics, at, report.active_prefill_tokens, source, counts, 0)


def _next(old: _Said, report: KvReport, source: ReportSource, now: float) -> _Said:
    """What is known with one more report. What a source says later is newer; two are compared by when it was true."""
    at, last = _at(report, now), old.counts.get(source)
    restarted = last is not None and last[0] != report.incarnation
    newer = source is old.source or at >= old.at
    full = report.metrics is not None and (newer or old.metrics is None or at >= old.metrics_at)
    metrics, metrics_at = (report.metrics, at) if full or restarted else (old.metrics, old.metrics_at)
    prefill = report.active_prefill_tokens if newer else None
    return _Said(
        report.active_blocks if newer else old.active_blocks,
        at if newer else old.at,
        metrics,
        metrics_at,
        old.active_prefill_tokens if prefill is None else prefill,
        source if newer else old.source,
        {**old.counts, source: (report.incarnation, report.sequence)},
        old.missed if restarted else old.missed + _gap(last, report.sequence),
    )


def _at(report: KvReport, now: float) -> float:
    return now - max(0.0, report.age_seconds)


def _is_repeated(old: _Said, report: KvReport, source: ReportSource) -> bool:
    """Whether a source says the same publication again, as a document does of a worker while others change."""
    return (
        report.sequence is not None
        and old.counts.get(source) == (report.incarnation, report.sequence)
        and (report.metrics is None or report.metrics == old.metrics)
        and (report.active_blocks == old.active_blocks or source is not old.source)
    )


def _gap(last: tuple[str, int | None] | None, sequence: int | None) -> int:
    """Publications between two sequences. One that fell has begun again: no source changes their order."""
    if last is None or last[1] is None or sequence is None:
        return 0
    return max(0, sequence - last[1] - 1)


class _Callback:
    """A listener, and whether it fails at the moment."""

    def __init__(self, function: Callable[[WorkerState], object]) -> None:
        self._function, self._failing = function, False

    def __call__(self, state: WorkerState) -> None:
        try:
            self._function(state)
        except Exception:
            if not self._failing:
                log.exception("a listener to KV metrics raises: %r", self._function)
            self._failing = True
        else:
            self._failing = False


class KvUpdates(AsyncIterator[WorkerState]):
    """New states of workers, for one event loop; see KvMetricsAggregator.updates.

    pending: workers with news, longest waiting first; the state itself is looked up when it is asked for.
    """

    def __init__(self, aggregator: KvMetricsAggregator) -> None:
        self.pending: dict[WorkerKey, None] = {}
        self._aggregator, self._loop = aggregator, asyncio.get_running_loop()
        self._news, self._ringing, self._closed, self._taken = asyncio.Event(), False, False, 0

    def note(self, key: WorkerKey) -> bool:
        """Remember that a worker has news, under the aggregator's lock. True when somebody must ring."""
        if self._closed:
            return False
        self.pending[key] = None
        ringing, self._ringing = self._ringing, True
        return not ringing

    def ring(self) -> None:
        """Wake the consumer, from any thread."""
        with suppress(RuntimeError):  # its loop is closed, and it with it
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._ringing = False
        self._news.set()

    async def __anext__(self) -> WorkerState:
        self._taken += 1
        if self._taken % TURN == 0:
            await asyncio.sleep(0)
        while not self._closed and not self._aggregator.closed:
            self._news.clear()
            state = self._next()
            if state is not None:
                return state
            await self._wait()
        raise StopAsyncIteration

    def _next(self) -> WorkerState | None:
        aggregator = self._aggregator
        while self.pending:
            with aggregator._lock:
                key = next(iter(self.pending))
                del self.pending[key]
            state = aggregator.worker(key)
            if state is not None:  # else it left meanwhile
                return state
        return None

    async def _wait(self) -> None:
        """Held by the aggregator meanwhile: nobody else may hold the task that waits."""
        self._aggregator._waiting.add(self)
        try:
            await self._news.wait()
        finally:
            self._aggregator._waiting.discard(self)

    async def aclose(self) -> None:
        """End the iteration, also where it waits in another task."""
        self._closed = True
        self.pending.clear()
        self._news.set()


# --- the registry and the process -------------------------------------------------------------------------------------


def _nothing() -> None:
    """There is no registry to let go of."""


def _refresh_at_collection(aggregator: KvMetricsAggregator, registry: Registry) -> Callable[[], object]:
    """Have the gauges refreshed, without the registry holding the aggregator; returns what ends that."""
    found = ref(aggregator)

    def refresh_kv_workers() -> None:
        alive = found()
        if alive is not None:
            alive.refresh()

    registry.add_refresher(refresh_kv_workers)
    detach = finalize(aggregator, registry.remove_refresher, refresh_kv_workers)
    detach.atexit = False
    return detach


_aggregators: WeakSet[KvMetricsAggregator] = WeakSet()


def _renew_locks() -> None:
    """In a forked child nobody is left who would release a lock that some thread held."""
    for aggregator in list(_aggregators):
        aggregator._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
