"""The life of actors, `rivetkit_actor_*`, and their key-value store, `pegboard_actor_kv_*`. Declarations only.

Names, types, buckets and label values are those of RivetKit, so that its users keep their queries. What RivetKit
declares and nothing could ever reach is left out; what it lacks is added (docs/decisions/0010-actor-families.md). The
helpers that keep these numbers right are in rkmetrics/actor.py.
"""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.metricset import LATENCY, Counter, Gauge, Histogram, MetricSet, OneOf, Peak, Rename

__all__ = [
    "ActorKv",
    "Actors",
    "Inbox",
    "IsNew",
    "KeepAwake",
    "KvOp",
    "Operation",
    "Outcome",
    "Phase",
    "ShutdownReason",
    "StartupOutcome",
    "StateWrite",
    "StopReason",
    "Subsystem",
    "TaskKind",
]

# Where RivetKit names no buckets: the default of Prometheus' client libraries, in seconds.
_DEFAULT: tuple[float, ...] = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# Durations of transactions in the key-value store, in seconds: RivetKit's engine waits long.
_TRANSACTION: tuple[float, ...] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0,
)  # fmt: skip

# Keys of one operation in the key-value store: by twos up to 128, the most that RivetKit's engine takes.
_KEYS: tuple[float, ...] = tuple(float(2**k) for k in range(8))


def _once(*names: str) -> tuple[Rename, ...]:
    """Names that became today's one to one: RivetKit's, while they had labels by instance or its registry's prefix."""
    return tuple(Rename(name, since="0.1.0") for name in names)


class StopReason(StrEnum):
    """Why an actor ended."""

    FINISHED = "finished"  # its block ended, and nobody gave a reason
    SLEEP = "sleep"
    DESTROY = "destroy"
    ERROR = "error"  # left by an exception
    CANCELLED = "cancelled"  # left by cancellation, or by what ends the program
    LOST = "lost"  # collected as garbage without an end


class Phase(StrEnum):
    """A part of an actor's startup."""

    LOAD_PERSISTED = "load_persisted"
    CORE_INIT = "core_init"
    CREATE_STATE = "create_state"
    CREATE_VARS = "create_vars"
    RUNTIME_PREAMBLE = "runtime_preamble"
    POST_READY = "post_ready"
    TOTAL = "total"  # all of it, by a guard


class IsNew(StrEnum):
    """Whether an actor starts for the first time."""

    TRUE = "true"
    FALSE = "false"
    UNKNOWN = "unknown"  # not known yet, as its state is not loaded


class StartupOutcome(StrEnum):
    """How a startup, or a phase of it, ended."""

    SUCCESS = "success"
    ERROR = "error"  # left by an exception or by cancellation, or dropped unfinished


class Outcome(StrEnum):
    """How a user task ended."""

    SUCCESS = "success"
    ERROR = "error"
    CANCELLED = "cancelled"


class TaskKind(StrEnum):
    """What user code runs for."""

    ACTION = "action"
    HTTP = "http"
    WEBSOCKET_LIFETIME = "websocket_lifetime"
    WEBSOCKET_CALLBACK = "websocket_callback"
    QUEUE_WAIT = "queue_wait"
    SCHEDULED_ACTION = "scheduled_action"
    DISCONNECT_CALLBACK = "disconnect_callback"
    WAIT_UNTIL = "wait_until"
    REGISTERED_TASK = "registered_task"
    SLEEP_FINALIZE = "sleep_finalize"
    DESTROY_REQUEST = "destroy_request"


class Inbox(StrEnum):
    """One of the queues of messages to an actor's own loop."""

    LIFECYCLE = "lifecycle"
    DISPATCH = "dispatch"
    LIFECYCLE_EVENT = "lifecycle_event"


class KeepAwake(StrEnum):
    """Who keeps an actor from sleeping."""

    KEEP_AWAKE = "keep_awake"  # user code
    INTERNAL_KEEP_AWAKE = "internal_keep_awake"  # the runtime


class ShutdownReason(StrEnum):
    """What an actor shuts down for."""

    SLEEP = "sleep"
    DESTROY = "destroy"


