"""Service discovery: backends announce themselves, balancers check them, proxies and Prometheus read the list.

docs/discovery.md is the guide.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rkmetrics.discovery.advertise import backend_here
    from rkmetrics.discovery.announcer import Announcer
    from rkmetrics.discovery.balancer import Balancer
    from rkmetrics.discovery.base import Address, Backend
    from rkmetrics.discovery.directory import Directory, Listed, Rules, State
    from rkmetrics.discovery.etcd import EtcdSource
    from rkmetrics.discovery.health import HealthChecker
    from rkmetrics.discovery.policy import Policy
    from rkmetrics.discovery.selection import Strategy
    from rkmetrics.discovery.verdict import Vitals

__all__ = [
    "Address",
    "Announcer",
    "Backend",
    "Balancer",
    "Directory",
    "EtcdSource",
    "HealthChecker",
    "Listed",
    "Policy",
    "Rules",
    "State",
    "Strategy",
    "Vitals",
    "backend_here",
]

_MODULES: dict[str, str] = {
    "backend_here": "advertise",
    "Announcer": "announcer",
    "Balancer": "balancer",
    "Address": "base",
    "Backend": "base",
    "Directory": "directory",
    "Listed": "directory",
    "Rules": "directory",
    "State": "directory",
    "Strategy": "selection",
    "Vitals": "verdict",
    "EtcdSource": "etcd",
    "HealthChecker": "health",
    "Policy": "policy",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rkmetrics.discovery' has no attribute {name!r}")
    value = getattr(import_module(f"rkmetrics.discovery.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
