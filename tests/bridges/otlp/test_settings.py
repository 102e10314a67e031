from __future__ import annotations

import pytest

from rkmetrics.bridges.otlp.settings import OtlpSettings
from rkmetrics.errors import SettingsError


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, OtlpSettings()),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "  "}, OtlpSettings()),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, OtlpSettings(protocol="grpc")),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "HTTP/protobuf"},
            OtlpSettings(protocol="http/protobuf"),
        ),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "15000"}, OtlpSettings(interval_seconds=15.0)),
        ({"OTEL_METRIC_EXPORT_TIMEOUT": "2500"}, OtlpSettings(timeout_seconds=2.5)),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "20"}, OtlpSettings(timeout_seconds=20.0)),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "20", "OTEL_METRIC_EXPORT_TIMEOUT": "5000"}, OtlpSettings(timeout_seconds=5.0)),
        (
            {"OTEL_EXPORTER_OTLP_TIMEOUT": "20", "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "3"},
            OtlpSettings(timeout_seconds=3),
        ),
        ({"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "LowMemory"}, OtlpSettings(temporality="lowmemory")),
        ({"OTEL_SDK_DISABLED": "TRUE"}, OtlpSettings(disabled=True)),
        ({"OTEL_SDK_DISABLED": "1"}, OtlpSettings()),
    ],
)
def test_variables_become_settings(environ: dict[str, str], expected: OtlpSettings) -> None:
    assert OtlpSettings.from_env(environ) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "60s"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "-1"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "nan"),
        ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "inf"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "both"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}='{value}': expected"):
        OtlpSettings.from_env({name: value})
