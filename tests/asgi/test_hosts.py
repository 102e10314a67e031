"""The routes and their gate in every host: DESIGN section 7, threats T1 to T11 and T17 as attacks with raw bytes."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.settings import Secret, Settings
from tests.asgi.hosts import HOSTS, HeaderList, Host, Reply, bearer

GATED = ["/metrics", "/telemetry", "/vitals"]
OPEN = ["/health", "/metadata"]
FORMAT = "text/plain; version=0.0.4; charset=utf-8"
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "BREW"]
PAGE = b"rkmetrics_build_info"


class Chat(rk.MetricSet):
    """A set of the application."""

    members = rk.Gauge("chat_members", "Members in rooms.", across="sum")
    messages = rk.Counter("chat_messages_total", "Messages handled.", kind=rk.OneOf("text", "image"))


def registry_of(**values: Any) -> rk.Registry:
    registry = rk.Registry(Settings(**values))
    registry.bind(Chat, actor_name="lobby").members.set(12)
    return registry


def guarded(**values: Any) -> rk.Registry:
    return registry_of(metrics_enabled=True, metrics_token=Secret(b"s3cret"), **values)


@pytest.fixture(scope="module", params=list(HOSTS))
def making(request: pytest.FixtureRequest) -> Callable[[rk.Registry], Any]:
    return HOSTS[request.param]


@pytest.fixture(scope="module")
def registry(making: object) -> rk.Registry:
    return guarded()


@pytest.fixture(scope="module")
def host(making: Callable[[rk.Registry], Any], registry: rk.Registry) -> Iterator[Host]:
    with making(registry) as made:
        yield made


def shows_metrics(reply: Reply) -> bool:
    return any(name in reply.body for name in (PAGE, b"node_ready", b"requests_in_progress", b"chat_"))


def assert_common(reply: Reply) -> None:
    assert reply.header("cache-control") == "no-store"
    assert reply.header("vary") == "Accept, Accept-Encoding, Authorization"
    assert reply.header("x-content-type-options") == "nosniff"
    assert not [name for name, _ in reply.headers if name.startswith("access-control")]


# --- the table of DESIGN section 7 ------------------------------------------------------------------------------------

TABLE: list[tuple[dict[str, Any], HeaderList, int]] = [
    ({}, (), 403),
    ({}, bearer(), 403),
    ({"metrics_token": Secret(b"s3cret")}, bearer(), 403),
    ({"metrics_access": "open"}, (), 403),
    ({"metrics_enabled": True, "metrics_token": Secret(b"s3cret")}, bearer(), 200),
    ({"metrics_enabled": True, "metrics_token": Secret(b"s3cret")}, bearer(b"wrong"), 401),
    ({"metrics_enabled": True, "metrics_token": Secret(b"s3cret")}, (), 401),
    (
        {"metrics_enabled": True, "metrics_token": Secret(b"new"), "metrics_token_previous": Secret(b"s3cret")},
        bearer(),
        200,
    ),
    ({"metrics_enabled": True}, (), 403),
    ({"metrics_enabled": True}, bearer(b""), 403),
    ({"metrics_enabled": True, "metrics_token": Secret(b"")}, bearer(b""), 403),
    ({"metrics_enabled": True, "metrics_token": Secret(b" ")}, bearer(b" "), 403),
    ({"metrics_enabled": True, "metrics_access": "open"}, (), 200),
]


@pytest.mark.parametrize(("values", "headers", "status"), TABLE)
def test_the_gate_follows_the_table_on_every_gated_route(
    making: Callable[[rk.Registry], Any], values: dict[str, Any], headers: HeaderList, status: int
) -> None:
    with making(registry_of(**values)) as host:
        for path in GATED:
            reply = host.ask("GET", path, headers)
            assert reply.status == status
            assert shows_metrics(reply) is (status == 200)
            assert_common(reply)
            assert reply.header("www-authenticate") == ("Bearer" if status == 401 else None)
            if status == 403:
                assert reply.body.startswith(b"metrics not enabled\n")
        for path in OPEN:
            assert host.ask("GET", path).status in (200, 503)


def test_rivetkits_captured_cases_hold_here_too(host: Host) -> None:
    """Where we are stricter: WWW-Authenticate is sent, and no CORS header is."""
    gate = json.loads((Path(__file__).parent / "rivetkit" / "metrics.json").read_text())["gate"]
    assert gate["configured_token"] == "s3cret"
    for case in gate["cases"]:
        written = case["authorization"].partition(" (")[0]
        path = "/metrics?token=s3cret" if "?token" in case["authorization"] else "/metrics"
        headers = () if case["authorization"].startswith("(none") else [(b"authorization", written.encode() + b" ")]
        assert host.ask("GET", path, headers).status == case["status"], case


# --- T2 to T4, T8, T9: what is offered --------------------------------------------------------------------------------

AUTH = b"authorization"
REFUSED: list[tuple[str, list[tuple[bytes, bytes]]]] = [
    ("", []),
    ("", [(AUTH, b"")]),
    ("", [(AUTH, b"Bearer")]),
    ("", [(AUTH, b"Bearer\ts3cret")]),
    ("", [(AUTH, b"Bearer s3cret x")]),
    ("", [(AUTH, b'Bearer "s3cret"')]),
    ("", [(AUTH, b"Bearer s3cre")]),
    ("", [(AUTH, b"Bearer s3crets")]),
    ("", [(AUTH, b"Bearer S3CRET")]),
    ("", [(AUTH, b"Basic s3cret")]),
    ("", [(AUTH, b"s3cret")]),
    ("", [(AUTH, b"Bearer s3cret, Bearer s3cret")]),
    ("", [(AUTH, b"Bearer s3cret"), (AUTH, b"Bearer s3cret")]),
    ("", [(AUTH, b"Bearer wrong"), (AUTH, b"Bearer s3cret")]),
    ("", [(AUTH, b"Bearer s3cret"), (b"AUTHORIZATION", b"Basic x")]),
    ("", [(AUTH, b"Bearer s3cr\xc3\xa9t")]),
    ("", [(AUTH, b"Bearer \xff\xfe\x80")]),
    ("", [(AUTH, b"\xc2\xa0Bearer s3cret")]),
    ("", [(AUTH, b"Bearer s3cret\xc2\xa0")]),
    ("", [(AUTH, b"Bearer " + b"x" * 20_000)]),
    ("?token=s3cret", []),
    ("?access_token=s3cret", [(AUTH, b"Bearer s3cret")]),
    ("?%74oken=s3cret", []),
    ("", [(b"cookie", b"token=s3cret; authorization=Bearer s3cret")]),
    ("", [(b"proxy-authorization", b"Bearer s3cret")]),
    ("", [(b"x-api-key", b"s3cret")]),
    ("", [(b"x-forwarded-for", b"127.0.0.1"), (b"forwarded", b"for=127.0.0.1"), (b"x-real-ip", b"127.0.0.1")]),
    ("", [(b"x-original-url", b"/health"), (b"x-rewrite-url", b"/health"), (b"x-http-method-override", b"HEAD")]),
    ("", [(b"origin", b"http://localhost"), (b"sec-fetch-site", b"same-origin")]),
]


@pytest.mark.parametrize(("query", "headers"), REFUSED)
@pytest.mark.parametrize("path", GATED)
def test_whatever_is_not_one_right_bearer_is_401(host: Host, path: str, query: str, headers: HeaderList) -> None:
    reply = host.ask("GET", path + query, headers)
    assert (reply.status, reply.body) == (401, b"metrics request requires a valid bearer token\n")
    assert reply.header("www-authenticate") == "Bearer"
    assert_common(reply)


ACCEPTED = [b"Bearer s3cret", b"bearer s3cret", b"BEARER   s3cret", b"Bearer s3cret ", b"\tBearer s3cret\t"]


@pytest.mark.parametrize("authorization", ACCEPTED)
def test_the_scheme_is_matched_in_any_case_and_outer_space_does_not_count(host: Host, authorization: bytes) -> None:
    reply = host.ask("GET", "/metrics", [(b"Authorization", authorization)])
    assert (reply.status, reply.header("content-type")) == (200, FORMAT)
    assert PAGE in reply.body
    assert_common(reply)


def test_a_control_character_in_a_header_is_refused_by_somebody(host: Host) -> None:
    for byte in (b"\x00", b"\x01", b"\x7f", b"\x0b"):
        reply = host.ask("GET", "/metrics", [(AUTH, b"Bearer s3cret" + byte)])
        assert reply.status in (400, 401)
        assert not shows_metrics(reply)


@given(st.lists(st.binary(max_size=40), max_size=3), st.lists(st.binary(max_size=60), max_size=2))
@settings(deadline=None, max_examples=60)
def test_no_bytes_in_authorization_or_accept_give_metrics_or_a_5xx(
    host: Host, authorization: list[bytes], accept: list[bytes]
) -> None:
    """R2. What would end the header is taken out: the rest is as it may come over the wire."""
    clean = bytes.maketrans(b"\r\n\x00", b"   ")
    headers = [(AUTH, value.translate(clean)) for value in authorization]
    headers += [(b"accept", value.translate(clean)) for value in accept]
    reply = host.ask("GET", "/metrics", headers)
    assert reply.status in (400, 401)
    assert not shows_metrics(reply)


@given(st.binary(max_size=80), st.binary(max_size=40))
@settings(deadline=None, max_examples=60)
def test_no_bytes_in_accept_break_a_scrape(host: Host, accept: bytes, accept_encoding: bytes) -> None:
    clean = bytes.maketrans(b"\r\n\x00", b"   ")
    headers = [*bearer(), (b"accept", accept.translate(clean)), (b"accept-encoding", accept_encoding.translate(clean))]
    assert host.ask("GET", "/metrics", headers).status in (200, 400)


# --- T6, T7: methods and paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_gate_comes_before_the_method_and_405_names_the_methods(host: Host, method: str) -> None:
    """TRACE echoes nothing, OPTIONS opens nothing, an unknown method tells nothing to who has no token."""
    for path in GATED:
        assert host.ask(method, path).status == 401
        allowed = host.ask(method, path, bearer())
        assert allowed.status == (200 if method in ("GET", "HEAD") else 405)
    for path in OPEN:
        reply = host.ask(method, path)
        assert (reply.status == 405) is (method not in ("GET", "HEAD"))
        assert reply.header("allow") == ("GET, HEAD" if reply.status == 405 else None)
        assert_common(reply)


INEXACT = [
    "/metrics/", "//metrics", "/metrics//", "/./metrics", "/x/../metrics", "/metrics;x", "/metrics;x=1", "/metrics%20",
    "/metrics%2f", "/%6detrics", "/metric%73", "/metrics%00", "/metrics%0a", "/metrics.json", "/METRICS", "/Metrics",
    "/metrics%3f", "/metrics/x", "/health/../metrics", "/%2e/metrics", "/metrics%c2%a0", "/vitals/", "/telemetry/", "/",
]  # fmt: skip


@pytest.mark.parametrize("path", INEXACT)
def test_what_is_not_exactly_a_route_is_404(host: Host, request: pytest.FixtureRequest, path: str) -> None:
    reply = host.ask("GET", path, bearer())
    sub_router = "sub-router" in request.node.name and path.endswith(("/", "%2f")) and len(path) > 1
    # FastAPI copies the routes of a sub-router, and then redirects to the exact path: no metrics, but no 404 either.
    assert reply.status in ((404, 307) if sub_router else (404,))
    assert not shows_metrics(reply)


@pytest.mark.parametrize("path", [*GATED, *OPEN])
def test_head_is_get_without_the_body(host: Host, path: str) -> None:
    query = "?name[]=chat_members" if path == "/metrics" else ""
    got, headed = (host.ask(method, path + query, bearer()) for method in ("GET", "HEAD"))
    assert headed.body == b""
    if path not in ("/vitals", "/telemetry"):  # the length of moving numbers moves
        assert int(headed.header("content-length") or 0) == len(got.body)
    skipped = ("date", "content-length")
    assert [h for h in headed.headers if h[0] not in skipped] == [h for h in got.headers if h[0] not in skipped]
    assert headed.status == got.status


def test_a_body_nobody_asked_for_is_not_waited_for(host: Host) -> None:
    assert host.ask("GET", "/health", body=b"x" * 1000).status in (200, 503)
    assert host.ask("POST", "/metrics", bearer(), body=b"x" * 1000).status == 405


# --- representations --------------------------------------------------------------------------------------------------

TEXT, OPENMETRICS, PROTOBUF, JSON = (
    "text/plain",
    "application/openmetrics-text",
    "application/vnd.google",
    "application/json",
)
ACCEPT: list[tuple[bytes | None, str]] = [
    (None, TEXT),
    (b"*/*", TEXT),
    (b"text/html", TEXT),
    (b"application/json", JSON),
    (b"APPLICATION/JSON", JSON),
    (b"application/json; charset=utf-8", JSON),
    (b"application/json, */*", JSON),
    (b"application/json, text/plain, */*", JSON),
    (b"application/json;q=0.5, */*", TEXT),
    (b"application/json;q=0.5, text/plain", TEXT),
    (b"text/plain;q=0.5, application/json", JSON),
    (b"application/json;q=0", TEXT),
    (b"application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", OPENMETRICS),
    (
        b"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,"
        b"application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
        PROTOBUF,
    ),
    (b"\xff\xfe", TEXT),
]


@pytest.mark.parametrize(("accept", "content_type"), ACCEPT)
def test_metrics_has_the_representation_that_is_asked_for(host: Host, accept: bytes | None, content_type: str) -> None:
    reply = host.ask("GET", "/metrics", bearer() + ([] if accept is None else [(b"accept", accept)]))
    assert reply.status == 200
    assert (reply.header("content-type") or "").startswith(content_type)
    assert int(reply.header("content-length") or 0) == len(reply.body)
    assert_common(reply)


def test_several_accept_headers_are_one_list(host: Host) -> None:
    reply = host.ask("GET", "/metrics", [*bearer(), (b"accept", b"text/plain;q=0.1"), (b"accept", b"application/json")])
    assert reply.header("content-type") == "application/json"


def test_json_on_metrics_is_gated_like_any_other_representation(host: Host) -> None:
    assert host.ask("GET", "/metrics", [(b"accept", b"application/json")]).status == 401


def test_codings_are_honoured(host: Host) -> None:
    reply = host.ask("GET", "/metrics", [*bearer(), (b"accept-encoding", b"gzip")])
    assert reply.header("content-encoding") == "gzip"
    assert PAGE in gzip.decompress(reply.body)
    plain = host.ask("GET", "/metrics", [*bearer(), (b"accept-encoding", b"gzip;q=0")])
    assert plain.header("content-encoding") is None


NAMES: list[tuple[str, set[bytes]]] = [
    ("?name[]=chat_members", {b"chat_members"}),
    ("?name%5B%5D=chat_members", {b"chat_members"}),
    ("?name[]=chat_members&name[]=chat_messages_total", {b"chat_members", b"chat_messages_total"}),
    ("?name[]=nothing_of_that_name", set()),
    ("?name[]=%ff%fe", set()),
]


@pytest.mark.parametrize(("query", "families"), NAMES)
def test_name_filters_families(host: Host, query: str, families: set[bytes]) -> None:
    reply = host.ask("GET", f"/metrics{query}", bearer())
    assert reply.status == 200
    assert {line.split()[2] for line in reply.body.splitlines() if line.startswith(b"# TYPE")} == families


def test_more_names_than_anybody_needs_are_refused(host: Host) -> None:
    assert host.ask("GET", "/metrics?" + "name[]=a&" * 257, bearer()).status == 400


# --- open routes ------------------------------------------------------------------------------------------------------


def test_health_is_one_answer_on_every_surface(making: Callable[[rk.Registry], Any]) -> None:
    registry = guarded()
    with making(registry) as host:
        for step in ("start", "begin_drain", "begin_shutdown", "finish_shutdown"):
            getattr(registry.health, step)()
            reply = host.ask("GET", "/health")
            body = json.loads(reply.body)
            assert (reply.status, body["status"]) == (registry.health.check().code, registry.health.status)
            assert (body["runtime"], body["version"]) == ("rkmetrics", rk.__version__)
            assert reply.header("content-type") == "application/json"
            ready = json.loads(host.ask("GET", "/vitals", bearer()).body)["ready"]
            assert ready is (reply.status == 200)


def test_metadata_says_what_it_is_and_no_secret(host: Host) -> None:
    reply = host.ask("GET", "/metadata")
    body = json.loads(reply.body)
    assert (reply.status, body["runtime"], body["version"]) == (200, "rkmetrics", rk.__version__)
    assert body["cells"] == rk.IMPLEMENTATION
    assert body["actorNames"] == {"lobby": {"metadata": {}}}
    assert len(body["catalog"]) == 8
    assert body["wire"] == {"requestPlane": "tcp", "kvPlane": "auto", "dynWire": "0.8", "namespace": "dynamo"}
    assert b"s3cret" not in reply.body


def test_no_answer_opens_to_other_origins(host: Host) -> None:
    origin = [(b"origin", b"https://attacker.example"), (b"access-control-request-method", b"GET")]
    for method in ("GET", "OPTIONS"):
        for path in (*GATED, *OPEN):
            assert_common(host.ask(method, path, [*bearer(), *origin]))


# --- rotation, concurrency, counting ----------------------------------------------------------------------------------


def test_a_token_file_is_rotated_live(making: Callable[[rk.Registry], Any], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    with making(registry_of(metrics_enabled=True, metrics_token_file=str(file))) as host:

        def statuses() -> list[int]:
            return [host.ask("GET", "/metrics", bearer(token)).status for token in (b"one", b"two")]

        assert statuses() == [200, 401]
        file.write_text("two\none\n")
        assert statuses() == [200, 200]
        file.write_text("two\n")
        assert statuses() == [401, 200]
        file.unlink()
        assert statuses() == [403, 403]


def test_concurrent_scrapes_all_get_the_page(host: Host) -> None:
    replies: list[Reply] = []

    def scrape() -> None:
        for _ in range(5):
            replies.append(host.ask("GET", "/metrics", bearer()))

    threads = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.status for reply in replies] == [200] * 40
    assert all(PAGE in reply.body and reply.body.endswith(b"\n") for reply in replies)


def test_every_answer_and_every_401_is_counted(making: Callable[[rk.Registry], Any]) -> None:
    registry = guarded()
    exporter = registry.exporter
    with making(registry) as host:
        host.ask("GET", "/metrics", bearer())
        host.ask("GET", "/metrics")
        host.ask("GET", "/vitals?token=x")
        host.ask("POST", "/health")
    assert exporter.http_requests["metrics", "200"].value == 1
    assert exporter.http_requests["metrics", "401"].value == 1
    assert exporter.http_requests["vitals", "401"].value == 1
    assert exporter.http_requests["health", "405"].value == 1
    assert exporter.auth_failures["missing"].value == 1
    assert exporter.auth_failures["query_token"].value == 1
    assert not registry.overflows()
