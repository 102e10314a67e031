"""Where the KV metrics and events of a registry go: decided once, from its settings, and handed out as objects.

| DYN_REQUEST_PLANE | RKMETRICS_KV_PLANE=auto | nats | off |
| --- | --- | --- | --- |
| nats | NATS | NATS | off |
| tcp | NATS where NATS_SERVER is set, else off | NATS | off |
| http | off | NATS | off |

Off means: no connection is made and nothing is sent; what would have been sent is dropped at once, and one DEBUG line
for each says so. Gauges and pull work in each mode, so nobody who publishes or polls asks for the mode.
"""

from __future__ import annotations

import logging
import random
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from rkmetrics.catalogue.kv import EventOutcome, KvCache, KvPublishing, MessageOutcome, Nats
from rkmetrics.errors import KvValueError
from rkmetrics.kv.base import MetricsSink, WorkerKey
from rkmetrics.kv.gauges import KindGauges
from rkmetrics.kv.page import LatestMetrics
from rkmetrics.lifetime import PROCESS, Hooks

if TYPE_CHECKING:
    from rkmetrics.kv.events import RouterEvent
    from rkmetrics.kv.nats.events import LocalEvents, StreamEvents
    from rkmetrics.kv.nats.jetstream import Troubles
    from rkmetrics.kv.nats.metrics import NatsMetricsSink
    from rkmetrics.kv.nats.service import ServiceEndpoint, ServiceStats
    from rkmetrics.kv.nats.thread import LinkThread
    from rkmetrics.nats_link import Link
    from rkmetrics.registry import Registry
    from rkmetrics.settings import Settings

__all__ = ["DOCUMENT", "EventSink", "KvPlane", "why_without_nats"]

log = logging.getLogger("rkmetrics.kv")

#: The name under which a registry has its workers' latest states, for the route of the same name.
DOCUMENT = "kv_metrics"
CLOSE_SECONDS = 3.0

NO_METRICS = "Skipping NATS metrics publishing for KV metrics - %s (worker_id: %d)"
NO_EVENTS = "Skipping NATS publishing of KV events - %s (worker_id: %d)"
NO_SERVICE = "Skipping NATS service metrics collection for '%s' - %s"
NO_LISTENING = "Skipping NATS subscription to KV metrics - %s; poll /kv_metrics instead"
NO_ROUTER_TASK = "Skipping the KV router's background task - %s; only instances are watched"


class EventSink(Protocol):
    """Where KV events go."""

    def offer(self, make: Callable[[], RouterEvent]) -> None:
        """Take an event, in the order of the calls; waits for nothing. It is made only where somebody wants it, and
        what `make` raises reaches the caller, as does KvValueError for an event that no wire can carry."""

    def close(self) -> None:
        """No more events come; what waits may be sent for a while."""

    def retire(self) -> None:
        """The same, and nobody waits for it: for finalisers."""


def why_without_nats(settings: Settings) -> str | None:
    """Return why NATS is left alone; None where it is used."""
    if settings.kv_plane == "off":
        return "KV plane is 'off'"
    mode, named = settings.request_plane, settings.nats_server is not None
    if settings.kv_plane == "nats" or mode == "nats" or (mode == "tcp" and named):
        return None
    return f"request plane mode is '{mode}'" + (" and NATS_SERVER is not set" if mode == "tcp" else "")


