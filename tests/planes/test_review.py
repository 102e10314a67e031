"""What a review of servers, clients and routers found; each of these failed before."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.planes import CallOutcome, InstanceState, IntakeRefusal, Plane, RpcIntake
from rkmetrics.errors import BackendError, RpcError, RpcRefusedError, RpcUnreachableError, ServeError
from rkmetrics.kv.aggregator import KvMetricsAggregator
from rkmetrics.planes import listening, tracing
from rkmetrics.planes.base import EndpointName, Instance, InstanceListener, InstanceSource
from rkmetrics.planes.http import HttpServer
from rkmetrics.planes.instances import BAD_SAID, _Keys
from rkmetrics.planes.listing import DirectoryLister
from rkmetrics.planes.memory import MemoryClient
from rkmetrics.planes.polling import PlanePoller
from rkmetrics.planes.router import PushRouter
from tests.hostile import answering, response, serving, until

GENERATE = EndpointName("dynamo", "backend", "generate")
SETTINGS: dict[str, Any] = {"tcp_rpc_host": "127.0.0.1", "http_rpc_host": "127.0.0.1", "http_rpc_port": 0}


def registry(**settings: Any) -> rk.Registry:
    return rk.Registry(rk.Settings(**SETTINGS | settings), strict=True, builtin=False)


async def echo(request: Any) -> Any:
    return request


class Told(InstanceSource):
    """A source that is told what to tell."""

    def __init__(self, *instances: Instance) -> None:
        self.now = instances
        self.listeners: list[InstanceListener] = []

    async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
        self.listeners.append(listener)
        listener(self.now)
        await asyncio.Event().wait()

    def tell(self, *instances: Instance) -> None:
        for listener in self.listeners:
            listener(instances)


def at(kind: str, place: str, id: int = 1) -> Instance:
    return Instance(*GENERATE, id, (kind, place))


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "listed", [{"etcd_endpoints": ("http://e:2379",)}, {"load_balancers": ("http://b:8080",)}, {}], ids=str
)
def test_a_composed_server_leaves_as_slowly_as_its_callers_hear_of_it(listed: dict[str, Any]) -> None:
    lister: Any = rk.rpc.server(registry(**listed))._lister  # pyright: ignore[reportPrivateUsage]
    assert lister.heard_seconds == lister._lister.heard_seconds
    assert (lister.heard_seconds > 0) is bool(listed)


@asynccontextmanager
async def announced(_: Any) -> AsyncGenerator[None]:
    yield


async def test_a_server_that_was_renumbered_keeps_the_number_it_began_with() -> None:
    """At a balancer its backend has that in its name: a second server would be announced as the first."""
    made = registry()
    first = rk.rpc.server(made, lister=DirectoryLister("b-1", 9090, announced))
    first.endpoint("backend.generate", echo)
    number = first.instance_id
    async with first:
        assert first.instance_id != number
        assert rk.rpc.server(made).instance_id not in (number, first.instance_id)


@pytest.mark.parametrize("turns", range(6))
async def test_a_connection_that_comes_as_an_http_server_leaves_ends(turns: int) -> None:
    server = HttpServer(registry(), instance_id=1)
    server.endpoint("backend.generate", echo)
    await server.start()
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port))) as caller:
        for _ in range(turns):
            await asyncio.sleep(0)
        server._drain()  # pyright: ignore[reportPrivateUsage]
        assert await server.stop(1)
        caller.settimeout(30)  # for bugs only
        with suppress(ConnectionResetError):  # it was not accepted, or had to go at once
            assert caller.recv(1) == b""


async def test_an_http_server_whose_address_is_nobodys_keeps_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: Any) -> str:
        raise BackendError("address", "", "one")

    monkeypatch.setattr(listening, "reachable", nowhere)
    server = HttpServer(registry(http_rpc_host="0.0.0.0"), instance_id=1)
    server.endpoint("backend.generate", echo)
    with pytest.raises(BackendError):
        await server.start()
    assert not server._server.is_serving()  # pyright: ignore[reportPrivateUsage]


async def test_a_host_that_no_look_up_takes_is_a_clear_error_over_http_too() -> None:
    server = HttpServer(registry(http_rpc_host="a..b"), instance_id=1)
    server.endpoint("backend.generate", echo)
    with pytest.raises(ServeError, match="DYN_HTTP_RPC_HOST"):
        await server.start()


async def test_a_probe_over_http_is_no_refused_request() -> None:
    made = registry()
    server = rk.rpc.server(made, mode="http")
    server.endpoint("backend.generate", echo)
    async with server, rk.rpc.client(made, mode="http") as client:
        assert await client.probe(next(iter(server.instances())))
    refused = made.bind(RpcIntake).refused
    assert [refused[Plane.HTTP, reason].value for reason in IntakeRefusal] == [0] * len(IntakeRefusal)


# --- clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "place"), [("tcp", "a..b:80/1/generate"), ("http", "http://a..b:80/generate")])
async def test_a_name_that_no_look_up_takes_is_not_reached_at_once(mode: str, place: str) -> None:
    async with rk.rpc.client(registry(), mode=mode) as client:
        with pytest.raises(RpcUnreachableError, match="no connection") as caught:
            await client.call(at(mode, place), 1)
        assert not caught.value.delivered
        assert await client.probe(at(mode, place)) is False


@pytest.mark.parametrize(("status", "delivered"), [(502, True), (504, True), (503, False), (429, False)])
async def test_a_proxy_that_lost_its_server_says_nothing_of_the_request(status: int, delivered: bool) -> None:
    async with (
        serving(answering(response(f"{status} Whatever", b"<html>"))) as proxy,
        rk.rpc.client(registry(), mode="http") as client,
    ):
        with pytest.raises(RpcError) as caught:
            await client.call(at("http", f"{proxy.url}/v1/rpc/generate"), 1)
        assert (caught.value.delivered, f"(status {status})" in caught.value.reason) == (delivered, True)


FORKED = """
import asyncio, os, sys
import rkmetrics as rk

