"""No GPU is needed: the binding's shape counts here, so a module of that shape stands on the path of a child."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

BINDING = """
from types import SimpleNamespace
def nvmlInit(): {init}
def nvmlDeviceGetCount(): return {count}
def nvmlDeviceGetHandleByIndex(i): return i
def nvmlDeviceGetUtilizationRates(handle): return SimpleNamespace(gpu=[30, 50][handle])
"""

READ = """
import time
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings
registry = Registry(Settings())
series = []
for _ in range({rounds}):
    family, = registry.collect(["rkmetrics_node_gpu_usage_ratio"])
    series = [each.value for each in family.series()]
    if series: break
    time.sleep(0.01)
print(series, registry.vitals().gpu_usage)
"""


@pytest.mark.parametrize(
    ("init", "count", "rounds", "shown"),
    [
        ("pass", 2, 500, "[0.4] 40.0"),
        ("pass", 0, 5, "[] 0.0"),
        ("raise RuntimeError('driver not loaded')", 2, 5, "[] 0.0"),
        ("import time; time.sleep(30)", 2, 5, "[] 0.0"),
    ],
    ids=["two", "none", "no driver", "a driver that hangs"],
)
def test_usage_is_the_mean_of_the_gpus_and_absent_without(
    script: Callable[..., str], tmp_path: Path, init: str, count: int, rounds: int, shown: str
) -> None:
    (tmp_path / "pynvml.py").write_text(BINDING.format(init=init, count=count))
    assert script(READ.format(rounds=rounds), tmp_path).strip() == shown
