"""KV cache and routing: LLM workers, their prefix caches, and the plane that carries their metrics and events."""

from __future__ import annotations

from rkmetrics.catalogue.kv import KvAggregation, KvCache, KvIndexing, KvPublishing, Nats
from tools.dashboards.base import Board, Row, gauge, lines, stat
from tools.dashboards.queries import highest, increase, quantile, rate, series, share, total

__all__ = ["BOARD"]

NOW = Row(
    "Now",
    (
        gauge(
            "KV cache in use",
            "Blocks in use of all blocks, over all workers, and the usage of the fullest worker. Full is no fault by "
            "itself: prefixes are kept as long as there is room.",
            (share(total(KvCache.active_blocks), total(KvCache.blocks)), "all"),
            (highest(KvCache.cache_usage), "fullest worker"),
            width=8,
            steps=((0.8, "orange"), (0.95, "red")),
            no_value="no worker",
        ),
        stat(
            "Prefix cache hits",
            "percentunit",
            "Tokens that were found in the prefix cache, of those that were looked up, over the time that the "
            "dashboard shows. Empty while no prompt came, or where the engine does not count.",
            (share(increase(KvCache.prefix_cache_hits), increase(KvCache.prefix_cache_queries)), "hits"),
            width=8,
            height=6,
            base="text",
            no_value="no queries",
        ),
        stat(
            "Longest silence of a busy worker",
            "s",
            "Time since the last publication, of workers with requests in their slots: a few seconds while all is "
            "well. Empty while all are idle, as idle workers say nothing.",
            (
                f"max(time() - {series(KvCache.last_publish)} and {series(KvCache.request_active_slots)} > 0)",
                "silence",
            ),
            width=8,
            height=6,
            steps=((60, "orange"), (300, "red")),
            no_value="all idle",
        ),
    ),
)

LOAD = Row(
    "Load",
    (
        lines(
            "KV cache usage by process",
            "percentunit",
            "KV cache in use, of the fullest worker of each process and kind. Lines far apart mean that requests are "
            "not spread by cache. Empty where there is no worker.",
            (highest(KvCache.cache_usage, "instance", "actor_name"), "{{actor_name}} {{instance}}"),
            width=12,
        ),
        lines(
            "Slots in use",
            "percentunit",
            "Requests that are being computed, of those that can be computed at once, by kind of worker. Empty where "
            "there is no worker.",
            (
                share(total(KvCache.request_active_slots, "actor_name"), total(KvCache.request_slots, "actor_name")),
                "{{actor_name}}",
            ),
            width=12,
        ),
        lines(
            "Requests waiting",
            "short",
            "Requests that wait for a slot, by kind of worker. Above zero for long means that there are too few "
            "workers. Empty where there is no worker.",
            (total(KvCache.requests_waiting, "actor_name"), "{{actor_name}}"),
            width=12,
        ),
        lines(
            "Prefix cache hits by kind",
            "percentunit",
            "Tokens found in the prefix cache, of those that were looked up, by kind of worker. A fall to nothing is "
            "a restart, or a router that knows no cache; a gap is a time without prompts. Empty while no prompt "
            "comes, or where the engine does not count.",
            (
                share(rate(KvCache.prefix_cache_hits, "actor_name"), rate(KvCache.prefix_cache_queries, "actor_name")),
                "{{actor_name}}",
            ),
            width=12,
        ),
    ),
)

PLANE = Row(
    "KV plane",
    (
        lines(
            "KV events",
            "cps",
            "KV events of publishers per second, by what became of them. dropped makes routers forget a worker's "
            "cache; discarded is right where NATS is not used. Empty where nobody publishes.",
            (rate(KvPublishing.events, "outcome"), "{{outcome}}"),
            width=12,
        ),
        lines(
            "KV events that wait",
            "short",
            "KV events that wait to be sent or acknowledged, by process. At 10,000 for one publisher (or 16 MiB) its "
            "queue is dropped. Empty where NATS is not used.",
            (total(KvPublishing.events_pending, "instance"), "{{instance}}"),
            width=12,
        ),
        lines(
            "NATS connections missing",
            "short",
            "Connections that should stand and do not, by process. Empty where NATS is not used.",
            (
                f"sum by (instance) ({series(Nats.connections_wanted)} - {series(Nats.connections)})",
                "{{instance}}",
            ),
        ),
        lines(
            "Workers at aggregators",
            "short",
            "Workers that aggregators know, by process and by whether they were heard of within their time. Over NATS "
            "an idle worker is stale after a minute, which is no fault. Empty where nobody aggregates.",
            (total(KvAggregation.workers, "instance", "state"), "{{state}} {{instance}}"),
        ),
        lines(
            "Polls of workers",
            "cps",
            "Polls per second by how they ended; ok and unchanged are answers. Empty where nobody polls.",
            (rate(KvAggregation.polls, "outcome"), "{{outcome}}"),
        ),
    ),
)

