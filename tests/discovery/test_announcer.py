"""Announcing: to whom, how often, what is said of it, and that nothing a balancer does holds up another."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

import rkmetrics as rk
from rkmetrics.asgi.base import Request
from rkmetrics.asgi.routes import Surface
from rkmetrics.catalogue.announcing import AnnounceOutcome, Announcing, WithdrawOutcome
from rkmetrics.discovery.announcer import Announcer
from rkmetrics.discovery.base import Backend
from rkmetrics.errors import FetchError
from rkmetrics.health import Phase
from rkmetrics.settings import Secret, Settings
from tests.hostile import BEHAVIOURS, response, serving, until

BACKEND = Backend.checked("backend-1", "10.0.1.5:3000", 9090)
END = b"\r\n\r\n"


class Balancer:
    """A balancer that keeps what it is told. answer: what it says to announcements."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bytes, bytes]] = []  # request line, head, body
        self.answer = response("201 Created", b'{"id":"backend-1","state":"new","expires_seconds":90}')
        self.port = 0

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def lines(self) -> list[str]:
        return [line for line, _, _ in self.told]

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(END)
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        line = head.partition(b" HTTP/1.1\r\n")[0].decode()
        self.told.append((line, head, body))
        writer.write(self.answer if line.startswith("POST") else response("204 No Content"))
        await writer.drain()
        writer.close()


@asynccontextmanager
async def balancing(port: int = 0) -> AsyncIterator[Balancer]:
    balancer = Balancer()
    server = await asyncio.start_server(balancer.connected, "127.0.0.1", port)
    balancer.port = int(server.sockets[0].getsockname()[1])
    try:
        yield balancer
    finally:
        server.close()
        await asyncio.sleep(0)


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(Settings(metrics_enabled=True, metrics_access="open"))


def metrics(registry: rk.Registry) -> Announcing:
    return registry.bind(Announcing)


# --- who is told what -------------------------------------------------------------------------------------------------


async def test_each_balancer_is_told_at_once_and_again_and_at_the_end(registry: rk.Registry) -> None:
    async with balancing() as one, balancing() as two:
        async with Announcer(registry, BACKEND, [one.place, f"http://{two.place}/"], interval_seconds=0.3) as announcer:
            ok = metrics(registry).announcements[AnnounceOutcome.OK]
            # Leaving right after an answer, none is on its way that the end could cut off.
            await until(lambda: min(len(one.told), len(two.told)) >= 3 and ok.value == len(one.told) + len(two.told))
            assert set(announcer.listed) == {one.place, two.place}
            assert metrics(registry).balancers.value == metrics(registry).balancers_wanted.value == 2
        for each in (one, two):
            assert each.lines[-1] == "DELETE /register/backend-1"
            assert set(each.lines[:-1]) == {"POST /register"}
            assert json.loads(each.told[0][2]) == {"id": "backend-1", "address": "10.0.1.5:3000", "metrics_port": 9090}
            assert b"content-type: application/json\r\n" in each.told[0][1]
            assert b"authorization" not in each.told[0][1]
    found = metrics(registry)
    assert found.announcements[AnnounceOutcome.OK].value == len(one.told) + len(two.told) - 2
    assert found.withdrawals[WithdrawOutcome.OK].value == 2
    assert found.last_success.value is not None
    assert found.balancers.value == found.balancers_wanted.value == 0


