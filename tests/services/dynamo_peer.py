"""NVIDIA Dynamo's own runtime, driven by a test: run by an interpreter that has `ai-dynamo-runtime`, and no rkmetrics.

Speaks JSON lines: {"do": name, ...} comes in on stdin, {"ok": value} or {"error": text} goes out on stdout, in turn.
NATS_SERVER, ETCD_ENDPOINTS and DYN_REQUEST_PLANE are of the environment. Releases 0.6.0 to 0.7.1.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import AsyncIterator
from importlib import import_module
from importlib.metadata import version
from typing import Any

talk: Any = import_module("dynamo_loop")  # beside this script
llm: Any = import_module("dynamo.llm")
runtime: Any = import_module("dynamo.runtime")

STARTED_SECONDS = 30


class Peer:
    """What one process of Dynamo may be: a worker, an indexer, a router, a frontend, an aggregator."""

    def __init__(self) -> None:
        self._runtime: Any = None
        self._component: Any = None
        self._endpoint: Any = None
        self._metrics: Any = None
        self._events: Any = None
        self._indexer: Any = None
        self._router: Any = None
        self._aggregator: Any = None
        self._tasks: list[asyncio.Future[Any]] = []

    async def version(self) -> str:
        return version("ai-dynamo-runtime")

    async def hashes(self, tokens: list[int], block_size: int) -> list[int]:
        found: list[int] = llm.compute_block_hash_for_seq_py(tokens, block_size)
        return found

    # --- who it is ----------------------------------------------------------------------------------------------------

    async def join(self, namespace: str, component: str = "backend", endpoint: str = "generate") -> None:
        """Connect to NATS and etcd."""
        loop = asyncio.get_running_loop()
        self._runtime = (
            runtime.DistributedRuntime(loop, False)
            if version("ai-dynamo-runtime").startswith("0.6.")
            else runtime.DistributedRuntime(loop, "etcd", False)
        )
        self._component = self._runtime.namespace(namespace).component(component)
        self._endpoint = self._component.endpoint(endpoint)

    async def serve(self) -> int:
        """Serve the endpoint; the worker's id."""

        async def handler(request: Any) -> AsyncIterator[Any]:
            yield {"token_ids": [1], "finish_reason": "stop"}

        await self._component.create_service()
        self._tasks.append(asyncio.ensure_future(self._endpoint.serve_endpoint(handler)))
        client = await self._endpoint.client()
        await asyncio.wait_for(client.wait_for_instances(), STARTED_SECONDS)
        return int(
            self._endpoint.connection_id() if hasattr(self._endpoint, "connection_id") else self._endpoint.lease_id()
        )

    # --- a worker -----------------------------------------------------------------------------------------------------

    async def publish(
        self,
        active: int,
        waiting: int = 0,
        slots: int = 2,
        usage: float = 0.5,
        rank: int | None = None,
        spec: list[Any] | None = None,
    ) -> None:
        """Publish metrics; spec: the arguments of SpecDecodeStats."""
        if self._metrics is None:
            self._metrics = llm.WorkerMetricsPublisher()
            await self._started(self._metrics.create_endpoint(self._component))
        self._metrics.publish(
            llm.ForwardPassMetrics(
                llm.WorkerStats(slots, 64, waiting, rank),
                llm.KvStats(active, 1000, usage, 0.25),
                llm.SpecDecodeStats(*spec) if spec else None,
            )
        )

    async def _started(self, future: Any) -> None:
        """0.6.0 serves an endpoint as long as the future lasts; later releases are done at once."""
        if inspect.isawaitable(future):
            self._tasks.append(asyncio.ensure_future(future))
            await asyncio.wait(self._tasks[-1:], timeout=0.5)

    async def event_publisher(self, block_size: int, dp_rank: int = 0) -> None:
        self._events = llm.KvEventPublisher(self._component, 0, block_size, dp_rank)

    async def stored(
        self, event_id: int, tokens: list[int], sizes: list[int], hashes: list[int], parent: int | None = None
    ) -> None:
        """hashes, parent: i64."""
        self._events.publish_stored(event_id, tokens, sizes, hashes, 0, parent)

    async def removed(self, event_id: int, hashes: list[int]) -> None:
        self._events.publish_removed(event_id, hashes)

    # --- a router -----------------------------------------------------------------------------------------------------

    async def indexer(self, block_size: int) -> None:
        self._indexer = llm.KvIndexer(self._component, block_size)

    async def scores(self, tokens: list[int]) -> list[list[int]]:
        """What the indexer finds: [[worker id, rank, blocks], ...]."""
        return _scores(await self._indexer.find_matches_for_request(tokens, 0))

    async def router(self, block_size: int, options: dict[str, Any] | None = None) -> None:
        """One that chooses: under load, one in a hundred is born without its scheduler, and never will."""
        config = llm.KvRouterConfig(**(options or {}))
        for attempt in range(5):
            self._router = llm.KvPushRouter(self._endpoint, block_size, config)
            try:
                await self._router.best_worker([0] * block_size)
                return
            except Exception as error:
                print(f"router {attempt}: {error}", file=sys.stderr)
        raise RuntimeError("no router came up")

    async def best(self, tokens: list[int]) -> list[int]:
        """The router's choice: [worker id, rank, blocks]."""
        return list(await self._router.best_worker(tokens))

    async def dump(self) -> Any:
        """The events that make the router's index."""
        return json.loads(await self._router.dump_events())

    async def tree(self, events: list[str], hashes: list[int]) -> list[list[int]]:
        """What a bare tree finds for block hashes of tokens after events as they were published."""
        tree = llm.RadixTree()
        for text in events:
            event = json.loads(text)
            tree.apply_event(event["worker_id"], json.dumps(event["event"]).encode())
        return _scores(tree.find_matches(hashes))

    # --- who reads metrics --------------------------------------------------------------------------------------------

    async def model(self, folder: str, total_blocks: int, block_size: int) -> None:
        """Register a model that this worker has."""
        config = llm.ModelRuntimeConfig()
        config.total_kv_blocks = total_blocks
        await llm.register_llm(
            llm.ModelInput.Tokens,
            llm.ModelType.Chat | llm.ModelType.Completions,
            self._endpoint,
            folder,
            "tiny",
            kv_cache_block_size=block_size,
            runtime_config=config,
        )

    async def frontend(self, port: int, busy_threshold: float) -> None:
        """Serve HTTP, and answer 503 while each worker is busy."""
        router = llm.RouterConfig(llm.RouterMode.RoundRobin, busy_threshold=busy_threshold)
        arguments = llm.EntrypointArgs(
            llm.EngineType.Dynamic, http_host="127.0.0.1", http_port=port, router_config=router
        )
        engine = await llm.make_engine(self._runtime, arguments)
        self._tasks.append(asyncio.ensure_future(llm.run_input(self._runtime, "http", engine)))

    async def aggregator(self) -> None:
        """0.6.0 only: polls the statistics of the component's service."""
        self._aggregator = llm.KvMetricsAggregator(self._component)

    async def aggregated(self) -> list[dict[str, Any]]:
        found = await self._aggregator.get_metrics()
        return [
            {name: getattr(endpoint, name) for name in dir(endpoint) if not name.startswith("_")}
            for endpoint in found.endpoints
        ]


def _scores(found: Any) -> list[list[int]]:
    """0.6.0 has no ranks."""
    return sorted([*key, score] if isinstance(key, tuple) else [key, 0, score] for key, score in found.scores.items())


if __name__ == "__main__":
    asyncio.run(talk.answer(Peer()))
