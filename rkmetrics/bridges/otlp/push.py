"""The pusher: a daemon thread that delivers snapshots, and what others may ask of it.

The service pays nothing: collecting, translating and sending happen in the thread, callers of flush and shutdown wait
for no longer than they say, and a hanging receiver holds up the thread alone. At exit there is one last push, within
EXIT_SECONDS.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from rkmetrics.bridges.otlp.answers import Answer
from rkmetrics.bridges.otlp.exporters import ExporterLink, Link, load, missing_extra, open_grpc, open_http, quiet
from rkmetrics.bridges.otlp.settings import PROTOCOLS, TEMPORALITIES, OtlpSettings
from rkmetrics.catalogue.otlp import Otlp, Outcome
from rkmetrics.lifetime import EXIT_SECONDS, PROCESS, Hooks

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    from rkmetrics.bridges.otlp.delivery import Delivery, Schedule
    from rkmetrics.model import MetricFamily
    from rkmetrics.registry import Registry

__all__ = ["EXIT_SECONDS", "Pusher"]

logger = logging.getLogger("rkmetrics")

_OPEN: Mapping[str, Callable[[float], Link]] = {"http/protobuf": open_http, "grpc": open_grpc}


class Pusher:
    """Pushes a registry's snapshots to an OTLP receiver.

    What is not given comes from OTEL_* variables (docs/otlp.md), else from the specification's defaults.
    exporter: one in place of OpenTelemetry's OTLP ones, or a function that makes one (called again after a failure, and
    in a forked child).
    interval_seconds: math.inf pushes on flush and shutdown only. resource: attributes beside those of the environment.
    Raises MissingExtraError without the extra `otlp`, SettingsError for a bad variable, ValueError for a bad argument.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        exporter: MetricExporter | Callable[[], MetricExporter] | None = None,
        protocol: str | None = None,
        interval_seconds: float | None = None,
        timeout_seconds: float | None = None,
        temporality: str | None = None,
        resource: Mapping[str, str | bool | int | float] | None = None,
    ) -> None:
        with missing_extra("OTLP push"):
            from opentelemetry.sdk.util import instrumentation

            from rkmetrics.bridges.otlp.delivery import Delivery, Schedule, StateLog

        given: dict[str, Any] = {
            "protocol": protocol,
            "interval_seconds": interval_seconds,
            "timeout_seconds": timeout_seconds,
            "temporality": temporality,
        }
        from_env = OtlpSettings.from_env(os.environ)
        self.settings = _checked(
            replace(from_env, **{name: value for name, value in given.items() if value is not None})
        )
        if exporter is None:
            load(self.settings.protocol)
        self._registry, self._exporter = registry, exporter
        self._identity = _Identity(resource or {})
        self._make_schedule: Callable[[], Schedule] = partial(Schedule, self.settings.interval_seconds)
        self._log = StateLog()
        self._delivery: Delivery = Delivery(
            registry.collect,
            self._connect,
            registry.bind(Otlp),
            temporality=self.settings.temporality,
            resource=self._identity.resource,
            scope=_scope(instrumentation),
            start=time.time_ns(),
        )
        self._reset()
        self._stop_by = math.inf
        self._connected = False
        self._abandoned: list[Link | None] = []
        self._unhook: Callable[[], None] = lambda: None

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._asked = self._settled = 0  # numbers of flushes: asked for, and settled
        self._urgent = self._ended = self._settled_well = False
        self._schedule = self._make_schedule()

    def _connect(self) -> Link:
        """Make an exporter. The first may log what it finds wrong in the environment, later ones not again."""
        with quiet() if self._connected else nullcontext():
            self._connected = True
            return self._make_link(self.settings.timeout_seconds)

    def _make_link(self, timeout: float) -> Link:
        if self._exporter is None:
            return _OPEN[self.settings.protocol](timeout)
        lasting = hasattr(self._exporter, "export") and not isinstance(self._exporter, type)
        exporter: Any = self._exporter
        return ExporterLink(exporter if lasting else exporter(), timeout, renewable=not lasting)

    # --- what others ask ----------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start pushing; the first push comes within the interval. Idempotent; does nothing after shutdown."""
        if self.settings.disabled:
            logger.warning("OTLP push is off: OTEL_SDK_DISABLED is true")
            return self
        with self._changed:
            if self._thread is None and self._stop_by == math.inf:
                self._identity.resource()  # made before a fork, so that a child knows what its own must differ from
                self._begin(self._run)
                self._unhook = PROCESS.add(Hooks(self._ask_to_stop, self.shutdown, self._go_on_in_child))
        return self

    def flush(self, timeout_seconds: float = 5.0) -> bool:
        """Push now, and answer whether the receiver took all that was counted before the call.

        Tries again within the time where that may help, and keeps a Retry-After. Starts the thread if need be. False
        after shutdown, and in the pusher's own thread.
        """
        self.start()
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            if self._thread is None or self._thread is threading.current_thread() or self._stop_by < math.inf:
                return False
            self._asked += 1
            ticket, self._urgent = self._asked, True
            self._changed.notify_all()
            while self._settled < ticket and not self._ended:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return self._settled >= ticket and self._settled_well

    def shutdown(self, timeout_seconds: float = 5.0) -> bool:
        """Push a last time and stop, within the time, whatever the receiver does. Answers whether it took all."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            thread = self._thread
            self._ask_to_stop(deadline)
        self._unhook()
        if thread is None or thread is threading.current_thread():
            return self._settled_well
        # A tenth of the time is kept for ending a request that hangs, so that no thread is left behind.
        thread.join(timeout_seconds * 0.9)
        if thread.is_alive():
            self._delivery.close()
            thread.join(max(deadline - time.monotonic(), 0.0))
        return self._settled_well and not thread.is_alive()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    @property
    def instance_id(self) -> str:
        """The service.instance.id of this process."""
        return str(self._identity.resource().attributes["service.instance.id"])

    def __repr__(self) -> str:
        state = "stopped" if self._stop_by < math.inf else "running" if self._thread else "not started"
        return f"<Pusher: {self.settings.protocol}, every {self.settings.interval_seconds:g} s, {state}>"

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _begin(self, run: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=run, name="rkmetrics-otlp", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _suppress_instrumentation()
        schedule = self._schedule
        schedule.begin(time.monotonic())
        more, answer = True, Answer(Outcome.OK)
        while more:
            ticket = self._wait()
            if ticket is None:
                break
            was_failing = self._delivery.failed_attempts > 0
            answer = self._delivery.attempt(time.time_ns())
            schedule.after(answer, time.monotonic())
            if self._stop_by == math.inf:  # the end has a line of its own
                self._log.note(answer, time.monotonic())
            more = self._settle(ticket, answer, was_failing)
        self._end(answer)

    def _wait(self) -> int | None:
        """Wait until there is something to do; the number of the last flush asked for. None to end without a push."""
        schedule = self._schedule
        with self._changed:
            while True:
                now = time.monotonic()
                stopping = self._stop_by < math.inf
                if stopping and max(schedule.not_before, now) >= self._stop_by:
                    self._settled_well = False
                    return None
                due = schedule.not_before if stopping or self._urgent else schedule.due
                if now >= due:
                    self._urgent = False
                    return self._asked
                self._changed.wait(None if due == math.inf else min(due - now, threading.TIMEOUT_MAX))

    def _settle(self, ticket: int, answer: Answer, was_failing: bool) -> bool:
        """Tell who waits; answer whether to go on. At the end, only a receiver that was well is worth a retry."""
        with self._changed:
            self._settled_well = answer.good
            if not answer.rule.retry:
                self._settled = max(self._settled, ticket)
            self._changed.notify_all()
            if self._stop_by == math.inf:
                return True
            again = answer.rule.retry and not was_failing and self._schedule.due < self._stop_by
            self._schedule.not_before = max(self._schedule.not_before, self._schedule.due)
            return again

    def _end(self, answer: Answer) -> None:
        self._delivery.close()
        if not self._settled_well:
            logger.warning("OTLP push ends, and its last data are not delivered (%s)", answer.detail or answer.outcome)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # --- exit and fork ------------------------------------------------------------------------------------------------

    def _ask_to_stop(self, deadline: float) -> None:
        with self._changed:
            self._stop_by = min(self._stop_by, deadline)
            self._changed.notify_all()

    def _go_on_in_child(self) -> None:
        """In the child: no thread has come along, locks may be held by nobody, and the link is the parent's."""
        self._abandoned.append(self._delivery.abandon())  # kept, as being collected could close it
        self._identity.renew()
        self._reset()
        if self._stop_by == math.inf:
            # Copied here, before the child can count anything: what it counts later must not pass for its parent's.
            self._begin(partial(self._run_in_child, self._registry.snapshot()))

    def _run_in_child(self, inherited: tuple[MetricFamily, ...]) -> None:
        try:
            self._delivery.restart(time.time_ns(), inherited)
        except Exception:
            logger.exception("OTLP push does not go on in this forked process")
            return
        self._run()


