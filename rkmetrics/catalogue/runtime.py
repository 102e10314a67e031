"""The process and its Python runtime: `process_*` as every Prometheus client names them, and `rkmetrics_*`.

Declarations only; collectors/process.py, eventloop.py, gc.py and interpreter.py feed them.
"""

from __future__ import annotations

from rkmetrics.metricset import Counter, Gauge, Histogram, Info, MetricSet, OneOf, Registered

__all__ = ["Process", "Runtime"]


class Process(MetricSet, per_actor=False):
    """This process, as the operating system sees it (Prometheus, "Writing client libraries", "Process metrics")."""

    cpu_seconds = Counter("process_cpu_seconds_total", "User and system CPU time that the process has used.")
    resident_memory = Gauge("process_resident_memory_bytes", "Memory of the process that is in RAM.", across="sum")
    virtual_memory = Gauge("process_virtual_memory_bytes", "Address space of the process.", across="sum")
    open_fds = Gauge("process_open_fds", "File descriptors that are open (handles on Windows).", across="max")
    max_fds = Gauge("process_max_fds", "File descriptors that may be open.", across="min")
    threads = Gauge("process_threads", "Threads of the process, with those that Python does not know.", across="sum")
    started = Gauge("process_start_time_seconds", "When the process started, in Unix time.", across="min")


class Runtime(MetricSet, per_actor=False):
    """The Python runtime: what may keep a process from doing its work while the machine is idle."""

    event_loop_lag = Histogram(
        "rkmetrics_event_loop_lag_seconds",
        "How late an event loop runs what is due; what blocks the loop shows here.",
        buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    )
    event_loop_overdue = Gauge(
        "rkmetrics_event_loop_overdue_seconds",
        "How long the event loop that is furthest behind has been overdue by now; above 0 only while it is blocked.",
        across="max",
    )
    gc_pause = Histogram(
        "rkmetrics_gc_pause_seconds",
        "Time that Python stood still for a garbage collection, by the oldest generation it looked at.",
        buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
        generation=OneOf("0", "1", "2"),
    )
    gc_collected = Counter(
        "rkmetrics_gc_collected_objects_total",
        "Objects that garbage collections freed.",
        generation=OneOf("0", "1", "2"),
    )
    gc_uncollectable = Counter(
        "rkmetrics_gc_uncollectable_objects_total",
        "Objects that garbage collections found and could not free.",
        generation=OneOf("0", "1", "2"),
    )
    threads = Gauge("rkmetrics_threads", "Threads that Python knows.", across="sum")
    info = Info(
        "rkmetrics_python_info",
        "The Python that runs: its implementation and version, and which cells it uses.",
        implementation=Registered("name of the Python implementation"),
        version=Registered("version of Python"),
        cells=Registered("c or python"),
    )
