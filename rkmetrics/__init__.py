"""Metrics for actor fleets and LLM workers: closed labels, native cells, gated Prometheus routes.

    import rkmetrics as rk

    class Chat(rk.MetricSet):
        messages = rk.Counter("chat_messages_total", "Messages handled.", kind=rk.OneOf("text", "image"))

    registry = rk.Registry()
    lobby = registry.bind(Chat, actor_name="lobby")
    lobby.messages["text"].inc()
    rk.serve(registry, port=9090)

Only the core is imported here. `rk.asgi`, `rk.bridges`, `rk.serve`, `rk.collectors`, `rk.discovery`, `rk.kv` and
`rk.rpc` load what they need when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rkmetrics.cells import IMPLEMENTATION, CounterCell, GaugeCell, GaugeShare, HistogramCell, Timer
from rkmetrics.errors import (
    ActorNameError,
    BackendError,
    BusyError,
    DefinitionError,
    FetchError,
    KvValueError,
    LabelValueError,
    MissingExtraError,
    NoInstancesError,
    PayloadError,
    RegistryError,
    RkMetricsError,
    RpcClosedError,
    RpcError,
    RpcProtocolError,
    RpcRefusedError,
    RpcRemoteError,
    RpcTimeoutError,
    RpcUnreachableError,
    ServeError,
    SettingsError,
)
from rkmetrics.health import Health, Status
from rkmetrics.metricset import LATENCY, SIZE, Cells, Counter, Gauge, Histogram, MetricSet, OneOf, Peak, Rename
from rkmetrics.registry import Access, Registry
from rkmetrics.settings import Secret, Settings

if TYPE_CHECKING:
    from rkmetrics import asgi, bridges, collectors, discovery, kv, rpc
    from rkmetrics.actor import ActorMetrics
    from rkmetrics.server import Server, serve

__version__ = "0.1.0"

__all__ = [
    "IMPLEMENTATION",
    "LATENCY",
    "SIZE",
    "Access",
    "ActorMetrics",
    "ActorNameError",
    "BackendError",
    "BusyError",
    "Cells",
    "Counter",
    "CounterCell",
    "DefinitionError",
    "FetchError",
    "Gauge",
    "GaugeCell",
    "GaugeShare",
    "Health",
    "Histogram",
    "HistogramCell",
    "KvValueError",
    "LabelValueError",
    "MetricSet",
    "MissingExtraError",
    "NoInstancesError",
    "OneOf",
    "PayloadError",
    "Peak",
    "Registry",
    "RegistryError",
    "Rename",
    "RkMetricsError",
    "RpcClosedError",
    "RpcError",
    "RpcProtocolError",
    "RpcRefusedError",
    "RpcRemoteError",
    "RpcTimeoutError",
    "RpcUnreachableError",
    "Secret",
    "ServeError",
    "Server",
    "Settings",
    "SettingsError",
    "Status",
    "Timer",
    "__version__",
    "asgi",
    "bridges",
    "collectors",
    "discovery",
    "kv",
    "rpc",
    "serve",
]

# Loaded at first use: name here -> (module, name there; None for the module itself).
_LAZY: dict[str, tuple[str, str | None]] = {
    "ActorMetrics": ("rkmetrics.actor", "ActorMetrics"),
    "Server": ("rkmetrics.server", "Server"),
    "serve": ("rkmetrics.server", "serve"),
    "asgi": ("rkmetrics.asgi", None),
    "bridges": ("rkmetrics.bridges", None),
    "collectors": ("rkmetrics.collectors", None),
    "discovery": ("rkmetrics.discovery", None),
    "kv": ("rkmetrics.kv", None),
    "rpc": ("rkmetrics.rpc", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rkmetrics' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    found = import_module(module)
    value = found if attribute is None else getattr(found, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
