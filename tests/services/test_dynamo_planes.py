"""The request planes beside NVIDIA Dynamo's own runtime: its clients call our servers, our clients its workers.

RKMETRICS_DYNAMO_PYTHON names interpreters that have `ai-dynamo-runtime`, several as in PATH: 0.7.1, 0.8.1.post3 and
0.9.1. A test's name says which version it ran with, and over which plane. 0.8 and later need no NATS for tcp and http;
nats with them needs a nats-server of 2.10. What is seen is written down in docs/interop.md.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import pytest_asyncio

import rkmetrics as rk
from rkmetrics.errors import RpcClosedError, RpcError, RpcRefusedError, RpcUnreachableError
from rkmetrics.etcd.client import Etcd
from rkmetrics.kv.plane import KvPlane
from rkmetrics.planes import client_class, server_class
from rkmetrics.planes.base import EndpointName, Instance
from rkmetrics.planes.calling import PlaneClient
from rkmetrics.planes.instances import EtcdInstances
from rkmetrics.planes.listing import EtcdLister
from rkmetrics.planes.router import PushRouter
from rkmetrics.planes.serving import PlaneServer
from tests.services.dynamo_handlers import NAMES, Handlers
from tests.services.etcd_server import EtcdServer
from tests.services.kv import counted, metrics, until
from tests.services.nats_server import NatsServer, free_port
from tests.services.real_dynamo import RELEASES, VARIABLE, Peer, interpreters, missing, settles

PEER = Path(__file__).with_name("dynamo_rpc_peer.py")
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
MEBIBYTE = 1 << 20

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not os.environ.get(VARIABLE), reason=missing("0.7")),
]


class Run(NamedTuple):
    """What one process of Dynamo is started as."""

    release: str
    plane: str

    def __str__(self) -> str:
        found = interpreters().get(self.release)
        return f"{found.version if found else RELEASES[self.release]}-{self.plane}"


RUNS = [
    *(Run("0.7", plane) for plane in ("tcp", "http", "nats")),
    *(Run(release, plane) for release in ("0.8", "0.9") for plane in ("tcp", "http")),
]
TCP_RUNS = [run for run in RUNS if run.plane == "tcp"]

# Where the real side continues a trace, as client and as worker (docs/interop.md).
TRACES_AS_CLIENT = {*RUNS} - {Run("0.7", "tcp")}
TRACES_AS_WORKER = {Run("0.7", "nats"), Run("0.8", "tcp"), Run("0.9", "tcp")}


# --- the other side ---------------------------------------------------------------------------------------------------


class Theirs:
    """A process of Dynamo that has joined a namespace and serves all handlers as the component "theirs"."""

    def __init__(self, run: Run, namespace: str, peer: Peer, worker_id: int) -> None:
        self.run, self.namespace, self.peer, self.worker_id = run, namespace, peer, worker_id


_namespaces, _components = count(), count()


async def started(run: Run, request: pytest.FixtureRequest, folder: Path, namespace: str = "") -> Theirs:
    """Start one; its ports are its own, as 0.7 cannot take whatever is free."""
    etcd: EtcdServer = request.getfixturevalue("etcd_server")
    environment = {
        "ETCD_ENDPOINTS": etcd.url,
        "DYN_REQUEST_PLANE": run.plane,
        "DYN_LOG": "info",
        "DYN_LOGGING_JSONL": "1",  # without it no trace is sent
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_HTTP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RPC_PORT": str(free_port()),
        "DYN_HTTP_RPC_PORT": str(free_port()),
    }
    if run.release == "0.7" or run.plane == "nats":
        environment["NATS_SERVER"] = request.getfixturevalue("nats_server").url
    namespace = namespace or f"interop{next(_namespaces)}"
    peer = await Peer.start(run.release, PEER, folder / f"{run}-{namespace}.log", environment)
    await peer.ask("join", namespace=namespace, plane=run.plane)
    return Theirs(run, namespace, peer, await peer.ask("serve", component="theirs"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=RUNS, ids=str)
async def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Theirs]:
    """One for all tests that do it no harm."""
    made = await started(request.param, request, tmp_path_factory.mktemp("dynamo"))
    yield made
    await made.peer.end()


class Ours:
    """Our servers and clients in a namespace of theirs, listed in the same etcd."""

    def __init__(self, theirs: Theirs, etcd: EtcdServer, nats: NatsServer | None) -> None:
        self.theirs, self.plane, self.handlers = theirs, theirs.run.plane, Handlers()
        #: New each time: for a moment a client of theirs goes on to ask what it lists no more.
        self.component = f"ours{next(_components)}"
        self._nats = nats
        self.etcd = Etcd([etcd.url])
        self.source = EtcdInstances(self.etcd)
        self._closers: list[Callable[[], Any]] = []

    def registry(self, wire: str = "", **more: Any) -> rk.Registry:
        nats = None if self._nats is None else self._nats.url
        settings = rk.Settings(
            request_plane=self.plane,  # type: ignore[arg-type]
            wire=wire or self.theirs.run.release,  # type: ignore[arg-type]
            namespace=self.theirs.namespace,
            tcp_rpc_host="127.0.0.1",
            http_rpc_host="127.0.0.1",
            http_rpc_port=0,
            nats_server=nats,
            kv_plane="off",
            **more,
        )
        return rk.Registry(settings, strict=True, builtin=False)

    async def serve(
        self,
        registry: rk.Registry | None = None,
        serves: Callable[[PlaneServer, str], None] | None = None,
        component: str = "",
        **options: Any,
    ) -> PlaneServer:
        """Serve, and return once a real client sees it. serves: what adds the endpoints, by default all of Handlers."""
        registry, lister, component = registry or self.registry(), EtcdLister(self.etcd), component or self.component
        id = KvPlane.of(registry).worker_id
        server = server_class(self.plane)(registry, instance_id=id, lister=lister, **options)
        (serves or self._serve_handlers)(server, component)
        await server.start()
        self._closers.append(server.stop)
        await until(lambda: lister.listed)
        for served in server.endpoints:
            if served.namespace == self.theirs.namespace:
                await self.seen_by_theirs(served, server.instance_id)
        return server

    def _serve_handlers(self, server: PlaneServer, component: str) -> None:
        for name in NAMES:
            server.endpoint(f"{component}.{name}", getattr(self.handlers, name))

    async def seen_by_theirs(self, name: EndpointName, instance_id: int) -> None:
        async def sees() -> bool:
            ids = await self.theirs.peer.ask("instance_ids", endpoint=f"{name.component}.{name.endpoint}")
            return instance_id in ids

        await settles(sees, True)

    async def called(self, endpoint: str, request: Any, **options: Any) -> dict[str, Any]:
        """What a client of theirs gets from our server."""
        found: dict[str, Any] = await self.theirs.peer.ask(
            "call", endpoint=f"{self.component}.{endpoint}", request=request, **options
        )
        return found

    async def begin(self, endpoint: str, request: Any) -> None:
        """Have a client of theirs begin a call of our server."""
        await self.theirs.peer.ask("begin", endpoint=f"{self.component}.{endpoint}", request=request)

    async def client(self) -> PlaneClient:
        made: Callable[[rk.Registry], PlaneClient] = client_class(self.plane)
        client = made(self.registry())
        await client.start()
        self._closers.append(client.close)
        return client

    async def instances(
        self, endpoint: str, wanted: Callable[[tuple[Instance, ...]], bool] = bool
    ) -> tuple[Instance, ...]:
        """Who serves an endpoint, once that is as wanted."""
        found = asyncio.get_running_loop().create_future()

        def told(instances: tuple[Instance, ...]) -> None:
            if wanted(instances) and not found.done():
                found.set_result(instances)

        following = asyncio.create_task(self.source.follow(EndpointName.parse(endpoint, self.theirs.namespace), told))
        try:
            async with asyncio.timeout(60):
                return tuple(await found)
        finally:
            following.cancel()
            await asyncio.wait([following])

    async def close(self) -> None:
        for close in reversed(self._closers):
            await close()


@pytest_asyncio.fixture(loop_scope="module")
async def ours(theirs: Theirs, etcd_server: EtcdServer, request: pytest.FixtureRequest) -> AsyncIterator[Ours]:
    nats = request.getfixturevalue("nats_server") if theirs.run.plane == "nats" else None
    made = Ours(theirs, etcd_server, nats)
    yield made
    await made.close()


# --- who asks whom ----------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came of a call. error: "" where it ended in order."""

    items: list[Any]
    error: str


