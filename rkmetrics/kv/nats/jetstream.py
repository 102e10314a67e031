"""The few words of JetStream's API that KV events need, and how its troubles are told.

nats-py's own JetStream context is not used: it takes 0.2 s to import, and both what is asked for and what is answered
are to be exactly as real workers have it. References: NATS ADR-1 ("JSON API design") and ADR-13
("Pull subscribe internals").
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from rkmetrics.kv.events import stream_config
from rkmetrics.retry import StateLog

if TYPE_CHECKING:
    from nats.aio.client import Client

__all__ = ["Answer", "JetStreamTrouble", "StreamState", "Troubles", "ask", "decode_answer", "ensure_stream"]

log = logging.getLogger("rkmetrics.nats")

API_SECONDS = 3.0
STREAM_NOT_FOUND = 10059  # nats-server, "errors.json"


class JetStreamTrouble(Exception):
    """Why events do not flow although the connection stands."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Troubles:
    """Says when events stop to flow, why, and when they flow again; once each, and seldom where it flaps."""

    def __init__(self, where: str, meanwhile: str) -> None:
        self._where, self._meanwhile, self._log = where, meanwhile, StateLog(log)

    def note(self, reason: str) -> None:
        """Take what is wrong now; "" for nothing."""
        told = f"{reason}; {self._meanwhile}" if reason else "all is well again"
        self._log.note(reason, logging.WARNING, "KV events and %s: %s", self._where, told)


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""

    @property
    def reason(self) -> str:
        return self.description or f"error {self.err_code or self.code}"


class StreamState(msgspec.Struct):
    """What a stream holds, by sequence numbers; 0 where it holds nothing."""

    first_seq: int = 0
    last_seq: int = 0


class Answer(msgspec.Struct):
    """What is read of an answer of the API, or of an acknowledgement."""

    error: _Error | None = None
    created: str = ""
    state: StreamState | None = None
    name: str = ""
    num_pending: int = 0
    seq: int = 0


decode_answer = msgspec.json.Decoder(Answer).decode


async def ask(nc: Client, subject: str, payload: bytes = b"") -> Answer:
    """Ask the API. An error it answers with is in the answer; raises JetStreamTrouble without an answer."""
    from nats.errors import NoRespondersError

    try:
        message = await nc.request(subject, payload, timeout=API_SECONDS)
        return decode_answer(message.data)
    except NoRespondersError:
        raise JetStreamTrouble("the server has no JetStream") from None
    except TimeoutError:
        raise JetStreamTrouble("JetStream does not answer") from None
    except msgspec.MsgspecError as error:
        raise JetStreamTrouble(f"JetStream answers what nobody understands: {error}") from None


async def ensure_stream(nc: Client, name: str) -> Answer:
    """Return what is known of a stream, which is made as real workers make it if it is not there.

    Raises JetStreamTrouble.
    """
    found = await ask(nc, f"$JS.API.STREAM.INFO.{name}")
    if found.error is not None and found.error.err_code == STREAM_NOT_FOUND:
        found = await ask(nc, f"$JS.API.STREAM.CREATE.{name}", stream_config(name))
    if found.error is not None:
        raise JetStreamTrouble(found.error.reason)
    return found
