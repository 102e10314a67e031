"""What stands in the frames: JSON of requests, handshakes, items and cancellation. Pure.

A request's body is the caller's JSON, its header says where the answer is awaited:

    {"id":"..","request_type":"single_in","response_type":"many_out",
     "connection_info":{"transport":"tcp_server","info":"{\\"address\\":\\"10.0.1.5:41000\\",\\"subject\\":\\"<uuid>\\",
     \\"context\\":\\"<as id>\\",\\"stream_type\\":\\"response\\"}"}}

The worker connects to that address and answers there:

    worker -> client   header {"subject":"<uuid>","stream_type":"response"}             handshake
                       header {"error":null}                                            prologue
                       body   {"data":{"data":<item>},"complete_final":false}           one per item
                       body   {"data":{"event":"error","comment":["text"]},"complete_final":false}
                       body   {"complete_final":true}                                   normal end
                       header "sentinel"                                                nothing comes any more
    client -> worker   header "stop" | "kill"

Ours beside it, and only where both sides are ours (decision 0060): a client that says `"reuse":true` in its info, and
hears it in the handshake, sends the header "again" after the sentinel; then the connection may carry another answer.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from rkmetrics.errors import PayloadError
from rkmetrics.planes.frame import TwoPart, encode_two_part

__all__ = [
    "AGAIN",
    "CONTROLS",
    "FINAL",
    "KILL",
    "PROLOGUE",
    "SENTINEL",
    "SENTINEL_HEADER",
    "STOP",
    "Annotated",
    "Control",
    "Envelope",
    "Handshake",
    "ItemDecoder",
    "RequestHeader",
    "encode_error",
    "encode_item",
    "encode_refusal",
    "item_decoder",
    "read_item",
    "read_prologue",
]

T = TypeVar("T")

RESPONSE = "response"

PROLOGUE = encode_two_part(b'{"error":null}')
FINAL = encode_two_part(b"", b'{"complete_final":true}')
SENTINEL_HEADER = b'"sentinel"'
SENTINEL = encode_two_part(SENTINEL_HEADER)
STOP, KILL, AGAIN = (encode_two_part(word) for word in (b'"stop"', b'"kill"', b'"again"'))


class Control(IntEnum):
    """What a client says while an answer comes, and after it."""

    STOP = 1  # produce no more; what there is may still come
    KILL = 2  # nobody waits any more
    AGAIN = 3  # the answer is read; this connection may carry another


CONTROLS = {b'"stop"': Control.STOP, b'"kill"': Control.KILL, b'"again"': Control.AGAIN}


def _read(decode: Callable[[bytes], T], data: bytes, what: str) -> T:
    try:
        return decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PayloadError(what, data, str(error)) from None


# --- requests ---------------------------------------------------------------------------------------------------------


class _Info(msgspec.Struct, omit_defaults=True):
    address: str
    subject: str
    context: str
    stream_type: str
    reuse: bool = False


class _ConnectionInfo(msgspec.Struct):
    transport: str
    info: str


class _Header(msgspec.Struct):
    id: str
    request_type: str
    response_type: str
    connection_info: _ConnectionInfo


_encode = msgspec.json.Encoder().encode
_decode_info = msgspec.json.Decoder(_Info).decode
_decode_header = msgspec.json.Decoder(_Header).decode


class RequestHeader(NamedTuple):
    """Whose request it is, and where its answer is awaited. address: host:port; subject: a secret of the client."""

    id: str
    address: str
    subject: str
    reuse: bool = False

    def encode(self) -> bytes:
        """Return the header of a request."""
        info = _encode(_Info(self.address, self.subject, self.id, RESPONSE, self.reuse)).decode()
        return _encode(_Header(self.id, "single_in", "many_out", _ConnectionInfo("tcp_server", info)))

    @classmethod
    def decode(cls, data: bytes) -> RequestHeader:
        """Raises PayloadError, also where the answer would go to another request's context (as real workers do)."""
        header = _read(_decode_header, data, "the header of a request")
        info = _read(_decode_info, header.connection_info.info.encode(), "the connection info of a request")
        if info.context != header.id:
            raise PayloadError("the header of a request", data, "its context is not its id")
        if header.connection_info.transport != "tcp_server" or info.stream_type != RESPONSE:
            raise PayloadError("the header of a request", data, "expected the transport tcp_server, for a response")
        return cls(header.id, info.address, info.subject, info.reuse)


