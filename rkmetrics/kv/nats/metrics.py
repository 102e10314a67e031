"""KV metrics over NATS: what a worker sends, and who listens.

What is sent follows the real workers (observed with releases 0.7.1 and 0.8.1): a message only when active blocks or
waiting requests changed since the last one, what comes within DEBOUNCE_SECONDS as one, nothing at the start, no
heartbeat. One thing more: with each new connection the latest state is sent once, since what was on its way when the
old one broke may be lost, and nobody would hear of it until the next change.

So the latest state of each worker is all that is ever held: an outage costs no memory, and ends with what is true then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rkmetrics.catalogue.kv import KvPublishing, MessageOutcome, ReportSource
from rkmetrics.errors import PayloadError
from rkmetrics.kv.base import KvReport, KvUpdate, WorkerKey
from rkmetrics.kv.nats.thread import Doorbell
from rkmetrics.kv.wire import ENCODERS, decode_metrics, metrics_subject
from rkmetrics.nats_link import listen, publish_all

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from rkmetrics.kv.aggregator import KvMetricsAggregator

__all__ = ["MetricsListener", "NatsMetricsSink"]

log = logging.getLogger("rkmetrics.nats")

DEBOUNCE_SECONDS = 0.001
BATCH = 256
#: How many workers that ended are kept for their last state while NATS is away.
ENDED_WORKERS = 1_000

#: What was sent of a worker: active blocks, waiting requests.
_Shown = tuple[int, int]


class NatsMetricsSink:
    """Sends the states of local workers. A sink for any thread, and a rider of a link thread."""

    def __init__(self, namespace: str, wire: str, cells: KvPublishing, ensure: Callable[[], None]) -> None:
        """ensure: called with each offer; it starts the thread where there is none."""
        self._subject, self._encode, self._ensure = metrics_subject(namespace), ENCODERS[wire], ensure
        self._count = {outcome: cells.messages[outcome] for outcome in MessageOutcome}
        self._coalesced = self._count[MessageOutcome.COALESCED]
        self._latest: dict[WorkerKey, KvUpdate] = {}
        self._pending: dict[WorkerKey, KvUpdate] = {}
        self._sent: dict[WorkerKey, _Shown] = {}
        self._numbers: dict[int, int] = {}  # of each worker's next message, over all of its ranks
        self._bell = Doorbell()
        self._too_large = False

    # --- as a sink ----------------------------------------------------------------------------------------------------

    def offer(self, update: KvUpdate) -> None:
        """Take the latest state of a worker. Two dictionary stores, and at most one wake-up for each debounce."""
        key, pending = update.key, self._pending
        self._latest[key] = update
        if key in pending:
            self._coalesced.inc()
        pending[key] = update
        if not self._bell.ringing:
            self._ensure()
            self._bell.ring()

    def withdraw(self, key: WorkerKey) -> None:
        """Forget a worker, after its last state has gone out if it can."""
        self._latest.pop(key, None)
        if len(self._pending) - len(self._latest) > ENDED_WORKERS and self._pending.pop(key, None) is not None:
            self._count[MessageOutcome.DROPPED].inc()

    # --- as a rider ---------------------------------------------------------------------------------------------------

    async def run(self, nc: Client) -> None:
        """Send what changes while the connection lasts."""
        self._sent.clear()
        for key, update in list(self._latest.items()):
            self._pending.setdefault(key, update)
        while True:
            await self._flush(nc)
            await self._bell.wait()
            await asyncio.sleep(DEBOUNCE_SECONDS)

    def waits(self) -> bool:
        """Whether there is something to send."""
        return bool(self._pending)

    async def drain(self, nc: Client) -> None:
        """Send what waits."""
        await self._flush(nc)

    def forget(self) -> None:
        """In a forked child: its workers are others, or say so themselves."""
        self._latest, self._pending = {}, {}
        self._bell = Doorbell()

    async def _flush(self, nc: Client) -> None:
        while batch := self._take(nc.max_payload):
            try:
                await publish_all(nc, self._subject, [payload for _, _, payload in batch])
            except BaseException:
                for update, _, _ in batch:
                    self._pending.setdefault(update.key, update)  # the next connection sends it, or what is newer
                raise
            for update, shown, _ in batch:
                self._sent[update.key] = shown
            self._count[MessageOutcome.SENT].inc(len(batch))
        self._tidy()

    def _take(self, limit: int) -> list[tuple[KvUpdate, _Shown, bytes]]:
        """Take what waits and is news, up to a batch, as messages."""
        pending, sent, numbers, encode = self._pending, self._sent, self._numbers, self._encode
        now = time.time_ns() // 1_000_000
        batch: list[tuple[KvUpdate, _Shown, bytes]] = []
        while pending and len(batch) < BATCH:
            key, update = pending.popitem()  # whole: an offer from another thread is before it or after it
            shown = update.metrics.kv_stats.kv_active_blocks, update.metrics.worker_stats.num_requests_waiting
            if sent.get(key) == shown:
                self._count[MessageOutcome.UNCHANGED].inc()
                continue
            worker_id = key[0]
            number = numbers.get(worker_id, 0)
            payload = encode(update, number, now)
            if len(payload) <= limit:
                numbers[worker_id] = number + 1
                batch.append((update, shown, payload))
            else:
                self._drop(len(payload), limit)
        return batch

    def _tidy(self) -> None:
        """Workers that ended leave nothing behind."""
        if len(self._sent) > len(self._latest):
            self._sent = {key: shown for key, shown in self._sent.items() if key in self._latest}
            living = {key.worker_id for key in self._sent}
            self._numbers = {worker_id: number for worker_id, number in self._numbers.items() if worker_id in living}

    def _drop(self, size: int, limit: int) -> None:
        self._count[MessageOutcome.DROPPED].inc()
        if not self._too_large:
            self._too_large = True
            log.warning(
                "NATS: KV metrics of %d bytes are not sent: the server takes %d (max_payload); this is said once",
                size,
                limit,
            )


class MetricsListener:
    """Hears the workers of a namespace, and tells an aggregator. A rider of a link."""

    def __init__(
        self,
        namespace: str,
        aggregator: KvMetricsAggregator,
        *,
        stale_after_seconds: float,
        accept: Callable[[KvReport], bool] | None = None,
    ) -> None:
        self._subject, self._aggregator, self._accept = metrics_subject(namespace), aggregator, accept
        self._stale_after_seconds = stale_after_seconds
        self._numbering = _Numbering()
        self._said = False

    async def run(self, nc: Client) -> None:
        """Listen while the connection lasts."""
        await listen(nc, self._subject, self._hear)
        await asyncio.Event().wait()

    async def drain(self, nc: Client) -> None:
        """Nothing of ours waits."""

    def waits(self) -> bool:
        """Never."""
        return False

    async def _hear(self, message: Msg) -> None:
        try:
            report = decode_metrics(message.data)
        except PayloadError as error:
            self._pass_over(error)
            return
        if self._accept is None or self._accept(report):
            self._aggregator.report(self._numbering.own(report), ReportSource.PUSH, self._stale_after_seconds)

    def _pass_over(self, error: PayloadError) -> None:
        if self._aggregator.metrics is not None:
            self._aggregator.metrics.malformed[ReportSource.PUSH].inc()
        if not self._said:
            self._said = True
            log.warning("NATS: %s on %s; it is passed over, and others like it without a word", error, self._subject)


class _Numbering:
    """Numbers for each rank, made of those that a publisher counts over all of its ranks (the envelopes of 0.9).

    A gap belongs to the rank that is heard after it: whose the missing ones were, nobody can tell.
    """

    LIMIT = 20_000

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}  # publisher: its last number, and how often it began again
        self._own: dict[WorkerKey, int] = {}

    def own(self, report: KvReport) -> KvReport:
        """Return the report with a number that only its rank counts."""
        number = report.sequence
        if number is None:
            return report
        if len(self._last) > self.LIMIT or len(self._own) > self.LIMIT:  # as after a restart here
            self._last, self._own = {}, {}
        last, starts = self._last.get(report.incarnation, (number - 1, 0))
        starts += number <= last
        missing = max(number - last - 1, 0)
        self._last[report.incarnation] = number, starts
        self._own[report.key] = own = self._own.get(report.key, 0) + 1 + missing
        return report._replace(sequence=own, incarnation=f"{report.incarnation}.{starts}")
