"""Request planes as users call them: which plane, who is listed where, and who is asked, by the settings alone.

    server = rk.rpc.server(registry)                          # DYN_REQUEST_PLANE: tcp, http or nats
    server.endpoint("backend.generate", generate)             # async def generate(request, context): yield ...
    async with server: ...

    async with rk.rpc.client(registry) as client, rk.rpc.router(client, "backend.generate") as router:
        response = await router.generate({"prompt": "..."})
        async for item in response: ...

A server is listed, and a router finds it, where the same settings say: in etcd (ETCD_ENDPOINTS), else at our load
balancers (RKMETRICS_LOAD_BALANCERS). A router can be given its instances instead. The id of the first server of a
registry is that of its KV metrics and events (KvPlane.worker_id), so a router by KV state knows whose they are.

Composes like runtime.py, and like it belongs to the root: planes, etcd, discovery and KV plane meet here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakSet

import msgspec

from rkmetrics.errors import SettingsError
from rkmetrics.kv.page import load_metrics, runtime_stats
from rkmetrics.kv.plane import KvPlane
from rkmetrics.planes import PLANES, client_class, server_class
from rkmetrics.planes.base import EndpointName, InstanceSource
from rkmetrics.planes.instances import DirectoryInstances, EtcdInstances, StaticInstances, Told
from rkmetrics.planes.loads import Loads
from rkmetrics.planes.router import RETRIES, Overlaps, PushRouter
from rkmetrics.planes.serving import REQUESTS_LIMIT, Lister
from rkmetrics.settings import Secret

if TYPE_CHECKING:
    from rkmetrics.etcd.client import Etcd
    from rkmetrics.kv.aggregator import KvMetricsAggregator
    from rkmetrics.kv.indexer import KvIndexer
    from rkmetrics.kv.nats.service import ServiceEndpoint
    from rkmetrics.planes.calling import PlaneClient
    from rkmetrics.planes.serving import PlaneServer
    from rkmetrics.registry import Registry
    from rkmetrics.settings import Settings

__all__ = ["Kv", "client", "loads", "router", "serve_kv", "server", "source"]

LOAD_METRICS = "load_metrics"
RUNTIME_STATS = "nim.backend.runtime_stats"


def _mode(told: str | None, settings: Settings) -> str:
    mode = settings.request_plane if told is None else told
    if mode not in PLANES:
        raise SettingsError("mode", told, f"one of {', '.join(PLANES)}", "rk.rpc")
    return mode


# --- who serves -------------------------------------------------------------------------------------------------------


def server(
    registry: Registry,
    *,
    mode: str | None = None,
    etcd: Etcd | None = None,
    instance_id: int | None = None,
    lister: Lister | None = None,
    metrics_port: int | None = None,
    requests_limit: int = REQUESTS_LIMIT,
    homes_allowed: Callable[[str], bool] = lambda _: True,
) -> PlaneServer:
    """Return a server of the plane that the settings name; add endpoints, then enter it.

    etcd, lister: where it is listed, by default where the settings say. instance_id: by default that of the registry's
    KV metrics, for its first server. metrics_port: where load balancers check this process, by default
    RKMETRICS_METRICS_PORT, then RKMETRICS_PORT. requests_limit, homes_allowed: see PlaneServer. Raises SettingsError,
    and MissingExtraError where the plane needs a package.
    """
    settings = registry.settings
    chosen = _mode(mode, settings)
    numbers = registry.part(_Numbers)
    number = numbers.next() if instance_id is None else instance_id
    where = lister or _lister(registry, chosen, number, etcd, metrics_port or settings.metrics_port or settings.port)
    statistics = _Statistics(registry, where)
    made = server_class(chosen)(
        registry,
        instance_id=number,
        lister=statistics if chosen == settings.request_plane else where,
        served=statistics.record if chosen == settings.request_plane == "nats" else None,
        requests_limit=requests_limit,
        homes_allowed=homes_allowed,
    )
    numbers.add(made)
    return made


class _Numbers:
    """The ids of a registry's servers: the first that lives has that of its KV metrics."""

    def __init__(self, registry: Registry) -> None:
        self._plane = KvPlane.of(registry)
        self._servers: WeakSet[PlaneServer] = WeakSet()

    def next(self) -> int:
        mine = self._plane.worker_id
        taken = any(each.is_mine(f"{mine:x}") for each in self._servers)  # also of one that was renumbered
        return random.SystemRandom().getrandbits(63) if taken else mine

    def add(self, made: PlaneServer) -> None:
        self._servers.add(made)