class StateWrite(StrEnum):
    """What wrote an actor's state."""

    USER_WRITE = "user_write"  # the actor's own code
    INTERNAL_REPLACE = "internal_replace"  # the runtime replaced all of it, as a migration does
    SCHEDULED_EVENTS_UPDATE = "scheduled_events_update"
    INPUT_SET = "input_set"
    HAS_INITIALIZED = "has_initialized"


class Subsystem(StrEnum):
    """Work beside the actor's own loop, which a shutdown waits for."""

    INTERNAL_KEEP_AWAKE = "internal_keep_awake"
    HTTP_REQUESTS = "http_requests"


class Operation(StrEnum):
    """What waited in vain for a subsystem."""

    DESTROY_DRAIN = "destroy_drain"
    SLEEP_DRAIN = "sleep_drain"


class KvOp(StrEnum):
    """An operation of the actors' key-value store."""

    GET = "get"
    LIST = "list"
    PUT = "put"
    DELETE = "delete"
    DELETE_RANGE = "delete_range"
    DELETE_ALL = "delete_all"


class Actors(MetricSet):
    """The life of the actors of one name, from start to stop."""

    active_count = Gauge(
        "rivetkit_actor_active_count",
        "Actors that run in this process.",
        across="sum",
        exception="RivetKit's name: its dashboards and queries read it, though _count belongs to histograms",
        renamed_from=_once("rivet_rivetkit_actor_active_count"),
    )
    active_peak = Peak(
        "rivetkit_actor_active_peak",
        "The most actors that ran at once within the last two minutes.",
        of=active_count,
        window_seconds=120.0,
    )
    started = Counter(
        "rivetkit_actor_started_total",
        "Actors started in this process, failed starts included.",
        renamed_from=_once("rivet_rivetkit_actor_started_total"),
    )
    stopped = Counter(
        "rivetkit_actor_stopped_total",
        "Actors that ended in this process, by reason.",
        renamed_from=_once("rivet_rivetkit_actor_stopped_total"),
        reason=OneOf(StopReason),
    )
    startup_phase_duration = Histogram(
        "rivetkit_actor_startup_phase_duration_seconds",
        "Time that a phase of an actor's startup takes; the phase total is all of it.",
        buckets=LATENCY,
        renamed_from=_once("rivet_rivetkit_actor_startup_phase_duration_seconds"),
        phase=OneOf(Phase),
        is_new=OneOf(IsNew),
        outcome=OneOf(StartupOutcome),
    )
    create_state_duration = Histogram(
        "rivetkit_actor_create_state_duration_seconds",
        "Time to create an actor's state during its startup; successes of the startup phase create_state.",
        buckets=_DEFAULT,
        renamed_from=_once("rivet_rivetkit_actor_create_state_duration_seconds"),
    )
    create_vars_duration = Histogram(
        "rivetkit_actor_create_vars_duration_seconds",
        "Time to create an actor's variables during its startup; successes of the startup phase create_vars.",
        buckets=_DEFAULT,
        renamed_from=_once("rivet_rivetkit_actor_create_vars_duration_seconds"),
    )
    queue_depth = Gauge(
        "rivetkit_actor_queue_depth",
        "Messages that wait in the queues of running actors.",
        across="sum",
        renamed_from=_once("rivet_actor_queue_depth", "rivet_rivetkit_actor_queue_depth"),
    )
    queue_sent = Counter(
        "rivetkit_actor_queue_messages_sent_total",
        "Messages put into actors' queues.",
        renamed_from=_once("rivet_actor_queue_messages_sent_total", "rivet_rivetkit_actor_queue_messages_sent_total"),
    )
    queue_received = Counter(
        "rivetkit_actor_queue_messages_received_total",
        "Messages that actors took from their queues.",
        renamed_from=_once(
            "rivet_actor_queue_messages_received_total", "rivet_rivetkit_actor_queue_messages_received_total"
        ),
    )
    connections_active = Gauge(
        "rivetkit_actor_connections_active",
        "Connections to actors that are open.",
        across="sum",
        renamed_from=_once("rivet_actor_active_connections", "rivet_rivetkit_actor_connections_active"),
    )
    connections = Counter(
        "rivetkit_actor_connections_total",
        "Connections to actors that were opened.",
        renamed_from=_once("rivet_actor_connections_total", "rivet_rivetkit_actor_connections_total"),
    )
    inbox_depth = Gauge(
        "rivetkit_actor_inbox_depth",
        "Messages that wait for the loops of running actors.",
        across="sum",
        renamed_from=_once("rivet_rivetkit_actor_inbox_depth"),
        inbox=OneOf(Inbox),
    )
    user_tasks_active = Gauge(
        "rivetkit_actor_user_tasks_active",
        "User tasks that run.",
        across="sum",
        renamed_from=_once("rivet_actor_user_tasks_active", "rivet_rivetkit_actor_user_tasks_active"),
        kind=OneOf(TaskKind),
    )
    user_task_duration = Histogram(
        "rivetkit_actor_user_task_duration_seconds",
        "Time that user tasks take, by outcome.",
        buckets=_DEFAULT,
        renamed_from=_once("rivet_actor_user_task_duration_seconds", "rivet_rivetkit_actor_user_task_duration_seconds"),
        kind=OneOf(TaskKind),
        outcome=OneOf(Outcome),
    )
    action_calls = Counter(
        "rivetkit_actor_action_calls_total",
        "Actions called, by clients or by a schedule, by outcome.",
        outcome=OneOf(Outcome),
    )
    http_requests_active = Gauge(
        "rivetkit_actor_http_requests_active",
        "HTTP requests that running actors handle.",
        across="sum",
        renamed_from=_once("rivet_rivetkit_actor_http_requests_active"),
    )
    keep_awake_active = Gauge(
        "rivetkit_actor_keep_awake_active",
        "Work that keeps actors awake.",
        across="sum",
        renamed_from=_once("rivet_rivetkit_actor_keep_awake_active"),
        kind=OneOf(KeepAwake),
    )
    shutdown_tasks_active = Gauge(
        "rivetkit_actor_shutdown_tasks_active",
        "Work that the shutdown of actors waits for.",
        across="sum",
        renamed_from=_once("rivet_rivetkit_actor_shutdown_tasks_active"),
    )
    shutdown_wait = Histogram(
        "rivetkit_actor_shutdown_wait_seconds",
        "Time that the shutdown of an actor takes.",
        buckets=_DEFAULT,
        renamed_from=_once("rivet_actor_shutdown_wait_seconds", "rivet_rivetkit_actor_shutdown_wait_seconds"),
        reason=OneOf(ShutdownReason),
    )
    shutdown_timeout = Counter(
        "rivetkit_actor_shutdown_timeout_total",
        "Shutdowns of actors that reached their deadline with work left.",
        renamed_from=_once("rivet_actor_shutdown_timeout_total", "rivet_rivetkit_actor_shutdown_timeout_total"),
        reason=OneOf(ShutdownReason),
    )
    state_mutation = Counter(
        "rivetkit_actor_state_mutation_total",
        "Writes of actors' state, by what wrote.",
        renamed_from=_once("rivet_actor_state_mutation_total", "rivet_rivetkit_actor_state_mutation_total"),
        reason=OneOf(StateWrite),
    )
    direct_subsystem_shutdown_warning = Counter(
        "rivetkit_actor_direct_subsystem_shutdown_warning_total",
        "Subsystems that still had work when a shutdown stopped to wait for them.",
        renamed_from=_once(
            "rivet_actor_direct_subsystem_shutdown_warning_total",
            "rivet_rivetkit_actor_direct_subsystem_shutdown_warning_total",
        ),
        subsystem=OneOf(Subsystem),
        operation=OneOf(Operation),
    )


class ActorKv(MetricSet):
    """The actors' key-value store."""

    operation_duration = Histogram(
        "pegboard_actor_kv_operation_duration_seconds",
        "Time that an operation of the actors' key-value store takes, its transaction included.",
        buckets=_TRANSACTION,
        renamed_from=_once(
            "rivet_actor_kv_operation_duration_seconds", "rivet_pegboard_actor_kv_operation_duration_seconds"
        ),
        op=OneOf(KvOp),
    )
    keys_per_operation = Histogram(
        "pegboard_actor_kv_keys_per_operation",
        "Keys that an operation of the actors' key-value store reads or writes.",
        buckets=_KEYS,
        renamed_from=_once("rivet_actor_kv_keys_per_operation", "rivet_pegboard_actor_kv_keys_per_operation"),
        op=OneOf(KvOp),
    )
