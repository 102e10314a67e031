"""The service protocol of NATS: who asks $SRV.PING, INFO or STATS learns of this process' endpoints.

As Dynamo's workers answer in nats mode (NATS ADR-32, "Service API"): one service for each component, one endpoint for
each instance, named `{namespace}_{component}-{endpoint}-{id}` on the subject `{namespace}_{component}.{endpoint}-{id}`,
with the instance id in hex. The endpoint `load_metrics` carries the latest ForwardPassMetrics as its data, which is
where the aggregators of 0.6.0 and before read them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec

from rkmetrics.catalogue import version
from rkmetrics.catalogue.kv import KvPublishing
from rkmetrics.kv.base import subject_token
from rkmetrics.nats_link import listen

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

__all__ = ["ServiceEndpoint", "ServiceStats", "service_name"]

#: The queue group of Dynamo's endpoints.
QUEUE_GROUP = "q"
TYPE = "io.nats.micro.v1.{}_response"
NOTHING = msgspec.Raw(b"null")
NANOSECONDS = 1_000_000_000


def service_name(namespace: str, component: str) -> str:
    """The name of a component's service."""
    return f"{subject_token(namespace, 'namespace')}_{subject_token(component, 'component')}"


class ServiceEndpoint:
    """One endpoint as the statistics show it. data: JSON of its own, asked for with each answer."""

    def __init__(
        self, service: ServiceStats, name: str, instance_id: int, data: Callable[[], bytes | None] | None
    ) -> None:
        part = f"{subject_token(name, 'endpoint')}-{instance_id:x}"
        self.name, self.subject = f"{service.name}-{part}", f"{service.name}.{part}"
        self._service, self._data = service, data
        self._requests = self._errors = self._nanoseconds = 0
        self._last_error = ""

    def record(self, seconds: float, error: str = "") -> None:
        """Count one request that took so long, and failed if there is an error."""
        self._requests += 1
        self._nanoseconds += int(seconds * NANOSECONDS)
        if error:
            self._errors += 1
            self._last_error = error

    def remove(self) -> None:
        """It is served no more."""
        if self._service.endpoints.get(self.name) is self:
            self._service.endpoints.pop(self.name, None)

    def info(self) -> dict[str, Any]:
        return {"name": self.name, "subject": self.subject, "queue_group": QUEUE_GROUP, "metadata": {}}

    def stats(self) -> dict[str, Any]:
        data = self._data() if self._data else None
        return {
            "name": self.name,
            "subject": self.subject,
            "num_requests": self._requests,
            "num_errors": self._errors,
            "processing_time": self._nanoseconds,
            "average_processing_time": self._nanoseconds // self._requests if self._requests else 0,
            "last_error": self._last_error,
            "data": NOTHING if data is None else msgspec.Raw(data),
            "queue_group": QUEUE_GROUP,
        }


class ServiceStats:
    """Answers for one component. A rider of a link thread."""

    def __init__(self, namespace: str, component: str, cells: KvPublishing) -> None:
        self.name = service_name(namespace, component)
        self._count = cells.service_requests
        self._id = uuid4().hex
        self._started = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self.endpoints: dict[str, ServiceEndpoint] = {}

    def endpoint(self, name: str, instance_id: int, data: Callable[[], bytes | None] | None = None) -> ServiceEndpoint:
        """Add an endpoint, or take the place of one of the same name and instance."""
        made = ServiceEndpoint(self, name, instance_id, data)
        self.endpoints[made.name] = made
        return made

    # --- as a rider ---------------------------------------------------------------------------------------------------

    async def run(self, nc: Client) -> None:
        """Answer while the connection lasts."""
        for subject, answer in self._subjects():
            await listen(nc, subject, self._answering(answer))
        await asyncio.Event().wait()

    async def drain(self, nc: Client) -> None:
        """Nothing waits."""

    def waits(self) -> bool:
        """Never."""
        return False

    def forget(self) -> None:
        """In a forked child: another service, without the parent's endpoints."""
        self._id, self.endpoints = uuid4().hex, {}

    def _subjects(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Each verb is heard by everybody, by those of a name, and by the one of an id."""
        for verb, answer in (("PING", self.ping), ("INFO", self.info), ("STATS", self.stats)):
            for tail in ("", f".{self.name}", f".{self.name}.{self._id}"):
                yield f"$SRV.{verb}{tail}", answer

    def _answering(self, answer: Callable[[], bytes]) -> Callable[[Msg], Any]:
        async def reply(message: Msg) -> None:
            if message.reply:
                await message.respond(answer())
                self._count.inc()

        return reply

    def _head(self, kind: str) -> dict[str, Any]:
        return {"type": TYPE.format(kind), "name": self.name, "id": self._id, "version": version()}

    def ping(self) -> bytes:
        """The answer to PING."""
        return msgspec.json.encode({**self._head("ping"), "metadata": {}})

    def info(self) -> bytes:
        """The answer to INFO."""
        endpoints = [endpoint.info() for endpoint in list(self.endpoints.values())]
        return msgspec.json.encode({**self._head("info"), "description": "", "metadata": {}, "endpoints": endpoints})

    def stats(self) -> bytes:
        """The answer to STATS."""
        endpoints = [endpoint.stats() for endpoint in list(self.endpoints.values())]
        return msgspec.json.encode({**self._head("stats"), "started": self._started, "endpoints": endpoints})
