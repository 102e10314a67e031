"""Every query of every dashboard, asked of a real Prometheus that scrapes the demo and the balancer it announces to.

docs/dashboards.md lists what is looked at by machine; this is its sixth item: nothing is empty, nothing is nonsense.
Only here is it seen that the exporter says what the catalogue promises. A panel that stays empty in the demo stands
in EMPTY with the reason, and its description says so to whoever sees it empty.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from rkmetrics.promql import parse_variable
from tests.assets.quality import EMPTY as SAYS_EMPTY
from tests.services.conftest import Prometheus
from tests.services.discovery_fleet import ENVIRONMENT
from tests.services.nats_server import free_port

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.stem for path in (ROOT / "dashboards").glob("*.json"))
PATIENCE_SECONDS = 120  # for bugs: all is there within half a minute, when what is rare has happened once

# What Grafana puts in: all targets, windows of a scrape interval as short as the test's.
FILLED = {"$job": ".+", "$instance": ".+", "$actor_name": ".+", "$__rate_interval": "1m", "$__range": "5m"}

NO_NATS = "the demo's workers publish without NATS"
NO_AGGREGATOR = "nobody aggregates the demo's workers"
NO_ROUTER = "nobody routes to the demo's workers by their caches"
NO_ETCD = "the demo has no etcd"
NO_OTLP = "the demo pushes nothing"

# Panel -> why it has no data while all is well.
EMPTY: Mapping[str, Mapping[str, str]] = {
    "fleet": {},
    "actor": {
        "What keeps actors awake": "the demo's actors hold nothing awake",
        "Inbox depth": "the demo's actors have queues, and no inboxes",
    },
    "kv": {
        "KV events that wait": NO_NATS,
        "NATS connections missing": NO_NATS,
        "Connecting to NATS": NO_NATS,
        "Workers at aggregators": NO_AGGREGATOR,
        "Polls of workers": NO_AGGREGATOR,
        "States received": NO_AGGREGATOR,
        "Oldest state": NO_AGGREGATOR,
        "Time of a poll": NO_AGGREGATOR,
        "Blocks in the index": NO_ROUTER,
        "Workers in the index": NO_ROUTER,
        "Events at the index": NO_ROUTER,
    },
    "planes": {
        "Prompts that the chosen worker holds": NO_ROUTER,
    },
    "runtime": {},
    "backends": {
        "Rounds at etcd": NO_ETCD,
        "Not known where they should be": NO_ETCD,
        "GPUs of nodes": "not every machine has one",
        "Prefixes that are not followed": NO_ETCD,
        "Changes that are seen": NO_ETCD,
        "Leases lost": NO_ETCD,
    },
    "exporter": {
        "Values counted as __other__": "the demo declares its values",
        "Collectors that fail": "no collector fails",
        "Pushes": NO_OTLP,
        "Time of a push": NO_OTLP,
        "Time since the last good push": NO_OTLP,
        "Failed attempts in a row": NO_OTLP,
        "Points refused": NO_OTLP,
    },
}

# Unit -> the highest value that is believed of a node that is some minutes old; 0 is the lowest.
BOUNDS: Mapping[str, float] = {
    "percentunit": 1,
    "s": 600,
    "bool_yes_no": 1,
    "bytes": 4e9,
    "short": 1e5,
    "cps": 1e4,
    "ops": 1e4,
    "reqps": 1e3,
    "Bps": 1e9,
}


class Asked(NamedTuple):
    """A query of a dashboard. highest: what is believed of its values."""

    place: str
    expr: str
    highest: float


def read(file: str) -> dict[str, Any]:
    found = json.loads((ROOT / "dashboards" / f"{file}.json").read_text())
    return cast("dict[str, Any]", found)


def panels(file: str) -> Iterator[dict[str, Any]]:
    return (panel for panel in read(file)["panels"] if panel["type"] not in ("row", "text"))


def asked(file: str) -> Iterator[Asked]:
    """What has to have an answer: queries of panels, of the annotation, and of variables."""
    for panel in panels(file):
        if panel["title"] not in EMPTY.get(file, {}):
            highest = BOUNDS[panel["fieldConfig"]["defaults"]["unit"]]
            for target in panel["targets"]:
                yield Asked(panel["title"], filled(target["expr"]), highest)
    for annotation in read(file)["annotations"]["list"]:
        yield Asked(annotation["name"], filled(annotation["expr"]), time.time() * 1000 + 1)
    for variable in read(file)["templating"]["list"]:
        if variable["type"] == "query":
            yield Asked(f"variable {variable['name']}", listing(variable["definition"]), math.inf)


def filled(text: str) -> str:
    for name, value in FILLED.items():
        text = text.replace(name, value)
    return text


def listing(definition: str) -> str:
    """Turn label_values(selector, label) into a query with a series for each value."""
    node, words = parse_variable(filled(definition))
    assert node is not None
    assert len(words) == 1
    return f"group by ({words[0].text}) ({filled(definition)[node.start : node.end]})"


def values(prometheus: Prometheus, expr: str) -> list[float]:
    return [float(one["value"][1]) for one in prometheus.query(expr)]


def is_answered(found: list[float], query: Asked) -> bool:
    """Whether there is something, and all of it is a number that can be believed; NaN is none."""
    return bool(found) and all(0 <= value <= query.highest * (1 + 1e-9) for value in found)


@contextmanager
def running(*arguments: str) -> Generator[str]:
    """A command of rkmetrics, from its first line on."""
    command = [sys.executable, "-m", "rkmetrics", *arguments]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=pipe, stderr=nothing, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def prometheus(start_prometheus: Callable[..., Prometheus]) -> Iterator[Prometheus]:
    balancer, node = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    announces = f"--discovery-lb={balancer}"
    with running("lb", "--open", f"--port={balancer.partition(':')[2]}"):
        with running("serve", "--demo", "--open", f"--port={node.partition(':')[2]}", announces):
            yield start_prometheus({"node": f"http://{node}/metrics", "balancer": f"http://{balancer}/metrics"})


@pytest.mark.skipif(not FILES, reason="no dashboards here")
def test_every_dashboard_is_asked() -> None:
    assert set(FILES) == set(EMPTY)


@pytest.mark.parametrize("file", FILES)
def test_every_panel_has_data_that_can_be_believed(file: str, prometheus: Prometheus) -> None:
    waiting = list(asked(file))
    assert len(waiting) > 5

    def holds() -> bool:
        waiting[:] = [query for query in waiting if not is_answered(values(prometheus, query.expr), query)]
        return not waiting

    deadline = time.monotonic() + PATIENCE_SECONDS
    prometheus.wait(lambda: bool(values(prometheus, "up == 1")))
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [(query, values(prometheus, query.expr)) for query in waiting] == []


@pytest.mark.parametrize("file", FILES)
def test_every_query_is_taken(file: str, prometheus: Prometheus) -> None:
    """Those of panels that may be empty too: Prometheus' own parser is the one that counts."""
    prometheus.wait(lambda: bool(values(prometheus, "up == 1")))
    targets = [target for panel in panels(file) for target in panel["targets"]]
    found = [number for target in targets for number in values(prometheus, filled(target["expr"]))]
    assert found
    assert [number for number in found if not number >= 0] == []