async def test_the_token_is_shown_to_balancers_and_nowhere_else(
    registry: rk.Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with balancing() as balancer:
        async with Announcer(registry, BACKEND, [balancer.place, "127.0.0.1:1"], token=Secret("s3cret")):
            await until(lambda: balancer.told)
        assert all(b"authorization: Bearer s3cret\r\n" in head for _, head, _ in balancer.told)
    assert "s3cret" not in caplog.text


async def test_settings_say_whom_to_tell(registry: rk.Registry) -> None:
    async with balancing() as balancer:
        settings = Settings(
            load_balancers=(f"http://{balancer.place}",) * 2,
            registration_token=Secret("t"),
            announce_interval_seconds=0.1,
        )
        async with Announcer(rk.Registry(settings), BACKEND) as announcer:
            assert len(announcer.places) == 1
            await until(lambda: len(balancer.told) >= 2)
    assert b"authorization: Bearer t\r\n" in balancer.told[0][1]


@pytest.mark.parametrize("place", ["http://", "ftp://lb:1", "lb:0", "lb:99999"])
def test_a_balancer_that_is_no_place_is_wrong_use(registry: rk.Registry, place: str) -> None:
    with pytest.raises(FetchError, match="request"):
        Announcer(registry, BACKEND, [place])


async def test_a_balancer_that_comes_late_and_one_that_comes_again_are_told(
    registry: rk.Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    async with balancing() as balancer:
        port = balancer.port
    async with Announcer(registry, BACKEND, [f"127.0.0.1:{port}"], interval_seconds=0.1) as announcer:
        await until(lambda: metrics(registry).announcements[AnnounceOutcome.UNREACHABLE].value >= 2)
        async with balancing(port) as balancer:
            await until(lambda: announcer.listed)
        await until(lambda: not announcer.listed)
        async with balancing(port) as balancer:
            await until(lambda: announcer.listed)
    lines = [each.getMessage() for each in caplog.records]
    assert [("knows us" in line, "does not know us" in line) for line in lines[:4]] == [
        (False, True),
        (True, False),
        (False, True),
        (True, False),
    ]


# --- balancers that misbehave -----------------------------------------------------------------------------------------

OUTCOMES = {
    "vanishes": AnnounceOutcome.UNREACHABLE,
    "resets": AnnounceOutcome.UNREACHABLE,
    "half a body": AnnounceOutcome.UNREACHABLE,
    "hangs": AnnounceOutcome.TIMEOUT,
    "drips its headers": AnnounceOutcome.TIMEOUT,
    "drips its body": AnnounceOutcome.MALFORMED,  # it says that 60 kB are to come
    "garbage": AnnounceOutcome.MALFORMED,
    "redirect": AnnounceOutcome.REFUSED,
    "gzip": AnnounceOutcome.MALFORMED,
    "a body without end": AnnounceOutcome.MALFORMED,
    "headers without end": AnnounceOutcome.MALFORMED,
    "no JSON": AnnounceOutcome.MALFORMED,
    "JSON bomb": AnnounceOutcome.MALFORMED,
    "unauthorized": AnnounceOutcome.UNAUTHORIZED,
    "forbidden": AnnounceOutcome.UNAUTHORIZED,
    "broken": AnnounceOutcome.REFUSED,
    "not modified, unasked": AnnounceOutcome.REFUSED,
}


@pytest.mark.parametrize(("name", "outcome"), OUTCOMES.items())
async def test_what_a_balancer_does_has_a_name_and_delays_nobody_else(
    registry: rk.Registry, name: str, outcome: AnnounceOutcome
) -> None:
    async with serving(BEHAVIOURS[name]) as bad, balancing() as good:
        places = [bad.url, good.place]
        async with Announcer(registry, BACKEND, places, interval_seconds=0.02, timeout_seconds=0.3) as announcer:
            await until(lambda: metrics(registry).announcements[outcome].value)
            await until(lambda: len(good.told) >= 3)
            assert announcer.listed == (good.place,)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (response("409 Conflict", b"the id is another's\n"), AnnounceOutcome.CONFLICT),
        (response("429 Too Many Requests"), AnnounceOutcome.BUSY),
        (response("507 Insufficient Storage"), AnnounceOutcome.BUSY),
        (response("400 Bad Request"), AnnounceOutcome.REFUSED),
        (response("200 OK", b'{"id":"another","state":"up","expires_seconds":1}'), AnnounceOutcome.MALFORMED),
        (response("200 OK"), AnnounceOutcome.OK),
        (response("204 No Content"), AnnounceOutcome.OK),
        (response("200 OK", b'{"ok":true}'), AnnounceOutcome.OK),
    ],
)
async def test_answers_have_names(registry: rk.Registry, answer: bytes, outcome: AnnounceOutcome) -> None:
    async with balancing() as balancer:
        balancer.answer = answer
        async with Announcer(registry, BACKEND, [balancer.place]) as announcer:
            await until(lambda: metrics(registry).announcements[outcome].value)
            assert bool(announcer.listed) is (outcome is AnnounceOutcome.OK)


