"""The life of actors, counted right: running, startup, tasks, connections, shutdown.

    actor = registry.actor("lobby")
    with actor.running(actor_id="room-81f") as run:
        with run.startup(is_new=True) as startup:
            with startup.phase("load_persisted"): ...
        async with run.task("action"): ...

Whatever these helpers count begins once and ends once: by the end of a block, by end(), by an exception or a
cancellation, or by being collected as garbage. What one instance adds to a gauge is a GaugeShare, withdrawn when the
instance ends; what it reports later is ignored. Nothing here takes a lock: a state changes by one attribute or one
dictionary operation, which CPython does whole, so an end in a finaliser, a signal handler or another thread is an end
like any other.

An `actor_id` is never a label. It goes with observations as an exemplar.
"""

# The classes below are one mechanism: a guard ends in its run, a run in its actor.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from enum import StrEnum
from time import perf_counter
from types import TracebackType
from typing import ParamSpec, Self, TypeVar, cast
from weakref import WeakSet, ref

from rkmetrics.catalogue.actors import (
    ActorKv,
    Actors,
    Inbox,
    IsNew,
    KeepAwake,
    KvOp,
    Operation,
    Outcome,
    Phase,
    ShutdownReason,
    StartupOutcome,
    StateWrite,
    StopReason,
    Subsystem,
    TaskKind,
)
from rkmetrics.cells import CounterCell, GaugeCell, GaugeShare, HistogramCell
from rkmetrics.definition import OTHER
from rkmetrics.wrapping import inside

__all__ = ["ActorMetrics", "Guard", "Held", "KvOperation", "PhaseTimer", "Run", "Shutdown", "Startup", "Task"]

P = ParamSpec("P")
R = TypeVar("R")
Labels = Mapping[str, str]

# A guard's start time, before it began and after it ended; perf_counter() is more than 0.
_NEW, _ENDED = 0.0, -1.0

# Fast tasks hand an exemplar on at most this often, as it costs a third of the task. Slow ones always do: people look
# for theirs.
_EXEMPLAR_SECONDS, _SLOW_SECONDS = 0.1, 0.001

# Startup phases that have a family of their own as well.
_CREATES: Mapping[str, Callable[[Actors], HistogramCell]] = {
    Phase.CREATE_STATE: lambda cells: cells.create_state_duration,
    Phase.CREATE_VARS: lambda cells: cells.create_vars_duration,
}
_DRAINS: Mapping[str, Operation] = {
    ShutdownReason.DESTROY: Operation.DESTROY_DRAIN,
    ShutdownReason.SLEEP: Operation.SLEEP_DRAIN,
}
# Kinds of tasks that are calls of actions.
_ACTIONS = frozenset({TaskKind.ACTION, TaskKind.SCHEDULED_ACTION})


class _Lost(BaseException):
    """Stands for the end of what was dropped without one."""


class _Failed(Exception):
    """Stands for the exception where fail() was called and none was raised."""


_LOST, _FAILED = _Lost(), _Failed()


def _is_error(error: BaseException) -> bool:
    """Whether an exception is a failure. Cancellation is none, in asyncio or trio, nor is what ends the program."""
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).subgroup(Exception) is not None
    return isinstance(error, Exception)


def _declared(values: type[StrEnum], value: str) -> str:
    return value if value in values._value2member_map_ else OTHER


def _exemplar(actor_id: object) -> Labels | None:
    return None if actor_id is None else {"actor_id": str(actor_id)}


class Guard:
    """Something that begins once and ends once: by `with`, `async with`, or begin() and end().

    What began and is dropped ends when it is collected.
    """

    __slots__ = ("__weakref__", "_failed", "_start")

    def __init__(self) -> None:
        self._start, self._failed = _NEW, False

    def begin(self) -> Self:
        """What entering the block does. Raises RuntimeError the second time."""
        self._once()
        # The start comes first: an exception of a signal handler finds a guard that ends when it is dropped.
        self._start = perf_counter()
        self._began()
        return self

    def end(self, error: BaseException | None = None) -> bool:
        """What leaving the block does, by `error` or without one. False when it has not begun, or has ended."""
        start = self._start
        if start <= _NEW:
            return False
        self._start = _ENDED
        self._finish(perf_counter() - start, _FAILED if error is None and self._failed else error)
        return True

    def fail(self) -> None:
        """Let it end as an error although no exception leaves it."""
        self._failed = True

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._start == _ENDED

    def _once(self) -> None:
        if self._start != _NEW:
            raise RuntimeError(f"this {type(self).__name__} was begun before; make one for each use")

    def _began(self) -> None:
        """Count the beginning."""

    def _finish(self, seconds: float, error: BaseException | None) -> None:
        """Count the end."""

    def __enter__(self) -> Self:
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)

    async def __aenter__(self) -> Self:
        return self.begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)

    def __del__(self) -> None:
        try:
            begun = self._start > _NEW
        except AttributeError:  # an exception of a signal handler came before __init__
            return
        if begun:
            self.end(_LOST)


