"""Request planes: calls as clients see them, what servers make of them, who is refused, and whom routers choose."""

from __future__ import annotations

from rkmetrics.catalogue.planes import (
    CallOutcome,
    InstanceState,
    IntakeRefusal,
    RpcCalling,
    RpcIntake,
    RpcRouting,
    RpcServing,
    ServeOutcome,
)
from tools.dashboards.base import Board, Row, heatmap, lines, stat
from tools.dashboards.queries import (
    Not,
    Source,
    buckets,
    either,
    highest,
    increase,
    lowest,
    quantile,
    rate,
    share,
    total,
)

__all__ = ["BOARD"]

CALLS, REQUESTS = RpcCalling.calls, RpcServing.requests
# What is nobody's fault: an end that was reached, or one that the caller chose.
GOOD_CALLS = either(CallOutcome.OK, CallOutcome.CANCELLED)
BAD_REQUESTS = either(ServeOutcome.ERROR, ServeOutcome.NO_WAY_HOME, ServeOutcome.CUT_OFF)
GREEN_ABOVE = ((0.95, "orange"), (0.99, "green"))
NO_CLIENT, NO_SERVER = "Empty where nothing is called.", "Empty where nothing is served."
NO_ROUTER = "Empty where there is no router."


def _quantiles(metric: Source) -> tuple[tuple[str, str], ...]:
    names = {0.5: "median", 0.95: "95th percentile", 0.99: "99th percentile"}
    return tuple((quantile(q, metric), name) for q, name in names.items())


NOW = Row(
    "Now",
    (
        stat(
            "Calls without error",
            "percentunit",
            "Calls that ended well or that their caller gave up, of all within the time that the dashboard shows. A "
            "router that asks a second instance makes a second call. Empty while nothing is called.",
            (share(increase(CALLS, outcome=GOOD_CALLS), increase(CALLS)), "without error"),
            width=4,
            base="red",
            steps=GREEN_ABOVE,
            no_value="no calls",
        ),
        stat(
            "Requests without error",
            "percentunit",
            "Requests that servers took and whose handler did not raise, whose caller could be reached, and that the "
            "server did not leave, of all within the time that the dashboard shows. Empty while nothing is served.",
            (share(increase(REQUESTS, outcome=Not(BAD_REQUESTS)), increase(REQUESTS)), "without error"),
            width=4,
            base="red",
            steps=GREEN_ABOVE,
            no_value="no requests",
        ),
        stat(
            "Instances with traffic",
            "short",
            "Instances that are up and not busy, of the component and at the router that has the fewest. Routers of "
            "the same component should agree. Empty where there is no router.",
            (lowest(RpcRouting.instances, state=InstanceState.UP), "up"),
            width=4,
            base="red",
            steps=((1, "green"),),
            no_value="no router",
        ),
        stat(
            "Calls turned away",
            "short",
            "Calls that no instance could take, within the time that the dashboard shows: none was there, or all were "
            "busy. Empty where there is no router.",
            (f"round({increase(RpcRouting.rejections)})", "turned away"),
            width=4,
            steps=((1, "red"),),
            no_value="no router",
        ),
        stat(
            "Requests refused",
            "short",
            "Requests that reached no handler, within the time that the dashboard shows, but for those that came to a "
            "server which was about to end. Empty where nothing is served.",
            (f"round({increase(RpcIntake.refused, reason=Not(IntakeRefusal.DRAINING))})", "refused"),
            width=4,
            steps=((1, "orange"), (100, "red")),
            no_value="no server",
        ),
        stat(
            "No way home",
            "short",
            "Requests whose caller took no connection, within the time that the dashboard shows: an answer is a "
            "connection from the server back to the caller. Empty where nothing is served.",
            (f"round({increase(REQUESTS, outcome=ServeOutcome.NO_WAY_HOME)})", "no way home"),
            width=4,
            steps=((1, "orange"), (100, "red")),
            no_value="no server",
        ),
    ),
)

CALLING = Row(
    "Calls",
    (
        lines(
            "Calls by outcome",
            "reqps",
            "Calls that end, per second and by how. What was not delivered, a router makes again elsewhere: it counts "
            f"as a second call. cancelled is the caller's own will. {NO_CLIENT}",
            (rate(CALLS, "outcome"), "{{outcome}}"),
        ),
        lines(
            "Calls that fail",
            "percentunit",
            "Calls that neither ended well nor were given up by their caller, of all that ended, by the component that "
            "is called. Empty while nothing is called.",
            (
                share(rate(CALLS, "actor_name", outcome=Not(GOOD_CALLS)), rate(CALLS, "actor_name")),
                "{{actor_name}}",
            ),
            full=False,
        ),
        lines(
            "Calls in flight",
            "short",
            f"Calls that wait for an answer or its end, by the component that is called. {NO_CLIENT}",
            (total(RpcCalling.in_flight, "actor_name"), "{{actor_name}}"),
        ),
        lines(
            "Time to the first item",
            "s",
            "Time from a call to the first item of its answer. Of a language model it is the time to the first token. "
            "Empty while nothing is called.",
            *_quantiles(RpcCalling.first_item),
        ),
        lines(
            "Time of a call",
            "s",
            "Time from a call to the end of its answer, however it ended. Empty while nothing is called.",
            *_quantiles(RpcCalling.duration),
        ),
        lines(
            "Slow first items by component",
            "s",
            "95th percentile of the time to the first item, by the component that is called. Far above the time that "
            "servers need is a queue or the network between. Empty while nothing is called.",
            (quantile(0.95, RpcCalling.first_item, "actor_name"), "{{actor_name}}"),
        ),
        lines(
            "Calls by plane",
            "reqps",
            "Calls that end, per second, by how requests travel. Two lines are a move from one plane to another. Empty "
            "while nothing is called.",
            (f"{rate(CALLS, 'plane')} > 0", "{{plane}}"),
            width=12,
        ),
        lines(
            "Items received",
            "ops",
            f"Items of answers that callers took, per second, by the component that is called. {NO_CLIENT}",
            (rate(RpcCalling.items, "actor_name"), "{{actor_name}}"),
            width=12,
        ),
    ),
)

