"""What the tests of collectors share: a registry that measures this process, and a look at what it says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rkmetrics.model import HistogramValue, MetricFamily
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings

Look = Callable[..., "float | HistogramValue | None"]
Script = Callable[..., str]


@pytest.fixture
def registry() -> Registry:
    return Registry(Settings())


@pytest.fixture
def look(registry: Registry) -> Look:
    """Return what the next scrape says: look("process_threads"), look(name, outcome="ok"); None without a series."""

    def look(name: str, of: Registry = registry, **labels: str) -> float | HistogramValue | None:
        for family in of.collect([name]):
            assert isinstance(family, MetricFamily)
            for series in family.series():
                if labels.items() <= dict(series.labels).items():
                    return series.value
        return None

    return look


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Run a program of its own, with warnings as errors; returns what it prints. path: where it also imports from."""

    def script(source: str, path: Path | None = None) -> str:
        paths = [str(each) for each in (Path.cwd(), path) if each]
        program = f"import sys; sys.path[:0] = {paths!r}\n{source}"
        out = subprocess.run(
            [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert (out.returncode, out.stderr) == (0, "")
        return out.stdout

    return script
