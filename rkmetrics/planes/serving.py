"""What servers of all planes share: the endpoints, the handlers that run, and how both end.

A sibling hands in what it received, `PlaneServer.take(name, payload, traceparent)`, and gets at once why it is refused,
or None: then a task runs the handler and its answer goes home (callhome.py). So an acknowledgement never waits for a
handler, a slow caller holds only the handler that answers it, and everything that is counted or limited is so here.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import msgspec

from rkmetrics.catalogue.planes import IntakeRefusal, Plane, RpcIntake, RpcServing, ServeOutcome
from rkmetrics.errors import PayloadError
from rkmetrics.planes.base import EndpointName, Handler, Refusal, RequestPlaneServer, RpcContext, RpcRequest, Served
from rkmetrics.planes.callhome import Answer, ForbiddenHome, Homes
from rkmetrics.planes.fork import at_fork, unplug_all
from rkmetrics.planes.frame import read_header, read_two_part
from rkmetrics.planes.tracing import server_span, trace_id, valid
from rkmetrics.planes.wire import Control, RequestHeader, encode_error, encode_item
from rkmetrics.retry import StateLog

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["Lister", "PlaneServer"]

log = logging.getLogger("rkmetrics.planes")

REQUESTS_LIMIT = 10_000
TOLD_LIMIT = 1_000  # callers that are told at once that no answer comes
ENDED_SECONDS = 1.0  # what is cut off has to say so, and its caller to read that
ERROR_CHARACTERS = 4_000  # of what a handler raised, for its caller

REFUSALS = {
    Refusal.UNKNOWN_ENDPOINT: IntakeRefusal.UNKNOWN_ENDPOINT,
    Refusal.MALFORMED: IntakeRefusal.MALFORMED,
    Refusal.TOO_LARGE: IntakeRefusal.TOO_LARGE,
    Refusal.BUSY: IntakeRefusal.BUSY,
    Refusal.DRAINING: IntakeRefusal.DRAINING,
    Refusal.FORBIDDEN: IntakeRefusal.FORBIDDEN,
}


class Lister:
    """Lists a server's instances somewhere: in etcd, in our own discovery. `run` goes on until it is cancelled.

    The base lists nothing: who calls knows the address. heard_seconds: how long after the withdrawal somebody may still
    call who has not heard of it; for so long requests are taken, as clients of Dynamo try none a second time.
    """

    heard_seconds = 0.0

    def prepare(self, server: PlaneServer) -> None:
        """Make ready, when the server has its address. Raises ServeError or BackendError for what cannot be listed."""

    async def run(self, server: PlaneServer) -> None:
        """Keep them listed."""

    async def withdraw(self) -> None:
        """List them no more."""


class _Context(RpcContext):
    """One call, on the side that serves."""

    __slots__ = ("_request", "_stopped", "_task", "_waiter", "killed", "stopped_at")

    def __init__(self, request: RpcRequest, task: asyncio.Task[None]) -> None:
        self._request, self._task = request, task
        self._stopped = self.killed = False
        self._waiter: asyncio.Event | None = None

    def id(self) -> str:
        return self._request.id

    @property
    def request(self) -> RpcRequest:
        return self._request

    @property
    def trace_id(self) -> str | None:
        return trace_id(self._request.traceparent)

    def is_stopped(self) -> bool:
        return self._stopped

    def is_killed(self) -> bool:
        return self.killed

    def stop_generating(self) -> None:
        self._stopped = True
        if self._waiter is not None:
            self._waiter.set()

    async def stopped(self) -> None:
        if not self._stopped:
            self._waiter = self._waiter or asyncio.Event()
            await self._waiter.wait()

    def hear(self, control: Control) -> None:
        """The caller wants no more, or is gone."""
        self.stop_generating()
        if control is Control.KILL and not self.killed:
            self.killed = True
            self._task.cancel()


class _Endpoint:
    """One endpoint: its handler, and the cells of its component."""

    def __init__(self, name: EndpointName, handler: Handler, type: Any, cells: RpcServing, plane: Plane) -> None:
        self.name, self.text, self.handler = name, str(name), handler
        self.decode = msgspec.json.Decoder(type).decode
        self.wants_context = _wants_context(handler)
        self.outcomes = {outcome: cells.requests[plane, outcome] for outcome in ServeOutcome}
        self.in_flight = cells.in_flight[plane].share()
        self.running, self.log = 0, StateLog(log)
        self.duration, self.items = cells.duration[plane], cells.items[plane]
        self.request_bytes, self.response_bytes = cells.request_bytes[plane], cells.response_bytes[plane]


def _wants_context(handler: Handler) -> bool:
    """Whether a handler takes the context beside the request."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError):
        return True
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return len(places) > 1 or any(each.kind is each.VAR_POSITIONAL for each in parameters)


