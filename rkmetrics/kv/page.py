"""The page of a process' workers, at GET /kv_metrics: what is shown there, and how it is read.

    {"runtime":"rkmetrics","incarnation":"9f..","sequence":7,"workers":[
      {"worker_id":1,"dp_rank":0,"sequence":7,"age_seconds":0.02,"data":{ForwardPassMetrics}}]}

The page has an entity tag that changes with each publication, so a poll of an unchanged worker is a 304 of a few header
lines. Ages are in the page and not in the tag: whoever has a state can count its age himself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Generic, NamedTuple, TypeVar

import msgspec

from rkmetrics.cells import Block, CounterCell
from rkmetrics.errors import PayloadError
from rkmetrics.kv.base import U64, Amount, ForwardPassMetrics, Id, KvReport, KvUpdate, WorkerKey, decoded

__all__ = ["PATH", "Document", "LatestMetrics", "Shown", "load_metrics", "read_document", "runtime_stats"]

PATH = "/kv_metrics"
RUNTIME = "rkmetrics"

_Data = TypeVar("_Data")


class Shown(msgspec.Struct, Generic[_Data], frozen=True):
    """One worker on the page. data: its JSON as it is (msgspec.Raw), or ForwardPassMetrics for the reader."""

    worker_id: Id
    dp_rank: Amount
    sequence: Amount
    age_seconds: Annotated[float, msgspec.Meta(ge=0)]
    data: _Data


class Document(msgspec.Struct, Generic[_Data], frozen=True):
    """The page. incarnation: of the process, whose sequences began with it; sequence: grows with each change."""

    runtime: str
    incarnation: Annotated[str, msgspec.Meta(max_length=64)]
    sequence: Amount
    workers: list[Shown[_Data]]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Document[ForwardPassMetrics]).decode


def read_document(data: bytes) -> list[KvReport]:
    """Return what a page says of each worker. Raises PayloadError."""
    document = decoded(_decode, data, "a page of KV metrics")
    if any(worker.worker_id > U64 for worker in document.workers):
        raise PayloadError("a page of KV metrics", data, "a worker_id of more than 64 bits")
    return [_report(worker, document.incarnation) for worker in document.workers]


def _report(worker: Shown[ForwardPassMetrics], incarnation: str) -> KvReport:
    return KvReport(
        WorkerKey(worker.worker_id, worker.dp_rank),
        worker.data.kv_stats.kv_active_blocks,
        worker.data,
        sequence=worker.sequence,
        incarnation=incarnation,
        age_seconds=worker.age_seconds,
    )


class LatestMetrics:
    """The latest state of each worker of this process: a sink for publishers, and the document that the route shows.

    Takes no lock (decision 0016): a state is put down first and counted then, and readers look at the count first. So
    whoever reads between the two has the new state under the old tag, and gets it once more.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.renew()

    def renew(self) -> None:
        """Begin again, as a forked child has to: without workers, in an incarnation of its own."""
        self.incarnation = os.urandom(8).hex()
        self._latest: dict[WorkerKey, tuple[KvUpdate, float]] = {}
        self._changes = CounterCell(Block(bytearray(8)), 0)

    def offer(self, update: KvUpdate) -> None:
        """Take the latest state of a worker."""
        self._latest[update.key] = update, self._clock()
        self._changes.inc()

    def withdraw(self, key: WorkerKey) -> None:
        """Forget a worker that ended."""
        self._latest.pop(key, None)
        self._changes.inc()

    @property
    def version(self) -> int:
        """Grows with each change."""
        return int(self._changes.value)

    def updates(self) -> list[KvUpdate]:
        """The latest state of each worker, in the order of their keys."""
        return [update for update, _ in self._held()]

    def etag(self) -> bytes:
        """Return the entity tag of what is known, with its quotes."""
        return b'"%s-%d"' % (self.incarnation.encode(), self.version)

    def document(self) -> bytes:
        """Return the page."""
        version, now = self.version, self._clock()
        workers = [
            Shown(*update.key, update.sequence, round(max(0.0, now - at), 6), msgspec.Raw(update.data))
            for update, at in self._held()
        ]
        return _encode(Document(RUNTIME, self.incarnation, version, workers))

    def _held(self) -> list[tuple[KvUpdate, float]]:
        return sorted(self._latest.values(), key=_by_key)  # one step: it copies first

    def render(self) -> bytes:
        """Return the page, as a registry's document."""
        return self.document()

    def __repr__(self) -> str:
        return f"<LatestMetrics: {len(self._latest)} workers, version {self.version}>"


