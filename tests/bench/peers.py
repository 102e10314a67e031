"""The libraries that we compare with. None of them is needed to run the tests."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TypeVar

from tests.bench.base import Skipped

__all__ = ["DISTRIBUTIONS", "peer", "present", "versions"]

Made = TypeVar("Made")

DISTRIBUTIONS = (
    "prometheus-client",
    "opentelemetry-sdk",
    "opentelemetry-exporter-otlp",
    "opentelemetry-exporter-prometheus",
    "pytheus",
    "aioprometheus",
    "nats-py",
    "httpx2",
    "aiohttp",
    "uvloop",
    "grpcio",
)


def peer(module: str) -> Any:
    """A module of a peer. Raises Skipped where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Skipped(f"{module} cannot be imported ({error}); uv pip install --group bench") from error


def versions() -> dict[str, str]:
    """What is installed of them."""
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def present(subjects: Mapping[str, Callable[[], Made]]) -> dict[str, Made]:
    """Make each subject, and leave out those whose library is not here."""
    found: dict[str, Made] = {}
    for name, make in subjects.items():
        try:
            found[name] = make()
        except Skipped:
            continue
    return found
