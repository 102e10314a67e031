"""Node vitals, `rkmetrics_node_*`: what a load balancer asks of a process. Declarations only.

`registry.node` is the bound set. The ASGI middleware keeps the requests, the vitals collector what can be measured, the
application its peers and what waits to be tried again: what nobody feeds has no series. /vitals and /telemetry are
these numbers in the discovery protocol's names and units (collectors/vitals.py).
"""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.metricset import Counter, Gauge, MetricSet, OneOf

__all__ = ["Node", "Outcome"]


class Outcome(StrEnum):
    """How a request to the application ends."""

    SUCCESS = "success"  # answered below 400
    CLIENT_ERROR = "client_error"  # answered 4xx
    SERVER_ERROR = "server_error"  # answered 5xx, or the application raised
    ABORTED = "aborted"  # not answered to its end: the client went away, or the request was cancelled


class Node(MetricSet, per_actor=False):
    """The node: whether it takes traffic, how much it has in hand, how full it is.

    Usage is of the machine, or of the container's share of it: workers measure the same, and the highest counts.
    """

    ready = Gauge("rkmetrics_node_ready", "1 while the node takes traffic, else 0; what /health says.", across="min")
    requests_in_progress = Gauge(
        "rkmetrics_node_requests_in_progress", "Requests that the application has begun and not ended.", across="sum"
    )
    responses = Counter(
        "rkmetrics_node_responses_total", "Requests that ended, by how they did.", outcome=OneOf(Outcome)
    )
    cpu_usage = Gauge("rkmetrics_node_cpu_usage_ratio", "CPU time in use, of all that the node may use.", across="max")
    memory_usage = Gauge(
        "rkmetrics_node_memory_usage_ratio", "Memory in use, of all that the node may use.", across="max"
    )
    gpu_usage = Gauge(
        "rkmetrics_node_gpu_usage_ratio", "Time that the GPUs were busy, their mean; absent without one.", across="max"
    )
    connected_peers = Gauge("rkmetrics_node_connected_peers", "Peers that the node is connected to.", across="sum")
    backoff_requests = Gauge(
        "rkmetrics_node_backoff_requests", "Requests that wait before they are tried again.", across="sum"
    )
    uptime = Gauge("rkmetrics_node_uptime_seconds", "Time since the process started.", across="max")