def _lister(registry: Registry, mode: str, number: int, etcd: Etcd | None, metrics_port: int) -> Lister:
    settings = registry.settings
    client = etcd or _etcd(settings)
    if client is not None:
        from rkmetrics.catalogue.etcd import Etcd as EtcdCells
        from rkmetrics.planes.listing import EtcdLister

        return EtcdLister(client, metrics=registry.bind(EtcdCells))
    if settings.load_balancers:
        from rkmetrics.addresses import advertised
        from rkmetrics.discovery.advertise import default_id
        from rkmetrics.discovery.announcer import Announcer
        from rkmetrics.planes.listing import DirectoryLister

        bare = mode not in ("tcp", "http")
        return DirectoryLister(
            f"{default_id()}-{number:x}",
            metrics_port,
            lambda backend: Announcer(registry, backend),
            address=advertised(settings.advertise_address, settings.host, metrics_port) if bare else "",
            path=settings.http_rpc_root_path if mode == "http" else "",
        )
    return Lister()


def _etcd(settings: Settings) -> Etcd | None:
    if not settings.etcd_endpoints:
        return None
    from rkmetrics.etcd.client import Etcd

    return Etcd(settings.etcd_endpoints)


class _Statistics(Lister):
    """A server's endpoints in the statistics of NATS services, while it is listed: in nats mode; else a line says why
    not."""

    def __init__(self, registry: Registry, lister: Lister) -> None:
        self._plane, self._lister, self.heard_seconds = KvPlane.of(registry), lister, lister.heard_seconds
        self._server: PlaneServer | None = None
        self._endpoints: dict[tuple[EndpointName, int], ServiceEndpoint | None] = {}

    def prepare(self, server: PlaneServer) -> None:
        self._lister.prepare(server)
        self._server = server
        for name in server.endpoints:  # those of other namespaces (nim) are in no service of this one
            self._endpoint(name, server.instance_id)

    async def run(self, server: PlaneServer) -> None:
        await self._lister.run(server)

    async def withdraw(self) -> None:
        await self._lister.withdraw()
        for endpoint in self._endpoints.values():
            if endpoint is not None:
                endpoint.remove()
        self._endpoints.clear()

    def record(self, endpoint: EndpointName, seconds: float, error: str) -> None:
        """A request was answered."""
        found = self._endpoint(endpoint, self._server.instance_id if self._server is not None else 0)
        if found is not None:
            found.record(seconds, error)

    def _endpoint(self, name: EndpointName, number: int) -> ServiceEndpoint | None:
        key = name, number
        if key not in self._endpoints and name.namespace == self._plane.settings.namespace:
            latest = self._plane.latest
            data = (lambda: load_metrics(latest)) if name.endpoint == LOAD_METRICS else None
            self._endpoints[key] = self._plane.service_endpoint(name.component, name.endpoint, number, data)
        return self._endpoints.get(key)


def serve_kv(
    server: PlaneServer, component: str = "backend", *, stats: str | None = RUNTIME_STATS, backend: str = "rkmetrics"
) -> None:
    """Serve the KV metrics of this process over its plane: `load_metrics` of the component, and `stats`.

    load_metrics: ForwardPassMetrics of the worker of the server's id, else of the first (as Dynamo's up to 0.6.0).
    stats: what Dynamo's frontends poll (0.7 to 0.9), a JSON text with gauges of all workers; None: not served. backend:
    what it says of itself there.
    """
    latest = KvPlane.of(server.registry).latest

    async def load(_: Any) -> Any:
        ours = next((each.key for each in latest.updates() if each.key.worker_id == server.instance_id), None)
        found = load_metrics(latest, ours)
        if found is None:
            raise LookupError("no worker of this process has published its state yet")
        return msgspec.Raw(found)

    async def runtime(_: Any) -> str:
        return runtime_stats(latest, backend, worker_id=str(server.instance_id))

    server.endpoint(f"{component}.{LOAD_METRICS}", load)
    if stats is not None:
        server.endpoint(stats, runtime, actor_name=component)


# --- who asks ---------------------------------------------------------------------------------------------------------


def client(
    registry: Registry, *, mode: str | None = None, silence_seconds: float = 300.0, actor_name: str | None = None
) -> PlaneClient:
    """Return a client of the plane that the settings name. silence_seconds: between two items of an answer.

    actor_name: under which its calls are counted, by default the component's. Raises SettingsError, and
    MissingExtraError where the plane needs a package.
    """
    chosen = _mode(mode, registry.settings)
    make = cast("Callable[..., PlaneClient]", client_class(chosen))
    return make(registry, silence_seconds=silence_seconds, actor_name=actor_name)


