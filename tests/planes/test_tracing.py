"""Traces go on over calls: with OpenTelemetry as spans, and without it as the context that was given."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.errors import RpcRefusedError, RpcRemoteError
from rkmetrics.planes.base import Instance, RpcContext
from rkmetrics.planes.tcp import TcpClient, TcpServer
from rkmetrics.planes.tracing import CURRENT, outgoing, trace_id, valid

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"

# W3C Trace Context, 2.2 and 4.3: header -> whether it is taken.
HEADERS: dict[str, tuple[str, bool]] = {
    "sampled": (PARENT, True),
    "not sampled": (f"00-{TRACE}-{SPAN}-00", True),
    "flags that nobody knows": (f"00-{TRACE}-{SPAN}-ff", True),
    "a later version": (f"01-{TRACE}-{SPAN}-01", True),
    "a later version with more": (f"cc-{TRACE}-{SPAN}-01-what-the-future-has", True),
    "a later version, a dash": (f"cc-{TRACE}-{SPAN}-01-", True),
    "a later version, no dash": (f"cc-{TRACE}-{SPAN}-01.x", False),
    "version 00 with more": (f"{PARENT}-x", False),
    "version 00, a dash": (f"{PARENT}-", False),
    "version ff": (f"ff-{TRACE}-{SPAN}-01", False),
    "no trace": (f"00-{'0' * 32}-{SPAN}-01", False),
    "no span": (f"00-{TRACE}-{'0' * 16}-01", False),
    "capitals": (f"00-{TRACE.upper()}-{SPAN}-01", False),
    "a short trace": (f"00-{TRACE[:-1]}-{SPAN}-01", False),
    "a long span": (f"00-{TRACE}-{SPAN}0-01", False),
    "no flags": (f"00-{TRACE}-{SPAN}", False),
    "half a flag": (f"00-{TRACE}-{SPAN}-1", False),
    "no hex": (f"00-{TRACE[:-1]}g-{SPAN}-01", False),
    "other digits": (f"00-{TRACE[:-1]}\u0661-{SPAN}-01", False),
    "spaces": (f" {PARENT} ", False),
    "a line's end": (f"{PARENT}\n", False),
    "another header in it": (f"cc-{TRACE}-{SPAN}-01-x\r\nevil: 1", False),
    "a bare return": (f"cc-{TRACE}-{SPAN}-01-x\revil: 1", False),
    "a zero": (f"cc-{TRACE}-{SPAN}-01-x\0", False),
    "no ASCII": (f"cc-{TRACE}-{SPAN}-01-\xe4", False),
    "too long": (f"cc-{TRACE}-{SPAN}-01-{'x' * 300}", False),
    "empty": ("", False),
    "something else": ("hello", False),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_context_is_taken_or_ignored(case: str) -> None:
    header, good = HEADERS[case]
    assert valid(header) == (header if good else "")
    assert trace_id(valid(header)) == (TRACE if good else None)


# --- over calls -------------------------------------------------------------------------------------------------------


async def tell(request: Any, context: RpcContext) -> Any:
    """What a handler knows of its trace."""
    return {"traceparent": context.request.traceparent, "id": context.trace_id, "current": CURRENT.get()}


class Pair:
    """A worker whose `relay` calls its `tell`, and a client."""

    def __init__(self) -> None:
        registry = rk.Registry(rk.Settings(tcp_rpc_host="127.0.0.1"), builtin=False)
        self.server, self.client = TcpServer(registry, instance_id=7), TcpClient(registry)
        self.server.endpoint("backend.tell", tell)
        self.server.endpoint("backend.relay", self._relay)
        self.server.endpoint("backend.stream", self._stream)
        self.server.endpoint("backend.fail", self._fail)

    async def _relay(self, request: Any) -> Any:
        return await (await self.client.call(self["tell"], request)).one()

    async def _stream(self, request: Any) -> AsyncIterator[Any]:
        yield CURRENT.get()
        await asyncio.sleep(0)
        yield await (await self.client.call(self["tell"], request)).one()

    async def _fail(self, request: Any) -> Any:
        raise ValueError("no")

    def __getitem__(self, name: str) -> Instance:
        return next(each for each in self.server.instances() if each.endpoint == name)

    async def ask(self, name: str, **options: Any) -> Any:
        return await (await self.client.call(self[name], {}, **options)).one()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    found = Pair()
    async with found.server, found.client:
        yield found


@pytest.fixture
def without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)


@pytest.mark.usefixtures("without_opentelemetry")
@pytest.mark.parametrize("case", HEADERS)
async def test_what_a_caller_says_reaches_the_handler(pair: Pair, case: str) -> None:
    header, good = HEADERS[case]
    expected = {"traceparent": header, "id": TRACE, "current": header}
    nothing = {"traceparent": "", "id": None, "current": ""}
    assert await pair.ask("tell", traceparent=header) == (expected if good else nothing)


@pytest.mark.usefixtures("without_opentelemetry")
async def test_without_opentelemetry_a_trace_is_passed_on_to_what_a_handler_calls(pair: Pair) -> None:
    assert (await pair.ask("relay", traceparent=PARENT))["traceparent"] == PARENT
    stream = await pair.client.call(pair["stream"], {}, traceparent=PARENT)
    first, second = [item async for item in stream]
    assert (first, second["traceparent"]) == (PARENT, PARENT)


@pytest.mark.usefixtures("without_opentelemetry")
async def test_a_trace_ends_with_its_call_and_reaches_no_other(pair: Pair) -> None:
    other = f"00-{'a' * 32}-{SPAN}-01"
    found = await asyncio.gather(
        *(pair.ask("relay", traceparent=each) for each in (PARENT, other) * 10), *(pair.ask("relay") for _ in range(10))
    )
    assert [each["traceparent"] for each in found] == [PARENT, other] * 10 + [""] * 10
    assert CURRENT.get() == ""
    assert outgoing() == ""


@pytest.mark.usefixtures("without_opentelemetry")
async def test_a_caller_may_say_that_there_is_no_trace(pair: Pair) -> None:
    mark = CURRENT.set(PARENT)
    try:
        assert (await pair.ask("tell"))["traceparent"] == PARENT
        assert (await pair.ask("tell", traceparent=""))["traceparent"] == ""
    finally:
        CURRENT.reset(mark)


async def test_a_module_that_another_thread_is_about_to_load_is_not_used(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", ModuleType("opentelemetry.trace"))
    assert (await pair.ask("relay", traceparent=PARENT))["traceparent"] == PARENT


def test_opentelemetry_is_not_loaded_by_ours() -> None:
    program = "import sys, rkmetrics.planes.tcp; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


# --- with OpenTelemetry -----------------------------------------------------------------------------------------------


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Finished spans, by name and kind."""
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="needs OpenTelemetry: rkmetrics[otlp]")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield lambda: {(span.name, span.kind.name): span for span in exporter.get_finished_spans()}
    provider.shutdown()


