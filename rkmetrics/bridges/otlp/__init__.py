"""OTLP push: a registry's snapshots sent to an OpenTelemetry receiver, by OpenTelemetry's own exporters.

    with rk.bridges.otlp.Pusher(registry):  # OTEL_EXPORTER_OTLP_ENDPOINT and the other variables say where to and how
        ...

settings (the variables) · translate (families to SDK data) · delta (differences) · answers (what an answer means) ·
exporters (one request, one answer) · delivery (what is owed, and when) · push (the thread). The first four are pure.
"""

from __future__ import annotations

from rkmetrics.bridges.otlp.push import EXIT_SECONDS, Pusher
from rkmetrics.bridges.otlp.settings import OtlpSettings

__all__ = ["EXIT_SECONDS", "OtlpSettings", "Pusher"]
