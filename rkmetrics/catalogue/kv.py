"""KV cache and load of LLM workers: `rkmetrics_kv_*` and `rkmetrics_worker_*`. Declarations only.

Labelled by actor_name, which is the kind of worker (a model, a role such as "prefill"): worker ids are unbounded, and
one worker is looked at through /kv_metrics. The numbers are ForwardPassMetrics of Dynamo (comments name fields), in our
units: ratios are 0 to 1, as Dynamo's "perc" fields are too. Usage comes with the size of its pool, hits with queries:
ratios of sums are right over several workers, means of ratios are not.
"""

from __future__ import annotations

from enum import StrEnum

from rkmetrics.metricset import Counter, Gauge, MetricSet, OneOf

__all__ = ["KvCache", "PublishOutcome"]


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
