"""KV metrics and events of LLM workers, as NVIDIA Dynamo has them: NATS where it is on, pull always.

A worker holds a WorkerMetricsPublisher and a KvEventPublisher. Who watches workers holds a KvMetricsAggregator, fed by
a KvMetricsSubscriber (push), a KvMetricsPoller (pull) or both; a router holds a KvIndexer. docs/kv.md is the guide.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rkmetrics.kv.aggregator import KvMetricsAggregator, KvTotal, WorkerState
    from rkmetrics.kv.base import (
        ForwardPassMetrics,
        KvReport,
        KvStats,
        SpecDecodeStats,
        WorkerKey,
        WorkerStats,
    )
    from rkmetrics.kv.events import Cleared, KvEvent, Removed, RouterEvent, Stored, StoredBlock
    from rkmetrics.kv.hashing import block_hashes, sequence_hashes
    from rkmetrics.kv.index import KvIndex
    from rkmetrics.kv.indexer import KvIndexer
    from rkmetrics.kv.plane import KvPlane
    from rkmetrics.kv.publisher import KvEventPublisher, WorkerMetricsPublisher
    from rkmetrics.kv.pull import KvMetricsPoller
    from rkmetrics.kv.subscriber import KvMetricsSubscriber

__all__ = [
    "Cleared",
    "ForwardPassMetrics",
    "KvEvent",
    "KvEventPublisher",
    "KvIndex",
    "KvIndexer",
    "KvMetricsAggregator",
    "KvMetricsPoller",
    "KvMetricsSubscriber",
    "KvPlane",
    "KvReport",
    "KvStats",
    "KvTotal",
    "Removed",
    "RouterEvent",
    "SpecDecodeStats",
    "Stored",
    "StoredBlock",
    "WorkerKey",
    "WorkerMetricsPublisher",
    "WorkerState",
    "WorkerStats",
    "block_hashes",
    "sequence_hashes",
]

_MODULES: dict[str, str] = {
    "KvMetricsAggregator": "aggregator",
    "KvTotal": "aggregator",
    "WorkerState": "aggregator",
    "ForwardPassMetrics": "base",
    "KvReport": "base",
    "KvStats": "base",
    "SpecDecodeStats": "base",
    "WorkerKey": "base",
    "WorkerStats": "base",
    "Cleared": "events",
    "KvEvent": "events",
    "Removed": "events",
    "RouterEvent": "events",
    "Stored": "events",
    "StoredBlock": "events",
    "block_hashes": "hashing",
    "sequence_hashes": "hashing",
    "KvIndex": "index",
    "KvIndexer": "indexer",
    "KvPlane": "plane",
    "KvEventPublisher": "publisher",
    "WorkerMetricsPublisher": "publisher",
    "KvMetricsPoller": "pull",
    "KvMetricsSubscriber": "subscriber",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rkmetrics.kv' has no attribute {name!r}")
    value = getattr(import_module(f"rkmetrics.kv.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
