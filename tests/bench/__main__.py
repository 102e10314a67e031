"""python -m tests.bench: measure, print ratios side by side, and leave a JSON file.

    python -m tests.bench [CASE ...] [--full] [--json FILE] [--write]

Each case runs in an interpreter of its own. --write puts the figures into docs/benchmarks.md and docs/benchmarks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.bench import memory
from tests.bench.base import Case, Run, Scale, Skipped
from tests.bench.cases import CASES
from tests.bench.machine import facts
from tests.bench.report import dump, markdown, promised, rewrite, table

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "bench-results.json"


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure what docs/benchmarks.md says.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of: {', '.join(CASES)}")
    parser.add_argument("--full", action="store_true", help="more rounds, and 10,000,000 undeclared names (minutes)")
    parser.add_argument("--tiny", action="store_true", help="whether everything runs; the figures say nothing")
    parser.add_argument("--json", default=RESULTS, metavar="FILE", help="where the figures go (%(default)s)")
    parser.add_argument("--write", action="store_true", help="renew docs/benchmarks.md and docs/benchmarks.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; expected some of: {', '.join(CASES)}")
    return arguments


def _scale(arguments: argparse.Namespace) -> Scale:
    if arguments.tiny:
        return Scale.tiny()
    return Scale.full() if arguments.full else Scale()


def _measure(case: Case, scale: Scale) -> dict[str, list[float]]:
    try:
        return {name: list(found) for name, found in case.measure(scale).items()}
    except Skipped as skipped:
        print(f"{case.name} is left out: {skipped}", file=sys.stderr)
        return {}


def _measured(case: Case, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Measure one case in an interpreter of its own."""
    size = ["--full"] * arguments.full + ["--tiny"] * arguments.tiny
    command = [sys.executable, "-m", "tests.bench", "--child", case.name, *size]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RKMETRICS_", "OTEL_"))}
    out = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment | dict(case.environment)
    )
    found: dict[str, list[float]] = json.loads(out.stdout)
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Run the cases that were asked for, or all."""
    arguments = _arguments(given)
    if arguments.measure:
        print(json.dumps(memory.child(json.loads(arguments.measure))))
        return 0
    scale = _scale(arguments)
    if arguments.child:
        print(json.dumps(_measure(CASES[arguments.child], scale)))
        return 0
    run = Run()
    machine, taken = facts(), datetime.now(UTC).date().isoformat()
    print(f"{'':46} {'median':>12} {'minimum':>26} {'ratio':>9}")
    for name in arguments.cases or CASES:
        run.add(name, _measured(CASES[name], arguments))
        print(table(CASES[name], run), flush=True)
    print(f"\n{'promise':66} {'promised':>18} {'measured':>12}  met")
    for verdict in promised(run):
        print(f"{verdict.what:66} {verdict.promised:>18} {verdict.measured:>12}  {'yes' if verdict.met else 'NO'}")
    document = dump(run, machine, taken, asdict(scale))
    Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")
    if arguments.write:
        (ROOT / "docs/benchmarks.json").write_text(_compact(document))
        rewrite(ROOT / "docs/benchmarks.md", markdown(CASES, document))
    return 0


def _compact(document: dict[str, object]) -> str:
    """JSON with each subject's figures on one line, so that a new run can be compared."""
    cases = document["cases"]
    assert isinstance(cases, dict)
    head = json.dumps({key: value for key, value in document.items() if key != "cases"}, indent=1)
    rows = ",\n".join(
        f" {json.dumps(case)}: {{\n"
        + ",\n".join(f"  {json.dumps(subject)}: {json.dumps(figures)}" for subject, figures in subjects.items())
        + "\n }"
        for case, subjects in cases.items()
    )
    return f'{head[:-2]},\n "cases": {{\n{rows}\n }}\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
