from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

import rkmetrics as rk

if TYPE_CHECKING:
    from rkmetrics.bridges.otlp import Pusher
    from tests.bridges.otlp.conftest import Receiver


class Chat(rk.MetricSet):
    messages = rk.Counter("chat_messages_total", "Messages handled.", kind=rk.OneOf("text", "image"))
    members = rk.Gauge("chat_members", "Members in rooms.", across="sum")
    reply = rk.Histogram("chat_reply_duration_seconds", "Time to reply.", buckets=(0.1, 1.0))


def metrics_in(request: Any) -> Iterator[Any]:
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            yield from scope.metrics


def attributes(point: Any) -> dict[str, str]:
    return {item.key: item.value.string_value for item in point.attributes}


def counted(requests: list[Any], name: str) -> list[float]:
    """The values of all points of a sum, in the order of their coming."""
    return [
        point.as_double
        for request in requests
        for metric in metrics_in(request)
        if metric.name == name
        for point in metric.sum.data_points
        if attributes(point).get("kind", "text") == "text"
    ]


def own(registry: rk.Registry, outcome: str) -> float:
    from rkmetrics.catalogue.otlp import Otlp

    return registry.bind(Otlp).exports[outcome].value


def test_a_flush_sends_the_snapshot_with_its_resource(
    receiver: Receiver, push: Callable[..., Pusher], registry: rk.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "lobbies")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,team=chat%20one")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
    lobby = registry.bind(Chat, actor_name="lobby")
    lobby.messages["text"].inc(7)
    lobby.members.set(3)
    lobby.reply.observe(0.5)
    pusher = push(resource={"host.name": "here"})
    assert pusher.flush(10)
    (request,) = receiver.taken
    (resource,) = request.resource_metrics
    (scope,) = resource.scope_metrics
    named = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert named["service.name"] == "lobbies"
    assert named["team"] == "chat one"
    assert named["host.name"] == "here"
    assert named["service.instance.id"] == pusher.instance_id
    assert (scope.scope.name, scope.scope.version) == ("rkmetrics", rk.__version__)
    assert receiver.headers[0]["x-tenant"] == "blue"
    assert counted([request], "chat_messages_total") == [7]
    found = {metric.name: metric for metric in scope.metrics}
    assert found["chat_members"].gauge.data_points[0].as_double == 3
    assert found["chat_reply_duration_seconds"].unit == "s"
    assert list(found["chat_reply_duration_seconds"].histogram.data_points[0].bucket_counts) == [0, 1, 0]
    assert own(registry, "ok") == 1


def test_a_trace_id_arrives_with_the_exemplar(
    receiver: Receiver, push: Callable[..., Pusher], registry: rk.Registry
) -> None:
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    exemplar = {"trace_id": trace, "span_id": span, "actor_id": "room-81f"}
    registry.bind(Chat, actor_name="lobby").reply.observe(0.05, exemplar=exemplar)
    assert push().flush(10)
    (metric,) = (m for m in metrics_in(receiver.taken[0]) if m.name == "chat_reply_duration_seconds")
    (found,) = metric.histogram.data_points[0].exemplars
    assert (found.trace_id.hex(), found.span_id.hex(), found.as_double) == (trace, span, 0.05)
    assert [(item.key, item.value.string_value) for item in found.filtered_attributes] == [("actor_id", "room-81f")]