# --- answers: their beginning -----------------------------------------------------------------------------------------


class _Handshake(msgspec.Struct, omit_defaults=True):
    subject: str
    stream_type: str
    reuse: bool = False


class _Prologue(msgspec.Struct):
    error: str | None


_decode_handshake = msgspec.json.Decoder(_Handshake).decode
_decode_prologue = msgspec.json.Decoder(_Prologue).decode


class Handshake(NamedTuple):
    """The first word of a worker: whose answer this is."""

    subject: str
    reuse: bool = False

    def encode(self) -> bytes:
        """Return the frame."""
        return encode_two_part(_encode(_Handshake(self.subject, RESPONSE, self.reuse)))

    @classmethod
    def decode(cls, frame: TwoPart) -> Handshake:
        """Raises PayloadError."""
        found = _read(_decode_handshake, frame.header, "a handshake")
        if frame.body or found.stream_type != RESPONSE:
            raise PayloadError("a handshake", frame.header, "expected no body, and the stream type response")
        return cls(found.subject, found.reuse)


def encode_refusal(reason: str) -> bytes:
    """Return the prologue of an answer that does not come."""
    return encode_two_part(_encode(_Prologue(reason)))


def read_prologue(frame: TwoPart) -> str:
    """Return why no answer comes, "" where one does. Raises PayloadError."""
    if frame.body:
        raise PayloadError("a prologue", frame.body, "expected no body")
    return _read(_decode_prologue, frame.header, "a prologue").error or ""


# --- answers: their items ---------------------------------------------------------------------------------------------


class Annotated(msgspec.Struct, Generic[T], omit_defaults=True):
    """One item as Dynamo has it: data, or an event with comments, or both."""

    data: T | None = None
    id: str | None = None
    event: str | None = None
    comment: list[str] | None = None

    @property
    def is_error(self) -> bool:
        """Whether the handler raised; the comments say what."""
        return self.event == "error"

    @property
    def reason(self) -> str:
        """What the handler said when it raised."""
        return "; ".join(self.comment or ()) or "it does not say why"


class Envelope(msgspec.Struct, Generic[T], omit_defaults=True):
    """The body of a frame: an item, the normal end, or both."""

    data: Annotated[T] | None = None
    complete_final: bool = False


ItemDecoder = Callable[[bytes], Envelope[Any]]
_any_item: ItemDecoder = msgspec.json.Decoder(Envelope[Any]).decode


@lru_cache(maxsize=1_000)
def item_decoder(type: Any) -> ItemDecoder:
    """Return what decodes items whose data is of a type. Raises TypeError for one that JSON cannot be decoded into."""
    return _any_item if type is Any else msgspec.json.Decoder(Envelope[type]).decode


class _ErrorItem(msgspec.Struct):
    event: str
    comment: list[str]


def encode_item(item: bytes) -> bytes:
    """Return the frame of an item. item: its JSON."""
    return encode_two_part(b"", b'{"data":{"data":%b},"complete_final":false}' % item)


def encode_error(reason: str) -> bytes:
    """Return the frame that says that the handler raised."""
    return encode_two_part(b"", b'{"data":%b,"complete_final":false}' % _encode(_ErrorItem("error", [reason])))


def read_item(body: bytes, decode: ItemDecoder = _any_item) -> Envelope[Any]:
    """Return what a frame's body says. Raises PayloadError."""
    found = _read(decode, body, "an item")
    if found.data is None and not found.complete_final:
        raise PayloadError("an item", body, "it has neither data nor an end")
    return found
