"""Aliases: old names as recordings, until the version that ends each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import rkmetrics as rk
from rkmetrics.assets.aliases import Alias, aliases, rule_file, until
from rkmetrics.assets.documents import document
from rkmetrics.catalogue import sets
from rkmetrics.metricset import Rename

OURS = [definition for each in sets() for definition in each.definitions()]


class Renamed(rk.MetricSet):
    """Two renames, by different versions."""

    wait = rk.Histogram(
        "tavern_wait_seconds", "Waiting.", buckets=rk.LATENCY, renamed_from=(Rename("tavern_waiting_seconds", "1.2"),)
    )
    guests = rk.Gauge("tavern_guests", "Guests.", across="sum", renamed_from=(Rename("tavern_people", "1.4.0"),))


def test_a_histogram_takes_three_and_each_ends_two_minor_versions_later() -> None:
    found = list(aliases(Renamed.definitions(), "1.3.7"))
    assert found == [
        *(
            Alias(f"tavern_waiting_seconds{s}", f"tavern_wait_seconds{s}", "1.2", "1.4.0")
            for s in ("_bucket", "_sum", "_count")
        ),
        Alias("tavern_people", "tavern_guests", "1.4.0", "1.6.0"),
    ]
    assert [alias.old for alias in aliases(Renamed.definitions(), "1.4.0rc1")] == ["tavern_people"]
    assert list(aliases(Renamed.definitions(), "2.0")) == []
    assert len(list(aliases(Renamed.definitions(), "1.99", keep=100))) == 4


@pytest.mark.parametrize(("since", "keep", "end"), [("1.2", 2, "1.4.0"), ("0.1.0", 1, "0.2.0"), ("2", 3, "2.3.0")])
def test_the_end_is_counted_in_minor_versions(since: str, keep: int, end: str) -> None:
    assert until(since, keep) == end


def test_the_file_is_rules_and_says_when_each_ends() -> None:
    text = rule_file(aliases(Renamed.definitions(), "1.3.0"), "1.3.0")
    assert "      - record: tavern_people # since 1.4.0, until 1.6.0\n        expr: tavern_guests\n" in text
    assert [query.record.value for query in document("f", text).queries if query.record] == [
        alias.old for alias in aliases(Renamed.definitions(), "1.3.0")
    ]


UNIT_TEST = """
rule_files: [aliases.yaml]
tests:
  - input_series:
      - {series: 'rivetkit_actor_queue_depth{actor_name="a"}', values: "8 8"}
      - {series: 'rivetkit_actor_shutdown_wait_seconds_bucket{le="5"}', values: "2 2"}
    promql_expr_test:
      - expr: rivet_actor_queue_depth
        eval_time: 1m
        exp_samples: [{labels: 'rivet_actor_queue_depth{actor_name="a"}', value: 8}]
      - expr: rivet_actor_shutdown_wait_seconds_bucket
        eval_time: 1m
        exp_samples: [{labels: 'rivet_actor_shutdown_wait_seconds_bucket{le="5"}', value: 2}]
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_an_alias_has_the_series_of_the_new_name(tmp_path: Path) -> None:
    (tmp_path / "aliases.yaml").write_text(rule_file(aliases(OURS, "0.1.0"), "0.1.0"))
    (tmp_path / "test.yaml").write_text(UNIT_TEST)
    command = ["promtool", "test", "rules", "test.yaml"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("version", ["0.1.0", "99.0"])
def test_prometheus_takes_it(tmp_path: Path, version: str) -> None:
    path = tmp_path / "aliases.yaml"
    path.write_text(rule_file(aliases(OURS, version), version))
    out = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr
