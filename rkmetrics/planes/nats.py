"""The nats plane: requests over a NATS server; answers come home beside it, as over each plane.

    caller    PUB {ns}_{comp}.{ep}-{id hex} {inbox}.{call}    two-part message; with a trace HPUB, header `traceparent`
    worker    PUB {inbox}.{call}                              empty: the request is taken; else why it is not

An acknowledgement says "received", so a real client of Dynamo takes any for one, and then waits for its answer without
end. A refusal therefore goes two ways: as the text of the acknowledgement, which our own clients read, and to others as
the prologue of an answer that does not come, which theirs report at once. Saying nothing would be worse for both: ours
could not try elsewhere, theirs would wait for their time-out. A server that drains leaves its subjects first, so that
NATS itself tells callers that nobody is there.

Of a server of NATS that is away:
- A worker starts without it, after START_SECONDS, and is there as soon as it is.
- A call that is made within AWAY_SECONDS of its loss waits for its return, as no other instance could be reached either
  and a restart takes less than that; then, and for whoever calls later, it fails at once, with nothing delivered.
- A call whose request is on its way when the connection is lost may have been delivered: its answer, which does not
  come over NATS, is awaited for LOST_SECONDS more. Answers that began go on.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from rkmetrics.catalogue.kv import Nats
from rkmetrics.catalogue.planes import Plane
from rkmetrics.errors import RpcRefusedError, RpcUnreachableError
from rkmetrics.nats_link import Link, NatsOptions, flush, listen, require_nats
from rkmetrics.planes.base import EndpointName, Instance, Refusal
from rkmetrics.planes.calling import SILENCE_SECONDS, Call, PlaneClient
from rkmetrics.planes.listening import call_home
from rkmetrics.planes.serving import PlaneServer

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from rkmetrics.registry import Registry

__all__ = ["NatsClient", "NatsServer", "subject_of"]

KIND = "nats_tcp"
QUEUE_GROUP = "q"
TRACEPARENT, STATUS, NO_RESPONDERS = "traceparent", "Status", "503"
#: Of what goes into a subject nothing may be more than a name (reliability, T22).
SUBJECT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)
SUBJECT_CHARACTERS = 500

START_SECONDS = 3.0
AWAY_SECONDS = 3.0
LOST_SECONDS = 1.0
STOP_SECONDS = 1.0
LINGER_SECONDS = 0.05
PROBE_SECONDS = 3.0
#: Requests that wait to be sent, and acknowledgements after which those of calls that ended are forgotten.
WAITING_LIMIT, SWEEP_CALLS = 10_000, 1_024


def subject_of(name: EndpointName, instance_id: int) -> str:
    """Return where an instance of an endpoint hears requests."""
    return f"{name.namespace}_{name.component}.{name.endpoint}-{instance_id:x}"


class _Wire:
    """A connection to NATS for as long as a plane wants it, in its event loop; it comes back by itself."""

    def __init__(self, registry: Registry, what: str) -> None:
        require_nats("the nats request plane")
        self._options, self._cells = NatsOptions.from_settings(registry.settings), registry.bind(Nats)
        self._what = what
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self.nc: Client | None = None

    async def open(self) -> None:
        """Connect, and go on without a connection where there is none in time."""
        self._ready = asyncio.Event()
        self._link = Link(self._options, self._cells, name=self._what)
        self._link.add(self)
        self._task = asyncio.create_task(self._link.run(), name=f"rkmetrics {self._what}")
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._ready.wait()
        except TimeoutError:
            return
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Send what was said last, and leave."""
        link, task, self._task = self._link, self._task, None
        if link is None or task is None:
            return
        link.stop(STOP_SECONDS)
        try:
            await asyncio.wait([task], timeout=2 * STOP_SECONDS)
        finally:
            task.cancel()
            await asyncio.wait([task])

    def files(self) -> Iterable[int]:
        """The descriptor of the connection."""
        transport = getattr(getattr(self.nc, "_transport", None), "_io_writer", None)
        sock = transport.get_extra_info("socket") if transport is not None else None
        if sock is not None:
            yield sock.fileno()

    def forget(self) -> None:
        """In a forked child: it is the parent's."""
        if self._link is not None:
            self._link.forget()
        self._link = self._task = self.nc = None

    # --- as a rider ---------------------------------------------------------------------------------------------------

    async def run(self, nc: Client) -> None:
        """Be there while a connection lasts."""
        try:
            await self.board(nc)
            self.nc = nc
            self._ready.set()
            await self.ride(nc)
        finally:
            self.nc = None
            self.left()

    async def drain(self, nc: Client) -> None:
        """What was published is flushed by the link."""

    def waits(self) -> bool:
        """Whether there is something to send: what is on its way is flushed."""
        return self.nc is not None

    @abstractmethod
    async def board(self, nc: Client) -> None:
        """Subscribe, on a connection that is new."""

    @abstractmethod
    async def ride(self, nc: Client) -> None:
        """Work until cancelled."""

    def left(self) -> None:
        """The connection is gone."""