WORK = Row(
    "Publishing and decoding",
    (
        lines(
            "Publications",
            "cps",
            "States that workers publish, per second, by kind of worker and how it ended. Idle workers publish "
            "nothing. Empty where there is no worker.",
            (rate(KvCache.publish, "actor_name", "outcome"), "{{actor_name}} {{outcome}}"),
        ),
        lines(
            "Messages to NATS",
            "cps",
            "What became of publications at NATS, per second, and requests of the NATS service protocol that were "
            "answered. unchanged ones need not be sent. Empty where nobody publishes.",
            (rate(KvPublishing.messages, "outcome"), "{{outcome}}"),
            (rate(KvPublishing.service_requests), "service requests"),
        ),
        lines(
            "Connecting to NATS",
            "cps",
            "Attempts to connect by how they ended, connections lost, and messages dropped on their way in, per "
            "second. Empty where NATS is not used.",
            (rate(Nats.connects, "outcome"), "connect: {{outcome}}"),
            (rate(Nats.disconnects), "lost"),
            (rate(Nats.dropped), "messages dropped"),
        ),
        lines(
            "Draft tokens that are accepted",
            "percentunit",
            "Tokens of speculative decoding that the model accepted, of those drafted, by kind of worker. Empty where "
            "nothing is drafted.",
            (
                share(
                    rate(KvCache.spec_decode_accepted_tokens, "actor_name"),
                    rate(KvCache.spec_decode_draft_tokens, "actor_name"),
                ),
                "{{actor_name}}",
            ),
            width=12,
        ),
        lines(
            "Tokens per draft",
            "short",
            "Tokens that the model accepted of one draft, in the mean, by kind of worker. Near zero, drafting costs "
            "more than it brings. Empty where nothing is drafted.",
            (
                share(
                    rate(KvCache.spec_decode_accepted_tokens, "actor_name"),
                    rate(KvCache.spec_decode_drafts, "actor_name"),
                ),
                "{{actor_name}}",
            ),
            width=12,
        ),
    ),
)

ROUTING = Row(
    "Routing",
    (
        lines(
            "States received",
            "cps",
            "States of workers that aggregators received, per second, those that were none, and publications that were "
            "never seen. Empty where nobody aggregates.",
            (rate(KvAggregation.reports, "source"), "{{source}}"),
            (rate(KvAggregation.malformed, "source"), "malformed {{source}}"),
            (rate(KvAggregation.missed), "missed"),
        ),
        lines(
            "Oldest state",
            "s",
            "Age of the oldest state among the workers that an aggregator knows. Empty where nobody aggregates.",
            (highest(KvAggregation.oldest_age, "instance"), "{{instance}}"),
        ),
        lines(
            "Time of a poll",
            "s",
            "Time from a poll to its answer: half are faster than the median, one in a hundred is slower than the 99th "
            "percentile. Empty where nobody polls.",
            (quantile(0.5, KvAggregation.poll_duration), "median"),
            (quantile(0.99, KvAggregation.poll_duration), "99th percentile"),
        ),
        lines(
            "Blocks in the index",
            "short",
            "Blocks that a router's index holds, once for each worker that has them, by process. Empty where nobody "
            "routes by cache.",
            (total(KvIndexing.blocks, "instance"), "{{instance}}"),
        ),
        lines(
            "Workers in the index",
            "short",
            "Workers that hold blocks, as a router's index knows them, by process. Empty where nobody routes by cache.",
            (highest(KvIndexing.workers, "instance"), "{{instance}}"),
        ),
        lines(
            "Events at the index",
            "cps",
            "KV events that reached an index, per second, by what became of them, and times that it went on from the "
            "stream after a break. Many orphan ones mean that a beginning was missed. Empty where nobody routes by "
            "cache.",
            (rate(KvIndexing.events, "outcome"), "{{outcome}}"),
            (rate(KvIndexing.resyncs), "went on after a break"),
        ),
    ),
)

BOARD = Board(
    "kv",
    "KV cache and routing",
    "LLM workers: KV caches, request slots, and the plane that carries their metrics and events. "
    "Runbook: docs/runbooks/kv.md.",
    (NOW, LOAD, PLANE, WORK, ROUTING),
    actors=(KvCache.publish.definition,),
    actors_label="Kind of worker",
)