def _by_key(held: tuple[KvUpdate, float]) -> WorkerKey:
    return held[0].key


# --- payloads of request planes ---------------------------------------------------------------------------------------


def load_metrics(latest: LatestMetrics, key: WorkerKey | None = None) -> bytes | None:
    """Return ForwardPassMetrics of a worker as JSON, as Dynamo's endpoint `load_metrics` did (up to 0.6.0).

    key: which worker, by default the first. None where it has not published.
    """
    found = [update.data for update in latest.updates() if key is None or update.key == key]
    return found[0] if found else None


class _Load(NamedTuple):
    """All local workers at one moment."""

    metrics: Sequence[ForwardPassMetrics]

    def sum_of(self, read: Callable[[ForwardPassMetrics], float]) -> float:
        return float(sum(map(read, self.metrics)))

    def usage(self) -> float:
        """By the size of the caches; workers that do not say theirs count alike."""
        blocks = self.sum_of(lambda metrics: metrics.kv_stats.kv_total_blocks)
        if not blocks:
            return self.sum_of(lambda metrics: metrics.kv_stats.gpu_cache_usage_perc) / len(self.metrics)
        return (
            self.sum_of(lambda metrics: metrics.kv_stats.gpu_cache_usage_perc * metrics.kv_stats.kv_total_blocks)
            / blocks
        )

    def hit_rate(self) -> float:
        return self.sum_of(lambda metrics: metrics.kv_stats.gpu_prefix_cache_hit_rate) / len(self.metrics)


# Names are the fields of Dynamo; its frontend shows them as dynamo_component_<name>, without labels, and 100 at most.
GAUGES: Mapping[str, Callable[[_Load], float]] = {
    "kv_active_blocks": lambda load: load.sum_of(lambda metrics: metrics.kv_stats.kv_active_blocks),
    "kv_total_blocks": lambda load: load.sum_of(lambda metrics: metrics.kv_stats.kv_total_blocks),
    "gpu_cache_usage_perc": _Load.usage,
    "gpu_prefix_cache_hit_rate": _Load.hit_rate,
    "request_active_slots": lambda load: load.sum_of(lambda metrics: metrics.worker_stats.request_active_slots),
    "request_total_slots": lambda load: load.sum_of(lambda metrics: metrics.worker_stats.request_total_slots),
    "num_requests_waiting": lambda load: load.sum_of(lambda metrics: metrics.worker_stats.num_requests_waiting),
}
GAUGES_LIMIT = 100
SCHEMA_VERSION = 1


def runtime_stats(
    latest: LatestMetrics,
    backend: str,
    *,
    worker_id: str = "",
    gauges: Mapping[str, float] | None = None,
    now: Callable[[], float] = time.time,
) -> str:
    """Return what Dynamo's frontends (0.7 to 0.9) poll at `nim.backend.runtime_stats`: the text of a JSON object.

    On the wire it is a JSON string: a plane encodes the text once more. It is one for all local workers, as a frontend
    asks a random instance and has no labels; without workers it has no gauges of theirs. worker_id: by default that of
    the first worker. gauges: more of them, while there is room (100).
    """
    updates = latest.updates()
    load = _Load([update.metrics for update in updates])
    found = {name: read(load) for name, read in GAUGES.items()} if updates else {}
    found.update(gauges or {})
    document = {
        "schema_version": SCHEMA_VERSION,
        "worker_id": worker_id or (str(updates[0].key.worker_id) if updates else ""),
        "backend": backend,
        "ts": int(now()),
        "metrics": {"gauges": dict(list(found.items())[:GAUGES_LIMIT])},
    }
    return _encode(document).decode()
