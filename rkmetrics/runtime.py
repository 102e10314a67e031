"""Builds everything from settings, starts it and stops it in order; beside `rpc.py` the only place that composes.

    up    health `starting` -> server -> push -> demo -> announcing -> health `ok`
    down  health `draining` -> balancers have heard of it -> unlisted everywhere -> demo ends -> NATS has the last KV
          events -> health `shutting_down` -> last push -> server closes -> health `shut_down`

The server is the first to come and the last to go, so that /health tells each of these states while it lasts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkmetrics.errors import BackendError, FetchError, MissingExtraError, ServeError, SettingsError
from rkmetrics.registry import Registry
from rkmetrics.settings import SETTINGS, Settings

if TYPE_CHECKING:
    from rkmetrics.discovery.announcer import Announcer
    from rkmetrics.discovery.base import Backend, Source
    from rkmetrics.discovery.membership import Place
    from rkmetrics.server import Server

__all__ = [
    "EXTRAS",
    "Node",
    "Plan",
    "balancing",
    "dialable",
    "extras",
    "load_registry",
    "previewing",
    "running",
    "stop_signal",
    "why_no_token",
]

log = logging.getLogger(__name__)

# The extras of pyproject.toml: what each needs to be there.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "otlp": ("opentelemetry.sdk", "opentelemetry.exporter.otlp"),
    "zstd": ("compression.zstd" if sys.version_info >= (3, 14) else "zstandard",),
    "serve": ("uvicorn",),
    "nats": ("nats",),
    "dynamo": ("xxhash",),
    "http": ("h2",),
}
# Either of them asks for the push (OpenTelemetry Protocol Exporter specification, "Configuration Options").
OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
LOOPBACK: Mapping[str, str] = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
DRAIN_SECONDS = 0.5
WITHOUT_EFFECT = frozenset({"shared_dir", "inspect_token"})  # settings of what is not part of this version
HOW_TO_OPEN = "set METRICS_TOKEN or METRICS_TOKEN_FILE, or METRICS_ACCESS=open to serve metrics to anybody"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, decided before anything does.

    app: "module:registry", which is a registry or a function that makes one; None: one of our own, for this process.
    open: serve metrics without a token, on loopback addresses only. any_port: take a free port when the port is in use.
    environ: for OpenTelemetry's variables.
    """

    settings: Settings
    app: str | None = None
    demo: bool = False
    open: bool = False
    any_port: bool = False
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str], repr=False)


@dataclass(frozen=True, slots=True)
class Node:
    """What runs: a registry, the server in front of it, and what a person should know (left out, changed)."""

    registry: Registry
    server: Server
    notes: tuple[str, ...]

    @property
    def url(self) -> str:
        """Where the node is, as somebody on this machine reaches it."""
        return f"http://{dialable(self.server.host, self.server.port)}"

    @property
    def everywhere(self) -> bool:
        """Whether it is bound to all addresses of this machine, of which `url` is one."""
        return self.server.host in LOOPBACK


@contextmanager
def balancing(plan: Plan) -> Generator[Node]:
    """Run a balancer inside the block: its checks in a thread, its routes on a port. Raises ServeError.

    It lists backends to who may read metrics, so that gate is always there; `open` is for loopback addresses only.
    """
    from rkmetrics.asgi.auth import Gate, LoopbackGate
    from rkmetrics.discovery.balancer import Balancer
    from rkmetrics.discovery.routes import routes
    from rkmetrics.server import serve

    settings = dataclasses.replace(plan.settings, metrics_enabled=True)
    _refuse_balancer(plan, settings)
    _raise_file_limit()
    registry = Registry(settings)
    try:
        balancer = Balancer(registry, loopback=plan.open, sources=_etcd_sources(settings, registry))
    except BackendError as error:
        raise ServeError(f"RKMETRICS_STATIC_BACKENDS: {error}") from error
    guard = LoopbackGate() if plan.open else Gate.for_registrations(settings, _count_failures(registry))
    with ExitStack() as stack:
        registry.health.begin_start()
        stack.callback(registry.health.finish_shutdown)
        server = serve(registry, settings.port, settings.host, open_loopback=plan.open, more=routes(balancer, guard))
        stack.callback(server.close)
        stack.enter_context(balancer.in_thread())
        stack.callback(registry.health.begin_drain)
        registry.health.start()
        yield Node(registry, server, ())