class _Plan:
    """The methods that one kind of task calls, looked up once: (observe, count) for each outcome."""

    __slots__ = ("cancelled", "enter", "error", "kind", "leave", "next_exemplar", "success")

    def __init__(self, cells: Actors, kind: str, active: GaugeShare) -> None:
        self.kind, self.enter, self.leave = kind, active.inc, active.dec
        self.next_exemplar = 0.0
        counted = kind in _ACTIONS
        # All outcomes, so that the first error of a kind that ran before is a rise from 0.
        self.success, self.error, self.cancelled = (
            (cells.user_task_duration[kind, outcome].observe, cells.action_calls[outcome].inc if counted else None)
            for outcome in Outcome
        )


class _Scope:
    """Where tasks and startups belong: to all actors of a name, or to one that runs. It holds its parts of gauges."""

    __slots__ = ()

    cells: Actors
    _shares: dict[GaugeCell, GaugeShare]
    _plans: dict[str, _Plan]

    def _share(self, cell: GaugeCell) -> GaugeShare:
        share = self._shares.get(cell)
        return share if share is not None else self._shares.setdefault(cell, cell.share())

    def _plan(self, kind: str) -> _Plan:
        active = self.cells.user_tasks_active[kind]  # counts a kind that nobody declared, or raises
        name = _declared(TaskKind, kind)
        plan = self._plans.get(name)
        return plan or self._plans.setdefault(name, _Plan(self.cells, name, self._share(active)))


class Task(Guard):
    """A piece of user code that runs: user_tasks_active, user_task_duration_seconds{kind, outcome}, action_calls_total.

    Also a decorator of functions, coroutine functions and generator functions: each call is a task.
    """

    __slots__ = ("_exemplar", "_plan", "_scope")

    def __init__(self, scope: _Scope, plan: _Plan, exemplar: Labels | None) -> None:
        self._start, self._failed = _NEW, False
        self._scope, self._plan, self._exemplar = scope, plan, exemplar

    def begin(self) -> Self:
        """What entering the block does. Raises RuntimeError the second time."""
        if self._start:
            self._once()
        self._start = perf_counter()
        self._plan.enter()
        return self

    __enter__ = begin

    def end(self, error: BaseException | None = None) -> bool:
        """What leaving the block does, by `error` or without one. False when it has not begun, or has ended."""
        start = self._start
        if start <= _NEW:
            return False
        self._start = _ENDED
        plan = self._plan
        plan.leave()
        now = perf_counter()
        seconds = now - start
        if error is None and not self._failed:
            observe, count = plan.success
        else:
            observe, count = plan.error if error is None or _is_error(error) else plan.cancelled
        exemplar = self._exemplar
        if exemplar is None or (seconds < _SLOW_SECONDS and now < plan.next_exemplar):
            observe(seconds)
        else:
            plan.next_exemplar = now + _EXEMPLAR_SECONDS
            observe(seconds, exemplar=exemplar)
        if count is not None:
            count()
        return True

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        scope, kind, exemplar = self._scope, self._plan.kind, self._exemplar

        # The plan is looked up at each call: a worker process that was forked has plans of its own.
        def task() -> Task:
            return Task(scope, scope._plans.get(kind) or scope._plan(kind), exemplar)

        return inside(task, function)


