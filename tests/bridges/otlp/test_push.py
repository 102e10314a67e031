from __future__ import annotations

import io
import logging
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import rkmetrics as rk

if TYPE_CHECKING:
    from rkmetrics.bridges.otlp import Pusher
    from tests.bridges.otlp.conftest import Receiver


class Chat(rk.MetricSet):
    messages = rk.Counter("pushed_messages_total", "Messages handled.", kind=rk.OneOf("text", "image"))
    members = rk.Gauge("pushed_members", "Members in rooms.", across="sum")
    reply = rk.Histogram("pushed_reply_duration_seconds", "Time to reply.", buckets=(0.1, 1.0))


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
    assert counted([request], "pushed_messages_total") == [7]
    found = {metric.name: metric for metric in scope.metrics}
    assert found["pushed_members"].gauge.data_points[0].as_double == 3
    assert found["pushed_reply_duration_seconds"].unit == "s"
    assert list(found["pushed_reply_duration_seconds"].histogram.data_points[0].bucket_counts) == [0, 1, 0]
    assert own(registry, "ok") == 1


def test_a_trace_id_arrives_with_the_exemplar(
    receiver: Receiver, push: Callable[..., Pusher], registry: rk.Registry
) -> None:
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    exemplar = {"trace_id": trace, "span_id": span, "actor_id": "room-81f"}
    registry.bind(Chat, actor_name="lobby").reply.observe(0.05, exemplar=exemplar)
    assert push().flush(10)
    (metric,) = (m for m in metrics_in(receiver.taken[0]) if m.name == "pushed_reply_duration_seconds")
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
    assert counted(receiver.taken, "pushed_messages_total") == [1]
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
    assert sum(counted(receiver.taken, "pushed_messages_total")) == 63
    (metric,) = (m for m in metrics_in(receiver.taken[0]) if m.name == "pushed_messages_total")
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
    assert counted([again], "pushed_messages_total") == [5]
    assert counted([rest], "pushed_messages_total") == [2]


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


def test_a_header_that_cannot_be_sent_is_not_quoted_in_the_log(
    receive: Callable[[str], Receiver],
    push: Callable[..., Pusher],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receive("http")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%0Asesame")
    with caplog.at_level(logging.DEBUG):
        assert not push().flush(5)
    assert "exporter" in caplog.text
    assert "sesame" not in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"protocol": "http/json"}, "protocol='http/json'"),
        ({"temporality": "both"}, "temporality='both'"),
        ({"interval_seconds": 0}, "interval_seconds=0"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds=inf"),
    ],
)
def test_a_bad_argument_is_named(options: dict[str, Any], said: str, push: Callable[..., Pusher]) -> None:
    with pytest.raises(ValueError, match=said):
        push(**options)


def test_a_disabled_sdk_pushes_nothing(
    receiver: Receiver, push: Callable[..., Pusher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    pusher = push()
    assert not pusher.flush(1)
    assert not pusher.shutdown(1)
    assert receiver.sent == []


def test_an_exporter_of_ones_own_is_used_as_it_is(push: Callable[..., Pusher], registry: rk.Registry) -> None:
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult

    class Exporter(MetricExporter):
        ended = False
        results = [MetricExportResult.FAILURE, MetricExportResult.SUCCESS]

        def export(self, metrics_data: Any, timeout_millis: float = 0, **kwargs: Any) -> MetricExportResult:
            return self.results.pop(0)

        def force_flush(self, timeout_millis: float = 0) -> bool:
            return True

        def shutdown(self, timeout_millis: float = 0, **kwargs: Any) -> None:
            self.ended = True

    exporter = Exporter()
    pusher = push(exporter=exporter)
    assert not pusher.flush(5)
    assert not exporter.ended
    assert pusher.flush(5)
    assert own(registry, "failed") == 1
    exporter.results.append(MetricExportResult.SUCCESS)
    assert pusher.shutdown(5)
    assert exporter.ended


def test_an_exporter_factory_is_called_again_after_a_failure(push: Callable[..., Pusher]) -> None:
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

    class Broken(ConsoleMetricExporter):
        made = 0

        def __init__(self) -> None:
            type(self).made += 1
            if self.made == 1:
                raise OSError("no such device")
            super().__init__(out=io.StringIO())

    pusher = push(exporter=Broken)
    assert not pusher.flush(5)
    assert pusher.flush(5)
    assert Broken.made == 2
    pusher.shutdown(5)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_the_certificate_of_the_environment_is_trusted_and_no_other(
    receive: Callable[[str], Receiver], push: Callable[..., Pusher], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    receiver: Any = receive("http")
    make = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        ["openssl", *make.split(), "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    receiver.server.socket = context.wrap_socket(receiver.server.socket, server_side=True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint.replace("http:", "https:"))
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    assert not push().flush(0.5)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tmp_path / "cert.pem"))
    assert push().flush(10)


SCRIPT = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: what this is about
import rkmetrics as rk
from rkmetrics.bridges.otlp import Pusher

class Chat(rk.MetricSet):
    messages = rk.Counter("pushed_messages_total", "Messages handled.")

registry = rk.Registry(rk.Settings(), builtin=False)
messages = registry.bind(Chat, actor_name="lobby").messages
pusher = Pusher(registry, interval_seconds=60, timeout_seconds=30).start()
messages.inc(10)
"""


def run(code: str, *, timeout_seconds: float = 60) -> tuple[str, float]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + code], capture_output=True, text=True, timeout=timeout_seconds, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - began


def test_exit_pushes_what_is_left(receiver: Receiver) -> None:
    run("")
    assert counted(receiver.taken, "pushed_messages_total") == [10]


def test_exit_is_not_held_up_by_a_receiver_that_hangs(receiver: Receiver) -> None:
    receiver.script.extend(["hang"] * 3)
    _, seconds = run("pusher.flush(0.2)")
    assert seconds < 30  # of which 5 are the pusher's; the request's own time-out is 30


def identity(request: Any) -> dict[str, str]:
    return {item.key: item.value.string_value for item in request.resource_metrics[0].resource.attributes}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("pinned", ["", "service.instance.id=web-1"])
def test_a_forked_child_is_an_instance_of_its_own(
    pinned: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was counted before the fork is the parent's to report: nothing is counted twice."""
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", pinned)
    code = """
assert pusher.flush(10)
for _ in range(3):
    if os.fork() == 0:
        messages.inc(2)
        assert pusher.flush(10)
        os._exit(0)
    assert os.wait()[1] == 0
messages.inc()
"""
    run(code)
    by_instance: dict[str, list[float]] = {}
    for request in receiver.taken:
        values = counted([request], "pushed_messages_total")
        by_instance.setdefault(identity(request)["service.instance.id"], []).extend(values)
    assert sorted(values[-1] for values in by_instance.values()) == [2, 2, 2, 11]
    assert not pinned or by_instance["web-1"][-1] == 11


def test_without_the_extra_the_error_names_it() -> None:
    code = """
for name in ("opentelemetry", "opentelemetry.sdk"):
    sys.modules[name] = None
try:
    Pusher(registry)
except rk.MissingExtraError as error:
    print(error)
"""
    script = SCRIPT.replace("pusher = Pusher(registry, interval_seconds=60, timeout_seconds=30).start()\n", "")
    done = subprocess.run(
        [sys.executable, "-c", script + code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "pip install 'rkmetrics[otlp]'" in done.stdout, done.stderr


def test_importing_the_bridge_loads_no_opentelemetry() -> None:
    code = "import sys, rkmetrics.bridges.otlp; assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
