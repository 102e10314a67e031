"""A balancer's routes behind ASGI servers and rk.serve(): the protocol, and who attacks it (T9, T12 to T17)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.asgi.app import Application
from rkmetrics.asgi.auth import Gate, LoopbackGate
from rkmetrics.asgi.base import Request
from rkmetrics.asgi.routes import Surface
from rkmetrics.catalogue.discovery import CheckOutcome, RegisterOutcome
from rkmetrics.discovery.balancer import Balancer, policy_of, static_backends, token_of
from rkmetrics.discovery.base import BODY_LIMIT_BYTES, Backend, SourceName
from rkmetrics.discovery.directory import State
from rkmetrics.discovery.routes import DETAILS_TYPE, ROUTES, routes
from rkmetrics.discovery.verdict import Vitals
from rkmetrics.server import Limits, Server
from rkmetrics.settings import Secret, Settings
from tests.asgi.hosts import Host, InMemory, OnSocket, Reply, read_reply, uvicorn_of

TOKEN, METRICS_TOKEN = "r3gister", "m3trics"
SETTINGS = Settings(
    metrics_enabled=True,
    metrics_token=Secret(METRICS_TOKEN),
    registration_token=Secret(TOKEN),
    allowed_networks=("127.0.0.0/8", "10.0.0.0/8"),
)
GOOD: dict[str, Any] = {"id": "backend-1", "address": "127.0.0.1:3000", "metrics_port": 9090}
BEARER = (b"authorization", f"Bearer {TOKEN}".encode())
READER = (b"authorization", f"Bearer {METRICS_TOKEN}".encode())


class Place:
    """A balancer, and one host of its routes."""

    def __init__(self, balancer: Balancer, host: Host) -> None:
        self.balancer, self.directory, self.host = balancer, balancer.directory, host

    def register(self, body: object = GOOD, *headers: tuple[bytes, bytes]) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.host.ask("POST", "/register", headers or (BEARER,), data)

    def leave(self, id: str, *headers: tuple[bytes, bytes]) -> Reply:
        return self.host.ask("DELETE", f"/register/{id}", headers or (BEARER,))

    def get(self, path: str, *headers: tuple[bytes, bytes]) -> Any:
        return json.loads(self.host.ask("GET", path, headers or (READER,)).body)

    def check(self, id: str, outcome: CheckOutcome = CheckOutcome.READY) -> None:
        entry = next(each for each in self.directory.entries() if each.backend.id == id)
        vitals = Vitals(ready=True, requests_in_progress=3) if outcome is CheckOutcome.READY else None
        self.directory.record(entry, outcome, vitals)

    def count(self, outcome: RegisterOutcome) -> float:
        return self.balancer.metrics.registrations[outcome].value or 0.0


def made(settings: Settings = SETTINGS, **options: Any) -> tuple[Balancer, Surface]:
    registry = rk.Registry(settings, builtin=False)
    balancer = Balancer(registry, **options)
    surface = Surface(registry, more=routes(balancer, Gate.for_registrations(settings, lambda _: None)))
    return balancer, surface


@contextmanager
def in_memory(settings: Settings = SETTINGS, **options: Any) -> Generator[Place]:
    balancer, surface = made(settings, **options)
    yield Place(balancer, InMemory(Application(surface)))


@contextmanager
def under_uvicorn(settings: Settings = SETTINGS, **options: Any) -> Generator[Place]:
    balancer, surface = made(settings, **options)
    with uvicorn_of(Application(surface)) as port:
        yield Place(balancer, OnSocket(port))


@contextmanager
def served(settings: Settings = SETTINGS, **options: Any) -> Generator[Place]:
    registry = rk.Registry(settings, builtin=False)
    balancer = Balancer(registry, **options)
    more = routes(balancer, Gate.for_registrations(settings, lambda _: None))
    with rk.serve(registry, port=0, more=more) as server:
        yield Place(balancer, OnSocket(server.port))


HOSTS: dict[str, Callable[..., AbstractContextManager[Place]]] = {
    "asgi": in_memory,
    "uvicorn": under_uvicorn,
    "serve": served,
}


@pytest.fixture(params=["asgi", "serve"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with HOSTS[request.param]() as place:
        yield place


@pytest.fixture
def memory() -> Iterator[Place]:
    with in_memory() as place:
        yield place


# --- the protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", sorted(HOSTS))
def test_register_check_list_leave(host: str) -> None:
    with HOSTS[host]() as place:
        assert place.register(b"x" * (BODY_LIMIT_BYTES + 1)).status == 413
        walk(place)


def walk(place: Place) -> None:
    reply = place.register()
    assert reply.status == 201
    assert json.loads(reply.body) == {"id": "backend-1", "state": "new", "expires_seconds": 90.0}
    assert place.get("/backends") == []
    place.check("backend-1")
    assert place.get("/backends") == ["127.0.0.1:3000"]
    reply = place.register()
    assert (reply.status, json.loads(reply.body)["state"]) == (200, "up")
    assert place.leave("backend-1").status == 200
    assert place.leave("backend-1").status == 404
    assert place.get("/backends") == []


def test_details(place: Place) -> None:
    place.register({**GOOD, "labels": {"zone": "eu-1a"}})
    place.check("backend-1")
    found = place.get("/backends?details=1")
    (backend,) = found["backends"]
    assert found["panic"] is False
    assert {
        key: backend[key] for key in ("id", "address", "metrics_port", "state", "in_pool", "last_check", "labels")
    } == {
        **GOOD,
        "state": "up",
        "in_pool": True,
        "last_check": "ready",
        "labels": {"zone": "eu-1a"},
    }
    assert backend["vitals"]["requests_in_progress"] == 3
    reply = place.host.ask("GET", "/backends", (READER, (b"accept", DETAILS_TYPE.encode())))
    assert (reply.header("content-type"), json.loads(reply.body)["backends"][0]["id"]) == (DETAILS_TYPE, "backend-1")


def test_prometheus_service_discovery(place: Place) -> None:
    """HTTP SD: a list of groups, application/json; what a backend says is in labels that do not stay."""
    for number, id in enumerate(("up", "drains", "dead", "new", "never")):
        place.register({"id": id, "address": f"127.0.0.1:{3000 + number}", "metrics_port": 9090 + number})
        if id not in ("new", "never"):
            place.check(id)
    place.check("drains", CheckOutcome.NOT_READY)
    for id in ("dead", "never"):
        place.check(id, CheckOutcome.REFUSED)
        place.check(id, CheckOutcome.REFUSED)
    groups = {group["labels"]["__meta_rkmetrics_id"]: group for group in place.get("/sd")}
    assert set(groups) == {"up", "dead"}  # a dead one stays a target until it is forgotten: up == 0 is for alerts
    assert groups["up"] == {
        "targets": ["127.0.0.1:9090"],
        "labels": {
            "__meta_rkmetrics_id": "up",
            "__meta_rkmetrics_address": "127.0.0.1:3000",
            "__meta_rkmetrics_state": "up",
        },
    }
    assert place.host.ask("GET", "/sd", (READER,)).header("content-type") == "application/json"


def test_labels_are_escaped(memory: Place) -> None:
    value = '"} evil{x="\\\\ </script>\U0001f600'
    memory.register({**GOOD, "labels": {"note": value}})
    memory.check("backend-1")
    (group,) = memory.get("/sd")
    assert group["labels"]["__meta_rkmetrics_label_note"] == value
    assert memory.get("/backends?details=1")["backends"][0]["labels"] == {"note": value}


def test_the_balancer_has_health_and_metrics_of_its_own(place: Place) -> None:
    assert place.host.ask("GET", "/health").status == 200
    place.register()
    page = place.host.ask("GET", "/metrics", (READER,)).body.decode()
    assert 'rkmetrics_discovery_backends{state="new"} 1' in page
    assert 'rkmetrics_http_requests_total{route="register",code="201"} 1' in page


def test_every_route_is_there_once() -> None:
    assert [(row.path, row.methods) for row in ROUTES] == [
        ("/register", ("POST",)),
        ("/register/{id}", ("DELETE",)),
        ("/backends", ("GET", "HEAD")),
        ("/sd", ("GET", "HEAD")),
    ]


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        ((b"x-nothing", b"1"),),
        ((b"authorization", b"Bearer wrong"),),
        ((b"authorization", b"Basic cjNnaXN0ZXI="),),
        (READER,),
        (BEARER, BEARER),
    ],
)
def test_without_its_token_nothing_registers(place: Place, headers: tuple[tuple[bytes, bytes], ...]) -> None:
    """T12; the token for metrics is not one for registrations."""
    place.register()
    assert place.register({**GOOD, "id": "evil"}, *headers).status == 401
    assert place.leave("backend-1", *headers).status == 401
    assert [entry.backend.id for entry in place.directory.entries()] == ["backend-1"]


def test_the_token_for_registrations_reads_nothing(place: Place) -> None:
    for path in ("/backends", "/backends?details=1", "/sd", "/metrics"):
        assert place.host.ask("GET", path, (BEARER,)).status == 401
        assert place.host.ask("GET", path).status == 401


def test_two_tokens_while_they_are_rotated() -> None:
    settings = Settings(
        registration_token=Secret("new"), registration_token_previous=Secret("old"), allowed_networks=("127.0.0.0/8",)
    )
    with in_memory(settings) as place:
        for token, status in ((b"new", 201), (b"old", 200), (b"none", 401)):
            assert place.register(GOOD, (b"authorization", b"Bearer " + token)).status == status


def test_without_any_token_registrations_are_closed(caplog: pytest.LogCaptureFixture) -> None:
    with in_memory(Settings(allowed_networks=("127.0.0.0/8",))) as place:
        assert place.register(GOOD).status == 403
    assert "registrations: no token is set" in caplog.text


def test_open_registrations_are_said_so() -> None:
    with in_memory(Settings(registration_access="open", allowed_networks=("127.0.0.0/8",))) as place:
        assert place.register(GOOD, (b"x-nothing", b"1")).status == 201


def test_a_page_in_a_browser_registers_nothing() -> None:
    """A balancer on loopback without a token must not be open to every page that its user looks at."""
    registry = rk.Registry(Settings(), builtin=False)
    balancer = Balancer(registry, loopback=True)
    with rk.serve(registry, port=0, open_loopback=True, more=routes(balancer, LoopbackGate())) as server:
        place = Place(balancer, OnSocket(server.port))
        assert place.register(GOOD, (b"origin", b"http://evil.example"), (b"content-type", b"text/plain")).status == 403
        rebound = b"POST /register HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n\r\n{}"
        assert OnSocket(server.port).raw(rebound, "POST").status == 403
        assert place.register(GOOD, (b"x-nothing", b"1")).status == 201
        assert place.leave("backend-1", (b"origin", b"null")).status == 403


def test_no_token_is_shown(memory: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    memory.register()
    memory.register({**GOOD, "address": "10.0.0.1:99"})
    shown = caplog.text + repr(memory.balancer) + json.dumps(memory.get("/backends?details=1"))
    assert TOKEN not in shown
    assert METRICS_TOKEN not in shown


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not a registration"),
        (b"{", "not a registration"),
        (b"[]", "Expected `object`"),
        (b'"x"', "Expected `object`"),
        (b"\xff", "not a registration"),
        (b"[" * 8_000, "not a registration"),
        ({}, "missing required field `id`"),
        ({**GOOD, "metrics_port": "9090"}, "Expected `int`"),
        ({**GOOD, "metrics_port": 0}, ">= 1"),
        ({**GOOD, "id": "../../x"}, "expected 1 to 128 letters"),
        ({**GOOD, "address": "10.0.0.1"}, "expected host:port"),
        ({**GOOD, "address": "0.0.0.0:3000"}, "never 0.0.0.0"),
        ({**GOOD, "labels": {"A": "x"}}, "the name of a label='A'"),
    ],
)
def test_a_body_that_is_none_is_answered_with_what_is_wrong(place: Place, body: object, says: str) -> None:
    reply = place.register(body)
    assert (reply.status, says in reply.body.decode()) == (400, True), reply.body
    assert place.count(RegisterOutcome.MALFORMED) == 1
    assert len(place.directory) == 0


@given(body=st.binary(max_size=200))
@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_gets_a_5xx(memory: Place, body: bytes) -> None:
    memory.balancer.rate._buckets.clear()
    assert memory.register(body).status == 400


def test_a_large_body_is_refused_before_it_is_read(place: Place) -> None:
    """T17. The head alone is enough for the answer, and the token is looked at first."""
    assert place.register(b"x" * (BODY_LIMIT_BYTES + 1)).status == 413
    assert place.register(b"x" * (BODY_LIMIT_BYTES + 1), (b"x-nothing", b"1")).status == 401
    assert place.register(b" " * (BODY_LIMIT_BYTES - 100) + json.dumps(GOOD).encode()[:100]).status in (201, 400)


def head(*lines: bytes) -> bytes:
    auth = f"Authorization: Bearer {TOKEN}".encode()
    return b"\r\n".join([b"POST /register HTTP/1.1", b"Host: localhost", auth, *lines]) + b"\r\n\r\n"


def test_the_answer_to_a_large_body_does_not_wait_for_it() -> None:
    with served() as place:
        assert isinstance(place.host, OnSocket)
        assert place.host.raw(head(b"Content-Length: 60000"), "POST").status == 413
        assert place.host.raw(head(b"Content-Length: 99999999999"), "POST").status == 413
        assert place.host.raw(head(b"Transfer-Encoding: chunked") + b"0\r\n\r\n", "POST").status == 400


def test_a_body_may_come_byte_by_byte_and_the_connection_stays() -> None:
    data = json.dumps(GOOD).encode()
    with served() as place, connected(place) as client:
        for byte in head(b"Content-Length: %d" % len(data)) + data:
            client.send(bytes([byte]))
        assert read_reply(client, "POST").status == 201
        client.sendall(
            head(b"Content-Length: %d" % len(data)) + data + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        replies = b""
        while replies.count(b"HTTP/1.1 200") < 2:
            replies += client.recv(65_536)


def test_who_asks_whether_to_send_a_body_is_told_to() -> None:
    """RFC 9110, 10.1.1: curl asks before it sends a larger one."""
    data = json.dumps(GOOD).encode()
    with served() as place, connected(place) as client:
        client.sendall(head(b"Expect: 100-continue", b"Content-Length: %d" % len(data)))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(data)
        assert read_reply(client, "POST").status == 201


def test_who_may_not_register_is_not_told_to_send_a_body() -> None:
    with served() as place, connected(place) as client:
        client.sendall(
            b"POST /register HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n"
        )
        assert read_reply(client, "POST").status == 401


def test_a_body_that_never_comes_holds_nobody_up() -> None:
    """T16."""
    with served() as place, connected(place) as client:
        client.sendall(head(b"Content-Length: 100") + b'{"id"')
        assert place.register().status == 201


def test_a_body_that_never_comes_is_cut_off() -> None:
    balancer, surface = made()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    with Server(surface, listener, Limits(body_seconds=0.2)) as server:
        place = Place(balancer, OnSocket(server.port))
        with connected(place) as client:
            client.sendall(head(b"Content-Length: 100") + b'{"id"')
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
        assert place.register().status == 201


async def test_a_client_that_goes_away_in_its_body_registers_nothing() -> None:
    balancer, surface = made()
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]
    status = await call(surface, messages)
    assert (status, len(balancer.directory)) == (408, 0)


async def test_a_body_without_a_length_is_bounded_too() -> None:
    balancer, surface = made()
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": b" " * 5_000, "more_body": True}] * 50
    assert (await call(surface, messages), len(messages)) == (413, 48)
    assert len(balancer.directory) == 0


async def call(surface: Surface, messages: list[dict[str, Any]]) -> int:
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/register",
        "headers": [BEARER],
        "client": ("127.0.0.1", 1),
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await Application(surface)(scope, receive, send)
    return int(sent[0]["status"])


@contextmanager
def connected(place: Place) -> Generator[socket.socket]:
    assert isinstance(place.host, OnSocket)
    with socket.create_connection(("127.0.0.1", place.host.port), timeout=10) as client:
        yield client


# --- who may be what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254:8080",
        "192.168.0.1:3000",
        "8.8.8.8:3000",
        "[::1]:3000",
        "[fe80::1]:3000",
        "224.0.0.1:3000",
        "10.0.0.1:22",
        "10.0.0.1:25",
    ],
)
def test_an_address_that_is_not_allowed_is_refused(place: Place, address: str) -> None:
    """T13."""
    reply = place.register({**GOOD, "address": address})
    assert reply.status == 403, reply.body
    assert place.count(RegisterOutcome.FORBIDDEN) == 1
    assert len(place.directory) == 0


def test_the_metrics_port_is_limited_too(memory: Place) -> None:
    assert memory.register({**GOOD, "metrics_port": 22}).status == 403


def test_by_default_only_the_callers_own_address_and_not_loopback() -> None:
    settings = Settings(registration_access="open")
    for client, address, status in (
        ("10.0.1.5", "10.0.1.5", 201),
        ("10.0.1.5", "10.0.1.6", 403),
        ("127.0.0.1", "127.0.0.1", 403),
        ("fd00::5", "[fd00::5]", 201),
        ("::ffff:10.0.1.5", "10.0.1.5", 201),
        (None, "10.0.1.5", 403),
    ):
        _, surface = made(settings)
        body = json.dumps({**GOOD, "address": f"{address}:3000"}).encode()
        request = Request("POST", "/register", body=body, client=client)
        assert surface.respond(surface.answer(request)).status == status, (client, address)


@pytest.mark.parametrize("name", [b"x-forwarded-for", b"forwarded", b"x-real-ip", b"x-client-ip", b"cf-connecting-ip"])
def test_no_header_says_who_calls(name: bytes) -> None:
    """T9: with it, a caller would register any address as its own."""
    with served(Settings(registration_access="open")) as place:
        value = b"for=10.9.9.9" if name == b"forwarded" else b"10.9.9.9"
        assert place.register({**GOOD, "address": "10.9.9.9:3000"}, (name, value)).status == 403


def request_from(client: str, method: str = "POST", path: str = "/register", **fields: Any) -> Request:
    body = json.dumps({**GOOD, **fields}).encode() if method == "POST" else b""
    return Request(method, path, b"", (BEARER,), body, client)


def test_an_id_is_not_hijacked(caplog: pytest.LogCaptureFixture) -> None:
    """T12: same id, another address or another caller."""
    balancer, surface = made()

    def ask(client: str, method: str = "POST", path: str = "/register", **fields: Any) -> int:
        return surface.respond(surface.answer(request_from(client, method, path, **fields))).status

    assert ask("10.0.0.1", address="10.0.0.1:3000") == 201
    assert ask("10.0.0.2", address="10.0.0.2:3000") == 409
    assert ask("10.0.0.1", address="10.0.0.1:3001") == 409
    assert ask("10.0.0.2", address="10.0.0.1:3000") == 409
    assert ask("10.0.0.2", id="mine", address="10.0.0.1:3000") == 409
    assert ask("10.0.0.2", "DELETE", "/register/backend-1") == 409
    assert ask("10.0.0.1", address="10.0.0.1:3000") == 200
    (entry,) = balancer.directory.entries()
    assert str(entry.backend.address) == "10.0.0.1:3000"
    assert "backend-1 at 10.0.0.2:3000 is refused (announced 10.0.0.2)" in caplog.text


@pytest.mark.parametrize(
    "path",
    ["/register/", "/register/a/b", "/register/..%2f", "/register/a%20b", "/register/" + "x" * 200, "/registerx"],
)
def test_an_id_that_is_none_is_not_found(place: Place, path: str) -> None:
    assert place.host.ask("DELETE", path, (BEARER,)).status == 404


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/register", "POST"),
        ("PUT", "/register", "POST"),
        ("GET", "/register/x", "DELETE"),
        ("POST", "/backends", "GET, HEAD"),
    ],
)
def test_other_methods(place: Place, method: str, path: str, allow: str) -> None:
    reply = place.host.ask(method, path, (READER if path == "/backends" else BEARER,))
    assert (reply.status, reply.header("allow")) == (405, allow)


# --- floods -----------------------------------------------------------------------------------------------------------


def test_the_table_is_bounded() -> None:
    """T15."""
    settings = Settings(registration_access="open", allowed_networks=("10.0.0.0/8",), max_backends=3)
    _, surface = made(settings)

    def ask(number: int) -> Any:
        request = request_from(f"10.0.0.{number}", id=f"b-{number}", address=f"10.0.0.{number}:3000")
        return surface.respond(surface.answer(request))

    assert [ask(number).status for number in (1, 2, 3, 4, 1)] == [201, 201, 201, 507, 200]
    assert b"RKMETRICS_MAX_BACKENDS" in ask(4).body
    assert (b"retry-after", b"30") in ask(4).headers


def test_a_caller_that_floods_is_slowed_down_and_no_other() -> None:
    settings = Settings(registration_access="open", allowed_networks=("10.0.0.0/8",), registration_rate=1)
    balancer, surface = made(settings)

    def ask(client: str) -> Any:
        return surface.respond(surface.answer(request_from(client, id=client, address=f"{client}:3000")))

    assert [ask("10.0.0.1").status for _ in range(7)] == [201, 200, 200, 200, 200, 429, 429]
    assert [value for name, value in ask("10.0.0.1").headers if name == b"retry-after"] == [b"1"]
    assert ask("10.0.0.2").status == 201
    assert balancer.metrics.registrations[RegisterOutcome.LIMITED].value == 3


def test_a_flood_from_many_threads_leaves_the_table_whole() -> None:
    settings = Settings(registration_access="open", allowed_networks=("10.0.0.0/8",), max_backends=50)
    balancer, surface = made(settings)
    statuses: list[int] = []

    def flood(thread: int) -> None:
        for number in range(100):
            client = f"10.{thread}.0.{number}"
            request = request_from(client, id=f"b-{thread}-{number}", address=f"{client}:3000")
            statuses.append(surface.respond(surface.answer(request)).status)

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses.count(201) == len(balancer.directory) == 50
    assert statuses.count(507) == 350


# --- names ------------------------------------------------------------------------------------------------------------

IPAddress = IPv4Address | IPv6Address


class Resolver:
    """A resolver whose answers may change from one question to the next."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), 0

    def __call__(self, host: str) -> list[IPAddress]:
        self.asked += 1
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not found:
            raise OSError("no such name")
        return [ip_address(text) for text in found]


