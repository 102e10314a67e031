"""Request planes: how requests travel from who asks to who answers. One interface over tcp, http and nats.

PLANES is the whole table of siblings; `rkmetrics.rpc` builds the one that DYN_REQUEST_PLANE names, with whatever else a
process has. `memory` is for tests: the same code but for the sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, cast

from rkmetrics.planes.base import (
    Annotated,
    EndpointName,
    Instance,
    InstanceSource,
    RequestPlaneClient,
    RequestPlaneServer,
    RpcContext,
    RpcRequest,
    RpcResponse,
)

if TYPE_CHECKING:
    from rkmetrics.planes.calling import PlaneClient
    from rkmetrics.planes.serving import PlaneServer

__all__ = [
    "PLANES",
    "Annotated",
    "EndpointName",
    "Instance",
    "InstanceSource",
    "RequestPlaneClient",
    "RequestPlaneServer",
    "RpcContext",
    "RpcRequest",
    "RpcResponse",
    "Sibling",
    "client_class",
    "server_class",
]


class Sibling(NamedTuple):
    """Where a plane is."""

    module: str
    server: str
    client: str


PLANES: Mapping[str, Sibling] = {
    "tcp": Sibling("rkmetrics.planes.tcp", "TcpServer", "TcpClient"),
    "http": Sibling("rkmetrics.planes.http", "HttpServer", "HttpClient"),
    "nats": Sibling("rkmetrics.planes.nats", "NatsServer", "NatsClient"),
    "memory": Sibling("rkmetrics.planes.memory", "MemoryServer", "MemoryClient"),
}


def server_class(mode: str) -> type[PlaneServer]:
    """Return the server of a plane. Raises KeyError for none of PLANES, MissingExtraError where it needs a package."""
    return cast("type[PlaneServer]", getattr(import_module(PLANES[mode].module), PLANES[mode].server))


def client_class(mode: str) -> type[PlaneClient]:
    """Return the client of a plane."""
    return cast("type[PlaneClient]", getattr(import_module(PLANES[mode].module), PLANES[mode].client))
