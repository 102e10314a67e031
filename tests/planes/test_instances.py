"""Who serves what: a list, etcd's keys, and the lists of our load balancers; and what is never listed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.discovery.base import Backend
from rkmetrics.errors import BackendError, ServeError
from rkmetrics.planes.base import EndpointName, Instance, InstanceSource
from rkmetrics.planes.instances import (
    DirectoryInstances,
    Speaking,
    StaticInstances,
    _Keys,
    labels_of,
    place_of,
    stable_id,
)
from rkmetrics.planes.listing import DirectoryLister, refuse_unreachable
from rkmetrics.planes.memory import MemoryServer
from rkmetrics.planes.serving import Lister, PlaneServer
from rkmetrics.planes.tcp import TcpServer, read_target
from rkmetrics.settings import Secret, Settings
from tests.hostile import Behave, answering, response, serving, until

GENERATE = EndpointName("dynamo", "backend", "generate")
ID = 0x7D7BA1FBD0159306


class Heard:
    """What a source told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[Instance, ...]] = []

    def __call__(self, instances: tuple[Instance, ...]) -> None:
        self.told.append(instances)


@asynccontextmanager
async def following(source: InstanceSource, endpoint: EndpointName = GENERATE) -> AsyncGenerator[Heard]:
    heard = Heard()
    task = asyncio.create_task(source.follow(endpoint, heard))
    try:
        yield heard
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def registry(**more: Any) -> rk.Registry:
    return rk.Registry(Settings(**more), strict=True, builtin=False)


# --- a list -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "mode", "transport", "id"),
    [
        ("10.0.1.5:9999", "tcp", ("tcp", "10.0.1.5:9999/generate"), stable_id("10.0.1.5:9999")),
        ("10.0.1.5:9999/generate", "tcp", ("tcp", "10.0.1.5:9999/generate"), stable_id("10.0.1.5:9999")),
        (f"[fd00::5]:9999/{ID:x}/generate", "tcp", ("tcp", f"[fd00::5]:9999/{ID:x}/generate"), ID),
        ("node-1:8888", "http", ("http", "http://node-1:8888/v1/rpc/generate"), stable_id("node-1:8888")),
        (
            "http://node-1:8888/x/generate",
            "tcp",
            ("http", "http://node-1:8888/x/generate"),
            stable_id("node-1:8888"),
        ),
        (f"dynamo_backend.generate-{ID:x}", "nats", ("nats_tcp", f"dynamo_backend.generate-{ID:x}"), ID),
        ((42, "10.0.1.5:9999/generate"), "tcp", ("tcp", "10.0.1.5:9999/generate"), 42),
    ],
)
async def test_a_list_is_of_addresses_in_each_form(
    told: str | tuple[int, str], mode: str, transport: tuple[str, str], id: int
) -> None:
    async with following(StaticInstances([told], mode=mode)) as heard:
        await until(lambda: heard.told)
    assert heard.told == [(Instance(*GENERATE, id, transport),)]


def test_an_address_with_an_endpoint_is_asked_for_that_one_only() -> None:
    source = StaticInstances(["a:1/generate", "b:2", "http://c:3/v1/rpc/generate", f"dynamo_backend.generate-{ID:x}"])
    assert len(source.instances(GENERATE)) == 4
    assert [each.transport[1] for each in source.instances(GENERATE._replace(endpoint="load_metrics"))] == [
        "b:2/load_metrics"
    ]


def test_endpoints_of_one_address_have_one_id() -> None:
    source = StaticInstances(["a:1/generate", "a:1/load_metrics"])
    ids = {
        each.instance_id
        for name in ("generate", "load_metrics")
        for each in source.instances(GENERATE._replace(endpoint=name))
    }
    assert len(ids) == 1