@pytest.mark.parametrize("host", sorted(HOSTS))
def test_a_name_is_looked_up_once_and_its_address_is_used(host: str) -> None:
    """T13, DNS rebinding: the first answer is checked, and no later one is ever asked for."""
    resolver = Resolver(["10.0.0.7"], ["169.254.169.254"])
    with HOSTS[host](resolve=resolver) as place:
        body = {**GOOD, "address": "backend-1.internal:3000"}
        assert place.register(body).status == 201
        assert place.register(body).status == 200
        assert resolver.asked == 1
        (entry,) = place.directory.entries()
        assert str(entry.backend.address) == "10.0.0.7:3000"
        assert str(entry.backend.metrics_address) == "10.0.0.7:9090"
        place.check("backend-1")
        assert place.get("/backends") == ["10.0.0.7:3000"]
        assert place.get("/backends?details=1")["backends"][0]["name"] == "backend-1.internal"


@pytest.mark.parametrize(
    "found", [["169.254.169.254"], ["10.0.0.7", "169.254.169.254"], ["10.0.0.7", "192.168.0.1"], ["::1"], []]
)
def test_a_name_with_any_address_that_is_not_allowed_is_refused(found: list[str]) -> None:
    with in_memory(resolve=Resolver(found)) as place:
        assert place.register({**GOOD, "address": "evil.example:3000"}).status == 403
        assert len(place.directory) == 0


