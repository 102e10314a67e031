"""What the tests of the KV plane share: states, what goes over a server, what is counted, a program of its own.

Nothing here needs the client of NATS until it is used.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.kv.events import stream_name
from tests.services.nats_server import NatsServer
from tests.waiting import counted, until

__all__ = [
    "LINES",
    "SCRIPT",
    "Link",
    "MakeNats",
    "Registries",
    "Tap",
    "counted",
    "link",
    "metrics",
    "nats_lines",
    "run",
    "sent",
    "space",
    "stream",
    "tap",
    "until",
]

MakeNats = Callable[..., NatsServer]
Registries = Callable[..., rk.Registry]
LINES = 15  # R12: of the log, for an outage


def metrics(active: int = 100, waiting: int = 0, slots: int = 2, rank: int | None = None) -> rk.kv.ForwardPassMetrics:
    return rk.kv.ForwardPassMetrics(
        rk.kv.WorkerStats(
            data_parallel_rank=rank, request_active_slots=slots, request_total_slots=64, num_requests_waiting=waiting
        ),
        rk.kv.KvStats(
            kv_active_blocks=active,
            kv_total_blocks=1000,
            gpu_cache_usage_perc=active % 1000 / 1000,
            gpu_prefix_cache_hit_rate=0.25,
        ),
    )


class Tap:
    """What goes over a server, in order."""

    def __init__(self, client: Any) -> None:
        self.client, self.heard = client, list[tuple[str, bytes]]()

    async def hear(self, subject: str) -> None:
        async def note(message: Any) -> None:
            self.heard.append((message.subject, message.data))

        await self.client.subscribe(subject, cb=note)
        await self.client.flush()

    async def settle(self, number: int = 0) -> list[bytes]:
        """Wait for so many messages and a bit, and return what was said."""
        await until(lambda: len(self.heard) >= number)
        await asyncio.sleep(0.05)
        return [data for _, data in self.heard]


@asynccontextmanager
async def tap(server: NatsServer, *subjects: str) -> AsyncGenerator[Tap]:
    import nats

    client = await nats.connect(server.url)
    made = Tap(client)
    try:
        for subject in subjects:
            await made.hear(subject)
        yield made
    finally:
        await client.close()


def space(registry: rk.Registry) -> str:
    return registry.settings.namespace


async def stream(client: Any, registry: rk.Registry) -> list[Any]:
    """All messages of the stream of a registry's workers."""
    js, name = client.jetstream(), stream_name(space(registry), "backend")
    state = (await js.stream_info(name)).state
    return [await js.get_msg(name, seq) for seq in range(state.first_seq, state.last_seq + 1)]


def nats_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "rkmetrics.nats" and record.levelno >= logging.INFO
    ]


def sent(registry: rk.Registry) -> float:
    return counted(registry, "rkmetrics_kv_events_total", outcome="sent")


class Link:
    """A TCP proxy in front of a server, which a test cuts."""

    def __init__(self, port: int) -> None:
        self.target, self.writers = port, set[asyncio.StreamWriter]()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers |= {writer, other_writer}
        await asyncio.gather(self.pipe(reader, other_writer), self.pipe(other_reader, writer), return_exceptions=True)

    async def pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    def drop(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()


@asynccontextmanager
async def link(server: NatsServer) -> AsyncGenerator[tuple[Link, int]]:
    made = Link(server.port)
    listening = await asyncio.start_server(made.carry, "127.0.0.1", 0)
    yield made, listening.sockets[0].getsockname()[1]
    listening.close()
    made.drop()
    await asyncio.sleep(0.05)


SCRIPT = """
import os, sys
import rkmetrics as rk
registry = rk.Registry(rk.Settings(request_plane="nats", nats_server=sys.argv[1], namespace="exits"), builtin=False)
publisher = rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=1)
events = rk.kv.KvEventPublisher(registry, worker_id=1, block_size=4)
stats = rk.kv.WorkerStats(request_active_slots=0, request_total_slots=1, num_requests_waiting=0)
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DYN_", "NATS_"))}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,  # for bugs only
        env=environment,
        cwd=Path(__file__).parents[2],
    )
