"""What a request plane is: endpoints that are served, and calls to them. Values and interfaces; pure.

    server = rk.rpc.server(registry)                       # DYN_REQUEST_PLANE says which plane
    server.endpoint("backend.generate", generate)          # async def generate(request, context): yield ...
    async with server: ...

    async with rk.rpc.client(registry) as client:
        response = await client.call(instance, {"prompt": "..."})
        async for item in response: ...

Over each plane a call has the same three steps: the request goes to the instance, which acknowledges it and then
connects back with the answer, a stream of items. An acknowledgement says only "received".
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from rkmetrics.catalogue.planes import CallOutcome
from rkmetrics.etcd.dynamo import Instance
from rkmetrics.planes.wire import Annotated

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = [
    "Annotated",
    "EndpointName",
    "Handler",
    "Instance",
    "InstanceListener",
    "InstanceSource",
    "Refusal",
    "RequestPlaneClient",
    "RequestPlaneServer",
    "RpcContext",
    "RpcRequest",
    "RpcResponse",
    "Served",
]

NAME = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


class EndpointName(NamedTuple):
    """namespace.component.endpoint, as Dynamo writes it."""

    namespace: str
    component: str
    endpoint: str

    @classmethod
    def parse(cls, text: str, namespace: str) -> EndpointName:
        """Read "component.endpoint" of that namespace, or "namespace.component.endpoint". Raises ValueError."""
        parts = text.split(".")
        parts = parts if len(parts) != 2 else [namespace, *parts]
        if len(parts) != 3 or not all(map(NAME.fullmatch, parts)):
            raise ValueError(
                f"endpoint={text!r}: expected component.endpoint or namespace.component.endpoint, each of letters, "
                "digits, '_' and '-'"
            )
        return cls(*parts)

    def __str__(self) -> str:
        return ".".join(self)


class RpcRequest(NamedTuple):
    """A request as it reached a server. body: JSON as it came; traceparent: W3C's, "" where there is none."""

    id: str
    endpoint: EndpointName
    body: bytes
    traceparent: str


class RpcContext(ABC):
    """What a handler knows of the call it answers. The methods are those of Dynamo's Context, so handlers fit both."""

    @abstractmethod
    def id(self) -> str:
        """The id of the request, which the caller chose."""

    @property
    @abstractmethod
    def request(self) -> RpcRequest:
        """The request as it came."""

    @property
    @abstractmethod
    def trace_id(self) -> str | None:
        """The trace to which the call belongs, as 32 hex digits."""

    @abstractmethod
    def is_stopped(self) -> bool:
        """Whether the caller wants no more items; a handler that ends then ends in order."""

    @abstractmethod
    def is_killed(self) -> bool:
        """Whether nobody waits any more. The handler is cancelled as well."""

    @abstractmethod
    def stop_generating(self) -> None:
        """End the answer after the item that is being made, as if the caller had asked for it."""

    @abstractmethod
    async def stopped(self) -> None:
        """Return when the call is stopped or killed."""


#: `async def handler(request)` or `(request, context)`: an async generator of items, or a coroutine of the one item.
Handler = Callable[..., "AsyncIterator[Any] | AsyncGenerator[Any, None] | Awaitable[Any]"]


class Refusal(Enum):
    """Why a request is not taken: the text that a client gets, and the status over http."""

    UNKNOWN_ENDPOINT = ("Unknown endpoint", 404)
    MALFORMED = ("Malformed request", 400)
    TOO_LARGE = ("Request too large", 413)
    BUSY = ("Too many requests", 503)
    DRAINING = ("Draining", 503)
    FORBIDDEN = ("Forbidden address", 403)

    def __init__(self, text: str, status: int) -> None:
        self.text, self.status = text, status


class Served(Protocol):
    """Whom a server tells of each request that it answered; nats mode has service statistics of it."""

    def __call__(self, endpoint: EndpointName, seconds: float, error: str) -> None: ...


