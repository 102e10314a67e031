"""Exporters of two catalogue versions and rules of each, in one Prometheus: RkMetricsCatalogMismatch tells them apart.

The other version is this package with a metric that was renamed, in a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.assets import stamp
from rkmetrics.catalogue import catalog_version
from tests.services.alerting import quick
from tests.services.conftest import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = Path(rk.__file__).parent / "shipped" / "alerts"
RENAMED = """
import dataclasses
from rkmetrics.catalogue.actors import Actors
definitions = Actors.definitions()
renamed = [dataclasses.replace(d, name="rivetkit_actor_backlog") if d.name == "rivetkit_actor_queue_depth" else d
           for d in definitions]
Actors.definitions = classmethod(lambda cls: renamed)
"""
EXPORTER = """
import sys
sys.path.insert(0, {root!r})
{before}
import rkmetrics as rk
settings = rk.Settings(metrics_enabled=True, metrics_access="open")
with rk.serve(rk.Registry(settings), port=0) as server:
    print(server.url, rk.Registry(settings, builtin=False).catalog_version, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def exporters() -> Iterator[dict[str, tuple[str, str]]]:
    """Address and catalogue version of one as it is, and of one with the other catalogue."""
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, before in (("today", ""), ("tomorrow", RENAMED)):
            script = EXPORTER.format(root=str(ROOT), before=before)
            running[name] = subprocess.Popen(
                [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        yield {name: said(process) for name, process in running.items()}
    finally:
        for process in running.values():
            process.communicate(timeout=PATIENCE_SECONDS)


def said(process: subprocess.Popen[str]) -> tuple[str, str]:
    assert process.stdout is not None
    url, version = process.stdout.readline().split()
    return url, version


def rules(version: str) -> str:
    """The shipped rules as a release with another catalogue would ship them, under a name of their own."""
    text = (SHIPPED / stamp.STAMPED[0]).read_text()
    assert text.count(catalog_version()) == 1
    named = re.sub(r"- name: rkmetrics-exporter", f"- name: rules-{version}", text)
    return quick(named.replace(catalog_version(), version).replace("component: rkmetrics", f"component: for-{version}"))


@pytest.fixture(scope="module")
def prometheus(
    exporters: dict[str, tuple[str, str]],
    start_prometheus: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Scrapes both, with the rules of both."""
    folder = tmp_path_factory.mktemp("rules")
    for name, (_, version) in exporters.items():
        (folder / f"{name}.yaml").write_text(rules(version))
    targets = {name: f"{url}/metrics" for name, (url, _) in exporters.items()}
    server = start_prometheus(targets, rule_files=[f"{folder}/*.yaml"])
    server.wait(lambda: len(server.query("up == 1")) == 2)
    return server


def test_a_rename_makes_another_catalogue(exporters: dict[str, tuple[str, str]]) -> None:
    versions = {name: version for name, (_, version) in exporters.items()}
    assert versions["today"] == catalog_version()
    assert re.fullmatch(r"[0-9a-f]{8}", versions["tomorrow"])
    assert versions["tomorrow"] != catalog_version()


def test_each_exporter_tells_its_own(exporters: dict[str, tuple[str, str]], prometheus: Any) -> None:
    found = {one["metric"]["job"]: one["metric"]["catalog"] for one in prometheus.query("rkmetrics_build_info")}
    assert found == {name: version for name, (_, version) in exporters.items()}


def test_rules_of_each_fire_for_the_exporter_of_the_other(
    exporters: dict[str, tuple[str, str]], prometheus: Any
) -> None:
    """15 minutes, which are 15 seconds here, and for a while after: rules are quiet about their own."""
    versions = {name: version for name, (_, version) in exporters.items()}

    def firing() -> set[tuple[str, str, str]]:
        found = prometheus.query('ALERTS{alertname="RkMetricsCatalogMismatch", alertstate="firing"}')
        return {
            (one["metric"]["component"].removeprefix("for-"), one["metric"]["job"], one["metric"]["catalog"])
            for one in found
        }

    expected = {
        (versions["today"], "tomorrow", versions["tomorrow"]),
        (versions["tomorrow"], "today", versions["today"]),
    }
    prometheus.wait(lambda: len(firing()) >= 2)
    assert firing() == expected
    time.sleep(3)
    assert firing() == expected
    others = prometheus.query('ALERTS{alertname!="RkMetricsCatalogMismatch", alertstate="firing"}')
    assert others == []