class Startup(Guard):
    """A startup: startup_phase_duration_seconds, for each phase and in total.

    is_new: True, False, or None while it is not known; set it as soon as it is. What ends before counts as "unknown".
    """

    __slots__ = ("_cells", "_exemplar", "is_new")

    def __init__(self, cells: Actors, is_new: bool | None, exemplar: Labels | None) -> None:
        super().__init__()
        self._cells, self.is_new, self._exemplar = cells, is_new, exemplar

    def phase(self, name: Phase | str) -> PhaseTimer:
        """A part of the startup. create_state and create_vars count in their own families as well, when they succeed.

        Raises ValueError for "total", which this startup measures itself.
        """
        if name == Phase.TOTAL:
            raise ValueError("the phase 'total' is measured by the startup itself")
        known = _declared(Phase, name)
        if known != name:  # counts it, or raises
            _ = self._cells.startup_phase_duration[name, self._is_new(), StartupOutcome.SUCCESS]
        return PhaseTimer(self, known)

    def _is_new(self) -> IsNew:
        if self.is_new is None:
            return IsNew.UNKNOWN
        return IsNew.TRUE if self.is_new else IsNew.FALSE

    def _observe(self, phase: str, seconds: float, error: BaseException | None) -> None:
        durations, is_new = self._cells.startup_phase_duration, self._is_new()
        # Both outcomes, so that the first error after a success is a rise from 0.
        success, failure = (durations[phase, is_new, outcome] for outcome in StartupOutcome)
        if error is not None:
            failure.observe(seconds, exemplar=self._exemplar)
            return
        success.observe(seconds, exemplar=self._exemplar)
        if phase in _CREATES:
            _CREATES[phase](self._cells).observe(seconds, exemplar=self._exemplar)

    def _finish(self, seconds: float, error: BaseException | None) -> None:
        self._observe(Phase.TOTAL, seconds, error)


class PhaseTimer(Guard):
    """One phase of a startup."""

    __slots__ = ("_phase", "_startup")

    def __init__(self, startup: Startup, phase: str) -> None:
        super().__init__()
        self._startup, self._phase = startup, phase

    def _finish(self, seconds: float, error: BaseException | None) -> None:
        self._startup._observe(self._phase, seconds, error)


class Held(Guard):
    """One connection, request or piece of work, while it counts in a gauge of its actor."""

    __slots__ = ("_opened", "_share")

    def __init__(self, share: GaugeShare, opened: CounterCell | None = None) -> None:
        super().__init__()
        self._share, self._opened = share, opened

    def _began(self) -> None:
        self._share.inc()
        if self._opened is not None:
            self._opened.inc()

    def _finish(self, seconds: float, error: BaseException | None) -> None:
        self._share.dec()


class Shutdown(Guard):
    """The shutdown of one actor: shutdown_wait_seconds{reason}; when it is left, the actor's stop has that reason.

    A TimeoutError that leaves the block counts as timed_out().
    """

    __slots__ = ("_reason", "_run", "_stopped", "_timed_out")

    def __init__(self, run: Run, reason: ShutdownReason | str) -> None:
        super().__init__()
        cells = run.cells
        _ = cells.shutdown_wait[reason]  # counts a reason that nobody declared, or raises
        self._run, self._reason, self._timed_out = run, _declared(ShutdownReason, reason), False
        self._stopped = cells.stopped[self._reason]

    def timed_out(self) -> None:
        """The deadline came with work left: shutdown_timeout_total{reason}, once."""
        if not self._timed_out:
            self._timed_out = True
            self._run.cells.shutdown_timeout[self._reason].inc(exemplar=self._run._exemplar)

    def undrained(self, subsystem: Subsystem | str) -> None:
        """Nobody waits for a subsystem any longer: direct_subsystem_shutdown_warning_total{subsystem, operation}."""
        operation = _DRAINS.get(self._reason, OTHER)
        self._run.cells.direct_subsystem_shutdown_warning[subsystem, operation].inc(exemplar=self._run._exemplar)

    def _finish(self, seconds: float, error: BaseException | None) -> None:
        self._run.cells.shutdown_wait[self._reason].observe(seconds, exemplar=self._run._exemplar)
        if isinstance(error, TimeoutError):
            self.timed_out()
        if error is None or isinstance(error, TimeoutError):
            self._run._stopping = self._stopped


