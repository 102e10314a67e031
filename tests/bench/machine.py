"""What the figures depend on, apart from the code."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from rkmetrics import __version__
from rkmetrics.native import IMPLEMENTATION
from tests.bench.peers import versions

__all__ = ["facts"]


def facts() -> dict[str, object]:
    """Processor, system, interpreter and versions; nothing that names a person or a place."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": bool(getattr(sys, "_is_gil_enabled", lambda: True)()),
        "rkmetrics": __version__,
        "cells": IMPLEMENTATION,
        "peers": versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
