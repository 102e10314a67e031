"""What clients of all planes share: a call from its request to the end of its answer.

A sibling sends the request, `PlaneClient._push(call, ...)`, and tells the call what becomes of that: `acknowledged`, or
`fail`. All else is the same over each plane, as the answer always comes home (callhome.py). The beginning of an answer
says more than an acknowledgement, so a call waits for one of the two words and not for both.

    push ── acknowledged ── began (prologue) ── items ── sentinel
     └────── request time-out ──────┘  └─ silence ─┘         whatever happens, one of them ends it
"""

from __future__ import annotations

import asyncio
import secrets
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from rkmetrics.catalogue.planes import CallOutcome, Plane, RpcCalling
from rkmetrics.errors import (
    PayloadError,
    RpcClosedError,
    RpcError,
    RpcProtocolError,
    RpcRefusedError,
    RpcRemoteError,
    RpcTimeoutError,
    RpcUnreachableError,
)
from rkmetrics.planes.base import Annotated, Instance, RequestPlaneClient, RpcResponse
from rkmetrics.planes.callhome import CallHome, Incoming
from rkmetrics.planes.fork import at_fork, unplug_all
from rkmetrics.planes.frame import TwoPart, encode_two_part
from rkmetrics.planes.tracing import call_span, outgoing, valid
from rkmetrics.planes.wire import KILL, STOP, ItemDecoder, RequestHeader, item_decoder, read_item, read_prologue

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["Call", "PlaneClient", "answers"]

#: What waits of an answer for a reader that is slower than it comes; then the worker has to wait.
ITEMS_HIGH, BYTES_HIGH = 256, 4 * 1024 * 1024
ITEMS_LOW, BYTES_LOW = 64, 1024 * 1024
#: An answer that began and says nothing for so long is given up.
SILENCE_SECONDS = 300.0

OUTCOMES: Mapping[type[RpcError], CallOutcome] = {
    RpcRemoteError: CallOutcome.REMOTE_ERROR,
    RpcRefusedError: CallOutcome.REFUSED,
    RpcUnreachableError: CallOutcome.UNREACHABLE,
    RpcTimeoutError: CallOutcome.TIMEOUT,
    RpcClosedError: CallOutcome.CLOSED,
    RpcProtocolError: CallOutcome.PROTOCOL,
}


