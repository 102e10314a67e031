"""What a scrape does to the service around it: the stall of its event loop, and renderings that are shared.

A loop ticks every millisecond while the ASGI application answers scrapes in it, as it does under a server. The stall of
a scrape is the largest lateness of a tick from its beginning to its end (wall clock). The same loop without scrapes is
measured in between: what it has is the machine's.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import rkmetrics as rk
from rkmetrics.exposition import CODINGS
from rkmetrics.exposition.protobuf import PROTOBUF
from rkmetrics.exposition.render import Renderer
from rkmetrics.exposition.text import TEXT
from tests.bench import page
from tests.bench.base import Case, Scale
from tests.bench.peers import peer, present
from tests.bench.updates import OURS

__all__ = ["CASES"]

TICK_SECONDS = 0.001
PAUSE_SECONDS = 0.02
CLIENTS = 16

Scrape = Callable[[], Awaitable[int]]


def _scrape(app: Any, accept: bytes) -> Scrape:
    """GET /metrics with gzip, through the application and nothing else; answers the bytes of the body."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/metrics",
        "raw_path": b"/metrics",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"accept", accept), (b"accept-encoding", b"gzip")],
        "client": None,
        "server": None,
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def scrape() -> int:
        size = 0

        async def send(message: Any) -> None:
            nonlocal size
            assert message.get("status", 200) == 200, message
            size += len(message.get("body", b""))

        await app(dict(scope), receive, send)
        return size

    return scrape


class _Ticks:
    """A task that ticks, and how late it was."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def run(self) -> None:
        while True:
            due = perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self.worst = max(self.worst, perf_counter() - due)


async def _stalls(scrape: Scrape | None, times: int) -> list[float]:
    """The worst lateness within each scrape, in milliseconds; without one, within as much time as one may take."""
    ticks = _Ticks()
    ticking = asyncio.create_task(ticks.run())
    await asyncio.sleep(PAUSE_SECONDS)
    found: list[float] = []
    for _ in range(times):
        ticks.worst = 0.0
        if scrape is None:
            await asyncio.sleep(PAUSE_SECONDS)
        else:
            assert await scrape() > 0
            await asyncio.sleep(2 * TICK_SECONDS)  # a stall shows in the tick after it
        found.append(ticks.worst * 1e3)
        await asyncio.sleep(PAUSE_SECONDS)
    ticking.cancel()
    return found


def measure_stall(scale: Scale) -> Mapping[str, Sequence[float]]:
    """The stall of each of many scrapes, gzip; served in rounds."""
    content = page.CONTENTS["mix"]
    text, openmetrics = b"text/plain;version=0.0.4", b"application/openmetrics-text;version=1.0.0"
    protobuf = PROTOBUF.content_type.encode()

    def ours(accept: bytes) -> Scrape:
        return _scrape(rk.asgi.app(page.ours(content, scale.names)[0]), accept)

    def theirs(accept: bytes) -> Scrape:
        registry = page.prometheus(content, scale.names)
        return _scrape(peer("prometheus_client").make_asgi_app(registry), accept)

    scrapes: dict[str, Scrape | None] = {"no scrape": None}
    scrapes |= present(
        {
            OURS: lambda: ours(text),
            f"{OURS}, openmetrics": lambda: ours(openmetrics),
            f"{OURS}, protobuf": lambda: ours(protobuf),
            "prometheus_client": lambda: theirs(text),
            "prometheus_client, openmetrics": lambda: theirs(openmetrics),
        }
    )
    found: dict[str, list[float]] = {name: [] for name in scrapes}
    gc.collect()
    gc.freeze()  # else each subject pays for a garbage collector that goes through the objects of all others
    for _ in range(scale.rounds):
        for name, scrape in scrapes.items():
            found[name] += asyncio.run(_stalls(scrape, scale.scrapes))
    gc.unfreeze()
    return found


def measure_shared(scale: Scale) -> Mapping[str, Sequence[float]]:
    """How often the page was rendered while 16 clients asked at once, in each round."""
    registry, _ = page.ours(page.CONTENTS["mix"], scale.names)
    renderer = Renderer(registry)
    gzip = next(coding for coding in CODINGS if coding.name == "gzip")
    done = registry.exporter.render_duration
    renderings: list[float] = []
    answers: list[float] = []

    async def ask() -> None:
        pages = await asyncio.gather(*(renderer.arender(TEXT, gzip) for _ in range(CLIENTS)))
        answers.append(float(len(pages)))

    for _ in range(scale.rounds):
        before = done.count
        asyncio.run(ask())
        renderings.append(float(done.count - before))
    return {"answers": answers, "renderings": renderings}


CASES = (
    Case("stall", "stall of the event loop by one scrape, gzip", "ms", measure_stall, note="wall clock"),
    Case("shared", f"{CLIENTS} scrapes at once", "", measure_shared),
)
