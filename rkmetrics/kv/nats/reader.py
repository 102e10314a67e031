"""Reads the KV events of a component: the stream from its beginning on, and what is sent without a stream.

A real router, when it starts, deletes every consumer of the stream that is no router's (seen with 0.7.1 and 0.8.1). So
the consumer here is one that may go at any time: an unnamed one, without acknowledgements, made anew from the event
after the last one that was read, as soon as the server says that it is gone or its heartbeat stays away. Nothing is
missed and nothing read twice, since the stream counts.

Where the stream begins after what was read (events expired meanwhile, or it is another stream), what is known may be
wrong: it is thrown away, and read anew from the stream's beginning.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from rkmetrics.kv.events import local_subject, stream_name
from rkmetrics.kv.nats.jetstream import JetStreamTrouble, StreamState, Troubles, ask, ensure_stream
from rkmetrics.nats_link import listen
from rkmetrics.retry import Backoff

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

__all__ = ["EventReader"]

log = logging.getLogger("rkmetrics.nats")

BATCH = 500
EXPIRES_SECONDS, HEARTBEAT_SECONDS, PATIENCE_SECONDS = 30.0, 1.0, 3.0
INACTIVE_SECONDS = 30.0
MISSING = "messages were dropped on the way, as this loop was too slow"
NANOSECONDS = 1_000_000_000


class EventReader:
    """Hands on each event as it came. A rider of a link.

    apply: takes the bytes of one event. reset: forgets all that was applied. caught_up: set while what is known is as
    new as the stream.
    """

    def __init__(
        self, namespace: str, component: str, apply: Callable[[bytes], object], reset: Callable[[], object]
    ) -> None:
        self._stream, self._local = stream_name(namespace, component), local_subject(namespace, component)
        self._apply, self._reset = apply, reset
        self.caught_up = asyncio.Event()
        self._read = 0  # the last sequence number
        self._created = ""
        self._troubles = Troubles(f"the stream {self._stream}", "reading is tried again")

    async def run(self, nc: Client) -> None:
        """Read while the connection lasts."""
        await listen(nc, self._local, self._hear)
        backoff = Backoff()
        while True:
            before = self._read
            try:
                await _Consumption(self, nc).run(backoff)
            except JetStreamTrouble as trouble:
                self._troubles.note(trouble.reason)
            finally:  # also where the connection is lost
                self.caught_up.clear()
            if self._read > before:
                backoff.reset()
            await asyncio.sleep(backoff.next())

    async def drain(self, nc: Client) -> None:
        """Nothing of ours waits."""

    def waits(self) -> bool:
        """Never."""
        return False

    async def _hear(self, message: Msg) -> None:
        self._apply(message.data)

    def begin(self, created: str, state: StreamState) -> int:
        """Return where to read on in a stream that is so; forget all if that leaves a gap."""
        same = created == self._created and state.last_seq >= self._read and state.first_seq <= self._read + 1
        if self._created and not same:
            log.warning("KV events: %s no longer holds what was read last; all is read anew", self._stream)
            self._reset()
        if not same:
            self._read = 0
        self._created = created
        return self._read + 1

    def take(self, data: bytes, sequence: int) -> None:
        """Take an event of the stream."""
        self._apply(data)
        self._read = sequence

    def well(self) -> None:
        """The stream is read."""
        self._troubles.note("")

    @property
    def stream(self) -> str:
        return self._stream


class _Consumption:
    """One consumer, from its making to its loss."""

    def __init__(self, reader: EventReader, nc: Client) -> None:
        self._reader, self._nc = reader, nc
        self._left = 0  # messages of the request that is open
        self._delivered = 0  # messages of this consumer so far
        self._again = asyncio.Event()
        self._gone = ""
        self._heard = False

    async def run(self, backoff: Backoff) -> None:
        reader, nc = self._reader, self._nc
        inbox = nc.new_inbox()
        listening = await listen(nc, inbox, self._hear)
        try:
            found = await ensure_stream(nc, reader.stream)
            made = await self._make(reader.begin(found.created, found.state or StreamState()))
            reader.well()
            if not made.num_pending:
                reader.caught_up.set()
            await self._pull(f"$JS.API.CONSUMER.MSG.NEXT.{reader.stream}.{made.name}", inbox, backoff)
        finally:
            if not nc.is_closed:
                await listening.unsubscribe()

    async def _make(self, start: int) -> Any:
        config = {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": start,
            "ack_policy": "none",
            "replay_policy": "instant",
            "inactive_threshold": int(INACTIVE_SECONDS * NANOSECONDS),
            "mem_storage": True,
        }
        body = msgspec.json.encode({"stream_name": self._reader.stream, "config": config})
        made = await ask(self._nc, f"$JS.API.CONSUMER.CREATE.{self._reader.stream}", body)
        if made.error is not None:
            raise JetStreamTrouble(made.error.reason)
        return made

    async def _pull(self, subject: str, inbox: str, backoff: Backoff) -> None:
        """Keep one request open, until the consumer is gone."""
        request = msgspec.json.encode(
            {
                "batch": BATCH,
                "expires": int(EXPIRES_SECONDS * NANOSECONDS),
                "idle_heartbeat": int(HEARTBEAT_SECONDS * NANOSECONDS),
            }
        )
        while not self._gone:
            self._left = BATCH
            self._again.clear()
            await self._nc.publish(subject, request, reply=inbox)
            while not self._again.is_set():
                self._heard = False
                try:
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        await self._again.wait()
                except TimeoutError:
                    if not self._heard:
                        log.debug("KV events: nothing is heard of the consumer; it is made anew")
                        return
                    backoff.reset()

    async def _hear(self, message: Msg) -> None:
        self._heard = True
        status = (message.headers or {}).get("Status")
        if status is not None:
            self._hear_status(status, message)
            return
        sequence, delivered, pending = _position(message.reply)
        if self._gone or delivered != self._delivered + 1:
            self._give_up(MISSING)
            return
        self._delivered = delivered
        self._reader.take(message.data, sequence)
        self._left -= 1
        if not pending:
            self._reader.caught_up.set()
        if self._left <= 0:
            self._again.set()

    def _hear_status(self, status: str, message: Msg) -> None:
        headers = message.headers or {}
        if status == "100":  # a heartbeat, which says how many messages came before it
            if int(headers.get("Nats-Last-Consumer", "0")) > self._delivered:
                self._give_up(MISSING)
        elif status in ("404", "408"):  # the request is over
            self._again.set()
        else:
            self._give_up(headers.get("Description", status))

    def _give_up(self, why: str) -> None:
        if not self._gone:
            log.debug("KV events: the consumer is given up (%s), and made anew", why)
        self._gone = self._gone or why
        self._again.set()


def _position(reply: str) -> tuple[int, int, int]:
    """Its number in the stream, its number at the consumer, and how many are still to come.

    $JS.ACK.[domain.account.]stream.consumer.n.STREAM.CONSUMER.time.PENDING (ADR-15, "JetStream subscribe workflow");
    with a domain, a random token may stand at the end.
    """
    tokens = reply.split(".")
    first = 5 if len(tokens) == 9 else 7
    return int(tokens[first]), int(tokens[first + 1]), int(tokens[first + 3])