# --- the server -------------------------------------------------------------------------------------------------------


class _Ears(_Wire):
    """Hears the subjects of a server."""

    def __init__(self, server: NatsServer, registry: Registry) -> None:
        super().__init__(registry, "request plane server")
        self._server = server
        self._changed = asyncio.Event()
        self._following = asyncio.Lock()
        self._subscriptions: dict[str, Subscription] = {}

    async def open(self) -> None:
        """Connect, and subscribe."""
        self._changed, self._following = asyncio.Event(), asyncio.Lock()
        await super().open()

    def change(self) -> None:
        """Subjects came, or all are to be left."""
        self._changed.set()

    async def board(self, nc: Client) -> None:
        self._subscriptions = {}
        await self._follow(nc)

    async def drain(self, nc: Client) -> None:
        await self._follow(nc)

    async def ride(self, nc: Client) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._follow(nc)

    async def _follow(self, nc: Client) -> None:
        """Subscribe to what is new, or leave all; both are true at NATS when this returns."""
        async with self._following:
            wanted = self._server.subjects()
            for subject, endpoint in wanted.items():
                if subject not in self._subscriptions:
                    hear = self._hearing(nc, endpoint)
                    self._subscriptions[subject] = await listen(nc, subject, hear, queue=QUEUE_GROUP)
            leaving = [each for each in self._subscriptions if each not in wanted]
            for subject in leaving:
                await _unsubscribe(nc, self._subscriptions.pop(subject))
            await flush(nc)
            if leaving:
                await asyncio.sleep(LINGER_SECONDS)

    def _hearing(self, nc: Client, endpoint: str) -> Any:
        server = self._server

        async def hear(message: Msg) -> None:
            if not message.data:  # a probe (NatsClient.probe): that it is answered is all
                if message.reply:
                    await nc.publish(message.reply, Refusal.MALFORMED.text.encode())
                return
            traceparent = message.headers.get(TRACEPARENT, "") if message.headers else ""
            refusal = server.take(endpoint, message.data, traceparent)
            if refusal is not None:
                server.tell(refusal, message.data)
            if message.reply:
                await nc.publish(message.reply, b"" if refusal is None else refusal.text.encode())

        return hear


async def _unsubscribe(nc: Client, subscription: Subscription) -> None:
    """Have NATS send nothing more, and hear what it sends nevertheless.

    A message that it is just handing over may come after all that it says of the end, and nats-py's own ways then drop
    it, so that its sender would wait for its time-out.
    """
    client: Any = nc
    if hasattr(client, "_send_unsubscribe"):
        await client._send_unsubscribe(subscription._id)
    else:
        await subscription.unsubscribe()


class NatsServer(PlaneServer):
    """Serves endpoints over NATS, at NATS_SERVER."""

    plane = Plane.NATS

    def __init__(self, registry: Registry, **options: Any) -> None:
        super().__init__(registry, **options)
        self._ears = _Ears(self, registry)
        self._deaf = True

    async def _listen(self) -> None:
        self._deaf = False
        await self._ears.open()

    def _drain(self) -> None:
        self._deaf = True
        self._ears.change()

    async def _close(self) -> None:
        await self._ears.close()

    def renumber(self, instance_id: int) -> None:
        super().renumber(instance_id)
        self._ears.change()

    def subjects(self) -> dict[str, str]:
        """What is to be heard now, and the endpoint of each: of all ids that the instance has, or had."""
        if self._deaf:
            return {}
        return {subject_of(name, id): name.endpoint for name in self.endpoints for id in self._ids}

    def instances(self) -> Iterable[Instance]:
        for name in self.endpoints:
            yield Instance(*name, self.instance_id, (KIND, subject_of(name, self.instance_id)))

    def _open_files(self) -> Iterable[int]:
        return self._ears.files()

    def _go_on_in_child(self) -> None:
        super()._go_on_in_child()
        self._ears.forget()


