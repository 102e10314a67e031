"""The routes as functions of requests, and how their table can grow."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
from pathlib import Path

import pytest

import rkmetrics as rk
from rkmetrics.asgi.auth import LoopbackGate
from rkmetrics.asgi.base import Later, Request, Response
from rkmetrics.asgi.routes import ROUTES, TELEMETRY, Surface
from rkmetrics.catalogue import exporter
from rkmetrics.discovery.routes import ROUTES as BALANCER_ROUTES
from rkmetrics.health import CODES
from rkmetrics.settings import Settings

OPEN = Settings(metrics_enabled=True, metrics_access="open")
VITALS = {
    "ready", "requests_in_progress", "cpu_usage", "memory_usage", "gpu_usage", "failed_responses", "connected_peers",
    "backoff_requests", "uptime_seconds", "version",
}  # fmt: skip


class Chat(rk.MetricSet):
    """A set of the application."""

    messages = rk.Counter("chat_messages_total", "Messages handled.", kind=rk.OneOf("text", "image"))


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(OPEN)


@pytest.fixture
def surface(registry: rk.Registry) -> Surface:
    return Surface(registry)


def get(surface: Surface, path: str, query: bytes = b"", **headers: bytes) -> tuple[int, str]:
    pairs = tuple((name.replace("_", "-").encode(), value) for name, value in headers.items())
    response = surface.respond(surface.answer(Request("GET", path, query, pairs)))
    return response.status, response.body.decode()


def test_each_route_is_counted_under_a_declared_name() -> None:
    rows = (*ROUTES.values(), *BALANCER_ROUTES)
    assert {route.name for route in rows} | {exporter.Route.OTHER} == set(exporter.Route)


def test_each_route_that_shows_metrics_is_gated() -> None:
    assert {path for path, route in ROUTES.items() if not route.gated} == {"/health", "/metadata"}


# --- vitals and telemetry: sources/003 --------------------------------------------------------------------------------


def test_vitals_are_the_protocols_json(surface: Surface, registry: rk.Registry) -> None:
    registry.health.start()
    status, body = get(surface, "/vitals")
    vitals = json.loads(body)
    assert (status, set(vitals)) == (200, VITALS)
    assert vitals["ready"] is True
    assert vitals["version"]
    assert 0 <= vitals["cpu_usage"] <= 100
    assert 0 < vitals["memory_usage"] <= 100
    assert vitals["uptime_seconds"] >= 0
    assert [type(vitals[name]) for name in ("requests_in_progress", "failed_responses", "connected_peers")] == [int] * 3


def test_json_on_metrics_is_the_same_as_vitals(surface: Surface) -> None:
    asked = json.loads(get(surface, "/metrics", accept=b"application/json")[1])
    assert set(asked) == VITALS


def test_telemetry_is_the_protocols_nine_families_without_a_prefix(surface: Surface, registry: rk.Registry) -> None:
    registry.health.start()
    status, page = get(surface, "/telemetry")
    assert status == 200
    samples = dict(line.split(" ") for line in page.splitlines() if not line.startswith("#"))
    assert list(samples) == list(TELEMETRY)
    assert len(samples) == 9
    assert samples["node_ready"] == "1"
    types = dict(line.split(" ")[2:] for line in page.splitlines() if line.startswith("# TYPE"))
    assert types == {name: "counter" if name == "failed_responses_total" else "gauge" for name in TELEMETRY}


def test_telemetry_and_vitals_agree(surface: Surface, registry: rk.Registry) -> None:
    registry.node.requests_in_progress.set(42)
    registry.node.responses["server_error"].inc(15)
    registry.node.connected_peers.set(3)
    vitals = json.loads(get(surface, "/vitals")[1])
    samples = dict(line.split(" ") for line in get(surface, "/telemetry")[1].splitlines() if line[0] != "#")
    assert (vitals["requests_in_progress"], samples["requests_in_progress"]) == (42, "42")
    assert (vitals["failed_responses"], samples["failed_responses_total"]) == (15, "15")
    assert (vitals["connected_peers"], samples["connected_peers"]) == (3, "3")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gauge_that_is_not_finite_breaks_neither_page(surface: Surface, registry: rk.Registry, value: float) -> None:
    registry.node.connected_peers.set(value)
    status, body = get(surface, "/vitals")
    assert (status, json.loads(body)["connected_peers"]) == (200, 0)
    status, page = get(surface, "/telemetry")
    assert status == 200
    assert "\nconnected_peers 0\n" in page


def test_telemetry_is_spoken_in_openmetrics_too(surface: Surface) -> None:
    page = get(surface, "/telemetry", accept=b"application/openmetrics-text;version=1.0.0")[1]
    assert "# TYPE failed_responses counter" in page
    assert page.endswith("# EOF\n")


def test_vitals_hold_up_no_event_loop(surface: Surface) -> None:
    answer = surface.answer(Request("GET", "/vitals"))
    assert isinstance(answer.response, Later)
    assert asyncio.run(surface.arespond(answer)).status == 200


# --- KV metrics -------------------------------------------------------------------------------------------------------


class Page:
    """A document whose state is a number."""

    def __init__(self) -> None:
        self.state, self.renderings = 1, 0

    def etag(self) -> bytes:
        return b'"state-%d"' % self.state

    def render(self) -> bytes:
        self.renderings += 1
        return b'{"state":%d}' % self.state


def ask_kv(surface: Surface, *if_none_match: bytes) -> Response:
    headers = tuple((b"If-None-Match", value) for value in if_none_match)
    return surface.respond(surface.answer(Request("GET", "/kv_metrics", headers=headers)))


def test_kv_metrics_shows_the_document_that_is_offered(surface: Surface, registry: rk.Registry) -> None:
    registry.offer_document("kv_metrics", Page())
    response = ask_kv(surface)
    assert (response.status, response.body) == (200, b'{"state":1}')
    headers = dict(response.raw_headers())
    assert (headers[b"etag"], headers[b"content-type"]) == (b'"state-1"', b"application/json")


def test_kv_metrics_is_an_empty_list_where_nobody_offers_one(surface: Surface, registry: rk.Registry) -> None:
    registry.offer_document("kv_metrics", Page())
    registry.offer_document("kv_metrics", None)
    registry.offer_document("kv_metrics", None)
    assert registry.document("kv_metrics") is None
    assert json.loads(ask_kv(surface).body)["workers"] == []
    assert ask_kv(surface, dict(ask_kv(surface).headers)[b"etag"]).status == 304


# RFC 9110, 13.1.2 and 8.8.3: what the client has, and whether that is the state.
IF_NONE_MATCH = [
    ((b'"state-1"',), True),
    ((b'W/"state-1"',), True),  # weak comparison
    ((b"*",), True),
    ((b'"a", "state-1"',), True),
    ((b'"a",W/"state-1" , "b"',), True),
    ((b', "state-1",, ',), True),  # 5.6.1.2: empty elements are read over
    ((b'"a"', b'"state-1"'), True),  # several lines are one list
    ((b'"state-2"',), False),
    ((b'"a, state-1"',), False),
    ((b'"state-1',), False),
    ((b"state-1",), False),
    ((b'w/"state-1"',), False),  # W is case-sensitive
    ((b'"a" "state-1"',), False),
    ((b'"a", *',), False),
    ((b"",), False),
    ((b"\xff\xfe",), False),
    ((b'"' * 10_000,), False),
    ((b'"a",' * 10_000 + b"x",), False),
]


@pytest.mark.parametrize(("values", "known"), IF_NONE_MATCH)
def test_a_client_that_has_the_state_gets_304_without_a_body(
    surface: Surface, registry: rk.Registry, values: tuple[bytes, ...], known: bool
) -> None:
    document = Page()
    registry.offer_document("kv_metrics", document)
    response = ask_kv(surface, *values)
    assert (response.status, document.renderings) == ((304, 0) if known else (200, 1))
    headers = dict(response.raw_headers())
    assert headers[b"etag"] == b'"state-1"'
    assert headers[b"cache-control"] == b"no-store"
    assert {b"content-length", b"content-type"}.isdisjoint(headers) is known
    assert bool(response.body) is not known
    assert registry.exporter.http_requests["kv_metrics", str(response.status)].value == 1


def test_a_change_gives_the_new_state(surface: Surface, registry: rk.Registry) -> None:
    document = Page()
    registry.offer_document("kv_metrics", document)
    assert ask_kv(surface, b'"state-1"').status == 304
    document.state = 2
    assert ask_kv(surface, b'"state-1"').body == b'{"state":2}'


# --- health and metadata ----------------------------------------------------------------------------------------------


def test_the_statuses_that_rivetkit_has_too_have_the_same_codes() -> None:
    """Its engine_ping_stale is our stale, for any source; unsupported (501) is what no state of ours is."""
    theirs = json.loads((Path(__file__).parent / "rivetkit" / "health.json").read_text())["statuses"]
    ours = {status.value: code for status, code in CODES.items()}
    assert theirs["engine_ping_stale"] == ours["stale"]
    assert {name: code for name, code in theirs.items() if name in ours} == {
        name: code for name, code in ours.items() if name in theirs
    }
    assert set(theirs) - set(ours) == {"engine_ping_stale", "unsupported"}


def test_health_names_stale_sources(surface: Surface, registry: rk.Registry) -> None:
    registry.health.source("engine", max_age_seconds=20)
    registry.health.start()
    status, body = get(surface, "/health")
    assert status == 503
    assert json.loads(body) == {
        "status": "starting",
        "runtime": "rkmetrics",
        "version": rk.__version__,
        "sources": {"engine": {"state": "waiting", "age_seconds": None, "max_age_seconds": 20}},
    }


def test_health_before_the_start_is_503_and_says_what_to_do(surface: Surface) -> None:
    status, body = get(surface, "/health")
    assert status == 503
    assert "registry.health.start()" in json.loads(body)["hint"]


def test_health_of_a_serverless_process_is_ok_before_any_link() -> None:
    registry = rk.Registry(Settings(), serverless=True)
    status, body = get(Surface(registry), "/health")
    assert (status, json.loads(body)["status"]) == (200, "ok")


def test_health_shows_overflows_as_counts_and_not_what_was_sent(surface: Surface, registry: rk.Registry) -> None:
    registry.bind(Chat, actor_name="lobby").messages["se\ncret"].inc()
    body = json.loads(get(surface, "/health")[1])
    assert body["label_overflow"] == {"chat_messages_total{kind}": 1}
    assert "cret" not in str(body)


def test_health_does_not_wait_for_a_scrape(surface: Surface, registry: rk.Registry) -> None:
    """A collector that hangs holds up its own scrape for its time-out, and /health not at all."""
    hanging, release = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        release.wait()

    registry.add_collector(hang, name="hanging", timeout_seconds=60)
    registry.health.start()
    scrape = threading.Thread(target=get, args=(surface, "/metrics"))
    scrape.start()
    hanging.wait()
    assert get(surface, "/health")[0] == 200
    assert get(surface, "/metadata")[0] == 200
    assert scrape.is_alive()
    release.set()
    scrape.join()


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_too_many_scrapes_at_once_are_503_with_retry_after(surface: Surface, registry: rk.Registry) -> None:
    """F23: as node_exporter, forty may wait; what is more is told to come again."""
    release = threading.Event()

    def hang() -> None:
        release.wait()

    registry.add_collector(hang, name="hanging", timeout_seconds=60)
    request = Request("GET", "/metrics")

    async def flood() -> list[int]:
        scrapes = [asyncio.ensure_future(surface.arespond(surface.answer(request))) for _ in range(50)]
        done: set[asyncio.Future[Response]] = set()
        while len(done) < 10:
            done, _ = await asyncio.wait(scrapes, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)
        refused = [scrape.result() for scrape in done]
        assert {(each.status, dict(each.headers).get(b"retry-after")) for each in refused} == {(503, b"1")}
        release.set()
        return [response.status for response in await asyncio.gather(*scrapes)]

    statuses = asyncio.run(flood())
    assert (statuses.count(200), statuses.count(503)) == (40, 10)
    assert registry.exporter.http_requests["metrics", "503"].value == 10


def test_a_defect_of_ours_is_a_plain_500_and_its_traceback_is_in_the_log_alone(
    surface: Surface, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> object:
        raise RuntimeError("the details")

    surface.renderer.render = surface.renderer.arender = broken  # type: ignore[assignment]
    status, body = get(surface, "/metrics")
    assert (status, body) == (500, "the answer could not be made; the log says why\n")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


# --- the gate of loopback servers -------------------------------------------------------------------------------------

HOSTS = [
    (b"localhost", True),
    (b"localhost:9090", True),
    (b"LOCALHOST:9090", True),
    (b"node.localhost:1", True),
    (b"127.0.0.1:9090", True),
    (b"127.8.8.8", True),
    (b"[::1]:9090", True),
    (b"attacker.example:9090", False),
    (b"localhost.attacker.example", False),
    (b"127.0.0.1.attacker.example", False),
    (b"10.0.0.1", False),
    (b"[::2]", False),
    (b"[", False),
    (b"", False),
    (b"\xff", False),
]


@pytest.mark.parametrize(("host", "passes"), HOSTS)
def test_an_open_loopback_server_answers_to_names_of_loopback_only(host: bytes, passes: bool) -> None:
    refusal = LoopbackGate().refuse(Request("GET", "/metrics", headers=((b"host", host),)))
    assert (refusal is None) is passes
    if refusal is not None:
        assert refusal.status == 403
