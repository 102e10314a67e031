"""KV cache and load of LLM workers, and the plane that carries them: `rkmetrics_kv_*`, `rkmetrics_worker_*`,
`rkmetrics_nats_*`. Declarations only.

Labelled by actor_name, which is the kind of worker (a model, a role such as "prefill"): worker ids are unbounded, and
one worker is looked at through /kv_metrics. The numbers are ForwardPassMetrics of Dynamo (comments name fields), in our
units: ratios are 0 to 1, as Dynamo's "perc" fields are too. Usage comes with the size of its pool, hits with queries:
ratios of sums are right over several workers, means of ratios are not.
"""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.metricset import Counter, Gauge, Histogram, MetricSet, OneOf

__all__ = [
    "ConnectOutcome",
    "EventOutcome",
    "Freshness",
    "IndexOutcome",
    "KvAggregation",
    "KvCache",
    "KvIndexing",
    "KvPublishing",
    "MessageOutcome",
    "Nats",
    "PollOutcome",
    "PublishOutcome",
    "ReportSource",
]


class PublishOutcome(StrEnum):
    """How one publication of a worker's state ends."""

    OK = "ok"
    ERROR = "error"


class KvCache(MetricSet):
    """A kind of LLM worker: its KV cache, its request slots, its speculative decoding."""

    # kv_stats
    active_blocks = Gauge("rkmetrics_kv_active_blocks", "KV cache blocks in use.", across="sum")  # kv_active_blocks
    blocks = Gauge("rkmetrics_kv_blocks", "KV cache blocks in all.", across="sum")  # kv_total_blocks
    cache_usage = Gauge(  # gpu_cache_usage_perc
        "rkmetrics_kv_cache_usage_ratio", "KV cache in use, of the fullest worker.", across="max"
    )
    prefix_cache_hit_ratio = Gauge(  # gpu_prefix_cache_hit_rate
        "rkmetrics_kv_prefix_cache_hit_ratio",
        "Share of looked-up tokens found in the prefix cache, as the engine last said; the counters beside it add up.",
        across="mean",
    )
    prefix_cache_hits = Counter("rkmetrics_kv_prefix_cache_hits_total", "Tokens found in the prefix cache.")
    prefix_cache_queries = Counter("rkmetrics_kv_prefix_cache_queries_total", "Tokens looked up in the prefix cache.")
    last_publish = Gauge(
        "rkmetrics_kv_last_publish_timestamp_seconds",
        "When a worker last published its state, in Unix time; absent until then.",
        across="max",
    )
    publish = Counter(
        "rkmetrics_kv_publish_total",
        "Publications of a worker's state, by how they ended.",
        outcome=OneOf(PublishOutcome),
    )
    # worker_stats
    request_active_slots = Gauge(  # request_active_slots
        "rkmetrics_worker_request_active_slots", "Requests that are being computed.", across="sum"
    )
    request_slots = Gauge(  # request_total_slots
        "rkmetrics_worker_request_slots", "Requests that can be computed at once.", across="sum"
    )
    requests_waiting = Gauge(  # num_requests_waiting
        "rkmetrics_worker_requests_waiting", "Requests that wait for a slot.", across="sum"
    )
    # spec_decode_stats
    spec_decode_drafts = Counter(  # num_drafts
        "rkmetrics_worker_spec_decode_drafts_total", "Drafts of speculative decoding."
    )
    spec_decode_draft_tokens = Counter(  # num_draft_tokens
        "rkmetrics_worker_spec_decode_draft_tokens_total", "Tokens that speculative decoding drafted."
    )
    spec_decode_accepted_tokens = Counter(  # num_accepted_tokens
        "rkmetrics_worker_spec_decode_accepted_tokens_total", "Drafted tokens that the model accepted."
    )


class MessageOutcome(StrEnum):
    """What becomes of a publication on the NATS side."""

    SENT = "sent"
    UNCHANGED = "unchanged"  # nothing changed that Dynamo's publish rule looks at
    COALESCED = "coalesced"  # a newer state of the same worker came before it was sent
    DROPPED = "dropped"  # the server takes no message of that size, or the worker ended while NATS was away


class EventOutcome(StrEnum):
    """What becomes of a KV event."""

    SENT = "sent"  # acknowledged, where it goes to a stream
    DROPPED = "dropped"  # the queue was full, or the server takes no message of that size
    DISCARDED = "discarded"  # NATS is not used
    REPEATED = "repeated"  # sent once more, as the server refused it or said nothing; it is counted as sent too


