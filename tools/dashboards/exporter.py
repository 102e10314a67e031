"""The exporter itself: what a scrape costs, how near the limits are, who was refused, which collector fails."""

from __future__ import annotations

from collections.abc import Mapping

from rkmetrics.catalogue.exporter import Exporter
from rkmetrics.catalogue.otlp import Otlp
from rkmetrics.health import Status
from tools.dashboards.base import Board, Row, lines, timeline
from tools.dashboards.queries import highest, ours, quantile, rate, scraped, series, total

__all__ = ["BOARD"]


# What /health says, and in which colour; a bar of time has numbers, so each state has the number of its place.
STATES: Mapping[Status, str] = {
    Status.NOT_STARTED: "text",
    Status.STARTING: "blue",
    Status.OK: "green",
    Status.STALE: "red",
    Status.DRAINING: "yellow",
    Status.SHUTTING_DOWN: "orange",
    Status.SHUT_DOWN: "purple",
}
_NUMBERED = [f"{number} * {series(Exporter.health_state, state=state)}" for number, state in enumerate(STATES, 1)]


def _of_limit(used: str, limit: str) -> str:
    return f"{used} / {limit}"


COST = Row(
    "Cost",
    (
        lines(
            "Time to render",
            "s",
            "99th percentile of the time to collect and render one answer, by process. Empty where nobody scrapes.",
            (quantile(0.99, Exporter.render_duration, "instance"), "{{instance}}"),
        ),
        lines(
            "Time of a scrape",
            "s",
            "Time from Prometheus' request to the last byte of the answer, by process. Far above the time to render is "
            "network, or an event loop that is blocked.",
            (f"max by (instance) ({ours(scraped('scrape_duration_seconds'))})", "{{instance}}"),
        ),
        lines(
            "Samples of a scrape",
            "short",
            "Sample lines that a scrape brings, by process.",
            (f"max by (instance) ({ours(scraped('scrape_samples_scraped'))})", "{{instance}}"),
        ),
    ),
)

CARDINALITY = Row(
    "Cardinality",
    (
        lines(
            "Series of the worst case",
            "percentunit",
            "Series that exist, of those that can exist at most, by process. Near 1 is no fault: there cannot be more.",
            (
                _of_limit(total(Exporter.series, "instance"), total(Exporter.series_limit, "instance")),
                "{{instance}}",
            ),
        ),
        lines(
            "Actor names of the limit",
            "percentunit",
            "Actor names that are admitted, of those that may be. At 1 the next name shares the series of __other__.",
            (
                _of_limit(highest(Exporter.actor_names, "instance"), highest(Exporter.actor_names_limit, "instance")),
                "{{instance}}",
            ),
        ),
        lines(
            "Values counted as __other__",
            "cps",
            "Label values that were not declared and actor names past the limit, per second, by metric and label. "
            "Empty is right.",
            (f"{rate(Exporter.label_overflow, 'metric', 'label')} > 0", "{{metric}} {{label}}"),
        ),
    ),
)

ACCESS = Row(
    "Access and errors",
    (
        lines(
            "Requests by route",
            "reqps",
            "Requests to the exporter's routes per second, by route and status.",
            (f"{rate(Exporter.http_requests, 'route', 'code')} > 0", "{{route}} {{code}}"),
        ),
        lines(
            "Requests without a valid token",
            "reqps",
            "Requests to gated routes that got 401, per second, by reason. wrong_token just after a rotation is a "
            "scraper that has the old one.",
            (rate(Exporter.auth_failures, "reason"), "{{reason}}"),
        ),
        lines(
            "Collectors that fail",
            "cps",
            "Collections that went without a collector's families, per second. Empty is right.",
            (rate(Exporter.collector_errors, "collector", "reason"), "{{collector}} {{reason}}"),
        ),
        lines(
            "Exemplars dropped",
            "cps",
            "Exemplars left out because their labels were not short text, per second. Their updates count all the "
            "same.",
            (rate(Exporter.exemplars_dropped, "instance"), "{{instance}}"),
            width=12,
        ),
        timeline(
            "Health",
            "short",
            "What /health of each process says over time. Only ok is answered with 200, and gets traffic.",
            (f"max by (instance) ({' or '.join(_NUMBERED)})", "{{instance}}"),
            values=tuple((str(number), state, colour) for number, (state, colour) in enumerate(STATES.items(), 1)),
            width=12,
        ),
    ),
)

PUSH = Row(
    "OTLP push",
    (
        lines(
            "Pushes",
            "cps",
            "Requests to the OTLP receiver per second, by how they ended. Empty where nothing is pushed.",
            (rate(Otlp.exports, "outcome"), "{{outcome}}"),
        ),
        lines(
            "Time of a push",
            "s",
            "99th percentile of the time that one request to the receiver takes. Empty where nothing is pushed.",
            (quantile(0.99, Otlp.export_duration, "instance"), "{{instance}}"),
        ),
        lines(
            "Time since the last good push",
            "s",
            "Since the receiver last took all data of a push, by process. Empty where nothing is pushed, or until the "
            "first success.",
            (f"max by (instance) (time() - {series(Otlp.last_success)})", "{{instance}}"),
        ),
        lines(
            "Failed attempts in a row",
            "short",
            "Requests to the receiver that failed since the last good one. Empty where nothing is pushed.",
            (highest(Otlp.failed_attempts, "instance"), "{{instance}}"),
            width=12,
        ),
        lines(
            "Points refused",
            "cps",
            "Data points per second that the receiver refused to take, and that are lost. Empty where nothing is "
            "pushed.",
            (rate(Otlp.points_rejected, "instance"), "{{instance}}"),
            width=12,
        ),
    ),
)

BOARD = Board(
    "exporter",
    "Exporter",
    "The exporter itself: cost of a scrape, series against limits, refused requests, collectors that fail, OTLP push.",
    (COST, CARDINALITY, ACCESS, PUSH),
)
