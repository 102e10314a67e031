"""A client that connects to instances itself, as those of tcp and http do: one pool of connections to each server."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from rkmetrics.errors import RpcRefusedError, RpcUnreachableError
from rkmetrics.planes.base import Instance, Refusal
from rkmetrics.planes.calling import SILENCE_SECONDS, Call, PlaneClient, answers
from rkmetrics.planes.fork import descriptors
from rkmetrics.planes.listening import call_home

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["ConnectingClient", "Target"]


class Target(Protocol):
    """What an instance's address says."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


class _Line(Protocol):
    @property
    def transport(self) -> asyncio.Transport | None: ...


class _Pool(Protocol):
    """The connections to one server."""

    @property
    def lines(self) -> Iterable[_Line]: ...
    def close(self) -> list[asyncio.Task[Any]]: ...


TargetT = TypeVar("TargetT", bound=Target)
PoolT = TypeVar("PoolT", bound=_Pool)


class ConnectingClient(PlaneClient, Generic[TargetT, PoolT]):
    """A client but for what it says on a connection. kind: of the transports it can reach."""

    kind: str

    def __init__(
        self,
        registry: Registry,
        *,
        host: str | None,
        request_timeout_seconds: float,
        silence_seconds: float = SILENCE_SECONDS,
        actor_name: str | None = None,
    ) -> None:
        super().__init__(
            registry,
            call_home(registry.settings, host),
            request_timeout_seconds=request_timeout_seconds,
            silence_seconds=silence_seconds,
            actor_name=actor_name,
        )
        self._pools: dict[tuple[str, int], PoolT] = {}

    @abstractmethod
    def _target(self, place: str) -> TargetT:
        """Read what is listed. Raises ValueError."""

    @abstractmethod
    def _new_pool(self, key: tuple[str, int]) -> PoolT:
        """Connections to a server, none yet."""

    @abstractmethod
    def _send(self, pool: PoolT, call: Call, target: TargetT, payload: bytes, traceparent: str) -> None:
        """Send a request; what becomes of it is told to the call."""

    @abstractmethod
    def _greeting(self, target: TargetT) -> bytes:
        """What a probe says: anything that is answered and runs nothing."""

    def _push(self, call: Call, payload: bytes, traceparent: str) -> None:
        kind, place = call.instance.transport
        try:
            if kind != self.kind:
                raise ValueError(f"it is reached over {kind!r}, and this client speaks {self.kind}")
            target = self._target(place)
        except ValueError as error:
            call.fail(RpcUnreachableError(call.endpoint, str(error), instance=call.where))
            return
        if len(payload) > self.settings.tcp_max_message_size_bytes:
            reason = f"{Refusal.TOO_LARGE.text}: it has {len(payload)} bytes (DYN_TCP_MAX_MESSAGE_SIZE)"
            call.fail(RpcRefusedError(call.endpoint, reason, instance=call.where))
            return
        self._send(self._pool(target), call, target, payload, traceparent)

    def _pool(self, target: TargetT) -> PoolT:
        key = target.host, target.port
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = self._new_pool(key)
        return pool

    async def probe(self, instance: Instance) -> bool:
        try:
            target = self._target(instance.transport[1])
        except ValueError:
            return False
        return await answers(target.host, target.port, self._greeting(target), self.probe_seconds)

    @property
    @abstractmethod
    def probe_seconds(self) -> float:
        """How long a probe waits."""

    def _open_files(self) -> Iterable[int]:
        return descriptors([line.transport for pool in self._pools.values() for line in pool.lines])

    def _go_on_in_child(self) -> None:
        super()._go_on_in_child()
        self._pools = {}

    async def _close(self) -> None:
        ending = [task for pool in self._pools.values() for task in pool.close()]
        self._pools.clear()
        if ending:
            await asyncio.wait(ending)