class RequestPlaneServer(ABC):
    """Serves endpoints over one plane, in the event loop that it was started in.

    mode: the plane, as DYN_REQUEST_PLANE names it. instance_id: what the process calls itself; where etcd lists it,
    the lease, which is why it may change.
    """

    mode: str

    @property
    @abstractmethod
    def instance_id(self) -> int:
        """Who this is."""

    @abstractmethod
    def endpoint(self, name: str, handler: Handler, *, type: Any = Any, actor_name: str | None = None) -> EndpointName:
        """Serve an endpoint. type: what a request is decoded into (a msgspec Struct, a dataclass, ...; any JSON).

        actor_name: under which its requests are counted, by default the component's. Raises ValueError.
        """

    @abstractmethod
    async def start(self) -> None:
        """Listen, and be listed. Raises ServeError where the port is taken or the address is not ours."""

    @abstractmethod
    async def stop(self, timeout_seconds: float = 10.0) -> bool:
        """Be listed no more, take nothing more, wait for what is being answered. Whether all ended in time; what did
        not is cut off, and its callers hear of it."""

    @abstractmethod
    def instances(self) -> Iterable[Instance]:
        """Each endpoint as others reach it."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class RpcResponse(ABC):
    """An answer: an async iterator of items. Who stops reading early says so with `aclose`, or leaves `async with`.

    Raises from iteration: RpcRemoteError, RpcTimeoutError, RpcClosedError, RpcProtocolError.
    """

    id: str
    instance: Instance

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[Any]:
        """The items' data."""

    @abstractmethod
    def annotated(self) -> AsyncIterator[Annotated[Any]]:
        """The items as Dynamo has them; one that says that the handler raised is among them, and nothing is raised."""

    @abstractmethod
    def stop(self) -> None:
        """Want no more; what was made already may still come, and then the end."""

    @abstractmethod
    async def aclose(self) -> None:
        """Wait no longer; where the answer is not at its end, the handler is cancelled."""

    @abstractmethod
    def when_over(self, tell: Callable[[CallOutcome], None]) -> None:
        """Have one listener told how the call ended, once; at once where it is over. It may not wait or raise."""

    async def one(self) -> Any:
        """Return the only item. Raises RpcProtocolError where there is none, or more than one."""
        found: list[Any] = []
        async for item in self:
            found.append(item)
            if len(found) > 1:  # there may be no end of them
                await self.aclose()
                break
        if len(found) != 1:
            from rkmetrics.errors import RpcProtocolError

            name, count = EndpointName(*self.instance[:3]), "more than one item" if found else "no item"
            raise RpcProtocolError(str(name), f"{count} came, where one was expected")
        return found[0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class RequestPlaneClient(ABC):
    """Calls instances over one plane, from the event loop that it was started in."""

    mode: str

    @abstractmethod
    async def call(
        self,
        instance: Instance,
        request: Any,
        *,
        id: str | None = None,
        timeout_seconds: float | None = None,
        type: Any = Any,
        traceparent: str | None = None,
    ) -> RpcResponse:
        """Send a request, and return its answer once that begins.

        request: anything that is JSON. id: by default a new one. timeout_seconds: for all of the answer. type: what
        items are decoded into. traceparent: by default that of the current span, where OpenTelemetry is there.
        Raises RpcError; `delivered` says whether the handler may have run.
        """

    async def probe(self, instance: Instance) -> bool:
        """Whether an instance that failed may be asked again, by the cheapest sign of life that the plane has.

        No sign is sure, and none runs a handler. A plane without any says yes.
        """
        return True

    @abstractmethod
    async def start(self) -> None:
        """Be ready. Calls start a client that is not."""

    @abstractmethod
    async def close(self) -> None:
        """End all connections; calls in flight fail."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


# --- who serves what --------------------------------------------------------------------------------------------------


class InstanceListener(Protocol):
    """Whom a source tells: all instances of an endpoint there are now."""

    def __call__(self, instances: tuple[Instance, ...]) -> None: ...


class InstanceSource(ABC):
    """Knows who serves an endpoint: etcd, our own discovery, or a list."""

    @abstractmethod
    async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
        """Tell the listener what there is, and each change, until cancelled. Outages change nothing of what is known:
        silence is no withdrawal."""
