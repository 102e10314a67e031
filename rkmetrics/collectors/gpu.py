"""GPU usage through NVIDIA's library, where the program has its Python binding (pynvml, from nvidia-ml-py).

The driver may take its time, so a thread asks it: a scrape waits WAIT_SECONDS for the answer, and takes the one
before if it is late.
"""

from __future__ import annotations

import logging
import threading
from importlib import import_module
from importlib.util import find_spec
from time import monotonic
from typing import Any

from rkmetrics.collectors.base import PerProcess, Turn

__all__ = ["INTERVAL_SECONDS", "WAIT_SECONDS", "Gpus", "usage"]

INTERVAL_SECONDS = 1.0
WAIT_SECONDS = 0.02

BINDING = "pynvml"


class Gpus:
    """The GPUs of this machine, asked at most once in INTERVAL_SECONDS."""

    def __init__(self) -> None:
        self._present = find_spec(BINDING) is not None
        self._nvml: Any = None
        self._latest: float | None = None
        self._next, self._turn = 0.0, Turn()

    def usage(self) -> float | None:
        """Return the share of time that the GPUs were busy, 0 to 1, their mean; None without GPUs."""
        now = monotonic()
        if self._present and now >= self._next and self._turn.take():
            self._next = now + INTERVAL_SECONDS
            thread = threading.Thread(target=self._ask, name="rkmetrics-gpu", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread to be had; the next time may do better
                self._turn.give()
            else:
                thread.join(WAIT_SECONDS)
        return self._latest

    def _ask(self) -> None:
        try:
            self._latest = self._mean()
        except Exception as error:  # the binding without a driver, a driver that was updated, a GPU that fell off
            self._latest = None
            self._present = self._nvml is not None
            logging.getLogger("rkmetrics").debug("GPU usage is left out: %r", error)
        finally:
            self._turn.give()

    def _mean(self) -> float | None:
        if self._nvml is None:
            nvml = import_module(BINDING)
            nvml.nvmlInit()
            self._nvml = nvml
        handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
        busy = [float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100 for handle in handles]
        return sum(busy) / len(busy) if busy else None


_own = PerProcess(Gpus)


def usage() -> float | None:
    """Return how busy the GPUs are; None without GPUs, or without pynvml."""
    return _own.get().usage()
