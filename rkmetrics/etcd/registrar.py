"""Keeps keys in etcd for as long as a process lives: one lease, renewed each third of its time.

    grant ── create keys ── renew, renew, renew + look after the keys ── ... ── revoke
      ↑                        └── lease lost: grant it again ──┘

A lease that ended is granted again under the same id, so that keys with the id in their name (Dynamo's) stay one key.
Keys that somebody deleted are found missing within the lease's time and created again. A key of another process is
left alone, and taken when that one ends; only at the start it is taken over where it says the same as ours, as the
other one is then our own former life.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rkmetrics.catalogue.etcd import StepOutcome
from rkmetrics.errors import EtcdError, EtcdUnavailableError, LeaseLostError
from rkmetrics.retry import Backoff, StateLog, jittered

if TYPE_CHECKING:
    from rkmetrics.catalogue.etcd import Etcd as EtcdCells
    from rkmetrics.etcd.client import Etcd

__all__ = ["TTL_SECONDS", "EtcdRegistrar"]

log = logging.getLogger("rkmetrics.etcd")

TTL_SECONDS = 10
RENEWALS = 3  # in the time of a lease; the keys are looked after with the last of them
BACKOFF_FIRST_SECONDS, BACKOFF_CAP_SECONDS = 0.1, 2.0

Entries = Callable[[int], Mapping[str, bytes]]


class EtcdRegistrar:
    """Keeps keys under one lease while `run` runs.

    entries: from the lease's id to keys and values. lease: the id to ask for, by default one of etcd's choice. listed:
    whether all of them were there when last looked at. To be used from one event loop; metrics may be None.
    """

    def __init__(
        self,
        client: Etcd,
        entries: Entries,
        *,
        ttl_seconds: int = TTL_SECONDS,
        metrics: EtcdCells | None = None,
        lease: int = 0,
    ) -> None:
        if ttl_seconds < 1:
            raise ValueError(f"ttl_seconds={ttl_seconds!r}: expected 1 or more")
        self._client, self._entries, self._ttl = client, entries, ttl_seconds
        self._metrics, self._wanted = metrics, lease
        self._log = StateLog(log)
        self._new = True  # nothing of ours was ever there
        self._renewals = 0  # since the keys were looked after
        self.lease = 0
        self.listed = False

    @property
    def shown(self) -> str:
        """Where it keeps them, for logs."""
        return f"etcd at {self._client.shown}"

    async def run(self) -> None:
        """Keep the keys, until cancelled. Whatever etcd does is counted, logged and tried again."""
        backoff = Backoff(BACKOFF_FIRST_SECONDS, min(BACKOFF_CAP_SECONDS, self._ttl / RENEWALS))
        with _Shares(self._metrics) as shares:
            while True:
                outcome = await self._step()
                self._count(outcome)
                shares.set(len(self._entries(self.lease)), listed=self.listed)
                if outcome in (StepOutcome.OK, StepOutcome.CONFLICT):
                    backoff.reset()
                    await asyncio.sleep(jittered(self._ttl / RENEWALS))
                else:
                    await asyncio.sleep(backoff.next())

    async def withdraw(self) -> bool:
        """End the lease, and the keys with it, after `run` has ended. False where etcd does not hear of it: the keys
        end with the lease's time then."""
        if not self.lease:
            return True
        try:
            await self._client.revoke(self.lease)
        except EtcdError as error:
            log.warning("etcd: the keys stay for up to %d s: %s", self._ttl, error)
            return False
        self.lease, self.listed, self._new = 0, False, True
        return True

    # --- one round ----------------------------------------------------------------------------------------------------

    async def _step(self) -> StepOutcome:
        try:
            await self._renew()
            if self._renewals == 0 or self._renewals >= RENEWALS or not self.listed:
                await self._look_after_keys()
        except EtcdUnavailableError as error:
            self.listed = False
            return self._failed(StepOutcome.UNAVAILABLE, error)
        except EtcdError as error:
            self.listed = False
            return self._failed(StepOutcome.REFUSED, error)
        if not self.listed:
            return StepOutcome.CONFLICT
        self._log.note("listed", logging.INFO, "etcd: listed at %s under lease %x", self._client.shown, self.lease)
        return StepOutcome.OK

    async def _renew(self) -> None:
        if self.lease:
            try:
                await self._client.keep_alive(self.lease)
                self._renewals += 1
                return
            except LeaseLostError:
                self.listed = False
                self._log.note("lost", logging.WARNING, "etcd: lease %x was lost; registering again", self.lease)
                if self._metrics is not None:
                    self._metrics.leases_lost.inc()
        self.lease = await self._client.grant(self._ttl, self.lease or self._wanted)
        self._renewals = 0

    async def _look_after_keys(self) -> None:
        entries = self._entries(self.lease)
        there = [await self._look_after(key, value) for key, value in entries.items()]
        self.listed, self._renewals = all(there), 0
        if self.listed:
            self._new = False

    async def _look_after(self, key: str, value: bytes) -> bool:
        """Create the key if it is not there. False where it is another's."""
        name, over = key.encode(), 0
        for _ in range(3):  # it may change between a look and a write
            found = await self._client.create(name, value, self.lease, over=over)
            if found is None or (found.lease == self.lease and found.value == value):
                return True
            if found.created and found.lease != self.lease and not (self._new and found.value == value):
                self._log.note(
                    f"held {key}", logging.WARNING, "etcd: %r is held by another process (lease %x)", key, found.lease
                )
                return False
            over = found.created
        return False

    def _failed(self, outcome: StepOutcome, error: EtcdError) -> StepOutcome:
        told = "etcd: not renewed (%s: %s); trying again every %g s at most, and nothing waits for it"
        self._log.note(f"down {outcome}", logging.WARNING, told, outcome.value, error, BACKOFF_CAP_SECONDS)
        return outcome

    def _count(self, outcome: StepOutcome) -> None:
        if self._metrics is not None:
            self._metrics.steps[outcome].inc()


class _Shares:
    """One registrar's part of the gauges, while it runs."""

    def __init__(self, metrics: EtcdCells | None) -> None:
        self._shares = [] if metrics is None else [metrics.keys.share(), metrics.keys_wanted.share()]

    def set(self, wanted: int, *, listed: bool) -> None:
        for share, value in zip(self._shares, (wanted if listed else 0, wanted), strict=False):
            share.set(value)

    def __enter__(self) -> _Shares:
        return self

    def __exit__(self, *_: object) -> None:
        for share in self._shares:
            share.close()
