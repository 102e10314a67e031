"""What tests of things that go on by themselves share: waiting until something is so, what was counted, a free port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import rkmetrics as rk

__all__ = ["counted", "free_port", "until"]


async def until(reached: Callable[[], object]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(60):  # for bugs only
        while not reached():  # noqa: ASYNC110 - what is waited for knows nothing of it
            await asyncio.sleep(0.002)


def counted(registry: rk.Registry, name: str, **labels: str) -> float:
    """The sum of a metric's series with such labels; of a histogram its number of observations."""
    found = 0.0
    family: Any
    for family in registry.collect({name}):
        for series in family.series():
            if labels.items() <= dict(series.labels).items():
                found += series.value if isinstance(series.value, float) else series.value.count
    return found


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
