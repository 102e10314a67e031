"""HTTP of the http plane without sockets: what is read, what is refused, and that no claim costs memory."""

from __future__ import annotations

import random
import sys
import tracemalloc
from pathlib import Path

import pytest

from rkmetrics.errors import MissingExtraError
from rkmetrics.planes.http1 import BadRequestError, Http1, RequestParser, encode_post, encode_reply
from rkmetrics.planes.http2_frames import LEAVING, LIMITS, WINDOW_SECONDS, FloodError, FrameError, Frames, Goaway
from rkmetrics.planes.http_base import Patience, Reply, Request

GOLDEN = Path(__file__).parents[1] / "golden/http"
LIMIT = 100_000
HOST = b"Host: a\r\n"


def read(data: bytes, limit: int = LIMIT) -> list[Request]:
    parser = RequestParser(limit)
    parser.feed(data)
    return list(iter(parser.next, None))


def post(headers: bytes = b"", body: bytes = b"", target: bytes = b"/v1/rpc/generate") -> bytes:
    return b"POST %s HTTP/1.1\r\n%s%s\r\n%s" % (target, HOST, headers, body)


def sized(body: bytes) -> bytes:
    return post(b"Content-Length: %d\r\n" % len(body), body)


# --- HTTP/1.1: requests -----------------------------------------------------------------------------------------------

