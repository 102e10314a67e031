"""NVIDIA Dynamo's own runtime on the request planes, driven by a test: run by an interpreter that has
`ai-dynamo-runtime` 0.7 to 0.9, and no rkmetrics.

Speaks JSON lines, as dynamo_peer.py does: {"do": name, ...} on stdin, {"ok": value} or {"error": text} on stdout.
ETCD_ENDPOINTS, NATS_SERVER, DYN_TCP_RPC_* and DYN_HTTP_RPC_* are of the environment.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from importlib import import_module
from importlib.metadata import version
from typing import Any

talk: Any = import_module("dynamo_loop")  # beside this script, as are the handlers
handlers: Any = import_module("dynamo_handlers")
llm: Any = import_module("dynamo.llm")
runtime: Any = import_module("dynamo.runtime")

STARTED_SECONDS = 30


class Peer:
    """One process of Dynamo: a worker, a client, a frontend."""

    def __init__(self) -> None:
        self._runtime: Any = None
        self._component: Any = None
        self._namespace = ""
        self._handlers = handlers.Handlers()
        self._clients: dict[str, Any] = {}
        self._tasks: list[asyncio.Future[Any]] = []
        self._begun: asyncio.Future[dict[str, Any]]
        self._loading, self._loaded = False, dict[str, int]()
        self._callers: list[asyncio.Future[None]] = []

    async def version(self) -> str:
        return version("ai-dynamo-runtime")

    async def join(self, namespace: str, plane: str) -> None:
        """Connect to etcd, and to NATS where it has to be."""
        loop = asyncio.get_running_loop()
        if version("ai-dynamo-runtime").startswith("0.7."):
            assert os.environ["DYN_REQUEST_PLANE"] == plane
            self._runtime = runtime.DistributedRuntime(loop, "etcd", False)
        else:
            self._runtime = runtime.DistributedRuntime(loop, "etcd", plane, enable_nats=plane == "nats")
        self._namespace = namespace

    # --- a worker -----------------------------------------------------------------------------------------------------

    async def serve(self, component: str) -> int:
        """Serve all handlers; the instance's id."""
        served = self._runtime.namespace(self._namespace).component(component)
        if hasattr(served, "create_service"):
            await served.create_service()
        identity = 0
        for name in (*handlers.NAMES, "relay"):
            endpoint = served.endpoint(name)
            handler = self.relay if name == "relay" else getattr(self._handlers, name)
            self._tasks.append(asyncio.ensure_future(endpoint.serve_endpoint(handler)))
            client = await endpoint.client()
            await asyncio.wait_for(client.wait_for_instances(), STARTED_SECONDS)
            identity = int(endpoint.connection_id())
        return identity

    async def seen(self) -> list[dict[str, Any]]:
        """How each `forever` ended, and forget it."""
        found: list[dict[str, Any]] = self._handlers.seen
        self._handlers.seen = []
        return found

    async def relay(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """A handler that asks somebody else, as a prefill worker is asked."""
        client = await self._client(request["endpoint"])
        async for item in await client.round_robin(request["request"], context=context):
            yield item.data()

    # --- a client -----------------------------------------------------------------------------------------------------

    async def _client(self, endpoint: str) -> Any:
        if endpoint not in self._clients:
            component, name = endpoint.split(".")
            made = self._runtime.namespace(self._namespace).component(component).endpoint(name)
            self._clients[endpoint] = await made.client()
        return self._clients[endpoint]

    async def instance_ids(self, endpoint: str) -> list[int]:
        return sorted((await self._client(endpoint)).instance_ids())

    async def call(self, endpoint: str, request: Any, seconds: float = 20, patience: float = 5, **how: Any) -> Any:
        """Call, and say what came: items, and the error or "timeout" that ended it.

        how: instance, stop_after, drop_after (see _read). patience: how long it may find nobody, as a client that
        lists an instance calls it only a moment later.
        """
        due, client = time.monotonic() + patience, await self._client(endpoint)
        while True:
            found: dict[str, Any] = {"items": [], "error": None}
            try:
                async with asyncio.timeout(seconds):
                    await self._read(client, request, found["items"], **how)
            except TimeoutError:
                found["error"] = "timeout"
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {error}"
            if "no instances found" not in (found["error"] or "") or time.monotonic() >= due:
                return found
            await asyncio.sleep(0.05)

    async def begin(self, **arguments: Any) -> None:
        """Begin a call, whose end `result` awaits: one at a time."""
        self._begun = asyncio.ensure_future(self.call(**arguments))

    async def result(self) -> dict[str, Any]:
        return await self._begun

    async def _read(
        self,
        client: Any,
        request: Any,
        items: list[Any],
        instance: int | None = None,
        stop_after: int = 0,
        drop_after: int = 0,
    ) -> None:
        """stop_after: ask for no more after so many items; drop_after: let the stream go then."""
        context = runtime.Context()
        if instance is None:
            stream = await client.round_robin(request, context=context)
        else:
            stream = await client.direct(request, instance, context=context)
        async for item in stream:
            items.append(item.data())
            if len(items) == stop_after:
                context.stop_generating()
            if len(items) == drop_after:
                return

    async def calls(self, endpoint: str, number: int) -> list[list[Any]]:
        """So many at once; the items of each."""

        async def one(i: int) -> list[Any]:
            items: list[Any] = []
            await self._read(await self._client(endpoint), {"caller": i}, items)
            return items

        await self._client(endpoint)
        return await asyncio.gather(*(one(i) for i in range(number)))

    async def load(self, endpoint: str, at_once: int) -> None:
        """Call without end, until `unload`."""
        self._loading, self._loaded = True, dict[str, int]()

        async def caller() -> None:
            client = await self._client(endpoint)
            while self._loading:
                error = "ok"
                try:
                    await self._read(client, 1, [])
                except Exception as raised:
                    error = str(raised).partition("\n")[0]
                self._loaded[error] = self._loaded.get(error, 0) + 1

        self._callers = [asyncio.ensure_future(caller()) for _ in range(at_once)]

    async def unload(self) -> dict[str, int]:
        """How the calls ended: "ok", or what was wrong, to their number."""
        self._loading = False
        await asyncio.gather(*self._callers)
        return self._loaded

    async def loaded(self) -> int:
        """How many calls ended well so far."""
        return self._loaded.get("ok", 0)

    async def rate(self, endpoint: str, seconds: float, at_once: int) -> float:
        """Calls per second."""
        client = await self._client(endpoint)
        end, made = time.perf_counter() + seconds, 0

        async def caller() -> None:
            nonlocal made
            while time.perf_counter() < end:
                async for _ in await client.round_robin({"hello": "world", "n": 2}):
                    pass
                made += 1

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(at_once)))
        return made / (time.perf_counter() - began)

    async def item_rate(self, endpoint: str, items: int) -> float:
        """Items per second of one stream."""
        client, began, read = await self._client(endpoint), time.perf_counter(), 0
        async for _ in await client.round_robin({"n": items}):
            read += 1
        assert read == items
        return read / (time.perf_counter() - began)

    # --- a frontend ---------------------------------------------------------------------------------------------------

    async def frontend(self, port: int, polls: str, seconds: float) -> None:
        """Serve HTTP, and poll an endpoint for gauges."""
        arguments = llm.EntrypointArgs(
            llm.EngineType.Dynamic,
            http_host="127.0.0.1",
            http_port=port,
            router_config=llm.RouterConfig(llm.RouterMode.RoundRobin),
            custom_backend_metrics_endpoint=polls,
            custom_backend_metrics_polling_interval=seconds,
        )
        engine = await llm.make_engine(self._runtime, arguments)
        self._tasks.append(asyncio.ensure_future(llm.run_input(self._runtime, "http", engine)))


if __name__ == "__main__":
    asyncio.run(talk.answer(Peer()))
