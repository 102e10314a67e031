"""What a registry measures by itself: the process, its Python runtime, and the node's vitals.

A collector is a module with `install(registry)` (base.Collector). COLLECTORS names them; a registry loads
them when it is made, and one that cannot be loaded or installed costs its own families only.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

if TYPE_CHECKING:
    from rkmetrics.collectors import eventloop, gc, gpu, host, interpreter, process, vitals
    from rkmetrics.collectors.base import Collector
    from rkmetrics.registry import Registry

__all__ = ["COLLECTORS", "eventloop", "gc", "gpu", "host", "install", "interpreter", "process", "vitals"]

# Name, as rkmetrics_collector_errors_total has it -> module.
COLLECTORS: Mapping[str, str] = {
    "process": "rkmetrics.collectors.process",
    "interpreter": "rkmetrics.collectors.interpreter",
    "eventloop": "rkmetrics.collectors.eventloop",
    "gc": "rkmetrics.collectors.gc",
    "vitals": "rkmetrics.collectors.vitals",
}

_installed: WeakSet[Registry] = WeakSet()


def install(registry: Registry) -> None:
    """Have a registry measure this process. A second call changes nothing; nothing raises."""
    if registry in _installed:
        return
    _installed.add(registry)
    for name, module in COLLECTORS.items():
        _install(registry, name, module)


def _install(registry: Registry, name: str, module: str) -> None:
    try:
        refresh = cast("Collector", import_module(module)).install(registry)
    except Exception:
        import logging

        logging.getLogger("rkmetrics").exception("the collector %r cannot be used; its metrics are left out", name)
        registry.exporter.collector_errors[name, "raised"].inc()
        return
    if refresh is not None:
        registry.add_refresher(refresh)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rkmetrics.collectors' has no attribute {name!r}")
    return import_module(f"rkmetrics.collectors.{name}")
