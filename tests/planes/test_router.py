"""The router: whom it picks, what it does when that one fails, and what it counts."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.catalogue.planes import CallOutcome, InstanceState, PickMode, RpcRouting
from rkmetrics.errors import (
    BusyError,
    NoInstancesError,
    RpcClosedError,
    RpcError,
    RpcRefusedError,
    RpcRemoteError,
    RpcTimeoutError,
    RpcUnreachableError,
)
from rkmetrics.kv.base import ForwardPassMetrics, KvStats, WorkerKey, WorkerStats
from rkmetrics.planes import loads as loads_module
from rkmetrics.planes import router as router_module
from rkmetrics.planes.base import EndpointName, Instance, InstanceListener, InstanceSource, RpcResponse
from rkmetrics.planes.memory import MemoryClient, MemoryServer
from rkmetrics.planes.router import PushRouter
from tests.hostile import until

GENERATE = EndpointName("dynamo", "backend", "generate")
UP, DOWN, BUSY = InstanceState.UP, InstanceState.DOWN, InstanceState.BUSY


def instance(id: int, kind: str = "memory", place: str = "") -> Instance:
    return Instance(*GENERATE, id, (kind, place or f"{id:x}/generate"))


class Told(InstanceSource):
    """A source that is told what to tell."""

    def __init__(self, *ids: int) -> None:
        self.now = tuple(map(instance, ids))
        self._listeners: list[InstanceListener] = []

    async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
        self._listeners.append(listener)
        listener(self.now)
        await asyncio.Event().wait()

    def tell(self, *instances: Instance) -> None:
        self.now = instances
        for listener in self._listeners:
            listener(instances)


class Answer(RpcResponse):
    """An answer that has begun, and ends when a test says so."""

    def __init__(self, instance: Instance) -> None:
        self.id, self.instance = "", instance
        self.end: Callable[[CallOutcome], None] = lambda _: None

    def __aiter__(self) -> AsyncIterator[Any]:
        raise NotImplementedError

    def annotated(self) -> AsyncIterator[Any]:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    def when_over(self, tell: Callable[[CallOutcome], None]) -> None:
        self.end = tell


class Scripted(MemoryClient):
    """A client whose instances do what a test says. fails: what calls of an instance raise; seconds: and when."""

    def __init__(self, registry: rk.Registry, request_timeout_seconds: float = 10.0) -> None:
        super().__init__(registry)
        self.request_timeout_seconds = request_timeout_seconds
        self.fails: dict[int, RpcError] = {}
        self.seconds: dict[int, float] = {}
        self.alive: set[int] = set()
        self.asked: list[int] = []
        self.probed: Counter[int] = Counter()
        self.options: list[Mapping[str, Any]] = []

    async def call(self, instance: Instance, request: Any, **options: Any) -> RpcResponse:
        self.asked.append(instance.instance_id)
        self.options.append(options)
        await asyncio.sleep(self.seconds.get(instance.instance_id, 0))
        if instance.instance_id in self.fails:
            raise self.fails[instance.instance_id]
        return Answer(instance)

    async def probe(self, instance: Instance) -> bool:
        self.probed[instance.instance_id] += 1
        return instance.instance_id in self.alive


def unreachable(**more: Any) -> RpcError:
    return RpcUnreachableError("e", "no connection", **more)


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(rk.Settings(), strict=True, builtin=False)


@pytest.fixture
def client(registry: rk.Registry) -> Scripted:
    return Scripted(registry)


@pytest.fixture
def cells(registry: rk.Registry) -> Any:
    return registry.bind(RpcRouting, actor_name="backend")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes come at once."""
    monkeypatch.setattr(loads_module, "PROBE_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(loads_module, "PROBE_CAP_SECONDS", 0.002)


async def asked(router: PushRouter, client: Scripted, calls: int, **options: Any) -> Counter[int]:
    before = len(client.asked)
    for _ in range(calls):
        await router.generate({}, **options)
    return Counter(client.asked[before:])


# --- who is picked ----------------------------------------------------------------------------------------------------


async def test_round_robin_asks_each_as_often_as_the_others(client: Scripted, cells: Any) -> None:
    async with PushRouter(client, Told(1, 2, 3), GENERATE) as router:
        assert await asked(router, client, 30) == {1: 10, 2: 10, 3: 10}
    assert cells.picks[PickMode.ROUND_ROBIN].value == 30
    assert cells.retries.value == 0


async def test_random_asks_all_of_them(client: Scripted, cells: Any) -> None:
    async with PushRouter(client, Told(1, 2, 3), GENERATE, mode="random") as router:
        found = await asked(router, client, 300)
    assert set(found) == {1, 2, 3}
    assert cells.picks[PickMode.RANDOM].value == 300


async def test_direct_asks_that_one_whatever_is_thought_of_it(client: Scripted, cells: Any) -> None:
    async with PushRouter(client, Told(1, 2), GENERATE) as router:
        client.fails[2] = unreachable()
        with pytest.raises(RpcUnreachableError):
            await router.direct({}, 2)
        assert router.states()[2] is DOWN
        del client.fails[2]
        assert (await router.direct({}, 2)).instance.instance_id == 2
        assert client.asked == [2, 2]
        assert router.states()[2] is UP  # it answered
        with pytest.raises(NoInstancesError, match="there is no instance 2a"):
            await router.direct({}, 42)
    assert cells.picks[PickMode.DIRECT].value == 2
    assert cells.rejections["none"].value == 1


async def test_where_nobody_serves_it_a_call_says_so(client: Scripted, cells: Any) -> None:
    async with PushRouter(client, Told(), GENERATE) as router:
        for call in (router.generate, router.round_robin, router.random):
            with pytest.raises(NoInstancesError, match=r"dynamo\.backend\.generate: nobody serves it over memory"):
                await call({})
    assert cells.rejections["none"].value == 3


async def test_instances_that_come_and_go_are_asked_from_then_on(client: Scripted) -> None:
    source = Told(1)
    async with PushRouter(client, source, GENERATE) as router:
        assert await asked(router, client, 4) == {1: 4}
        source.tell(instance(1), instance(2))
        assert await asked(router, client, 4) == {1: 2, 2: 2}
        source.tell(instance(2))
        assert await asked(router, client, 4) == {2: 4}
        assert router.instance_ids() == (2,)
        assert router.instances() == (instance(2),)


async def test_instances_of_another_plane_are_left_out_with_one_line(
    client: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    source = Told(1)
    async with PushRouter(client, source, GENERATE) as router:
        await router.wait_for_instances()
        for _ in range(3):
            source.tell(instance(1), instance(2, "nats_tcp", "x.y-2"), instance(3, "nats_tcp", "x.y-3"))
        assert router.instance_ids() == (1,)
    lines = [each.getMessage() for each in caplog.records]
    assert len(lines) == 1
    assert "served over the plane 'nats' by instance 2" in lines[0]
    assert "'memory'" in lines[0]


async def test_instances_are_waited_for(client: Scripted) -> None:
    source = Told()
    async with PushRouter(client, source, GENERATE) as router:
        with pytest.raises(NoInstancesError, match=r"nobody serves it after 0\.01 s"):
            await router.wait_for_instances(0.01)
        asyncio.get_running_loop().call_later(0.02, source.tell, instance(7))
        assert await router.wait_for_instances(30) == (7,)


async def test_a_call_waits_for_a_source_that_has_said_nothing_yet(client: Scripted) -> None:
    class Late(Told):
        async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
            await asyncio.sleep(0.02)
            await super().follow(endpoint, listener)

    async with PushRouter(client, Late(5), GENERATE) as router:
        assert not router.known
        with pytest.raises(NoInstancesError, match="its source has not told"):
            await router.generate({}, timeout_seconds=0.001)
        assert (await router.generate({})).instance.instance_id == 5


async def test_a_router_that_does_not_run_says_how_to_start_it(client: Scripted) -> None:
    router = PushRouter(client, Told(1), GENERATE)
    with pytest.raises(RuntimeError, match="async with"):
        await router.generate({})
    async with router:
        with pytest.raises(RuntimeError, match="runs already"):
            await router.__aenter__()
        await router.generate({})
    async with router:  # and once more
        await router.generate({})


async def test_a_source_that_fails_begins_again(client: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Told):
        turns = 0

        async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
            self.turns += 1
            if self.turns < 3:
                raise KeyError(endpoint)
            await super().follow(endpoint, listener)

    async with PushRouter(client, Broken(1), GENERATE) as router:
        assert await router.wait_for_instances(30) == (1,)
    assert [each.exc_info is not None for each in caplog.records] == [True]  # the same again is said once


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "direct"}, "expected round_robin, random or kv"),
        ({"mode": "RoundRobin"}, "mode='RoundRobin'"),
        ({"busy_threshold": 0.9}, "needs loads"),
        ({"busy_threshold": 95.0}, "from 0 to 1"),
        ({"retries": -1}, "0 or more"),
        ({"temperature": math.nan}, "0 or more"),
        ({"overlap_score_weight": -1.0}, "0 or more"),
    ],
)
def test_what_cannot_be_meant_is_refused(client: Scripted, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PushRouter(client, Told(), GENERATE, **options)


# --- who fails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (unreachable(), DOWN),
        (RpcRefusedError("e", "Draining"), DOWN),
        (RpcRefusedError("e", "Unknown endpoint: 1/generate"), DOWN),
        (RpcRefusedError("e", "Too many requests"), UP),
    ],
)
async def test_what_was_not_delivered_goes_to_another(
    client: Scripted, cells: Any, error: RpcError, state: InstanceState
) -> None:
    client.fails[1] = error
    async with PushRouter(client, Told(1, 2), GENERATE) as router:
        for _ in range(4):
            assert (await router.generate({})).instance.instance_id == 2
        assert router.states() == {1: state, 2: UP}
        assert cells.instances[DOWN].value == (state is DOWN)
        assert cells.retries.value == client.asked.count(1)
        assert (client.asked.count(1) == 1) == (state is DOWN)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RpcClosedError("e", "the answer ended before it began"), DOWN),
        (RpcUnreachableError("e", "the connection ended", delivered=True), DOWN),
        (RpcTimeoutError("e", "no answer"), UP),
        (RpcRemoteError("e", "it raised"), UP),
    ],
)
async def test_what_may_have_been_delivered_is_not_done_twice(
    client: Scripted, cells: Any, error: RpcError, state: InstanceState
) -> None:
    client.fails = {1: error, 2: error}
    async with PushRouter(client, Told(1, 2), GENERATE) as router:
        with pytest.raises(type(error)):
            await router.generate({})
        assert len(client.asked) == 1
        assert router.states()[client.asked[0]] is state
    assert cells.retries.value == 0


