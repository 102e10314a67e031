"""Builds everything from settings, starts it and stops it in order; beside `cli.py` the only place that composes.

    up    health `starting` -> server -> push -> demo -> health `ok`
    down  health `draining` -> demo ends -> health `shutting_down` -> last push -> server closes -> health `shut_down`

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
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rkmetrics.errors import MissingExtraError, ServeError, SettingsError
from rkmetrics.registry import Registry
from rkmetrics.settings import SETTINGS, Settings

if TYPE_CHECKING:
    from rkmetrics.server import Server

__all__ = [
    "EXTRAS",
    "Node",
    "Plan",
    "dialable",
    "extras",
    "load_registry",
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
        _start_demo(plan, registry, stack)
        stack.callback(_drain, registry)
        health.start()
        yield Node(registry, server, tuple(notes))


def _drain(registry: Registry) -> None:
    """Turn traffic away, long enough for a check that is on its way to hear it."""
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


def _start_demo(plan: Plan, registry: Registry, stack: ExitStack) -> None:
    if plan.demo:
        from rkmetrics.demo import Demo

        stack.enter_context(Demo(registry))


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
