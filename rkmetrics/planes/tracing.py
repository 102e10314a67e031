"""W3C trace context: carried with each call over each plane, and continued in spans where OpenTelemetry is there.

Who does not use OpenTelemetry still passes a trace on: what a handler calls carries what the handler was called with.
OpenTelemetry is used where the program has loaded it, as without that it has no tracer to give spans to either.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any

__all__ = ["CURRENT", "call_span", "outgoing", "server_span", "trace_id", "valid"]

#: W3C Trace Context, 2.2.2: version 00 ends with its flags; later ones may go on after a '-'. What stands there goes
#: into headers of other protocols, so it is printable.
TRACEPARENT = re.compile(
    r"(?!ff)(?:00(?=.{53}\Z)|(?!00)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
    r"(?:-[\x21-\x7e]*)?"
)
#: What the handler that runs was called with.
CURRENT: ContextVar[str] = ContextVar("rkmetrics_traceparent", default="")
TRACER = "rkmetrics"
LIMIT_CHARACTERS = 256


def valid(traceparent: str) -> str:
    """Return it, or "" where it is none (W3C Trace Context, 3.2: it is to be ignored then)."""
    if not traceparent or len(traceparent) > LIMIT_CHARACTERS:
        return ""
    return traceparent if TRACEPARENT.fullmatch(traceparent) else ""


def trace_id(traceparent: str) -> str | None:
    """Return the trace's id as 32 hex digits."""
    found = TRACEPARENT.fullmatch(traceparent)
    return found[1] if found else None


def _otel() -> Any:
    """The API of OpenTelemetry, where the program uses it; another thread may be about to load it."""
    api = sys.modules.get("opentelemetry.trace")
    return api if hasattr(api, "get_tracer") else None


def outgoing(span: Any = None) -> str:
    """Return what a call is to carry: its span's context, or what the running handler was called with."""
    context = span.get_span_context() if span is not None else None
    if context is None or not context.is_valid:
        return CURRENT.get()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def call_span(endpoint: str, plane: str) -> Any:
    """Begin the span of a call, which its maker ends; None without OpenTelemetry."""
    api = _otel()
    if api is None:
        return None
    parent = None if api.get_current_span().get_span_context().is_valid else _parent(api, CURRENT.get())
    return api.get_tracer(TRACER).start_span(endpoint, parent, api.SpanKind.CLIENT, _attributes(endpoint, plane))


def server_span(endpoint: str, plane: str, traceparent: str) -> AbstractContextManager[None]:
    """A span of the handler that runs inside, continuing the caller's trace."""
    api = _otel()
    return _Passing(traceparent) if api is None else _span(api, endpoint, plane, traceparent)


class _Passing(AbstractContextManager[None]):
    """What the handler calls carries the trace, and that is all: each request comes by here."""

    __slots__ = ("_mark", "_traceparent")

    def __init__(self, traceparent: str) -> None:
        self._traceparent = traceparent

    def __enter__(self) -> None:
        self._mark = CURRENT.set(self._traceparent)

    def __exit__(self, *_: object) -> None:
        CURRENT.reset(self._mark)


@contextmanager
def _span(api: Any, endpoint: str, plane: str, traceparent: str) -> Generator[None]:
    parent, kind = _parent(api, traceparent), api.SpanKind.SERVER
    tracer, attributes = api.get_tracer(TRACER), _attributes(endpoint, plane)
    plain = {"record_exception": False, "set_status_on_exception": False}  # it would raise what an error's text raises
    with _Passing(traceparent), tracer.start_as_current_span(endpoint, parent, kind, attributes, **plain) as span:
        try:
            yield
        except Exception as error:
            span.set_status(api.Status(api.StatusCode.ERROR, type(error).__name__))
            with suppress(Exception):
                span.record_exception(error)
                span.set_status(api.Status(api.StatusCode.ERROR, f"{type(error).__name__}: {error}"))
            raise


def _attributes(endpoint: str, plane: str) -> dict[str, str]:
    return {"rpc.system": "dynamo", "rpc.method": endpoint, "network.transport": plane}


def _parent(api: Any, traceparent: str) -> Any:
    found = TRACEPARENT.fullmatch(traceparent)
    if not found:
        return None
    context = api.SpanContext(int(found[1], 16), int(found[2], 16), True, api.TraceFlags(int(found[3], 16)))
    return api.set_span_in_context(api.NonRecordingSpan(context))