async def test_retries_end_and_each_is_on_another(client: Scripted, cells: Any) -> None:
    client.fails = {id: unreachable() for id in range(1, 10)}
    async with PushRouter(client, Told(*range(1, 10)), GENERATE, retries=3) as router:
        with pytest.raises(RpcUnreachableError):
            await router.generate({})
        assert len(client.asked) == len(set(client.asked)) == 4
    assert cells.retries.value == 3


@pytest.mark.parametrize("mode", ["round_robin", "random", "kv"])
async def test_each_mode_finds_the_one_that_works(client: Scripted, mode: str) -> None:
    client.fails = {id: unreachable() for id in range(1, 5)}
    async with PushRouter(client, Told(*range(1, 6)), GENERATE, mode=mode, retries=4) as router:
        for _ in range(20):
            assert (await router.generate({})).instance.instance_id == 5
        assert max(client.asked.count(id) for id in range(1, 5)) == 1


async def test_retries_keep_within_the_deadline_of_the_request(client: Scripted) -> None:
    client.fails = {1: unreachable(), 2: unreachable()}
    client.seconds = {1: 0.02, 2: 0.02}
    async with PushRouter(client, Told(1, 2, 3), GENERATE) as router:
        router._at = 2  # pyright: ignore[reportPrivateUsage] - begin with 1
        await router.wait_for_instances(30)
        await router.generate({}, timeout_seconds=30)
        left = [each["timeout_seconds"] for each in client.options]
        assert left[0] == 30
        assert left == sorted(left, reverse=True)
        assert left[-1] < 29.99
    async with PushRouter(client, Told(1, 2, 3), GENERATE) as router:
        router._at = 2  # pyright: ignore[reportPrivateUsage]
        before = len(client.asked)
        with pytest.raises(RpcUnreachableError):
            await router.generate({}, timeout_seconds=0.01)
        assert len(client.asked) == before + 1


