"""The OTEL_* variables that the push itself obeys, as a frozen value.

Endpoint, headers, compression and certificates are not here: OpenTelemetry's exporters read those themselves. An empty
value counts as unset, as the OpenTelemetry specification asks ("Environment Variable Specification").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from rkmetrics.errors import SettingsError

__all__ = ["PROTOCOLS", "TEMPORALITIES", "OtlpSettings"]

PROTOCOLS: Final = ("http/protobuf", "grpc")
TEMPORALITIES: Final = ("cumulative", "delta", "lowmemory")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OtlpSettings:
    """How the push runs.

    protocol: the specification's default. timeout_seconds: of one request. temporality: "lowmemory" sends what cells
    count as deltas, and foreign families cumulative. disabled: OTEL_SDK_DISABLED; the push then does nothing.
    """

    protocol: str = "http/protobuf"
    interval_seconds: float = 60.0
    timeout_seconds: float = 10.0
    temporality: str = "cumulative"
    disabled: bool = False

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> OtlpSettings:
        """Read the variables. Raises SettingsError for a value that cannot be used."""
        seconds, milliseconds = _number(1.0), _number(0.001)
        timeout = _first(environ, seconds, 10.0, "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
        return cls(
            protocol=_first(
                environ,
                _word(PROTOCOLS),
                "http/protobuf",
                "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
                "OTEL_EXPORTER_OTLP_PROTOCOL",
            ),
            interval_seconds=_first(environ, milliseconds, 60.0, "OTEL_METRIC_EXPORT_INTERVAL"),
            timeout_seconds=min(timeout, _first(environ, milliseconds, 30.0, "OTEL_METRIC_EXPORT_TIMEOUT")),
            temporality=_first(
                environ, _word(TEMPORALITIES), "cumulative", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
            ),
            disabled=_first(environ, _flag, False, "OTEL_SDK_DISABLED"),
        )


def _first(environ: Mapping[str, str], parse: Callable[[str, str], T], default: T, *names: str) -> T:
    for name in names:
        text = environ.get(name, "").strip()
        if text:
            return parse(name, text)
    return default


def _number(scale: float) -> Callable[[str, str], float]:
    unit = {1.0: "seconds", 0.001: "milliseconds"}[scale]

    def parse(name: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise SettingsError(name, text, f"{unit}, more than 0")
        return value * scale

    return parse


def _word(words: tuple[str, ...]) -> Callable[[str, str], str]:
    def parse(name: str, text: str) -> str:
        if text.lower() not in words:
            raise SettingsError(name, text, f"one of: {', '.join(words)}")
        return text.lower()

    return parse


def _flag(_: str, text: str) -> bool:
    return text.lower() == "true"  # the specification: anything else is false