def _refuse_balancer(plan: Plan, settings: Settings) -> None:
    """Raise ServeError for a balancer that nobody could read, or that everybody could join by accident."""
    if plan.open:
        return
    if reason := why_no_token(settings):
        raise ServeError(f"nobody could read /backends ({reason}): {HOW_TO_OPEN}; or --open on a loopback address")
    if settings.registration_access == "token" and settings.registration_token is None:
        raise ServeError(f"nobody could register (no token is set): {HOW_TO_LET_IN}; or --open on a loopback address")


HOW_TO_LET_IN = (
    "set RKMETRICS_REGISTRATION_TOKEN, or RKMETRICS_REGISTRATION_ACCESS=open to let everybody register who is inside "
    "the allowed networks"
)


def _count_failures(registry: Registry) -> Callable[[str], None]:
    def count(reason: str) -> None:
        registry.exporter.auth_failures[reason].inc()

    return count


def _raise_file_limit() -> None:
    """Take as many open files as the system gives: a connection to each backend is one."""
    try:
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit
    except ImportError:  # Windows has no such limit
        return
    soft, hard = getrlimit(RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS has a lower limit than it says
        setrlimit(RLIMIT_NOFILE, (hard, hard))
        log.debug("open files: %d, were %d", hard, soft)


def _etcd_sources(settings: Settings, registry: Registry) -> tuple[Source, ...]:
    if not settings.etcd_endpoints:
        return ()
    from rkmetrics.catalogue.etcd import Etcd as EtcdCells
    from rkmetrics.discovery.etcd import EtcdSource
    from rkmetrics.etcd.client import Etcd

    client = Etcd(settings.etcd_endpoints)
    return (EtcdSource(client, settings.namespace, metrics=registry.bind(EtcdCells)),)


@contextmanager
def running(plan: Plan) -> Generator[Node]:
    """Run a node inside the block. Raises ServeError when it must not, or cannot, start."""
    registry = _registry(plan)
    _warn_of_settings_without_effect(registry.settings)
    health, notes = registry.health, list[str]()
    with ExitStack() as stack:
        health.begin_start()
        stack.callback(health.finish_shutdown)
        server = _serve(plan, registry, notes)
        stack.callback(server.close)
        _start_push(plan, registry, stack, notes)
        stack.callback(health.begin_shutdown)
        stack.callback(_leave_nats, registry)
        _start_demo(plan, registry, stack, notes)
        announcer = _start_announcing(plan, registry, server, stack, notes)
        stack.callback(_drain, registry, announcer)
        health.start()
        yield Node(registry, server, tuple(notes))


def _drain(registry: Registry, announcer: Announcer | None) -> None:
    """Turn traffic away, until the balancers know; where there are none, long enough for a check to hear it."""
    if announcer is not None:
        announcer.leave()
        return
    registry.health.begin_drain()
    time.sleep(DRAIN_SECONDS)


def _registry(plan: Plan) -> Registry:
    """The registry, with a gate that can open, or is meant to be closed."""
    registry = load_registry(plan.app) if plan.app else Registry(plan.settings)
    if registry.settings.metrics_enabled and not plan.open and (reason := why_no_token(registry.settings)):
        raise ServeError(f"METRICS_ENABLED is set, and no token can be used ({reason}): {HOW_TO_OPEN}")
    return registry


def _warn_of_settings_without_effect(settings: Settings) -> None:
    names = [row.variable for row in SETTINGS if row.field in WITHOUT_EFFECT and getattr(settings, row.field)]
    if names:
        log.warning("no effect in this version: %s", ", ".join(names))


def _serve(plan: Plan, registry: Registry, notes: list[str]) -> Server:
    from rkmetrics.server import serve

    host, port = plan.settings.host, plan.settings.port
    try:
        return serve(registry, port, host, open_loopback=plan.open)
    except ServeError:
        if not plan.any_port:
            raise
        server = serve(registry, 0, host, open_loopback=plan.open)
        notes.append(f"Port {port} is in use, so this node took port {server.port}; --port chooses another.")
        return server


def _start_push(plan: Plan, registry: Registry, stack: ExitStack, notes: list[str]) -> None:
    """Push with OTLP when its endpoint is set; without the extra the node serves all the same, and says so."""
    if not any(plan.environ.get(name, "").strip() for name in OTLP_VARIABLES):
        return
    try:
        from rkmetrics.bridges.otlp import Pusher

        stack.enter_context(Pusher(registry))
    except MissingExtraError as error:
        notes.append(str(error))


def _start_demo(plan: Plan, registry: Registry, stack: ExitStack, notes: list[str]) -> None:
    if plan.demo:
        from rkmetrics.demo import Demo

        try:
            stack.enter_context(Demo(registry))
        except MissingExtraError as error:
            notes.append(str(error))


def _start_announcing(
    plan: Plan, registry: Registry, server: Server, stack: ExitStack, notes: list[str]
) -> Announcer | None:
    """Be found: by the load balancers, and in etcd, as far as either is set."""
    settings = plan.settings
    if not settings.load_balancers and not settings.etcd_endpoints:
        return None
    from rkmetrics.discovery.advertise import backend_here
    from rkmetrics.discovery.announcer import Announcer

    try:
        backend = backend_here(settings, host=server.host, port=server.port)
        places = _etcd_places(settings, registry, backend)
        announcer = Announcer(
            registry, backend, settings.load_balancers, places=places, token=settings.registration_token
        )
    except (BackendError, FetchError) as error:
        raise ServeError(f"cannot announce this node: {error}") from error
    stack.enter_context(announcer)
    if _is_out_of_reach(backend, settings.load_balancers):
        notes.append(f"{backend.address} is loopback: {OUT_OF_REACH}")
    where = ", ".join(place.shown for place in announcer.places)
    notes.append(f"Announced as {backend.id} at {backend.address}, metrics on port {backend.metrics_port}: {where}")
    return announcer


OUT_OF_REACH = "no other host reaches it; bind another address (--host 0.0.0.0), or name one (--advertise)"


def _is_out_of_reach(backend: Backend, balancers: tuple[str, ...]) -> bool:
    """Whether balancers on other hosts are told of an address of this one only."""
    loopback = ("127.", "[::1]", "localhost")
    away = [each for each in balancers if not each.partition("://")[2].startswith(loopback)]
    return bool(away) and backend.address.ip is not None and backend.address.ip.is_loopback


def _etcd_places(settings: Settings, registry: Registry, backend: Backend) -> tuple[Place, ...]:
    if not settings.etcd_endpoints:
        return ()
    from rkmetrics.catalogue.etcd import Etcd as EtcdCells
    from rkmetrics.discovery.etcd import registrar
    from rkmetrics.etcd.client import Etcd

    client = Etcd(settings.etcd_endpoints)
    return (registrar(client, backend, settings.namespace, metrics=registry.bind(EtcdCells)),)


def _leave_nats(registry: Registry) -> None:
    """Send what KV publishers hold back, if there are any."""
    from rkmetrics.kv.plane import DOCUMENT, KvPlane

    if registry.document(DOCUMENT) is not None:
        KvPlane.of(registry).close()


@contextmanager
def previewing(
    settings: Settings,
    dashboards: Iterable[Path] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    names: Iterable[str] = (),
    prefix: str = "",
    scrape_interval_seconds: float = 15.0,
) -> Generator[Server]:
    """Show dashboards inside the block, by default those that ship. Raises AssetError and ServeError."""
    from rkmetrics.server import serve
    from rkmetrics.ui.dashboards import SHIPPED, find
    from rkmetrics.ui.preview import routes
    from rkmetrics.ui.prometheus import Prometheus, authorization

    if settings.metrics_access != "open" and not _is_loopback(host):
        raise ServeError(f"{host!r} is no loopback address: {WHO_SEES_THE_PREVIEW}")
    prometheus = Prometheus(settings.prometheus_url, authorization(settings))
    rows = routes(
        find(tuple(dashboards) or (SHIPPED,)),
        prometheus,
        scrape_interval_seconds=scrape_interval_seconds,
        names=names,
        prefix=prefix,
    )
    with serve(Registry(settings, builtin=False), port, host, more=rows) as server:
        yield server


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


WHO_SEES_THE_PREVIEW = (
    "whoever reaches it would read all that Prometheus holds; METRICS_ACCESS=open allows that, a proxy on this host "
    "that asks for a password is better"
)


# --- parts that the command line asks for too -------------------------------------------------------------------------


def load_registry(app: str) -> Registry:
    """Return the registry at "module:attribute"; what can be called there is called. Raises ServeError."""
    name, _, path = app.partition(":")
    if not name or not path:
        raise ServeError(f"--app {app!r}: expected module:registry, such as myservice.metrics:registry")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found: Any = import_module(name)
        for part in path.split("."):
            found = getattr(found, part)
        made = found() if callable(found) and not isinstance(found, Registry) else found
    except (ServeError, SettingsError):
        raise
    except Exception as error:
        raise ServeError(f"--app {app!r}: {_why_not_loaded(name, error)}") from error
    if not isinstance(made, Registry):
        raise ServeError(f"--app {app!r}: expected a rkmetrics.Registry, or a function that makes one; found {made!r}")
    return made


def _why_not_loaded(name: str, error: Exception) -> str:
    """Say what is wrong with an application, and in which line, when it is in one of a file."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"no module named {error.name!r} in {os.getcwd()!r} or on the path"
    ours = (__file__, import_module.__code__.co_filename)
    lines = [line for line in traceback.extract_tb(error.__traceback__) if not line.filename.startswith(("<", *ours))]
    where = f" ({lines[-1].filename}, line {lines[-1].lineno})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def why_no_token(settings: Settings) -> str:
    """Return why the gate would refuse everybody if metrics were enabled, as it says itself; "" when it would not."""
    from rkmetrics.asgi import auth

    told: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        """Keep what the gate says out of the log: the caller says it, once."""
        told.extend(str(part) for part in record.args or ())
        return False

    auth.log.addFilter(hear)
    try:
        usable = auth.Gate.from_settings(dataclasses.replace(settings, metrics_enabled=True)).usable
    finally:
        auth.log.removeFilter(hear)
    return "" if usable else "; ".join(told) or "no token is set"


def extras() -> Mapping[str, bool]:
    """Return which extras are installed."""
    return {extra: all(map(_is_installed, modules)) for extra, modules in EXTRAS.items()}


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def dialable(host: str, port: int) -> str:
    """Return host:port as a client writes it; an address that stands for all of them becomes loopback."""
    host = LOOPBACK.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def stop_signal() -> Generator[Callable[[], str]]:
    """Catch SIGINT and SIGTERM inside the block; what it gives waits for the first of them and returns its name.

    After the first, both do what they did before, so a second one ends a stop that hangs. Main thread only.
    """
    # A pipe, as a handler must not touch a lock that the code it interrupts may hold (threading.Event has one).
    reader, writer = os.pipe()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def caught(number: int, _: object) -> None:
        restore()
        os.write(writer, bytes([number]))

    def wait() -> str:
        return signal.Signals(os.read(reader, 1)[0]).name

    try:
        for number in before:
            signal.signal(number, caught)
        yield wait
    finally:
        restore()
        os.close(reader)
        os.close(writer)
