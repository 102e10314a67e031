"""Garbage collections: how long Python stood still for each, and what came of it.

Counted from gc.callbacks, so nothing is missed between two scrapes. A callback runs while the collector does, inside
any allocation: it takes no lock and makes nothing that lasts. It must not hold the registry, since gc.callbacks lives
as long as the interpreter; when the registry goes, its callback goes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Literal
from weakref import finalize, ref

from rkmetrics.catalogue.runtime import Runtime

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["install"]

Callback = Callable[[Literal["start", "stop"], dict[str, int]], None]
GENERATIONS = ("0", "1", "2")


def install(registry: Registry) -> None:
    """Feed Runtime.gc_* until the registry is gone."""
    bound = registry.bind(Runtime)
    for generation in GENERATIONS:  # made now, so that the callback makes none
        _ = bound.gc_pause[generation], bound.gc_collected[generation], bound.gc_uncollectable[generation]
    callback = _callback(ref(bound))
    gc.callbacks.append(callback)
    finalize(bound, _remove, callback).atexit = False


def _callback(runtime: ref[Runtime]) -> Callback:
    # Not None between start and stop. A list change during a collection may leave out one of the two calls.
    began: float | None = None

    def collected(phase: Literal["start", "stop"], info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = perf_counter()
        elif began is not None and (bound := runtime()) is not None:
            generation = GENERATIONS[info["generation"]]
            bound.gc_pause[generation].observe(perf_counter() - began)
            bound.gc_collected[generation].inc(info["collected"])
            bound.gc_uncollectable[generation].inc(info["uncollectable"])
            began = None

    return collected


def _remove(callback: Callback) -> None:
    if callback in gc.callbacks:
        gc.callbacks.remove(callback)
