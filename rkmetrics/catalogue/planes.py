"""Request planes: `rkmetrics_rpc_*`, on the side that serves, the side that calls, and what lies between. Declarations
only.

actor_name is the component that is served or called ("backend"), or what its owner says instead. Instances are no
label: one is looked at through etcd or the directory. A process uses one plane as a rule; it is a label so that a move
from one to another can be seen.
"""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.metricset import Counter, Gauge, Histogram, MetricSet, OneOf

__all__ = [
    "CallOutcome",
    "InstanceState",
    "IntakeRefusal",
    "PickMode",
    "Plane",
    "RpcCalling",
    "RpcIntake",
    "RpcRouting",
    "RpcServing",
    "ServeOutcome",
]

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Plane(StrEnum):
    """How requests travel. memory: within a process, for tests."""

    TCP = "tcp"
    HTTP = "http"
    NATS = "nats"
    MEMORY = "memory"


class ServeOutcome(StrEnum):
    """How the serving of a request ends."""

    OK = "ok"
    ERROR = "error"  # the handler raised, or made what is no JSON
    STOPPED = "stopped"  # the caller wanted no more
    KILLED = "killed"  # the caller left, or its connection broke
    NO_WAY_HOME = "no_way_home"  # the caller's address took no connection; the handler did not run
    CUT_OFF = "cut_off"  # the server stopped before it ended


class RpcServing(MetricSet):
    """Requests that this process answers."""

    requests = Counter(
        "rkmetrics_rpc_server_requests_total",
        "Requests that were taken, by how their answer ended.",
        plane=OneOf(Plane),
        outcome=OneOf(ServeOutcome),
    )
    in_flight = Gauge(
        "rkmetrics_rpc_server_requests_in_flight", "Requests that are being answered.", across="sum", plane=OneOf(Plane)
    )
    duration = Histogram(
        "rkmetrics_rpc_server_duration_seconds",
        "Time from a request to the end of its answer.",
        buckets=SECONDS,
        plane=OneOf(Plane),
    )
    items = Counter("rkmetrics_rpc_server_items_total", "Items of answers.", plane=OneOf(Plane))
    request_bytes = Counter("rkmetrics_rpc_server_request_bytes_total", "Bytes of requests.", plane=OneOf(Plane))
    response_bytes = Counter("rkmetrics_rpc_server_response_bytes_total", "Bytes of answers.", plane=OneOf(Plane))


class IntakeRefusal(StrEnum):
    """Why a request reaches no handler."""

    UNKNOWN_ENDPOINT = "unknown_endpoint"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    BUSY = "busy"  # as many are being answered as may be
    DRAINING = "draining"
    FORBIDDEN = "forbidden"  # its answer is awaited where none may go
    TOO_SLOW = "too_slow"  # it was not complete in time
    FLOOD = "flood"  # a peer that opens and breaks off, or sends frames without end


class RpcIntake(MetricSet, per_actor=False):
    """What comes in, before it is anybody's."""

    refused = Counter(
        "rkmetrics_rpc_refused_total",
        "Requests that reached no handler.",
        plane=OneOf(Plane),
        reason=OneOf(IntakeRefusal),
    )
    connections = Gauge(
        "rkmetrics_rpc_server_connections", "Connections from callers.", across="sum", plane=OneOf(Plane)
    )


class CallOutcome(StrEnum):
    """How a call ends, for who made it."""

    OK = "ok"
    REMOTE_ERROR = "remote_error"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    CLOSED = "closed"  # the answer ended before its end
    PROTOCOL = "protocol"
    CANCELLED = "cancelled"  # by the caller: stopped, closed or dropped before the end


class RpcCalling(MetricSet):
    """Calls that this process makes."""

    calls = Counter(
        "rkmetrics_rpc_client_calls_total", "Calls, by how they ended.", plane=OneOf(Plane), outcome=OneOf(CallOutcome)
    )
    in_flight = Gauge(
        "rkmetrics_rpc_client_calls_in_flight",
        "Calls that wait for an answer, or its end.",
        across="sum",
        plane=OneOf(Plane),
    )
    duration = Histogram(
        "rkmetrics_rpc_client_duration_seconds",
        "Time from a call to the end of its answer.",
        buckets=SECONDS,
        plane=OneOf(Plane),
    )
    first_item = Histogram(
        "rkmetrics_rpc_client_first_item_seconds",
        "Time from a call to its first item.",
        buckets=SECONDS,
        plane=OneOf(Plane),
    )
    items = Counter("rkmetrics_rpc_client_items_total", "Items of answers.", plane=OneOf(Plane))


class InstanceState(StrEnum):
    """What a router thinks of an instance."""

    UP = "up"
    DOWN = "down"  # failed, and is not asked until a probe succeeds
    BUSY = "busy"  # past the threshold


class PickMode(StrEnum):
    """How a router chooses."""

    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    DIRECT = "direct"
    KV = "kv"


class RpcRouting(MetricSet):
    """Choosing among the instances of a component."""

    instances = Gauge(
        "rkmetrics_rpc_router_instances", "Instances that are known.", across="max", state=OneOf(InstanceState)
    )
    picks = Counter("rkmetrics_rpc_router_picks_total", "Choices that were made.", mode=OneOf(PickMode))
    retries = Counter("rkmetrics_rpc_router_retries_total", "Calls made again elsewhere, as nothing was delivered.")
    rejections = Counter(
        "rkmetrics_rpc_router_rejections_total", "Calls that nobody could take.", reason=OneOf("none", "busy")
    )
    probes = Counter("rkmetrics_rpc_router_probes_total", "Probes of failed instances.", outcome=OneOf("ok", "failed"))
    overlap_blocks = Counter(
        "rkmetrics_rpc_router_overlap_blocks_total", "Blocks of prompts that the chosen worker holds already."
    )
    prompt_blocks = Counter(
        "rkmetrics_rpc_router_prompt_blocks_total", "Blocks of prompts that were routed by overlap."
    )
