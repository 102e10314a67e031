"""The cells that users hold, from whichever twin runs, and the timer that feeds a histogram.

The handle is the cell: a Python wrapper around the native object would cost four times the update itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from rkmetrics.native import IMPLEMENTATION, twin
from rkmetrics.wrapping import inside

if TYPE_CHECKING:
    from rkmetrics import _cells as _impl
else:
    _impl = twin("cells")

__all__ = [
    "IMPLEMENTATION",
    "PEAK_REGION",
    "PEAK_SLOTS",
    "Block",
    "Bounds",
    "CounterCell",
    "GaugeCell",
    "GaugeShare",
    "HistogramCell",
    "Timer",
    "existing",
    "gather",
    "peaks",
]

PEAK_SLOTS, PEAK_REGION = _impl.PEAK_SLOTS, _impl.PEAK_REGION
Block = _impl.Block
Bounds = _impl.Bounds
CounterCell = _impl.Counter
GaugeCell = _impl.Gauge
GaugeShare = _impl.GaugeShare
HistogramCell = _impl.Histogram
existing = _impl.existing
gather = _impl.gather
peaks = _impl.peaks

P = ParamSpec("P")
R = TypeVar("R")


class Timer:
    """Observes elapsed seconds (monotonic clock) when its block ends, or when a call of its function does.

    One timer serves one block at a time; as a decorator it serves any number of calls at once.
    """

    __slots__ = ("_cell", "_exemplar", "_start")

    def __init__(self, cell: HistogramCell, exemplar: Mapping[str, str] | None = None) -> None:
        self._cell, self._exemplar, self._start = cell, exemplar, 0.0

    def __enter__(self) -> Timer:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cell.observe(time.perf_counter() - self._start, exemplar=self._exemplar)

    async def __aenter__(self) -> Timer:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        return inside(lambda: Timer(self._cell, self._exemplar), function)


_impl.time_with(Timer)
