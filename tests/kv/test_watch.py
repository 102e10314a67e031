"""The table of workers for a terminal, and the command line around it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.kv import ReportSource
from rkmetrics.cli import main
from rkmetrics.kv.watch import HEAD, document, frame, simulate, watch

ROOT = Path(__file__).parents[2]


def metrics(active: int = 100) -> rk.kv.ForwardPassMetrics:
    return rk.kv.ForwardPassMetrics(
        rk.kv.WorkerStats(request_active_slots=2, request_total_slots=64, num_requests_waiting=5),
        rk.kv.KvStats(
            kv_active_blocks=active,
            kv_total_blocks=1000,
            gpu_cache_usage_perc=active / 1000,
            gpu_prefix_cache_hit_rate=0.25,
        ),
    )


@pytest.fixture
def aggregator() -> rk.kv.KvMetricsAggregator:
    made = rk.kv.KvMetricsAggregator()
    full = rk.kv.KvReport(rk.kv.WorkerKey(7, 0), 100, metrics(100), None, 4)
    part = rk.kv.KvReport(rk.kv.WorkerKey(2**64 - 1, 3), 411)
    made.report(full, ReportSource.PULL, 60.0)
    made.report(part, ReportSource.PUSH, 60.0)
    return made


def test_a_frame_has_a_line_for_each_worker_and_one_of_sums(aggregator: rk.kv.KvMetricsAggregator) -> None:
    head, *rows, sums = frame(aggregator.workers().values(), aggregator.total()).splitlines()
    assert head.split() == list(HEAD)
    assert rows[0].split() == ["7", "0", "pull", "fresh", "100/1000", "10.0%", "2/64", "5", "25.0%", "0.0s", "0"]
    assert rows[1].split() == [str(2**64 - 1), "3", "push", "fresh", "411/-", "-", "-", "-", "-", "0.0s", "0"]
    assert sums.split() == ["2", "fresh", "511/1000", "10.0%", "2/64", "5"]
    assert len({len(line) for line in (head, *rows, sums)}) == 1


def test_json_says_the_same(aggregator: rk.kv.KvMetricsAggregator) -> None:
    found = json.loads(json.dumps(document(aggregator.workers().values(), aggregator.total())))
    assert [worker["worker_id"] for worker in found["workers"]] == [7, 2**64 - 1]
    assert found["workers"][0]["data"]["kv_stats"]["kv_active_blocks"] == 100
    assert found["workers"][1]["data"] is None
    assert found["total"]["active_blocks"] == 511


async def test_simulated_workers_are_seen_by_polling() -> None:
    registry = rk.Registry(rk.Settings(), access=rk.Access.open(), builtin=False)
    with rk.serve(registry, port=0) as server, rk.kv.WorkerMetricsPublisher(registry, actor_name="trial") as publisher:
        await simulate(publisher, blocks=100, count=15, interval_seconds=0.001)
        seen: list[Any] = []
        here = rk.Registry(rk.Settings(), builtin=False)
        assert await watch(here, lambda states, total: seen.append((states, total)), urls=[server.url], once=True)
    (states, total), *others = seen
    assert (len(states), total.total_blocks, others) == (1, 100, [])


async def test_a_watch_goes_on_until_it_is_cancelled() -> None:
    seen: list[int] = []
    registry = rk.Registry(rk.Settings(), builtin=False)
    url = "http://127.0.0.1:1"
    watching = asyncio.create_task(
        watch(registry, lambda states, _: seen.append(len(states)), urls=[url], interval_seconds=0.01)
    )
    while len(seen) < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert set(seen) == {0}


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environ", "told"),
    [
        (["watch"], {}, "name URLs to poll, or set NATS_SERVER"),
        (["watch"], {"DYN_REQUEST_PLANE": "http"}, "request plane mode is 'http'"),
        (["watch", "ftp://x"], {}, "ftp://x"),
        (["publish"], {}, "set NATS_SERVER"),
        (["publish"], {"RKMETRICS_KV_PLANE": "off", "NATS_SERVER": "nats://127.0.0.1:1"}, "KV plane is 'off'"),
        (["publish"], {"DYN_NAMESPACE": "a.b"}, "DYN_NAMESPACE='a.b'"),
    ],
)
def test_what_cannot_be_heard_is_refused_with_what_to_do(
    words: list[str], environ: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", *words], environ) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--worker-id=-1", "--worker-id=x", "--count=-1", "--blocks=0", "--interval=0"])
def test_wrong_arguments_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["kv", "publish", word], {"NATS_SERVER": "nats://127.0.0.1:1"})
    assert "expected" in capsys.readouterr().err


def test_watching_through_a_gate_takes_the_token_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\nold\n")
    settings = rk.Settings(metrics_enabled=True, metrics_token_file=str(file))
    registry = rk.Registry(settings, builtin=False)
    with (
        rk.serve(registry, port=0) as server,
        rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=9) as p,
    ):
        p.publish(metrics())
        for token, code in ((str(file), 0), ("", 1)):
            environ = {"METRICS_TOKEN_FILE": token, "PYTHONPATH": str(ROOT)}
            out = subprocess.run(
                [sys.executable, "-m", "rkmetrics", "kv", "watch", "--once", "--json", server.url],
                capture_output=True,
                text=True,
                check=False,
                env=environ,
                cwd=tmp_path,
            )
            assert out.returncode == code, out.stderr
            assert [worker["worker_id"] for worker in json.loads(out.stdout)["workers"]] == [9] * (1 - code)
            assert "s3cret" not in out.stdout + out.stderr