class Run(Guard, _Scope):
    """One actor while it runs: started_total, active_count, stopped_total{reason}; and its parts of the gauges.

    The reason is what stop() or a finished shutdown() said; otherwise "finished", "error" or "cancelled", as its block
    is left, or "lost" when it is collected without an end. Its end withdraws all its parts; what it reports later is
    ignored.
    """

    __slots__ = ("_exemplar", "_plans", "_shares", "_stopping", "actor", "actor_id", "cells")

    def __init__(self, actor: ActorMetrics, actor_id: str | None) -> None:
        super().__init__()
        self.actor, self.actor_id = actor, actor_id
        self.cells, self._exemplar = actor.cells, _exemplar(actor_id)
        self._stopping: CounterCell | None = None
        self._shares: dict[GaugeCell, GaugeShare] = {}
        self._plans: dict[str, _Plan] = {}

    def stop(self, reason: StopReason | str) -> bool:
        """End it now, for this reason. False when it has ended. Raises RuntimeError when it has not begun."""
        self._must_have_begun()
        if self._start == _ENDED:
            return False
        self._stopping = self.cells.stopped[reason]
        return self.end()

    # --- what it does -------------------------------------------------------------------------------------------------

    def startup(self, is_new: bool | None = None) -> Startup:
        """Its startup, total and phases."""
        return Startup(self.cells, is_new, self._exemplar)

    def task(self, kind: TaskKind | str) -> Task:
        """A piece of its user code. Counts as running until it ends or the actor does."""
        plan = self._plans.get(kind)
        return Task(self, plan or self._plan(kind), self._exemplar)

    def shutdown(self, reason: ShutdownReason | str) -> Shutdown:
        """Its shutdown: what it waits for before it stops."""
        return Shutdown(self, reason)

    def connection(self) -> Held:
        """One open connection: connections_active, connections_total."""
        return Held(self.connections_active, self.cells.connections)

    def http_request(self) -> Held:
        """One HTTP request that it handles: http_requests_active."""
        return Held(self.http_requests_active)

    def keep_awake(self, kind: KeepAwake | str = KeepAwake.KEEP_AWAKE) -> Held:
        """Work that keeps it awake: keep_awake_active{kind}."""
        return Held(self.keep_awake_active(kind))

    def shutdown_task(self) -> Held:
        """Work that its shutdown waits for: shutdown_tasks_active."""
        return Held(self.shutdown_tasks_active)

    # --- its parts of the gauges, for what is known as a number -------------------------------------------------------

    @property
    def queue_depth(self) -> GaugeShare:
        """Messages that wait in its queue: `run.queue_depth.set(len(queue))`."""
        return self._share(self.cells.queue_depth)

    def inbox_depth(self, inbox: Inbox | str) -> GaugeShare:
        """Messages that wait for its loop: `run.inbox_depth("dispatch").set(3)`."""
        return self._share(self.cells.inbox_depth[inbox])

    @property
    def connections_active(self) -> GaugeShare:
        """Its open connections, where they are not counted by connection()."""
        return self._share(self.cells.connections_active)

    @property
    def http_requests_active(self) -> GaugeShare:
        """Its HTTP requests, where they are not counted by http_request()."""
        return self._share(self.cells.http_requests_active)

    def keep_awake_active(self, kind: KeepAwake | str) -> GaugeShare:
        """Work that keeps it awake, where it is not counted by keep_awake()."""
        return self._share(self.cells.keep_awake_active[kind])

    @property
    def shutdown_tasks_active(self) -> GaugeShare:
        """Work that its shutdown waits for, where it is not counted by shutdown_task()."""
        return self._share(self.cells.shutdown_tasks_active)

    # --- beginning and end --------------------------------------------------------------------------------------------

    def _began(self) -> None:
        self._share(self.cells.active_count).inc()
        self.cells.started.inc()
        self.actor._runs[id(self)] = ref(self)

    def _finish(self, seconds: float, error: BaseException | None) -> None:
        self._withdraw()
        self._stopped(error).inc(exemplar=self._exemplar)

    def _stopped(self, error: BaseException | None) -> CounterCell:
        stopped = self.cells.stopped
        if error is _LOST:
            return stopped[StopReason.LOST]
        if error is not None and _is_error(error):
            return stopped[StopReason.ERROR]
        # A cancellation that ran into a shutdown does not change what the actor stopped for.
        return self._stopping or stopped[StopReason.FINISHED if error is None else StopReason.CANCELLED]

    def _must_have_begun(self) -> None:
        if self._start == _NEW:
            raise RuntimeError(f"{self!r} has not begun: enter it (`with actor.running() as run`), or call begin()")

    def _share(self, cell: GaugeCell) -> GaugeShare:
        self._must_have_begun()
        share = super()._share(cell)
        if self._start == _ENDED:  # after the look, as the end may have come meanwhile
            share.close()
        return share

    def _withdraw(self) -> None:
        """Take its parts out of the gauges, for good."""
        self._start = _ENDED
        self.actor._runs.pop(id(self), None)
        for share in list(self._shares.values()):
            share.close()

    def __repr__(self) -> str:
        state = "new" if self._start == _NEW else "ended" if self.ended else "running"
        return f"<Run of {self.actor.name!r}, actor_id={self.actor_id!r}, {state}>"


