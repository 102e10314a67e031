"""OpenTelemetry's OTLP exporters as links: one call, one request, one answer.

The exporters of version 1.45 retry by themselves, six times within their time-out, and then say no more than SUCCESS or
FAILURE: whether a 400 or a dead host was behind it, or that Retry-After asks for a minute, is lost; and they try
RESOURCE_EXHAUSTED again against the rules. So a link listens where the exporter meets its library (a transport adapter
of `requests`, the gRPC stub) and ends the exporter's call at the first answer. Endpoint, headers, TLS, compression and
encoding stay the exporters'.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from rkmetrics.bridges.otlp.answers import (
    MAX_ANSWER_BYTES,
    MAX_RETRY_AFTER_SECONDS,
    Answer,
    body_outcome,
    grpc_outcome,
    http_outcome,
    retry_after_seconds,
)
from rkmetrics.catalogue.otlp import Outcome
from rkmetrics.errors import MissingExtraError

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricsData

__all__ = ["ExporterLink", "Link", "Settled", "load", "missing_extra", "open_grpc", "open_http", "quiet"]

_MODULES = {
    "http/protobuf": ("opentelemetry.exporter.otlp.proto.http.metric_exporter", "requests", "google.rpc.status_pb2"),
    "grpc": ("opentelemetry.exporter.otlp.proto.grpc.metric_exporter", "grpc", "google.rpc.error_details_pb2"),
}
_EXPORTER_LOGGERS = (
    "opentelemetry.exporter.otlp.common.http",
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
)
_CREDENTIAL_PROVIDERS = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_METRICS_CREDENTIAL_PROVIDER",
)


class Link(Protocol):
    """A way to a receiver, used by one thread; `close` alone may come from another, and ends a request under way.

    renewable: another can be opened in its place, so a failure closes it.
    """

    renewable: bool

    def send(self, data: MetricsData) -> Answer: ...

    def close(self) -> None: ...


class Settled(Exception):
    """Ends an exporter's call: the answer is known, and not good."""


@contextmanager
def missing_extra(feature: str) -> Generator[None]:
    """Turn a missing package of the extra into MissingExtraError."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "rkmetrics":
            raise
        raise MissingExtraError(feature, "otlp", missing) from error


def load(protocol: str) -> None:
    """Import what a protocol needs. Not left to the first push: that may be at exit, where the SDK cannot be imported.

    Raises MissingExtraError.
    """
    with missing_extra(f"OTLP push over {protocol}"):
        for module in _MODULES[protocol]:
            import_module(module)


# --- the exporters' own log lines -------------------------------------------------------------------------------------


class _Quiet(logging.Filter):
    """Drops what the exporters log in a pusher's thread: push.py says what has to be said, once.

    Dropped for good, not passed on, as a message of theirs may quote a header.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_thread, "quiet", False)


_thread = threading.local()
_QUIET = _Quiet()


@contextmanager
def quiet() -> Generator[None]:
    """Within it, this thread's log lines of OpenTelemetry's exporters are not printed."""
    for name in _EXPORTER_LOGGERS:
        logger = logging.getLogger(name)
        if _QUIET not in logger.filters:
            logger.addFilter(_QUIET)
    _thread.quiet = True
    try:
        yield
    finally:
        _thread.quiet = False


# --- any exporter -----------------------------------------------------------------------------------------------------


class ExporterLink:
    """An exporter, in one of two ways.

    As it is, with its own retries: all that is known of an answer is whether it was good. Or listened to: `answer`
    hands out what was heard. abort: ends a request that is under way, where shutting the exporter down does not.
    """

    def __init__(
        self,
        exporter: MetricExporter,
        timeout_seconds: float,
        answer: Callable[[], Answer | None] = lambda: None,
        abort: Callable[[], None] = lambda: None,
        *,
        renewable: bool = True,
    ) -> None:
        self.renewable = renewable
        self._exporter: Any = exporter
        self._timeout_millis = timeout_seconds * 1000
        self._answer, self._abort = answer, abort

    def send(self, data: MetricsData) -> Answer:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        detail = "the exporter failed before it sent anything, or did not say why"
        with quiet():
            try:
                good = self._exporter.export(data, timeout_millis=self._timeout_millis) is MetricExportResult.SUCCESS
            except Settled:
                good = False
            except Exception as error:  # without its text, which may quote a header
                good, detail = False, f"the exporter raised {type(error).__name__}"
        return self._answer() or (Answer(Outcome.OK) if good else Answer(Outcome.FAILED, detail))

    def close(self) -> None:
        self._abort()
        with quiet(), suppress(Exception):
            self._exporter.shutdown(timeout_millis=10)


