"""Discovery and backends: balancers and their pools, those who announce themselves, keys in etcd, vitals of nodes."""

from __future__ import annotations

from rkmetrics.catalogue.announcing import Announcing
from rkmetrics.catalogue.discovery import BackendState, Balancing
from rkmetrics.catalogue.etcd import Etcd
from rkmetrics.catalogue.node import Node
from tools.dashboards.base import Board, Row, lines, stat, timeline
from tools.dashboards.queries import highest, lowest, quantile, rate, series, share, total

__all__ = ["BOARD"]

DOWN = series(Balancing.backends, state=BackendState.DOWN)

NOW = Row(
    "Now",
    (
        stat(
            "Backends with traffic",
            "short",
            "Backends in the pool of the balancer that has the fewest. Balancers that are asked by the same backends "
            "should agree. Empty where there is no balancer.",
            (lowest(Balancing.pool), "pool"),
            base="red",
            steps=((1, "green"),),
            no_value="no balancer",
        ),
        stat(
            "Share that is down",
            "percentunit",
            "Backends that are known and miss their checks, of all that are known, at the balancer where it is "
            "highest. Dead ones are forgotten 90 s after their last announcement. Empty where there is no balancer.",
            (
                f"max({DOWN} / ignoring (state) (sum without (state) ({series(Balancing.backends)}) > 0))",
                "down",
            ),
            steps=((0.05, "orange"), (0.2, "red")),
            no_value="no balancer",
        ),
        stat(
            "Panic",
            "bool_yes_no",
            "Yes while more than half of a balancer's pool is silent: it lists them all the same, as the fault may be "
            "its own. Empty where there is no balancer.",
            (highest(Balancing.panic), "panic"),
            low=None,
            steps=((1, "red"),),
            no_value="no balancer",
        ),
        stat(
            "Not known where they should be",
            "short",
            "Announcements that balancers did not take, and keys that are not in etcd, over all processes. Empty where "
            "nothing is announced or no etcd is used.",
            (f"sum({series(Announcing.balancers_wanted)} - {series(Announcing.balancers)})", "announcements"),
            (f"sum({series(Etcd.keys_wanted)} - {series(Etcd.keys)})", "etcd keys"),
            low=None,
            steps=((1, "red"),),
            no_value="not used",
            names=True,
        ),
    ),
)

POOL = Row(
    "Pool",
    (
        lines(
            "Pool of each balancer",
            "short",
            "Backends that get traffic, as each balancer sees it. Lines that part mean that a balancer is cut off from "
            "some backends. Empty where there is no balancer.",
            (lowest(Balancing.pool, "instance"), "{{instance}}"),
        ),
        lines(
            "Backends by state",
            "short",
            "What balancers think of the backends that they know, and how many they keep out for longer because they "
            "come and go. Of several balancers the highest number. Empty where there is no balancer.",
            (highest(Balancing.backends, "state"), "{{state}}"),
            (highest(Balancing.damped), "kept out: come and go"),
        ),
        lines(
            "Departures",
            "cps",
            "Backends that left a pool, per second and by reason, over all balancers. Deployments show as removed or "
            "not_ready, crashes as unreachable. Empty where there is no balancer.",
            (rate(Balancing.departures, "reason"), "{{reason}}"),
        ),
    ),
)

CHECKS = Row(
    "Checks",
    (
        lines(
            "Health checks",
            "cps",
            "Checks of backends per second, by how they ended. Only ready keeps a backend in the pool; unauthorized is "
            "a token that was changed on one side only. Empty where there is no balancer.",
            (rate(Balancing.checks, "outcome"), "{{outcome}}"),
            width=12,
        ),
        lines(
            "Time of a check",
            "s",
            "Time from a health check to its answer, over all balancers: half of them are faster than the median, one "
            "in a hundred is slower than the 99th percentile. Empty where nothing is checked.",
            (quantile(0.5, Balancing.check_duration), "median"),
            (quantile(0.99, Balancing.check_duration), "99th percentile"),
            width=12,
        ),
    ),
)

REGISTRATIONS = Row(
    "Registrations",
    (
        lines(
            "Registrations at balancers",
            "cps",
            "Registrations and their ends per second, by what became of them. refreshed is the beat of a healthy "
            "fleet; forbidden, conflict, full and limited are refusals. Empty where there is no balancer.",
            (rate(Balancing.registrations, "outcome"), "{{outcome}}"),
        ),
        lines(
            "Announcements of backends",
            "cps",
            "The same from the other side: announcements per second as the backends see them end. Empty where none "
            "announces itself.",
            (rate(Announcing.announcements, "outcome"), "{{outcome}}"),
        ),
        lines(
            "Rounds at etcd",
            "cps",
            "Rounds of renewing leases and looking after keys, per second and by how they ended. Empty where etcd is "
            "not used.",
            (rate(Etcd.steps, "outcome"), "{{outcome}}"),
        ),
    ),
)