async def test_where_all_are_down_they_are_asked_all_the_same(client: Scripted) -> None:
    client.fails = {1: unreachable(), 2: unreachable()}
    async with PushRouter(client, Told(1, 2), GENERATE) as router:
        for _ in range(3):
            with pytest.raises(RpcUnreachableError):
                await router.generate({})
        assert set(router.states().values()) == {DOWN}
        assert Counter(client.asked) == {1: 3, 2: 3}
        client.fails.clear()
        await router.generate({})
        assert UP in router.states().values()


async def test_who_is_down_is_probed_and_comes_back(client: Scripted, cells: Any) -> None:
    client.fails[1] = unreachable()
    async with PushRouter(client, Told(1, 2), GENERATE) as router:
        await asked(router, client, 2)
        assert router.states()[1] is DOWN
        await until(lambda: client.probed[1] >= 3)
        assert router.states()[1] is DOWN
        client.alive.add(1)
        del client.fails[1]
        await until(lambda: router.states()[1] is UP)
        assert await asked(router, client, 4) == {1: 2, 2: 2}
    assert cells.probes["failed"].value >= 3
    assert cells.probes["ok"].value == 1
    assert cells.instances[UP].value == 0  # it is over: nobody is known any more


async def test_who_takes_connections_and_no_calls_is_asked_less_and_less(
    client: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads_module, "PROBE_CAP_SECONDS", 1e9)
    client.fails[1], client.alive = RpcRefusedError("e", "Draining"), {1}
    async with PushRouter(client, Told(1, 2), GENERATE) as router:
        spans: list[int] = []
        for _ in range(4):
            await until(lambda: router.states()[1] is UP) if spans else await router.wait_for_instances()
            await asked(router, client, 2)
            found = router._members[1]  # pyright: ignore[reportPrivateUsage]
            await asyncio.sleep(0)
            spans.append(found.backoff._tries)  # pyright: ignore[reportPrivateUsage]
        assert spans == sorted(set(spans))  # each time it waits longer
        await until(lambda: router.states()[1] is UP)
        client.fails.clear()
        answer: Any = await router.direct({}, 1)
        found = router._members[1]  # pyright: ignore[reportPrivateUsage]
        assert found.backoff._tries > 0  # pyright: ignore[reportPrivateUsage] - it may still break off
        answer.end(CallOutcome.OK)
        assert found.backoff._tries == 0  # pyright: ignore[reportPrivateUsage] - it answered


