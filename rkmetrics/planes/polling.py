"""Asks workers how busy they are, over whichever plane is on: their endpoint `load_metrics`, again and again.

    async with PlanePoller(client, source, EndpointName("dynamo", "backend", "load_metrics"), aggregator): ...

It is the sibling of rk.kv.KvMetricsPoller, which reads the page at /kv_metrics over HTTP: a router that can call its
workers needs no second port of them. A report is of the instance that was asked, so ids are those of the router's
instances, whatever a worker calls itself. A worker that fails is asked less and less often, its last state stays with
its age, and one that its source tells of no more is forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, Self

from rkmetrics.catalogue.kv import KvAggregation, PollOutcome, ReportSource
from rkmetrics.errors import (
    RpcClosedError,
    RpcError,
    RpcProtocolError,
    RpcTimeoutError,
    RpcUnreachableError,
)
from rkmetrics.kv.base import ForwardPassMetrics, KvReport, WorkerKey
from rkmetrics.planes.base import EndpointName, Instance, InstanceSource
from rkmetrics.planes.instances import Speaking, keep_following
from rkmetrics.retry import StateLog, jittered

if TYPE_CHECKING:
    from rkmetrics.planes.base import RequestPlaneClient

__all__ = ["PlanePoller", "Reports"]

log = logging.getLogger("rkmetrics.planes")

STALE_INTERVALS = 3
BACKOFF_LIMIT_SECONDS = 5.0
BACKOFF_DOUBLINGS = 10

#: The others say that the worker has nothing to tell, or does not serve it.
OUTCOMES: Mapping[type[RpcError], PollOutcome] = {
    RpcUnreachableError: PollOutcome.UNREACHABLE,
    RpcClosedError: PollOutcome.UNREACHABLE,
    RpcTimeoutError: PollOutcome.TIMEOUT,
    RpcProtocolError: PollOutcome.MALFORMED,
}


class Reports(Protocol):
    """Who takes reports; rk.kv.KvMetricsAggregator does."""

    metrics: KvAggregation | None

    def report(self, report: KvReport, source: ReportSource, stale_after_seconds: float) -> None: ...
    def count_malformed(self, source: ReportSource) -> None: ...
    def forget(self, worker_id: int, dp_rank: int | None = None) -> bool: ...


class PlanePoller:
    """Polls the instances of an endpoint into an aggregator, while its `async with` block runs.

    stale_after_seconds: of silence; by default three intervals, or as long as one poll may take.
    """

    def __init__(
        self,
        client: RequestPlaneClient,
        source: InstanceSource,
        endpoint: EndpointName,
        aggregator: Reports,
        *,
        interval_seconds: float = 0.1,
        timeout_seconds: float = 1.0,
        stale_after_seconds: float | None = None,
    ) -> None:
        if not (interval_seconds > 0 and timeout_seconds > 0):
            raise ValueError(f"{interval_seconds=!r}, {timeout_seconds=!r}: expected more than 0")
        self._client, self._source, self._endpoint, self._aggregator = client, source, endpoint, aggregator
        self._interval_seconds, self._timeout_seconds = interval_seconds, timeout_seconds
        told = stale_after_seconds
        self._stale_after_seconds = max(STALE_INTERVALS * interval_seconds, timeout_seconds) if told is None else told
        self._speaking = Speaking(client.mode)
        self._polls: dict[Instance, asyncio.Task[None]] = {}
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._following is not None:
            raise RuntimeError("this poller runs already")
        follow = keep_following(self._source, self._endpoint, self._hear)
        self._following = asyncio.create_task(follow, name=f"rkmetrics instances of {self._endpoint}")
        return self

    async def __aexit__(self, *exception: object) -> None:
        following, self._following = self._following, None
        ending = self._end(list(self._polls))
        if following is not None:
            following.cancel()
            ending.append(following)
        await asyncio.gather(*ending, return_exceptions=True)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Those that are polled."""
        return tuple(self._polls)

    def _hear(self, instances: tuple[Instance, ...]) -> None:
        """The source tells all there are."""
        now = dict.fromkeys(self._speaking(instances))
        self._end([each for each in self._polls if each not in now])
        for instance in now:
            if instance not in self._polls:
                self._polls[instance] = asyncio.create_task(self._keep(instance), name=f"rkmetrics poll {instance}")

    def _end(self, gone: Iterable[Instance]) -> list[asyncio.Task[None]]:
        """Poll them no more, and forget who is not polled elsewhere."""
        ending = [(each, self._polls.pop(each)) for each in gone]
        stay = {instance.instance_id for instance in self._polls}
        for instance, task in ending:
            task.cancel()
            if instance.instance_id not in stay:
                self._aggregator.forget(instance.instance_id)
        return [task for _, task in ending]

    async def _keep(self, instance: Instance) -> None:
        """Poll an instance until it is told of no more."""
        said, failures, where = StateLog(log), 0, instance.transport[1]
        outcome, detail = PollOutcome.OK, ""
        await asyncio.sleep(self._interval_seconds - jittered(self._interval_seconds, 1.0))  # not all at once
        while True:
            try:
                outcome, detail = await self._poll(instance)
            except Exception as error:
                log.exception("polling %s failed", where)
                outcome, detail = PollOutcome.REFUSED, repr(error)
            failures = 0 if outcome is PollOutcome.OK else failures + 1
            if failures:
                told = "polling %s: %s: %s; its last state stays, and tries go on"
                said.note(outcome.value, logging.WARNING, told, where, outcome, detail)
            else:
                said.note(outcome.value, logging.DEBUG, "polling %s works", where)
            await asyncio.sleep(self._pause(failures))

    def _pause(self, failures: int) -> float:
        if not failures:
            return jittered(self._interval_seconds)
        longest = min(BACKOFF_LIMIT_SECONDS, self._interval_seconds * 2.0 ** min(failures, BACKOFF_DOUBLINGS))
        return max(self._interval_seconds, jittered(longest, 0.5))

    async def _poll(self, instance: Instance) -> tuple[PollOutcome, str]:
        began = time.perf_counter()
        try:
            response = await self._client.call(
                instance, None, timeout_seconds=self._timeout_seconds, type=ForwardPassMetrics
            )
            metrics = await response.one()
            if not isinstance(metrics, ForwardPassMetrics):  # null, which says nothing of any type
                raise RpcProtocolError(str(self._endpoint), "null is no state of a worker")
        except RpcError as error:
            outcome = OUTCOMES.get(type(error), PollOutcome.REFUSED)
            if outcome is PollOutcome.MALFORMED:
                self._aggregator.count_malformed(ReportSource.PULL)
            self._count(outcome)
            return outcome, error.reason
        self._count(PollOutcome.OK, time.perf_counter() - began)
        key = WorkerKey(instance.instance_id, metrics.worker_stats.data_parallel_rank or 0)
        report = KvReport(key, metrics.kv_stats.kv_active_blocks, metrics)
        self._aggregator.report(report, ReportSource.PULL, self._stale_after_seconds)
        return PollOutcome.OK, ""

    def _count(self, outcome: PollOutcome, seconds: float | None = None) -> None:
        metrics = self._aggregator.metrics
        if metrics is not None:
            metrics.polls[outcome].inc()
            if seconds is not None:
                metrics.poll_duration.observe(seconds)
