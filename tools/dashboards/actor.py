"""Actor detail: one actor name, from its startup by phase to its shutdown."""

from __future__ import annotations

from rkmetrics.catalogue.actors import ActorKv, Actors, Phase
from tools.dashboards.base import Board, Row, heatmap, lines
from tools.dashboards.queries import Not, buckets, mean, quantile, rate, total

__all__ = ["BOARD"]

STARTUP, TASK = Actors.startup_phase_duration, Actors.user_task_duration

START = Row(
    "Startup",
    (
        lines(
            "Time of a startup",
            "s",
            "Time that a whole startup takes: half are faster than the median, one in twenty is slower than the 95th "
            "percentile, one in a hundred than the 99th. Empty while nothing starts.",
            (quantile(0.5, STARTUP, phase=Phase.TOTAL), "median"),
            (quantile(0.95, STARTUP, phase=Phase.TOTAL), "95th percentile"),
            (quantile(0.99, STARTUP, phase=Phase.TOTAL), "99th percentile"),
        ),
        lines(
            "Mean time by phase",
            "s",
            "Where a startup's time goes. Empty while nothing starts.",
            (mean(STARTUP, "phase", phase=Not(Phase.TOTAL)), "{{phase}}"),
        ),
        lines(
            "New or known",
            "cps",
            "Startups per second, by whether the actor starts for the first time and how it ended. unknown is a "
            "startup that failed before its state was loaded. Empty where no actor was ever started.",
            (rate(STARTUP, "is_new", "outcome", phase=Phase.TOTAL), "new: {{is_new}}, {{outcome}}"),
        ),
        lines(
            "Slow state and variables",
            "s",
            "95th percentile of the time that user code takes to create an actor's state and variables. Empty while "
            "nothing starts.",
            (quantile(0.95, Actors.create_state_duration), "state"),
            (quantile(0.95, Actors.create_vars_duration), "variables"),
            width=12,
        ),
        lines(
            "What keeps actors awake",
            "short",
            "Work that an actor does not sleep before: HTTP requests that it handles, and what user code or the "
            "runtime holds it awake for. Empty where neither was ever the case.",
            (total(Actors.http_requests_active), "HTTP requests"),
            (total(Actors.keep_awake_active, "kind"), "{{kind}}"),
            width=12,
        ),
    ),
)

WORK = Row(
    "Work",
    (
        lines(
            "Tasks by kind",
            "ops",
            "User tasks that end, per second, by what they ran for. Empty where none ever ran.",
            (rate(TASK, "kind"), "{{kind}}"),
        ),
        lines(
            "Slow tasks by kind",
            "s",
            "95th percentile of the time that user tasks take, by what they run for. Empty while nothing runs.",
            (quantile(0.95, TASK, "kind"), "{{kind}}"),
        ),
        lines(
            "Actions",
            "ops",
            "Actions that clients or a schedule called, per second, by how they ended. Empty where no actor was ever "
            "started.",
            (rate(Actors.action_calls, "outcome"), "{{outcome}}"),
        ),
        heatmap(
            "Task times",
            "s",
            "How long user tasks take, all kinds together. Empty while none has run.",
            buckets(TASK),
        ),
        lines(
            "Inbox depth",
            "short",
            "Messages that wait for the actors' own loops. One that stays high is a loop that something blocks. Empty "
            "where the program has no such loops.",
            (total(Actors.inbox_depth, "inbox"), "{{inbox}}"),
            width=12,
        ),
        lines(
            "Messages in and out",
            "ops",
            "Messages put into queues and taken from them, per second. Where sent stays above received, queues grow. "
            "Empty where no actor was ever started.",
            (rate(Actors.queue_sent), "sent"),
            (rate(Actors.queue_received), "received"),
        ),
        lines(
            "State writes",
            "ops",
            "Writes of actors' state per second, by what wrote. Empty where no actor was ever started.",
            (rate(Actors.state_mutation, "reason"), "{{reason}}"),
        ),
        lines(
            "Connections opened",
            "cps",
            "Connections to actors that are opened, per second. Many with few that stay open are clients that come "
            "back again and again. Empty where no actor was ever started.",
            (rate(Actors.connections), "opened"),
        ),
    ),
)

STOP = Row(
    "Shutdown",
    (
        lines(
            "Stops by reason",
            "cps",
            "Actors that end, per second. lost ones were collected as garbage without an end, which is a fault of the "
            "program. Empty where no actor was ever started.",
            (rate(Actors.stopped, "reason"), "{{reason}}"),
        ),
        lines(
            "Slow shutdowns",
            "s",
            "95th percentile of the time that a shutdown takes, by reason. Empty while nothing stops.",
            (quantile(0.95, Actors.shutdown_wait, "reason"), "{{reason}}"),
        ),
        lines(
            "Work that shutdowns wait for",
            "short",
            "Tasks that shutdowns of actors wait for now. Empty where no actor was ever started.",
            (total(Actors.shutdown_tasks_active), "tasks"),
        ),
        lines(
            "Shutdowns that time out",
            "cps",
            "Shutdowns that reached their deadline with work left, per second. Empty where no actor was ever started.",
            (rate(Actors.shutdown_timeout, "reason"), "{{reason}}"),
            width=12,
        ),
        lines(
            "What was left undone",
            "cps",
            "Subsystems that still had work when a shutdown stopped to wait for them, per second. Empty where no "
            "actor was ever started.",
            (
                rate(Actors.direct_subsystem_shutdown_warning, "subsystem", "operation"),
                "{{subsystem}} {{operation}}",
            ),
            width=12,
        ),
    ),
)

STORE = Row(
    "Key-value store",
    (
        lines(
            "Operations of the store",
            "ops",
            "Operations of the actors' key-value store per second. Empty where no actor uses it.",
            (rate(ActorKv.operation_duration, "op"), "{{op}}"),
        ),
        lines(
            "Slow operations of the store",
            "s",
            "95th percentile of the time that an operation takes, its transaction included. Empty while none is done.",
            (quantile(0.95, ActorKv.operation_duration, "op"), "{{op}}"),
        ),
        lines(
            "Keys per operation",
            "short",
            "Mean number of keys that an operation reads or writes. Empty while none is done.",
            (mean(ActorKv.keys_per_operation, "op"), "{{op}}"),
        ),
    ),
)

BOARD = Board(
    "actor",
    "Actor detail",
    "One actor name at a time: its startup by phase, its tasks, inboxes and queues, its shutdown.",
    (START, WORK, STOP, STORE),
    actors=(Actors.started.definition,),
)
