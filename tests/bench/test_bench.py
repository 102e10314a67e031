"""Every benchmark runs, and the page of figures is that of the file beside it. Nothing here is timed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import enable_created_metrics

from tests.bench import page
from tests.bench.base import Figures, Run, Scale, Skipped, interleave, ratio
from tests.bench.cases import CASES
from tests.bench.peers import DISTRIBUTIONS, versions
from tests.bench.promises import PROMISES, Promise
from tests.bench.report import BEGIN, END, dump, load, markdown, promised, rewrite, table
from tests.bench.updates import EMPTY, OURS

DOCS = Path(__file__).resolve().parents[2] / "docs"

# Run in an interpreter of their own in any case, and take seconds: one run covers the machinery.
IN_CHILDREN = {"memory", "memory rss", "bogus"}


def a_run() -> Run:
    run = Run()
    run.add("inc", {EMPTY: [20.0, 40.0, 30.0], OURS: [10.0, 20.0, 10.0], "prometheus_client": [100.0, 400.0, 300.0]})
    return run


@pytest.fixture(autouse=True)
def created_lines_stay_as_they_were() -> Iterator[None]:
    """Cases turn prometheus_client's _created lines off, for the whole interpreter."""
    yield
    enable_created_metrics()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", sorted(CASES.keys() - IN_CHILDREN))
def test_each_case_runs_and_gives_the_figures_that_are_promised(name: str) -> None:
    if name == "otlp":
        pytest.importorskip(
            "opentelemetry.sdk", reason="compares with the OpenTelemetry SDK: pip install 'rkmetrics[otlp]'"
        )
    run = Run()
    try:
        run.add(name, CASES[name].measure(Scale.tiny()))
    except Skipped as skipped:
        pytest.skip(str(skipped))
    assert run.figures[name]
    assert all(sample >= 0 for figures in run.figures[name].values() for sample in figures.samples)
    assert table(CASES[name], run).startswith(CASES[name].title)
    missing = set(DISTRIBUTIONS) - set(versions())
    if missing:
        pytest.skip(f"ran without {', '.join(sorted(missing))}, which the group `bench` installs")


def test_the_command_measures_memory_in_children_and_writes_its_file(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.bench", "--tiny", "--json", str(file), "bogus", "pure inc"]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=DOCS.parent)
    assert (out.returncode, out.stderr) == (0, "")
    document = json.loads(file.read_text())
    assert document["cases"].keys() == {"bogus", "pure inc"}
    assert "growth under undeclared names" in out.stdout
    assert document["machine"]["python"] in markdown(CASES, document)


def test_every_promise_finds_its_figures_in_a_run() -> None:
    """A case or subject that was renamed would take its promise away without a word."""
    document = DOCS / "benchmarks.json"
    if not document.is_file():
        pytest.skip("not in a source tree")
    run = load(json.loads(document.read_text()))
    assert [promise.what for promise in PROMISES if promise.verdict(run) is None] == []


def test_the_page_shows_the_run_that_lies_beside_it() -> None:
    page_file, file = DOCS / "benchmarks.md", DOCS / "benchmarks.json"
    if not file.is_file():
        pytest.skip("not in a source tree")
    figures = markdown(CASES, json.loads(file.read_text()))
    assert f"{BEGIN}\n\n{figures}\n{END}" in page_file.read_text(), "run `python -m tests.bench --write`"


@pytest.mark.parametrize("content", page.CONTENTS)
def test_all_contents_have_fifty_lines_for_each_actor_name_or_nearly(content: str) -> None:
    kinds = page.CONTENTS[content].kinds
    names = page.CONTENTS[content].names(200)
    assert 9_900 <= len(names) * sum(kind.lines for kind in kinds) <= 10_000


def test_subjects_are_measured_in_turn() -> None:
    order: list[str] = []

    def subject(name: str) -> float:
        order.append(name)
        return 1.0

    interleave(2, {"a": lambda: subject("a"), "b": lambda: subject("b")})
    assert order == ["a", "b"] * 3  # the first round does not count


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    figures = a_run().figures["inc"]
    assert ratio(figures["prometheus_client"], figures[OURS]) == 20
    assert math.isnan(ratio(figures[OURS], Figures((0.0, 0.0, 0.0))))


def test_a_promise_says_whether_it_is_met() -> None:
    verdicts = {verdict.what: verdict for verdict in promised(a_run())}
    assert verdicts["inc() to an empty method call"].met
    assert not Promise("less", 0.1, lambda _: 0.2).verdict(a_run()).met  # type: ignore[union-attr]
    assert Promise("absent", 1.0, lambda _: None).verdict(a_run()) is None


def test_a_run_comes_back_from_its_file() -> None:
    run = a_run()
    document = json.loads(json.dumps(dump(run, {}, "2026-01-01", {})))
    assert load(document) == run


def test_only_the_figures_of_a_page_are_rewritten(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    rewrite(file, "new\n")
    assert file.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    file.write_text("no marks")
    with pytest.raises(ValueError, match="marks"):
        rewrite(file, "new\n")
