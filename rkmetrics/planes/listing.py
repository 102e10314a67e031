"""Where a server is listed while it runs, and how it leaves: listed last at the start, withdrawn first at the end.

EtcdLister writes Dynamo's keys under a lease of 10 s, which is asked for under the server's own id: so the instance,
the lease, the KV metrics and the KV events of a process have one number, as those who route by KV state need it. A
lease under another id renumbers the server. DirectoryLister announces the server to our own discovery, as a backend
whose labels say what it serves; who announces is handed in, since planes and discovery meet at the root only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from rkmetrics.addresses import WILDCARDS
from rkmetrics.discovery.base import Backend
from rkmetrics.errors import ServeError
from rkmetrics.etcd.registrar import TTL_SECONDS, EtcdRegistrar
from rkmetrics.planes.instances import labels_of, stable_id
from rkmetrics.planes.serving import Lister, PlaneServer

if TYPE_CHECKING:
    from rkmetrics.catalogue.etcd import Etcd as EtcdCells
    from rkmetrics.etcd.client import Etcd
    from rkmetrics.planes.base import Instance

__all__ = ["DirectoryLister", "EtcdLister", "refuse_unreachable"]


def refuse_unreachable(instance: Instance) -> Instance:
    """Return an instance that others can reach. Raises ServeError for one at 0.0.0.0, or at port 0 (F: Dynamo 0.7)."""
    kind, place = instance.transport
    if kind not in ("tcp", "http"):
        return instance
    host, _, port = place.rpartition("://")[2].partition("/")[0].rpartition(":")
    if host.strip("[]") in WILDCARDS or port.strip("0") == "":
        raise ServeError(
            f"{'.'.join(instance[:3])} would be listed at {place!r}, where nobody reaches it; set the address of the "
            "plane (DYN_TCP_RPC_HOST, DYN_HTTP_RPC_HOST), or RKMETRICS_ADVERTISE_ADDRESS"
        )
    return instance


class EtcdLister(Lister):
    """Lists a server's instances in etcd. To be used for one server."""

    heard_seconds = 0.5  # a watch tells within milliseconds, and clients of Dynamo a little later what they call

    def __init__(self, client: Etcd, *, ttl_seconds: int = TTL_SECONDS, metrics: EtcdCells | None = None) -> None:
        self._client, self._ttl_seconds, self._metrics = client, ttl_seconds, metrics
        self._registrar: EtcdRegistrar | None = None

    @property
    def listed(self) -> bool:
        """Whether all keys were there when last looked at."""
        return self._registrar is not None and self._registrar.listed

    def prepare(self, server: PlaneServer) -> None:
        for instance in server.instances():
            refuse_unreachable(instance)

    async def run(self, server: PlaneServer) -> None:
        def entries(lease: int) -> Mapping[str, bytes]:
            if lease and lease != server.instance_id:
                server.renumber(lease)
            return {found.key: found.encode() for found in server.instances()}

        self._registrar = EtcdRegistrar(
            self._client, entries, ttl_seconds=self._ttl_seconds, metrics=self._metrics, lease=server.instance_id
        )
        await self._registrar.run()

    async def withdraw(self) -> None:
        if self._registrar is not None:
            await self._registrar.withdraw()


class DirectoryLister(Lister):
    """Lists a server as a backend of our own discovery, under an id from which the instance's is made.

    announce: what keeps a backend announced inside its `async with` block, and withdraws it at the end (an Announcer).
    metrics_port: of this process, which balancers check. address: for planes that have none. path: of http endpoints.
    """

    heard_seconds = 1.5  # lists are looked at each second

    def __init__(
        self,
        id: str,
        metrics_port: int,
        announce: Callable[[Backend], AbstractAsyncContextManager[Any]],
        *,
        address: str = "",
        path: str = "",
    ) -> None:
        self._id, self._metrics_port, self._announce = id, metrics_port, announce
        self._address, self._path = address, path

    def prepare(self, server: PlaneServer) -> None:
        server.renumber(stable_id(self._id))
        self.backend(server)

    async def run(self, server: PlaneServer) -> None:
        async with self._announce(self.backend(server)):
            await asyncio.Event().wait()

    def backend(self, server: PlaneServer) -> Backend:
        """Return what is announced. Raises BackendError."""
        instances = list(map(refuse_unreachable, server.instances()))
        kind, place = instances[0].transport
        dialled = kind in ("tcp", "http")  # the others have no address of their own: their metrics stand for them
        address = place.rpartition("://")[2].partition("/")[0] if dialled else self._address
        names = server.endpoints
        return Backend.checked(self._id, address, self._metrics_port, labels=labels_of(server.mode, names, self._path))
