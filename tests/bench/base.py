"""What a benchmark is made of: subjects, rounds, and ratios within a round.

A comparison measures several subjects in turn, A B C A B C ..., so that whatever else the machine does falls on all of
them. Two figures stand for a subject: its median and its minimum. A ratio is taken within each round and then the
median of the rounds, so that a slow minute is in both of its sides.

Time is the CPU time of the measuring thread (of the whole process where other threads do the work), unless a case says
wall clock: what another process does in between is nobody's cost.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

__all__ = ["Case", "Figures", "Run", "Scale", "Skipped", "Subject", "cpu_seconds", "interleave", "ratio"]

#: Measures once, and answers in the unit of its case.
Subject = Callable[[], float]


class Skipped(Exception):
    """What is to be measured is not installed; says what is missing."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. tiny is for a test that everything runs, and says nothing about speed."""

    rounds: int = 15
    updates: int = 20_000  # updates of each subject in each round
    names: int = 200  # actor names of a page; 50 lines each
    series: int = 50_000  # counter series whose memory is measured
    bogus: int = 200_000  # names and values that nobody declared
    imports: int = 15
    scrapes: int = 12  # under a ticking loop, in each round

    @classmethod
    def tiny(cls) -> Scale:
        return cls(rounds=2, updates=10, names=2, series=100, bogus=300, imports=1, scrapes=2)

    @classmethod
    def full(cls) -> Scale:
        return cls(rounds=25, bogus=10_000_000, imports=25)


@dataclass(frozen=True, slots=True)
class Figures:
    """The measurements of one subject, by rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. measure: gives each subject's measurements. isolated: in an interpreter of its own, with these
    variables. compared: the subjects measure one thing, so that their ratios say something."""

    name: str
    title: str
    unit: str
    measure: Callable[[Scale], Mapping[str, Sequence[float]]]
    note: str = ""
    compared: bool = True
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(slots=True)
class Run:
    """What all cases gave: name of a case, then of a subject, to figures."""

    figures: dict[str, dict[str, Figures]] = field(default_factory=dict[str, dict[str, Figures]])

    def add(self, case: str, measured: Mapping[str, Sequence[float]]) -> None:
        self.figures[case] = {subject: Figures(tuple(samples)) for subject, samples in measured.items() if samples}

    def find(self, case: str, subject: str) -> Figures | None:
        return self.figures.get(case, {}).get(subject)


def interleave(rounds: int, subjects: Mapping[str, Subject], *, warm: bool = True) -> dict[str, list[float]]:
    """Measure all subjects once for each round, after one round that does not count."""
    measured: dict[str, list[float]] = {name: [] for name in subjects}
    if warm:
        for measure in subjects.values():
            measure()
    with _no_collection():
        for _ in range(rounds):
            for name, measure in subjects.items():
                measured[name].append(measure())
            gc.collect()  # between rounds, where it falls on nobody
    return measured


class _no_collection:
    """Without the garbage collector, as timeit does: its runs fall on whoever made the last object."""

    def __enter__(self) -> None:
        self._enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            gc.enable()


def cpu_seconds(run: Callable[[], Any], times: int = 1) -> float:
    """CPU time of one run, in seconds."""
    began = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - began) / times


def ratio(upper: Figures, lower: Figures) -> float:
    """The median of what upper is of lower, each pair taken in one round; NaN where lower is nothing."""
    if not all(lower.samples):
        return math.nan
    return median(a / b for a, b in zip(upper.samples, lower.samples, strict=True))
