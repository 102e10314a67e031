"""A run as text, as Markdown, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.bench.base import Case, Figures, Run, ratio
from tests.bench.promises import PROMISES, Verdict
from tests.bench.updates import OURS

__all__ = ["dump", "load", "markdown", "promised", "rewrite", "table"]

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def _number(value: float) -> str:
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _high(figures: Figures) -> str:
    """The highest of many measurements, and the 99th of a hundred."""
    ordered = sorted(figures.samples)
    return f"p99 {_number(ordered[int(len(ordered) * 0.99)])}, max {_number(ordered[-1])}"


def _rows(case: Case, rows: Mapping[str, Figures]) -> Iterator[tuple[str, str, str, str]]:
    ours = rows.get(OURS) or next(iter(rows.values()))
    for subject, figures in rows.items():
        times = "" if not case.compared else "1" if figures is ours else _times(ratio(figures, ours))
        least = _high(figures) if case.name == "stall" else _number(figures.minimum)
        yield subject, _number(figures.median), least, times


def table(case: Case, run: Run) -> str:
    """One case for a terminal."""
    rows = run.figures.get(case.name, {})
    unit = f" ({', '.join(filter(None, (case.unit, case.note)))})" if case.unit or case.note else ""
    lines = [f"{case.title}{unit}"]
    for subject, middle, least, times in _rows(case, rows):
        lines.append(f"  {subject:44} {middle:>12} {least:>26} {times:>9}")
    return "\n".join(lines)


def promised(run: Run) -> list[Verdict]:
    """What the run says about each promise it has figures for."""
    return [found for promise in PROMISES if (found := promise.verdict(run)) is not None]


def markdown(cases: Mapping[str, Case], document: Mapping[str, Any]) -> str:
    """The figures of a documented run."""
    run, machine = load(document), document["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    lines = [
        f"Taken on {document['taken']}: {machine['processor']}, {machine['cores']} cores (load "
        f"{', '.join(map(str, machine['load']))}), {machine['system']}, {machine['python']}, {machine['cells']} cells;",
        f"{peers}.",
        "",
        "| promise | promised | measured | met |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {v.what} | {v.promised} | {v.measured} | {'yes' if v.met else '**no**'} |" for v in promised(run)]
    for case in cases.values():
        rows = run.figures.get(case.name)
        if rows:
            lines += ["", *_markdown_table(case, rows)]
    return "\n".join(lines) + "\n"


def _markdown_table(case: Case, rows: Mapping[str, Figures]) -> Iterator[str]:
    unit = f" ({', '.join(filter(None, (case.unit, case.note)))})" if case.unit or case.note else ""
    single = all(len(figures.samples) == 1 for figures in rows.values())
    if single:
        yield f"| {case.title}{unit} | |"
        yield "| --- | ---: |"
    else:
        yield f"| {case.title}{unit} | median | {'high' if case.name == 'stall' else 'minimum'} | ratio |"
        yield "| --- | ---: | ---: | ---: |"
    for subject, middle, least, times in _rows(case, rows):
        yield f"| {subject} | {middle} |" if single else f"| {subject} | {middle} | {least} | {times} |"


def dump(run: Run, machine: Mapping[str, object], taken: str, scale: Mapping[str, int]) -> dict[str, Any]:
    """The run as JSON has it."""
    return {
        "taken": taken,
        "machine": dict(machine),
        "scale": dict(scale),
        "promises": [
            {"what": v.what, "promised": v.promised, "measured": v.measured, "met": v.met} for v in promised(run)
        ],
        "cases": {
            case: {
                subject: {
                    "median": figures.median,
                    "minimum": figures.minimum,
                    "samples": [float(f"{sample:.4g}") for sample in figures.samples],
                }
                for subject, figures in rows.items()
            }
            for case, rows in run.figures.items()
        },
    }


def load(document: Mapping[str, Any]) -> Run:
    """The run that a JSON document holds."""
    run = Run()
    for case, rows in document["cases"].items():
        run.add(case, {subject: figures["samples"] for subject, figures in rows.items()})
    return run


def rewrite(page: Path, figures: str) -> None:
    """Put figures between the marks of a page."""
    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise ValueError(f"{page.name}: the marks {BEGIN} and {END} are not there")
    page.write_text(f"{head}{BEGIN}\n\n{figures}\n{END}{tail}")