class KvOperation(Guard):
    """One operation of the actors' key-value store. keys: how many it read or wrote, once that is known."""

    __slots__ = ("_duration", "_keys", "keys")

    def __init__(self, cells: ActorKv, op: KvOp | str, keys: int | None) -> None:
        super().__init__()
        self._duration = cells.operation_duration[op]
        self._keys = cells.keys_per_operation[_declared(KvOp, op)]
        self.keys = keys

    def _finish(self, seconds: float, error: BaseException | None) -> None:
        self._duration.observe(seconds)
        if self.keys is not None:
            self._keys.observe(self.keys)


class ActorMetrics(_Scope):
    """The metrics of all actors of one name: `registry.actor("lobby")`.

    queue_sent, queue_received: counters of messages, `actor.queue_sent.inc()`. cells: the whole set, bound.
    """

    __slots__ = ("__weakref__", "_kv", "_plans", "_runs", "_shares", "cells", "name", "queue_received", "queue_sent")

    def __init__(self, name: str, cells: Actors, kv: ActorKv) -> None:
        self.name, self.cells, self._kv = name, cells, kv
        self.queue_sent, self.queue_received = self.cells.queue_sent, self.cells.queue_received
        self._shares: dict[GaugeCell, GaugeShare] = {}
        self._plans: dict[str, _Plan] = {}
        self._runs: dict[int, ref[Run]] = {}
        _known.add(self)

    def running(self, actor_id: str | None = None) -> Run:
        """One actor's life, from begin to end. actor_id goes with its observations as an exemplar."""
        return Run(self, actor_id)

    def runs(self) -> tuple[Run, ...]:
        """The actors that run now."""
        found = (run() for run in list(self._runs.values()))
        return tuple(run for run in found if run is not None)

    def startup(self, is_new: bool | None = None, *, actor_id: str | None = None) -> Startup:
        """A startup, total and phases. is_new=None: not known yet."""
        return Startup(self.cells, is_new, _exemplar(actor_id))

    def task(self, kind: TaskKind | str, *, actor_id: str | None = None) -> Task:
        """A piece of user code; as a block or as a decorator."""
        plan = self._plans.get(kind)
        return Task(self, plan or self._plan(kind), None if actor_id is None else _exemplar(actor_id))

    def state_written(self, reason: StateWrite | str = StateWrite.USER_WRITE) -> None:
        """A write of an actor's state: state_mutation_total{reason}. Loading a state is none."""
        self.cells.state_mutation[reason].inc()

    def kv(self, op: KvOp | str, *, keys: int | None = None) -> KvOperation:
        """An operation of the actors' key-value store; set `keys` of it later where it is known only then."""
        return KvOperation(self._kv, op, keys)

    def _leave_parent(self) -> None:
        """In a forked child: what ran is the parent's, so it leaves the gauges here, and nothing was stopped."""
        for run in self.runs():
            run._withdraw()
        shares, self._shares = self._shares, {}
        self._plans = {}
        for share in shares.values():
            share.close()

    def __repr__(self) -> str:
        return f"<ActorMetrics {self.name!r}: {len(self._runs)} running>"


_known: WeakSet[ActorMetrics] = WeakSet()


def _after_fork() -> None:
    for actor in list(_known):
        actor._leave_parent()


if hasattr(os, "register_at_fork"):  # not so on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