@pytest.mark.parametrize(
    "told",
    [
        "", "host", "host:", ":1", "host:0", "host:65536", "host:x", "0.0.0.0:80", "[::]:80", "*:80", "host:1/",
        "host:1//generate", "host:1/xyz/generate", "host:1/1/2/generate", "http://host:1", "http://host/generate",
        "http://0.0.0.0:80/generate", "https://host:1/v1/rpc/generate",
        "host:1/gen\nerate", "höst:1/generate", "host:¹/generate",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_what_is(told: str) -> None:
    with pytest.raises(BackendError, match="host:port/endpoint"):
        StaticInstances([told])


@given(st.text(max_size=40))
def test_an_address_is_read_or_refused_and_nothing_else(text: str) -> None:
    try:
        found = StaticInstances([text]).instances(GENERATE)
    except BackendError:
        return
    for each in found:
        assert each.instance_id > 0
        assert each.transport[0] in ("tcp", "http", "nats_tcp")
        if each.transport[0] == "tcp":
            assert read_target(each.transport[1]).path.endswith("generate")


@given(st.text(), st.text())
def test_ids_of_names_are_stable_and_differ(one: str, other: str) -> None:
    try:
        number = stable_id(one)
    except UnicodeEncodeError:
        return
    assert 0 < number < 1 << 63
    assert number == stable_id(one)
    if one != other and other.isascii():
        assert number != stable_id(other)


def test_the_id_of_a_name_is_the_same_in_each_release() -> None:
    assert stable_id("backend-1") == 0x3CC7AB5FA1F0AAF2


# --- planes -----------------------------------------------------------------------------------------------------------


def test_each_other_plane_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    speaking = Speaking("tcp")
    instances = [
        Instance(*GENERATE, 1, ("tcp", "a:1/1/generate")),
        Instance(*GENERATE, 2, ("nats_tcp", "x")),
        Instance(*GENERATE, 3, ("http", "http://b:1/generate")),
        Instance(*GENERATE, 4, ("zmq", "?")),
    ]
    for _ in range(3):
        assert speaking(instances) == instances[:1]
    lines = [each.getMessage() for each in caplog.records]
    assert len(lines) == 3
    assert all("'tcp'" in line for line in lines)
    assert [plane for plane in ("'nats'", "'http'", "'zmq'") if any(plane in line for line in lines)] == [
        "'nats'",
        "'http'",
        "'zmq'",
    ]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("tcp", "a:1/ff/generate"),
        ("http", "http://a:1/v1/rpc/generate"),
        ("nats_tcp", "dynamo_backend.generate-ff"),
        ("memory", "ff/generate"),
    ],
)
def test_places_are_made_as_servers_list_them(kind: str, place: str) -> None:
    assert place_of(kind, "a:1", GENERATE, 255, "/v1/rpc") == place


# --- etcd's keys ------------------------------------------------------------------------------------------------------


async def test_keys_that_come_together_are_told_once_and_malformed_ones_are_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard, malformed = Heard(), list[int]()
    keys = _Keys(GENERATE, heard, lambda: malformed.append(1))
    instances = [Instance(*GENERATE, id, ("tcp", f"a:1/{id:x}/generate")) for id in (1, 2)]
    for each in instances:
        keys.on_put(each.key, each.encode())
    keys.on_put(f"{instances[0].key}0", b"no json")
    await asyncio.sleep(0)
    assert heard.told == []  # the list is not whole yet
    keys.on_list({})
    await asyncio.sleep(0)
    assert heard.told == [tuple(instances)]
    for _ in range(3):
        keys.on_put(instances[1].key, b"{}")  # it was one, and is none any more
    await asyncio.sleep(0)
    assert heard.told[1:] == [tuple(instances[:1])]
    keys.on_put(instances[1].key, instances[1].encode())
    keys.on_delete(instances[0].key)
    await asyncio.sleep(0)
    assert heard.told[2:] == [(instances[1],)]
    assert len(malformed) == 4
    assert [each.getMessage().count("is no instance") for each in caplog.records] == [1, 1]  # one for each key