# --- HTTP -------------------------------------------------------------------------------------------------------------


def open_http(timeout_seconds: float) -> Link:
    """OTLP/HTTP with protobuf, as the environment says."""
    import requests
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    if any(
        os.environ.get(name) for name in _CREDENTIAL_PROVIDERS
    ):  # the session is the provider's; we must not replace it
        return ExporterLink(OTLPMetricExporter(timeout=cast("int", timeout_seconds)), timeout_seconds)
    session = requests.Session()
    listener = _listener(session, timeout_seconds)
    session.mount("http://", listener)
    session.mount("https://", listener)
    exporter = OTLPMetricExporter(timeout=cast("int", timeout_seconds), session=session)
    return ExporterLink(exporter, timeout_seconds, listener.take, listener.abort)


def _listener(session: Any, timeout_seconds: float) -> Any:
    """A transport adapter that keeps each answer, and ends a request not answered in full within the time-out."""
    from requests import PreparedRequest, Response
    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    open_now: dict[int, Any] = {}

    def watched(base: Any) -> Any:
        def connect(self: Any) -> None:
            base.connect(self)
            open_now[id(self)] = self

        def close(self: Any) -> None:
            open_now.pop(id(self), None)
            base.close(self)

        return type("Watched" + base.__name__, (base,), {"connect": connect, "close": close})

    class Plain(HTTPConnectionPool):
        ConnectionCls = watched(HTTPConnection)

    class Secure(HTTPSConnectionPool):
        ConnectionCls = watched(HTTPSConnection)

    class Listener(HTTPAdapter):
        answer: Answer | None = None

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            pools: dict[str, Any] = {"http": Plain, "https": Secure}
            self.poolmanager.pool_classes_by_scheme = pools

        def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
            kwargs["stream"] = True  # the body is read here, so much and no more
            if isinstance(session.verify, str):  # OTEL_..._CERTIFICATE; requests lets REQUESTS_CA_BUNDLE go before it
                kwargs["verify"] = session.verify
            # requests' time-out is that of one read: a server that drips would hold the thread for ever.
            timer = threading.Timer(timeout_seconds, self.abort)
            timer.daemon = True
            with suppress(RuntimeError):  # Python 3.12 starts no thread at exit, which has a limit of its own
                timer.start()
            try:
                response = super().send(request, *args, **kwargs)
                body = response.raw.read(MAX_ANSWER_BYTES, decode_content=True)
            except Exception as error:
                self.answer = _http_error(error)
                raise Settled from None
            finally:
                timer.cancel()
            self.answer = _http_answer(response, body)
            if not self.answer.good:
                response.close()
                raise Settled
            response.raw = io.BytesIO(body)
            return response

        def take(self) -> Answer | None:
            answer, self.answer = self.answer, None
            return answer

        def abort(self) -> None:
            for connection in list(open_now.values()):
                with suppress(
                    Exception
                ):  # socket's own shutdown: an SSLSocket's would take the TLS state from a reader
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    return Listener()


def _http_answer(response: Any, body: bytes) -> Answer:
    status = int(response.status_code)
    headers = response.headers
    outcome = http_outcome(status)
    if outcome is Outcome.OK:
        return _taken(_decode(body), body_outcome(headers.get("content-type", ""), decoded=_decode(body) is not None))
    after = retry_after_seconds(headers.get("retry-after"), time.time())
    return Answer(outcome, _line(f"HTTP {status}", _status_message(headers.get("content-type", ""), body)), after)


def _decode(body: bytes) -> Any:
    """The answer's message, or None if it is none."""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

    try:
        return ExportMetricsServiceResponse.FromString(body)
    except DecodeError:
        return None


def _taken(message: Any, outcome: Outcome) -> Answer:
    if outcome is not Outcome.OK:
        return Answer(outcome, "HTTP 200 with something that is not OTLP: the address is not a receiver's")
    partial = None if message is None else message.partial_success
    if partial is None or not (partial.rejected_data_points or partial.error_message):
        return Answer(Outcome.OK)
    rejected = max(partial.rejected_data_points, 0)
    found = Outcome.PARTIAL if rejected else Outcome.OK  # a message alone is advice
    return Answer(found, _line(f"{rejected} points rejected", partial.error_message), points_rejected=rejected)