class KvPlane:
    """What the publishers of one registry share. `KvPlane.of(registry)` is the one of a registry.

    worker_id: what this process calls itself where nobody names it; new in a forked child.
    """

    def __init__(self, registry: Registry) -> None:
        self.settings = registry.settings
        self.without_nats = why_without_nats(registry.settings)
        self.latest = LatestMetrics()
        self._bind_kind: Callable[[str], KvCache] = lambda name: registry.bind(KvCache, actor_name=name)
        self._cells = registry.bind(KvPublishing)
        self._nats_cells: Callable[[], Nats] = lambda: registry.bind(Nats)
        self._kinds: dict[str, KindGauges] = {}
        self._services: dict[str, ServiceStats] = {}
        self._metrics: NatsMetricsSink | None = None
        self._thread: LinkThread | None = None
        self._troubles: dict[str, Troubles] = {}
        self._owners: dict[WorkerKey, object] = {}
        self._said: set[str] = set()
        self._lock = threading.RLock()  # of what is made for NATS; new in a forked child
        self.worker_id = _random_id()
        self._attached = False

    @classmethod
    def of(cls, registry: Registry) -> KvPlane:
        """The plane of a registry, made when it is first asked for."""
        plane = registry.part(cls)
        if not plane._attached:
            plane._attach(registry)
        return plane

    def _attach(self, registry: Registry) -> None:
        """Be seen by the registry and by forks. Not when it is made: of two threads that make one, one's is dropped."""
        registry.offer_document(DOCUMENT, self.latest)
        registry.add_refresher(self._refresh)
        with self._lock:
            if not self._attached:
                _watch_forks(self)
            self._attached = True

    # --- what publishers are handed -----------------------------------------------------------------------------------

    def kind(self, actor_name: str) -> KindGauges:
        """The gauges of one kind of worker."""
        cells = self._bind_kind(actor_name)  # admitted, or "__other__"
        return self._kinds.get(cells.actor_name) or self._kinds.setdefault(cells.actor_name, KindGauges(cells))

    def _refresh(self) -> None:
        for kind in list(self._kinds.values()):
            kind.refresh()

    def metrics_sink(self, worker_id: int) -> MetricsSink | None:
        """Where a worker's states go beside gauges and pull; None in a mode without."""
        if self.without_nats is not None:
            self.skip(NO_METRICS, self.without_nats, worker_id)
            return None
        with self._lock:
            if self._metrics is None:
                from rkmetrics.kv.nats.metrics import NatsMetricsSink

                thread = self._link_thread("KV metrics over NATS")
                self._metrics = NatsMetricsSink(self.settings.namespace, self.settings.wire, self._cells, thread.start)
                thread.add(self._metrics)
            return self._metrics

    def event_sink(self, worker_id: int, component: str, *, local_indexer: bool, queue_events: int) -> EventSink:
        """Where a worker's events go."""
        if self.without_nats is not None:
            self.skip(NO_EVENTS, self.without_nats, worker_id)
            return _Discard(self._cells)
        from rkmetrics.kv.nats.events import LocalEvents, StreamEvents

        with self._lock:
            thread = self._link_thread("KV events over NATS")
        settings = self.settings
        place = settings.namespace, component, settings.wire
        rider: StreamEvents | LocalEvents
        if local_indexer:
            rider = LocalEvents(*place, self._cells, queue_events, thread.start)
        else:
            rider = StreamEvents(*place, self._cells, queue_events, thread.start, self._troubles)
        thread.add(rider)
        return _OverNats(rider, thread)

    def service_endpoint(
        self, component: str, name: str, instance_id: int, data: Callable[[], bytes | None] | None = None
    ) -> ServiceEndpoint | None:
        """An endpoint in the statistics of a component's NATS service; None except in nats mode."""
        service = f"{self.settings.namespace}_{component}"
        why = self.without_nats
        if why is None and self.settings.request_plane != "nats":
            why = f"request plane mode is '{self.settings.request_plane}'"
        if why is not None:
            self.skip(NO_SERVICE, service, why)
            return None
        with self._lock:
            if component not in self._services:
                from rkmetrics.kv.nats.service import ServiceStats

                thread = self._link_thread("the NATS service protocol")
                self._services[component] = ServiceStats(self.settings.namespace, component, self._cells)
                thread.add(self._services[component])
        return self._services[component].endpoint(name, instance_id, data)

    def link(self, name: str, feature: str) -> Link:
        """A connection for who listens, in the listener's own event loop."""
        from rkmetrics.nats_link import Link, NatsOptions, require_nats

        require_nats(feature)
        return Link(NatsOptions.from_settings(self.settings), self._nats_cells(), name=name)

    def skip(self, text: str, *parts: object) -> None:
        """Say once that something is left out because of the mode."""
        line = text % parts
        if line not in self._said and len(self._said) < 1_000:
            self._said.add(line)
            log.debug("%s", line)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _link_thread(self, feature: str) -> LinkThread:
        if self._thread is None:
            from rkmetrics.kv.nats.thread import LinkThread
            from rkmetrics.nats_link import require_nats

            require_nats(feature)
            self._thread = LinkThread(lambda: self.link("publisher", feature))
        return self._thread

    def claim(self, key: WorkerKey, owner: object) -> None:
        """Have one owner for each worker and rank. Raises KvValueError where another one publishes it."""
        if self._owners.setdefault(key, owner) is not owner:
            raise KvValueError(
                "worker_id, dp_rank",
                tuple(key),
                "a worker that no other publisher here publishes; give each its own id",
            )

    def withdraw(self, key: WorkerKey, kind: KindGauges) -> None:
        """A worker ended."""
        self._owners.pop(key, None)
        kind.withdraw(key)
        self.latest.withdraw(key)
        if self._metrics is not None:
            self._metrics.withdraw(key)

    def go_on_in_child(self) -> None:
        """In a forked child: the parent's workers are not its own, and neither is its name."""
        self._lock = threading.RLock()
        self._owners.clear()
        self.worker_id = _random_id()
        self.latest.renew()
        for kind in self._kinds.values():
            kind.forget()

    @property
    def sent(self) -> int:
        """How many states and events NATS has got from here."""
        return int(self._cells.messages[MessageOutcome.SENT].value + self._cells.events[EventOutcome.SENT].value)

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> bool:
        """Send what waits, within the time, and leave NATS; whether that ended well. Gauges and pull go on."""
        return self._thread is None or self._thread.stop(timeout_seconds)


def _random_id() -> int:
    return random.SystemRandom().getrandbits(63)


def _watch_forks(plane: KvPlane) -> None:
    """Tell a plane when it is in a forked child, without keeping it alive."""
    known = weakref.ref(plane)

    def go_on_in_child() -> None:
        found = known()
        if found is not None:
            found.go_on_in_child()

    unhook = PROCESS.add(Hooks(_nothing, _nothing, go_on_in_child))
    weakref.finalize(plane, unhook)


def _nothing(_: float) -> bool:
    """At exit there is nothing to do: who has a thread says so for itself."""
    return True


class _Discard:
    """Takes events and drops them, as http mode wants it; they are not even made, which takes hashes of tokens."""

    def __init__(self, cells: KvPublishing) -> None:
        self._count = cells.events[EventOutcome.DISCARDED]

    def offer(self, make: Callable[[], RouterEvent]) -> None:
        self._count.inc()

    def close(self) -> None:
        """Nothing waits."""

    def retire(self) -> None:
        """Nothing waits."""


class _OverNats:
    """A rider of the link thread as a sink."""

    def __init__(self, rider: StreamEvents | LocalEvents, thread: LinkThread) -> None:
        self._rider, self._thread = rider, thread

    def offer(self, make: Callable[[], RouterEvent]) -> None:
        self._rider.offer(make())

    def close(self) -> None:
        self._thread.remove(self._rider, CLOSE_SECONDS)
        self._rider.close()

    def retire(self) -> None:
        self._thread.retire(self._rider, CLOSE_SECONDS, self._rider.close)
