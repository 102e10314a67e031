"""Fleet overview: all actors of the selected jobs at a glance. Where an incident begins."""

from __future__ import annotations

from rkmetrics.catalogue.actors import Actors, Outcome, Phase, StartupOutcome
from rkmetrics.catalogue.runtime import Process
from tools.dashboards.base import Board, Row, heatmap, lines, stat, table
from tools.dashboards.queries import (
    Not,
    buckets,
    increase,
    ours,
    quantile,
    rate,
    scraped,
    series,
    share,
    total,
)

__all__ = ["BOARD"]

UP = ours(scraped("up"), ever=True)
STARTUP, TASK = Actors.startup_phase_duration, Actors.user_task_duration
RED = ((0.95, "orange"), (0.99, "green"))

STATE = Row(
    "State",
    (
        stat(
            "Targets up",
            "short",
            "Processes that Prometheus reaches now, of those that were seen within the time that the dashboard shows.",
            (f"sum({UP})", "up"),
            width=4,
            base="red",
            steps=((1, "green"),),
            no_value="no target",
        ),
        stat(
            "Targets down",
            "short",
            "Processes that were seen within the time that the dashboard shows and are not reached now. A process that "
            "was taken out of the configuration is not counted.",
            (f"sum(1 - {UP})", "down"),
            width=4,
            steps=((1, "red"),),
            no_value="no target",
        ),
        stat(
            "Actors that run",
            "short",
            "Actors that run now, over all processes.",
            (total(Actors.active_count), "actors"),
            width=4,
            base="text",
            no_value="no actors",
        ),
        stat(
            "Startups that succeed",
            "percentunit",
            "Startups that succeeded, of all within the time that the dashboard shows. Empty while nothing starts.",
            (
                share(
                    increase(STARTUP, phase=Phase.TOTAL, outcome=StartupOutcome.SUCCESS),
                    increase(STARTUP, phase=Phase.TOTAL),
                ),
                "success",
            ),
            width=4,
            base="red",
            steps=RED,
            no_value="no startup",
        ),
        stat(
            "Tasks without error",
            "percentunit",
            "User tasks that did not err, of all within the time that the dashboard shows; a cancelled task is no "
            "error. Empty while nothing runs.",
            (share(increase(TASK, outcome=Not(Outcome.ERROR)), increase(TASK)), "without error"),
            width=4,
            base="red",
            steps=RED,
            no_value="no task",
        ),
        stat(
            "Firing alerts",
            "short",
            "Alerts of rkmetrics that fire now, with a job that is selected or with none.",
            ('count(ALERTS{job=~"$job|", alertname=~"RkMetrics.*", alertstate="firing"}) or vector(0)', "firing"),
            width=4,
            steps=((1, "red"),),
        ),
    ),
)

ACTORS = Row(
    "Actors",
    (
        lines(
            "Actors by name",
            "short",
            "Actors that run, and the most that ran at once within two minutes: what comes and goes between two "
            "scrapes shows in the peak only. Empty where no actor was ever started.",
            (total(Actors.active_count, "actor_name"), "{{actor_name}}"),
            (total(Actors.active_peak, "actor_name"), "peak of {{actor_name}}"),
        ),
        lines(
            "Starts and stops",
            "cps",
            "Actors that start and end, per second. Lines that part mean that a fleet grows or shrinks. Empty where no "
            "actor was ever started.",
            (rate(Actors.started, "actor_name"), "start {{actor_name}}"),
            (rate(Actors.stopped, "actor_name"), "stop {{actor_name}}"),
        ),
        lines(
            "Slow startups",
            "s",
            "95th percentile of the time that a whole startup takes, by actor name. Empty while nothing starts.",
            (quantile(0.95, STARTUP, "actor_name", phase=Phase.TOTAL), "{{actor_name}}"),
        ),
        lines(
            "Startups that fail",
            "cps",
            "Startups that were left by an exception or given up, per second. Empty while nothing has started.",
            (
                rate(STARTUP, "actor_name", phase=Phase.TOTAL, outcome=StartupOutcome.ERROR),
                "{{actor_name}}",
            ),
            width=12,
        ),
        heatmap(
            "Startup times",
            "s",
            "How long startups take, all names together. Two bands are two kinds of startups: new actors and sleeping "
            "ones, most often. Empty while nothing has started.",
            buckets(STARTUP, phase=Phase.TOTAL),
        ),
    ),
)

LOAD = Row(
    "Load",
    (
        lines(
            "Connections",
            "short",
            "Connections to actors that are open. Empty where there was never one.",
            (total(Actors.connections_active, "actor_name"), "{{actor_name}}"),
        ),
        lines(
            "Queue depth",
            "short",
            "Messages that wait in the queues of running actors. A line that only rises is a fleet that is too slow "
            "for its work. Empty where no actor with a queue was ever started.",
            (total(Actors.queue_depth, "actor_name"), "{{actor_name}}"),
        ),
        lines(
            "User tasks that run",
            "short",
            "User code that runs now, by what it runs for. Empty where none ever ran.",
            (total(Actors.user_tasks_active, "kind"), "{{kind}}"),
        ),
        lines(
            "Slow tasks",
            "s",
            "99th percentile of the time that user tasks take, by actor name. Empty while nothing runs.",
            (quantile(0.99, TASK, "actor_name"), "{{actor_name}}"),
        ),
        lines(
            "Tasks that err",
            "percentunit",
            "User tasks that erred, of all that ended, by actor name. Empty while none ends.",
            (
                share(rate(TASK, "actor_name", outcome=Outcome.ERROR), rate(TASK, "actor_name")),
                "{{actor_name}}",
            ),
            full=False,
        ),
        table(
            "Busiest targets",
            "short",
            "The ten processes with the most actors, the messages that wait there, and the CPU cores that they use.",
            (f"topk(10, {total(Actors.active_count, 'instance')})", "actors"),
            (total(Actors.queue_depth, "instance"), "messages that wait"),
            (f"sum by (instance) ({ours(f'rate({series(Process.cpu_seconds)}[$__rate_interval])')})", "CPU cores"),
            width=8,
        ),
    ),
)

BOARD = Board(
    "fleet",
    "Fleet overview",
    "All actors of the selected jobs: how many, how fast they start, how often they fail.",
    (STATE, ACTORS, LOAD),
    actors=(Actors.started.definition,),
)
