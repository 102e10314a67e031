"""Whom a call goes to: the next one, any, a given one, or the one for whom it is least work; and what if that fails.

    async with PushRouter(client, source, endpoint) as router:
        response = await router.generate({"prompt": "..."})

    pick ── call ── answer begins ──────────────────────── its end: what it held is given back
             └── failed, and nothing was delivered: DOWN, the next one is picked, at most `retries` times
                              └── probed with growing pauses ── a sign of life: UP

**The pool** is a tuple of those that are up and not busy. It is made anew when something changes, so a pick looks at
nothing else. Where all are down it is everybody: a router that knows somebody asks somebody (F15). DOWN is what this
router saw; what the source tells is who there is. A probe shows less than a call would (one that drains answers it), so
what goes down again soon after it came back waits longer each time, until a call of it succeeds.

**KV mode** picks the least cost, in blocks, as Dynamo's router does:

    cost = overlap_score_weight * (prompt blocks that the worker has to compute) + (blocks that it holds active)

Ties are broken at random; a temperature above 0 draws by softmax over the costs' range instead. The blocks it holds
are those of its last report, plus the prompts that this router sent there since, until a later report has seen them or
their answer ends: a burst does not all go to the one who was idle in the last report. A request that waits at a worker
counts like the one that is routed. Who has never said anything is taken for average, and is never busy; the same goes
for who has been silent too long, whose blocks stay as it last said.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self, TypedDict, Unpack

from rkmetrics.catalogue.planes import CallOutcome, InstanceState, PickMode, RpcRouting
from rkmetrics.errors import (
    BusyError,
    NoInstancesError,
    RpcClosedError,
    RpcError,
    RpcRefusedError,
    RpcTimeoutError,
    RpcUnreachableError,
)
from rkmetrics.kv.base import WorkerKey
from rkmetrics.planes.base import EndpointName, Instance, InstanceSource, Refusal, RpcResponse
from rkmetrics.planes.instances import Speaking, keep_following
from rkmetrics.planes.loads import Load, Loads, Member, Routed, by_instance
from rkmetrics.retry import StateLog

if TYPE_CHECKING:
    from rkmetrics.cells import GaugeShare
    from rkmetrics.planes.calling import PlaneClient

__all__ = ["CallOptions", "Overlaps", "PushRouter"]

log = logging.getLogger("rkmetrics.planes")

RETRIES = 3
#: How old the picture of the loads may be; between two looks only what was routed here changes it.
LOADS_SECONDS = 0.025

#: A refusal for which another request would be taken; the others say that the instance is the wrong one, or leaves.
PASSING = (Refusal.BUSY.text, Refusal.TOO_LARGE.text, Refusal.MALFORMED.text, "(status 413)")  # which proxies say
NOTHING: Mapping[int, int] = {}

_random = random.Random()  # noqa: S311 - spreads load, no secret


class Overlaps(Protocol):
    """Who knows which blocks workers hold; rk.kv.KvIndexer does. Their ids are those of the instances."""

    block_size: int

    def find_matches(self, token_ids: Sequence[int]) -> Mapping[WorkerKey, int]: ...


class CallOptions(TypedDict, total=False):
    """What a call may say besides the request, as RequestPlaneClient.call takes it."""

    id: str | None
    timeout_seconds: float | None
    type: Any
    traceparent: str | None


class PushRouter:
    """Calls an endpoint at one of its instances. Runs inside `async with`, in one event loop.

    mode: how `generate` picks: round_robin, random, or kv. busy_threshold: active blocks over all blocks, above which
    a worker is passed over; needs loads. retries: other instances that are asked, where nothing was delivered. parts:
    what runs beside it (index, subscriber, poller). Errors of a call are RpcError; NoInstancesError and BusyError are
    of the router itself. Raises ValueError for a mode that is none, and for one that needs what is not there.
    """

    def __init__(
        self,
        client: PlaneClient,
        source: InstanceSource,
        endpoint: EndpointName,
        *,
        mode: str = "round_robin",
        busy_threshold: float | None = None,
        index: Overlaps | None = None,
        loads: Loads | None = None,
        overlap_score_weight: float = 1.0,
        temperature: float = 0.0,
        retries: int = RETRIES,
        actor_name: str | None = None,
        parts: Sequence[AbstractAsyncContextManager[Any]] = (),
    ) -> None:
        _check(mode, busy_threshold, loads, overlap_score_weight, temperature, retries)
        self.client, self.endpoint, self.mode = client, endpoint, PickMode(mode)
        self.index, self.parts, self.retries = index, tuple(parts), retries
        self._source, self._loads, self._busy_threshold = source, loads, busy_threshold
        self._weight, self._temperature = overlap_score_weight, temperature
        self._name, self._speaking, self._log = str(endpoint), Speaking(client.mode), StateLog(log)
        self._members: dict[int, Member] = {}
        self._pool: tuple[Member, ...] = ()
        self._busy = False  # whether that is why the pool is empty
        self._at = _random.randrange(1 << 30)  # routers that begin together do not all begin with the same one
        self._loads_due = 0.0
        self._known = asyncio.Event()
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()
        cells = client.registry.bind(RpcRouting, actor_name=actor_name or endpoint.component)
        self._picks = {each: cells.picks[each] for each in PickMode}
        self._retries, self._rejections, self._probes = cells.retries, cells.rejections, cells.probes
        self._overlap_blocks, self._prompt_blocks = cells.overlap_blocks, cells.prompt_blocks
        self._gauges = {each: cells.instances[each] for each in InstanceState}
        self._shares: dict[InstanceState, GaugeShare] = {}
        self._pickers: Mapping[PickMode, Callable[[frozenset[int]], Member]] = {
            PickMode.ROUND_ROBIN: self._next,
            PickMode.RANDOM: self._any,
        }

    # --- its life -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._following is not None:
            raise RuntimeError(f"the router of {self._name} runs already")
        self._shares = {each: gauge.share() for each, gauge in self._gauges.items()}
        follow = keep_following(self._source, self.endpoint, self._hear)
        self._following = asyncio.create_task(follow, name=f"rkmetrics instances of {self._name}")
        try:
            for part in self.parts:
                await self._stack.enter_async_context(part)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        following, self._following = self._following, None
        members, self._members, self._pool = self._members, {}, ()  # a call that fails from now on has nobody probed
        self._known.clear()
        probing = [task for member in members.values() if (task := member.probing) is not None]
        tasks = [*probing, *([following] if following else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()
        self._members, self._pool = {}, ()  # a source may have told something last
        self._known.clear()
        for share in self._shares.values():
            share.close()

    # --- who there is -------------------------------------------------------------------------------------------------

    @property
    def known(self) -> bool:
        """Whether the source has told who there is, be it nobody."""
        return self._known.is_set()

    def instance_ids(self) -> tuple[int, ...]:
        """Those that the source tells of, up or down, in its order."""
        return tuple(self._members)

    def instances(self) -> tuple[Instance, ...]:
        """The same with their places."""
        return tuple(member.instance for member in self._members.values())

    def states(self) -> Mapping[int, InstanceState]:
        """What the router thinks of each."""
        return {id: _state(member) for id, member in self._members.items()}

    async def wait_for_instances(self, timeout_seconds: float | None = None) -> tuple[int, ...]:
        """Return the ids of those that there are, as soon as there is one. Raises NoInstancesError."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while not self._members:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise NoInstancesError(self._name, f"nobody serves it after {timeout_seconds:g} s") from None
        return self.instance_ids()

    def _hear(self, instances: tuple[Instance, ...]) -> None:
        """The source tells all there are; who stays keeps what is thought of it."""
        before, now = self._members, dict[int, Member]()
        for instance in self._speaking(instances):
            member = before.get(instance.instance_id)
            kept = member is not None and member.instance == instance
            now[instance.instance_id] = member if member is not None and kept else Member(instance)
        for id, member in before.items():
            if now.get(id) is not member and member.probing is not None:
                member.probing.cancel()
        self._members = now
        self._known.set()
        self._changed.set()
        self._loads_due = 0.0
        self._renew()

    def _renew(self) -> None:
        """Make the pool anew."""
        members = tuple(self._members.values())
        up = [member for member in members if member.probing is None]
        free = tuple([member for member in up if not member.busy])
        self._busy = bool(up) and not free
        self._pool = free if up else members
        counts = (len(free), len(members) - len(up), len(up) - len(free))
        for state, count in zip((InstanceState.UP, InstanceState.DOWN, InstanceState.BUSY), counts, strict=True):
            self._shares[state].set(count)

    # --- calls --------------------------------------------------------------------------------------------------------

    async def generate(
        self, request: Any, *, tokens: Sequence[int] | None = None, **options: Unpack[CallOptions]
    ) -> RpcResponse:
        """Call by the router's mode. tokens: of the prompt, for kv; without them it goes by load."""
        if self.mode is PickMode.KV:
            return await self.kv(request, tokens=tokens or (), **options)
        return await self._route(self.mode, request, options)

    async def round_robin(self, request: Any, **options: Unpack[CallOptions]) -> RpcResponse:
        """Call the next one."""
        return await self._route(PickMode.ROUND_ROBIN, request, options)

    async def random(self, request: Any, **options: Unpack[CallOptions]) -> RpcResponse:
        """Call any."""
        return await self._route(PickMode.RANDOM, request, options)

    async def direct(self, request: Any, instance_id: int, **options: Unpack[CallOptions]) -> RpcResponse:
        """Call that one, busy or not, up or down; nobody else is asked in its place."""
        options = await self._until_known(options)
        member = self._members.get(instance_id)
        if member is None:
            self._rejections["none"].inc()
            raise NoInstancesError(self._name, f"there is no instance {instance_id:x}")
        self._picks[PickMode.DIRECT].inc()
        return await self._call(member, request, options)

    async def kv(self, request: Any, *, tokens: Sequence[int], **options: Unpack[CallOptions]) -> RpcResponse:
        """Call the one for whom it is least work."""
        options = await self._until_known(options)
        index = self.index
        prompt = max(-(-len(tokens) // index.block_size) if index is not None else 0, 1)
        held = _by_worker(index.find_matches(tokens), prompt) if index is not None and tokens else NOTHING
        return await self._route(
            PickMode.KV, request, options, lambda tried: self._least(tried, held, prompt), prompt, held
        )

    async def _route(
        self,
        mode: PickMode,
        request: Any,
        options: CallOptions,
        pick: Callable[[frozenset[int]], Member] | None = None,
        prompt: int = 0,
        held: Mapping[int, int] = NOTHING,
    ) -> RpcResponse:
        """Pick and call, once more where nothing was delivered. prompt: its blocks; held: those that workers have."""
        if not self._known.is_set():
            options = await self._until_known(options)
        pick = pick or self._pickers[mode]
        seconds, tried = options.get("timeout_seconds"), frozenset[int]()
        deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        while True:
            member = self._pick(pick, tried)
            self._picks[mode].inc()
            try:
                response = await self._call(member, request, options, prompt)
            except RpcError as error:
                tried |= {member.id}
                if error.delivered or len(tried) > self.retries or tried >= self._members.keys():
                    raise
                if deadline is not None:
                    left = deadline - asyncio.get_running_loop().time()
                    if left <= 0:
                        raise
                    options = {**options, "timeout_seconds": left}
                self._retries.inc()
            else:
                if prompt:
                    self._prompt_blocks.inc(prompt)
                    self._overlap_blocks.inc(held.get(member.id, 0))
                return response

    def _pick(self, pick: Callable[[frozenset[int]], Member], tried: frozenset[int]) -> Member:
        """Pick one that was not tried. Raises NoInstancesError, BusyError."""
        if self._loads is not None:
            self._look_at_loads()
        if not self._pool:
            reason, error = ("busy", BusyError) if self._busy else ("none", NoInstancesError)
            self._rejections[reason].inc()
            raise error(self._name, self._why_nobody())
        return pick(tried)

    def _why_nobody(self) -> str:
        if self._busy:
            return f"all who are up have more than {self._busy_threshold:g} of their blocks active"
        return f"nobody serves it over {self.client.mode}"

    async def _call(self, member: Member, request: Any, options: CallOptions, prompt: int = 0) -> RpcResponse:
        loop = asyncio.get_running_loop()
        began = loop.time()
        routed = member.take(began, prompt) if prompt else None
        try:
            response = await self.client.call(member.instance, request, **options)
        except BaseException as error:
            if routed is not None:
                member.give_back(routed)
            if isinstance(error, RpcError) and self._is_down(error, loop.time() - began):
                self._went_down(member, error.reason)
            raise
        if member.probing is not None:
            self._came_up(member)
        response.when_over(partial(self._over, member, routed))
        return response

    def _over(self, member: Member, routed: Routed | None, outcome: CallOutcome) -> None:
        """An answer that began has ended."""
        if routed is not None:
            member.give_back(routed)
        if outcome is CallOutcome.CLOSED:
            self._went_down(member, "an answer ended before its end")
        else:
            member.backoff.reset()

    def _is_down(self, error: RpcError, seconds: float) -> bool:
        """Whether a call that did not begin says that the next one would not either.

        A time-out says so where it was the plane's; a caller may have less patience than any instance can meet.
        """
        if isinstance(error, RpcRefusedError):
            return not any(text in error.reason for text in PASSING)
        if isinstance(error, RpcTimeoutError):
            return seconds >= 0.99 * self.client.request_timeout_seconds
        return isinstance(error, RpcUnreachableError | RpcClosedError)

    async def _until_known(self, options: CallOptions) -> CallOptions:
        """A source that has just begun is waited for. Returns the options with what is left of their time."""
        if self._known.is_set():
            return options
        if self._following is None:
            raise RuntimeError(f"the router of {self._name} does not run: enter it with `async with`")
        loop, seconds = asyncio.get_running_loop(), options.get("timeout_seconds")
        began = loop.time()
        try:
            async with asyncio.timeout(self.client.request_timeout_seconds if seconds is None else seconds):
                await self._known.wait()
        except TimeoutError:
            self._rejections["none"].inc()
            raise NoInstancesError(self._name, "its source has not told who serves it") from None
        return options if seconds is None else {**options, "timeout_seconds": seconds - (loop.time() - began)}

    # --- picking ------------------------------------------------------------------------------------------------------

    def _next(self, tried: frozenset[int]) -> Member:
        pool = self._pool
        self._at += 1
        member = pool[self._at % len(pool)]
        if tried:
            for _ in range(len(pool)):
                if member.id not in tried:
                    return member
                self._at += 1
                member = pool[self._at % len(pool)]
            return self._leftover(tried)
        return member

    def _any(self, tried: frozenset[int]) -> Member:
        pool = self._pool
        if tried:
            pool = tuple([member for member in pool if member.id not in tried])
            if not pool:
                return self._leftover(tried)
        return pool[int(_random.random() * len(pool))]

    def _leftover(self, tried: frozenset[int]) -> Member:
        """All of the pool were tried: somebody out of rotation is better than nobody."""
        return next(member for id, member in self._members.items() if id not in tried)

    def _least(self, tried: frozenset[int], held: Mapping[int, int], prompt: int) -> Member:
        """The one of the least cost, or one drawn by it."""
        pool: Sequence[Member] = self._pool
        if tried:
            pool = [member for member in pool if member.id not in tried]
            if not pool:
                return self._leftover(tried)
        costs = self._costs(pool, held, prompt)
        least = min(costs)
        if self._temperature > 0:
            return _drawn(pool, costs, least, self._temperature)
        if costs.count(least) == 1:
            return pool[costs.index(least)]
        best = [member for member, cost in zip(pool, costs, strict=True) if cost == least]
        return best[int(_random.random() * len(best))]

    def _costs(self, pool: Sequence[Member], held: Mapping[int, int], prompt: int) -> list[float]:
        weight, blocks = self._weight, held.get
        return [
            weight * (prompt - blocks(member.id, 0)) + member.active + member.waiting * prompt + member.routed_blocks
            for member in pool
        ]

    # --- loads --------------------------------------------------------------------------------------------------------

    def _look_at_loads(self) -> None:
        """Bring the picture up to date, where it is too old."""
        now = asyncio.get_running_loop().time()
        if now < self._loads_due or self._loads is None:
            return
        self._loads_due = now + LOADS_SECONDS
        changed = False
        found = by_instance(self._loads.workers(), self._members, now)
        for id, member in self._members.items():
            load = found.get(id)
            member.hear(load)
            busy = load is not None and self._is_busy(load)
            changed = changed or busy != member.busy
            member.busy = busy
        self._fill_in()
        if changed:
            self._renew()

    def _fill_in(self) -> None:
        """Take those of whom nothing is known for average."""
        known = [load for member in self._members.values() if (load := member.load) is not None]
        count = len(known) or 1
        active, waiting = sum([load.active for load in known]) / count, sum([load.waiting for load in known]) / count
        for member in self._members.values():
            load = member.load
            member.active, member.waiting = (active, waiting) if load is None else (load.active, load.waiting)

    def _is_busy(self, load: Load) -> bool:
        threshold = self._busy_threshold
        return threshold is not None and not load.stale and load.total > 0 and load.active > threshold * load.total

    # --- who failed ---------------------------------------------------------------------------------------------------

    def _went_down(self, member: Member, reason: str) -> None:
        if member.probing is not None or self._members.get(member.id) is not member:
            return
        where = member.instance.transport[1]
        self._log.note(f"down {where}", logging.WARNING, "%s: %s is out of rotation: %s", self._name, where, reason)
        member.probing = asyncio.create_task(self._probe(member), name=f"rkmetrics probe of {where}")
        self._renew()

    def _came_up(self, member: Member) -> None:
        probing, member.probing = member.probing, None
        if probing is not None and probing is not asyncio.current_task():
            probing.cancel()
        where = member.instance.transport[1]
        self._log.note(f"up {where}", logging.INFO, "%s: %s is back in rotation", self._name, where)
        self._renew()

    async def _probe(self, member: Member) -> None:
        """Ask for a sign of life until there is one."""
        while True:
            await asyncio.sleep(member.backoff.next())
            try:
                good = await self.client.probe(member.instance)
            except Exception as error:  # a bug in it leaves nobody out of rotation for ever
                good = False
                self._log.note(f"probe {error!r}", logging.ERROR, "%s: a probe failed: %r", self._name, error)
            self._probes["ok" if good else "failed"].inc()
            if good:
                self._came_up(member)
                return


# --- parts of it that need no router ----------------------------------------------------------------------------------


def _check(
    mode: str,
    busy_threshold: float | None,
    loads: Loads | None,
    weight: float,
    temperature: float,
    retries: int,
) -> None:
    if mode not in ("round_robin", "random", "kv"):
        raise ValueError(f"mode={mode!r}: expected round_robin, random or kv (direct() takes the instance)")
    if busy_threshold is not None and not 0 <= busy_threshold <= 1:
        raise ValueError(f"busy_threshold={busy_threshold!r}: expected a part of all blocks, from 0 to 1")
    if busy_threshold is not None and loads is None:
        raise ValueError("busy_threshold needs loads: without them nobody is ever busy")
    if not (weight >= 0 and temperature >= 0 and math.isfinite(weight) and math.isfinite(temperature)):
        raise ValueError(f"overlap_score_weight={weight!r}, temperature={temperature!r}: expected 0 or more")
    if retries < 0:
        raise ValueError(f"retries={retries!r}: expected 0 or more")


def _state(member: Member) -> InstanceState:
    if member.probing is not None:
        return InstanceState.DOWN
    return InstanceState.BUSY if member.busy else InstanceState.UP


def _by_worker(matches: Mapping[WorkerKey, int], prompt: int) -> dict[int, int]:
    """The best of a worker's ranks, and never more than there is."""
    held: dict[int, int] = {}
    for (id, _), blocks in matches.items():
        if blocks > held.get(id, 0):
            held[id] = blocks if blocks < prompt else prompt
    return held


def _drawn(pool: Sequence[Member], costs: Sequence[float], least: float, temperature: float) -> Member:
    """One by softmax: the costs are brought to 0 to 1 first, so that a temperature means the same for any prompt."""
    span = max(costs) - least
    if not span:
        return _random.choice(pool)
    weights = [math.exp(-(cost - least) / span / temperature) for cost in costs]
    return _random.choices(pool, weights)[0]
