"""The node's vitals: one reading for `rkmetrics_node_*`, for the JSON and for /telemetry.

The cells of Node are the source. What can be measured is set in them by `refresh`; the middleware and the application
keep the others. `read` says the same in the discovery protocol's names and units, where what nobody keeps is 0, and so
is what is not a finite number: JSON has no word for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from time import monotonic
from typing import TYPE_CHECKING

from rkmetrics.catalogue import version
from rkmetrics.catalogue.node import Outcome
from rkmetrics.collectors import gpu, host
from rkmetrics.collectors.base import PerProcess, Refresh
from rkmetrics.collectors.process import age_seconds

if TYPE_CHECKING:
    from rkmetrics.catalogue.node import Node
    from rkmetrics.cells import GaugeCell
    from rkmetrics.health import Health
    from rkmetrics.registry import Registry

__all__ = ["Vitals", "install", "read", "uptime_seconds"]


@dataclass(frozen=True, slots=True)
class Vitals:
    """The vitals of a node; the order is that of the JSON. Usage is in percent, 0 to 100. What nobody keeps, or what is
    kept as NaN or an infinity, is 0.

    failed_responses: those that were the node's own fault (5xx, or the application raised).
    """

    ready: bool
    requests_in_progress: int
    cpu_usage: float
    memory_usage: float
    gpu_usage: float
    failed_responses: int
    connected_peers: int
    backoff_requests: int
    uptime_seconds: int
    version: str


def install(registry: Registry) -> Refresh:
    """Feed Node."""
    node, health = registry.node, registry.health

    def vitals() -> None:
        _refresh(node, health)

    vitals()
    return vitals


def read(registry: Registry) -> Vitals:
    """Return the vitals now; CPU, memory and GPU usage are a second old at most."""
    node = registry.node
    ready = _refresh(node, registry.health)
    return Vitals(
        ready=ready,
        requests_in_progress=_whole(node.requests_in_progress),
        cpu_usage=_percent(node.cpu_usage),
        memory_usage=_percent(node.memory_usage),
        gpu_usage=_percent(node.gpu_usage),
        failed_responses=int(_finite(node.responses[Outcome.SERVER_ERROR].value)),
        connected_peers=_whole(node.connected_peers),
        backoff_requests=_whole(node.backoff_requests),
        uptime_seconds=_whole(node.uptime),
        version=version(),
    )


def uptime_seconds() -> float:
    """Return the seconds since this process started. Once it is known, no step of a clock changes it."""
    return monotonic() - _started.get()


_started = PerProcess(lambda: monotonic() - age_seconds())


def _refresh(node: Node, health: Health) -> bool:
    used, gpus, ready = host.usage(), gpu.usage(), health.ready
    node.ready.set(ready)
    node.uptime.set(uptime_seconds())
    node.cpu_usage.set(used.cpu)
    node.memory_usage.set(used.memory)
    if gpus is None:
        node.gpu_usage.clear()
    else:
        node.gpu_usage.set(gpus)
    return ready


def _whole(gauge: GaugeCell) -> int:
    return max(0, int(_finite(gauge.value)))


def _percent(gauge: GaugeCell) -> float:
    return round(_finite(100 * _finite(gauge.value)), 2)


def _finite(value: float | None) -> float:
    return value if value is not None and isfinite(value) else 0.0
