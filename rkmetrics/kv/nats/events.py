"""KV events over NATS: sent in order, none lost without a word.

A bounded queue holds what is not acknowledged. To a stream (JetStream) a window of it is on the way at a time; when the
connection breaks, or an answer does not come, the window is sent again from its first event on with the same message
ids, so that the stream stores each once (within its duplicate window, two minutes). When the server *refuses* an event,
those after it may be stored already and are out of order: then all are sent again under new ids. The same where an
acknowledgement says that an event stands in the stream before one that it follows (which was lost on its way, as
happens when a stream changes its leader). A router takes what it knows already without harm, and a wrong order it never
forgives (an event whose parent it does not know is skipped).

What does not fit into the queue is lost, and everything before it is then worthless: a router would believe in blocks
that are gone. So the queue is emptied, and goes on with a `cleared` event of the worker: routers then know too little
of it for a while, and never too much.

Without a stream (the "local indexer" of 0.8 and later) an event counts as sent when a round trip after it came back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING
from uuid import uuid4

import msgspec

from rkmetrics.catalogue.kv import EventOutcome, KvPublishing
from rkmetrics.kv.events import (
    Cleared,
    KvEvent,
    RouterEvent,
    encode_event,
    encode_local,
    event_subject,
    local_subject,
    stream_name,
)
from rkmetrics.kv.nats.jetstream import JetStreamTrouble, Troubles, decode_answer, ensure_stream
from rkmetrics.kv.nats.thread import Doorbell
from rkmetrics.nats_link import flush, listen
from rkmetrics.retry import Backoff, StateLog

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

__all__ = ["EventQueue", "LocalEvents", "StreamEvents"]

log = logging.getLogger("rkmetrics.nats")

QUEUE_EVENTS = 10_000
#: What the waiting events of one worker hold at most; an event of a long prompt has some ten thousand bytes.
QUEUE_BYTES = 16 * 1024 * 1024
WINDOW_EVENTS = 512
ACK_SECONDS = 3.0
#: JetStream's error codes (nats-server, "errors.json"): the stream takes no message of that size, ever.
TOO_LARGE_CODES = frozenset({10054})


class _Entry:
    """One event that waits. generation: grows when it is sent under a new message id. place: in the stream, or whatever
    grows with each that is acknowledged; 0 until it is."""

    __slots__ = ("generation", "number", "payload", "place", "who")

    def __init__(self, event: RouterEvent, payload: bytes, number: int) -> None:
        self.who = event.worker_id, event.event.event_id, event.event.dp_rank
        self.payload, self.number = payload, number
        self.generation = self.place = 0

    def cleared(self) -> RouterEvent:
        """What is sent where this event cannot be."""
        worker_id, event_id, dp_rank = self.who
        return RouterEvent(worker_id, KvEvent(event_id, Cleared(), dp_rank))


class EventQueue:
    """The events of one worker that wait, oldest first; the first `in_flight` of them are on their way.

    `put` comes from any thread, the rest from the loop that sends. The lock is reentrant, as a signal handler may put
    too, and made anew in a forked child.
    """

    def __init__(self, encode: Callable[[RouterEvent], bytes], cells: KvPublishing, limit: int = QUEUE_EVENTS) -> None:
        self._encode, self._limit = encode, limit
        self._count = {outcome: cells.events[outcome] for outcome in EventOutcome}
        self._depth = cells.events_pending.share()
        self._number = self._bytes = 0
        self._place = 0  # of the last one that was let go
        self._closed = False
        self._log = StateLog(log)
        self._lock = threading.RLock()
        self._waiting: deque[_Entry] = deque()
        self._settled = asyncio.Event()
        self.in_flight = 0
        self.bell = Doorbell()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: RouterEvent) -> None:
        """Take an event. Past the limit the queue begins afresh with `cleared`, and what it held counts as dropped.

        Raises KvValueError for an event that no wire can carry, here where its maker hears of it.
        """
        with self._lock:
            payload = self._encode(event)
            if self._closed:
                self._count[EventOutcome.DROPPED].inc()
                return
            if self._waiting and not self._has_room(len(payload)):
                self._overflow()
            self._append(event, payload)
        self.bell.ring()

    def _has_room(self, size_bytes: int) -> bool:
        return len(self._waiting) < self._limit and self._bytes + size_bytes <= QUEUE_BYTES

    def _append(self, event: RouterEvent, payload: bytes) -> None:
        self._number += 1
        self._bytes += len(payload)
        self._waiting.append(_Entry(event, payload, self._number))
        self._depth.set(len(self._waiting))

    def _overflow(self) -> None:
        dropped, last = len(self._waiting), self._waiting[-1].cleared()
        self._waiting.clear()
        self.in_flight = self._bytes = 0
        self._append(last, self._encode(last))
        self._count[EventOutcome.DROPPED].inc(dropped)
        self._log.note(
            "dropped",
            logging.WARNING,
            "KV events of worker %d: %d dropped, as NATS is away or slower than they come; routers are told to forget "
            "this worker's blocks and learn them anew; said once until they flow again",
            last.worker_id,
            dropped,
        )

    def take(self, window: int) -> list[_Entry]:
        """Return what may be sent now, so that at most `window` are on their way."""
        with self._lock:
            taken = list(islice(self._waiting, self.in_flight, window))
            self.in_flight += len(taken)
        return [entry for entry in taken if not entry.place]

    def settle(self) -> int | None:
        """Let go of what is acknowledged, from the front on. The number of an event that stands in the stream before
        one that it follows: it and all after it must be sent anew. None where all is in order."""
        with self._lock:
            count, waiting = 0, self._waiting
            while waiting and waiting[0].place > self._place:
                entry = waiting.popleft()
                self._place = entry.place
                self._bytes -= len(entry.payload)
                count += 1
            astray = waiting[0].number if waiting and waiting[0].place else None
            if count:
                self.in_flight = max(self.in_flight - count, 0)
                if len(waiting) <= self._limit // 2:
                    self._log.note("", logging.DEBUG, "KV events flow")
                self._depth.set(len(waiting))
        if count:
            self._count[EventOutcome.SENT].inc(count)
            self._settled.set()
        return astray

    async def drained(self) -> None:
        """Return when nothing waits."""
        while self._waiting:
            self._settled.clear()
            await self._settled.wait()

    def rewind(self, anew_from: int | None = None) -> None:
        """Send again what is on its way; from that number on under new ids, also what was acknowledged."""
        with self._lock:
            flying = list(islice(self._waiting, 0, self.in_flight))
            self.in_flight = 0
            if anew_from is not None:
                self._place = 0  # it may be another stream, which counts from 1 again
        for entry in flying:
            if anew_from is not None and entry.number >= anew_from:
                entry.place = 0
                entry.generation += 1
        self._count[EventOutcome.REPEATED].inc(sum(not entry.place for entry in flying))

    def replace(self, entry: _Entry) -> None:
        """The server will never take this one: in its place goes `cleared`, under another id."""
        payload = self._encode(entry.cleared())
        with self._lock:
            self._bytes += len(payload) - len(entry.payload)
            entry.payload = payload
        entry.generation += 1
        self._count[EventOutcome.DROPPED].inc()

    def forget(self) -> None:
        """In a forked child: what waits is the parent's to send."""
        self._lock, self._waiting = threading.RLock(), deque()
        self.in_flight = self._bytes = self._place = 0
        self.bell = Doorbell()
        self._depth.set(0)

    def close(self) -> None:
        """Nobody sends any more; what waits is lost, and so is what still comes, and counted."""
        with self._lock:
            self._closed = True
            self._count[EventOutcome.DROPPED].inc(len(self._waiting))
            self._waiting.clear()
            self.in_flight = self._bytes = 0
        self._depth.close()