class Asking(Protocol):
    """One direction: somebody's client, and the component that the other side serves."""

    async def call(self, endpoint: str, request: Any, **options: int) -> Outcome:
        """options: stop_after, drop_after so many items."""
        ...

    async def seen(self) -> list[dict[str, Any]]:
        """How `forever` ended at the worker."""
        ...


class TheyAskUs:
    """A client of Dynamo, our server."""

    def __init__(self, ours: Ours, server: PlaneServer) -> None:
        self._ours, self.server = ours, server

    async def call(self, endpoint: str, request: Any, **options: int) -> Outcome:
        found = await self._ours.called(endpoint, request, **options)
        return Outcome(found["items"], found["error"] or "")

    async def seen(self) -> list[dict[str, Any]]:
        found, self._ours.handlers.seen = self._ours.handlers.seen, []
        return found


class WeAskThem:
    """Our client, a worker of Dynamo."""

    def __init__(self, ours: Ours, client: PlaneClient, instances: dict[str, Instance]) -> None:
        self._peer, self.client, self.instances = ours.theirs.peer, client, instances

    async def call(self, endpoint: str, request: Any, **options: int) -> Outcome:
        return await outcome(self.client, self.instances[endpoint], request, **options)

    async def seen(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self._peer.ask("seen")
        return found


async def outcome(
    client: PlaneClient, instance: Instance, request: Any, stop_after: int = 0, drop_after: int = 0, **options: Any
) -> Outcome:
    items: list[Any] = []
    try:
        async with asyncio.timeout(60), await client.call(instance, request, **options) as response:
            async for item in response:
                items.append(item)
                if len(items) == stop_after:
                    response.stop()
                if len(items) == drop_after:
                    break
    except RpcError as error:
        return Outcome(items, f"{type(error).__name__}: {error.reason}")
    return Outcome(items, "")


async def they_ask_us(ours: Ours) -> Asking:
    return TheyAskUs(ours, await ours.serve())


async def we_ask_them(ours: Ours) -> Asking:
    instances = {name: (await ours.instances(f"theirs.{name}"))[0] for name in NAMES}
    return WeAskThem(ours, await ours.client(), instances)


@pytest_asyncio.fixture(loop_scope="module", params=[they_ask_us, we_ask_them], ids=lambda made: str(made.__name__))
async def asking(request: pytest.FixtureRequest, ours: Ours) -> Asking:
    made: Asking = await request.param(ours)
    return made


# --- the same in both directions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [{"a": [1, 2.5, None, "ü"]}, None, "", 7, [], {"n": 2**64 - 1}])
async def test_one_item(asking: Asking, request_: Any) -> None:
    assert await asking.call("echo", request_) == Outcome([request_], "")


@pytest.mark.parametrize("number", [0, 1, 100])
async def test_a_stream(asking: Asking, number: int) -> None:
    expected = [{"i": i, "fill": ""} for i in range(number)]
    assert await asking.call("count", {"n": number}) == Outcome(expected, "")


async def test_a_big_request(asking: Asking, theirs: Theirs) -> None:
    """NATS takes messages of up to 1 MiB, where nobody says more."""
    big = {"text": "x" * (MEBIBYTE - 2_000 if theirs.run.plane == "nats" else MEBIBYTE)}
    assert await asking.call("echo", big) == Outcome([big], "")


async def test_a_request_of_four_mebibytes(asking: Asking, theirs: Theirs) -> None:
    """Over http their workers take 2 MiB and no more."""
    big = {"text": "x" * (4 * MEBIBYTE)}
    found = await asking.call("echo", big)
    refused = {"nats": "NATS", "http": "413" if isinstance(asking, WeAskThem) else ""}.get(theirs.run.plane, "")
    if refused:
        assert found.items == []
        assert refused in found.error
    else:
        assert found == Outcome([big], "")


async def test_big_items(asking: Asking) -> None:
    expected = [{"i": i, "fill": "x" * MEBIBYTE} for i in range(8)]
    assert await asking.call("count", {"n": 8, "size": MEBIBYTE}) == Outcome(expected, "")


@pytest.mark.parametrize(("endpoint", "items"), [("first", []), ("middle", [{"i": 0}])])
async def test_a_handler_that_raises(asking: Asking, endpoint: str, items: list[Any]) -> None:
    found = await asking.call(endpoint, {})
    assert found.items == items
    assert f"ValueError: no {endpoint}" in found.error
    assert (await asking.call("echo", 1)).items == [1]


async def ends(asking: Asking) -> dict[str, Any]:
    """How `forever` ended."""
    seen: list[dict[str, Any]] = []
    async with asyncio.timeout(60):
        while not seen:
            seen = await asking.seen()
            await asyncio.sleep(0.01)
    assert len(seen) == 1
    return seen[0]


async def test_a_caller_that_wants_no_more(asking: Asking) -> None:
    found = await asking.call("forever", {}, stop_after=5)
    assert not found.error
    assert [item["i"] for item in found.items] == list(range(len(found.items)))
    assert len(found.items) >= 5
    assert (await ends(asking))["how"] == "stopped"


async def test_a_caller_that_is_gone(asking: Asking) -> None:
    found = await asking.call("forever", {}, drop_after=5)
    assert found == Outcome([{"i": i} for i in range(5)], "")
    expected = {"killed", "stopped"} if isinstance(asking, WeAskThem) else {"CancelledError", "GeneratorExit"}
    assert (await ends(asking))["how"] in expected


async def test_fifty_at_once(asking: Asking, ours: Ours) -> None:
    expected = [[{"caller": i}] for i in range(50)]
    for _ in range(3):
        if isinstance(asking, WeAskThem):
            found = await asyncio.gather(*(asking.call("echo", {"caller": i}) for i in range(50)))
            assert [each.items for each in found] == expected
        else:
            assert await ours.theirs.peer.ask("calls", endpoint=f"{ours.component}.echo", number=50) == expected


# --- their client, our server -----------------------------------------------------------------------------------------


async def test_their_client_lists_our_instance_and_loses_it_when_it_drains(ours: Ours) -> None:
    """What it asked for before that still ends whole."""
    server = await ours.serve()
    peer = ours.theirs.peer
    assert await peer.ask("instance_ids", endpoint=f"{ours.component}.echo") == [server.instance_id]
    (listed,) = await ours.instances(f"{ours.component}.echo")
    assert listed in server.instances()
    assert listed.instance_id == server.instance_id
    await ours.begin("slow", {"n": 10, "seconds": 0.1})
    await until(lambda: counted(server.registry, "rkmetrics_rpc_server_requests_in_flight") == 1)
    stopping = asyncio.create_task(server.stop())
    await settles(lambda: peer.ask("instance_ids", endpoint=f"{ours.component}.echo"), [])
    refused = await ours.called("echo", 1, patience=0)
    assert "no instances found" in refused["error"]
    assert await peer.ask("result") == {"items": [{"i": i} for i in range(10)], "error": None}
    assert await stopping


async def test_their_client_loses_no_call_while_one_of_our_workers_after_the_other_drains(ours: Ours) -> None:
    """As in a deployment: a new worker comes before an old one goes."""
    peer, endpoint = ours.theirs.peer, f"{ours.component}.echo"
    server = await ours.serve()
    await ours.called("echo", 1)
    await peer.ask("load", endpoint=endpoint, at_once=8)
    for _ in range(4):
        following = await ours.serve()
        served = counted(following.registry, "rkmetrics_rpc_server_requests_total")
        await until(lambda: counted(following.registry, "rkmetrics_rpc_server_requests_total") > served + 20)  # noqa: B023
        assert await server.stop()
        server = following
    found = await peer.ask("unload")
    assert found.pop("ok") > 100
    # Chosen, and gone before it was asked, by Dynamo's own client: no request was sent.
    assert [error for error in found if not re.fullmatch(r"Instance \d+ not found in available instances", error)] == []


async def test_their_client_hears_that_our_worker_died(ours: Ours) -> None:
    server = await ours.serve()
    peer = ours.theirs.peer
    await ours.begin("forever", {})
    await until(lambda: counted(server.registry, "rkmetrics_rpc_server_items_total") > 5)
    server.homes.close()  # breaks the connections off, as the end of a process does
    found = await peer.ask("result")
    assert found["items"]
    assert "Stream ended before generation completed" in found["error"]
    assert (await ours.called("echo", 1))["items"] == [1]


async def test_their_client_hears_that_our_worker_was_cut_off(ours: Ours) -> None:
    server = await ours.serve()
    peer = ours.theirs.peer
    await ours.begin("slow", {"n": 1000, "seconds": 0.05})
    await until(lambda: counted(server.registry, "rkmetrics_rpc_server_items_total") > 2)
    assert not await server.stop(0.1)
    found = await peer.ask("result")
    assert len(found["items"]) > 2
    assert "the server stops before the answer is whole" in found["error"]


async def listed_as(ours: Ours, instance: Instance) -> int:
    """List an instance under a lease of its own, as a test likes it."""
    lease = await ours.etcd.grant(60)
    made = instance._replace(instance_id=lease)
    await ours.etcd.put(made.key.encode(), made.encode(), lease)
    await ours.seen_by_theirs(EndpointName(*made[:3]), lease)
    return lease


async def test_their_client_hears_that_we_do_not_serve_that(ours: Ours) -> None:
    server = await ours.serve()
    echo = next(each for each in server.instances() if each.endpoint == "echo")
    kind, place = echo.transport
    ghost = echo._replace(endpoint="ghost", transport=(kind, place.replace("echo", "ghost")))
    lease = await listed_as(ours, ghost)
    found = await ours.called("ghost", 1, seconds=10)
    expected = {"tcp": "Unknown endpoint", "http": "404", "nats": "no responders"}[ours.plane]
    assert expected in found["error"], found
    await ours.etcd.revoke(lease)


async def test_their_client_hears_that_its_request_is_too_large_for_us(ours: Ours) -> None:
    """Over nats it is NATS that does not take it, and their client says nothing of that before its time-out."""
    registry = ours.registry(tcp_max_message_size_bytes=MEBIBYTE)
    server = await ours.serve(registry)
    found = await ours.called("echo", "x" * (3 * MEBIBYTE), seconds=10)
    assert found["items"] == []
    expected = {"tcp": "Request too large", "http": "413", "nats": "time"}[ours.plane]
    assert expected in found["error"]
    assert counted(server.registry, "rkmetrics_rpc_refused_total", reason="too_large") == (ours.plane != "nats")


async def test_their_client_hears_that_we_have_too_much_to_do(ours: Ours) -> None:
    server = await ours.serve(requests_limit=1)
    peer = ours.theirs.peer
    await ours.begin("slow", {"n": 1, "seconds": 1})
    await until(lambda: counted(server.registry, "rkmetrics_rpc_server_requests_in_flight") == 1)
    found = await ours.called("echo", 1, seconds=10)
    assert found["items"] == []
    expected = {"tcp": "Too many requests", "http": "503", "nats": "Too many requests"}[ours.plane]
    assert expected in found["error"]
    assert (await peer.ask("result"))["items"] == [{"i": 0}]
    assert counted(server.registry, "rkmetrics_rpc_refused_total", reason="busy") >= 1


async def test_we_continue_the_trace_of_their_client(ours: Ours) -> None:
    server = await ours.serve()
    found = await ours.called("who", {})
    trace = found["items"][0]["trace_id"]
    if ours.theirs.run in TRACES_AS_CLIENT:
        assert re.fullmatch(r"(?!0{32})[0-9a-f]{32}", trace)
    else:
        assert trace is None
    assert counted(server.registry, "rkmetrics_rpc_server_requests_total", outcome="ok") == 1


async def test_their_client_calls_load_metrics(ours: Ours) -> None:
    """As it was an endpoint of theirs up to 0.6.0: the body is null, and the answer is one item."""
    registry = ours.registry()
    with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=5) as publisher:
        publisher.publish(metrics(321, waiting=3))
        await ours.serve(registry, rk.rpc.serve_kv)
        found = await ours.called("load_metrics", None)
    assert found["error"] is None
    (item,) = found["items"]
    assert item["kv_stats"]["kv_active_blocks"] == 321
    assert item["worker_stats"]["num_requests_waiting"] == 3


