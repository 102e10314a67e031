"""An actor's numbers are right however it ends: block, exception, cancellation, garbage, fork, twice, late, never."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.actor import ActorMetrics, Guard, Run, Task
from rkmetrics.catalogue.actors import TaskKind
from rkmetrics.model import HistogramValue, MetricFamily

ROOT = Path(__file__).parents[1]

ACTIVE, PEAK = "rivetkit_actor_active_count", "rivetkit_actor_active_peak"
STARTED, STOPPED = "rivetkit_actor_started_total", "rivetkit_actor_stopped_total"
STARTUP = "rivetkit_actor_startup_phase_duration_seconds"
TASKS, TOOK = "rivetkit_actor_user_tasks_active", "rivetkit_actor_user_task_duration_seconds"
CALLS = "rivetkit_actor_action_calls_total"


class Broken(Exception):
    pass


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(rk.Settings(), builtin=False)


@pytest.fixture
def actor(registry: rk.Registry) -> ActorMetrics:
    return registry.actor("lobby")


def numbers(registry: rk.Registry, name: str) -> dict[str, float]:
    """The series of a family that are not 0, as "value,value": number (of a histogram: its count)."""
    (family,) = registry.collect([name])
    assert isinstance(family, MetricFamily)
    pairs = (
        (
            ",".join(value for label, value in series.labels if label != "actor_name"),
            float(series.value.count if isinstance(series.value, HistogramValue) else series.value),
        )
        for series in family.series()
    )
    return {key: value for key, value in pairs if value}


def one(registry: rk.Registry, name: str) -> float:
    return numbers(registry, name).get("", 0.0)


class TestRunning:
    def test_an_actor_counts_while_its_block_runs(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.running(actor_id="room-81f") as run:
            assert (one(registry, ACTIVE), one(registry, STARTED), run.ended) == (1, 1, False)
            assert numbers(registry, STOPPED) == {}
            assert actor.runs() == (run,)
        assert (one(registry, ACTIVE), one(registry, STARTED), run.ended) == (0, 1, True)
        assert numbers(registry, STOPPED) == {"finished": 1}
        assert actor.runs() == ()

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (Broken(), "error"),
            (TimeoutError(), "error"),
            (asyncio.CancelledError(), "cancelled"),
            (GeneratorExit(), "cancelled"),
            (KeyboardInterrupt(), "cancelled"),
            (SystemExit(0), "cancelled"),
            (ExceptionGroup("tasks", [Broken()]), "error"),
            (BaseExceptionGroup("tasks", [asyncio.CancelledError()]), "cancelled"),
            (BaseExceptionGroup("tasks", [asyncio.CancelledError(), Broken()]), "error"),
            (BaseExceptionGroup("tasks", [BaseExceptionGroup("more", [KeyboardInterrupt(), Broken()])]), "error"),
        ],
        ids=repr,
    )
    def test_what_leaves_the_block_says_why_it_stopped(
        self, registry: rk.Registry, actor: ActorMetrics, error: BaseException, reason: str
    ) -> None:
        with suppress(type(error)), actor.running():
            raise error
        assert one(registry, ACTIVE) == 0
        assert numbers(registry, STOPPED) == {reason: 1}

    def test_stop_ends_it_at_once_with_its_reason(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with suppress(Broken), actor.running() as run:
            assert run.stop("sleep")
            assert one(registry, ACTIVE) == 0
            assert not run.stop("destroy")
            raise Broken
        assert numbers(registry, STOPPED) == {"sleep": 1}

    def test_fail_makes_an_error_of_a_quiet_end(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.running() as run:
            run.fail()
        assert numbers(registry, STOPPED) == {"error": 1}

    def test_an_early_return_is_an_end(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        def serve() -> str:
            with actor.running(), actor.startup(is_new=True), actor.task("action"):
                return "early"

        assert serve() == "early"
        assert numbers(registry, STOPPED) == {"finished": 1}
        assert numbers(registry, STARTUP) == {"total,true,success": 1}
        assert numbers(registry, CALLS) == {"success": 1}

    async def test_a_cancelled_task_is_a_cancelled_actor(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        started = asyncio.Event()

        async def serve() -> None:
            async with actor.running() as run, run.task("action"), run.connection(), run.startup():
                started.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(serve())
        await started.wait()
        assert (one(registry, ACTIVE), numbers(registry, TASKS)) == (1, {"action": 1})
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (one(registry, ACTIVE), numbers(registry, TASKS)) == (0, {})
        assert one(registry, "rivetkit_actor_connections_active") == 0
        assert numbers(registry, STOPPED) == {"cancelled": 1}
        assert numbers(registry, TOOK) == {"action,cancelled": 1}
        assert numbers(registry, STARTUP) == {"total,unknown,error": 1}

    def test_a_generator_that_is_closed_or_dropped_ends_what_it_began(
        self, registry: rk.Registry, actor: ActorMetrics
    ) -> None:
        def serve() -> Iterator[None]:
            with actor.running() as run, run.task("wait_until"):
                yield

        for leave in (lambda made: made.close(), lambda made: None):
            made = serve()
            next(made)
            leave(made)
            del made
        gc.collect()
        assert (one(registry, ACTIVE), numbers(registry, TASKS)) == (0, {})
        assert numbers(registry, STOPPED) == {"cancelled": 2}
        assert numbers(registry, TOOK) == {"wait_until,cancelled": 2}

    async def test_an_asynchronous_generator_does_so_too(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        async def serve() -> AsyncGenerator[None, None]:
            async with actor.running() as run, run.task("wait_until"):
                yield

        made = serve()
        await anext(made)
        await made.aclose()
        assert numbers(registry, STOPPED) == {"cancelled": 1}
        assert numbers(registry, TOOK) == {"wait_until,cancelled": 1}

    def test_a_coroutine_that_is_never_finished_does_so_too(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        async def serve() -> None:
            async with actor.running():
                await Forever()

        made = serve()
        made.send(None)
        assert one(registry, ACTIVE) == 1
        del made
        assert (one(registry, ACTIVE), numbers(registry, STOPPED)) == (0, {"cancelled": 1})

    def test_begin_and_end_stand_for_the_block(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        run = actor.running()
        assert not run.end()  # it has not begun
        assert run.begin() is run
        assert run.end(Broken())
        assert not run.end()
        assert numbers(registry, STOPPED) == {"error": 1}

    def test_one_that_never_began_counts_nothing(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        run = actor.running()
        with pytest.raises(RuntimeError, match="has not begun"):
            run.queue_depth.set(3)
        with pytest.raises(RuntimeError, match="has not begun"):
            run.stop("sleep")
        del run
        gc.collect()
        assert (one(registry, STARTED), numbers(registry, STOPPED)) == (0, {})
        assert one(registry, "rivetkit_actor_queue_depth") == 0

    def test_a_guard_is_used_once(self, actor: ActorMetrics) -> None:
        run = actor.running().begin()
        for make in GUARDS.values():
            guard = make(actor, run).begin()
            with pytest.raises(RuntimeError, match=f"this {type(guard).__name__} was begun before"):
                guard.begin()
            guard.end()
            with pytest.raises(RuntimeError), guard:
                pass

    def test_the_peak_keeps_a_burst_that_no_scrape_saw(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(actor.running())
        assert (one(registry, ACTIVE), one(registry, PEAK)) == (0, 5)

    def test_the_repr_says_what_it_is(self, actor: ActorMetrics) -> None:
        run = actor.running(actor_id="room-81f")
        assert repr(run) == "<Run of 'lobby', actor_id='room-81f', new>"
        assert repr(run.begin()) == "<Run of 'lobby', actor_id='room-81f', running>"
        assert repr(actor) == "<ActorMetrics 'lobby': 1 running>"
        run.end()
        assert repr(run) == "<Run of 'lobby', actor_id='room-81f', ended>"


class Forever:
    def __await__(self) -> Generator[None, None, None]:
        yield


# Every guard that there is, made from a kind of actor and one that runs.
GUARDS: dict[str, Callable[[ActorMetrics, Run], Guard]] = {
    "run": lambda actor, run: actor.running(),
    "startup": lambda actor, run: actor.startup(),
    "startup of a run": lambda actor, run: run.startup(),
    "phase": lambda actor, run: run.startup().phase("post_ready"),
    "task": lambda actor, run: actor.task("action"),
    "task of a run": lambda actor, run: run.task("action"),
    "connection": lambda actor, run: run.connection(),
    "http request": lambda actor, run: run.http_request(),
    "keep awake": lambda actor, run: run.keep_awake(),
    "shutdown task": lambda actor, run: run.shutdown_task(),
    "shutdown": lambda actor, run: run.shutdown("sleep"),
    "kv": lambda actor, run: actor.kv("get"),
}

# What makes each of them leave its trace: the family, and its numbers after one was dropped in the middle.
DROPPED: dict[str, tuple[str, dict[str, float]]] = {
    "run": (STOPPED, {"lost": 1}),
    "startup": (STARTUP, {"total,unknown,error": 1}),
    "startup of a run": (STARTUP, {"total,unknown,error": 1}),
    "phase": (STARTUP, {"post_ready,unknown,error": 1}),
    "task": (CALLS, {"cancelled": 1}),
    "task of a run": (TOOK, {"action,cancelled": 1}),
    "connection": ("rivetkit_actor_connections_active", {}),
    "http request": ("rivetkit_actor_http_requests_active", {}),
    "keep awake": ("rivetkit_actor_keep_awake_active", {}),
    "shutdown task": ("rivetkit_actor_shutdown_tasks_active", {}),
    "shutdown": ("rivetkit_actor_shutdown_wait_seconds", {"sleep": 1}),
    "kv": ("pegboard_actor_kv_operation_duration_seconds", {"get": 1}),
}


class TestGarbage:
    @pytest.mark.parametrize("name", GUARDS)
    def test_what_is_dropped_in_the_middle_ends(self, registry: rk.Registry, actor: ActorMetrics, name: str) -> None:
        run = actor.running().begin()
        guard = GUARDS[name](actor, run).begin()
        del guard
        family, expected = DROPPED[name]
        assert numbers(registry, family) == expected
        assert (one(registry, ACTIVE), numbers(registry, TASKS)) == (1, {})

    @pytest.mark.parametrize("name", GUARDS)
    def test_so_does_what_only_a_cycle_holds(self, registry: rk.Registry, actor: ActorMetrics, name: str) -> None:
        run = actor.running().begin()
        holder: list[object] = [GUARDS[name](actor, run).begin()]
        holder.append(holder)
        del holder
        gc.collect()
        family, expected = DROPPED[name]
        assert numbers(registry, family) == expected

    def test_a_lost_actor_takes_its_parts_along(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        run = actor.running().begin()
        depth = run.queue_depth
        depth.set(7)
        task = run.task("action").begin()
        assert one(registry, "rivetkit_actor_queue_depth") == 7
        del run, task
        gc.collect()
        depth.set(9)  # held by somebody, reported too late
        assert one(registry, "rivetkit_actor_queue_depth") == 0
        assert (one(registry, ACTIVE), numbers(registry, TASKS), numbers(registry, STOPPED)) == (0, {}, {"lost": 1})

    @pytest.mark.parametrize("name", GUARDS)
    def test_no_helper_makes_a_cycle(self, actor: ActorMetrics, name: str) -> None:
        """Reference counts alone free what is dropped: nothing waits for the collector."""
        gc.collect()
        gc.disable()
        try:
            run = actor.running(actor_id="room").begin()
            guard = GUARDS[name](actor, run)
            with suppress(Broken), guard:
                raise Broken
            remains: list[ref[Guard]] = [ref(run), ref(guard)]
            del guard, run
            assert [each() for each in remains] == [None, None]
        finally:
            gc.enable()

    def test_an_exit_stack_that_is_dropped_leaves_no_ghost(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        stack = ExitStack()
        run = stack.enter_context(actor.running())
        stack.enter_context(run.connection())
        stack.enter_context(actor.task("action"))
        del stack, run
        gc.collect()
        assert (one(registry, ACTIVE), numbers(registry, TASKS)) == (0, {})
        assert one(registry, "rivetkit_actor_connections_active") == 0

    def test_the_interpreter_exits_in_silence_with_actors_running(self) -> None:
        script = """
            import rkmetrics as rk
            registry = rk.Registry(rk.Settings(), builtin=False)
            actor = registry.actor("lobby")
            run = actor.running(actor_id="room").begin()
            task, startup = run.task("action").begin(), run.startup().begin()
            cycle = [actor.running().begin(), actor.task("http").begin()]
            cycle.append(cycle)
            async def serve():
                async with actor.running(): await Forever()
            class Forever:
                def __await__(self): yield
            coroutine = serve()
            coroutine.send(None)
        """
        out = python(script)
        assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


def python(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def _end(run: Run, answers: list[bool]) -> None:
    answers.append(run.end())


class TestEndingTwice:
    def test_many_threads_end_it_once(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        for _ in range(20):
            run = actor.running().begin()
            answers: list[bool] = []
            threads = [threading.Thread(target=_end, args=(run, answers)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(answers) == [False, False, False, True]
        assert (one(registry, ACTIVE), numbers(registry, STOPPED)) == (0, {"finished": 20})

    def test_a_signal_handler_may_end_what_the_block_ends_too(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        before = signal.getsignal(signal.SIGUSR1)
        try:
            with actor.running() as run, run.task("action"):
                signal.signal(signal.SIGUSR1, lambda number, frame: run.stop("sleep"))
                signal.raise_signal(signal.SIGUSR1)
                assert (one(registry, ACTIVE), numbers(registry, TASKS)) == (0, {})
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert (one(registry, ACTIVE), numbers(registry, TASKS)) == (0, {})
        assert numbers(registry, STOPPED) == {"sleep": 1}

    def test_late_updates_are_ignored(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        run = actor.running().begin()
        connection, task = run.connection().begin(), run.task("action").begin()
        run.queue_depth.set(5)
        run.end()
        connection.end()
        task.end()
        run.queue_depth.set(9)
        run.inbox_depth("dispatch").inc()  # first used after the end
        run.connection().begin()
        run.task("http").begin()
        gauges = [definition.name for definition in type(actor.cells).definitions() if definition.type.value == "gauge"]
        assert {name: numbers(registry, name) for name in gauges if name != PEAK} == {
            name: {} for name in gauges if name != PEAK
        }
        assert numbers(registry, TOOK)["action,success"] == 1  # it did run, so its time counts


OPERATIONS = st.tuples(
    st.sampled_from(
        ["run", "task", "actor task", "connection", "keep awake", "depth", "end", "stop", "drop", "forget"]
    ),
    st.integers(0, 7),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(OPERATIONS, max_size=60))
def test_whatever_happens_gauges_are_what_is_open_and_fall_to_zero(operations: list[tuple[str, int]]) -> None:
    registry = rk.Registry(rk.Settings(), builtin=False)
    actor = registry.actor("lobby")
    runs: list[Run] = []
    guards: list[Guard] = []
    for name, i in operations:
        run = runs[i % len(runs)] if runs else None
        match name:
            case "run":
                runs.append(actor.running(actor_id=f"room-{i}").begin())
            case "actor task":
                guards.append(actor.task("http").begin())
            case "end" if guards:
                guards[i % len(guards)].end(Broken() if i % 2 else None)
            case "forget" if guards:
                del guards[i % len(guards)]
            case "drop" if runs:
                del runs[i % len(runs)]
            case _ if run is None:
                pass
            case "task":
                guards.append(run.task("action").begin())
            case "connection":
                guards.append(run.connection().begin())
            case "keep awake":
                guards.append(run.keep_awake().begin())
            case "depth":
                run.queue_depth.set(i)
            case "stop":
                run.stop("sleep")
        del run
        alive = {id(run) for run in runs if not run.ended}
        held = {id(guard._scope) for guard in guards if isinstance(guard, Task) and isinstance(guard._scope, Run)}
        assert one(registry, ACTIVE) >= len(alive)
        assert one(registry, ACTIVE) <= len(alive | held)
        for family in (TASKS, "rivetkit_actor_connections_active", "rivetkit_actor_queue_depth", PEAK):
            assert all(value >= 0 for value in numbers(registry, family).values())
    guards.clear()
    runs.clear()
    families = (ACTIVE, TASKS, "rivetkit_actor_connections_active", "rivetkit_actor_queue_depth")
    assert [numbers(registry, family) for family in families] == [{}, {}, {}, {}]
    assert sum(numbers(registry, STOPPED).values()) == one(registry, STARTED)


class TestStartup:
    def test_phases_and_total_are_observed(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.startup(is_new=True) as startup:
            with startup.phase("load_persisted"):
                pass
            with startup.phase("core_init"):
                pass
        assert numbers(registry, STARTUP) == {
            "load_persisted,true,success": 1,
            "core_init,true,success": 1,
            "total,true,success": 1,
        }

    def test_a_failing_phase_fails_the_total(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with pytest.raises(Broken), actor.startup(is_new=False) as startup, startup.phase("core_init"):
            raise Broken
        assert numbers(registry, STARTUP) == {"core_init,false,error": 1, "total,false,error": 1}

    def test_is_new_is_unknown_until_it_is_known(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.startup() as startup:
            with startup.phase("load_persisted"):
                pass
            startup.is_new = True
            with startup.phase("post_ready"):
                pass
        assert numbers(registry, STARTUP) == {
            "load_persisted,unknown,success": 1,
            "post_ready,true,success": 1,
            "total,true,success": 1,
        }

    @pytest.mark.parametrize("what", ["create_state", "create_vars"])
    def test_creating_counts_as_a_phase_and_in_its_own_family_when_it_succeeds(
        self, registry: rk.Registry, actor: ActorMetrics, what: str
    ) -> None:
        with suppress(Broken), actor.startup(is_new=True) as startup:
            with startup.phase(what):
                pass
            with startup.phase(what):
                raise Broken
        assert numbers(registry, STARTUP) == {
            f"{what},true,success": 1,
            f"{what},true,error": 1,
            "total,true,error": 1,
        }
        assert one(registry, f"rivetkit_actor_{what}_duration_seconds") == 1

    def test_the_total_is_not_a_phase_to_measure(self, actor: ActorMetrics) -> None:
        with pytest.raises(ValueError, match="measured by the startup itself"):
            actor.startup().phase("total")

    def test_the_first_error_is_a_rise_from_zero(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.startup(is_new=True):
            pass
        (family,) = registry.collect([STARTUP])
        assert isinstance(family, MetricFamily)
        found = {series.labels[1:]: series.value for series in family.series()}
        error = found[("phase", "total"), ("is_new", "true"), ("outcome", "error")]
        assert isinstance(error, HistogramValue)
        assert error.count == 0


class TestTasks:
    @pytest.mark.parametrize("kind", TaskKind)
    def test_a_task_counts_while_it_runs(self, registry: rk.Registry, actor: ActorMetrics, kind: TaskKind) -> None:
        with actor.task(kind):
            assert numbers(registry, TASKS) == {kind: 1}
        assert numbers(registry, TASKS) == {}
        assert numbers(registry, TOOK) == {f"{kind},success": 1}
        assert numbers(registry, CALLS) == ({"success": 1} if kind.endswith("action") else {})

    @pytest.mark.parametrize(
        ("error", "outcome"),
        [(Broken(), "error"), (asyncio.CancelledError(), "cancelled"), (GeneratorExit(), "cancelled")],
        ids=repr,
    )
    async def test_what_leaves_it_is_its_outcome(
        self, registry: rk.Registry, actor: ActorMetrics, error: BaseException, outcome: str
    ) -> None:
        with suppress(type(error)):
            async with actor.task("action"):
                raise error
        assert numbers(registry, TOOK) == {f"action,{outcome}": 1}
        assert numbers(registry, CALLS) == {outcome: 1}

    def test_fail_makes_an_error_of_an_answer(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.task("action") as task:
            task.fail()
        assert numbers(registry, CALLS) == {"error": 1}

    def test_the_first_error_of_a_kind_is_a_rise_from_zero(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.task("http"):
            pass
        (family,) = registry.collect([TOOK])
        assert isinstance(family, MetricFamily)
        assert {series.labels[2][1] for series in family.series()} == {"success", "error", "cancelled"}

    def test_tasks_overlap(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.task("action"), actor.task("action"), actor.task("http"):
            assert numbers(registry, TASKS) == {"action": 2, "http": 1}
        assert numbers(registry, TASKS) == {}

    async def test_as_a_decorator_each_call_is_a_task(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        timed = actor.task("action")

        @timed
        def double(x: int) -> int:
            """Twice."""
            assert numbers(registry, TASKS)["action"] >= 1
            return 2 * x if x < 3 else double(x - 1)

        @timed
        async def later(x: int) -> int:
            await asyncio.sleep(0)
            return double(x)

        @timed
        def steps(n: int) -> Iterator[int]:
            for i in range(n):
                assert numbers(registry, TASKS) == {"action": 1}
                yield i

        assert (double.__name__, double.__doc__) == ("double", "Twice.")
        assert double(4) == 4  # itself, twice
        assert list(await asyncio.gather(later(1), later(2))) == [2, 4]
        assert list(steps(2)) == [0, 1]
        assert numbers(registry, TASKS) == {}
        assert numbers(registry, CALLS) == {"success": 3 + 4 + 1}

    def test_methods_are_decorated_as_functions_are(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        class Room:
            size = 3

            @actor.task("action")
            def grow(self) -> int:
                return self.size + 1

        assert Room().grow() == 4
        assert numbers(registry, CALLS) == {"success": 1}

    async def test_an_asynchronous_generator_is_a_task_until_it_ends(
        self, registry: rk.Registry, actor: ActorMetrics
    ) -> None:
        @actor.task("action")
        async def many() -> AsyncIterator[int]:
            yield 1
            yield 2

        assert [item async for item in many()] == [1, 2]
        assert numbers(registry, CALLS) == {"success": 1}


class TestParts:
    def test_instances_add_up_and_leave_with_their_end(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        first, second = actor.running().begin(), actor.running().begin()
        first.queue_depth.set(3)
        second.queue_depth.set(4)
        first.inbox_depth("lifecycle").set(2)
        second.keep_awake_active("internal_keep_awake").set(1)
        assert one(registry, "rivetkit_actor_queue_depth") == 7
        assert numbers(registry, "rivetkit_actor_inbox_depth") == {"lifecycle": 2}
        assert numbers(registry, "rivetkit_actor_keep_awake_active") == {"internal_keep_awake": 1}
        first.end(Broken())
        assert one(registry, "rivetkit_actor_queue_depth") == 4
        assert numbers(registry, "rivetkit_actor_inbox_depth") == {}

    def test_a_connection_counts_until_it_closes(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.running() as run:
            with run.connection():
                open_one = run.connection().begin()
                assert one(registry, "rivetkit_actor_connections_active") == 2
            assert open_one.end()
            assert not open_one.end()
            assert one(registry, "rivetkit_actor_connections_active") == 0
        assert one(registry, "rivetkit_actor_connections_total") == 2

    def test_messages_and_writes_are_counted_for_the_name(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        actor.queue_sent.inc()
        actor.queue_received.inc(3)
        actor.state_written()
        actor.state_written("has_initialized")
        assert one(registry, "rivetkit_actor_queue_messages_sent_total") == 1
        assert one(registry, "rivetkit_actor_queue_messages_received_total") == 3
        assert numbers(registry, "rivetkit_actor_state_mutation_total") == {"user_write": 1, "has_initialized": 1}

    def test_operations_of_the_store_observe_time_and_keys(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.kv("put", keys=2):
            pass
        with actor.kv("list") as operation:
            operation.keys = 40
        with suppress(Broken), actor.kv("delete_range"):
            raise Broken
        assert numbers(registry, "pegboard_actor_kv_operation_duration_seconds") == {
            "put": 1,
            "list": 1,
            "delete_range": 1,
        }
        assert numbers(registry, "pegboard_actor_kv_keys_per_operation") == {"put": 1, "list": 1}


class TestShutdown:
    def test_a_shutdown_says_what_the_actor_stopped_for(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.running() as run, run.shutdown("sleep"):
            pass
        assert numbers(registry, "rivetkit_actor_shutdown_wait_seconds") == {"sleep": 1}
        assert numbers(registry, STOPPED) == {"sleep": 1}
        assert numbers(registry, "rivetkit_actor_shutdown_timeout_total") == {}

    async def test_a_cancellation_that_ran_into_it_does_not_change_that(
        self, registry: rk.Registry, actor: ActorMetrics
    ) -> None:
        async def serve() -> None:
            with actor.running() as run:
                try:
                    await asyncio.sleep(60)
                finally:
                    with run.shutdown("sleep"):
                        pass

        task = asyncio.create_task(serve())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert numbers(registry, STOPPED) == {"sleep": 1}

    def test_a_crash_that_ran_into_it_stays_a_crash(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with suppress(Broken), actor.running() as run:
            try:
                raise Broken
            finally:
                with run.shutdown("destroy"):
                    pass
        assert numbers(registry, STOPPED) == {"error": 1}

    async def test_a_deadline_that_passes_is_counted_once(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.running() as run, suppress(TimeoutError), run.shutdown("destroy") as shutdown:
            try:
                async with asyncio.timeout(0):
                    await asyncio.sleep(60)
            except TimeoutError:
                shutdown.timed_out()
                shutdown.undrained("http_requests")
                raise
        assert numbers(registry, "rivetkit_actor_shutdown_timeout_total") == {"destroy": 1}
        assert numbers(registry, "rivetkit_actor_direct_subsystem_shutdown_warning_total") == {
            "http_requests,destroy_drain": 1
        }
        assert numbers(registry, STOPPED) == {"destroy": 1}

    def test_a_shutdown_that_breaks_is_no_reason(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.running() as run, suppress(Broken), run.shutdown("destroy"):
            raise Broken
        assert numbers(registry, "rivetkit_actor_shutdown_wait_seconds") == {"destroy": 1}
        assert numbers(registry, STOPPED) == {"finished": 1}


class TestActorIds:
    def test_an_id_is_an_exemplar_and_never_a_label(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with suppress(Broken), actor.running(actor_id="room-81f") as run:
            with run.startup(is_new=True), run.task("action"):
                pass
            with run.shutdown("destroy"):
                pass
            raise Broken
        families = [family for family in registry.collect() if isinstance(family, MetricFamily)]
        carrying = {
            family.name: {exemplar.labels for series in family.series() for exemplar in series.exemplars.values()}
            for family in families
        }
        expected = {(("actor_id", "room-81f"),)}
        assert {name for name, found in carrying.items() if found == expected} == {
            STARTUP,
            TOOK,
            STOPPED,
            "rivetkit_actor_shutdown_wait_seconds",
        }
        labels = {value for family in families for series in family.series() for _, value in series.labels}
        assert not [value for value in labels if "room" in value]

    def test_without_a_run_the_id_is_passed_along(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.startup(is_new=True, actor_id="room-7"), actor.task("http", actor_id="room-7"):
            pass
        for name in (STARTUP, TOOK):
            (family,) = registry.collect([name])
            assert isinstance(family, MetricFamily)
            found = [exemplar.labels for series in family.series() for exemplar in series.exemplars.values()]
            assert found == [(("actor_id", "room-7"),)]

    def test_without_an_id_there_is_no_exemplar(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        with actor.running() as run, run.startup(), run.task("action"), run.shutdown("sleep"):
            pass
        families = [family for family in registry.collect() if isinstance(family, MetricFamily)]
        assert [family.name for family in families if family.exemplars] == []

    @pytest.mark.parametrize("actor_id", ["x" * 500, "\ud800", "", "😀" * 60, 'a"\n'])
    def test_an_id_that_no_exemplar_can_carry_breaks_nothing(
        self, registry: rk.Registry, actor: ActorMetrics, actor_id: str
    ) -> None:
        with actor.running(actor_id=actor_id) as run, run.startup(), run.task("action"):
            pass
        assert numbers(registry, CALLS) == {"success": 1}

    def test_a_slow_task_leaves_its_id_right_after_a_fast_one(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        run = actor.running(actor_id="room-81f").begin()
        for seconds in (0.0, 0.0, 4.0):
            task = run.task("action").begin()
            task._start -= seconds
            task.end()
        (family,) = registry.collect([TOOK])
        assert isinstance(family, MetricFamily)
        assert sorted(round(exemplar.value) for exemplar in family.exemplars.values()) == [0, 4]


class TestFork:
    def test_a_forked_child_has_none_of_the_parents_actors(self) -> None:
        """No ghosts in the child, no ends counted there, nothing taken from the parent."""
        script = """
            import os, sys
            import rkmetrics as rk
            registry = rk.Registry(rk.Settings(), builtin=False)
            actor = registry.actor("lobby")
            cells = actor.cells

            def show():
                stopped = sum(cells.stopped[reason].value for reason in ("finished", "lost", "sleep"))
                print(cells.active_count.value, cells.queue_depth.value, cells.user_tasks_active["action"].value,
                      cells.connections_active.value, stopped, len(actor.runs()), flush=True)

            @actor.task("action")
            def decorated():
                show()

            with actor.running() as run, actor.task("action") as task:
                inner = run.task("action").begin()
                connection = run.connection().begin()
                run.queue_depth.set(5)
                if os.fork() == 0:
                    show()                                  # nothing of the parent's
                    run.queue_depth.set(8)
                    print(run.end(), connection.end())      # not the child's to end
                    task.end()
                    show()
                    with actor.running():
                        decorated()                         # its own
                    show()
                    os._exit(0)
                os.wait()
                show()
            show()
        """
        out = python(script)
        assert out.stderr == ""
        assert out.stdout.splitlines() == [
            "0.0 0.0 0.0 0.0 0.0 0",
            "False True",
            "0.0 0.0 0.0 0.0 0.0 0",
            "1.0 0.0 1.0 0.0 0.0 1",
            "0.0 0.0 0.0 0.0 1.0 0",
            "1.0 5.0 2.0 1.0 0.0 1",
            "0.0 0.0 0.0 0.0 1.0 0",
        ]


class TestNames:
    def test_there_is_no_default_name(self, registry: rk.Registry) -> None:
        with pytest.raises(TypeError):
            registry.actor()  # type: ignore[call-arg]
        for name in ("", "__other__"):
            with pytest.raises(rk.ActorNameError):
                registry.actor(name)

    def test_one_name_is_one_object(self, registry: rk.Registry, actor: ActorMetrics) -> None:
        assert registry.actor("lobby") is actor
        assert registry.actor("arena") is not actor

    def test_names_past_the_limit_count_together(self) -> None:
        registry = rk.Registry(rk.Settings(max_actor_names=1), builtin=False)
        registry.actor("lobby")
        first, second = registry.actor("arena"), registry.actor("tavern")
        assert first is second
        with first.running(), second.running(), second.kv("get", keys=1):
            (family,) = registry.collect([ACTIVE])
            assert isinstance(family, MetricFamily)
            assert [(series.labels, series.value) for series in family.series()] == [
                ((("actor_name", "__other__"),), 2.0)
            ]

    def test_a_strict_registry_refuses_names_past_the_limit(self) -> None:
        registry = rk.Registry(rk.Settings(max_actor_names=1), builtin=False, strict=True)
        registry.actor("lobby")
        with pytest.raises(rk.ActorNameError):
            registry.actor("arena")

    def test_a_released_name_starts_anew_and_what_still_runs_is_seen_by_nobody(
        self, registry: rk.Registry, actor: ActorMetrics
    ) -> None:
        run = actor.running().begin()
        registry.release("lobby")
        assert registry.actor_names() == ()
        assert registry.collect([ACTIVE]) == ()
        assert run.end()
        with actor.kv("get"):  # held from before; it takes no place back
            pass
        assert registry.actor_names() == ()
        again = registry.actor("lobby")
        assert again is not actor
        with again.running():
            assert (one(registry, ACTIVE), one(registry, STARTED)) == (1, 1)

    # What takes a label value, with one that nobody declared.
    UNDECLARED: dict[str, Callable[[ActorMetrics, Run], object]] = {
        "task": lambda actor, run: actor.task("made_up"),
        "task of a run": lambda actor, run: run.task("made_up"),
        "phase": lambda actor, run: run.startup().phase("made_up"),
        "stop": lambda actor, run: run.stop("made_up"),
        "shutdown": lambda actor, run: run.shutdown("made_up"),
        "undrained": lambda actor, run: run.shutdown("sleep").undrained("made_up"),
        "inbox": lambda actor, run: run.inbox_depth("made_up"),
        "keep awake": lambda actor, run: run.keep_awake("made_up"),
        "state": lambda actor, run: actor.state_written("made_up"),
        "kv": lambda actor, run: actor.kv("made_up"),
    }

    @pytest.mark.parametrize("call", UNDECLARED.values(), ids=UNDECLARED)
    def test_a_strict_registry_refuses_undeclared_values_before_anything_is_counted(
        self, call: Callable[[ActorMetrics, Run], object]
    ) -> None:
        registry = rk.Registry(rk.Settings(), builtin=False, strict=True)
        actor = registry.actor("lobby")
        with actor.running() as run:
            with pytest.raises(rk.LabelValueError, match="made_up"):
                call(actor, run)
            assert one(registry, ACTIVE) == 1
        assert numbers(registry, STOPPED) == {"finished": 1}

    @pytest.mark.parametrize("call", UNDECLARED.values(), ids=UNDECLARED)
    def test_elsewhere_they_count_as_other_once_each(self, call: Callable[[ActorMetrics, Run], Any]) -> None:
        registry = rk.Registry(rk.Settings(), builtin=False)
        actor = registry.actor("lobby")
        with actor.running() as run:
            made = call(actor, run)
            if isinstance(made, Guard):
                with made:
                    pass
        assert [overflow.count for overflow in registry.overflows().values()] == [1]
