"""An application of two processes, a worker and a client, that runs over each request plane without a change.

    DYN_REQUEST_PLANE=tcp|http|nats ETCD_ENDPOINTS=... [NATS_SERVER=...] python -m tests.services.rpc_app worker
                                                                         python -m tests.services.rpc_app client 10

The worker prints a line of JSON when it is ready, and ends in order at SIGTERM. The client prints what it got.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import rkmetrics as rk

ENDPOINT = "backend.generate"
BLOCK_SIZE = 16


async def worker(registry: rk.Registry) -> None:
    """Serve until SIGTERM; then leave in order."""
    server = rk.rpc.server(registry)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)

    async def generate(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        tokens = request.get("tokens", ())
        if tokens:  # its cache holds the prompt from now on
            events.publish_stored(tokens, list(range(1, len(tokens) // BLOCK_SIZE + 1)))
        for number in range(request["n"]):
            yield {"worker": server.instance_id, "number": number}
            await asyncio.sleep(request.get("pause", 0))

    server.endpoint(ENDPOINT, generate)
    rk.rpc.serve_kv(server)
    events = rk.kv.KvEventPublisher(registry, block_size=BLOCK_SIZE)
    publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="backend")
    publisher.publish(
        rk.kv.ForwardPassMetrics(
            rk.kv.WorkerStats(request_active_slots=1, request_total_slots=4, num_requests_waiting=0),
            rk.kv.KvStats(
                kv_active_blocks=25, kv_total_blocks=100, gpu_cache_usage_perc=0.25, gpu_prefix_cache_hit_rate=0.5
            ),
        )
    )
    async with server:
        places = {found.endpoint: found.transport for found in server.instances()}
        print(json.dumps({"pid": os.getpid(), "id": server.instance_id, "places": places}), flush=True)
        await stopping.wait()
        print(json.dumps({"ended": await server.stop(20)}), flush=True)


async def client(registry: rk.Registry, calls: int) -> None:
    """Call as often as is wanted, and print what came."""
    async with rk.rpc.client(registry) as caller, rk.rpc.router(caller, ENDPOINT) as router:
        await router.wait_for_instances(30)
        for _ in range(calls):
            response = await router.generate({"n": 3})
            print(json.dumps([item async for item in response]), flush=True)


def main(role: str, *arguments: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    registry = rk.Registry(rk.Settings.from_env(os.environ))
    asyncio.run(worker(registry) if role == "worker" else client(registry, int(arguments[0])))


if __name__ == "__main__":
    main(*sys.argv[1:])