VITALS = Row(
    "Vitals of nodes",
    (
        timeline(
            "Readiness",
            "short",
            "Whether each node takes traffic, as it says itself. What balancers make of it is above.",
            (lowest(Node.ready, "instance"), "{{instance}}"),
            values=(("0", "not ready", "red"), ("1", "ready", "green")),
        ),
        lines(
            "Requests in progress",
            "short",
            "Requests that applications have begun and not ended, by node, and requests that wait before they are "
            "tried again. Empty where no application says so.",
            (total(Node.requests_in_progress, "instance"), "{{instance}}"),
            (total(Node.backoff_requests, "instance"), "to be tried again, {{instance}}"),
        ),
        lines(
            "Responses",
            "reqps",
            "Requests that ended, per second and by how they did.",
            (rate(Node.responses, "outcome"), "{{outcome}}"),
        ),
        lines(
            "Peers",
            "short",
            "Peers that each node is connected to. Empty where applications say nothing of them.",
            (total(Node.connected_peers, "instance"), "{{instance}}"),
        ),
        lines(
            "CPU of nodes",
            "percentunit",
            "CPU time in use, of all that the node may use: the machine's, or the container's share of it.",
            (highest(Node.cpu_usage, "instance"), "{{instance}}"),
        ),
        lines(
            "Memory of nodes",
            "percentunit",
            "Memory in use, of all that the node may use: the machine's, or the container's share of it.",
            (highest(Node.memory_usage, "instance"), "{{instance}}"),
            full=False,
        ),
        lines(
            "GPUs of nodes",
            "percentunit",
            "Time that the GPUs of a node were busy, their mean. Empty where there is none.",
            (highest(Node.gpu_usage, "instance"), "{{instance}}"),
        ),
    ),
)

BALANCERS = Row(
    "Balancers at work",
    (
        lines(
            "Places taken",
            "percentunit",
            "Backends that a balancer knows, of those that it can know. At 1 it refuses new ones. Empty where there is "
            "no balancer.",
            (
                share(total(Balancing.backends, "instance"), total(Balancing.backends_limit, "instance")),
                "{{instance}}",
            ),
            full=False,
        ),
        lines(
            "Checks under way",
            "short",
            "Checks that wait for an answer, and those that are due and wait for a place. Empty where there is no "
            "balancer.",
            (highest(Balancing.checks_in_flight, "instance"), "in flight {{instance}}"),
            (highest(Balancing.checks_waiting, "instance"), "waiting {{instance}}"),
        ),
        lines(
            "Oldest check of the pool",
            "s",
            "Time since the check that is the longest ago, among backends that get traffic. Above two intervals, the "
            "balancer does not keep up. Empty where there is no balancer, or nothing gets traffic.",
            (highest(Balancing.oldest_check_age, "instance"), "{{instance}}"),
        ),
        lines(
            "Forgotten and withdrawn",
            "cps",
            "Dead backends that balancers forgot, and announcements that backends took back at their end, per second. "
            "Forgotten ones ended without a word. Empty where there is neither.",
            (rate(Balancing.expired), "forgotten"),
            (rate(Announcing.withdrawals, "outcome"), "withdrawn: {{outcome}}"),
            width=12,
        ),
        lines(
            "Time since a balancer took an announcement",
            "s",
            "By process. Above two or three intervals of announcing, no balancer hears it. Empty where none announces "
            "itself.",
            (f"max by (instance) (time() - {series(Announcing.last_success)})", "{{instance}}"),
            width=12,
        ),
    ),
)

ETCD = Row(
    "etcd",
    (
        lines(
            "Prefixes that are not followed",
            "short",
            "Prefixes that should be followed and are not up to date, by process. Empty where none is followed.",
            (f"sum by (instance) ({series(Etcd.watches_wanted)} - {series(Etcd.watches)})", "{{instance}}"),
        ),
        lines(
            "Changes that are seen",
            "cps",
            "Changes of keys per second, and times that a watcher listed all keys instead of going on. Empty where "
            "none is followed.",
            (rate(Etcd.events), "changes"),
            (rate(Etcd.resyncs, "reason"), "all keys: {{reason}}"),
        ),
        lines(
            "Leases lost",
            "cps",
            "Leases that ended before the process did, per second: it was away from etcd for too long. Empty where "
            "etcd is not used.",
            (rate(Etcd.leases_lost, "instance"), "{{instance}}"),
        ),
    ),
)

BOARD = Board(
    "backends",
    "Discovery and backends",
    "Balancers and their pools, what announces itself to them, keys in etcd, and vitals of nodes. "
    "Runbook: docs/runbooks/discovery.md.",
    (NOW, POOL, CHECKS, REGISTRATIONS, VITALS, BALANCERS, ETCD),
)
