"""etcd, for whoever lists itself there or follows a list: a thin client, a registrar (sink) and a watcher (source).

    wire       requests and answers of etcd's v3 JSON gateway as values; pure
    client     one call, one answer, one deadline, any endpoint that answers
    registrar  keeps keys in etcd for as long as it runs
    watcher    tells what is under a prefix, and what changes there
    dynamo     keys and values of Dynamo's instances; pure

Keys and values are text and bytes here; what they mean is for those who use it (discovery, request planes).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rkmetrics.etcd.client import Etcd
    from rkmetrics.etcd.dynamo import Instance, instance_entries
    from rkmetrics.etcd.registrar import EtcdRegistrar
    from rkmetrics.etcd.watcher import EtcdWatcher, Listener

__all__ = ["Etcd", "EtcdRegistrar", "EtcdWatcher", "Instance", "Listener", "instance_entries"]

_MODULES: dict[str, str] = {
    "Etcd": "client",
    "Instance": "dynamo",
    "instance_entries": "dynamo",
    "EtcdRegistrar": "registrar",
    "EtcdWatcher": "watcher",
    "Listener": "watcher",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rkmetrics.etcd' has no attribute {name!r}")
    value = getattr(import_module(f"rkmetrics.etcd.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
