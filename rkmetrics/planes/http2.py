"""HTTP/2 of the http plane, for both ends, on the library h2. Pure: no socket, no clock of its own.

h2 knows the protocol, and http2_frames.py keeps its peer within limits. A GOAWAY is taken out before h2 sees it: h2
takes it for the end of everything, and in RFC 9113 (6.8) requests that are on their way go on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import formatdate
from typing import TYPE_CHECKING, NamedTuple

from rkmetrics.errors import MissingExtraError
from rkmetrics.planes.http2_frames import HEADER_BLOCK_BYTES, LEAVING, FloodError, FrameError, Frames, Goaway
from rkmetrics.planes.http_base import Intake, Reply, Request, Speaker, path_of

try:
    from h2 import events as on
    from h2.config import H2Configuration
    from h2.connection import H2Connection
    from h2.errors import ErrorCodes
    from h2.exceptions import DenialOfServiceError, H2Error, ProtocolError
    from h2.settings import SettingCodes
    from h2.settings import Settings as H2Settings
except ImportError as error:
    raise MissingExtraError("HTTP/2 on the http plane", "http", "h2") from error

if TYPE_CHECKING:
    from rkmetrics.settings import Settings

__all__ = ["BROKEN", "FloodError", "Frames", "Http2", "Outcome", "Session"]

DEFAULT_WINDOW_BYTES, WINDOW_BYTES = 65_535, 16 * 1024 * 1024
#: What an open stream costs beside its body.
STREAM_BYTES = 8 * 1024
STREAM_IDS = 2**30  # of 2**31; a connection that had so many is replaced
#: How many streams a client opens before it has heard the server's limit; hyper does the same.
STREAMS_UNTOLD = 100
ANSWER_BYTES = 2_000


def _connection(settings: Settings, *, client: bool) -> H2Connection:
    """A connection that has sent its settings. Our limits hold from the first byte, as no peer sends before it is
    ready to keep them; that of streams is kept by us, as h2 ends the whole connection over it."""
    told = {
        SettingCodes.MAX_FRAME_SIZE: settings.http2_max_frame_size_bytes,
        SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_BLOCK_BYTES,
        SettingCodes.ENABLE_PUSH: 0,
    }
    if not client:
        told[SettingCodes.MAX_CONCURRENT_STREAMS] = settings.http2_max_concurrent_streams
    connection = H2Connection(H2Configuration(client_side=client, header_encoding=None))
    connection.local_settings = H2Settings(client=client, initial_values=told)
    connection.max_inbound_frame_size = settings.http2_max_frame_size_bytes
    connection.decoder.max_header_list_size = HEADER_BLOCK_BYTES
    connection.initiate_connection()
    kept = told | {SettingCodes.MAX_CONCURRENT_STREAMS: 2**31 - 1}
    connection.local_settings = H2Settings(client=client, initial_values=kept)
    return connection


class _Life:
    """Pings of a connection: `due` and `tick`."""

    def __init__(self, connection: H2Connection, settings: Settings, now: float) -> None:
        self._connection = connection
        self._interval = settings.http2_keep_alive_interval_seconds
        self._timeout = settings.http2_keep_alive_timeout_seconds
        self._heard, self._pinged = now, 0.0

    def heard(self, now: float) -> None:
        """Something came: the other end lives."""
        self._heard, self._pinged = now, 0.0

    @property
    def due(self) -> float:
        """When `tick` has something to do."""
        return self._pinged + self._timeout if self._pinged else self._heard + self._interval

    def tick(self, now: float) -> bool:
        """Ping, where it is time. Whether the other end is gone."""
        if now < self.due:
            return False
        if self._pinged:
            return True
        self._connection.ping(b"rkmetric")
        self._pinged = now
        return False


# --- the server's end -------------------------------------------------------------------------------------------------


class _Stream:
    """A request that is coming."""

    __slots__ = ("began", "body", "headers", "size", "window")

    def __init__(self, headers: Mapping[bytes, bytes], began: float) -> None:
        self.headers, self.began = headers, began
        self.body: list[bytes] = []
        self.size, self.window = 0, DEFAULT_WINDOW_BYTES

    def request(self) -> Request:
        get = self.headers.get
        return Request(
            get(b":method", b"").decode("latin-1"),
            path_of(get(b":path", b"").decode("latin-1")),
            get(b"traceparent", b"").decode("latin-1"),
            get(b"origin", b"").decode("latin-1"),
            b"".join(self.body),
            keep_alive=True,
        )


class Http2(Speaker):
    """HTTP/2 on one connection of a server."""

    def __init__(self, intake: Intake, settings: Settings, now: float) -> None:
        self._intake, self._patience, self._adaptive = intake, intake.patience, settings.http2_adaptive_window
        self._most = settings.http2_max_concurrent_streams
        self._frames = Frames(settings.http2_max_frame_size_bytes, preface=24)
        self._connection = _connection(settings, client=False)
        self._life = _Life(self._connection, settings, now)
        self._streams: dict[int, _Stream] = {}  # the oldest first
        self._kept, self._window = 0, DEFAULT_WINDOW_BYTES
        self._used = self._block_began = now
        self.due = now + self._patience.head_seconds

    @property
    def rest(self) -> int:
        return self._kept + self._frames.rest

    def feed(self, data: bytes, now: float) -> bytes:
        self._life.heard(now)
        if not self._frames.in_block:
            self._block_began = now
        try:
            self._take_all(self._connection.receive_data(self._frames.feed(data, now)), now)
            out = self._connection.data_to_send()
            self._frames.sent(out)
        except (FloodError, DenialOfServiceError) as flood:
            self._intake.flooded(str(flood))
            return self._leave(ErrorCodes.ENHANCE_YOUR_CALM)
        except FrameError as error:
            self._intake.refused(400, f"HTTP/2: {error}")
            return self._leave(ErrorCodes(error.code))
        except ProtocolError as error:
            self._intake.refused(400, f"HTTP/2: {error}")
            self.over = True
            return self._connection.data_to_send()
        self._plan()
        return out

    def _leave(self, code: ErrorCodes = ErrorCodes.NO_ERROR) -> bytes:
        self.over = True
        self._connection.close_connection(code)
        return self._connection.data_to_send()

    def _plan(self) -> None:
        """When something is to be done next."""
        due = min(self._life.due, self._used + self._patience.idle_seconds)
        if self._frames.in_block:
            due = min(due, self._block_began + self._patience.head_seconds)
        for stream in self._streams.values():
            due = min(due, stream.began + self._patience.body_seconds)
            break
        self.due = due

    # --- requests -----------------------------------------------------------------------------------------------------

    def _take_all(self, events: list[on.Event], now: float) -> None:
        """Take what came at once; of a stream that was reset by then nothing begins (CVE-2023-44487)."""
        gone = {event.stream_id for event in events if isinstance(event, on.StreamReset)}
        for event in events:
            if (
                gone
                and getattr(event, "stream_id", None) in gone
                and isinstance(event, on.RequestReceived | on.StreamEnded)
            ):
                continue
            with suppress(ProtocolError):  # the stream is closed: nobody is there to answer
                self._take(event, now)

    def _take(self, event: on.Event, now: float) -> None:
        match event:
            case on.RequestReceived(stream_id=int(id)):
                self._begin(id, event, now)
            case on.DataReceived(stream_id=int(id)):
                self._add(id, event)
            case on.StreamEnded(stream_id=int(id)):
                self._end(id, now)
            case on.StreamReset(stream_id=int(id)):
                self._forget(id)
            case _:
                pass

    def _begin(self, id: int, event: on.RequestReceived, now: float) -> None:
        headers = {bytes(name): bytes(value) for name, value in event.headers or ()}
        if len(self._streams) >= self._most:
            self._intake.refused(503, f"more than {self._most} streams at once (DYN_HTTP2_MAX_CONCURRENT_STREAMS)")
            self._connection.reset_stream(id, ErrorCodes.REFUSED_STREAM)
            return
        self._streams[id] = _Stream(headers, now)
        self._kept += STREAM_BYTES
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._intake.limit_bytes:
            self._too_large(id)

    def _add(self, id: int, event: on.DataReceived) -> None:
        stream = self._streams.get(id)
        if event.flow_controlled_length:
            self._connection.acknowledge_received_data(event.flow_controlled_length, id)
        if stream is None:
            return
        data = event.data or b""
        if stream.size + len(data) > self._intake.limit_bytes:
            self._too_large(id)
            return
        stream.body.append(data)
        stream.size += len(data)
        self._kept += len(data)
        if self._adaptive:
            self._widen(id, stream, ended=event.stream_ended is not None)

    def _widen(self, id: int, stream: _Stream, *, ended: bool) -> None:
        """Twice the window with each piece that comes, so that a large body soon comes without a pause."""
        if stream.size <= DEFAULT_WINDOW_BYTES // 4:
            return
        if self._window < WINDOW_BYTES:
            self._connection.increment_flow_control_window(more := min(self._window, WINDOW_BYTES - self._window))
            self._window += more
        if stream.window < WINDOW_BYTES and not ended:
            self._connection.increment_flow_control_window(more := min(stream.window, WINDOW_BYTES - stream.window), id)
            stream.window += more

    def _end(self, id: int, now: float) -> None:
        stream = self._forget(id)
        if stream is not None:
            self._used = now
            self._answer(id, self._intake.reply(stream.request()))

    def _forget(self, id: int) -> _Stream | None:
        stream = self._streams.pop(id, None)
        if stream is not None:
            self._kept -= stream.size + STREAM_BYTES
        return stream

    def _too_large(self, id: int) -> None:
        limit = self._intake.limit_bytes
        self._cut(id, self._intake.refused(413, f"a body is over the limit of {limit} bytes"))

    def _cut(self, id: int, reply: Reply) -> None:
        """Answer a request before it is complete, and want no more of it (RFC 9113, 8.1)."""
        self._forget(id)
        with suppress(ProtocolError):  # the stream, or all of the connection, is closed
            self._answer(id, reply)
            self._connection.reset_stream(id, ErrorCodes.NO_ERROR)

    def _answer(self, id: int, reply: Reply) -> None:
        body = reply.text.encode()
        if body and self._connection.local_flow_control_window(id) < len(body):
            body = b""  # a peer that takes no answers gets the status
        headers = [
            (":status", str(reply.status)),
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(body))),
            *reply.headers,
            ("date", formatdate(int(time.time()), usegmt=True)),
        ]
        self._connection.send_headers(id, headers, end_stream=not body)
        if body:
            self._connection.send_data(id, body, end_stream=True)

    # --- its life -----------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> bytes:
        if self._life.tick(now):
            self._intake.too_slow("an HTTP/2 connection does not answer a PING")
            return self._leave()
        if self._frames.in_block and self._block_began + self._patience.head_seconds <= now:
            self._intake.too_slow(f"headers were not complete in {self._patience.head_seconds:g} s")
            return self._leave()
        if not self._streams and self._used + self._patience.idle_seconds <= now:
            return self._leave()
        for id in [id for id, stream in self._streams.items() if stream.began + self._patience.body_seconds <= now]:
            self._intake.too_slow(f"a request was not complete in {self._patience.body_seconds:g} s")
            self._cut(id, Reply(408, "Too slow"))
        if self._streams:
            self._used = now
        self._plan()
        return self._connection.data_to_send()

    def give_up(self, status: int, detail: str) -> bytes:
        reply = self._intake.refused(status, detail)
        for id in list(self._streams):
            self._cut(id, reply)
        return self._leave()

    def drain(self) -> bytes:
        return LEAVING

    def close(self) -> bytes:
        return self._leave()


# --- the client's end -------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a request. status: of its answer, 0 where there is none; body: the beginning of it.

    delivered: whether it may have been taken all the same.
    """

    id: int
    status: int = 0
    body: bytes = b""
    reason: str = ""
    delivered: bool = False