class KvPublishing(MetricSet, per_actor=False):
    """What goes from this process to the KV plane."""

    messages = Counter(
        "rkmetrics_kv_messages_total",
        "Publications of workers' states, by what became of them at NATS.",
        outcome=OneOf(MessageOutcome),
    )
    events = Counter("rkmetrics_kv_events_total", "KV events, by what became of them.", outcome=OneOf(EventOutcome))
    events_pending = Gauge(
        "rkmetrics_kv_events_pending", "KV events that wait to be sent, or for their acknowledgement.", across="sum"
    )
    service_requests = Counter(
        "rkmetrics_kv_service_requests_total", "Requests of the NATS service protocol ($SRV) that were answered."
    )


class ConnectOutcome(StrEnum):
    """How an attempt to connect ends."""

    OK = "ok"
    UNREACHABLE = "unreachable"
    UNAUTHORIZED = "unauthorized"
    TIMEOUT = "timeout"
    ERROR = "error"


class Nats(MetricSet, per_actor=False):
    """Connections of this process to NATS; nothing of it has a series where NATS is not used."""

    connections = Gauge("rkmetrics_nats_connections", "Connections to NATS that stand.", across="sum")
    connections_wanted = Gauge(
        "rkmetrics_nats_connections_wanted", "Connections to NATS that should stand.", across="sum"
    )
    connects = Counter("rkmetrics_nats_connects_total", "Attempts to connect to NATS.", outcome=OneOf(ConnectOutcome))
    disconnects = Counter("rkmetrics_nats_disconnects_total", "Connections to NATS that were lost.")
    dropped = Counter(
        "rkmetrics_nats_dropped_messages_total", "Messages dropped on their way in, as who listens here was too slow."
    )


class ReportSource(StrEnum):
    """How a worker's state got here."""

    PUSH = "push"
    PULL = "pull"


class Freshness(StrEnum):
    """Whether a worker was heard of within its time."""

    FRESH = "fresh"
    STALE = "stale"


class PollOutcome(StrEnum):
    """How a poll of a worker ends."""

    OK = "ok"
    UNCHANGED = "unchanged"  # 304: nothing was published since
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    UNAUTHORIZED = "unauthorized"  # 401 or 403
    REFUSED = "refused"  # any other status
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    SKIPPED = "skipped"  # not sent: the answer to the one before is not there yet


class KvAggregation(MetricSet, per_actor=False):
    """What this process hears of other processes' workers."""

    workers = Gauge("rkmetrics_kv_workers", "Workers that are known.", across="sum", state=OneOf(Freshness))
    reports = Counter("rkmetrics_kv_reports_total", "States of workers that were received.", source=OneOf(ReportSource))
    malformed = Counter(
        "rkmetrics_kv_malformed_total",
        "Messages and answers that are no state of a worker.",
        source=OneOf(ReportSource),
    )
    missed = Counter(
        "rkmetrics_kv_missed_updates_total", "Publications that were never seen here, by gaps in their sequence."
    )
    oldest_age = Gauge(
        "rkmetrics_kv_oldest_state_age_seconds",
        "Age of the oldest state among the workers that are known.",
        across="max",
    )
    polls = Counter("rkmetrics_kv_polls_total", "Polls of workers, by how they ended.", outcome=OneOf(PollOutcome))
    poll_duration = Histogram(
        "rkmetrics_kv_poll_duration_seconds",
        "Time from a poll to its answer.",
        buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    )


class IndexOutcome(StrEnum):
    """What becomes of an event at the index."""

    APPLIED = "applied"
    ORPHAN = "orphan"  # its parent block is not known, so nobody could ever find it
    UNKNOWN_BLOCK = "unknown_block"  # some of the blocks to remove are not known; the others are removed
    MALFORMED = "malformed"
    REFUSED = "refused"  # the index holds as many blocks as it may


class KvIndexing(MetricSet, per_actor=False):
    """The index of which worker holds which KV cache blocks."""

    blocks = Gauge(
        "rkmetrics_kv_index_blocks", "Blocks in the index, once for each worker that holds them.", across="sum"
    )
    workers = Gauge("rkmetrics_kv_index_workers", "Workers that hold blocks.", across="max")
    events = Counter(
        "rkmetrics_kv_index_events_total", "KV events that reached the index.", outcome=OneOf(IndexOutcome)
    )
    resyncs = Counter("rkmetrics_kv_index_resyncs_total", "Times that the index went on from the stream after a break.")