async def test_who_is_listed_anew_is_asked_again(client: Scripted) -> None:
    client.fails[1] = unreachable()
    source = Told(1, 2)
    async with PushRouter(client, source, GENERATE) as router:
        await asked(router, client, 2)
        source.tell(instance(1), instance(2))  # the same word again changes nothing
        assert router.states() == {1: DOWN, 2: UP}
        source.tell(instance(2))
        source.tell(instance(1), instance(2))
        assert router.states() == {1: UP, 2: UP}
        await asked(router, client, 2)
        source.tell(instance(1, place="elsewhere/generate"), instance(2))
        assert router.states() == {1: UP, 2: UP}


async def test_a_timeout_of_the_plane_says_that_an_instance_is_down_and_one_of_the_caller_does_not(
    registry: rk.Registry,
) -> None:
    client = Scripted(registry, request_timeout_seconds=0.02)
    client.fails[1], client.seconds[1] = RpcTimeoutError("e", "no acknowledgement in 0.02 s"), 0.03
    async with PushRouter(client, Told(1), GENERATE) as router:
        with pytest.raises(RpcTimeoutError):
            await router.generate({})
        assert router.states()[1] is DOWN
    client.seconds[1] = 0.001
    async with PushRouter(client, Told(1), GENERATE) as router:
        with pytest.raises(RpcTimeoutError):
            await router.generate({}, timeout_seconds=0.001)
        assert router.states()[1] is UP


