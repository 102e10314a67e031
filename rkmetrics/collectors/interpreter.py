"""The interpreter: how many threads it knows, and which one it is."""

from __future__ import annotations

import platform
import threading
from typing import TYPE_CHECKING

from rkmetrics.catalogue.runtime import Runtime
from rkmetrics.cells import IMPLEMENTATION
from rkmetrics.collectors.base import Refresh

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["install"]


def install(registry: Registry) -> Refresh:
    """Feed Runtime.threads and, once, Runtime.info."""
    bound = registry.bind(Runtime)
    bound.info[platform.python_implementation(), platform.python_version(), IMPLEMENTATION].set(1)
    threads = bound.threads

    def interpreter() -> None:
        threads.set(threading.active_count())

    return interpreter
