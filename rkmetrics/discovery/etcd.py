"""Backends in etcd: what a backend writes there, and the source that a balancer's directory follows.

Keys are `rkmetrics/backends/{namespace}/{id}`, values the body of POST /register, and each is under its backend's own
lease: who dies is gone with it. A value that is none, or that speaks of another id than its key, is not taken: who may
write one key there cannot change another backend.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rkmetrics.discovery.base import Backend, Sink, SourceName
from rkmetrics.errors import BackendError, PayloadError
from rkmetrics.etcd.registrar import TTL_SECONDS, EtcdRegistrar
from rkmetrics.etcd.watcher import LOOK_SECONDS, EtcdWatcher
from rkmetrics.retry import StateLog

if TYPE_CHECKING:
    from rkmetrics.catalogue.etcd import Etcd as EtcdCells
    from rkmetrics.etcd.client import Etcd

__all__ = ["PREFIX", "BackendKeys", "EtcdSource", "prefix_of", "registrar"]

log = logging.getLogger("rkmetrics.etcd")

PREFIX = "rkmetrics/backends/"


def prefix_of(namespace: str) -> str:
    """Return what the keys of a namespace begin with."""
    return f"{PREFIX}{namespace}/"


def registrar(
    client: Etcd,
    backend: Backend,
    namespace: str,
    *,
    ttl_seconds: int = TTL_SECONDS,
    metrics: EtcdCells | None = None,
) -> EtcdRegistrar:
    """Return what keeps a backend listed in etcd."""
    entries = {prefix_of(namespace) + backend.id: backend.encode()}
    return EtcdRegistrar(client, lambda _: entries, ttl_seconds=ttl_seconds, metrics=metrics)


class EtcdSource:
    """Tells a sink which backends are in etcd. A Source."""

    name = SourceName.ETCD

    def __init__(
        self,
        client: Etcd,
        namespace: str,
        *,
        metrics: EtcdCells | None = None,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._client, self._prefix = client, prefix_of(namespace)
        self._metrics, self._look_seconds = metrics, look_seconds

    async def run(self, sink: Sink) -> None:
        """Follow etcd until cancelled; while it is away the sink keeps what it has."""
        keys = BackendKeys(sink, self._prefix)
        watcher = EtcdWatcher(self._client, self._prefix, keys, metrics=self._metrics, look_seconds=self._look_seconds)
        await watcher.run()


class BackendKeys:
    """What a watcher tells of keys and values, told to a sink as backends. malformed: values that were not taken."""

    def __init__(self, sink: Sink, prefix: str) -> None:
        self._sink, self._prefix = sink, prefix
        self._log = StateLog(log)
        self.malformed = 0

    def on_put(self, key: str, value: bytes) -> None:
        """A key is there, or has another value."""
        backend = self._read(key, value)
        if backend is not None:
            self._sink.upsert(SourceName.ETCD, backend)
        else:  # what was there before is no longer what etcd says
            self.on_delete(key)

    def on_delete(self, key: str) -> None:
        """A key is gone."""
        self._sink.withdraw(SourceName.ETCD, key.removeprefix(self._prefix))

    def on_list(self, items: Mapping[str, bytes]) -> None:
        """These are all the keys."""
        found = (self._read(key, value) for key, value in items.items())
        self._sink.resync(SourceName.ETCD, [backend for backend in found if backend is not None])

    def _read(self, key: str, value: bytes) -> Backend | None:
        try:
            backend = Backend.decode(value)
            if backend.id != key.removeprefix(self._prefix):
                raise BackendError("id", backend.id, f"that of its key, {key!r}")
        except (PayloadError, BackendError) as error:
            self.malformed += 1
            self._log.note(f"{key} {error}", logging.WARNING, "etcd: %r is not taken: %s", key, error)
            return None
        return backend
