"""Which twin runs: the compiled modules, or the readable ones. Decided once, for all of them together.

RKMETRICS_PURE_PYTHON=1 forces the readable ones; where the compiled ones were not built, or do not load, they run as
well. `IMPLEMENTATION` says which: "c" or "python".
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

__all__ = ["IMPLEMENTATION", "twin"]

_TRUE = {"1", "true", "yes", "on"}


def _implementation() -> str:
    # Read here and not from Settings: it decides what is imported, before there can be any settings.
    if os.environ.get("RKMETRICS_PURE_PYTHON", "").strip().lower() in _TRUE:
        return "python"
    try:
        import_module("rkmetrics._cells")
        import_module("rkmetrics._lines")
    except ImportError:
        return "python"
    return "c"


IMPLEMENTATION: str = _implementation()


def twin(name: str) -> Any:
    """The module rkmetrics._<name>, compiled or readable."""
    return import_module(f"rkmetrics._{name}" if IMPLEMENTATION == "c" else f"rkmetrics._{name}_py")
