"""Every case, in the order of the report."""

from __future__ import annotations

from collections.abc import Mapping

from tests.bench import actors, importing, memory, otlp, scrape, serving, updates
from tests.bench.base import Case

__all__ = ["CASES"]

_MODULES = (updates, actors, scrape, serving, memory, importing, otlp)

CASES: Mapping[str, Case] = {case.name: case for module in _MODULES for case in module.CASES}