class _Refused(JetStreamTrouble):
    """An event was refused; number: which one."""

    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason)
        self.number = number


class StreamEvents:
    """Sends the events of one worker to the stream of its component, each acknowledged. A rider of a link thread.

    troubles: of the streams that are known, so that what is wrong with one is said once, for however many workers.
    """

    def __init__(
        self,
        namespace: str,
        component: str,
        wire: str,
        cells: KvPublishing,
        limit: int,
        ensure: Callable[[], None],
        troubles: dict[str, Troubles],
    ) -> None:
        self._subject, self._stream = event_subject(namespace, component, wire), stream_name(namespace, component)
        self._queue, self._ensure = EventQueue(lambda event: encode_event(event, wire), cells, limit), ensure
        self._id = uuid4().hex
        self._flying: dict[int, _Entry] = {}
        self._refusal: _Refused | None = None
        self._attempt = 0
        self._patience = 0.0  # until when the oldest of what is on its way must be answered
        said = Troubles(f"the stream {self._stream}", "they wait, up to a limit")
        self._troubles = troubles.setdefault(self._stream, said)
        self._too_large = False

    def offer(self, event: RouterEvent) -> None:
        """Take an event, in the order of the calls. Waits for nothing."""
        self._ensure()
        self._queue.put(event)

    async def run(self, nc: Client) -> None:
        """Send what waits, while the connection lasts."""
        self._flying, self._refusal = {}, None
        inbox = nc.new_inbox()
        listening = await listen(nc, f"{inbox}.*.*", self._answered)
        try:
            await self._keep_on(nc, inbox)
        finally:
            if not nc.is_closed:
                await listening.unsubscribe()

    async def _keep_on(self, nc: Client, inbox: str) -> None:
        self._queue.rewind()
        backoff = Backoff()
        while True:
            try:
                await ensure_stream(nc, self._stream)
                await self._pump(nc, inbox, backoff)
            except JetStreamTrouble as trouble:
                self._troubles.note(trouble.reason)
                await asyncio.sleep(backoff.next())
                self._flying.clear()
                self._attempt += 1  # answers to what was sent before say nothing of what is sent again
                self._queue.rewind(trouble.number if isinstance(trouble, _Refused) else None)

    def waits(self) -> bool:
        """Whether there is something to send."""
        return len(self._queue) > 0

    async def drain(self, nc: Client) -> None:
        """Wait until all is acknowledged; whoever calls has a limit."""
        await self._queue.drained()

    def close(self) -> None:
        """Nobody sends any more; what waits is lost, and counted."""
        self._queue.close()

    def forget(self) -> None:
        """In a forked child."""
        self._queue.forget()
        self._id = uuid4().hex

    async def _pump(self, nc: Client, inbox: str, backoff: Backoff) -> None:
        while True:
            for entry in self._queue.take(WINDOW_EVENTS):
                await self._send(nc, inbox, entry)
            try:
                async with asyncio.timeout_at(self._patience if self._flying else None):
                    await self._queue.bell.wait()
            except TimeoutError:
                raise JetStreamTrouble("the server does not acknowledge") from None
            if (astray := self._queue.settle()) is not None:
                self._refuse("the stream has events in another order", astray)
            if self._refusal is not None:
                refusal, self._refusal = self._refusal, None
                raise refusal
            if not self._flying:
                self._troubles.note("")
                backoff.reset()

    async def _send(self, nc: Client, inbox: str, entry: _Entry) -> None:
        if (size := len(entry.payload)) > nc.max_payload:
            self._give_up(entry, f"{size} bytes are more than the server takes (max_payload {nc.max_payload})")
        if not self._flying:
            self._wait_anew()
        self._flying[entry.number] = entry
        id = f"{self._id}-{entry.number}" + (f".{entry.generation}" if entry.generation else "")
        reply = f"{inbox}.{self._attempt}.{entry.number}"
        await nc.publish(self._subject, entry.payload, reply=reply, headers={"Nats-Msg-Id": id})

    def _wait_anew(self) -> None:
        """Wait for the full time again. Only for the oldest: with one answer lost and many others to come, a worker
        that never rests would wait for ever."""
        self._patience = asyncio.get_running_loop().time() + ACK_SECONDS

    async def _answered(self, message: Msg) -> None:
        """An acknowledgement, a refusal, or word that nobody listens."""
        attempt, number = map(int, message.subject.rsplit(".", 2)[1:])
        if attempt != self._attempt or number not in self._flying:
            return
        if number == next(iter(self._flying)):
            self._wait_anew()
        entry = self._flying.pop(number)
        reason = self._judge(message, entry)
        if reason:
            self._refuse(reason, number)
        self._queue.bell.ring()

    def _refuse(self, reason: str, number: int) -> None:
        if self._refusal is None or number < self._refusal.number:
            self._refusal = _Refused(reason, number)

    def _judge(self, message: Msg, entry: _Entry) -> str:
        """Why the event was refused; "" if it was not, and then it has its place."""
        if (message.headers or {}).get("Status") == "503":
            return f"no stream takes {self._subject}"
        try:
            answer = decode_answer(message.data)
        except msgspec.MsgspecError:
            return "the answer is no acknowledgement"
        error = answer.error
        if error is None:
            entry.place = answer.seq
            return "" if answer.seq else "the answer is no acknowledgement"
        if error.err_code in TOO_LARGE_CODES:
            self._give_up(entry, error.description)
        return error.description or f"error {error.err_code}"

    def _give_up(self, entry: _Entry, why: str) -> None:
        self._queue.replace(entry)
        if not self._too_large:
            self._too_large = True
            log.warning("a KV event is dropped, and the worker's blocks with it: %s; this is said once", why)