async def test_a_call_and_its_handler_are_spans_of_one_trace(pair: Pair, spans: Any) -> None:
    from opentelemetry import trace

    with trace.get_tracer("test").start_as_current_span("outer") as outer:
        found = await pair.ask("relay")
    finished = spans()
    relay_call, relay = finished["dynamo.backend.relay", "CLIENT"], finished["dynamo.backend.relay", "SERVER"]
    tell_call, told = finished["dynamo.backend.tell", "CLIENT"], finished["dynamo.backend.tell", "SERVER"]
    chain = [outer, relay_call, relay, tell_call, told]
    assert {span.get_span_context().trace_id for span in chain} == {outer.get_span_context().trace_id}
    parents = [span.parent.span_id for span in chain[1:]]
    assert parents == [span.get_span_context().span_id for span in chain[:-1]]
    assert found["id"] == f"{outer.get_span_context().trace_id:032x}"
    assert relay_call.attributes["rpc.outcome"] == "ok"
    assert dict(told.attributes) == {
        "rpc.system": "dynamo",
        "rpc.method": "dynamo.backend.tell",
        "network.transport": "tcp",
    }


async def test_a_callers_trace_is_continued_without_a_span_of_the_clients(pair: Pair, spans: Any) -> None:
    assert (await pair.ask("relay", traceparent=PARENT))["id"] == TRACE
    server = spans()["dynamo.backend.relay", "SERVER"]
    assert f"{server.get_span_context().trace_id:032x}" == TRACE
    assert f"{server.parent.span_id:016x}" == SPAN
    assert ("dynamo.backend.relay", "CLIENT") not in spans()


async def test_the_span_of_what_failed_says_how(pair: Pair, spans: Any) -> None:
    with pytest.raises(RpcRemoteError):
        await pair.ask("fail")
    finished = spans()
    assert finished["dynamo.backend.fail", "CLIENT"].attributes["rpc.outcome"] == "remote_error"
    assert finished["dynamo.backend.fail", "SERVER"].status.status_code.name == "ERROR"
    missing = pair["tell"]._replace(endpoint="gone", transport=("tcp", f"{pair.server.address}/7/gone"))
    with pytest.raises(RpcRefusedError):
        await pair.client.call(missing, {})
    assert spans()["dynamo.backend.gone", "CLIENT"].attributes["rpc.outcome"] == "refused"


async def test_a_span_of_a_call_that_cannot_be_made_is_not_left_open(pair: Pair, spans: Any) -> None:
    for bad in ({"type": lambda: 0}, {"id": "\ud800"}):
        with pytest.raises((TypeError, ValueError)):
            await pair.client.call(pair["tell"], {}, **bad)
    with pytest.raises(TypeError):
        await pair.client.call(pair["tell"], object())
    assert [span.attributes["rpc.outcome"] for (_, kind), span in spans().items() if kind == "CLIENT"] == ["cancelled"]