CHUNKED = post(b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n")
TRAILED = post(b"transfer-encoding: Chunked\r\n", b"5\r\nabcde\r\n0\r\nX: y\r\n\r\n")


@pytest.mark.parametrize("data", [sized(b"abcde"), CHUNKED, TRAILED])
def test_a_body_is_read_wherever_its_bytes_are_cut(data: bytes) -> None:
    for at in range(len(data)):
        parser = RequestParser(LIMIT)
        parser.feed(data[:at])
        assert parser.next() is None
        assert (parser.rest > 0) == (at > 0)
        parser.feed(data[at:])
        found = parser.next()
        assert found is not None
        assert (found.method, found.path, found.body, found.keep_alive) == ("POST", "/v1/rpc/generate", b"abcde", True)
        assert (parser.next(), parser.rest, parser.in_head) == (None, 0, True)


def test_requests_that_come_together_are_read_in_order() -> None:
    data = sized(b"one") + CHUNKED + sized(b"") + sized(b"three")
    assert [each.body for each in read(data)] == [b"one", b"abcde", b"", b"three"]
    one_by_one = RequestParser(LIMIT)
    found: list[bytes] = []
    for at in range(len(data)):
        one_by_one.feed(data[at : at + 1])
        found += [each.body for each in iter(one_by_one.next, None)]
    assert found == [b"one", b"abcde", b"", b"three"]


@pytest.mark.parametrize(
    ("headers", "target", "expected"),
    [
        (b"", b"/a?b=c", Request("POST", "/a", "", "", b"", keep_alive=True)),
        (b"", b"http://proxy.example:80/a", Request("POST", "/a", "", "", b"", keep_alive=True)),
        (b"", b"*", Request("POST", "*", "", "", b"", keep_alive=True)),
        (b"Connection: keep-alive, Close\r\n", b"/a", Request("POST", "/a", "", "", b"", keep_alive=False)),
        (b"traceparent:  00-1 \r\n", b"/a", Request("POST", "/a", "00-1", "", b"", keep_alive=True)),
        (b"traceparent: 1\r\nTraceparent: 2\r\n", b"/a", Request("POST", "/a", "", "", b"", keep_alive=True)),
        (b"Origin: https://evil.example\r\n", b"/a", Request("POST", "/a", "", "https://evil.example", b"", True)),
    ],
)
def test_what_a_head_says(headers: bytes, target: bytes, expected: Request) -> None:
    assert read(post(headers, target=target)) == [expected]


def test_a_client_of_http_1_0_gets_one_answer() -> None:
    (found,) = read(b"POST /a HTTP/1.0\r\nContent-Length: 1\r\n\r\nx")
    assert (found.body, found.keep_alive) == (b"x", False)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        # Two ways to read it (RFC 9112, 6.1 and 11.2).
        (post(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", b"0\r\n\r\n"), 400),
        (post(b"Content-Length: 3\r\nContent-Length: 3\r\n", b"abc"), 400),
        (post(b"Content-Length: 3, 3\r\n", b"abc"), 400),
        (post(b"Content-Length: +3\r\n", b"abc"), 400),
        (post(b"Content-Length: -3\r\n", b"abc"), 400),
        (post(b"Content-Length: 0x3\r\n", b"abc"), 400),
        (post(b"Content-Length: 3 3\r\n", b"abc"), 400),
        (post(b"Content-Length: \xb2\r\n", b"abc"), 400),
        (post(b"Content-Length:\r\n"), 400),
        (post(b"Content-Length: 99999999999999999999\r\n"), 400),
        (post(b"Transfer-Encoding: chunked, chunked\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), 400),
        (post(b"Transfer-Encoding: identity\r\n"), 400),
        (post(b"Transfer-Encoding: xchunked\r\n"), 400),
        (post(b"Transfer-Encoding: gzip, chunked\r\n"), 400),
        (post(b"Transfer-Encoding:\x0bchunked\r\n"), 400),
        (b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        # Lines that are none (RFC 9112, 2.2, 5.1 and 5.2).
        (post(b"Content-Length : 3\r\n", b"abc"), 400),
        (post(b" Content-Length: 3\r\n", b"abc"), 400),
        (post(b"A: b\r\n c\r\n"), 400),
        (post(b"A: b\r\n\tc\r\n"), 400),
        (post(b"A: b\rContent-Length: 3\r\n"), 400),
        (post(b"A: b\nContent-Length: 3\r\n", b"abc"), 400),
        (post(b"A: b\0c\r\n"), 400),
        (post(b"A\r\n"), 400),
        (post(b": b\r\n"), 400),
        (b"POST /a HTTP/1.1\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"POST /a HTTP/1.2\r\nHost: a\r\n\r\n", 400),
        (b"POST /a HTTP/2.0\r\nHost: a\r\n\r\n", 400),
        (b"POST  /a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST /a\x80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST /a\r\nHost: a\r\n\r\n", 400),
        (b"P(ST /a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        # At once, without waiting for more.
        (b"\x16\x03\x01\x02\x00", 400),
        (b"\0", 400),
        (b"\r\n", 400),
        # Chunks.
        (post(b"Transfer-Encoding: chunked\r\n", b"x\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\n", b"-1\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\n", b"0x1\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\n", b"1\r\nab\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\n", b"1\na\r\n0\r\n\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\n", b"1;\0\r\na\r\n0\r\n\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\n", b"0\r\nno trailer\r\n\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\n", b"111111111\r\n"), 400),
        (post(b"Transfer-Encoding: chunked\r\n", b"1" + b" " * 300), 431),
        # Too large, said before it comes.
        (post(b"Content-Length: %d\r\n" % (LIMIT + 1)), 413),
        (post(b"Transfer-Encoding: chunked\r\n", b"%x\r\n" % (LIMIT + 1)), 413),
        (post(b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n2\r\n" % (LIMIT - 1, b"x" * (LIMIT - 1))), 413),
        (post(b"A: %s\r\n" % (b"x" * 70_000)), 431),
        (b"POST /" + b"x" * 70_000, 431),
        (post(b"A: b\r\n" * 101), 431),
        (post(b"Transfer-Encoding: chunked\r\n", b"0\r\n" + b"a: b\r\n" * 12_000), 431),
    ],
)
def test_what_can_be_read_in_two_ways_or_is_too_large_is_refused(data: bytes, status: int) -> None:
    for pieces in ([data], [data[at : at + 997] for at in range(0, len(data), 997)]):
        parser = RequestParser(LIMIT)
        assert refusal(parser, pieces) == status


def refusal(parser: RequestParser, pieces: list[bytes]) -> int:
    """The status with which it is refused; no request is read."""
    try:
        for piece in pieces:
            parser.feed(piece)
            assert parser.next() is None
    except BadRequestError as error:
        return error.status
    return 0


def test_a_request_before_a_bad_one_is_read() -> None:
    parser = RequestParser(LIMIT)
    parser.feed(sized(b"good") + b"GET\r\n\r\n")
    found = parser.next()
    assert found is not None
    assert found.body == b"good"
    with pytest.raises(BadRequestError):
        parser.next()


def test_a_claim_costs_no_memory() -> None:
    tracemalloc.start()
    parser = RequestParser(2**31 - 1)
    parser.feed(post(b"Content-Length: 2000000000\r\n", b"x" * 10))
    assert parser.next() is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_any_bytes_are_read_or_refused() -> None:
    chance = random.Random(5)
    good = [sized(b"abc" * 50), CHUNKED, TRAILED, post(b"Expect: 100-continue\r\nContent-Length: 2\r\n", b"ab")]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(3_000):
        data = bytearray(b"".join(chance.choices(good, k=3)))
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        parser = RequestParser(LIMIT)
        try:
            while data:
                size = chance.randrange(1, 200)
                parser.feed(bytes(data[:size]))
                del data[:size]
                while parser.next() is not None:
                    outcomes["read"] += 1
        except BadRequestError as error:
            outcomes["refused"] += error.status in (400, 413, 431)
    assert sum(outcomes.values()) > 3_000
    assert min(outcomes.values()) > 500


# --- HTTP/1.1: as Dynamo says it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.request.bin")), ids=lambda path: path.name)
def test_a_request_is_that_of_a_real_client_byte_for_byte(path: Path) -> None:
    data = path.read_bytes()
    (request,) = read(data)
    assert request.method == "POST"
    assert request.path == "/v1/rpc/generate"
    assert ("traceparent" in path.name) == (request.traceparent != "")
    authority = data.partition(b"host: ")[2].partition(b"\r\n")[0].decode()
    head = encode_post(request.path, authority, len(request.body), request.traceparent)
    assert head + request.body == data


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.ack.bin")), ids=lambda path: path.name)
def test_an_acknowledgement_is_that_of_a_real_worker_but_for_its_date(path: Path) -> None:
    begin, date, _ = path.read_bytes().partition(b"date: ")
    ours = encode_reply(Reply(202), 0, keep_alive=True)
    assert ours == begin + date + b"Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n"


# --- HTTP/1.1: a connection -------------------------------------------------------------------------------------------


class Desk:
    """An intake that takes everything."""

    limit_bytes, patience = LIMIT, Patience()

    def __init__(self) -> None:
        self.draining = False
        self.taken: list[Request] = []
        self.noted: list[str] = []

    def reply(self, request: Request) -> Reply:
        self.taken.append(request)
        return Reply(202)

    def refused(self, status: int, detail: str) -> Reply:
        self.noted.append(str(status))
        return Reply(status, "no")

    def too_slow(self, detail: str) -> None:
        self.noted.append("too_slow")

    def flooded(self, detail: str) -> None:
        self.noted.append("flood")


def statuses(out: bytes) -> list[int]:
    return [int(each[:3]) for each in out.split(b"HTTP/1.1 ")[1:]]


def test_pipelined_requests_are_answered_in_order_until_one_ends_the_connection() -> None:
    desk = Desk()
    speaker = Http1(desk, 0.0)
    out = speaker.feed(sized(b"1") + sized(b"2") + post(b"Connection: close\r\n") + sized(b"3"), 1.0)
    assert statuses(out) == [202, 202, 202]
    assert out.count(b"connection: close") == 1
    assert (speaker.over, len(desk.taken)) == (True, 3)


def test_while_the_server_drains_each_answer_ends_its_connection() -> None:
    desk = Desk()
    speaker = Http1(desk, 0.0)
    assert b"connection: close" not in speaker.feed(sized(b"1"), 1.0)
    desk.draining = True
    assert b"connection: close" in speaker.feed(sized(b"1"), 1.0)
    assert speaker.over


def test_a_client_that_waits_to_be_told_is_told_once() -> None:
    speaker = Http1(Desk(), 0.0)
    data = post(b"Expect: 100-continue\r\nContent-Length: 2\r\n")
    assert statuses(speaker.feed(data, 0.0)) == [100]
    assert speaker.feed(b"a", 0.0) == b""
    assert statuses(speaker.feed(b"b", 0.0)) == [202]
    assert statuses(speaker.feed(data + b"ab", 0.0)) == [202]
    assert statuses(speaker.feed(post(b"Expect: 100-continue\r\nContent-Length: 999999\r\n"), 0.0)) == [413]


@pytest.mark.parametrize(
    ("pieces", "due"),
    [
        ([], 10.0),  # a connection that says nothing
        ([b"POST /"], 15.0),
        ([b"POST /", b"a"], 15.0),  # a byte now and then moves nothing
        ([post(b"Content-Length: 9\r\n", b"x")], 35.0),
        ([post(b"Content-Length: 9\r\n")], 35.0),
        ([post(b"Content-Length: 9\r\n"), b"x", b"x"], 35.0),
        ([sized(b"x")], 185.0),
        ([sized(b"x"), sized(b"x")], 186.0),
        ([sized(b"x") + b"POST"], 15.0),
    ],
)
def test_when_a_client_has_to_go_on(pieces: list[bytes], due: float) -> None:
    desk = Desk()
    speaker = Http1(desk, 0.0)
    for at, piece in enumerate(pieces):
        speaker.feed(piece, 5.0 + at)
    assert speaker.due == due
    rest = speaker.rest or due == 35.0
    out = speaker.expire(due)
    assert speaker.over
    assert (statuses(out), desk.noted) == (([408], ["too_slow"]) if rest else ([], []))


# --- HTTP/2: heads of frames ------------------------------------------------------------------------------------------


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


ORDINARY = frame(4) + frame(1, b"head", 4, 1) + frame(0, b"body" * 100, 1, 1) + frame(8, b"\0\0\0\1")


def begun() -> Frames:
    frames = Frames(LIMIT)
    frames.feed(frame(4), -WINDOW_SECONDS)
    return frames


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(4) + frame(0, b"x" * (LIMIT + 1), 0, 1)[:9], 6),  # said, and not sent
        (frame(4) + b"\xff\xff\xff\0\0\0\0\0\1", 6),
        (b"HTTP/1.1 400 Bad Request", 6),
        (frame(0, b"x", 0, 1), 1),
        (frame(6, b"x" * 8), 1),
        (LEAVING, 1),
    ],
)
def test_what_is_no_frame_that_may_come_is_told_from_its_head(data: bytes, code: int) -> None:
    with pytest.raises(FrameError) as refused:
        Frames(LIMIT).feed(data, 0.0)
    assert refused.value.code == code


def test_frames_pass_wherever_they_are_cut_and_goaways_do_not() -> None:
    goaway = frame(7, b"\0\0\0\x05\0\0\0\x02bye")
    data = b"preface!" + ORDINARY + goaway + ORDINARY
    for size in (1, 2, 9, 10, 64, len(data)):
        frames = Frames(LIMIT, preface=8)
        out = b"".join(frames.feed(data[at : at + size], 0.0) for at in range(0, len(data), size))
        assert out == b"preface!" + ORDINARY + ORDINARY
        assert frames.goaway == Goaway(5, 2)
        assert not frames.in_block


def test_the_word_that_a_server_leaves_names_no_last_stream() -> None:
    frames = begun()
    assert frames.feed(LEAVING, 0.0) == b""
    assert frames.goaway == Goaway(2**31 - 1, 0)


FLOODS = {
    "settings": (frame(4), LIMITS[4]),
    "pings": (frame(6, b"x" * 8), LIMITS[6]),
    "resets": (frame(3, b"\0\0\0\x08", 0, 1), LIMITS[3]),
    "priorities": (frame(2, b"x" * 5, 0, 1), LIMITS[2]),
    "window updates": (frame(8, b"\0\0\0\1"), LIMITS[8]),
    "empty data": (frame(0, b"", 0, 1), 100),
    "small data": (frame(0, b"x", 0, 1), LIMITS[0]),
    "unknown": (frame(99), 200),
    "goaways": (LEAVING, LIMITS[7]),
}


@pytest.mark.parametrize(("data", "limit"), FLOODS.values(), ids=FLOODS)
def test_frames_that_only_make_work_are_limited_in_a_span_of_time(data: bytes, limit: int) -> None:
    frames = begun()
    for span in range(3):
        frames.feed(data * limit, span * WINDOW_SECONDS + 0.1)
    with pytest.raises(FloodError):
        frames.feed(data, 3 * WINDOW_SECONDS - 0.1)


def test_resets_that_are_provoked_count_as_those_that_come() -> None:
    frames = begun()
    frames.feed(b"", 0.0)
    reset = frame(3, b"\0\0\0\x07", 0, 1)
    frames.sent((frame(1, b"head", 5, 1) + reset) * (LIMITS[3] - 1))
    frames.feed(reset, 0.0)
    with pytest.raises(FloodError):
        frames.sent(reset)


@pytest.mark.parametrize(
    "pieces",
    [
        [frame(1, b"x" * 65_536, 4, 1)],
        [frame(1, b"x" * 65_536, 4, 1)[:9]],  # said, and not sent
        [frame(1, b"", 0, 1), *[frame(9, b"", 0, 1)] * 17],
        [frame(1, b"", 0, 1), *[frame(9, b"x" * 16_384, 0, 1)] * 4],
        [frame(5, b"x" * 65_536, 4, 1)],
        [frame(7, b"x")],
        [frame(7, b"x" * 20_000)],
    ],
)
def test_a_header_block_is_measured_while_it_comes(pieces: list[bytes]) -> None:
    frames = begun()
    for piece in pieces[:-1]:
        frames.feed(piece, 0.0)
        assert frames.in_block
    with pytest.raises(FloodError):
        frames.feed(pieces[-1], 0.0)


def test_without_h2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rkmetrics.planes.http2", raising=False)
    for module in [name for name in sys.modules if name.partition(".")[0] == "h2"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "h2", None)
    with pytest.raises(MissingExtraError, match=r"'h2'; install it with: pip install 'rkmetrics\[http\]'"):
        import rkmetrics.planes.http2  # noqa: F401