async def echo(request):
    return request

def sockets():
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.lexists(link) and os.readlink(link).startswith("socket:") for link in links)

async def main():
    settings = rk.Settings(http_rpc_host="127.0.0.1", http_rpc_port=0, http2_prior_knowledge=sys.argv[1] == "2")
    registry = rk.Registry(settings, builtin=False)
    server = rk.rpc.server(registry, mode="http")
    server.endpoint("backend.echo", echo)
    async with server, rk.rpc.client(registry, mode="http") as client:
        assert await (await client.call(next(iter(server.instances())), 1)).one() == 1
        pid = os.fork()
        if not pid:
            held = sockets()
            print(held, flush=True)
            os._exit(held > 2)  # the loop's own pair
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
@pytest.mark.parametrize("version", ["1", "2"])
def test_a_forked_child_holds_no_connection_of_an_http_client(version: str) -> None:
    pytest.importorskip("h2")
    done = subprocess.run([sys.executable, "-c", FORKED, version], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


class Unspeakable(Exception):
    """Cannot be written out."""

    def __str__(self) -> str:
        raise RuntimeError("no")


def test_what_a_handler_raised_comes_out_of_its_span_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry import trace

    monkeypatch.setattr(trace, "get_tracer", sdk.TracerProvider().get_tracer)
    with pytest.raises(Unspeakable), tracing.server_span("a.b.c", "tcp", ""):
        raise Unspeakable


# --- routers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["tcp", "http", "memory"])
async def test_a_request_that_is_too_large_takes_nobody_out(mode: str) -> None:
    made = registry(tcp_max_message_size_bytes=100_000)
    server = rk.rpc.server(made, mode=mode)
    server.endpoint("backend.generate", echo)
    async with (
        server,
        rk.rpc.client(made, mode=mode) as client,
        rk.rpc.router(client, "backend.generate", instances=server.instances()) as router,
    ):
        with pytest.raises(RpcRefusedError, match="too large"):
            await router.generate("x" * 200_000)
        assert list(router.states().values()) == [InstanceState.UP]


async def test_a_proxy_that_finds_a_request_too_large_is_not_out() -> None:
    async with MemoryClient(registry()) as client, PushRouter(client, Told(), GENERATE) as router:
        large = RpcRefusedError("e", "<h1>413 Request Entity Too Large</h1> (status 413)")
        assert not router._is_down(large, 0)  # pyright: ignore[reportPrivateUsage]


class Slow(MemoryClient):
    """Its calls fail when a test says so, and its probes."""

    def __init__(self, made: rk.Registry) -> None:
        super().__init__(made)
        self.go, self.asked, self.options, self.probed = asyncio.Event(), list[int](), list[Any](), 0

    async def call(self, instance: Instance, request: Any, **options: Any) -> Any:
        self.asked.append(instance.instance_id)
        self.options.append(options)
        await self.go.wait()
        raise RpcUnreachableError("e", f"no connection to {instance.instance_id}")

    async def probe(self, instance: Instance) -> bool:
        self.probed += 1
        if self.probed < 3:
            raise KeyError(self.probed)
        return True


async def test_a_call_that_fails_while_its_router_ends_leaves_no_probe_behind() -> None:
    client = Slow(registry())

    @asynccontextmanager
    async def part() -> AsyncGenerator[None]:
        yield
        client.go.set()
        await asyncio.gather(calling, return_exceptions=True)

    async with PushRouter(client, Told(at("memory", "1/generate")), GENERATE, parts=[part()]) as router:
        calling = asyncio.create_task(router.generate({}))
        await until(lambda: client.asked)
    assert isinstance(calling.exception(), RpcError)
    assert [each for each in asyncio.all_tasks() if "probe" in each.get_name()] == []


async def test_a_probe_that_raises_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    client = Slow(registry())
    client.go.set()
    async with PushRouter(client, Told(at("memory", "1/generate")), GENERATE) as router:
        with pytest.raises(RpcUnreachableError):
            await router.generate({})
        assert list(router.states().values()) == [InstanceState.DOWN]
        await until(lambda: list(router.states().values()) == [InstanceState.UP])
    assert "a probe failed: KeyError(1)" in caplog.text


async def test_who_came_while_a_call_failed_is_asked() -> None:
    client, source = Slow(registry()), Told(at("memory", "1/generate"))
    async with PushRouter(client, source, GENERATE) as router:
        calling = asyncio.create_task(router.generate({}))
        await until(lambda: client.asked)
        source.tell(at("memory", "2/generate", 2))
        client.go.set()
        with pytest.raises(RpcUnreachableError, match="to 2"):
            await calling
    assert client.asked == [1, 2]


class Breaking(MemoryClient):
    """Its answers begin, and break off."""

    async def call(self, instance: Instance, request: Any, **options: Any) -> Any:
        class Broken:
            def when_over(self, tell: Any) -> None:
                tell(CallOutcome.CLOSED if request == "break" else CallOutcome.OK)

        return Broken()


async def test_who_breaks_its_answers_off_is_asked_less_and_less() -> None:
    client = Breaking(registry())
    async with PushRouter(client, Told(at("memory", "1/generate")), GENERATE) as router:
        await router.wait_for_instances(30)
        (member,) = router._members.values()  # pyright: ignore[reportPrivateUsage]
        pauses = list[int]()
        for _ in range(4):
            await router.generate("break")
            assert member.probing is not None
            router._came_up(member)  # pyright: ignore[reportPrivateUsage]
            member.backoff.next()  # as its probe did
            pauses.append(member.backoff._tries)  # pyright: ignore[reportPrivateUsage]
        assert pauses == [1, 2, 3, 4]
        await router.generate("work")
        assert member.backoff._tries == 0  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("how", "more"), [("generate", {}), ("direct", {"instance_id": 1}), ("kv", {"tokens": ()})], ids=str
)
async def test_the_wait_for_a_source_is_part_of_the_calls_time(how: str, more: dict[str, Any]) -> None:
    client, waiting = Slow(registry()), list[InstanceListener]()
    client.go.set()

    class Late(InstanceSource):
        async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
            waiting.append(listener)
            await asyncio.Event().wait()

    async with PushRouter(client, Late(), GENERATE) as router:
        calling = asyncio.create_task(getattr(router, how)({}, timeout_seconds=100, **more))
        await until(lambda: waiting)
        await asyncio.sleep(0.02)
        waiting[0]((at("memory", "1/generate"),))
        with pytest.raises(RpcUnreachableError):
            await calling
    assert 0 < client.options[0]["timeout_seconds"] <= 99.99