def source(
    registry: Registry,
    instances: InstanceSource | Iterable[Told] | None = None,
    *,
    mode: str | None = None,
) -> InstanceSource:
    """Return who knows the instances: those given here, else etcd, else our load balancers. Raises SettingsError."""
    settings = registry.settings
    if isinstance(instances, InstanceSource):
        return instances
    if instances is not None:
        told: Iterable[Told] = [instances] if isinstance(instances, str) else instances
        return StaticInstances(told, mode=_mode(mode, settings), path=settings.http_rpc_root_path)
    etcd = _etcd(settings)
    if etcd is not None:
        from rkmetrics.catalogue.etcd import Etcd as EtcdCells

        return EtcdInstances(etcd, metrics=registry.bind(EtcdCells))
    if settings.load_balancers:
        return DirectoryInstances(settings.load_balancers, token=_token(settings))
    raise SettingsError("instances", None, HOW_TO_FIND, "rk.rpc")


HOW_TO_FIND = (
    "one of the three ways to know who serves: instances=['host:port', ...] (--instances), "
    "ETCD_ENDPOINTS=http://etcd:2379, or RKMETRICS_LOAD_BALANCERS=http://balancer:8080"
)


def _token(settings: Settings) -> Secret | None:
    """The token that the balancer knows as well."""
    if settings.metrics_token_file is None:
        return settings.metrics_token
    lines = Path(settings.metrics_token_file).read_bytes().split()
    return Secret(lines[0]) if lines else settings.metrics_token


class Kv(NamedTuple):
    """What routing by KV state takes. block_size: tokens of a KV cache block, as the engines have it.

    poll_seconds: how often workers are asked for their load over the plane; where NATS carries it too, ten times less.
    """

    block_size: int = 16
    overlap_score_weight: float = 1.0
    temperature: float = 0.0
    poll_seconds: float = 0.1


def router(
    client: PlaneClient,
    endpoint: str,
    *,
    instances: InstanceSource | Iterable[Told] | None = None,
    mode: str = "round_robin",
    kv: Kv | None = None,
    busy_threshold: float | None = None,
    index: Overlaps | None = None,
    loads: Loads | None = None,
    retries: int = RETRIES,
    actor_name: str | None = None,
) -> PushRouter:
    """Return a router to the instances of an endpoint, "component.endpoint" of this namespace; enter it.

    mode: round_robin, random or kv. instances: see `source`. kv: for mode kv. busy_threshold: 0 to 1. index, loads:
    your own instead of those made here, which need: index, NATS; loads, NATS or workers that `serve_kv`.
    """
    registry = client.registry
    name = EndpointName.parse(endpoint, registry.settings.namespace)
    found = source(registry, instances, mode=client.mode)
    chosen, parts = kv or Kv(), list[AbstractAsyncContextManager[Any]]()
    if mode == "kv" and index is None:
        index = indexer = _indexer(registry, name, chosen, lambda: made)
        parts.append(indexer)
    if loads is None and (mode == "kv" or busy_threshold is not None):
        loads = aggregator = _loads(registry)
        parts += _feeds(client, found, name, aggregator, chosen)
    made = PushRouter(
        client,
        found,
        name,
        mode=mode,
        busy_threshold=busy_threshold,
        index=index,
        loads=loads,
        overlap_score_weight=chosen.overlap_score_weight,
        temperature=chosen.temperature,
        retries=retries,
        actor_name=actor_name,
        parts=parts,
    )
    return made


def loads(registry: Registry) -> KvMetricsAggregator:
    """Return what the routers of a registry know of their workers' loads; theirs to feed, yours to read."""
    return registry.part(_aggregator)


_loads = loads  # `router` has a parameter of that name


def _aggregator(registry: Registry) -> KvMetricsAggregator:
    from rkmetrics.kv.aggregator import KvMetricsAggregator

    return KvMetricsAggregator(registry)


def _indexer(registry: Registry, name: EndpointName, kv: Kv, router: Callable[[], PushRouter]) -> KvIndexer:
    from rkmetrics.kv.indexer import KvIndexer

    def alive() -> Iterable[int]:
        """Those that the router knows; while it knows nothing, all that the index has."""
        if router().known:
            return router().instance_ids()
        return [key.worker_id for key in made.index.workers()]

    made = KvIndexer(registry, block_size=kv.block_size, component=name.component, instances=lambda: frozenset(alive()))
    return made


def _feeds(
    client: PlaneClient, found: InstanceSource, name: EndpointName, aggregator: KvMetricsAggregator, kv: Kv
) -> Iterable[AbstractAsyncContextManager[Any]]:
    """What tells of loads: NATS where it is on, and the workers' own endpoint in any mode."""
    from rkmetrics.kv.subscriber import KvMetricsSubscriber
    from rkmetrics.planes.polling import PlanePoller

    registry = client.registry
    without = KvPlane.of(registry).without_nats
    yield KvMetricsSubscriber(registry, aggregator)
    yield PlanePoller(
        client,
        found,
        name._replace(endpoint=LOAD_METRICS),
        aggregator,
        interval_seconds=kv.poll_seconds if without is not None else kv.poll_seconds * 10,
    )
