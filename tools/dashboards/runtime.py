"""Runtime and process: what keeps a process from doing its work."""

from __future__ import annotations

from rkmetrics.catalogue.exporter import Exporter
from rkmetrics.catalogue.runtime import Process, Runtime
from tools.dashboards.base import Board, Row, lines, table
from tools.dashboards.queries import highest, ours, quantile, rate, series, summed, total

__all__ = ["BOARD"]


def _each(operation: str, expr: str) -> str:
    return f"{operation} by (instance) ({ours(expr)})"


PROCESS = Row(
    "Process",
    (
        lines(
            "CPU cores",
            "short",
            "CPU time per second, by process. A Python process with one busy thread uses one core at most.",
            (_each("sum", f"rate({series(Process.cpu_seconds)}[$__rate_interval])"), "{{instance}}"),
        ),
        lines(
            "Memory",
            "bytes",
            "Memory that is in RAM, by process. A line that only rises is a leak, or a cache without a bound.",
            (_each("sum", series(Process.resident_memory)), "{{instance}}"),
        ),
        lines(
            "File descriptors",
            "percentunit",
            "Open file descriptors, of those that may be open. At 1 no connection can be taken. Empty where the "
            "system has no limit.",
            (
                f"{_each('sum', series(Process.open_fds))} / {_each('sum', series(Process.max_fds))}",
                "{{instance}}",
            ),
            full=False,
        ),
        lines(
            "Threads",
            "short",
            "Threads of each process: all of them, and those that Python knows. The others belong to native libraries.",
            (_each("sum", series(Process.threads)), "all {{instance}}"),
            (total(Runtime.threads, "instance"), "Python {{instance}}"),
            width=24,
        ),
        table(
            "Uptime",
            "s",
            "Time since each process started. A short one that nobody deployed is a crash; blue marks show when.",
            (f"sort({_each('max', f'time() - {series(Process.started)}')})", "uptime"),
            width=8,
            height=5,
        ),
        table(
            "Versions",
            "short",
            "Processes by version of rkmetrics and of its metric catalogue. More than one line is a rollout under way, "
            "or one that stopped half-way.",
            (f"count by (version, catalog) ({series(Exporter.build_info)})", "targets"),
            width=8,
            height=5,
        ),
        table(
            "Pythons",
            "short",
            "Processes by Python and by whether the native cells are in use; python cells mean that no compiler was "
            "there when it was installed.",
            (f"count by (implementation, version, cells) ({series(Runtime.info)})", "targets"),
            width=8,
            height=5,
        ),
    ),
)

LOOP = Row(
    "Event loop",
    (
        lines(
            "Lag over all processes",
            "s",
            "How late event loops run what is due: the median, and what one in a hundred exceeds. Empty where no loop "
            "is watched.",
            (quantile(0.5, Runtime.event_loop_lag), "median"),
            (quantile(0.99, Runtime.event_loop_lag), "99th percentile"),
        ),
        lines(
            "Lag by process",
            "s",
            "99th percentile of how late each process runs what is due. One line above the others is one process that "
            "something blocks. Empty where no loop is watched.",
            (quantile(0.99, Runtime.event_loop_lag, "instance"), "{{instance}}"),
        ),
        lines(
            "Loops that are blocked now",
            "s",
            "How long the loop that is furthest behind has been overdue by the time of the scrape; above zero only "
            "while it is blocked. Empty where no loop is watched.",
            (highest(Runtime.event_loop_overdue, "instance"), "{{instance}}"),
        ),
    ),
)

GARBAGE = Row(
    "Garbage collection",
    (
        lines(
            "Time that collections take",
            "percentunit",
            "Share of the time that Python stands still for garbage collections, by process.",
            (summed(Runtime.gc_pause, "instance"), "{{instance}}"),
            full=False,
        ),
        lines(
            "Long pauses",
            "s",
            "99th percentile of the time that a collection takes, by the oldest generation that it looks at. Empty "
            "while none was looked at.",
            (quantile(0.99, Runtime.gc_pause, "generation"), "generation {{generation}}"),
        ),
        lines(
            "Objects collected",
            "ops",
            "Objects per second that collections freed, and those that they found and could not free. Objects freed "
            "here are in cycles; the others go by themselves.",
            (rate(Runtime.gc_collected, "generation"), "freed, generation {{generation}}"),
            (rate(Runtime.gc_uncollectable), "could not be freed"),
        ),
    ),
)

BOARD = Board(
    "runtime",
    "Runtime and process",
    "CPU, memory, descriptors and threads of each process, its event loop, and Python's garbage collection.",
    (PROCESS, LOOP, GARBAGE),
)