class Failing(InstanceSource):
    """A source with a bug."""

    def __init__(self) -> None:
        self.turns = 0

    async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
        self.turns += 1
        if self.turns < 4:
            raise KeyError("no")
        listener((at("memory", "1/generate"),))
        await asyncio.Event().wait()


async def test_a_source_that_fails_leaves_no_poller_deaf_and_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        MemoryClient(registry()) as client,
        PlanePoller(client, Failing(), GENERATE, KvMetricsAggregator(), interval_seconds=100) as poller,
    ):
        await until(lambda: poller.instances)
    assert [each.exc_info is not None for each in caplog.records if "source" in each.message] == [True]


# --- etcd's values ----------------------------------------------------------------------------------------------------


def _others() -> Iterable[Instance]:
    yield Instance("dynamo", "backend", "generate/x", 1, ("tcp", "a:1/1/x"))
    yield Instance("dynamo/backend/generate", "x", "y", 1, ("tcp", "a:1/1/y"))
    yield at("tcp", "a:1/1/x\nERROR all is lost")
    yield at("tcp", f"a:1/1/{'x' * 1_000_000}")
    yield at("x" * 1_000_000, "a:1/1/x")


@pytest.mark.parametrize("instance", list(_others()), ids=lambda each: repr(each)[:60])
async def test_what_only_looks_like_an_instance_of_the_endpoint_is_passed_over(
    instance: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    told, malformed = list[tuple[Instance, ...]](), list[int]()

    def hear(instances: tuple[Instance, ...]) -> None:
        told.append(instances)

    keys = _Keys(GENERATE, hear, lambda: malformed.append(1))
    keys.on_put(instance.key, instance.encode())
    keys.on_list({})
    await asyncio.sleep(0)
    assert (told, malformed) == ([()], [1])
    assert len(caplog.records) == 1
    assert len(caplog.text) < 1_000
    assert "\nERROR" not in caplog.text


async def test_many_bad_keys_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    malformed = list[int]()
    keys = _Keys(GENERATE, lambda instances: None, lambda: malformed.append(1))
    for number in range(5_000):
        keys.on_put(f"v1/instances/dynamo/backend/generate/{number:x}", b"{}")
    assert len(malformed) == 5_000
    assert len(caplog.records) < BAD_SAID + 20