async def test_an_answer_that_breaks_off_takes_its_instance_out(client: Scripted) -> None:
    async with PushRouter(client, Told(1, 2), GENERATE) as router:
        for outcome in (CallOutcome.OK, CallOutcome.CANCELLED, CallOutcome.REMOTE_ERROR):
            found = await router.generate({})
            assert isinstance(found, Answer)
            found.end(outcome)
        assert set(router.states().values()) == {UP}
        found = await router.generate({})
        assert isinstance(found, Answer)
        found.end(CallOutcome.CLOSED)
        assert router.states()[found.instance.instance_id] is DOWN
    found.end(CallOutcome.CLOSED)  # after the router's end nothing happens


class Step(NamedTuple):
    """One step of a model: calls fail or work, the source tells, a probe succeeds."""

    kind: str
    id: int


STEPS = st.lists(st.builds(Step, st.sampled_from(["fail", "mend", "list", "unlist", "call"]), st.integers(0, 4)))


@given(STEPS, st.sampled_from(["round_robin", "random", "kv"]))
@settings(deadline=None)
def test_whatever_happens_somebody_who_works_is_found(steps: list[Step], mode: str) -> None:
    """A model: a call works where anybody who is listed works, and asks nobody twice and nobody else."""

    async def run() -> None:
        registry = rk.Registry(rk.Settings(), strict=True, builtin=False)
        client, source = Scripted(registry), Told(0, 1)
        listed = {0, 1}
        async with PushRouter(client, source, GENERATE, mode=mode, retries=5) as router:
            await router.wait_for_instances()
            for kind, id in steps:
                if kind == "fail":
                    client.fails[id] = unreachable()
                elif kind == "mend":
                    client.fails.pop(id, None)
                elif kind == "call":
                    works = listed - client.fails.keys()
                    before = len(client.asked)
                    if works:
                        assert (await router.generate({})).instance.instance_id in works
                    else:
                        with pytest.raises(RpcError):
                            await router.generate({})
                    tried = client.asked[before:]
                    assert len(tried) == len(set(tried))
                    assert set(tried) <= listed
                else:
                    listed = listed | {id} if kind == "list" else listed - {id}
                    source.tell(*map(instance, sorted(listed)))
                assert set(router.instance_ids()) == listed

    asyncio.run(run())


# --- who is busy ------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What is known of a worker."""

    active_blocks: int
    metrics: ForwardPassMetrics | None = None
    heard_seconds: float = 0.0
    stale: bool = False


def load(active: int, total: int = 100, *, waiting: int = 0, heard: float = 0.0, stale: bool = False) -> State:
    worker = WorkerStats(request_active_slots=0, request_total_slots=1, num_requests_waiting=waiting)
    kv = KvStats(kv_active_blocks=active, kv_total_blocks=total, gpu_cache_usage_perc=0, gpu_prefix_cache_hit_rate=0)
    return State(active, ForwardPassMetrics(worker, kv), heard, stale)


class Loads:
    """What an aggregator would say."""

    def __init__(self, **_: Any) -> None:
        self.states: dict[WorkerKey, State] = {}

    def workers(self) -> Mapping[WorkerKey, State]:
        return dict(self.states)

    def set(self, *states: tuple[int, State]) -> Loads:
        for id, state in states:
            self.states[WorkerKey(id)] = state
        return self