class _Identity:
    """The resource: made in the thread when first needed, and again with another instance id in a forked child."""

    def __init__(self, attributes: Mapping[str, str | bool | int | float]) -> None:
        self._attributes = dict(attributes)
        self._resource: Resource | None = None
        self._parent_id: object = None

    def resource(self) -> Resource:
        from opentelemetry.sdk.resources import Resource

        if self._resource is None:
            made = Resource.create({**self._attributes, "process.pid": os.getpid()})
            known = made.attributes.get("service.instance.id")
            if not known or known == self._parent_id:  # an SDK that makes none, or a pinned one: two streams, two ids
                made = made.merge(Resource({"service.instance.id": str(uuid4())}))
            self._resource = made
        return self._resource

    def renew(self) -> None:
        if self._resource is not None:
            self._parent_id, self._resource = self._resource.attributes.get("service.instance.id"), None


def _checked(settings: OtlpSettings) -> OtlpSettings:
    for name, words in (("protocol", PROTOCOLS), ("temporality", TEMPORALITIES)):
        if getattr(settings, name) not in words:
            raise ValueError(f"{name}={getattr(settings, name)!r}: expected one of: {', '.join(words)}")
    if not settings.interval_seconds > 0:
        raise ValueError(f"interval_seconds={settings.interval_seconds!r}: expected more than 0")
    if not 0 < settings.timeout_seconds < math.inf:
        raise ValueError(f"timeout_seconds={settings.timeout_seconds!r}: expected more than 0 and finite")
    return settings


def _scope(instrumentation: Any) -> InstrumentationScope:
    from rkmetrics import catalogue

    scope: InstrumentationScope = instrumentation.InstrumentationScope("rkmetrics", catalogue.version())
    return scope


def _suppress_instrumentation() -> None:
    """Keep OpenTelemetry's instrumentation of requests and gRPC from tracing what this thread sends."""
    from opentelemetry import context

    key = getattr(context, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation")
    attach: Any = context.attach
    attach(context.set_value(key, True))
