"""How fast calls are, beside NVIDIA Dynamo's own Python binding: each client with each worker, each in a process.

    RKMETRICS_DYNAMO_PYTHON=.../bin/python python -m tests.services.dynamo_planes_rate 0.8 tcp

Wants etcd, and nats-server for 0.7. Pairs are measured in turn, so that whatever else the machine does falls on all.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import rkmetrics as rk
from rkmetrics.etcd.client import Etcd
from rkmetrics.etcd.dynamo import INSTANCES, Instance
from rkmetrics.planes import client_class, server_class
from rkmetrics.planes.calling import PlaneClient
from rkmetrics.planes.listing import EtcdLister
from tests.services.dynamo_handlers import NAMES, Handlers
from tests.services.etcd_server import EtcdServer
from tests.services.nats_server import NatsServer, free_port
from tests.services.real_dynamo import Peer, interpreters

NAMESPACE = "rate"
ROUNDS, SECONDS, ITEMS = 5, 2.0, 20_000
AT_ONCE = (1, 64)
REQUEST = {"hello": "world", "n": 2}

Measure = Callable[[], Coroutine[Any, Any, float]]


def registry(plane: str, release: str) -> rk.Registry:
    settings = rk.Settings(
        request_plane=plane,  # type: ignore[arg-type]
        wire=release,  # type: ignore[arg-type]
        namespace=NAMESPACE,
        tcp_rpc_host="127.0.0.1",
        http_rpc_host="127.0.0.1",
        http_rpc_port=0,
        nats_server=os.environ.get("NATS_SERVER"),
    )
    return rk.Registry(settings)


async def serve(plane: str, release: str) -> None:
    """Our worker, in a process of its own, until SIGTERM."""
    lister = EtcdLister(Etcd([os.environ["ETCD_ENDPOINTS"]]))
    server, handlers = server_class(plane)(registry(plane, release), instance_id=77, lister=lister), Handlers()
    for name in NAMES:
        server.endpoint(f"ours.{name}", getattr(handlers, name))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with server:
        await ended.wait()


class OurClient:
    """Our client, in this process."""

    def __init__(self, client: PlaneClient, etcd: Etcd) -> None:
        self._client, self._etcd = client, etcd

    async def _instance(self, endpoint: str) -> Instance:
        prefix = f"{INSTANCES}{NAMESPACE}/{endpoint.replace('.', '/')}/"
        (found,), _ = await self._etcd.range(prefix.encode())
        return Instance.decode(found.key.decode(), found.value)

    async def rate(self, endpoint: str, at_once: int) -> float:
        instance = await self._instance(endpoint)
        end, made = time.perf_counter() + SECONDS, 0

        async def caller() -> None:
            nonlocal made
            while time.perf_counter() < end:
                async for _ in await self._client.call(instance, REQUEST):
                    pass
                made += 1

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(at_once)))
        return made / (time.perf_counter() - began)

    async def item_rate(self, endpoint: str) -> float:
        instance, began, read = await self._instance(endpoint), time.perf_counter(), 0
        async for _ in await self._client.call(instance, {"n": ITEMS}):
            read += 1
        assert read == ITEMS
        return read / (time.perf_counter() - began)


async def measure(plane: str, release: str, folder: Path) -> None:
    environment = {
        "DYN_REQUEST_PLANE": plane,
        "DYN_LOG": "error",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_HTTP_RPC_HOST": "127.0.0.1",
        "ETCD_ENDPOINTS": os.environ["ETCD_ENDPOINTS"],
        **({"NATS_SERVER": os.environ["NATS_SERVER"]} if "NATS_SERVER" in os.environ else {}),
    }
    script, peers = Path(__file__).with_name("dynamo_rpc_peer.py"), list[Peer]()
    for name in ("worker", "client"):
        ports = {"DYN_TCP_RPC_PORT": str(free_port()), "DYN_HTTP_RPC_PORT": str(free_port())}
        peers.append(await Peer.start(release, script, folder / f"{name}.log", environment | ports))
        await peers[-1].ask("join", namespace=NAMESPACE, plane=plane)
    worker, client = peers
    await worker.ask("serve", component="theirs")
    command = [sys.executable, "-m", "tests.services.dynamo_planes_rate", release, plane, "serve"]
    server = await asyncio.create_subprocess_exec(*command)
    make: Callable[[rk.Registry], PlaneClient] = client_class(plane)
    try:
        for component in ("theirs", "ours"):  # until both are seen
            await client.ask("call", endpoint=f"{component}.count", request={"n": 1}, patience=30)
            await client.ask("call", endpoint=f"{component}.echo", request=1, patience=30)
        async with make(registry(plane, release)) as our_client:
            await compare(subjects_of(client, OurClient(our_client, Etcd([os.environ["ETCD_ENDPOINTS"]]))))
    finally:
        server.terminate()
        await server.wait()
        for peer in peers:
            await peer.end()


def subjects_of(client: Peer, ours: OurClient) -> dict[str, Measure]:
    """What is measured, by name."""
    found: dict[str, Measure] = {}
    for component in ("theirs", "ours"):
        echo, stream = f"{component}.echo", f"{component}.count"
        for at_once in AT_ONCE:
            what = f"{component} worker, {at_once} at once, calls/s"
            rate = {"endpoint": echo, "at_once": at_once, "seconds": SECONDS}
            found[f"their client, {what}"] = partial(client.ask, "rate", **rate)
            found[f"our client, {what}"] = partial(ours.rate, echo, at_once)
        what = f"{component} worker, one stream, items/s"
        found[f"their client, {what}"] = partial(client.ask, "item_rate", endpoint=stream, items=ITEMS)
        found[f"our client, {what}"] = partial(ours.item_rate, stream)
    return found


async def compare(subjects: dict[str, Measure]) -> None:
    """Measure in turn, and print medians."""
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(ROUNDS):
        for name, subject in subjects.items():
            found[name].append(await subject())
    for name, rates in found.items():
        print(f"{name:60} {median(rates):10,.0f}   ({min(rates):,.0f} to {max(rates):,.0f})", flush=True)


def main() -> None:
    release, plane = sys.argv[1:3]
    if sys.argv[3:] == ["serve"]:
        asyncio.run(serve(plane, release))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        etcd = EtcdServer(shutil.which("etcd") or "etcd", folder).start()
        os.environ["ETCD_ENDPOINTS"] = etcd.url
        nats = None
        if release == "0.7" or plane == "nats":
            nats = NatsServer(shutil.which("nats-server") or "nats-server", folder).start()
            os.environ["NATS_SERVER"] = nats.url
        try:
            print(json.dumps({"ai-dynamo-runtime": interpreters()[release].version, "plane": plane}))
            asyncio.run(measure(plane, release, folder))
        finally:
            etcd.stop()
            if nats is not None:
                nats.stop()


if __name__ == "__main__":
    main()