@pytest.mark.parametrize("wire", ["0.7", "0.8"])
@pytest.mark.parametrize("theirs", TCP_RUNS, ids=str, indirect=True)
async def test_their_client_calls_what_is_listed_as_another_release_lists_it(ours: Ours, wire: str) -> None:
    await ours.serve(ours.registry(wire))
    found = await ours.called("count", {"n": 3})
    assert [item["i"] for item in found["items"]] == [0, 1, 2]


# --- our client, their worker -----------------------------------------------------------------------------------------


async def test_we_list_their_instances_under_the_ids_that_they_see(ours: Ours) -> None:
    for name in NAMES:
        (found,) = await ours.instances(f"theirs.{name}")
        assert found.instance_id == ours.theirs.worker_id
        assert await ours.theirs.peer.ask("instance_ids", endpoint=f"theirs.{name}") == [found.instance_id]


async def test_we_hear_that_their_worker_does_not_serve_that(ours: Ours) -> None:
    (echo,) = await ours.instances("theirs.echo")
    kind, place = echo.transport
    ghost = echo._replace(endpoint="ghost", transport=(kind, place.replace("echo", "ghost")))
    with pytest.raises((RpcRefusedError, RpcUnreachableError)) as caught:
        await (await ours.client()).call(ghost, 1)
    assert not caught.value.delivered


