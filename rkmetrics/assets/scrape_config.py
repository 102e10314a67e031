"""The Prometheus configuration that fits a node's settings, as text to paste or include.

The token itself is never in it: Prometheus reads it from a file, and configuration files end in repositories.
"""

from __future__ import annotations

from rkmetrics.settings import Settings

__all__ = ["TOKEN_FILE", "scrape_config"]

TOKEN_FILE = "/etc/prometheus/rkmetrics.token"  # noqa: S105 - where it is, not what it is

HEAD = """\
scrape_configs:
  - job_name: {job}
    metrics_path: {path}
    scrape_interval: 15s
    scrape_timeout: 10s
    # Prometheus 2.49 and later: ask for protobuf first, which carries native histograms. Earlier ones negotiate the
    # format by themselves.
    # scrape_protocols: [PrometheusProto, OpenMetricsText1.0.0, PrometheusText0.0.4]
"""
AUTHORIZATION = """\
    authorization:
      type: Bearer
      credentials_file: {file}{hint}
"""
TARGETS = """\
    static_configs:
      - targets: [{targets}]
"""
HINT = "  # holds the value of METRICS_TOKEN, readable by Prometheus only"
CLOSED = "# Metrics are closed: set METRICS_ENABLED=1 and METRICS_TOKEN (or METRICS_TOKEN_FILE) where the node runs.\n"


def scrape_config(
    settings: Settings,
    targets: tuple[str, ...],
    *,
    job: str = "rkmetrics",
    path: str = "/metrics",
    credentials_file: str | None = None,
) -> str:
    """Return `scrape_configs` for targets ("host:port"), with the authorization that the settings ask for."""
    parts = [HEAD.format(job=_quoted(job), path=_quoted(path))]
    if settings.metrics_access == "token":
        parts.append(_authorization(settings, credentials_file))
    parts.append(TARGETS.format(targets=", ".join(map(_quoted, targets))))
    return "".join(parts if settings.metrics_enabled else [CLOSED, *parts])


def _authorization(settings: Settings, credentials_file: str | None) -> str:
    # A rotation file has two lines; Prometheus sends what is in its file, so it needs one of its own.
    file = credentials_file or TOKEN_FILE
    return AUTHORIZATION.format(file=_quoted(file), hint="" if credentials_file else HINT)


def _quoted(text: str) -> str:
    """A YAML double-quoted scalar (YAML 1.2, 7.3.1): JSON's escapes are a part of its own."""
    from json import dumps

    return dumps(text)