async def test_what_a_balancer_says_is_in_the_log_once_and_in_one_line(
    registry: rk.Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    async with balancing() as balancer:
        balancer.answer = response("403 Forbidden", b"10.0.1.5 is not in an allowed network\x1b[31m\nforged line\n")
        async with Announcer(registry, BACKEND, [balancer.place], interval_seconds=0.01):
            await until(lambda: len(balancer.told) >= 5)
    lines = [each.getMessage() for each in caplog.records if "does not know us" in each.getMessage()]
    assert len(lines) == 1
    assert "status 403" in lines[0]
    assert "\x1b" not in lines[0]
    assert "forged" not in lines[0]


async def test_a_balancer_that_cannot_reach_us_is_told_of_in_our_log(
    registry: rk.Registry, caplog: pytest.LogCaptureFixture
) -> None:
    async with balancing() as balancer:
        balancer.answer = response("200 OK", b'{"id":"backend-1","state":"down","expires_seconds":90}')
        async with Announcer(registry, BACKEND, [balancer.place], interval_seconds=0.01) as announcer:
            await until(lambda: len(balancer.told) >= 3)
            assert announcer.listed
    assert [each.getMessage() for each in caplog.records] == [
        f"balancer {balancer.place}: it knows us as backend-1, and its checks of 10.0.1.5:9090 fail; "
        "is that address right, and open to it?"
    ]


async def test_a_balancer_that_asks_to_wait_is_not_asked_again_before(registry: rk.Registry) -> None:
    async with balancing() as balancer:
        balancer.answer = response("429 Too Many Requests", b"", b"retry-after: 3600")
        async with Announcer(registry, BACKEND, [balancer.place], interval_seconds=60):
            await until(lambda: balancer.told)
            await asyncio.sleep(0.7)  # without it, there would have been two more tries
            assert len(balancer.told) == 1


async def test_the_end_waits_for_no_balancer(registry: rk.Registry) -> None:
    async with serving(BEHAVIOURS["hangs"]) as bad, balancing() as good:
        async with Announcer(registry, BACKEND, [bad.url, good.place]):
            await until(lambda: good.told)
    assert good.lines[-1].startswith("DELETE")
    assert metrics(registry).withdrawals[WithdrawOutcome.FAILED].value == 1


class Bad:
    """A place with a bug, that hears of no end."""

    shown, listed, runs = "a bad place", False, 0

    async def run(self) -> None:
        self.runs += 1
        raise RuntimeError("a bug")

    async def withdraw(self) -> bool:
        await asyncio.Event().wait()
        return True


async def test_a_place_with_a_bug_begins_again_and_ends_nothing(
    registry: rk.Registry, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rkmetrics.discovery.announcer.WITHDRAW_SECONDS", 0.1)
    bad = Bad()
    async with balancing() as balancer:
        async with Announcer(registry, BACKEND, [balancer.place], places=[bad]):
            await until(lambda: bad.runs >= 2)
    assert balancer.lines == ["POST /register", "DELETE /register/backend-1"]
    assert "a bad place: failed, and begins again" in caplog.text
    assert "a bad place: was not told that we leave" in caplog.text


# --- in a thread ------------------------------------------------------------------------------------------------------


async def test_a_program_without_a_loop_announces_from_a_thread(registry: rk.Registry) -> None:
    async with balancing() as balancer:

        def program() -> None:
            with Announcer(registry, BACKEND, [balancer.place]) as announcer:
                while not announcer.listed:
                    time.sleep(0.005)
                assert announcer.running
            assert not announcer.running

        await asyncio.to_thread(program)
    assert balancer.lines == ["POST /register", "DELETE /register/backend-1"]
    assert not [each for each in threading.enumerate() if each.name == "rkmetrics-announce"]


async def test_an_announcer_may_start_again(registry: rk.Registry) -> None:
    async with balancing() as balancer:
        announcer = Announcer(registry, BACKEND, [balancer.place])
        for number in range(1, 4):
            async with announcer:
                await until(lambda number=number: len(balancer.told) == 2 * number - 1)  # type: ignore[misc]
    assert balancer.lines == ["POST /register", "DELETE /register/backend-1"] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
async def test_a_forked_child_does_not_announce_and_takes_nothing_back(registry: rk.Registry) -> None:
    async with balancing() as balancer:
        announcer = Announcer(registry, BACKEND, [balancer.place], interval_seconds=0.02)
        announcer.start()
        try:
            await until(lambda: balancer.told)
            child = os.fork()
            if not child:
                code = 1
                try:
                    running = announcer.running
                    announcer.leave()
                    announcer.close()
                    code = 2 if running or announcer.running else 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0  # noqa: ASYNC222
            told = len(balancer.told)
            await until(lambda: len(balancer.told) > told + 3)  # the parent goes on
            assert "DELETE /register/backend-1" not in balancer.lines
        finally:
            await asyncio.to_thread(announcer.close)


async def test_a_program_that_just_ends_takes_its_announcement_back() -> None:
    program = """
import sys
import rkmetrics as rk
from rkmetrics.discovery import Announcer, Backend

announcer = Announcer(rk.Registry(rk.Settings()), Backend.checked("backend-1", "10.0.1.5:3000", 9090), sys.argv[1:])
announcer.start()
while not announcer.listed:
    pass
"""
    async with balancing() as balancer:
        run = await asyncio.create_subprocess_exec(sys.executable, "-c", program, balancer.place)
        assert await run.wait() == 0
    assert balancer.lines == ["POST /register", "DELETE /register/backend-1"]


# --- leaving in order -------------------------------------------------------------------------------------------------


def check(registry: rk.Registry) -> bool:
    """A balancer's check: the vitals at /metrics."""
    surface = Surface(registry)
    answer = surface.respond(surface.answer(Request("GET", "/metrics", headers=((b"accept", b"application/json"),))))
    return bool(json.loads(answer.body)["ready"])


async def test_leaving_waits_until_each_balancer_was_told_and_requests_ended(registry: rk.Registry) -> None:
    registry.health.start()
    in_progress = registry.node.requests_in_progress
    async with balancing() as one, balancing() as two:
        async with Announcer(registry, BACKEND, [one.place, two.place], linger_seconds=0) as announcer:
            await until(lambda: len(announcer.listed) == 2)
            assert check(registry)
            in_progress.inc()
            leaving = asyncio.create_task(announcer.aleave())
            await until(lambda: not registry.health.ready)
            assert not await asyncio.to_thread(check, registry)
            assert len(one.told) == len(two.told) == 1  # one of two knows
            assert not await asyncio.to_thread(check, registry)
            assert len(one.told) == len(two.told) == 1  # and a request is in progress
            in_progress.dec()
            await leaving
            assert one.lines[1:] == two.lines[1:] == ["DELETE /register/backend-1"]
        assert len(one.told) == len(two.told) == 2  # once is enough


async def test_a_request_without_end_and_balancers_that_never_check_hold_up_the_end_for_a_while_only(
    registry: rk.Registry, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rkmetrics.discovery.announcer.UNLIST_SECONDS", 0.1)
    registry.health.start()
    registry.node.requests_in_progress.inc()
    async with balancing() as balancer:
        async with Announcer(registry, BACKEND, [balancer.place], exit_seconds=0.5) as announcer:
            await until(lambda: announcer.listed)
            await announcer.aleave()
            assert balancer.lines[-1].startswith("DELETE")
    assert "leaving with 1 requests in progress" in caplog.text


async def test_leaving_from_another_thread_is_the_same(registry: rk.Registry) -> None:
    registry.health.start()
    async with balancing() as balancer:
        announcer = Announcer(registry, BACKEND, [balancer.place])
        announcer.start()
        await until(lambda: announcer.listed)
        leaving = asyncio.create_task(asyncio.to_thread(announcer.leave))
        await until(lambda: not registry.health.ready)
        await asyncio.to_thread(check, registry)
        await leaving
        assert balancer.lines[-1].startswith("DELETE")
        await asyncio.to_thread(announcer.close)
        assert not announcer.running


async def test_a_signal_goes_on_to_its_former_handler_after_we_have_left(registry: rk.Registry) -> None:
    registry.health.start()
    heard: list[list[str]] = []
    async with balancing() as balancer:
        before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(balancer.lines))
        try:
            async with Announcer(
                registry, BACKEND, [balancer.place], drain_on=(signal.SIGUSR1,), linger_seconds=0
            ) as announcer:
                await until(lambda: announcer.listed)
                os.kill(os.getpid(), signal.SIGUSR1)
                await until(lambda: not registry.health.ready)
                assert not heard
                await asyncio.to_thread(check, registry)
                await until(lambda: heard)
                assert heard[0][-1].startswith("DELETE")
            assert signal.getsignal(signal.SIGUSR1) is not before
        finally:
            signal.signal(signal.SIGUSR1, before)


async def test_a_signal_waits_for_an_announcer_in_a_thread_too(registry: rk.Registry) -> None:
    registry.health.start()
    heard: list[list[str]] = []
    async with balancing() as balancer:
        before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(list(balancer.lines)))
        announcer = Announcer(registry, BACKEND, [balancer.place], drain_on=(signal.SIGUSR1,), linger_seconds=0)
        announcer.start()
        try:
            await until(lambda: announcer.listed)
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.to_thread(check, registry)
            await until(lambda: heard)
            assert heard == [["POST /register", "DELETE /register/backend-1"]]
        finally:
            announcer.close()
            signal.signal(signal.SIGUSR1, before)


async def test_a_second_signal_goes_on_at_once(registry: rk.Registry) -> None:
    heard: list[int] = []
    async with balancing() as balancer:
        before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
        try:
            async with Announcer(registry, BACKEND, [balancer.place], drain_on=(signal.SIGUSR1,)) as announcer:
                await until(lambda: announcer.listed)
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGUSR1)
                assert heard == [signal.SIGUSR1]
        finally:
            signal.signal(signal.SIGUSR1, before)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
async def test_a_forked_child_hears_a_signal_as_if_nobody_had_caught_it(registry: rk.Registry) -> None:
    async with balancing() as balancer:
        async with Announcer(registry, BACKEND, [balancer.place], drain_on=(signal.SIGUSR1,)):
            child = os.fork()
            if not child:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(60)  # noqa: ASYNC251
                os._exit(0)
            ended = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(ended[1]) == -signal.SIGUSR1
            assert registry.health.phase < Phase.DRAINING