# --- the client -------------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """What waits to be sent."""

    call: Call
    payload: bytes
    traceparent: str

    @property
    def size_bytes(self) -> int:
        """What NATS compares with its limit."""
        return len(self.payload) + (len(_head(self.traceparent)) if self.traceparent else 0)


def _head(traceparent: str) -> bytes:
    return b"NATS/1.0\r\ntraceparent: %b\r\n\r\n" % traceparent.encode()


class _Voice(_Wire):
    """Sends the requests of a client, and hears what becomes of them."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry, "request plane client")
        self._waiting: deque[_Request] = deque()
        self._wake = asyncio.Event()
        self._sent: dict[str, Call] = {}
        self._sweep_at = SWEEP_CALLS
        self._inbox = ""
        self._away_since = 0.0
        self._patience: asyncio.TimerHandle | None = None
        self._losses: set[asyncio.TimerHandle] = set()

    async def open(self) -> None:
        """Connect."""
        self._wake = asyncio.Event()
        self._away()
        await super().open()

    async def close(self) -> None:
        """Leave; what waits is not sent."""
        self.give_up("the client was closed")
        for call in self._take_sent():
            _lose(call, "the client was closed before the acknowledgement")
        await super().close()
        for timer in self._losses:
            timer.cancel()
        self._losses.clear()
        self._be_patient(None)

    def forget(self) -> None:
        """In a forked child: what waits is the parent's to send."""
        super().forget()
        self._waiting, self._sent, self._losses, self._patience = deque(), {}, set(), None

    # --- what waits ---------------------------------------------------------------------------------------------------

    def send(self, request: _Request) -> None:
        """Send, as soon as there is a connection."""
        loop = asyncio.get_running_loop()
        if self.nc is None and loop.time() - self._away_since >= AWAY_SECONDS:
            self._fail(request.call, "there is no connection to NATS")
        elif len(self._waiting) >= WAITING_LIMIT:
            self._fail(request.call, f"{WAITING_LIMIT} requests wait for NATS already")
        else:
            self._waiting.append(request)
            self._wake.set()

    def give_up(self, reason: str) -> None:
        """Nothing of what waits was sent."""
        waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            self._fail(request.call, reason)

    def _fail(self, call: Call, reason: str) -> None:
        reason = f"{reason} ({self._options.shown})"
        call.fail(RpcUnreachableError(call.endpoint, reason, instance=call.where))

    def _away(self) -> None:
        loop = asyncio.get_running_loop()
        self._away_since = loop.time()
        self._be_patient(loop.call_later(AWAY_SECONDS, self._still_away))

    def _still_away(self) -> None:
        self.give_up(f"there was no connection to NATS for {AWAY_SECONDS:g} s")

    def _be_patient(self, timer: asyncio.TimerHandle | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = timer

    # --- while there is a connection ----------------------------------------------------------------------------------

    async def board(self, nc: Client) -> None:
        self._inbox = f"{nc.new_inbox()}."
        await listen(nc, f"{self._inbox}*", self._hear)
        await flush(nc)
        self._be_patient(None)

    async def ride(self, nc: Client) -> None:
        while True:
            while self._waiting:
                await self._publish(nc, self._waiting.popleft())
            self._wake.clear()
            await self._wake.wait()

    async def _publish(self, nc: Client, request: _Request) -> None:
        call, size = request.call, request.size_bytes
        if call.begun.done():  # nobody waits any more
            return
        if size > nc.max_payload:
            reason = (
                f"{Refusal.TOO_LARGE.text}: it has {size} bytes, and this NATS server takes {nc.max_payload} of a "
                "message; raise its max_payload, or use another request plane"
            )
            call.fail(RpcRefusedError(call.endpoint, reason, instance=call.where))
            return
        token = secrets.token_hex(8)  # whoever hears one inbox cannot refuse the calls after it
        self._remember(token, call)
        headers = {TRACEPARENT: request.traceparent} if request.traceparent else None
        await nc.publish(call.where, request.payload, self._inbox + token, headers)

    def _remember(self, token: str, call: Call) -> None:
        if len(self._sent) >= self._sweep_at:
            self._sent = {token: each for token, each in self._sent.items() if not each.begun.done()}
            self._sweep_at = max(SWEEP_CALLS, 2 * len(self._sent))
        self._sent[token] = call

    async def _hear(self, message: Msg) -> None:
        call = self._sent.pop(message.subject[len(self._inbox) :], None)
        if call is None:
            return
        if message.headers and message.headers.get(STATUS) == NO_RESPONDERS:
            reason = "nobody hears that subject"
            call.fail(RpcUnreachableError(call.endpoint, reason, instance=call.where))
        elif message.data:
            reason = message.data.decode("utf-8", "replace")
            call.fail(RpcRefusedError(call.endpoint, reason, instance=call.where))
        else:
            call.acknowledged()

    # --- when there is none any more ----------------------------------------------------------------------------------

    def left(self) -> None:
        self._away()
        sent = self._take_sent()
        if sent:
            loop = asyncio.get_running_loop()
            self._losses = {timer for timer in self._losses if timer.when() > loop.time()}
            self._losses.add(loop.call_later(LOST_SECONDS, self._lost, sent))

    def _take_sent(self) -> list[Call]:
        sent, self._sent = self._sent, {}
        return [call for call in sent.values() if not call.begun.done()]

    @staticmethod
    def _lost(calls: list[Call]) -> None:
        for call in calls:
            _lose(call, "the connection to NATS ended before the acknowledgement")


def _lose(call: Call, reason: str) -> None:
    """Of a request that may have been taken; an answer that has begun goes on."""
    if not call.begun.done():
        call.fail(RpcUnreachableError(call.endpoint, reason, instance=call.where, delivered=True))


class NatsClient(PlaneClient):
    """Calls over NATS, at NATS_SERVER. How long the beginning of an answer may take is DYN_TCP_REQUEST_TIMEOUT, and
    where answers are awaited DYN_TCP_RPC_HOST, as they come over tcp."""

    plane = Plane.NATS

    def __init__(
        self, registry: Registry, *, silence_seconds: float = SILENCE_SECONDS, actor_name: str | None = None
    ) -> None:
        settings = registry.settings
        super().__init__(
            registry,
            call_home(settings, settings.tcp_rpc_host),
            request_timeout_seconds=settings.tcp_request_timeout_seconds,
            silence_seconds=silence_seconds,
            actor_name=actor_name,
        )
        self._voice = _Voice(registry)

    async def _open(self) -> None:
        await self._voice.open()

    async def _close(self) -> None:
        await self._voice.close()

    def _push(self, call: Call, payload: bytes, traceparent: str) -> None:
        kind, subject = call.instance.transport
        wrong = ""
        if kind != KIND:
            wrong = f"it is reached over {kind!r}, and this client speaks {KIND}"
        elif len(subject) > SUBJECT_CHARACTERS or not SUBJECT.fullmatch(subject):
            shown = subject[:SUBJECT_CHARACTERS]
            wrong = f"{shown!r}: expected a subject of two names, of letters, digits, '_' and '-'"
        if wrong:
            call.fail(RpcUnreachableError(call.endpoint, wrong, instance=call.where))
        else:
            self._voice.send(_Request(call, payload, traceparent))

    async def probe(self, instance: Instance) -> bool:
        """Whether somebody hears the subject and says so; NATS itself says where nobody does."""
        from nats.errors import Error

        nc, subject = self._voice.nc, instance.transport[1]
        if nc is None or not SUBJECT.fullmatch(subject):
            return False
        try:
            await nc.request(subject, b"", timeout=PROBE_SECONDS)
        except (Error, OSError, TimeoutError):
            return False
        return True

    def _open_files(self) -> Iterable[int]:
        return self._voice.files()

    def _go_on_in_child(self) -> None:
        super()._go_on_in_child()
        self._voice.forget()
