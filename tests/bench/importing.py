"""The cost of an import: CPU time of a fresh interpreter that does nothing else, less that of one that does nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tests.bench.base import Case, Scale, Subject, interleave

__all__ = ["CASES"]


def _interpreter(code: str) -> Subject:
    def measure() -> float:
        process = subprocess.Popen([sys.executable, "-c", code])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{code!r} failed")
        return (usage.ru_utime + usage.ru_stime) * 1e3

    return measure


def measure_import(scale: Scale) -> Mapping[str, Sequence[float]]:
    """Milliseconds of each import, without those of the interpreter that were measured in the same round."""
    codes = {
        "nothing": "pass",
        "rkmetrics": "import rkmetrics",
        "prometheus_client": "import prometheus_client",
        "opentelemetry": "import opentelemetry.sdk.metrics",
    }
    try:
        import opentelemetry.sdk  # noqa: F401
    except ImportError:
        del codes["opentelemetry"]
    found = interleave(scale.imports, {name: _interpreter(code) for name, code in codes.items()})
    bare = found.pop("nothing")
    net = {name: [max(a - b, 0.01) for a, b in zip(times, bare, strict=True)] for name, times in found.items()}
    return {"the interpreter alone": bare, **net}


CASES = (Case("import", "import, on top of the interpreter", "ms", measure_import, note="CPU time of a fresh process"),)