class LocalEvents:
    """Sends the events of one worker without a stream, to whoever listens. A rider of a link thread."""

    def __init__(
        self, namespace: str, component: str, wire: str, cells: KvPublishing, limit: int, ensure: Callable[[], None]
    ) -> None:
        self._subject, self._wire = local_subject(namespace, component), wire
        self._queue, self._ensure = EventQueue(self._encode, cells, limit), ensure
        self._sequence = 0

    def offer(self, event: RouterEvent) -> None:
        """Take an event, in the order of the calls. Waits for nothing."""
        self._ensure()
        self._queue.put(event)

    async def run(self, nc: Client) -> None:
        """Send what waits, while the connection lasts."""
        self._queue.rewind()
        while True:
            await self._flush(nc)
            await self._queue.bell.wait()

    def waits(self) -> bool:
        """Whether there is something to send."""
        return len(self._queue) > 0

    async def drain(self, nc: Client) -> None:
        """Send what waits."""
        await self._queue.drained()

    def close(self) -> None:
        """Nobody sends any more; what waits is lost, and counted."""
        self._queue.close()

    def forget(self) -> None:
        """In a forked child."""
        self._queue.forget()

    async def _flush(self, nc: Client) -> None:
        while entries := self._queue.take(WINDOW_EVENTS):
            for entry in entries:
                if len(entry.payload) > nc.max_payload:
                    self._queue.replace(entry)
                await nc.publish(self._subject, entry.payload)
            await flush(nc)  # a silent server is the link's to notice
            for entry in entries:
                entry.place = entry.number
            self._queue.settle()

    def _encode(self, event: RouterEvent) -> bytes:
        self._sequence += 1
        return encode_local(event, self._wire, self._sequence - 1, time.time_ns() // 1_000_000)