@pytest.fixture(autouse=True)
def fresh_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pick looks at the loads."""
    monkeypatch.setattr(router_module, "LOADS_SECONDS", 0.0)


@pytest.mark.parametrize("mode", ["round_robin", "random", "kv"])
async def test_who_is_past_the_threshold_is_passed_over(client: Scripted, cells: Any, mode: str) -> None:
    loads = Loads().set((1, load(96)), (2, load(95)), (3, load(10, total=0)))
    async with PushRouter(client, Told(1, 2), GENERATE, mode=mode, busy_threshold=0.95, loads=loads) as router:
        assert await asked(router, client, 4) == {2: 4}
        assert router.states() == {1: BUSY, 2: UP}
        assert cells.instances[BUSY].value == 1
        loads.set((2, load(99)))
        with pytest.raises(BusyError, match=r"more than 0\.95 of their blocks active"):
            await router.generate({})
        assert (await router.direct({}, 1)).instance.instance_id == 1  # who names one gets it
        loads.set((1, load(5)))
        assert await asked(router, client, 4) == {1: 4}
    assert cells.rejections["busy"].value == 1


@pytest.mark.parametrize(
    "state", [None, load(99, stale=True), State(99), load(99, total=0)], ids=["unknown", "stale", "no totals", "zero"]
)
async def test_who_says_nothing_that_can_be_used_is_not_busy(client: Scripted, state: State | None) -> None:
    loads = Loads().set((1, load(99)))
    async with PushRouter(client, Told(1), GENERATE, busy_threshold=0.5, loads=loads) as router:
        with pytest.raises(BusyError):
            await router.generate({})
        del loads.states[WorkerKey(1)]
        if state is not None:
            loads.set((1, state))
        await router.generate({})
        assert router.states()[1] is UP


async def test_a_worker_of_several_ranks_is_the_sum_of_them(client: Scripted) -> None:
    loads = Loads()
    loads.states = {WorkerKey(1, 0): load(99), WorkerKey(1, 1): load(0), WorkerKey(9): load(1)}
    async with PushRouter(client, Told(1), GENERATE, busy_threshold=0.5, loads=loads) as router:
        await router.generate({})
        loads.states[WorkerKey(1, 1)] = load(2)
        with pytest.raises(BusyError):
            await router.generate({})


async def test_where_the_free_ones_fail_the_busy_ones_stay_out(client: Scripted) -> None:
    loads = Loads().set((1, load(100)), (2, load(0)))
    client.fails[2] = unreachable()
    async with PushRouter(client, Told(1, 2), GENERATE, busy_threshold=0.5, loads=loads) as router:
        with pytest.raises(BusyError):
            await router.generate({})
        assert client.asked == [2]


# --- the least work ---------------------------------------------------------------------------------------------------


class Index:
    """What an indexer would say, whatever the prompt."""

    block_size = 4

    def __init__(self, **held: int) -> None:
        self.held = {WorkerKey(int(name[1:])): blocks for name, blocks in held.items()}

    def find_matches(self, token_ids: Sequence[int]) -> Mapping[WorkerKey, int]:
        return self.held


TOKENS = list(range(40))  # ten blocks


async def test_who_holds_the_prompt_gets_it(client: Scripted, cells: Any) -> None:
    index = Index(w1=3, w2=8)
    async with PushRouter(client, Told(1, 2, 3), GENERATE, mode="kv", index=index) as router:
        found = await router.generate({}, tokens=TOKENS)
        assert found.instance.instance_id == 2
    assert cells.overlap_blocks.value == 8
    assert cells.prompt_blocks.value == 10
    assert cells.picks[PickMode.KV].value == 1


async def test_who_holds_the_prompt_and_is_too_busy_does_not(client: Scripted) -> None:
    index, loads = Index(w1=8), Loads().set((1, load(9)), (2, load(0)))
    async with PushRouter(client, Told(1, 2), GENERATE, mode="kv", index=index, loads=loads) as router:
        found = await router.kv({}, tokens=TOKENS)  # 2 + 9 > 10 + 0
        assert found.instance.instance_id == 2
    async with PushRouter(
        client, Told(1, 2), GENERATE, mode="kv", index=index, loads=loads, overlap_score_weight=2
    ) as router:
        found = await router.kv({}, tokens=TOKENS)  # 4 + 9 < 20 + 0
        assert found.instance.instance_id == 1


async def test_a_burst_does_not_go_to_one_of_them(client: Scripted) -> None:
    loads = Loads().set((1, load(0)), (2, load(1)), (3, load(2)))
    async with PushRouter(client, Told(1, 2, 3), GENERATE, mode="kv", index=Index(), loads=loads) as router:
        assert await asked(router, client, 30, tokens=TOKENS) == {1: 10, 2: 10, 3: 10}


async def test_without_an_index_or_tokens_a_request_counts_too(client: Scripted) -> None:
    loads = Loads().set((1, load(0)), (2, load(0)))
    async with PushRouter(client, Told(1, 2), GENERATE, mode="kv", loads=loads) as router:
        assert await asked(router, client, 10) == {1: 5, 2: 5}


async def test_what_was_routed_is_given_back_at_its_end_and_when_it_fails(client: Scripted) -> None:
    async with PushRouter(client, Told(1, 2), GENERATE, mode="kv", index=Index(w1=10)) as router:
        first = await router.generate({}, tokens=TOKENS)
        assert first.instance.instance_id == 1  # costs 0 there, and 10 elsewhere
        second = await router.generate({}, tokens=TOKENS)  # 10 and 10
        third = await router.generate({}, tokens=TOKENS)
        assert {second.instance.instance_id, third.instance.instance_id} <= {1, 2}
        for found in (first, second, third):
            assert isinstance(found, Answer)
            found.end(CallOutcome.OK)
        client.fails[1] = RpcRemoteError("e", "it raised")
        with pytest.raises(RpcRemoteError):
            await router.generate({}, tokens=TOKENS)
        del client.fails[1]
        assert (await router.generate({}, tokens=TOKENS)).instance.instance_id == 1  # nothing is left over


async def test_what_ended_is_not_kept_for_one_that_goes_on(client: Scripted) -> None:
    async with PushRouter(client, Told(1), GENERATE, mode="kv", index=Index()) as router:
        long = await router.generate({}, tokens=TOKENS)
        for _ in range(100):
            found = await router.generate({}, tokens=TOKENS)
            assert isinstance(found, Answer)
            found.end(CallOutcome.OK)
        member = router._members[1]  # pyright: ignore[reportPrivateUsage]
        assert (len(member.routed), member.routed_blocks) == (1, 10)
        assert isinstance(long, Answer)
        long.end(CallOutcome.OK)
        assert (len(member.routed), member.routed_blocks) == (0, 0)


async def test_a_later_report_has_seen_what_was_routed_before_it(
    client: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads_module, "REPORT_LAG_SECONDS", 0.0)
    loads = Loads().set((1, load(0, heard=1e6)), (2, load(5, heard=1e6)))
    async with PushRouter(client, Told(1, 2), GENERATE, mode="kv", index=Index(), loads=loads) as router:
        assert (await router.generate({}, tokens=TOKENS)).instance.instance_id == 1
        assert (await router.generate({}, tokens=TOKENS)).instance.instance_id == 2  # 10 + 10 > 10 + 5
        await asyncio.sleep(0.001)
        loads.set((1, load(0)), (2, load(5)))  # they say so now: both prompts are done already
        assert (await router.generate({}, tokens=TOKENS)).instance.instance_id == 1


async def test_requests_that_wait_at_a_worker_count_like_this_one(client: Scripted) -> None:
    loads = Loads().set((1, load(0, waiting=2)), (2, load(15)))
    async with PushRouter(client, Told(1, 2), GENERATE, mode="kv", index=Index(), loads=loads) as router:
        assert (await router.generate({}, tokens=TOKENS)).instance.instance_id == 2


async def test_who_was_never_heard_is_taken_for_average(client: Scripted) -> None:
    loads = Loads().set((1, load(10)), (2, load(40)))
    async with PushRouter(client, Told(1, 2, 3), GENERATE, mode="kv", index=Index(), loads=loads) as router:
        picks = [(await router.generate({}, tokens=TOKENS)).instance.instance_id for _ in range(4)]
        assert picks[:2] == [1, 1]  # 10, 20; then 25 of the third, 30
        assert 3 in picks[2:]


async def test_ties_are_broken_at_random_and_a_temperature_draws(client: Scripted) -> None:
    async with PushRouter(client, Told(1, 2), GENERATE, mode="kv", index=Index()) as router:
        first: set[int] = set()
        for _ in range(60):
            found = await router.generate({}, tokens=TOKENS)
            assert isinstance(found, Answer)
            first.add(found.instance.instance_id)
            found.end(CallOutcome.OK)
        assert first == {1, 2}
    index = Index(w1=10)
    async with PushRouter(client, Told(1, 2), GENERATE, mode="kv", index=index, temperature=0.5) as router:
        drawn: Counter[int] = Counter()
        for _ in range(400):
            found = await router.generate({}, tokens=TOKENS)
            assert isinstance(found, Answer)
            drawn[found.instance.instance_id] += 1
            found.end(CallOutcome.OK)
        assert drawn[1] > 2 * drawn[2] > 0  # e^2 : 1, as the costs are brought to 0 and 1


COUNT = st.integers(0, 50)


@given(
    st.dictionaries(st.integers(1, 6), st.tuples(COUNT, st.integers(0, 4)), min_size=1),
    st.dictionaries(st.integers(1, 6), st.integers(0, 12)),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.integers(0, 48),
)
@settings(deadline=None)
def test_the_pick_is_of_the_least_cost(
    workers: dict[int, tuple[int, int]], held: dict[int, int], weight: float, tokens: int
) -> None:
    async def run() -> int:
        client = Scripted(rk.Registry(rk.Settings(), strict=True, builtin=False))
        loads = Loads().set(*((id, load(active, waiting=waiting)) for id, (active, waiting) in workers.items()))
        index = Index(**{f"w{id}": blocks for id, blocks in held.items()})
        async with PushRouter(
            client, Told(*workers), GENERATE, mode="kv", index=index, loads=loads, overlap_score_weight=weight
        ) as router:
            return (await router.kv({}, tokens=TOKENS[:1] * tokens)).instance.instance_id

    prompt = max(1, math.ceil(tokens / Index.block_size))
    known = held if tokens else {}
    costs = {
        id: weight * max(prompt - known.get(id, 0), 0) + active + waiting * prompt
        for id, (active, waiting) in workers.items()
    }
    assert costs[asyncio.run(run())] == min(costs.values())


# --- with real servers ------------------------------------------------------------------------------------------------


async def test_calls_reach_servers_and_go_elsewhere_when_one_leaves(registry: rk.Registry) -> None:
    async def generate(request: str) -> AsyncIterator[str]:
        for letter in request:
            yield letter

    servers = [MemoryServer(registry, instance_id=id) for id in (1, 2)]
    source = Told()
    async with AsyncExitStack() as stack:
        for server in servers:
            server.endpoint("backend.generate", generate)
            await stack.enter_async_context(server)
        source.now = tuple(each for server in servers for each in server.instances())
        client = await stack.enter_async_context(MemoryClient(registry))
        router = await stack.enter_async_context(PushRouter(client, source, GENERATE))
        answers = [await router.generate("ab") for _ in range(4)]
        assert [[item async for item in answer] for answer in answers] == [["a", "b"]] * 4
        assert Counter(answer.instance.instance_id for answer in answers) == {1: 2, 2: 2}
        await servers[0].stop()
        answers = [await router.generate("c") for _ in range(4)]
        assert {answer.instance.instance_id for answer in answers} == {2}
        assert [[item async for item in answer] for answer in answers] == [["c"]] * 4
        assert router.states() == {1: DOWN, 2: UP}


async def test_a_crash_in_the_middle_of_an_answer_is_seen(
    registry: rk.Registry, caplog: pytest.LogCaptureFixture
) -> None:
    async def generate(request: str) -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    caplog.set_level(logging.INFO)
    server = MemoryServer(registry, instance_id=1)
    server.endpoint("backend.generate", generate)
    async with server, MemoryClient(registry) as client:
        source = Told()
        source.now = (*server.instances(), instance(2))
        async with PushRouter(client, source, GENERATE) as router:
            answer = await router.direct("x", 1)
            assert await anext(aiter(answer)) == 1
            server.cut()
            with pytest.raises(RpcClosedError):
                await anext(aiter(answer))
            assert router.states()[1] is DOWN
    assert "out of rotation: an answer ended before its end" in caplog.text