class _Sent:
    """A request whose answer is awaited. body: what is not sent yet."""

    __slots__ = ("began", "body", "status", "text")

    def __init__(self, body: bytes, began: float) -> None:
        self.body, self.began = memoryview(body), began
        self.status, self.text = 0, b""


class Session:
    """HTTP/2 on one connection of a client. After each call `out` is to be sent.

    leaving: no further request is taken. Raises ProtocolError from `feed`, after which nothing goes on.
    """

    def __init__(self, settings: Settings, now: float) -> None:
        self._connection = _connection(settings, client=True)
        self._frames = Frames(settings.http2_max_frame_size_bytes)
        self._life = _Life(self._connection, settings, now)
        self._sent: dict[int, _Sent] = {}
        self._told = self.leaving = False

    def __len__(self) -> int:
        return len(self._sent)

    def __contains__(self, id: int) -> bool:
        return id in self._sent

    @property
    def room(self) -> bool:
        """Whether another request may be sent now."""
        most = self._connection.remote_settings.max_concurrent_streams if self._told else STREAMS_UNTOLD
        return not self.leaving and self._connection.open_outbound_streams < most

    def out(self) -> bytes:
        """What is to be sent."""
        return self._connection.data_to_send()

    def post(self, path: str, authority: str, payload: bytes, traceparent: str, now: float) -> int:
        """Send a request; `room` says whether it may be. Returns its id."""
        connection = self._connection
        id = connection.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", authority),
            (":path", path),
            ("content-type", "application/octet-stream"),
            *([("traceparent", traceparent)] if traceparent else ()),
            ("accept", "*/*"),
            ("content-length", str(len(payload))),
        ]
        connection.send_headers(id, headers, end_stream=not payload)
        sent = self._sent[id] = _Sent(payload, now)
        self._pump(id, sent)
        self.leaving = self.leaving or id > STREAM_IDS
        return id

    def _pump(self, id: int, sent: _Sent) -> None:
        """Send as much of a body as the other end takes now."""
        connection = self._connection
        with suppress(ProtocolError):  # the stream is closed, of which an event tells
            while sent.body:
                size = min(connection.local_flow_control_window(id), connection.max_outbound_frame_size, len(sent.body))
                if size <= 0:
                    return
                piece, sent.body = sent.body[:size], sent.body[size:]
                connection.send_data(id, bytes(piece), end_stream=not sent.body)

    def feed(self, data: bytes, now: float) -> list[Outcome]:
        """Take some bytes; what became of requests. Raises one of BROKEN."""
        self._life.heard(now)
        found = list[Outcome]()
        for event in self._connection.receive_data(self._frames.feed(data, now)):
            self._take(event, found)
        if self._frames.goaway is not None:
            self._go(self._frames.goaway, found)
            self._frames.goaway = None
        return found

    def _take(self, event: on.Event, found: list[Outcome]) -> None:
        match event:
            case on.ResponseReceived(stream_id=int(id)) if id in self._sent:
                status = dict(event.headers or ()).get(b":status", b"")
                if len(status) != 3 or not status.isdigit():
                    raise ProtocolError("an answer without a status")
                self._sent[id].status = int(status)
            case on.DataReceived(stream_id=int(id)):
                self._connection.acknowledge_received_data(event.flow_controlled_length or 0, id)
                if id in self._sent:
                    sent = self._sent[id]
                    sent.text = (sent.text + (event.data or b""))[:ANSWER_BYTES]
            case on.StreamEnded(stream_id=int(id)) if id in self._sent:
                sent = self._sent.pop(id)
                if sent.body:  # it was answered before it was all sent, and need not be
                    self._reset(id)
                found.append(Outcome(id, sent.status, sent.text))
            case on.StreamReset(stream_id=int(id)) if id in self._sent:
                sent = self._sent.pop(id)
                refused = event.error_code == ErrorCodes.REFUSED_STREAM
                reason = f"the stream was reset (HTTP/2 error {int(event.error_code or 0)})"
                found.append(Outcome(id, reason=reason, delivered=not refused and not sent.body))
            case on.WindowUpdated() | on.RemoteSettingsChanged():
                self._told = self._told or isinstance(event, on.RemoteSettingsChanged)
                for id, sent in self._sent.items():
                    self._pump(id, sent)
            case _:
                pass

    def _go(self, goaway: Goaway, found: list[Outcome]) -> None:
        self.leaving = True
        for id in [id for id in self._sent if id > goaway.last]:
            del self._sent[id]
            found.append(Outcome(id, reason=f"the server leaves (GOAWAY, HTTP/2 error {goaway.code})"))

    def tick(self, now: float, answer_seconds: float) -> bool:
        """Ping, where it is time, and give up what has no answer in time. Whether the other end is gone."""
        for id in [id for id, sent in self._sent.items() if sent.began + answer_seconds <= now]:
            del self._sent[id]
            self._reset(id)
        return self._life.tick(now)

    def _reset(self, id: int) -> None:
        with suppress(ProtocolError):  # it is closed already
            self._connection.reset_stream(id, ErrorCodes.CANCEL)

    def end(self) -> list[Outcome]:
        """Nothing comes any more; the requests that have no answer."""
        left, self._sent = self._sent, {}
        self.leaving = True
        return [Outcome(id, delivered=not sent.body) for id, sent in left.items()]


#: What `Session.feed` raises.
BROKEN = (FrameError, H2Error)