async def test_that_there_is_nobody_is_told_too() -> None:
    heard = Heard()
    _Keys(GENERATE, heard, lambda: None).on_list({})
    await asyncio.sleep(0)
    assert heard.told == [()]


# --- our own discovery ------------------------------------------------------------------------------------------------


def backend(id: str, *, in_pool: bool = True, labels: dict[str, str] | None = None) -> dict[str, Any]:
    found = labels_of("tcp", [GENERATE]) if labels is None else labels
    return {"id": id, "address": "10.0.1.5:9999", "in_pool": in_pool, "labels": found, "state": "up", "more": 1}


def page(*backends: dict[str, Any]) -> bytes:
    return response("200 OK", json.dumps({"panic": False, "backends": backends}).encode())


def in_turn(*answers: bytes) -> Behave:
    """Give one answer to each connection, the last one for ever."""
    left = list(answers)

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answering(left.pop(0) if len(left) > 1 else left[0])(reader, writer)

    return behave


async def test_those_in_rotation_that_serve_it_are_told() -> None:
    other = labels_of("tcp", [GENERATE._replace(endpoint="other")])
    answer = page(
        backend("b-1"),
        backend("b-2", in_pool=False),
        backend("b-3", labels=other),
        backend("b-4", labels={}),
        backend("b-5", labels=labels_of("http", [GENERATE], "/v1/rpc")),
        backend("b-6", labels={"rpc": "pigeon", "rpc_0": str(GENERATE)}),
    )
    async with serving(answering(answer)) as peer, following(DirectoryInstances([peer.url])) as heard:
        await until(lambda: heard.told)
        one, five = stable_id("b-1"), stable_id("b-5")
        assert set(heard.told[0]) == {
            Instance(*GENERATE, one, ("tcp", f"10.0.1.5:9999/{one:x}/generate")),
            Instance(*GENERATE, five, ("http", "http://10.0.1.5:9999/v1/rpc/generate")),
        }
        assert b"GET /backends?details=1 " in peer.requests[0]