class PlaneServer(RequestPlaneServer):
    """A server but for its plane. requests_limit: answered at once; limit_bytes: of a request's body.

    homes_allowed: whether an answer may go to an IP address, by default to each that a caller may have. lister: where
    it is listed while it runs. served: told of each request that was answered.
    """

    plane: Plane
    homes_class = Homes

    def __init__(
        self,
        registry: Registry,
        *,
        instance_id: int,
        lister: Lister | None = None,
        served: Served | None = None,
        requests_limit: int = REQUESTS_LIMIT,
        homes_allowed: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.registry, self.settings, self.mode = registry, registry.settings, self.plane.value
        self._instance_id, self._ids = instance_id, {instance_id}
        self._lister, self._served = lister or Lister(), served
        self._requests_limit, self._homes = requests_limit, self.homes_class(homes_allowed)
        intake = registry.bind(RpcIntake)
        self._refused = {reason: intake.refused[self.plane, reason] for reason in IntakeRefusal}
        self.connections = intake.connections[self.plane].share()
        self._endpoints: dict[str, _Endpoint] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: dict[asyncio.Task[None], Answer] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._listing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = asyncio.Lock()
        self._unhook: Callable[[], None] = lambda: None
        self._logs: dict[IntakeRefusal, StateLog] = {}
        self._draining = self._cut = False
        self.started = False

    @property
    def instance_id(self) -> int:
        return self._instance_id

    def renumber(self, instance_id: int) -> None:
        """Take another id, as a lister's lease says; callers may know the former one for a while."""
        self._instance_id = instance_id
        self._ids.add(instance_id)

    def is_mine(self, id: str) -> bool:
        """Whether an id, in hexadecimal, is this instance's, or was."""
        try:
            return int(id, 16) in self._ids
        except ValueError:
            return False

    def endpoint(self, name: str, handler: Handler, *, type: Any = Any, actor_name: str | None = None) -> EndpointName:
        if self.started:
            raise ValueError(f"endpoint={name!r}: the server runs; add endpoints before it starts, as they are listed")
        parsed = EndpointName.parse(name, self.settings.namespace)
        known = self._endpoints.get(parsed.endpoint)
        if known is not None:
            raise ValueError(
                f"endpoint={str(parsed)!r}: this server has {known.text!r} already, and on the wire an endpoint has "
                "only its last name; use another server, or another name"
            )
        cells = self.registry.bind(RpcServing, actor_name=actor_name or parsed.component)
        self._endpoints[parsed.endpoint] = _Endpoint(parsed, handler, type, cells, self.plane)
        return parsed

    @property
    def endpoints(self) -> tuple[EndpointName, ...]:
        """What is served."""
        return tuple(each.name for each in self._endpoints.values())

    # --- its life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        async with self._turn:
            self._same_loop()
            if self.started:
                return
            if not self._endpoints:
                raise ValueError("a server without endpoints: add some with endpoint(name, handler) before it starts")
            self._draining, self._cut, self._loop = False, False, asyncio.get_running_loop()
            await self._listen()
            try:
                self._lister.prepare(self)
            except BaseException:
                await self._close()
                raise
            self.started = True
            self._unhook = at_fork(self, self._go_on_in_child)
            self._listing = asyncio.create_task(self._lister.run(self), name=f"{self.mode} plane: listing")
            self._listing.add_done_callback(self._say_unlisted)

    async def stop(self, timeout_seconds: float = 10.0) -> bool:
        async with self._turn:
            self._same_loop()
            if not self.started:
                return True
            self.started = ended = False
            due = asyncio.get_running_loop().time() + timeout_seconds
            try:
                await self._unlist(timeout_seconds)
                await asyncio.sleep(min(self._lister.heard_seconds, timeout_seconds / 2))
                self._draining = True
                self._drain()
                ended = await self._wait_for_handlers(due)
            finally:  # nothing stays open, also where who stops it is cancelled
                await self._end(due, ended)
            await asyncio.sleep(0)  # connections end in the loop's next turn, and it may be closed after this
        self._turn = asyncio.Lock()  # the next loop's
        return ended

    def _same_loop(self) -> None:
        if self.started and self._loop is not asyncio.get_running_loop():
            raise RuntimeError(f"{self.mode} plane: the server runs in another event loop; stop it there")

    async def _end(self, due: float, ended: bool) -> None:
        self._draining = True
        try:
            if not ended:
                await self._cut_off()
            await self._close()
            if self._telling:
                await asyncio.wait(self._telling, timeout=ENDED_SECONDS)
            left = due - asyncio.get_running_loop().time()
            await self._homes.leave(max(left, ENDED_SECONDS))
        finally:
            mine = asyncio.current_task()
            for answer in [answer for task, answer in self._answers.items() if task is not mine]:
                answer.abort()
            for telling in self._telling:
                telling.cancel()
            self._unhook()

    def _say_unlisted(self, listing: asyncio.Task[None]) -> None:
        if not listing.cancelled() and (error := listing.exception()) is not None:
            log.error("%s plane: the server is listed no more, and goes on: %r", self.mode, error, exc_info=error)

    async def _unlist(self, timeout_seconds: float) -> None:
        listing, self._listing = self._listing, None
        if listing is None:
            return
        listing.cancel()
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.wait([listing])
                await self._lister.withdraw()
        except Exception as error:
            log.warning("%s plane: the server could not be withdrawn, and stops: %r", self.mode, error)

    def _others(self) -> set[asyncio.Task[None]]:
        """What runs, but for the handler that stops its own server."""
        mine = asyncio.current_task()
        return {task for task in self._tasks if task is not mine}

    async def _wait_for_handlers(self, due: float) -> bool:
        others, left = self._others(), due - asyncio.get_running_loop().time()
        if others:
            _, others = await asyncio.wait(others, timeout=max(left, 0))
        if others:
            told = "%s plane: %d requests did not end in time and are cut off"
            log.warning(told, self.mode, len(others))
        return not others

    async def _cut_off(self) -> None:
        """Those whose handler has not begun yet still tell their callers so, as far as these are reached in time."""
        self._cut = True
        others = self._others()
        for task in others & self._answers.keys():
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=ENDED_SECONDS)
        unreached = self._others() - self._answers.keys()
        for task in unreached:
            task.cancel()
        if unreached:
            await asyncio.wait(unreached, timeout=ENDED_SECONDS)

    def _open_files(self) -> Iterable[int]:
        """The descriptors that a plane has open beside the way home, for a forked child to let go."""
        return ()

    def _go_on_in_child(self) -> None:
        """In a forked child: nothing runs, and what is open is the parent's."""
        unplug_all(self._open_files(), self.__dict__.copy())
        self._homes.forked()
        self._tasks, self._answers, self._telling, self._listing = set(), {}, set(), None
        self._turn, self._loop, self.started = asyncio.Lock(), None, False
        self._unhook()
        self.connections.set(0)
        for endpoint in self._endpoints.values():
            endpoint.running = 0
            endpoint.in_flight.set(0)

    @abstractmethod
    async def _listen(self) -> None:
        """Take requests. Raises ServeError."""

    def _drain(self) -> None:
        """Nothing more is taken from now on: a plane whose callers can be told so does it here."""

    @abstractmethod
    async def _close(self) -> None:
        """Take none any more, and end what is open."""

    # --- a request ----------------------------------------------------------------------------------------------------

    def take(self, name: str, payload: bytes, traceparent: str) -> Refusal | None:
        """Take a request for the endpoint of that last name: None where its answer is on its way, else why not."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            return self.refuse(Refusal.UNKNOWN_ENDPOINT)
        if self._draining:
            return self.refuse(Refusal.DRAINING)
        if len(self._tasks) >= self._requests_limit:
            return self.refuse(Refusal.BUSY)
        try:
            parts = read_two_part(payload)
            header = RequestHeader.decode(parts.header)
        except PayloadError as error:
            return self.refuse(Refusal.MALFORMED, str(error))
        if not parts.body:
            return self.refuse(Refusal.MALFORMED, "the request has no body")
        try:
            self._homes.check(header.address)
        except ForbiddenHome as forbidden:
            return self.refuse(Refusal.FORBIDDEN, str(forbidden))
        request = RpcRequest(header.id, endpoint.name, parts.body, valid(traceparent))
        self._begin(endpoint, header, request)
        return None

    def refuse(self, refusal: Refusal, detail: str = "") -> Refusal:
        """Count and say that a request is not taken."""
        self.note(REFUSALS[refusal], detail)
        return refusal

    def tell(self, refusal: Refusal, payload: bytes) -> None:
        """Tell a client of Dynamo that no answer comes, in an answer that says so: over tcp and nats it takes any
        acknowledgement for one of a request that was taken, and would wait for ever. Ours read what that says.

        payload: of the request, or as much of it as came.
        """
        if refusal is Refusal.FORBIDDEN or len(self._telling) >= TOLD_LIMIT:
            return
        with suppress(PayloadError):
            header = RequestHeader.decode(read_header(payload))
            if not header.reuse:
                task = asyncio.get_running_loop().create_task(self._tell(header, refusal.text))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)

    async def _tell(self, header: RequestHeader, reason: str) -> None:
        with suppress(ForbiddenHome, OSError, TimeoutError):
            answer = await self._homes.open(header.address)
            answer.begin(header, lambda _: None, reason)
            answer.end(final=False)

    def note(self, reason: IntakeRefusal, detail: str = "") -> None:
        """Count what never reached a handler; it is said once for each reason, and seldom where it goes on."""
        self._refused[reason].inc()
        said = self._logs.get(reason)
        if said is None:
            said = self._logs[reason] = StateLog(log)
        text = f"{reason.value}: {detail}" if detail else reason.value
        said.note("refused", logging.WARNING, "%s plane: a request was refused: %s; said once", self.mode, text)

    def _begin(self, endpoint: _Endpoint, header: RequestHeader, request: RpcRequest) -> None:
        assert self._loop is not None
        task = self._loop.create_task(self._serve(endpoint, header, request))
        self._tasks.add(task)
        endpoint.running += 1
        endpoint.in_flight.set(endpoint.running)
        task.add_done_callback(lambda done: self._done(endpoint, done))

    def _done(self, endpoint: _Endpoint, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._answers.pop(task, None)
        endpoint.running -= 1
        endpoint.in_flight.set(endpoint.running)
        if task.cancelled():  # before it began
            endpoint.outcomes[ServeOutcome.CUT_OFF].inc()
        elif (error := task.exception()) is not None:
            log.error("%s plane: %s: %r", self.mode, endpoint.text, error, exc_info=error)

    async def _serve(self, endpoint: _Endpoint, header: RequestHeader, request: RpcRequest) -> None:
        began = time.perf_counter()
        outcome, error, sent = ServeOutcome.NO_WAY_HOME, "", 0
        try:
            answer = self._homes.kept(header.address) or await self._homes.open(header.address)
        except (OSError, TimeoutError, ForbiddenHome) as unreachable:
            error = f"no connection to the caller at {header.address}: {unreachable or 'no answer in time'}"
            log.debug("%s plane: %s: %s", self.mode, endpoint.text, error)
        except asyncio.CancelledError:
            outcome = ServeOutcome.CUT_OFF
        else:
            if self._cut:
                outcome, error = ServeOutcome.CUT_OFF, "the server stops"
                answer.begin(header, lambda _: None, Refusal.DRAINING.text)
                answer.end(final=False)
            else:
                outcome, error = await self._answer(endpoint, answer, header, request)
            sent = answer.sent_bytes
        seconds = time.perf_counter() - began
        endpoint.outcomes[outcome].inc()
        endpoint.duration.observe(seconds)
        endpoint.request_bytes.inc(len(request.body))
        endpoint.response_bytes.inc(sent)
        if self._served is not None:
            self._served(endpoint.name, seconds, error)

    async def _answer(
        self, endpoint: _Endpoint, answer: Answer, header: RequestHeader, request: RpcRequest
    ) -> tuple[ServeOutcome, str]:
        """Run the handler, and send what it makes. How that ended, and what was wrong."""
        task = cast("asyncio.Task[None]", asyncio.current_task(self._loop))
        context = _Context(request, task)
        self._answers[task] = answer
        answer.begin(header, context.hear)
        error, cut = "", False
        try:
            with server_span(endpoint.text, self.mode, request.traceparent):
                cut = not await self._run(endpoint, answer, context)
        except asyncio.CancelledError:
            cut = task.cancelling() > 0
            error = "" if cut else "CancelledError: the handler was cancelled from within"
        except Exception as raised:
            error = _text(raised)
            if not context.killed:
                endpoint.log.note(error, logging.WARNING, "%s plane: %s raised %s", self.mode, endpoint.text, error)
                log.debug("%s plane: %s raised", self.mode, endpoint.text, exc_info=raised)
        except BaseException:  # what ends a program ends no answer in order
            answer.abort()
            raise
        return self._ended(answer, context, "the server stops before the answer is whole" if cut else error, cut)

    @staticmethod
    def _ended(answer: Answer, context: _Context, error: str, cut: bool) -> tuple[ServeOutcome, str]:
        """Say how it ended. A caller that is gone hears nothing, whatever its handler made of that."""
        if context.killed:
            answer.end(final=False)
            return ServeOutcome.KILLED, ""
        if error:
            answer.send(encode_error(error))
            answer.end(final=True)
            return (ServeOutcome.CUT_OFF if cut else ServeOutcome.ERROR), error
        answer.end(final=not context.is_stopped())
        return (ServeOutcome.STOPPED if context.is_stopped() else ServeOutcome.OK), ""

    async def _run(self, endpoint: _Endpoint, answer: Answer, context: _Context) -> bool:
        """Whether all was sent, or as much as was wanted; False where the server stops."""
        try:
            value = endpoint.decode(context.request.body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PayloadError("a request of that endpoint", context.request.body, str(error)) from None
        made = endpoint.handler(value, context) if endpoint.wants_context else endpoint.handler(value)
        if not hasattr(made, "__aiter__"):
            made = await _awaited(made)
        if not hasattr(made, "__aiter__"):
            self._send(endpoint, answer, made)
            return True
        items = cast("AsyncIterator[Any]", made)
        close = getattr(items, "aclose", None)
        try:
            async for item in items:
                self._send(endpoint, answer, item)
                if answer.full:
                    await answer.room()
                if context.is_stopped():
                    break
                if self._cut:  # and the handler did not end of being cancelled
                    return False
            else:
                close = None  # it is at its end
        finally:
            if close is not None:
                await close()
        return True

    @staticmethod
    def _send(endpoint: _Endpoint, answer: Answer, item: Any) -> None:
        answer.send(encode_item(_encode(item)))
        endpoint.items.inc()

    @property
    def homes(self) -> Homes:
        """Its connections to callers."""
        return self._homes


def _text(raised: BaseException) -> str:
    """What a caller is told of what a handler raised."""
    try:
        text = f"{type(raised).__name__}: {raised}"
    except Exception:
        text = type(raised).__name__
    return text[:ERROR_CHARACTERS].encode("utf-8", "replace").decode()


async def _awaited(made: Any) -> Any:
    if not inspect.isawaitable(made):
        raise TypeError(f"the handler made {type(made).__name__}, which is neither awaitable nor an async iterator")
    return await made


_encode = msgspec.json.Encoder().encode
