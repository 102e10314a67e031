"""The gate: DESIGN section 7's table, and threats T1 to T5 and T8 to T10 as attacks."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkmetrics.asgi.auth import Gate, TokenFile
from rkmetrics.asgi.base import Request, Response
from rkmetrics.catalogue.exporter import AuthFailure
from rkmetrics.registry import Access
from rkmetrics.settings import Secret, Settings

RIGHT = b"s3cret"


class Counted(list[AuthFailure]):
    """The reasons that a gate has counted, in order."""


@pytest.fixture
def counted() -> Counted:
    return Counted()


def gate_of(counted: Counted, **values: object) -> Gate:
    return Gate.from_settings(Settings(metrics_enabled=True, **values), counted.append)  # type: ignore[arg-type]


@pytest.fixture
def gate(counted: Counted) -> Gate:
    return gate_of(counted, metrics_token=Secret(RIGHT))


def ask(gate: Gate, *authorization: bytes, query: bytes = b"", headers: tuple[tuple[bytes, bytes], ...] = ()) -> int:
    """The status that the gate gives: 200 when it lets the request pass."""
    own = tuple((b"authorization", value) for value in authorization)
    answer = gate.refuse(Request("GET", "/metrics", query, own + headers))
    return 200 if answer is None else answer.status


def refusal(gate: Gate, *authorization: bytes) -> Response:
    answer = gate.refuse(
        Request("GET", "/metrics", headers=tuple((b"authorization", value) for value in authorization))
    )
    assert answer is not None
    return answer


# --- the table --------------------------------------------------------------------------------------------------------

S = Secret
TABLE: list[tuple[dict[str, object], bytes | None, int]] = [
    # METRICS_ENABLED unset: closed, whatever is offered or opened
    ({}, None, 403),
    ({}, RIGHT, 403),
    ({"metrics_token": S(RIGHT)}, RIGHT, 403),
    ({"metrics_access": "open"}, None, 403),
    # set, with a token
    ({"metrics_enabled": True, "metrics_token": S(RIGHT)}, RIGHT, 200),
    ({"metrics_enabled": True, "metrics_token": S(RIGHT)}, b"wrong", 401),
    ({"metrics_enabled": True, "metrics_token": S(RIGHT)}, None, 401),
    # set, with no token that can be used: stays closed, also to an empty bearer
    ({"metrics_enabled": True}, None, 403),
    ({"metrics_enabled": True}, RIGHT, 403),
    ({"metrics_enabled": True}, b"", 403),
    ({"metrics_enabled": True, "metrics_token": S(b"")}, b"", 403),
    ({"metrics_enabled": True, "metrics_token": S(b"  \t\n")}, b"  ", 403),
    ({"metrics_enabled": True, "metrics_token": S(b"two words")}, b"two words", 403),
    ({"metrics_enabled": True, "metrics_token": S(b"a,b")}, b"a,b", 403),
    ({"metrics_enabled": True, "metrics_token": S("gehe\u00efm".encode())}, "gehe\u00efm".encode(), 403),
    # the old token of a rotation is valid beside a current one only
    ({"metrics_enabled": True, "metrics_token": S(RIGHT), "metrics_token_previous": S(b"old")}, b"old", 200),
    ({"metrics_enabled": True, "metrics_token": S(RIGHT), "metrics_token_previous": S(b"old")}, RIGHT, 200),
    ({"metrics_enabled": True, "metrics_token": S(RIGHT), "metrics_token_previous": S(b"old")}, b"older", 401),
    ({"metrics_enabled": True, "metrics_token_previous": S(b"old")}, b"old", 403),
    # open on purpose
    ({"metrics_enabled": True, "metrics_access": "open"}, None, 200),
    ({"metrics_enabled": True, "metrics_access": "open"}, b"wrong", 200),
    ({"metrics_enabled": True, "metrics_access": "open", "metrics_token": S(RIGHT)}, None, 200),
]


@pytest.mark.parametrize(("values", "token", "status"), TABLE)
def test_the_gate_follows_the_table(values: dict[str, object], token: bytes | None, status: int) -> None:
    gate = Gate.from_settings(Settings(**values))  # type: ignore[arg-type]
    authorization = () if token is None else (b"Bearer " + token,)
    assert ask(gate, *authorization) == status
    assert gate.usable is (status != 403)


def test_access_in_code_overrides_the_variables() -> None:
    guarded = Settings(metrics_enabled=True, metrics_token=S(RIGHT))
    assert ask(Gate.from_settings(Access.open().applied(Settings()))) == 200
    assert ask(Gate.from_settings(Access.open().applied(guarded))) == 200
    assert ask(Gate.from_settings(Access.token().applied(replace(guarded, metrics_access="open")))) == 401
    assert ask(Gate.from_settings(Access.token().applied(Settings(metrics_access="open")))) == 403


# --- what is offered --------------------------------------------------------------------------------------------------

ATTEMPTS: list[tuple[tuple[bytes, ...], AuthFailure | None]] = [
    ((b"Bearer s3cret",), None),
    ((b"bearer s3cret",), None),
    ((b"BEARER s3cret",), None),
    ((b"bEaReR   s3cret",), None),
    ((b"Bearer s3cret ",), None),
    ((b" \tBearer s3cret\t",), None),
    ((), AuthFailure.MISSING),
    ((b"",), AuthFailure.MALFORMED),
    ((b"Bearer",), AuthFailure.MALFORMED),
    ((b"Bearer ",), AuthFailure.MALFORMED),
    ((b"Bearer\ts3cret",), AuthFailure.MALFORMED),
    ((b"Bearer \ts3cret",), AuthFailure.MALFORMED),
    ((b"Bearer s3cret x",), AuthFailure.MALFORMED),
    ((b"Bearer s3cret\x00",), AuthFailure.MALFORMED),
    ((b"Bearer: s3cret",), AuthFailure.MALFORMED),
    ((b"s3cret",), AuthFailure.MALFORMED),
    ((b"Basic s3cret",), AuthFailure.WRONG_SCHEME),
    ((b"Basic czNjcmV0",), AuthFailure.WRONG_SCHEME),
    ((b"Token s3cret",), AuthFailure.WRONG_SCHEME),
    ((b"BearerX s3cret",), AuthFailure.WRONG_SCHEME),
    ((b"Bearer s3cre",), AuthFailure.WRONG_TOKEN),
    ((b"Bearer s3cret1",), AuthFailure.WRONG_TOKEN),
    ((b"Bearer S3CRET",), AuthFailure.WRONG_TOKEN),
    ((b'Bearer "s3cret"',), AuthFailure.WRONG_TOKEN),
    ((b"Bearer 's3cret'",), AuthFailure.WRONG_TOKEN),
    ((b"Bearer token=s3cret",), AuthFailure.WRONG_TOKEN),
    ((b"Bearer s3cret=",), AuthFailure.WRONG_TOKEN),
    ((b"Bearer s3cret%20",), AuthFailure.WRONG_TOKEN),
    ((b"Bearer " + b"s3cret" * 10_000,), AuthFailure.WRONG_TOKEN),
    ((b"Bearer s3cr\xc3\xa9t",), AuthFailure.MALFORMED),
    ((b"Bearer s3cret\xff",), AuthFailure.MALFORMED),
    ((b"\xff\xfe",), AuthFailure.MALFORMED),
    ((b"B\xe9arer s3cret",), AuthFailure.MALFORMED),
    ((b"Bearer s3cret\xc2\xa0",), AuthFailure.MALFORMED),
    ((b"Bearer s3cret, Bearer s3cret",), AuthFailure.SEVERAL_HEADERS),
    ((b"Bearer s3cret,",), AuthFailure.SEVERAL_HEADERS),
    ((b"Basic x, Bearer s3cret",), AuthFailure.SEVERAL_HEADERS),
    ((b"Bearer s3cret", b"Bearer s3cret"), AuthFailure.SEVERAL_HEADERS),
    ((b"Bearer wrong", b"Bearer s3cret"), AuthFailure.SEVERAL_HEADERS),
    ((b"Bearer s3cret", b"Basic x"), AuthFailure.SEVERAL_HEADERS),
    ((b"", b"Bearer s3cret"), AuthFailure.SEVERAL_HEADERS),
]


@pytest.mark.parametrize(("authorization", "failure"), ATTEMPTS)
def test_one_bearer_exactly_passes_and_every_other_attempt_is_counted_by_its_reason(
    gate: Gate, counted: Counted, authorization: tuple[bytes, ...], failure: AuthFailure | None
) -> None:
    assert ask(gate, *authorization) == (200 if failure is None else 401)
    assert counted == ([] if failure is None else [failure])


ELSEWHERE: list[tuple[bytes, tuple[tuple[bytes, bytes], ...], AuthFailure]] = [
    (b"token=s3cret", (), AuthFailure.QUERY_TOKEN),
    (b"access_token=s3cret", (), AuthFailure.QUERY_TOKEN),
    (b"%74oken=s3cret", (), AuthFailure.QUERY_TOKEN),
    (b"TOKEN=s3cret", (), AuthFailure.QUERY_TOKEN),
    (b"a=b&authorization=Bearer+s3cret", (), AuthFailure.QUERY_TOKEN),
    (b"s3cret", (), AuthFailure.MISSING),
    (b"", ((b"cookie", b"token=s3cret; authorization=Bearer s3cret"),), AuthFailure.MISSING),
    (b"", ((b"proxy-authorization", b"Bearer s3cret"),), AuthFailure.MISSING),
    (b"", ((b"x-api-key", b"s3cret"),), AuthFailure.MISSING),
    (b"", ((b"x-authorization", b"Bearer s3cret"),), AuthFailure.MISSING),
    (b"", ((b"x-forwarded-authorization", b"Bearer s3cret"),), AuthFailure.MISSING),
    (b"", ((b"x-forwarded-for", b"127.0.0.1"), (b"host", b"localhost")), AuthFailure.MISSING),
    (b"", ((b"x-original-url", b"/health"), (b"x-rewrite-url", b"/health")), AuthFailure.MISSING),
]


@pytest.mark.parametrize(("query", "headers", "failure"), ELSEWHERE)
def test_a_token_anywhere_else_opens_nothing(
    gate: Gate, counted: Counted, query: bytes, headers: tuple[tuple[bytes, bytes], ...], failure: AuthFailure
) -> None:
    assert ask(gate, query=query, headers=headers) == 401
    assert counted == [failure]


def test_a_token_in_the_query_is_refused_even_beside_the_right_header(gate: Gate) -> None:
    """RFC 6750, 2: a client uses one method only; and the one in the query ends in logs."""
    assert ask(gate, b"Bearer s3cret", query=b"token=s3cret") == 401
    assert ask(gate, b"Bearer s3cret", query=b"name[]=up") == 200


def test_the_name_of_the_header_is_matched_in_any_case(gate: Gate) -> None:
    assert ask(gate, headers=((b"AUTHORIZATION", b"Bearer s3cret"),)) == 200
    assert ask(gate, b"Bearer s3cret", headers=((b"Authorization", b"Bearer s3cret"),)) == 401


def test_a_401_names_the_scheme_and_a_403_does_not(gate: Gate) -> None:
    answer = refusal(gate)
    assert (answer.status, answer.body) == (401, b"metrics request requires a valid bearer token\n")
    assert (b"www-authenticate", b"Bearer") in answer.raw_headers()
    closed = refusal(Gate.from_settings(Settings()))
    assert (closed.status, closed.body) == (403, b"metrics not enabled\n")
    assert b"www-authenticate" not in dict(closed.raw_headers())


@given(st.lists(st.binary(max_size=60), max_size=3), st.binary(max_size=60))
@settings(deadline=None)
def test_no_bytes_raise_or_open_it(authorization: list[bytes], query: bytes) -> None:
    counted = Counted()
    gate = gate_of(counted, metrics_token=Secret(b"a-token-that-no-random-bytes-spell"))
    assert ask(gate, *authorization, query=query) == 401
    assert len(counted) == 1


@given(st.text("abcXYZ019-._~+/=!#$%&'()*:;<>?@[]^`{|}\"", min_size=1, max_size=50))
@settings(deadline=None)
def test_any_token_of_visible_ascii_opens_it_and_its_neighbours_do_not(token: str) -> None:
    gate = gate_of(Counted(), metrics_token=Secret(token.encode()))
    assert ask(gate, b"Bearer " + token.encode()) == 200
    assert ask(gate, b"Bearer " + token.encode() + b"x") == 401
    assert ask(gate, b"Bearer " + token[:-1].encode()) == 401


# --- secrets stay secret ----------------------------------------------------------------------------------------------


def test_neither_token_nor_offer_is_in_any_repr_log_or_answer(
    counted: Counted, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "token"
    file.write_text("t0ken-in-file\n")
    gate = gate_of(counted, metrics_token=Secret(RIGHT), metrics_token_file=str(file))
    offered = b"0ffered-by-client"
    request = Request("GET", "/metrics", b"token=" + offered, ((b"authorization", b"Bearer " + offered),))
    answer = gate.refuse(request)
    file.write_text("t0ken with spaces\n")
    ask(gate, b"Bearer " + RIGHT)
    shown = "".join([repr(gate), repr(request), repr(answer), repr(vars(gate)), caplog.text, repr(TokenFile("t0ken"))])
    for secret in ("s3cret", "t0ken", "0ffered"):
        assert secret not in shown


def test_a_token_put_into_the_variable_of_the_file_is_not_logged(
    counted: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    gate_of(counted, metrics_token_file="t0ken-by-mistake")
    assert "METRICS_TOKEN_FILE: No such file" in caplog.text
    assert "t0ken" not in caplog.text


def test_a_closed_gate_says_so_once_and_names_the_variables(counted: Counted, caplog: pytest.LogCaptureFixture) -> None:
    """T1: fail closed, say so once in the log, never fall back to open."""
    gate = gate_of(counted)
    for _ in range(100):
        assert ask(gate) == 403
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "METRICS_TOKEN" in errors[0]
    assert "METRICS_ACCESS=open" in errors[0]
    assert counted == []


def test_a_gate_that_is_not_enabled_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    assert ask(Gate.from_settings(Settings(metrics_token_file="/nowhere"))) == 403
    assert caplog.text == ""


# --- token files ------------------------------------------------------------------------------------------------------


def put(file: Path, content: bytes) -> None:
    """Write in place: the same inode, as `echo > file` does."""
    file.write_bytes(content)


def swap(file: Path, content: bytes) -> None:
    """Replace atomically, as secret mounts and careful operators do."""
    other = file.with_name("other")
    other.write_bytes(content)
    other.replace(file)


@pytest.mark.parametrize("write", [put, swap])
def test_a_rotation_of_the_file_takes_effect_at_the_next_request(
    counted: Counted, tmp_path: Path, write: object
) -> None:
    assert callable(write)
    file = tmp_path / "token"
    write(file, b"one\n")
    gate = gate_of(counted, metrics_token_file=str(file))
    assert (ask(gate, b"Bearer one"), ask(gate, b"Bearer two")) == (200, 401)
    write(file, b"two\n\none\n")
    assert (ask(gate, b"Bearer one"), ask(gate, b"Bearer two")) == (200, 200)
    write(file, b"two\n")
    assert (ask(gate, b"Bearer one"), ask(gate, b"Bearer two")) == (401, 200)


def test_a_change_of_the_same_size_within_one_tick_of_the_clock_is_seen(counted: Counted, tmp_path: Path) -> None:
    file = tmp_path / "token"
    gate = None
    for number in range(100, 200):
        put(file, b"token-%d" % number)
        gate = gate or gate_of(counted, metrics_token_file=str(file))
        assert ask(gate, b"Bearer token-%d" % number) == 200


def test_a_file_that_rests_is_not_read_again(tmp_path: Path, counted: Counted) -> None:
    file = tmp_path / "token"
    put(file, b"one")
    os.utime(file, (1_000_000, 1_000_000))
    tokens = TokenFile(str(file))
    assert tokens.tokens() is tokens.tokens()
    put(file, b"two")
    assert tokens.tokens().digests != ()


def test_a_symlink_that_is_moved_is_a_change(counted: Counted, tmp_path: Path) -> None:
    for name in ("one", "two"):
        put(tmp_path / name, name.encode())
        os.utime(tmp_path / name, (1_000_000, 1_000_000))
    link = tmp_path / "token"
    link.symlink_to(tmp_path / "one")
    gate = gate_of(counted, metrics_token_file=str(link))
    assert ask(gate, b"Bearer one") == 200
    link.unlink()
    link.symlink_to(tmp_path / "two")
    assert (ask(gate, b"Bearer one"), ask(gate, b"Bearer two")) == (401, 200)


BAD_FILES = [
    b"",
    b"\n \n\t\n",
    b"one\ntwo\nthree\n",
    b"two words\n",
    b"good\nb\xe4d\n",
    b"a,b",
    b"x" * 20_000,
    b"one\x00",
]


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_file_that_is_not_one_or_two_tokens_closes_the_gate(
    counted: Counted, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    file = tmp_path / "token"
    put(file, b"good")
    gate = gate_of(counted, metrics_token_file=str(file))
    assert ask(gate, b"Bearer good") == 200
    assert caplog.text == ""
    put(file, content)
    for _ in range(10):
        assert ask(gate, b"Bearer good") == 403
    assert caplog.text.count("METRICS_TOKEN_FILE: ") == 1
    put(file, b"good")
    assert ask(gate, b"Bearer good") == 200


def test_a_file_that_cannot_be_read_closes_the_gate_and_opens_it_again_when_it_can(
    counted: Counted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    gate = gate_of(counted, metrics_token_file=str(file))
    assert ask(gate, b"Bearer good") == 403
    put(file, b"good\n")
    assert ask(gate, b"Bearer good") == 200
    file.unlink()
    assert ask(gate, b"Bearer good") == 403
    file.mkdir()
    assert ask(gate, b"Bearer good") == 403
    assert caplog.text.count("No such file") == 2


def test_a_fifo_in_the_place_of_the_file_does_not_hang_the_request(counted: Counted, tmp_path: Path) -> None:
    file = tmp_path / "token"
    os.mkfifo(file)
    gate = gate_of(counted, metrics_token_file=str(file))
    assert ask(gate, b"Bearer good") == 403


def test_a_variable_and_a_file_are_both_valid_and_one_bad_does_not_close_the_other(
    counted: Counted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = gate_of(counted, metrics_token=Secret(RIGHT), metrics_token_file=str(tmp_path / "token"))
    assert ask(gate, b"Bearer s3cret") == 200
    assert "left out: METRICS_TOKEN_FILE" in caplog.text
    put(tmp_path / "token", b"other")
    assert (ask(gate, b"Bearer s3cret"), ask(gate, b"Bearer other")) == (200, 200)


def test_requests_during_a_rotation_are_answered_200_or_401_and_nothing_else(counted: Counted, tmp_path: Path) -> None:
    file = tmp_path / "token"
    swap(file, b"one")
    gate = gate_of(counted, metrics_token_file=str(file))
    seen: set[int] = set()
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            seen.add(ask(gate, b"Bearer one"))

    threads = [threading.Thread(target=scrape) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(300):
        swap(file, b"two" if number % 2 else b"one\ntwo")
    done.set()
    for thread in threads:
        thread.join()
    assert seen <= {200, 401}
