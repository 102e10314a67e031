"""Every case, in the order of the report."""

from __future__ import annotations

from collections.abc import Mapping

from tests.bench import (
    actors,
    discovery,
    importing,
    kv_index,
    kv_publish,
    memory,
    otlp,
    planes,
    polling,
    scrape,
    serving,
    updates,
)
from tests.bench.base import Case

__all__ = ["CASES"]

_MODULES = (updates, actors, scrape, serving, memory, importing, otlp, kv_publish, kv_index, polling, discovery, planes)

CASES: Mapping[str, Case] = {case.name: case for module in _MODULES for case in module.CASES}