async def test_what_changes_is_told_and_what_does_not_is_not() -> None:
    answers = page(backend("b-1")), page(backend("b-1")), page(), page(backend("b-2"))
    async with serving(in_turn(*answers)) as peer:
        async with following(DirectoryInstances([peer.url], interval_seconds=0.001)) as heard:
            await until(lambda: len(heard.told) == 3)
    assert [[each.instance_id for each in told] for told in heard.told] == [[stable_id("b-1")], [], [stable_id("b-2")]]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (response("401 Unauthorized"), "METRICS_TOKEN of the balancer"),
        (response("500 Oops"), "status 500"),
        (response("200 OK", b"[]"), "not a list of backends"),
        (response("200 OK", b'{"backends":[{"id":1}]}'), "not a list of backends"),
    ],
)
async def test_a_balancer_that_does_not_answer_withdraws_nobody(
    answer: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(in_turn(page(backend("b-1")), answer)) as peer:
        async with following(DirectoryInstances([peer.url], interval_seconds=0.001)) as heard:
            await until(lambda: len(peer.requests) > 5)
    assert len(heard.told) == 1
    lines = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert said in lines[0]


async def test_the_next_balancer_is_asked_where_one_is_away_and_then_first() -> None:
    async with serving(answering(page(backend("b-1")))) as peer, serving(answering(response("503 Later"))) as away:
        source = DirectoryInstances([away.url, peer.url], interval_seconds=0.001, token=Secret("s3cret"))
        async with following(source) as heard:
            await until(lambda: len(peer.requests) > 3)
        assert len(heard.told) == 1
        assert len(away.requests) == 1
        assert b"authorization: Bearer s3cret" in peer.requests[0]


def test_a_directory_needs_a_balancer() -> None:
    with pytest.raises(BackendError, match="at least one URL"):
        DirectoryInstances([])


# --- being listed -----------------------------------------------------------------------------------------------------


async def nothing(_: Any) -> None:
    """A handler."""


class Announced:
    """Instead of an announcer."""

    def __init__(self) -> None:
        self.backends: list[Backend] = []

    @asynccontextmanager
    async def announce(self, backend: Backend) -> AsyncGenerator[None]:
        self.backends.append(backend)
        try:
            yield
        finally:
            self.backends.remove(backend)


async def test_a_server_is_a_backend_that_says_what_it_serves() -> None:
    announced = Announced()
    lister = DirectoryLister("b-1", 9090, announced.announce)
    server = TcpServer(registry(tcp_rpc_host="127.0.0.1"), instance_id=1, lister=lister)
    server.endpoint("backend.generate", nothing)
    server.endpoint("other.backend.stats", nothing)
    async with server:
        await until(lambda: announced.backends)
        found = announced.backends[0]
        assert (found.id, str(found.address), found.metrics_port) == ("b-1", server.address, 9090)
        assert dict(found.labels) == {
            "rpc": "tcp",
            "rpc_0": "dynamo.backend.generate",
            "rpc_1": "other.backend.stats",
        }
        assert server.instance_id == stable_id("b-1")
        listed = DirectoryInstances(["http://x"])._instances(  # pyright: ignore[reportPrivateUsage]
            _page(found), GENERATE
        )
        assert listed == tuple(server.instances())[:1]
    assert announced.backends == []


def _page(backend: Backend) -> Any:
    from rkmetrics.planes.instances import _Backend, _Page

    return _Page([_Backend(backend.id, str(backend.address), True, dict(backend.labels))])


async def test_a_plane_without_addresses_is_listed_with_that_of_its_metrics() -> None:
    lister = DirectoryLister("b-1", 9090, Announced().announce, address="10.0.1.5:9090")
    server = MemoryServer(registry(), instance_id=1, lister=lister)
    server.endpoint("backend.generate", nothing)
    async with server:
        assert str(lister.backend(server).address) == "10.0.1.5:9090"


async def test_too_many_endpoints_are_refused_before_the_server_runs() -> None:
    server = TcpServer(
        registry(tcp_rpc_host="127.0.0.1"), instance_id=1, lister=DirectoryLister("b-1", 9090, Announced().announce)
    )
    for number in range(13):
        server.endpoint(f"backend.e{number}", nothing)
    with pytest.raises(BackendError, match="at most 12"):
        await server.start()
    assert not server.started
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*server.address.split(":"))


@pytest.mark.parametrize(
    "transport",
    [
        ("tcp", "0.0.0.0:9999/1/generate"), ("tcp", "[::]:9999/1/generate"), ("tcp", "10.0.1.5:0/1/generate"),
        ("http", "http://0.0.0.0:8888/v1/rpc/generate"), ("http", "http://a:0/v1/rpc/generate"), ("tcp", ":1/generate"),
    ],
)  # fmt: skip
def test_what_nobody_can_reach_is_never_listed(transport: tuple[str, str]) -> None:
    with pytest.raises(ServeError, match="where nobody reaches it"):
        refuse_unreachable(Instance(*GENERATE, 1, transport))


@pytest.mark.parametrize(
    "transport", [("tcp", "10.0.1.5:9999/1/generate"), ("nats_tcp", "a_b.c-1"), ("http", "http://[::1]:1/generate")]
)
def test_the_rest_is(transport: tuple[str, str]) -> None:
    found = Instance(*GENERATE, 1, transport)
    assert refuse_unreachable(found) is found


async def test_a_lister_that_fails_is_told_of_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Lister):
        async def run(self, server: PlaneServer) -> None:
            raise KeyError("why")

    server = MemoryServer(registry(), instance_id=1, lister=Broken())
    server.endpoint("backend.generate", nothing)
    async with server:
        await until(lambda: caplog.records)
        assert server.started
    assert "listed no more, and goes on: KeyError('why')" in caplog.text
