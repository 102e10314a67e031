"""A fleet that is not there: simulated actors and LLM workers, counted by the very calls that a service makes.

It runs in an event loop of its own, in a daemon thread. A day passes in DAY_SECONDS; how many actors live and how much
they do follows its curve. Each actor is a task that starts (and at times fails to), takes messages, errs, crashes, and
shuts down. The fleet is a healthy one: what fails stays within the error budgets of alerts/slo.yaml. What happens is
drawn from one seeded random source; only the timing is not repeatable. The LLM workers are called over a real request
plane, on loopback, and are listed nowhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from rkmetrics import rpc
from rkmetrics.asgi.app import Message, Middleware, Receive, Scope, Send
from rkmetrics.catalogue.actors import KvOp, Phase, ShutdownReason, StateWrite, Subsystem, TaskKind
from rkmetrics.errors import RpcError
from rkmetrics.kv.base import ForwardPassMetrics, KvStats, SpecDecodeStats, WorkerStats
from rkmetrics.kv.publisher import KvEventPublisher, WorkerMetricsPublisher
from rkmetrics.planes.listening import call_home
from rkmetrics.planes.serving import Lister

if TYPE_CHECKING:
    from rkmetrics.actor import ActorMetrics, Held, Run
    from rkmetrics.planes.calling import PlaneClient
    from rkmetrics.planes.router import PushRouter
    from rkmetrics.planes.serving import PlaneServer
    from rkmetrics.registry import Registry

__all__ = [
    "DAY_SECONDS",
    "KINDS",
    "WORKERS",
    "Demo",
    "Failure",
    "Front",
    "Kind",
    "PrefixCache",
    "Worker",
    "WorkerKind",
    "load",
]

DAY_SECONDS = 180.0
STOP_SECONDS = 3.0
TICK_SECONDS = 0.25
REQUESTS_PER_SECOND = 12.0
HOST = "127.0.0.1"


class Failure(Exception):
    """What goes wrong in the simulation."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of actor. Rates are of one actor at the busiest hour; failures, errors and crashes are probabilities.

    most: actors that live at the busiest hour. task_seconds: the median. crashes: of each task, ending its actor.
    """

    name: str
    most: int
    lifetime_seconds: float
    messages_per_second: float
    task_seconds: float
    connections: int
    start_seconds: float
    start_failures: float = 0.002
    errors: float = 0.002
    crashes: float = 0.0005
    sleeps: float = 0.7
    tasks: tuple[TaskKind, ...] = (TaskKind.ACTION, TaskKind.ACTION, TaskKind.ACTION, TaskKind.WEBSOCKET_CALLBACK)


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """One kind of LLM worker. block_tokens: tokens of one KV cache block; shared: how often a conversation goes on."""

    name: str
    slots: int
    blocks: int
    requests_per_second: float
    prompt_blocks: int
    output_blocks: int
    seconds: float
    shared: float
    drafts: bool = False
    block_tokens: int = 16


KINDS: tuple[Kind, ...] = (
    Kind("chat-room", 24, 60, 1.5, 0.012, 8, 0.02),
    Kind("game-session", 10, 45, 4.0, 0.006, 4, 0.08, sleeps=0.1),
    Kind(
        "agent", 14, 30, 0.6, 0.35, 1, 0.15, start_failures=0.003, errors=0.003, crashes=0.003, sleeps=0.3,
        tasks=(TaskKind.ACTION, TaskKind.QUEUE_WAIT, TaskKind.SCHEDULED_ACTION, TaskKind.WAIT_UNTIL),
    ),
    Kind("matchmaker", 2, 600, 3.0, 0.03, 2, 0.05, start_failures=0.0, crashes=0.0),
)  # fmt: skip

WORKERS: tuple[WorkerKind, ...] = (
    WorkerKind("llm-prefill", 4, 4_096, 5.0, 96, 0, 0.5, 0.45),
    WorkerKind("llm-decode", 20, 8_192, 5.0, 96, 48, 3.5, 0.0, drafts=True),
)


def load(day: float) -> float:
    """Return how busy the fleet is, 0 to 1, at a time of the day from 0 (04:00, the quietest) to 1."""
    return 0.52 - 0.42 * math.cos(2 * math.pi * day) + 0.06 * math.sin(6 * math.pi * day)


class Demo:
    """The simulation, as a context manager: inside the block it runs, leaving it lets the actors shut down.

    day_seconds: how long a day is. registry: where it counts; it may hold real sets as well. Raises MissingExtraError
    where the settings want NATS, and what that needs is not installed.
    """

    def __init__(self, registry: Registry, *, seed: int = 7, day_seconds: float = DAY_SECONDS) -> None:
        self.registry, self.random, self.day_seconds = registry, Random(seed), day_seconds  # noqa: S311 - not a secret
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="rkmetrics-demo", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._running = threading.Event()
        self._born = time.monotonic()
        self._numbers = 0
        self.workers = [Worker(self, kind, number) for number, kind in enumerate(WORKERS, 1)]

    def __enter__(self) -> Demo:
        self._thread.start()
        self._running.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        """Let every actor shut down, for STOP_SECONDS at most."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # closed already
                loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(STOP_SECONDS + 1)

    @property
    def load(self) -> float:
        """How busy the fleet is now; it begins in the morning."""
        return load(((time.monotonic() - self._born) / self.day_seconds + 0.25) % 1)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._running.set()
        fleets = [self._fleet(kind) for kind in KINDS]
        workers = [worker.run() for worker in self.workers]
        with suppress(TimeoutError):
            work = asyncio.gather(*fleets, *workers, Front(self).run())
            await self._stopping.wait()
            await asyncio.wait_for(work, STOP_SECONDS)

    async def rest(self, seconds: float) -> bool:
        """Wait, unless all comes to its end. True while the simulation goes on."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        return not self._stopping.is_set()

    def seconds(self, median: float) -> float:
        """Draw a duration: most are near the median, some take many times as long, as they do."""
        return min(self.random.lognormvariate(math.log(median), 0.7), 20 * median)

    def chance(self, probability: float) -> bool:
        """Draw whether something happens."""
        return self.random.random() < probability

    # --- actors -------------------------------------------------------------------------------------------------------

    async def _fleet(self, kind: Kind) -> None:
        """Keep as many actors of a kind alive as the hour asks for; the others sleep when their time comes."""
        actor = self.registry.actor(kind.name)
        alive: set[asyncio.Task[None]] = set()
        while await self.rest(TICK_SECONDS * self.random.uniform(0.5, 1.5)):
            alive = {task for task in alive if not task.done()}
            if len(alive) < round(kind.most * self.load):
                alive.add(asyncio.create_task(self._live(actor, kind)))
        await asyncio.gather(*alive)

    async def _live(self, actor: ActorMetrics, kind: Kind) -> None:
        self._numbers += 1
        with suppress(Failure):
            async with actor.running(actor_id=f"{kind.name}-{self._numbers:04x}") as run:
                await self._start(actor, run, kind)
                await self._work(actor, run, kind)
                await self._stop(run, kind)

    async def _start(self, actor: ActorMetrics, run: Run, kind: Kind) -> None:
        def part(share: float) -> float:
            return self.seconds(kind.start_seconds * share)

        async with run.startup() as startup:
            async with startup.phase(Phase.LOAD_PERSISTED), actor.kv(KvOp.GET, keys=1):
                await asyncio.sleep(part(0.3))
            startup.is_new = self.chance(0.4)
            async with startup.phase(Phase.CORE_INIT):
                await asyncio.sleep(part(0.1))
            if startup.is_new:
                async with startup.phase(Phase.CREATE_STATE):
                    await asyncio.sleep(part(0.1))
                actor.state_written(StateWrite.HAS_INITIALIZED)
            async with startup.phase(Phase.CREATE_VARS):
                await asyncio.sleep(part(0.05))
            async with startup.phase(Phase.RUNTIME_PREAMBLE):
                await asyncio.sleep(part(0.3))
                if self.chance(kind.start_failures):
                    raise Failure("the actor does not start")
            async with startup.phase(Phase.POST_READY):
                await asyncio.sleep(part(0.1))

    async def _work(self, actor: ActorMetrics, run: Run, kind: Kind) -> None:
        """Take messages from a queue that others fill, until its time has come."""
        end = time.monotonic() + self.random.expovariate(1 / kind.lifetime_seconds)
        queue: asyncio.Queue[TaskKind] = asyncio.Queue()
        connections: list[Held] = []
        senders = asyncio.create_task(self._send(actor, run, kind, queue))
        try:
            while not self._stopping.is_set() and time.monotonic() < end:
                self._change_connections(run, kind, connections)
                with suppress(TimeoutError):
                    await self._take(actor, run, kind, queue)
        finally:
            senders.cancel()
            for connection in connections:
                connection.end()

    async def _send(self, actor: ActorMetrics, run: Run, kind: Kind, queue: asyncio.Queue[TaskKind]) -> None:
        while await self.rest(self.random.expovariate(kind.messages_per_second * max(self.load, 0.05))):
            burst = self.random.randint(5, 15) if self.chance(0.02) else 1
            for _ in range(burst):
                queue.put_nowait(self.random.choice(kind.tasks))
                actor.queue_sent.inc()
            run.queue_depth.set(queue.qsize())

    async def _take(self, actor: ActorMetrics, run: Run, kind: Kind, queue: asyncio.Queue[TaskKind]) -> None:
        async with asyncio.timeout(TICK_SECONDS):
            task = await queue.get()
        actor.queue_received.inc()
        run.queue_depth.set(queue.qsize())
        if self.chance(kind.crashes):
            raise Failure("the actor crashes")
        with suppress(Failure):
            async with run.task(task):
                await asyncio.sleep(self.seconds(kind.task_seconds))
                if self.chance(kind.errors):
                    raise Failure("the task errs")
                await self._save(actor)

    async def _save(self, actor: ActorMetrics) -> None:
        if self.chance(0.3):
            actor.state_written()
            async with actor.kv(KvOp.PUT, keys=self.random.randint(1, 12)):
                await asyncio.sleep(self.seconds(0.003))

    def _change_connections(self, run: Run, kind: Kind, connections: list[Held]) -> None:
        wanted = round(kind.connections * self.load)
        if len(connections) < wanted and self.chance(0.3):
            connections.append(run.connection().begin())
        elif connections and (len(connections) > wanted or self.chance(0.02)):
            connections.pop(self.random.randrange(len(connections))).end()

    async def _stop(self, run: Run, kind: Kind) -> None:
        reason = ShutdownReason.SLEEP if self.chance(kind.sleeps) else ShutdownReason.DESTROY
        async with run.shutdown(reason) as shutdown, run.shutdown_task():
            await self.rest(self.seconds(0.05))
            await asyncio.sleep(0.02)
            if self.chance(0.02):
                shutdown.timed_out()
                shutdown.undrained(Subsystem.HTTP_REQUESTS)


class Front:
    """The service's ASGI application behind the middleware, and the clients that call it."""

    def __init__(self, demo: Demo) -> None:
        self.demo, self.node = demo, demo.registry.node
        self.application = Middleware(self._answer, demo.registry)

    async def run(self) -> None:
        """Send requests until the simulation ends."""
        self.node.connected_peers.set(len(WORKERS))
        self.node.backoff_requests.set(0)
        calls: set[asyncio.Task[None]] = set()
        while await self.demo.rest(self.demo.random.expovariate(REQUESTS_PER_SECOND * max(self.demo.load, 0.05))):
            calls = {call for call in calls if not call.done()}
            calls.add(asyncio.create_task(self._call()))
        await asyncio.gather(*calls)

    async def _call(self) -> None:
        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(_: Message) -> None:
            await asyncio.sleep(0)

        with suppress(Failure):
            await self.application({"type": "http", "method": "POST", "path": "/act", "headers": []}, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(self.demo.seconds(0.03))
        if self.demo.chance(0.0003):
            raise Failure("the application raises")
        status = 404 if self.demo.chance(0.03) else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class PrefixCache:
    """What a worker remembers of earlier prompts: leading blocks of conversations, the least used ones forgotten first.

    Each change is an event, as an engine publishes it.
    """

    def __init__(self, events: KvEventPublisher, limit: int) -> None:
        self.events, self.limit = events, limit
        self.held: OrderedDict[int, int] = OrderedDict()  # conversation -> its leading blocks
        self.blocks = 0

    def look_up(self, conversation: int, blocks: int) -> int:
        """Return how many leading blocks of a prompt are there already; from now on all of them are."""
        known = self.held.pop(conversation, 0)
        self.held[conversation] = max(known, blocks)
        if blocks > known:
            self._store(conversation, known, blocks)
        while self.blocks > self.limit and len(self.held) > 1:
            self._evict()
        return min(known, blocks)

    def _store(self, conversation: int, known: int, blocks: int) -> None:
        self.blocks += blocks - known
        size = self.events.block_size
        tokens = [(conversation * 7919 + at) % 2**31 for at in range(known * size, blocks * size)]
        hashes = self._hashes(conversation, known, blocks)
        self.events.publish_stored(tokens, hashes, parent_hash=hashes[0] - 1 if known else None)

    def _evict(self) -> None:
        conversation, blocks = self.held.popitem(last=False)
        self.blocks -= blocks
        self.events.publish_removed(reversed(self._hashes(conversation, 0, blocks)))

    def _hashes(self, conversation: int, start: int, end: int) -> list[int]:
        """The engine's own names of blocks: any numbers will do."""
        return [(conversation << 20) + at for at in range(start, end)]


class Worker:
    """One simulated LLM worker: requests wait for a slot, fill KV cache blocks, and give them back.

    They come over the tcp plane, from a client that knows its address.
    """

    def __init__(self, demo: Demo, kind: WorkerKind, worker_id: int) -> None:
        self.demo, self.kind = demo, kind
        self.actor = demo.registry.actor(kind.name)
        self.publisher = WorkerMetricsPublisher(demo.registry, actor_name=kind.name, worker_id=worker_id)
        self.events = KvEventPublisher(demo.registry, worker_id=worker_id, block_size=kind.block_tokens)
        self.cache = PrefixCache(self.events, kind.blocks // 2)
        self.slots = asyncio.Semaphore(kind.slots)
        self.used = self.waiting = self.active = self.conversations = 0
        self.hit_rate = 0.0
        self.drafted = self.accepted = 0

    async def run(self) -> None:
        """Take requests and publish, until the simulation ends."""
        with self.publisher, self.events:
            async with self.actor.running(actor_id=f"{self.kind.name}-0") as run:
                await self._serve_and_call(run)

    async def _serve_and_call(self, run: Run) -> None:
        def generate(request: dict[str, int]) -> AsyncGenerator[int, None]:
            return self._serve(run, request["conversation"])

        endpoint = f"{self.kind.name}.generate"
        server, client = self._plane()
        server.endpoint(endpoint, generate)
        rpc.serve_kv(server, self.kind.name, stats=None)
        async with server, client, rpc.router(client, endpoint, instances=server.instances()) as router:
            await self._call_until_the_end(router)

    def _plane(self) -> tuple[PlaneServer, PlaneClient]:
        """Both ends of the tcp plane: on loopback, at a free port, and listed nowhere, whatever the settings say."""
        registry = self.demo.registry
        settings = dataclasses.replace(registry.settings, tcp_rpc_host=HOST, tcp_rpc_port=0, advertise_address=None)
        server = rpc.server(registry, mode="tcp", lister=Lister(), homes_allowed=lambda host: host == HOST)
        client = rpc.client(registry, mode="tcp")
        server.settings = client.settings = settings
        client.home = call_home(settings, HOST)
        return server, client

    async def _call_until_the_end(self, router: PushRouter) -> None:
        publishing = asyncio.create_task(self._publish())
        requests: set[asyncio.Task[None]] = set()
        while await self._next():
            requests = {request for request in requests if not request.done()}
            requests.add(asyncio.create_task(self._call(router)))
        await asyncio.gather(publishing, *requests)

    async def _call(self, router: PushRouter) -> None:
        """A request; some callers lose their patience, and leave in the middle of the answer."""
        patient = self.demo.chance(0.98)
        with suppress(RpcError):
            async with await router.generate({"conversation": self._conversation()}) as response:
                async for _ in response:
                    if not patient:
                        break

    async def _next(self) -> bool:
        rate = self.kind.requests_per_second * max(self.demo.load, 0.05)
        return await self.demo.rest(self.demo.random.expovariate(rate))

    async def _serve(self, run: Run, conversation: int) -> AsyncGenerator[int, None]:
        """The handler: block after block, once there is a slot."""
        self.waiting += 1
        try:
            await self.slots.acquire()
        finally:
            self.waiting -= 1
        self.active += 1
        try:
            async with run.task(TaskKind.HTTP), run.http_request(), aclosing(self._compute(conversation)) as blocks:
                async for block in blocks:
                    yield block
        finally:
            self.active -= 1
            self.slots.release()

    async def _compute(self, conversation: int) -> AsyncGenerator[int, None]:
        """Prompt first, of which blocks that are cached already cost nothing; then block after block of output."""
        demo, kind = self.demo, self.kind
        held = prompt = max(1, min(round(demo.seconds(kind.prompt_blocks)), kind.blocks // kind.slots))
        cached = self.cache.look_up(conversation, prompt)
        self.publisher.count_prefix_cache(queries=prompt * kind.block_tokens, hits=cached * kind.block_tokens)
        self.hit_rate = cached / prompt
        self.used += prompt
        steps = max(1, round(demo.seconds(kind.output_blocks))) if kind.output_blocks else 1
        try:
            for step in range(steps):
                if not await demo.rest(demo.seconds(kind.seconds) / steps):
                    break
                if kind.drafts and self.used < kind.blocks:
                    held += 1
                    self.used += 1
                    self._draft()
                yield step
        finally:
            self.used -= held

    def _conversation(self) -> int:
        """A conversation that goes on, or a new one."""
        if self.conversations and self.demo.chance(self.kind.shared):
            return self.demo.random.randint(max(1, self.conversations - 20), self.conversations)
        self.conversations += 1
        return self.conversations

    def _draft(self) -> None:
        drafted = 4 * self.kind.block_tokens // 2
        self.drafted += drafted
        self.accepted += round(drafted * self.demo.random.betavariate(6, 4))

    async def _publish(self) -> None:
        """Say how the worker is, as its engine would after each step."""
        while await self.demo.rest(TICK_SECONDS):
            self.publisher.publish(ForwardPassMetrics(self._stats(), self._kv_stats(), self._spec_decode_stats()))

    def _stats(self) -> WorkerStats:
        return WorkerStats(
            data_parallel_rank=0,
            request_active_slots=self.active,
            request_total_slots=self.kind.slots,
            num_requests_waiting=self.waiting,
        )

    def _kv_stats(self) -> KvStats:
        return KvStats(
            kv_active_blocks=self.used,
            kv_total_blocks=self.kind.blocks,
            gpu_cache_usage_perc=min(self.used / self.kind.blocks, 1.0),
            gpu_prefix_cache_hit_rate=self.hit_rate,
        )

    def _spec_decode_stats(self) -> SpecDecodeStats | None:
        if not self.kind.drafts:
            return None
        drafted, accepted, self.drafted, self.accepted = self.drafted, self.accepted, 0, 0
        return SpecDecodeStats(
            num_spec_tokens=4,
            num_drafts=drafted // 4,
            num_draft_tokens=drafted,
            num_accepted_tokens=accepted,
        )
