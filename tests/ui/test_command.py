"""`rkmetrics preview` as a process: what it says, how it stops, what it refuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2]


def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RKMETRICS_", "METRICS_"))}
    command = [sys.executable, "-m", "rkmetrics", "preview", *arguments]
    return subprocess.Popen(
        command,
        env={**clean, "PYTHONPATH": str(HERE), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_is_and_stops_in_order(number: int) -> None:
    with start("--prometheus", "http://127.0.0.1:1", "--prefix", "/ops") as process:
        assert process.stdout is not None
        found = re.fullmatch(r"The dashboards are at (http://127\.0\.0\.1:\d+/ops/)\n", process.stdout.readline())
        assert found
        with urllib.request.urlopen(found[1], timeout=10) as answer:
            assert answer.status == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.json"], "missing.json: no such file or folder"),
        (["pyproject.toml"], "pyproject.toml:1:2: not JSON"),
        (["--prometheus", "ftp://a"], "expected a URL such as http://host:port"),
        (["--prometheus", "http://user:hunter2@a"], "set RKMETRICS_PROMETHEUS_USERNAME"),
        (["--prefix", "ops"], "expected a path such as /preview"),
        (["--host", "0.0.0.0"], "METRICS_ACCESS=open allows that"),
        (["--scrape-interval", "0"], "expected seconds from 0.1"),
    ],
)
def test_wrong_use_is_said(arguments: list[str], says: str) -> None:
    with start(*arguments) as process:
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert says in errors
    assert "Traceback" not in errors


def test_a_token_of_the_environment_is_not_printed() -> None:
    secrets = {"RKMETRICS_PROMETHEUS_TOKEN": "snowman-token", "RKMETRICS_PROMETHEUS_USERNAME": "ana"}
    with start(**secrets) as process:
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "two ways to log in" in errors
    assert "snowman" not in out + errors