ROUTING = Row(
    "Routing",
    (
        lines(
            "Instances by state",
            "short",
            "What routers think of the instances that they know, by component; of several routers the highest number. "
            f"down is asked again as soon as it gives a sign of life, busy when it has room. {NO_ROUTER}",
            (highest(RpcRouting.instances, "actor_name", "state"), "{{actor_name}} {{state}}"),
        ),
        lines(
            "Instances up at each router",
            "short",
            "Instances that get calls, as each router sees it. Lines of one component that part mean that a router is "
            f"cut off from some instances. {NO_ROUTER}",
            (
                lowest(RpcRouting.instances, "instance", "actor_name", state=InstanceState.UP),
                "{{actor_name}} {{instance}}",
            ),
        ),
        lines(
            "Probes of instances that are down",
            "cps",
            f"Looks for a sign of life per second, by whether there was one. None is right. {NO_ROUTER}",
            (rate(RpcRouting.probes, "outcome"), "{{outcome}}"),
        ),
        lines(
            "Choices by mode",
            "cps",
            f"Choices of an instance per second, by how it was chosen. {NO_ROUTER}",
            (rate(RpcRouting.picks, "mode"), "{{mode}}"),
        ),
        lines(
            "Calls made again, or turned away",
            "cps",
            "Calls per second that a router made again elsewhere, as nothing had been delivered, and those that nobody "
            f"could take: none was there, or all were busy. {NO_ROUTER}",
            (rate(RpcRouting.retries), "made again"),
            (rate(RpcRouting.rejections, "reason"), "turned away: {{reason}}"),
        ),
        lines(
            "Prompts that the chosen worker holds",
            "percentunit",
            "Blocks of prompts that the chosen worker held already, of all that were routed by overlap, by component. "
            "Far below the prefix cache hits of the workers, the router knows too little. Empty where nobody routes by "
            "KV cache.",
            (
                share(rate(RpcRouting.overlap_blocks, "actor_name"), rate(RpcRouting.prompt_blocks, "actor_name")),
                "{{actor_name}}",
            ),
        ),
    ),
)

SERVING = Row(
    "Serving",
    (
        lines(
            "Requests by outcome",
            "reqps",
            "Requests that servers took, per second, by how their answer ended. stopped and killed are the caller's "
            f"own will, or its end; cut_off ones were left by a server that stopped. {NO_SERVER}",
            (rate(REQUESTS, "outcome"), "{{outcome}}"),
        ),
        lines(
            "Requests that fail",
            "percentunit",
            "Requests whose handler raised, whose caller could not be reached, or that the server left, of all that "
            "ended, by component. Empty while nothing is served.",
            (
                share(rate(REQUESTS, "actor_name", outcome=BAD_REQUESTS), rate(REQUESTS, "actor_name")),
                "{{actor_name}}",
            ),
            full=False,
        ),
        lines(
            "Requests being answered",
            "short",
            "Requests whose handler runs, by component. A line that only rises is a handler that does not end. "
            f"{NO_SERVER}",
            (total(RpcServing.in_flight, "actor_name"), "{{actor_name}}"),
        ),
        lines(
            "Time of an answer",
            "s",
            "Time from a request to the end of its answer, as servers see it. Empty while nothing is served.",
            *_quantiles(RpcServing.duration),
        ),
        lines(
            "Slow answers by component",
            "s",
            "99th percentile of the time to the end of an answer, by component. Empty while nothing is served.",
            (quantile(0.99, RpcServing.duration, "actor_name"), "{{actor_name}}"),
        ),
        lines(
            "Items sent",
            "ops",
            f"Items of answers per second, by component. {NO_SERVER}",
            (rate(RpcServing.items, "actor_name"), "{{actor_name}}"),
        ),
        heatmap(
            "Times of answers",
            "s",
            "How long answers take, all components together. Empty while nothing is served.",
            buckets(RpcServing.duration),
        ),
        lines(
            "Bytes of requests and answers",
            "Bps",
            f"Bytes per second that servers take and send, without those of the transport. {NO_SERVER}",
            (rate(RpcServing.request_bytes), "requests"),
            (rate(RpcServing.response_bytes), "answers"),
            width=12,
        ),
    ),
)

INTAKE = Row(
    "Intake",
    (
        lines(
            "Refusals by reason",
            "reqps",
            "Requests that reached no handler, per second. draining is a server that ends; malformed, forbidden, "
            f"too_slow and flood are strangers, or peers of another version. {NO_SERVER}",
            (rate(RpcIntake.refused, "reason"), "{{reason}}"),
        ),
        lines(
            "Refusals by process",
            "reqps",
            "The same by process. One line above the others is one server whose clients are told something wrong. "
            f"{NO_SERVER}",
            (rate(RpcIntake.refused, "instance"), "{{instance}}"),
        ),
        lines(
            "Connections from callers",
            "short",
            f"Connections on which requests come, by process and plane. {NO_SERVER}",
            (total(RpcIntake.connections, "instance", "plane"), "{{plane}} {{instance}}"),
        ),
    ),
)

BOARD = Board(
    "planes",
    "Request planes",
    "Calls as clients and servers see them, who is refused, and whom routers choose. Runbook: docs/runbooks/planes.md.",
    (NOW, CALLING, ROUTING, SERVING, INTAKE),
    actors=(REQUESTS.definition, CALLS.definition),
    actors_label="Component",
)
