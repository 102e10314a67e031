"""The promises that belong to one process, and what a run says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.base import Run, ratio
from tests.bench.planes import GRPC, HTTPX, RAW
from tests.bench.updates import EMPTY, OURS

__all__ = ["PROMISES", "Promise", "Verdict"]

PROMETHEUS = "prometheus_client"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise as a run found it."""

    what: str
    promised: str
    measured: str
    met: bool


@dataclass(frozen=True, slots=True)
class Promise:
    """measured: a number out of a run, or None where the peer is missing. at_most: else at least."""

    what: str
    limit: float
    measured: Callable[[Run], float | None]
    at_most: bool = True
    unit: str = "x"

    def verdict(self, run: Run) -> Verdict | None:
        found = self.measured(run)
        if found is None:
            return None
        met = found <= self.limit if self.at_most else found >= self.limit
        sign = "at most" if self.at_most else "at least"
        return Verdict(self.what, f"{sign} {_shown(self.limit, self.unit)}", _shown(found, self.unit), met)


def _shown(number: float, unit: str) -> str:
    digits = f"{number:.2f}" if abs(number) < 10 else f"{number:,.0f}"
    return f"{digits}{unit}" if unit == "x" else f"{digits} {unit}".rstrip()


def _ratio(case: str, upper: str, lower: str) -> Callable[[Run], float | None]:
    def measured(run: Run) -> float | None:
        a, b = run.find(case, upper), run.find(case, lower)
        return ratio(a, b) if a and b else None

    return measured


def _median(case: str, *subjects: str) -> Callable[[Run], float | None]:
    """The largest median of some subjects."""

    def measured(run: Run) -> float | None:
        found = [figures.median for subject in subjects if (figures := run.find(case, subject))]
        return max(found) if found else None

    return measured


def _grown(run: Run) -> float | None:
    rows = run.figures.get("bogus", {})
    found = [figures.median for subject, figures in rows.items() if not subject.startswith(PROMETHEUS)]
    return max(found) if found else None


def _slower_than_prometheus(cases: Sequence[str]) -> Callable[[Run], float | None]:
    """The worst of ours against prometheus_client in some cases."""

    def measured(run: Run) -> float | None:
        found = [each for case in cases if (each := _ratio(case, OURS, PROMETHEUS)(run)) is not None]
        return max(found) if found else None

    return measured


_TEXT = ("counters", "floats", "histograms", "mix")

PROMISES = (
    Promise("inc() to an empty method call", 1.0, _ratio("inc", OURS, EMPTY)),
    Promise("set() to an empty method call", 1.0, _ratio("set", OURS, EMPTY)),
    Promise("observe(), 15 buckets, to an empty method call", 1.3, _ratio("observe", OURS, EMPTY)),
    Promise("the same, unforeseeable values", 1.3, _ratio("observe random", OURS, EMPTY)),
    Promise("prometheus_client's inc() to ours", 15, _ratio("inc", PROMETHEUS, OURS), at_most=False),
    Promise(
        "OpenTelemetry's add(), no attributes, to our inc()",
        100,
        _ratio("inc", "opentelemetry, no attributes", OURS),
        at_most=False,
    ),
    Promise(
        "OpenTelemetry's add(), 2 attributes, to our inc()",
        100,
        _ratio("inc", "opentelemetry, 2 attributes", OURS),
        at_most=False,
    ),
    *(
        Promise(
            f"prometheus_client's text page to ours, {content}",
            30,
            _ratio(f"text {content}", PROMETHEUS, OURS),
            at_most=False,
        )
        for content in _TEXT
    ),
    Promise("stall of the loop by a scrape, text, gzip", 5, _median("stall", OURS), unit="ms"),
    Promise("the same, OpenMetrics", 5, _median("stall", f"{OURS}, openmetrics"), unit="ms"),
    Promise("the same, protobuf", 5, _median("stall", f"{OURS}, protobuf"), unit="ms"),
    Promise("renderings for 16 scrapes at once", 1, _median("shared", "renderings"), unit=""),
    Promise(
        "a counter series in hand, 50 of an actor name",
        200,
        _median("memory", f"{OURS}, 50 per actor name, in hand"),
        unit="bytes",
    ),
    Promise(
        "the same, 10 of an actor name", 200, _median("memory", f"{OURS}, 10 per actor name, in hand"), unit="bytes"
    ),
    Promise("the same, 1 of an actor name", 200, _median("memory", f"{OURS}, 1 per actor name, in hand"), unit="bytes"),
    Promise("growth under undeclared names", 1.0, _grown, unit="MB"),
    Promise("import rkmetrics to import prometheus_client", 1.0, _ratio("import", OURS, PROMETHEUS)),
    Promise(
        "pure Python: inc, set, observe to prometheus_client's, the worst",
        1.0,
        _slower_than_prometheus(("pure inc", "pure set", "pure observe")),
    ),
    Promise(
        "nats-py's publish to our NATS sink",
        0.8,
        _ratio("kv nats metrics", "nats-py, publish", OURS),
        at_most=False,
    ),
    Promise(
        "httpx2's poll of a worker to ours, new state",
        3,
        _ratio("polling", "httpx2", f"{OURS}, new state"),
        at_most=False,
    ),
    Promise("checking 5,000 backends each 5 s, of one core", 25, _median("discovery load", OURS), unit="%"),
    Promise("age of what is known of them, p99", 6, _median("discovery staleness", f"{OURS}, p99"), unit="s"),
    Promise("memory of a checked backend", 16, _median("discovery memory", OURS), unit="KiB"),
    Promise("a registration", 150, _median("discovery registrations", "new"), unit="us"),
    Promise("calls over tcp to grpc.aio's, 64 at once", 2, _ratio("rpc", OURS, GRPC), at_most=False),
    Promise("the same to a raw asyncio echo with the same frames", 0.5, _ratio("rpc", OURS, RAW), at_most=False),
    Promise("calls over http to httpx2's and uvicorn's", 1, _ratio("rpc", f"{OURS}, http", HTTPX), at_most=False),
    Promise("pure Python: text page to prometheus_client's", 1.0, _slower_than_prometheus(("pure text mix",))),
)
