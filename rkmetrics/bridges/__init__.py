"""Bridges to other metrics libraries; each needs that library, and is loaded when it is first named.

prometheus_client: a registry of ours as one of its collectors, and one of its registries on our page. otlp: periodic
push.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rkmetrics.bridges import otlp, prometheus_client

__all__ = ["otlp", "prometheus_client"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")  # which also makes it an attribute: asked for once


def __dir__() -> list[str]:
    return list(__all__)