def _status_message(content_type: str, body: bytes) -> str:
    """What a server says in a google.rpc.Status, the form of OTLP/HTTP's errors."""
    from google.protobuf.message import DecodeError

    if not content_type.startswith("application/x-protobuf"):
        return ""
    try:
        return str(_rpc("status_pb2").Status.FromString(body).message)
    except DecodeError:
        return ""


def _rpc(module: str) -> Any:
    """A module of google.rpc, which comes with the exporters and has no types."""
    return import_module(f"google.rpc.{module}")


def _line(head: str, said: str) -> str:
    """One line for the log; what the server says is quoted and short."""
    return f"{head}: {said[:200]!r}" if said else head


def _http_error(error: Exception) -> Answer:
    """What an exception of requests means. Its text may hold the address with credentials, so only causes are named."""
    from requests import exceptions as r
    from urllib3 import exceptions as u

    reason = getattr(error.args[0] if error.args else None, "reason", None)
    detail = f"{type(reason or error).__name__}{_cause(error)}"
    unsent = isinstance(error, r.ConnectTimeout | r.SSLError | r.ProxyError) or isinstance(reason, u.NewConnectionError)
    if unsent:
        return Answer(Outcome.UNAVAILABLE, detail)
    misconfigured = isinstance(error, ValueError)  # InvalidURL, InvalidHeader and such
    return Answer(Outcome.REFUSED if misconfigured else Outcome.UNANSWERED, detail)


def _cause(error: BaseException) -> str:
    """The operating system's word for it, if it has one."""
    seen: list[Any] = [error]
    for item in seen:
        if isinstance(item, OSError) and item.strerror:
            return f" ({item.strerror})"
        args = getattr(item, "args", ())
        below = [*args, getattr(item, "reason", None), item.__cause__, item.__context__]
        seen.extend(
            found for found in below if isinstance(found, BaseException) and found not in seen and len(seen) < 20
        )
    return ""


# --- gRPC -------------------------------------------------------------------------------------------------------------


def open_grpc(timeout_seconds: float) -> Link:
    """OTLP/gRPC, as the environment says."""
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    exporter: Any = OTLPMetricExporter(timeout=cast("int", timeout_seconds))
    if not hasattr(getattr(exporter, "_client", None), "Export"):
        return ExporterLink(exporter, timeout_seconds)  # another exporter than we know: its own retries have to do
    stub = exporter._client = _Stub(exporter._client)
    return ExporterLink(exporter, timeout_seconds, stub.take)


class _Stub:
    """The exporter's stub of the metrics service, with each answer kept."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._answer: Answer | None = None

    def Export(self, request: Any, **kwargs: Any) -> Any:
        grpc: Any = import_module("grpc")
        try:
            response = self._inner.Export(request, **kwargs)
        except grpc.RpcError as error:
            self._answer = _grpc_error(error)
            raise Settled from None
        self._answer = _taken(response, Outcome.OK)
        return response

    def take(self) -> Answer | None:
        answer, self._answer = self._answer, None
        return answer


def _grpc_error(error: Any) -> Answer:
    code, details = str(error.code().name), str(error.details() or "")
    after = _retry_info(dict(error.trailing_metadata() or ()))
    outcome = grpc_outcome(code, details, retry_info=after is not None)
    return Answer(outcome, _line(f"gRPC {code}", details), after)


def _retry_info(metadata: dict[str, Any]) -> float | None:
    """RetryInfo's delay in seconds, from a google.rpc.Status in the trailers, or by itself as some servers send it."""
    from google.protobuf.message import DecodeError

    info, status = _rpc("error_details_pb2").RetryInfo(), _rpc("status_pb2").Status()
    try:
        status.ParseFromString(metadata.get("grpc-status-details-bin", b""))
        if "google.rpc.retryinfo-bin" in metadata:
            info.ParseFromString(metadata["google.rpc.retryinfo-bin"])
        elif not any(detail.Unpack(info) for detail in status.details):
            return None
    except DecodeError:
        return None
    seconds = float(info.retry_delay.seconds) + float(info.retry_delay.nanos) / 1e9
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
