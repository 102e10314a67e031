"""HTTP/2 of the http plane without sockets: our two ends with each other, and each with the library h2."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest

import rkmetrics as rk
from tests.planes.test_http import Desk, frame

pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    PingReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamReset,
)
from h2.settings import SettingCodes

from rkmetrics.planes.http2 import BROKEN, Http2, Outcome, Session

HEADERS = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/v1/rpc/generate")]


def settings(**more: Any) -> rk.Settings:
    return rk.Settings(**more)


class Pair:
    """A client and a server of ours."""

    def __init__(self, client: rk.Settings | None = None, server: rk.Settings | None = None) -> None:
        self.desk = Desk()
        self.desk.limit_bytes = 32 * 1024 * 1024
        self.session = Session(client or settings(), 0.0)
        self.server = Http2(self.desk, server or settings(), 0.0)
        self.outcomes: list[Outcome] = []
        self.sent: list[tuple[int, int]] = []  # kind and length of each frame that the client sent

    def post(self, body: bytes = b"body", traceparent: str = "") -> int:
        return self.session.post("/v1/rpc/generate", "a:1", body, traceparent, 0.0)

    def turn(self, now: float = 0.0) -> int:
        """Carry everything over once, both ways; how many bytes that were."""
        out = self.session.out()
        self._note(out)
        back = self.server.feed(out, now) if out and not self.server.over else b""
        if back:
            self.outcomes += self.session.feed(back, now)
        return len(out) + len(back)

    def run(self) -> int:
        """Until nobody has anything to say; how many turns it took."""
        turns = 1
        while self.turn():
            turns += 1
        return turns

    def _note(self, out: bytes) -> None:
        at = 24 if out.startswith(b"PRI ") else 0
        while at < len(out):
            length = int.from_bytes(out[at : at + 3], "big")
            self.sent.append((out[at + 3], length))
            at += 9 + length


class Raw:
    """The library h2 as a client of our server."""

    def __init__(self, server: rk.Settings | None = None) -> None:
        self.desk = Desk()
        self.server = Http2(self.desk, server or settings(), 0.0)
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.events: list[Any] = []
        self.turn()

    def turn(self, more: bytes = b"", now: float = 0.0) -> None:
        self.hear(self.server.feed(self.h2.data_to_send() + more, now))

    def hear(self, out: bytes) -> None:
        self.events += self.h2.receive_data(out)

    def found(self, kind: type) -> list[Any]:
        return [each for each in self.events if isinstance(each, kind)]

    @property
    def statuses(self) -> list[str]:
        return [dict(each.headers)[":status"] for each in self.found(ResponseReceived)]


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_and_their_answers() -> None:
    pair = Pair()
    ids = [pair.post(b"%d" % at * at, f"trace {at}") for at in range(5)]
    assert len(pair.session) == 5
    pair.run()
    assert [(each.id, each.status, each.body) for each in pair.outcomes] == [(id, 202, b"") for id in ids]
    assert [(each.method, each.path, each.body, each.traceparent) for each in pair.desk.taken] == [
        ("POST", "/v1/rpc/generate", b"%d" % at * at, f"trace {at}") for at in range(5)
    ]
    assert (len(pair.session), pair.server.rest, pair.desk.noted) == (0, 0, [])


def test_a_request_that_is_cut_anywhere() -> None:
    pair = Pair()
    pair.post(b"x" * 100)
    data = pair.session.out()
    out = b"".join(pair.server.feed(data[at : at + 1], 0.0) for at in range(len(data)))
    found = [each for at in range(len(out)) for each in pair.session.feed(out[at : at + 1], 0.0)]
    assert [each.status for each in found] == [202]


def test_what_is_said_of_a_refusal_is_read() -> None:
    pair = Pair()
    pair.desk.reply = lambda request: pair.desk.refused(503, "")  # type: ignore[method-assign]
    pair.post()
    pair.run()
    assert [(each.status, each.body) for each in pair.outcomes] == [(503, b"no")]


def test_a_peer_that_takes_no_bytes_gets_the_status_alone() -> None:
    raw = Raw()
    raw.desk.reply = lambda request: raw.desk.refused(404, "")  # type: ignore[method-assign]
    raw.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    raw.turn()
    raw.h2.send_headers(1, HEADERS, end_stream=True)
    raw.turn()
    (answer,) = raw.found(ResponseReceived)
    assert dict(answer.headers)["content-length"] == "0"
    assert answer.stream_ended is not None


@pytest.mark.parametrize("said", [True, False])
def test_a_body_over_the_limit_is_refused_before_it_is_read(said: bool) -> None:
    raw = Raw()
    raw.desk.limit_bytes = 1_000
    raw.h2.send_headers(1, HEADERS + ([("content-length", "1001")] if said else []))
    if not said:
        raw.h2.send_data(1, b"x" * 1_001)
    raw.turn()
    assert raw.statuses == ["413"]
    assert [each.error_code for each in raw.found(StreamReset)] == [ErrorCodes.NO_ERROR]
    assert (raw.server.rest, raw.desk.noted, raw.server.over) == (0, ["413"], False)
    raw.h2.send_headers(3, HEADERS, end_stream=True)
    raw.turn()
    assert raw.statuses == ["413", "202"]


def test_a_length_that_lies_ends_the_connection() -> None:
    raw = Raw()
    raw.h2.send_headers(1, [*HEADERS, ("content-length", "5")])
    raw.h2.send_data(1, b"xy", end_stream=True)
    raw.turn()
    assert raw.server.over
    assert raw.desk.taken == []


# --- DYN_HTTP2_MAX_FRAME_SIZE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16_384, 50_000])
def test_the_frame_size_is_told_kept_and_asked_of_the_peer(size: int) -> None:
    pair = Pair(server=settings(http2_max_frame_size_bytes=size))
    pair.turn()
    pair.post(b"x" * 60_000)
    pair.run()
    assert max(length for kind, length in pair.sent if kind == 0) == size
    raw = Raw(settings(http2_max_frame_size_bytes=size))
    raw.h2.send_headers(1, HEADERS)
    raw.turn(frame(0, b"x" * size, 0, 1))
    assert (raw.server.over, raw.desk.noted) == (False, [])
    raw.turn(frame(0, b"x" * (size + 1), 0, 1)[:9] + b"x" * (size + 1))
    assert raw.server.over


def test_a_client_tells_its_frame_size() -> None:
    server = H2Connection(H2Configuration(client_side=False))
    server.initiate_connection()
    events = server.receive_data(Session(settings(http2_max_frame_size_bytes=77_777), 0.0).out())
    (told,) = [each for each in events if isinstance(each, RemoteSettingsChanged)]
    assert told.changed_settings[SettingCodes.MAX_FRAME_SIZE].new_value == 77_777
    assert told.changed_settings[SettingCodes.ENABLE_PUSH].new_value == 0


# --- DYN_HTTP2_MAX_CONCURRENT_STREAMS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_streams_than_the_server_says(most: int) -> None:
    pair = Pair(server=settings(http2_max_concurrent_streams=most))
    pair.turn()
    room = [pair.session.room]
    for _ in range(most):
        pair.post(b"x" * 70_000)  # more than the window, so that none ends
        room.append(pair.session.room)
    pair.run()
    assert [*room, pair.session.room] == [True] * most + [False, True]
    assert [each.status for each in pair.outcomes] == [202] * most


@pytest.mark.parametrize("most", [1, 3])
def test_a_stream_too_many_is_refused_and_the_others_go_on(most: int) -> None:
    raw = Raw(settings(http2_max_concurrent_streams=most))
    raw.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 100  # as long as it has not heard of the limit
    raw.h2.remote_settings.acknowledge()
    for id in range(1, 2 * most + 2, 2):
        raw.h2.send_headers(id, HEADERS)
    raw.turn()
    (reset,) = raw.found(StreamReset)
    assert (reset.stream_id, reset.error_code) == (2 * most + 1, ErrorCodes.REFUSED_STREAM)
    assert raw.desk.noted == ["503"]
    raw.h2.send_data(1, b"x", end_stream=True)
    raw.turn()
    assert raw.statuses == ["202"]


def test_a_refused_stream_was_not_delivered() -> None:
    session, peer = Session(settings(), 0.0), H2Connection(H2Configuration(client_side=False))
    peer.initiate_connection()
    ids = [session.post("/", "a", b"x", "", 0.0) for _ in range(3)]
    peer.receive_data(session.out())
    for id, code in zip(ids, (ErrorCodes.REFUSED_STREAM, ErrorCodes.CANCEL, ErrorCodes.NO_ERROR), strict=True):
        peer.reset_stream(id, code)
    assert [(each.status, each.delivered) for each in session.feed(peer.data_to_send(), 0.0)] == [
        (0, False),
        (0, True),
        (0, True),
    ]


# --- DYN_HTTP2_ADAPTIVE_WINDOW ----------------------------------------------------------------------------------------


def test_an_adaptive_window_grows_so_that_large_bodies_come_in_fewer_turns() -> None:
    turns: dict[bool, int] = {}
    for adaptive in (True, False):
        pair = Pair(server=settings(http2_adaptive_window=adaptive))
        pair.post(b"x" * 8_000_000)
        turns[adaptive] = pair.run()
        assert [len(each.body) for each in pair.desk.taken] == [8_000_000]
    assert turns[False] > 100
    assert turns[True] < 20


@pytest.mark.parametrize("adaptive", [True, False])
def test_how_far_a_window_opens(adaptive: bool) -> None:
    raw = Raw(settings(http2_adaptive_window=adaptive))
    raw.desk.limit_bytes = 2**31
    raw.h2.send_headers(1, HEADERS)
    widest = 0
    for _ in range(400):
        raw.h2.send_data(1, b"x" * min(16_384, raw.h2.local_flow_control_window(1)))
        raw.turn()
        widest = max(widest, raw.h2.local_flow_control_window(1))
    assert widest == (16 * 1024 * 1024 if adaptive else 65_535) or (adaptive and widest > 8 * 1024 * 1024)


# --- DYN_HTTP2_KEEP_ALIVE_* -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "timeout"), [(30.0, 10.0), (2.0, 1.0)])
def test_a_server_pings_and_leaves_who_does_not_answer(interval: float, timeout: float) -> None:
    told = settings(http2_keep_alive_interval_seconds=interval, http2_keep_alive_timeout_seconds=timeout)
    raw = Raw(told)
    assert raw.server.due == interval
    raw.hear(raw.server.expire(interval))
    assert len(raw.found(PingReceived)) == 1
    assert raw.server.due == interval + timeout
    raw.turn(now=interval + 0.5)  # it answers
    assert raw.server.due == 2 * interval + 0.5
    raw.server.expire(2 * interval + 0.5)
    assert not raw.server.over
    raw.server.expire(2 * interval + 0.5 + timeout)
    assert (raw.server.over, raw.desk.noted) == (True, ["too_slow"])


@pytest.mark.parametrize(("interval", "timeout"), [(30.0, 10.0), (2.0, 1.0)])
def test_a_client_pings_and_knows_who_does_not_answer(interval: float, timeout: float) -> None:
    told = settings(http2_keep_alive_interval_seconds=interval, http2_keep_alive_timeout_seconds=timeout)
    session, peer = Session(told, 0.0), H2Connection(H2Configuration(client_side=False))
    peer.initiate_connection()
    peer.receive_data(session.out())
    assert not session.tick(interval - 0.1, 5.0)
    assert session.out() == b""
    assert not session.tick(interval, 5.0)
    events = peer.receive_data(session.out())
    assert [type(each) for each in events] == [PingReceived]
    session.feed(peer.data_to_send(), interval + 0.5)
    assert not session.tick(interval + timeout, 5.0)
    session.tick(2 * interval + 0.5, 5.0)
    assert session.tick(2 * interval + 0.5 + timeout, 5.0)


def test_a_request_without_an_answer_in_time_is_given_up_and_leaves_room() -> None:
    session, peer = Session(settings(), 0.0), H2Connection(H2Configuration(client_side=False))
    peer.initiate_connection()
    session.post("/", "a", b"x", "", 0.0)
    session.tick(4.9, 5.0)
    assert len(session) == 1
    session.tick(5.0, 5.0)
    assert len(session) == 0
    assert any(isinstance(each, StreamReset) for each in peer.receive_data(session.out()))


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_not_complete_in_time_is_cut_and_the_others_go_on() -> None:
    raw = Raw()
    raw.h2.send_headers(1, HEADERS)
    raw.turn(now=1.0)
    raw.h2.send_headers(3, HEADERS)
    raw.turn(now=5.0)
    for now in range(6, 31):
        raw.h2.send_data(1, b"x")  # a byte now and then moves nothing
        raw.turn(now=float(now))
    assert raw.server.due == 31.0
    raw.hear(raw.server.expire(31.0))
    assert (raw.statuses, raw.desk.noted, raw.server.over) == (["408"], ["too_slow"], False)
    raw.h2.send_data(3, b"x", end_stream=True)
    raw.turn(now=31.0)
    assert raw.statuses == ["408", "202"]


def test_headers_have_a_deadline() -> None:
    raw = Raw()
    raw.turn(frame(1, b"\x82", 0, 1), now=1.0)
    for now in range(2, 10):
        raw.turn(frame(9, b"\x86", 0, 1)[:4] if now == 9 else frame(9, b"\x86", 0, 1), now=float(now))
    assert raw.server.due == 11.0
    raw.server.expire(11.0)
    assert (raw.server.over, raw.desk.noted) == (True, ["too_slow"])


def test_who_says_nothing_for_long_is_left() -> None:
    raw = Raw(settings(http2_keep_alive_interval_seconds=1_000))
    assert raw.server.due == 180.0
    raw.hear(raw.server.expire(180.0))
    assert raw.server.over
    assert [each.error_code for each in raw.found(ConnectionTerminated)] == [ErrorCodes.NO_ERROR]


# --- drain ------------------------------------------------------------------------------------------------------------


def test_a_drain_is_announced_and_what_is_on_its_way_goes_on() -> None:
    pair = Pair()
    pair.turn()
    pair.post(b"x" * 200_000)
    pair.turn()
    pair.outcomes += pair.session.feed(pair.server.drain(), 0.0)
    assert pair.session.leaving
    assert not pair.session.room
    pair.run()
    assert [each.status for each in pair.outcomes] == [202]


def test_requests_that_a_leaving_server_will_not_look_at_were_not_delivered() -> None:
    session = Session(settings(), 0.0)
    ids = [session.post("/", "a", b"x", "", 0.0) for _ in range(3)]
    found = session.feed(frame(4) + frame(7, ids[0].to_bytes(4, "big") + b"\0\0\0\0"), 0.0)
    assert [(each.id, each.status, each.delivered) for each in found] == [(ids[1], 0, False), (ids[2], 0, False)]
    assert [(each.id, each.delivered) for each in session.end()] == [(ids[0], True)]


# --- floods -----------------------------------------------------------------------------------------------------------


def test_a_request_that_is_reset_at_once_reaches_no_handler() -> None:
    """CVE-2023-44487: each of them would begin work for nobody."""
    raw = Raw()
    for id in range(1, 101, 2):
        raw.h2.send_headers(id, HEADERS)
        raw.h2.send_data(id, b"x", end_stream=True)
        raw.h2.reset_stream(id, ErrorCodes.CANCEL)
    raw.turn()
    assert (raw.desk.taken, raw.statuses, raw.server.rest, raw.server.over) == ([], [], 0, False)


def test_rapid_resets_end_the_connection() -> None:
    raw = Raw()
    count = 0
    while not raw.server.over and count < 2_000:
        id = 2 * count + 1
        raw.h2.send_headers(id, HEADERS)
        raw.h2.reset_stream(id, ErrorCodes.CANCEL)
        raw.turn()
        count += 1
    assert (raw.server.over, raw.desk.noted) == (True, ["flood"])
    assert count < 600
    assert [each.error_code for each in raw.found(ConnectionTerminated)] == [ErrorCodes.ENHANCE_YOUR_CALM]


def test_resets_that_a_peer_provokes_end_the_connection() -> None:
    """CVE-2025-8671: what comes for a stream that is over makes a server reset it."""
    raw = Raw()
    count = 0
    while not raw.server.over and count < 2_000:
        id = 2 * count + 1
        raw.h2.send_headers(id, HEADERS)
        raw.h2.reset_stream(id, ErrorCodes.CANCEL)
        raw.server.feed(raw.h2.data_to_send() + frame(0, b"x" * 200, 0, id), 0.0)
        count += 1
    assert (raw.server.over, raw.desk.noted) == (True, ["flood"])
    assert count < 300  # each counts twice


def test_headers_that_unpack_to_much_more_are_refused() -> None:
    """An HPACK bomb: one header of 4 KiB is put into the table, and named again for a byte each time."""
    raw = Raw()
    field = b"\x40\x01a\x7f\x81\x1e" + b"x" * 4_000  # literal with indexing; length 127 + 3873
    raw.turn(frame(1, field + b"\xbe" * 10_000, 5, 1))
    assert raw.server.over
    assert raw.desk.noted == ["flood"]
    assert raw.desk.taken == []


@pytest.mark.parametrize(
    "data",
    [
        frame(8, b"\x7f\xff\xff\xff", 0, 0),  # the window over 2**31
        frame(8, b"\0\0\0\0", 0, 0),
        frame(9, b"", 4, 1),  # a CONTINUATION of nothing
        frame(5, b"\0\0\0\2", 4, 1),  # clients push nothing
        frame(0, b"x", 1, 7),  # a stream that was never opened
        frame(1, b"\x82", 4, 2),  # an even one
        frame(4, b"x"),
        frame(6, b"x"),
        frame(1, b"\xff\xff\xff\xff\xff\xff", 5, 1),
        frame(1, b"\x82\x86\x84" + b"\x40\x04Host\x01a", 5, 1),  # upper case
        frame(1, b"\x82\x86\x84\x40\x11transfer-encoding\x07chunked", 5, 1),
        frame(1, b"\x82\x86\x84\x40\x01a\x03b\r\n", 5, 1),
    ],
)
def test_what_the_protocol_forbids_ends_the_connection_and_reaches_nobody(data: bytes) -> None:
    raw = Raw()
    raw.server.feed(data, 0.0)
    assert raw.server.over
    assert raw.desk.taken == []
    assert raw.desk.noted


def test_any_bytes_are_answered_or_end_the_connection() -> None:
    chance, over = random.Random(11), 0
    for _ in range(400):
        pair = Pair()
        pair.post(b"x" * 300)
        pair.post(b"y" * 30)
        data = bytearray(pair.session.out())
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(24, len(data))
            data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        out = b""
        while data and not pair.server.over:
            size = chance.randrange(1, 100)
            out += pair.server.feed(bytes(data[:size]), 0.0)
            del data[:size]
        over += pair.server.over
        garbled = bytearray(out)
        garbled[chance.randrange(len(garbled))] ^= chance.randrange(1, 256)
        with suppress(*BROKEN):
            pair.session.feed(bytes(garbled), 0.0)
    assert over > 50
