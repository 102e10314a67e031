"""Real OTLP receivers, HTTP and gRPC, that misbehave by script."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from typing import Any

import pytest

from rkmetrics import Registry, Settings
from rkmetrics.bridges.otlp import Pusher

try:
    wire: Any = import_module("opentelemetry.proto.collector.metrics.v1.metrics_service_pb2")
    service: Any = import_module("opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc")
    grpc: Any = import_module("grpc")
    status_pb2: Any = import_module("google.rpc.status_pb2")
    error_details_pb2: Any = import_module("google.rpc.error_details_pb2")
except ImportError:
    grpc = None

PROTOBUF = "application/x-protobuf"


class Receiver:
    """What was sent, and what to do with the next requests: the script's steps, then "ok" for ever.

    taken: the requests that this receiver accepted, which is more than it acknowledged when a step is "take and ...".
    """

    protocol: str
    endpoint: str

    def __init__(self) -> None:
        self.script: deque[Any] = deque()
        self.sent: list[Any] = []
        self.taken: list[Any] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()
        self._changed = threading.Condition()

    def arrive(self, request: Any, headers: dict[str, str]) -> Any:
        with self._changed:
            step = self.script.popleft() if self.script else "ok"
            self.sent.append(request)
            self.times.append(time.monotonic())
            self.headers.append(headers)
            if step in ("ok", "partial", "advice") or (isinstance(step, str) and step.startswith("take and")):
                self.taken.append(request)
            self._changed.notify_all()
        return step

    def wait_sent(self, count: int, timeout_seconds: float = 10.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: len(self.sent) >= count, timeout_seconds)

    def close(self) -> None:
        raise NotImplementedError


class HttpReceiver(Receiver):
    protocol = "http/protobuf"

    def __init__(self) -> None:
        super().__init__()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                request = wire.ExportMetricsServiceRequest.FromString(body)
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver._play(self, receiver.arrive(request, headers))

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: Any) -> None:
                pass  # broken connections are what these tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def _play(self, handler: Any, step: Any) -> None:
        if step == "ok":
            self.answer(handler, 200, wire.ExportMetricsServiceResponse().SerializeToString())
        elif step in ("partial", "advice"):
            message = wire.ExportMetricsServiceResponse()
            message.partial_success.rejected_data_points = 3 if step == "partial" else 0
            message.partial_success.error_message = "too old"
            self.answer(handler, 200, message.SerializeToString())
        elif isinstance(step, tuple):
            self.answer(handler, step[0], b"", {"Retry-After": str(step[1])})
        elif isinstance(step, int):
            status = status_pb2.Status(code=3, message="no such thing").SerializeToString()
            self.answer(handler, step, status, {"Location": "/elsewhere"} if step in (301, 307) else {})
        elif step == "html":
            self.answer(handler, 200, b"<html>welcome</html>", {"Content-Type": "text/html"})
        elif step == "junk body":
            self.answer(handler, 200, b"\xff\xff\xff")
        elif step == "words":
            self.answer(handler, 200, b'{"status": "fine"}', {"Content-Type": "application/json"})
        elif step == "garbage":
            handler.wfile.write(b"\x00\x01 I am no HTTP server\r\n\r\n")
            handler.close_connection = True
        elif step == "endless":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\n\r\n")
            with contextlib.suppress(OSError):
                while not self.released.is_set():
                    handler.wfile.write(b"\0" * 65536)
            handler.close_connection = True
        elif step == "drip":
            with contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000:
                    if self.released.wait(0.05):
                        break
                    handler.wfile.write(bytes([byte]))
            handler.close_connection = True
        elif step in ("hang", "take and hang"):
            self.released.wait(60)
            handler.close_connection = True
        else:
            assert step in ("reset", "take and reset"), step
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True

    @staticmethod
    def answer(handler: Any, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": PROTOBUF, "Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


# HTTP's statuses as their relatives in gRPC, so that one script serves both.
GRPC_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "UNIMPLEMENTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class GrpcReceiver(Receiver):
    protocol = "grpc"

    def __init__(self) -> None:
        super().__init__()
        receiver = self

        class Servicer(service.MetricsServiceServicer):  # type: ignore[misc]
            def Export(self, request: Any, context: Any) -> Any:
                headers = {str(key): str(value) for key, value in context.invocation_metadata()}
                return receiver._play(context, receiver.arrive(request, headers))

        self.server = grpc.server(ThreadPoolExecutor(max_workers=8))
        service.add_MetricsServiceServicer_to_server(Servicer(), self.server)
        self.endpoint = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def _play(self, context: Any, step: Any) -> Any:
        response = wire.ExportMetricsServiceResponse()
        if step in ("partial", "advice"):
            response.partial_success.rejected_data_points = 3 if step == "partial" else 0
            response.partial_success.error_message = "too old"
        elif isinstance(step, tuple):
            status = status_pb2.Status(code=8, message="slow down")
            info = error_details_pb2.RetryInfo()
            info.retry_delay.FromNanoseconds(int(step[1] * 1e9))
            status.details.add().Pack(info)
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down")
        elif step == 429:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        elif isinstance(step, int):
            context.abort(grpc.StatusCode[GRPC_CODES[step]], "no such thing")
        elif step in ("hang", "take and hang"):
            self.released.wait(60)
        elif step in ("reset", "take and reset"):
            context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
        else:
            assert step == "ok", step
        return response

    def close(self) -> None:
        self.released.set()
        self.server.stop(None).wait(5)


RECEIVERS = {"http": HttpReceiver, "grpc": GrpcReceiver}


@pytest.fixture(autouse=True)
def _no_otel_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def _extra() -> None:
    pytest.importorskip("opentelemetry.sdk.metrics")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.metric_exporter")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.metric_exporter")


@pytest.fixture
def receive(_extra: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Receiver]]:
    """Starts a receiver, "http" or "grpc", and points the environment at it."""
    made: list[Receiver] = []

    def receive(kind: str) -> Receiver:
        receiver = RECEIVERS[kind]()
        made.append(receiver)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", receiver.protocol)
        return receiver

    yield receive
    for receiver in made:
        receiver.close()


@pytest.fixture(params=["http", "grpc"])
def receiver(request: pytest.FixtureRequest, receive: Callable[[str], Receiver]) -> Receiver:
    return receive(request.param)


@pytest.fixture
def registry() -> Registry:
    return Registry(Settings(), builtin=False)


@pytest.fixture
def push(_extra: None, registry: Registry) -> Iterator[Callable[..., Pusher]]:
    """Makes a pusher that pushes on demand only, and ends it with the test."""
    made: list[Pusher] = []

    def push(**options: Any) -> Pusher:
        pusher = Pusher(registry, **{"interval_seconds": float("inf"), "timeout_seconds": 5.0, **options})
        made.append(pusher)
        return pusher

    yield push
    for pusher in made:
        pusher.shutdown(0.5)