async def test_their_worker_continues_our_trace(ours: Ours) -> None:
    (who,) = await ours.instances("theirs.who")
    found = await outcome(await ours.client(), who, {"a": 1}, id="request-7", traceparent=TRACEPARENT)
    (item,) = found.items
    assert (item["id"], item["request"]) == ("request-7", {"a": 1})
    assert (item["trace_id"] == TRACE) is (ours.theirs.run in TRACES_AS_WORKER)


async def test_a_call_passes_their_worker_on_its_way_to_ours(ours: Ours) -> None:
    """Our client, their worker, whose handler asks our server: one request, and one trace where each step has it."""
    await ours.serve()
    (relay,) = await ours.instances("theirs.relay")
    asked = {"endpoint": f"{ours.component}.who", "request": {"deep": True}}
    found = await outcome(await ours.client(), relay, asked, id="request-8", traceparent=TRACEPARENT)
    (item,) = found.items
    assert (item["id"], item["request"]) == ("request-8", {"deep": True})
    whole = ours.theirs.run in TRACES_AS_CLIENT & TRACES_AS_WORKER
    assert (item["trace_id"] == TRACE) is whole


async def test_a_call_passes_their_worker_and_is_stopped_through_it(ours: Ours) -> None:
    """Our handler hears of it at once. Their worker of 0.8 and later then takes 10 s to end, whomever it asked."""
    await ours.serve()
    (relay,) = await ours.instances("theirs.relay")
    client, read = await ours.client(), 0
    async with await client.call(relay, {"endpoint": f"{ours.component}.forever", "request": {}}) as response:
        async for _ in response:
            read += 1
            if read == 5:
                response.stop()
                break
        await until(lambda: ours.handlers.seen)
    assert ours.handlers.seen[0]["how"] in ("stopped", "CancelledError")


