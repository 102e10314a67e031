"""A balancer in one piece: table, policy, rate, checks and sources, made from settings.

    registry = rk.Registry()
    async with Balancer(registry) as balancer:              # checks run while the block does
        backend = balancer.directory.pick(Strategy.LEAST_LOADED)

`rkmetrics lb` is this with a server in front of it; a proxy in Python has it in its own process, and needs no /backends
at all. Registrations go through `routes.py`, whoever serves them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Iterable
from contextlib import AsyncExitStack, contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rkmetrics.background import LoopThread
from rkmetrics.catalogue.discovery import Balancing
from rkmetrics.discovery.base import Backend, Source, SourceName
from rkmetrics.discovery.directory import Directory, Rules
from rkmetrics.discovery.health import HealthChecker
from rkmetrics.discovery.policy import LOOPBACK, Policy, parse_network
from rkmetrics.discovery.rate import Rate
from rkmetrics.discovery.routes import resolve
from rkmetrics.errors import BackendError

if TYPE_CHECKING:
    from rkmetrics.registry import Registry
    from rkmetrics.settings import Secret, Settings

__all__ = ["Balancer", "PolicedSink", "policy_of", "rules_of", "static_backends", "token_of"]

log = logging.getLogger(__name__)

BURST_SECONDS = 5  # what one caller may send at once, as a share of its rate
STOP_SECONDS = 5.0
SOURCE, ALIVE_SECONDS = "discovery checks", 10.0


class Balancer:
    """Keeps a table of backends checked, while its `async with` block (or `in_thread`) runs.

    settings: by default the registry's. networks: allowed beside those of the settings. sources: watched beside what is
    announced. token: what checks show; by default METRICS_TOKEN. resolve: looks a name up.
    """

    def __init__(
        self,
        registry: Registry,
        settings: Settings | None = None,
        *,
        loopback: bool = False,
        sources: Iterable[Source] = (),
        token: Callable[[], Secret | None] | None = None,
        resolve: Callable[[str], list[IPv4Address | IPv6Address]] = resolve,
    ) -> None:
        self.registry, self.settings = registry, settings or registry.settings
        self.metrics = registry.bind(Balancing)
        self.directory = Directory(rules_of(self.settings), metrics=self.metrics)
        self.policy = policy_of(self.settings, loopback=loopback)
        rate = self.settings.registration_rate
        self.rate, self.resolve = Rate(rate, BURST_SECONDS * rate), resolve
        self.sink = PolicedSink(self.directory, self.policy)
        self.checker = HealthChecker(
            self.directory,
            interval_seconds=self.settings.health_check_interval_seconds,
            timeout_seconds=self.settings.health_check_timeout_seconds,
            path=self.settings.health_check_path,
            token=token or token_of(self.settings),
            alive=self._beat,
            metrics=self.metrics,
            places=_descriptors() // 4,  # at 20,000: half of them are enough for 5,000 that fall silent at once
            kept=_descriptors() // 2,
        )
        self._sources = tuple(sources)
        self._stack = AsyncExitStack()
        registry.add_refresher(self.directory.describe)
        self.sink.resync(SourceName.STATIC, static_backends(self.settings))

    def _beat(self) -> None:
        """The checks go on, so what is listed is true; /health says when they do not."""
        self.registry.health.source(SOURCE, ALIVE_SECONDS).beat()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.checker)
        for source in self._sources:
            self._stack.push_async_callback(_cancel, asyncio.create_task(source.run(self.sink)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.registry.health.source(SOURCE, ALIVE_SECONDS).close()
        await self._stack.aclose()

    @contextmanager
    def in_thread(self) -> Generator[Self]:
        """The same for programs without an event loop: it runs one in a daemon thread."""
        stop = asyncio.Event()

        async def run() -> None:
            async with self:
                await stop.wait()

        thread = LoopThread("rkmetrics-balancer", run, lambda _: stop.set())
        thread.start()
        try:
            yield self
        finally:
            thread.stop(STOP_SECONDS)

    def __repr__(self) -> str:
        return f"<Balancer {self.directory!r}>"


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# --- what settings say ------------------------------------------------------------------------------------------------


def rules_of(settings: Settings) -> Rules:
    """Return when backends come and go."""
    return Rules(
        rise=settings.health_check_rise,
        fall=settings.health_check_fall,
        expire_seconds=settings.backend_expiry_seconds,
        panic_ratio=settings.panic_ratio,
        limit=settings.max_backends,
        limit_per_caller=settings.max_backends_per_caller,
    )


def policy_of(settings: Settings, *, loopback: bool = False) -> Policy:
    """Return what may be registered. loopback: also on this host, where the settings name no networks."""
    networks = tuple(parse_network(text) for text in settings.allowed_networks)
    spans = (text.partition("-") for text in settings.allowed_ports)
    ports = tuple(range(int(low), int(high or low) + 1) for low, _, high in spans)
    return Policy(networks or (LOOPBACK if loopback else ()), ports)


def token_of(settings: Settings) -> Callable[[], Secret | None]:
    """Return what asks for the metrics token that checks show: the first line of METRICS_TOKEN_FILE as it is now, else
    METRICS_TOKEN. A file that cannot be read leaves the checks with the token they had."""
    from rkmetrics.settings import Secret

    if settings.metrics_token_file is None:
        return lambda: settings.metrics_token
    path, last = Path(settings.metrics_token_file), [settings.metrics_token]

    def token() -> Secret | None:
        with suppress(OSError):
            lines = path.read_bytes().split()
            last[0] = Secret(lines[0]) if lines else settings.metrics_token
        return last[0]

    return token


def static_backends(settings: Settings) -> list[Backend]:
    """Return the backends that the settings name; each has its address as its id. Raises BackendError."""
    parts = (text.partition("/") for text in settings.static_backends)
    return [Backend.checked(_id(address), address, int(port)) for address, _, port in parts]


def _id(address: str) -> str:
    return "static-" + address.replace("[", "").replace("]", "").lower()


def _descriptors() -> int:
    """How many files this process may have open."""
    try:
        from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit
    except ImportError:  # Windows, whose limit is larger than any fleet
        return 8_192
    soft, _ = getrlimit(RLIMIT_NOFILE)
    return 1 << 20 if soft == RLIM_INFINITY else soft


class PolicedSink:
    """A sink that lets through what the policy allows. Hosts are addresses here: a source that lists names would have
    the balancer look them up for ever."""

    def __init__(self, directory: Directory, policy: Policy) -> None:
        self._directory, self._policy = directory, policy

    def upsert(self, source: SourceName, backend: Backend) -> bool:
        """Take a backend from a source. False where it is not taken."""
        return self._allows(source, backend) and self._directory.upsert(source, backend)

    def withdraw(self, source: SourceName, id: str) -> bool:
        """Forget a backend of a source. False where it was not known from there."""
        return self._directory.withdraw(source, id)

    def resync(self, source: SourceName, backends: Iterable[Backend]) -> None:
        """These are all that the source knows of."""
        self._directory.resync(source, [backend for backend in backends if self._allows(source, backend)])

    def _allows(self, source: SourceName, backend: Backend) -> bool:
        address = backend.address.ip
        try:
            if address is None:
                raise BackendError(
                    "address", str(backend.address), "an IP address; names are looked up in /register only"
                )
            if source is not SourceName.STATIC:  # who may set the settings may also set the networks
                self._policy.check(address, (backend.address.port, backend.metrics_port), None)
        except BackendError as error:
            log.warning("backend %s from %s is left out: %s", backend.id, source, error)
            return False
        return True