class Call(Incoming):
    """One call that is made. begun: done when its answer begins, or with what came instead.

    To be used from one event loop.
    """

    def __init__(
        self,
        client: PlaneClient,
        instance: Instance,
        id: str,
        *,
        subject: str,
        loop: asyncio.AbstractEventLoop,
        decode: ItemDecoder,
        timeout_seconds: float | None,
        span: Any,
    ) -> None:
        self.instance, self.id, self.subject = instance, id, subject
        self._client, self._decode, self._span = client, decode, span
        self._loop = loop
        self._cells = client.cells(instance.component)
        self._began = self._heard = self._loop.time()
        self._deadline = None if timeout_seconds is None else self._began + timeout_seconds
        self._items: deque[bytes] = deque()
        self._bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: RpcError | None = None
        self._over = self._final = self._stopped = self._done = self._held = self._any = False
        self.begun: asyncio.Future[None] = self._loop.create_future()
        self._tell: Callable[[CallOutcome], None] | None = None
        self._outcome: CallOutcome | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._acknowledged = False
        self._cells.change(1)
        self._arm()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where it is made."""
        return self._loop

    @property
    def endpoint(self) -> str:
        """What is called, for errors."""
        return ".".join(self.instance[:3])

    @property
    def where(self) -> str:
        """Whom it is sent to, for errors."""
        return self.instance.transport[1]

    @property
    def done(self) -> bool:
        """Whether it is counted: nobody waits any more."""
        return self._done

    # --- what becomes of the request ----------------------------------------------------------------------------------

    def acknowledged(self) -> None:
        """The instance has the request."""
        self._acknowledged = True

    def fail(self, error: RpcError) -> None:
        """The request, or the answer, came to nothing; what came of it before can still be read."""
        if self._error is not None or self._over:
            return
        self._error = error
        self._stop_timer()
        self._client.home.forget(self.subject)
        home, self.home = self.home, None
        if home is not None:
            home.say(KILL)
            home.close()
        if not self.begun.done():
            self.begun.set_exception(error)
            self.begun.exception()  # seen, also where the caller was cancelled meanwhile
            self.finish(OUTCOMES[type(error)])
        self._wake()

    # --- the answer, as it comes --------------------------------------------------------------------------------------

    def began(self) -> None:
        """The worker is there; its prologue comes next."""

    def frame(self, frame: TwoPart) -> None:
        """The prologue, then items."""
        self._heard = self._loop.time()
        if not self.begun.done():
            self._begin(frame)
        elif self.begun.cancelled():
            pass  # who waited for it was cancelled a moment ago, and is about to abandon it
        elif frame.header:
            self.fail(self._protocol(PayloadError("an item", frame.header, "it has a header")))
        else:
            self._items.append(frame.body)
            self._bytes += len(frame.body)
            if not self._held and (len(self._items) > ITEMS_HIGH or self._bytes > BYTES_HIGH):
                self._hold(held=True)
            self._wake()

    def _begin(self, frame: TwoPart) -> None:
        try:
            refusal = read_prologue(frame)
        except PayloadError as error:
            self.fail(self._protocol(error))
            return
        if refusal:
            self.fail(RpcRefusedError(self.endpoint, refusal, instance=self.where))
            return
        self.begun.set_result(None)
        if self._timer is not None and self._due() < self._timer.when():
            self._stop_timer()
            self._arm()

    def ended(self) -> None:
        """Nothing comes any more."""
        if not self.begun.done():
            self.fail(RpcClosedError(self.endpoint, "the answer ended before it began", instance=self.where))
            return
        self._over = True
        self._stop_timer()
        self._wake()

    def lost(self, reason: str) -> None:
        """The connection broke off, or the worker said what nobody understands."""
        if self._over:
            return
        if self._stopped:
            self.ended()
            return
        self.fail(RpcClosedError(self.endpoint, reason, instance=self.where))

    def _protocol(self, error: PayloadError) -> RpcError:
        return RpcProtocolError(self.endpoint, str(error), instance=self.where)

    def _hold(self, *, held: bool) -> None:
        self._held = held
        self._heard = self._loop.time()
        if self.home is not None:
            self.home.hold(held)

    # --- the answer, as it is read ------------------------------------------------------------------------------------

    async def next(self) -> Annotated[Any] | None:
        """Return the next item, None at the end. Raises RpcError; an item that is an error is returned."""
        while True:
            if self._final:
                self._whole()
                return None
            if self._items:
                found = self._pop()
                if found is not None:
                    return found
            elif self._error is not None:
                self.finish(OUTCOMES[type(self._error)])
                raise self._error
            elif self._over:
                self._at_end()
                return None
            else:
                await self._wait()

    def _pop(self) -> Annotated[Any] | None:
        body = self._items.popleft()
        self._bytes -= len(body)
        if self._held and len(self._items) <= ITEMS_LOW and self._bytes <= BYTES_LOW:
            self._hold(held=False)
        try:
            found = read_item(body, self._decode)
        except PayloadError as error:
            self._items.clear()
            self._over = False
            self.fail(self._protocol(error))
            return None
        self._final = self._final or found.complete_final
        if found.data is not None:
            self._count_item()
        return found.data

    def _count_item(self) -> None:
        if not self._any:
            self._any = True
            self._cells.first_item.observe(self._loop.time() - self._began)
        self._cells.items.inc()

    def _whole(self) -> None:
        """All came, as the instance said itself: what it says after that, or how it leaves, changes nothing."""
        self._items.clear()
        if not self._over:
            self._over = True
            if self._held:
                self._hold(held=False)
            if self.home is not None:
                self.home.leave()
        self.finish(CallOutcome.CANCELLED if self._stopped else CallOutcome.OK)

    def _at_end(self) -> None:
        if self._stopped:
            self.finish(CallOutcome.CANCELLED)
            return
        self._error = RpcClosedError(self.endpoint, "the answer ended without its end", instance=self.where)
        self.finish(CallOutcome.CLOSED)
        raise self._error

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("an answer is read from one task at a time")
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # --- its end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Want no more items; those on their way can be read."""
        if not self._stopped and not self._over:
            self._stopped = True
            if self.home is not None:
                self.home.say(STOP)

    def abandon(self, outcome: CallOutcome = CallOutcome.CANCELLED) -> None:
        """Nobody waits any more."""
        if self._done:
            return
        if not self._over and self._error is None:
            self._client.home.forget(self.subject)
            home, self.home = self.home, None
            if home is not None:
                home.say(KILL)
                home.close()
            self._over = self._stopped = True
        if not self.begun.done():
            self.begun.cancel()
        self._items.clear()
        if outcome is CallOutcome.CANCELLED:  # unless more is known
            outcome = CallOutcome.OK if self._final else OUTCOMES[type(self._error)] if self._error else outcome
        self.finish(outcome)
        self._wake()

    def finish(self, outcome: CallOutcome) -> None:
        """Count it, once."""
        if self._done:
            return
        self._done, self._outcome = True, outcome
        self._stop_timer()
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(outcome)
        self._cells.outcomes[outcome].inc()
        self._cells.change(-1)
        self._cells.duration.observe(self._loop.time() - self._began)
        if self._span is not None:
            self._span.set_attribute("rpc.outcome", outcome.value)
            self._span.end()

    def when_over(self, tell: Callable[[CallOutcome], None]) -> None:
        """Have somebody told how it ended."""
        if self._outcome is not None:
            tell(self._outcome)
        else:
            self._tell = tell

    # --- its time -----------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """One timer for whatever may take too long. It is not moved with each item: it looks when it rings."""
        self._timer = self._loop.call_at(self._due(), self._ring)

    def _due(self) -> float:
        client = self._client
        due = self._heard + client.silence_seconds
        if not self.begun.done():
            due = self._began + client.request_timeout_seconds
        return due if self._deadline is None else min(due, self._deadline)

    def _late(self, due: float) -> str:
        """What took too long."""
        if due == self._deadline:
            return f"not whole in {due - self._began:g} s"
        if self.begun.done():
            return f"silent for {self._client.silence_seconds:g} s"
        what = "no answer to the acknowledged request" if self._acknowledged else "no acknowledgement"
        return f"{what} in {self._client.request_timeout_seconds:g} s"

    def _ring(self) -> None:
        if self._held:
            self._heard = self._loop.time()  # it is we who do not listen
        due = self._due()
        if due <= self._loop.time():
            self.fail(RpcTimeoutError(self.endpoint, self._late(due), instance=self.where))
        else:
            self._arm()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Response(RpcResponse):
    """What a caller holds of a call. Dropped without a word, it ends the call."""

    def __init__(self, call: Call) -> None:
        self._call, self._loop = call, call.loop
        self.id, self.instance = call.id, call.instance

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        """The next item's data; an item that has none, as an event with comments only, is passed over."""
        call = self._call
        while True:
            found = await call.next()
            if found is None:
                raise StopAsyncIteration
            if found.event == "error":
                call.abandon(CallOutcome.REMOTE_ERROR)
                raise RpcRemoteError(call.endpoint, found.reason, instance=call.where)
            if found.data is not None or found.event is None:
                return found.data

    async def annotated(self) -> AsyncIterator[Annotated[Any]]:
        while (found := await self._call.next()) is not None:
            yield found

    def stop(self) -> None:
        self._call.stop()

    async def aclose(self) -> None:
        self._call.abandon()

    def when_over(self, tell: Callable[[CallOutcome], None]) -> None:
        self._call.when_over(tell)

    def __del__(self) -> None:
        if not self._call.done:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._call.abandon)