@pytest.mark.parametrize("run", RUNS, ids=str)
async def test_we_hear_that_their_worker_died_and_lose_its_instance(
    run: Run, etcd_server: EtcdServer, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Its lease has ten seconds."""
    dying = await started(run, request, tmp_path)
    ours = Ours(dying, etcd_server, request.getfixturevalue("nats_server") if run.plane == "nats" else None)
    try:
        (forever,), (echo,) = await ours.instances("theirs.forever"), await ours.instances("theirs.echo")
        client = await ours.client()
        response, read = await client.call(forever, {}), list[Any]()

        async def read_on() -> None:
            async for item in response:
                read.append(item)
                if len(read) == 5:
                    await dying.peer.kill()

        with pytest.raises(RpcClosedError):
            await read_on()
        assert len(read) >= 5
        with pytest.raises(RpcUnreachableError):
            await client.call(echo, 1)
        assert await ours.instances("theirs.echo", lambda found: not found) == ()
    finally:
        await ours.close()
        await dying.peer.kill()


# --- both in one fleet ------------------------------------------------------------------------------------------------


async def test_both_clients_share_their_calls_among_both_workers(ours: Ours) -> None:
    """Our worker is one more instance of their component."""
    server = await ours.serve(component="theirs")
    peer, ids = ours.theirs.peer, sorted([ours.theirs.worker_id, server.instance_id])
    assert await peer.ask("instance_ids", endpoint="theirs.count") == ids
    for _ in range(12):  # it may go on with what it knew for a moment
        assert len((await peer.ask("call", endpoint="theirs.count", request={"n": 3}))["items"]) == 3
    assert 3 <= counted(server.registry, "rkmetrics_rpc_server_requests_total", outcome="ok") <= 6
    for id in ids:
        assert (await peer.ask("call", endpoint="theirs.echo", request=id, instance=id))["items"] == [id]
    name = EndpointName.parse("theirs.count", ours.theirs.namespace)
    async with PushRouter(await ours.client(), ours.source, name) as router:
        await until(lambda: len(router.instances()) == 2)
        asked = [0, 0]
        for _ in range(10):
            async with await router.generate({"n": 3}) as response:
                assert len([item async for item in response]) == 3
                asked[ids.index(response.instance.instance_id)] += 1
    assert asked == [5, 5]


# --- a frontend -------------------------------------------------------------------------------------------------------


def gauges(port: int) -> dict[str, float]:
    """What a frontend shows of the backend that it polls."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (URLError, ConnectionError):
        return {}
    found = re.findall(r"^dynamo_component_(\w+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found if name.startswith(("kv_", "gpu_", "request_", "num_"))}


@pytest.mark.parametrize("run", RUNS, ids=str)
async def test_a_frontend_polls_our_runtime_stats(
    run: Run, etcd_server: EtcdServer, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """At the endpoint that it polls where nobody names another."""
    frontend, port = await started(run, request, tmp_path), free_port()
    ours = Ours(frontend, etcd_server, request.getfixturevalue("nats_server") if run.plane == "nats" else None)
    registry = ours.registry()
    try:
        with rk.kv.WorkerMetricsPublisher(registry, actor_name="llm", worker_id=5) as publisher:
            publisher.publish(metrics(100, waiting=3))
            await ours.serve(registry, rk.rpc.serve_kv)
            await frontend.peer.ask("frontend", port=port, polls="nim.backend.runtime_stats", seconds=0.2)
            for active in (100, 250):
                publisher.publish(metrics(active, waiting=3))
                expected = {
                    "kv_active_blocks": float(active),
                    "kv_total_blocks": 1000.0,
                    "gpu_cache_usage_perc": active / 1000,
                    "gpu_prefix_cache_hit_rate": 0.25,
                    "request_active_slots": 2.0,
                    "request_total_slots": 64.0,
                    "num_requests_waiting": 3.0,
                }
                await settles(lambda: asyncio.to_thread(gauges, port), expected)
    finally:
        await ours.close()
        await frontend.peer.end()
