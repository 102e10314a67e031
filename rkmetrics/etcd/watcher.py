"""Follows a prefix in etcd: what is there, and each change, over whatever happens to the connection.

    list at revision r ── watch from r+1 ── ... ── lost ── wait ── watch from the last one seen + 1
                            └── compacted, or etcd's history was rewound: list again, and tell the difference

A silent watch may be a dead one, and a dead connection says nothing. So etcd is asked for a sign of life every
LOOK_SECONDS, which finds a frozen server and a cut network, and a watch is opened anew every WATCH_SECONDS, which costs
one request and finds everything else. While etcd is away, what was last known stays: silence is no withdrawal.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from rkmetrics.catalogue.etcd import ResyncReason
from rkmetrics.errors import CompactedError, EtcdError
from rkmetrics.retry import Backoff, StateLog, jittered

if TYPE_CHECKING:
    from rkmetrics.catalogue.etcd import Etcd as EtcdCells
    from rkmetrics.cells import GaugeShare
    from rkmetrics.etcd.client import Etcd
    from rkmetrics.etcd.wire import WatchNews

__all__ = ["EtcdWatcher", "Listener"]

log = logging.getLogger("rkmetrics.etcd")

WATCH_SECONDS = 60.0
LOOK_SECONDS = 2.5
BACKOFF_FIRST_SECONDS, BACKOFF_CAP_SECONDS = 0.1, 2.0


class Listener(Protocol):
    """Whom a watcher tells. Called from its event loop; what is raised is logged, and ends nothing."""

    def on_put(self, key: str, value: bytes) -> None:
        """The key is there, or has another value."""
        ...

    def on_delete(self, key: str) -> None:
        """The key is gone: deleted, or its lease ended."""
        ...

    def on_list(self, items: Mapping[str, bytes]) -> None:
        """All keys there are, after they were listed and each difference was told."""
        ...


class EtcdWatcher:
    """Follows the keys under a prefix while `run` runs. items: what is there, as last known.

    look_seconds: how often a sign of life is asked for. metrics may be None.
    """

    def __init__(
        self,
        client: Etcd,
        prefix: str,
        listener: Listener,
        *,
        metrics: EtcdCells | None = None,
        look_seconds: float = LOOK_SECONDS,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        self._client, self._prefix, self._listener = client, prefix, listener
        self._metrics, self._look_seconds, self._watch_seconds = metrics, look_seconds, watch_seconds
        self._log = StateLog(log)
        self._revision = 0  # the last one seen; 0: list first
        self._reason = ResyncReason.START
        self._shares: tuple[GaugeShare, ...] = ()
        self.items: dict[str, bytes] = {}
        self.up = False

    async def run(self) -> None:
        """Follow, until cancelled. Whatever etcd does is counted, logged and tried again."""
        backoff = Backoff(BACKOFF_FIRST_SECONDS, BACKOFF_CAP_SECONDS)
        metrics = self._metrics
        if metrics is not None:
            self._shares = (metrics.watches.share(), metrics.watches_wanted.share())
            self._shares[1].set(1)
        try:
            while True:
                if await self._turn():
                    backoff.reset()
                else:
                    await asyncio.sleep(backoff.next())
        finally:
            self._set_up(False)
            for share in self._shares:
                share.close()

    async def _turn(self) -> bool:
        """List if that is due, and watch for a while. False where it failed."""
        try:
            if not self._revision:
                await self._list()
            await self._follow()
        except CompactedError as error:
            log.info("etcd: %s; listing %s again", error, self._prefix)
            self._list_again(ResyncReason.COMPACTED)
            return False
        except EtcdError as error:
            self._set_up(False)
            told = "etcd: %s is not followed (%s); what is known stays, trying again every %g s at most"
            self._log.note("down", logging.WARNING, told, self._prefix, error, BACKOFF_CAP_SECONDS)
            return False
        return True

    def _list_again(self, reason: ResyncReason) -> None:
        self._revision, self._reason = 0, reason

    # --- listing ------------------------------------------------------------------------------------------------------

    async def _list(self) -> None:
        found, revision = await self._client.range(self._prefix.encode())
        if self._metrics is not None:
            self._metrics.resyncs[self._reason].inc()
        items = {key: item.value for item in found if (key := _text(item.key)) is not None}
        for key in self.items.keys() - items.keys():
            self._delete(key)
        for key, value in items.items():
            if self.items.get(key) != value:
                self._put(key, value)
        self._revision = revision
        self._tell(lambda: self._listener.on_list(dict(self.items)))

    # --- watching -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Watch for a while. Returns at the end of that while, or when all is to be listed again."""
        tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._look())]
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=jittered(self._watch_seconds), return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        async with aclosing(self._client.watch(self._prefix.encode(), self._revision + 1)) as watch:
            async for news in watch:
                if self._is_rewound(news.revision):
                    return
                if news.created:
                    self._set_up(True)
                    self._log.note("up", logging.INFO, "etcd: following %s at %s", self._prefix, self._client.shown)
                self._apply(news)

    async def _look(self) -> None:
        """Raise when etcd gives no sign of life; return when its history is not the one that we followed."""
        while True:
            await asyncio.sleep(self._look_seconds)
            if self._is_rewound(await self._client.revision()):
                return

    def _is_rewound(self, revision: int) -> bool:
        """Whether the store is behind what we saw of it: then it waits for years to come back there, in silence."""
        if not 0 < revision < self._revision:
            return False
        self._list_again(ResyncReason.REWOUND)
        return True

    def _apply(self, news: WatchNews) -> None:
        for item, deleted in news.events:
            key = _text(item.key)
            if key is None:
                continue
            if deleted:
                self._delete(key)
            else:
                self._put(key, item.value)
        if self._metrics is not None and news.events:
            self._metrics.events.inc(len(news.events))
        if news.events and not news.fragment:  # the rest of a revision comes with the next fragment
            self._revision = max(self._revision, *(event.item.modified for event in news.events))

    def _put(self, key: str, value: bytes) -> None:
        self.items[key] = value
        self._tell(lambda: self._listener.on_put(key, value))

    def _delete(self, key: str) -> None:
        if self.items.pop(key, None) is not None:
            self._tell(lambda: self._listener.on_delete(key))

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("etcd: a listener failed; the watch goes on")

    def _set_up(self, up: bool) -> None:
        self.up = up
        for share in self._shares[:1]:
            share.set(up)


def _text(key: bytes) -> str | None:
    """Keys that are no text are none of ours."""
    try:
        return key.decode()
    except UnicodeDecodeError:
        return None
