"""Keys and values of Dynamo's instances in etcd, as its runtime 0.6 to 0.9 writes and reads them. Pure.

    v1/instances/dynamo/backend/generate/7d7ba1fbd0159306 =
    {"type":"Endpoint","component":"backend","endpoint":"generate","namespace":"dynamo",
     "instance_id":9041998779776340742,"transport":{"tcp":"10.0.1.5:9999/generate"}}

The id is that of the lease, in hexadecimal in the key; 0.6 leaves the type out. The transport is an object of one
field: {"http": url}, {"tcp": "host:port/endpoint"} (0.8: "host:port/<id>/endpoint"), {"nats_tcp": subject}.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from rkmetrics.errors import PayloadError

__all__ = ["INSTANCES", "Instance", "instance_entries"]

INSTANCES = "v1/instances/"
NAME = re.compile(r"[A-Za-z0-9_.-]+", re.ASCII)


class _Wire(msgspec.Struct):
    component: str
    endpoint: str
    namespace: str
    instance_id: int
    transport: dict[str, str]


_decoder = msgspec.json.Decoder(_Wire)


class Instance(NamedTuple):
    """One instance of an endpoint: who it is, and how it is reached. transport: kind and place."""

    namespace: str
    component: str
    endpoint: str
    instance_id: int
    transport: tuple[str, str]

    @property
    def key(self) -> str:
        """Where it stands in etcd."""
        return f"{INSTANCES}{self.namespace}/{self.component}/{self.endpoint}/{self.instance_id:x}"

    def encode(self) -> bytes:
        """Return its value."""
        kind, place = self.transport
        fields = {
            "type": "Endpoint",
            "component": self.component,
            "endpoint": self.endpoint,
            "namespace": self.namespace,
            "instance_id": self.instance_id,
            "transport": {kind: place},
        }
        return msgspec.json.encode(fields)

    @classmethod
    def decode(cls, key: str, value: bytes) -> Instance:
        """Read one. Raises PayloadError, also where the value speaks of another instance than its key."""
        try:
            wire = _decoder.decode(value)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PayloadError("a Dynamo instance", value, str(error)) from None
        if len(wire.transport) != 1:
            raise PayloadError("a Dynamo instance", value, "expected one transport")
        found = cls(wire.namespace, wire.component, wire.endpoint, wire.instance_id, next(iter(wire.transport.items())))
        if found.key != key:
            raise PayloadError("a Dynamo instance", value, f"its key is {key!r}")
        return found


def instance_entries(
    namespace: str, component: str, endpoint: str, transport: Callable[[int], tuple[str, str]]
) -> Callable[[int], Mapping[str, bytes]]:
    """Return what an EtcdRegistrar keeps for an endpoint. transport: from the instance's id to kind and place.

    Raises ValueError for a name that cannot be part of a key.
    """
    for name in (namespace, component, endpoint):
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r}: expected letters, digits, '_', '.' and '-'")

    def entries(lease: int) -> Mapping[str, bytes]:
        instance = Instance(namespace, component, endpoint, lease, transport(lease))
        return {instance.key: instance.encode()}

    return entries