def test_gzip_is_used_when_the_environment_says_so(
    receiver: Receiver, push: Callable[..., Pusher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    assert push().flush(10)
    if receiver.protocol != "grpc":  # a gRPC server does not show it to the application
        assert receiver.headers[0]["content-encoding"] == "gzip"
    assert list(metrics_in(receiver.taken[0]))


def test_pushes_come_by_themselves_at_the_interval(receiver: Receiver, push: Callable[..., Pusher]) -> None:
    push(interval_seconds=0.05).start()
    assert receiver.wait_sent(4)


def test_what_may_pass_is_tried_again_within_a_flush(receiver: Receiver, push: Callable[..., Pusher]) -> None:
    receiver.script.extend([503, 504])
    assert push().flush(30)
    assert len(receiver.sent) == 3
    waits = [b - a for a, b in zip(receiver.times, receiver.times[1:], strict=False)]
    assert all(wait >= least for wait, least in zip(waits, (0.8, 1.6), strict=True))


@pytest.mark.parametrize(
    ("step", "outcome"),
    [(400, "rejected"), (401, "refused"), (404, "refused"), (500, "refused")],
)
def test_what_cannot_pass_is_not_tried_again(
    step: Any, outcome: str, receiver: Receiver, push: Callable[..., Pusher], registry: rk.Registry
) -> None:
    receiver.script.append(step)
    pusher = push()
    assert not pusher.flush(10)
    assert len(receiver.sent) == 1
    assert own(registry, outcome) == 1
    assert pusher.flush(10)


def test_rejected_points_are_counted(receiver: Receiver, push: Callable[..., Pusher], registry: rk.Registry) -> None:
    from rkmetrics.catalogue.otlp import Otlp

    receiver.script.extend(["partial", "advice", 400])
    pusher = push()
    rejected = registry.bind(Otlp).points_rejected
    assert pusher.flush(10)
    assert (own(registry, "partial"), rejected.value) == (1, 3)
    assert pusher.flush(10)
    assert own(registry, "ok") == 1
    assert not pusher.flush(10)
    assert rejected.value > 10


def test_retry_after_is_kept_over_flushes(receiver: Receiver, push: Callable[..., Pusher]) -> None:
    receiver.script.append((429, 2))
    pusher = push()
    assert not pusher.flush(0.5)
    assert not pusher.flush(0.5)
    assert len(receiver.sent) == 1
    assert pusher.flush(10)
    assert receiver.times[1] - receiver.times[0] >= 2


def test_a_grpc_resource_exhausted_without_retry_info_is_final(
    receive: Callable[[str], Receiver], push: Callable[..., Pusher], registry: rk.Registry
) -> None:
    receiver = receive("grpc")
    receiver.script.append(429)
    assert not push().flush(10)
    assert own(registry, "refused") == 1


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        ("html", "garbage"),
        ("junk body", "garbage"),
        ("words", "ok"),
        (301, "refused"),
        ("endless", "garbage"),
        ("garbage", "unanswered"),
        ("reset", "unanswered"),
        ("drip", "unanswered"),
        ("hang", "unanswered"),
    ],
)
def test_whatever_an_http_server_does_has_an_outcome(
    step: Any, outcome: str, receive: Callable[[str], Receiver], push: Callable[..., Pusher], registry: rk.Registry
) -> None:
    receiver = receive("http")
    receiver.script.append(step)
    pusher = push(timeout_seconds=0.5)
    pusher.flush(1.2)
    assert receiver.wait_sent(1)
    assert own(registry, outcome) >= 1
    assert pusher.flush(20)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_nobody_listening_is_unavailable_until_somebody_does(
    kind: str, receive: Callable[[str], Receiver], push: Callable[..., Pusher], registry: rk.Registry
) -> None:
    receiver = receive(kind)
    receiver.close()
    pusher = push()
    assert not pusher.flush(1)
    assert own(registry, "unavailable") >= 1
    assert own(registry, "unanswered") == 0


def test_shutdown_is_bounded_while_the_receiver_hangs(receiver: Receiver, push: Callable[..., Pusher]) -> None:
    receiver.script.append("hang")
    pusher = push(timeout_seconds=60)
    assert not pusher.flush(0.2)
    began = time.monotonic()
    assert not pusher.shutdown(1)
    assert time.monotonic() - began < 5
    assert not any(thread.name == "rkmetrics-otlp" for thread in threading.enumerate())


def test_shutdown_pushes_a_last_time(receiver: Receiver, push: Callable[..., Pusher], registry: rk.Registry) -> None:
    pusher = push().start()
    registry.bind(Chat, actor_name="lobby").messages["text"].inc()
    assert pusher.shutdown()
    assert counted(receiver.taken, "chat_messages_total") == [1]
    assert not pusher.flush(1)
    pusher.start()
    assert len(receiver.sent) == 1


def test_shutdown_tries_again_when_the_receiver_was_well(receiver: Receiver, push: Callable[..., Pusher]) -> None:
    receiver.script.append(503)
    assert push().start().shutdown(10)
    assert len(receiver.sent) == 2


def test_deltas_add_up_to_what_was_counted(
    receiver: Receiver, push: Callable[..., Pusher], registry: rk.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "DELTA")
    cell = registry.bind(Chat, actor_name="lobby").messages["text"]
    pusher = push()
    receiver.script.extend(["ok", 401, (429, 0), 404, "ok", 500])
    for amount in (1, 2, 4, 8, 16, 32):
        cell.inc(amount)
        pusher.flush(10)
    assert pusher.flush(10)
    assert sum(counted(receiver.taken, "chat_messages_total")) == 63
    (metric,) = (m for m in metrics_in(receiver.taken[0]) if m.name == "chat_messages_total")
    assert metric.sum.aggregation_temporality == 1


def test_a_delta_whose_fate_is_unknown_comes_again_as_it_was(
    receiver: Receiver, push: Callable[..., Pusher], registry: rk.Registry
) -> None:
    cell = registry.bind(Chat, actor_name="lobby").messages["text"]
    pusher = push(temporality="delta")
    assert pusher.flush(10)
    receiver.script.append("take and reset")
    cell.inc(5)
    assert not pusher.flush(0.3)
    cell.inc(2)
    assert pusher.flush(10)
    _, lost, again, rest = receiver.sent
    assert lost == again
    assert counted([again], "chat_messages_total") == [5]
    assert counted([rest], "chat_messages_total") == [2]


def test_the_exporters_log_is_one_line_for_each_change(
    receiver: Receiver, push: Callable[..., Pusher], caplog: pytest.LogCaptureFixture
) -> None:
    receiver.script.extend([401] * 5)
    pusher = push()
    with caplog.at_level(logging.DEBUG):
        for _ in range(5):
            assert not pusher.flush(10)
    lines = [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert [record.name for record in lines] == ["rkmetrics"]
    assert "refuses" in lines[0].getMessage()