@pytest.mark.parametrize("file", FILES)
def test_a_panel_that_may_be_empty_says_so(file: str) -> None:
    about = {panel["title"]: panel["description"] for panel in panels(file)}
    assert EMPTY[file].keys() <= about.keys()
    assert [title for title in EMPTY[file] if not SAYS_EMPTY.search(about[title])] == []


@pytest.fixture(scope="module")
def idle(start_prometheus: Callable[..., Prometheus]) -> Iterator[Prometheus]:
    """Of a node that nobody uses, and a balancer that nobody knows."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    node, balancer = [("--open", f"--port={at.partition(':')[2]}") for at in addresses]
    with running("serve", *node), running("lb", *balancer):
        prometheus = start_prometheus({at: f"http://{at}/metrics" for at in addresses})
        prometheus.wait(lambda: len(values(prometheus, "rkmetrics_build_info offset 2s")) == 2)  # there are rates
        yield prometheus


@pytest.mark.parametrize("file", FILES)
def test_a_panel_that_is_empty_where_nothing_happens_says_so(file: str, idle: Prometheus) -> None:
    """In its description, or in the place of its number."""
    empty = [
        panel for panel in panels(file) if not any(values(idle, filled(target["expr"])) for target in panel["targets"])
    ]
    unsaid = [
        panel["title"]
        for panel in empty
        if not SAYS_EMPTY.search(panel["description"]) and not panel["fieldConfig"]["defaults"].get("noValue")
    ]
    assert unsaid == []


def counted(prometheus: Prometheus, title: str, file: str = "fleet") -> list[float]:
    """The answers to a panel."""
    (panel,) = (panel for panel in panels(file) if panel["title"] == title)
    return [number for target in panel["targets"] for number in values(prometheus, filled(target["expr"]))]


@pytest.mark.skipif(not FILES, reason="no dashboards here")
def test_the_dead_are_counted_and_strangers_are_not(start_prometheus: Callable[..., Prometheus]) -> None:
    """ "All" of the variables is any job: one of prometheus_client, which has up and process_* as well, is not ours."""
    server, thread = start_http_server(0, "127.0.0.1", CollectorRegistry())
    stranger, ours = f"http://127.0.0.1:{server.server_port}/metrics", f"127.0.0.1:{free_port()}"
    try:
        with running("lb", "--open", f"--port={ours.partition(':')[2]}"):
            prometheus = start_prometheus({"ours": f"http://{ours}/metrics", "stranger": stranger})
            prometheus.wait(lambda: len(values(prometheus, "up == 1")) == 2)
            prometheus.wait(lambda: counted(prometheus, "Targets up") == [1])
            assert counted(prometheus, "Targets down") == [0]
            assert counted(prometheus, "Backends with traffic", "backends") == [0]
        prometheus.wait(lambda: counted(prometheus, "Targets down") == [1])
        assert counted(prometheus, "Targets up") == [0]
        assert counted(prometheus, "Backends with traffic", "backends") == []  # and not what it was
        assert values(prometheus, "sum(up)") == [1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("found", "answered"),
    [
        ([], False),
        ([math.nan], False),
        ([math.inf], False),
        ([-0.1], False),
        ([0.5, 1.1], False),
        ([math.nan, 1], False),
        ([0, 1], True),
    ],
)
def test_what_cannot_be_believed_is_no_answer(found: list[float], answered: bool) -> None:
    assert is_answered(found, Asked("P", "x", BOUNDS["percentunit"])) is answered