def test_a_name_is_looked_up_again_when_its_backend_is_down() -> None:
    with in_memory(resolve=Resolver(["10.0.0.7"], ["10.0.0.8"])) as place:
        body = {**GOOD, "address": "backend-1.internal:3000"}
        place.register(body)
        for _ in range(2):
            place.check("backend-1", CheckOutcome.REFUSED)
        assert place.register(body).status == 201
        assert [str(entry.backend.address) for entry in place.directory.entries()] == ["10.0.0.8:3000"]


def test_look_ups_that_hang_are_bounded() -> None:
    gate = threading.Event()

    def hang(host: str) -> list[IPAddress]:
        gate.wait(30)
        return [ip_address("10.0.0.7")]

    with served(resolve=hang) as place:
        statuses: list[int] = []

        def ask(number: int) -> None:
            statuses.append(
                place.register({**GOOD, "id": f"b{number}", "address": f"n{number}.example:{3000 + number}"}).status
            )

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        while len(statuses) < 6:
            assert place.host.ask("GET", "/health").status == 200
        assert statuses == [429] * 6
        gate.set()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [201] * 4 + [429] * 6


# --- sources and settings ---------------------------------------------------------------------------------------------


def test_what_a_source_lists_goes_through_the_policy(caplog: pytest.LogCaptureFixture) -> None:
    balancer, _ = made()
    sink = balancer.sink
    assert sink.upsert(SourceName.ETCD, Backend.checked("a", "10.0.0.1:3000", 9090))
    assert not sink.upsert(SourceName.ETCD, Backend.checked("b", "169.254.169.254:3000", 9090))
    assert not sink.upsert(SourceName.ETCD, Backend.checked("c", "name.example:3000", 9090))
    assert "backend b from etcd is left out" in caplog.text
    sink.resync(
        SourceName.ETCD, [Backend.checked("d", "10.0.0.4:3000", 9090), Backend.checked("e", "127.0.0.1:22", 9090)]
    )
    assert [entry.backend.id for entry in balancer.directory.entries()] == ["d"]
    assert sink.withdraw(SourceName.ETCD, "d")