class _CallCells:
    """The cells of calls to one component."""

    def __init__(self, cells: RpcCalling, plane: Plane) -> None:
        self.outcomes = {outcome: cells.calls[plane, outcome] for outcome in CallOutcome}
        self.duration, self.first_item = cells.duration[plane], cells.first_item[plane]
        self.items = cells.items[plane]
        self._in_flight, self._running = cells.in_flight[plane].share(), 0

    def change(self, by: int) -> None:
        """A call begins, or ends."""
        self._running += by
        self._in_flight.set(self._running)

    def forget(self) -> None:
        """In a forked child: those that run are the parent's."""
        self.change(-self._running)


class PlaneClient(RequestPlaneClient):
    """A client but for its plane.

    request_timeout_seconds: until an answer begins. silence_seconds: between two items. actor_name: under which its
    calls are counted, by default the component's that is called.
    """

    plane: Plane

    def __init__(
        self,
        registry: Registry,
        home: CallHome,
        *,
        request_timeout_seconds: float,
        silence_seconds: float = SILENCE_SECONDS,
        actor_name: str | None = None,
    ) -> None:
        self.registry, self.settings, self.mode = registry, registry.settings, self.plane.value
        self.home, self.request_timeout_seconds, self.silence_seconds = home, request_timeout_seconds, silence_seconds
        self._actor_name = actor_name
        self._cells: dict[str, _CallCells] = {}
        self._started, self._turn = False, asyncio.Lock()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unhook: Callable[[], None] = lambda: None

    def cells(self, component: str) -> _CallCells:
        """The cells of calls to a component."""
        name = self._actor_name or component
        found = self._cells.get(name)
        if found is None:
            found = self._cells[name] = _CallCells(self.registry.bind(RpcCalling, actor_name=name), self.plane)
        return found

    async def start(self) -> None:
        async with self._turn:  # the first calls come together, and only one of them starts it
            if not self._started:
                await self.home.start()
                try:
                    await self._open()
                except BaseException:
                    await self.home.close()
                    raise
                self._started, self._closed, self._loop = True, False, asyncio.get_running_loop()
                self._unhook = at_fork(self, self._go_on_in_child)

    async def close(self) -> None:
        async with self._turn:
            self._same_loop()
            self._closed = True
            if self._started:
                self._started = False
                self._unhook()
                try:
                    await self._close()
                finally:
                    await self.home.close()
                await asyncio.sleep(0)  # connections end in the loop's next turn, and it may be closed after this
        self._turn = asyncio.Lock()  # the next loop's

    async def call(
        self,
        instance: Instance,
        request: Any,
        *,
        id: str | None = None,
        timeout_seconds: float | None = None,
        type: Any = Any,
        traceparent: str | None = None,
    ) -> RpcResponse:
        # Where getpid() is slow, as in sandboxes, asyncio.get_running_loop() is too: a call does without.
        while self._loop is None or not self._started or not self._loop.is_running():
            await self._ready(instance)
        body, decode = _encode(request), item_decoder(type)
        span = call_span(".".join(instance[:3]), self.mode) if traceparent is None else None
        carried = outgoing(span) if traceparent is None else valid(traceparent)
        chance = secrets.token_hex(32)
        call = Call(
            self,
            instance,
            id or chance[:32],
            subject=chance[32:],
            loop=self._loop,
            decode=decode,
            timeout_seconds=timeout_seconds,
            span=span,
        )
        try:
            self.home.expect(call.subject, call)
            header = RequestHeader(call.id, self.home.address, call.subject, reuse=True)
            self._push(call, encode_two_part(header.encode(), body), carried)
            await call.begun
        except BaseException:  # cancelled, or what cannot be sent; nothing where it failed, as that is over
            call.abandon()
            raise
        return _Response(call)

    async def _ready(self, instance: Instance) -> None:
        if self._closed:
            reason = "the client was closed; start() opens it again"
            raise RpcUnreachableError(".".join(instance[:3]), reason, instance=instance.transport[1])
        self._same_loop()
        await self.start()

    def _same_loop(self) -> None:
        if self._started and self._loop is not asyncio.get_running_loop():
            raise RuntimeError(f"{self.mode} plane: the client was started in another event loop; close it there")

    def _open_files(self) -> Iterable[int]:
        """The descriptors that a plane has open beside the way home, for a forked child to let go."""
        return ()

    def _go_on_in_child(self) -> None:
        """In a forked child: nothing is called, and what is open is the parent's."""
        unplug_all(self._open_files(), self.__dict__.copy())
        self.home.forked()
        self._turn, self._loop, self._started = asyncio.Lock(), None, False
        self._unhook()
        for cells in self._cells.values():
            cells.forget()

    async def _open(self) -> None:
        """Be ready to push."""

    @abstractmethod
    async def _close(self) -> None:
        """End all connections; calls whose request is on its way fail."""

    @abstractmethod
    def _push(self, call: Call, payload: bytes, traceparent: str) -> None:
        """Send a request to call.instance; what becomes of it is told to the call. Neither waits nor raises."""


_encode = msgspec.json.Encoder().encode


async def answers(host: str, port: int, message: bytes, timeout_seconds: float) -> bool:
    """Whether somebody there reacts to a message, be it by leaving: the probe of planes that connect.

    To take connections says nothing: the system does that for a process that is frozen.
    """
    writer = None
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(message)
            with suppress(ConnectionError):
                await reader.read(1)
    except (OSError, TimeoutError, ValueError):  # ValueError: a name that no look-up takes
        return False
    finally:
        if writer is not None:
            writer.transport.abort()
    return True