def test_static_backends() -> None:
    settings = Settings(static_backends=("10.0.1.5:3000/9090", "[fd00::5]:3000/9091"))
    assert [(each.id, each.metrics_port) for each in static_backends(settings)] == [
        ("static-10.0.1.5:3000", 9090),
        ("static-fd00::5:3000", 9091),
    ]
    balancer, _ = made(settings)
    assert balancer.directory.state("static-10.0.1.5:3000") is State.NEW


def test_the_policy_of_the_settings() -> None:
    policy = policy_of(Settings(allowed_networks=("10.0.0.0/8",), allowed_ports=("80", "3000-3010")))
    assert policy.ports == (range(80, 81), range(3000, 3011))
    policy.check(ip_address("10.0.0.1"), (80, 3010), None)
    with pytest.raises(rk.BackendError, match="80, 3000-3010"):
        policy.check(ip_address("10.0.0.1"), (3011,), None)


def test_the_token_of_checks_is_the_file_as_it_is(tmp_path: Any) -> None:
    assert token_of(Settings())() is None
    assert token_of(Settings(metrics_token=Secret("a")))() == Secret("a")
    file = tmp_path / "token"
    token = token_of(Settings(metrics_token_file=str(file)))
    assert token() is None
    file.write_text("new\nold\n")
    assert token() == Secret("new")
    file.unlink()
    assert token() == Secret("new")


async def test_a_source_runs_with_the_balancer() -> None:
    class Source:
        name = SourceName.ETCD
        ended = False

        async def run(self, sink: Any) -> None:
            sink.upsert(self.name, Backend.checked("a", "10.0.0.1:3000", 9090))
            try:
                await asyncio.Event().wait()
            finally:
                self.ended = True

    source = Source()
    async with Balancer(rk.Registry(SETTINGS, builtin=False), sources=[source]) as balancer:
        await asyncio.sleep(0.01)
        assert balancer.directory.state("a") is State.NEW
    assert source.ended


async def test_health_says_when_checks_do_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that nobody checks any more is worse than none."""
    registry = rk.Registry(SETTINGS, builtin=False)
    registry.health.start()
    async with Balancer(registry):
        assert registry.health.ready
        monkeypatch.setattr(registry.health.source("discovery checks", 10.0), "_last", -1e9)
        assert registry.health.status == rk.Status.STALE
    assert registry.health.ready
