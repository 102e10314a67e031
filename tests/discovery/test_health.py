"""The check loop among good and hostile backends, on real sockets (T14, T15, F14, F18)."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.discovery import Balancing, CheckOutcome
from rkmetrics.discovery.base import Backend
from rkmetrics.discovery.directory import Directory, Rules, State
from rkmetrics.discovery.health import HealthChecker
from rkmetrics.settings import Secret, Settings
from tests.hostile import BEHAVIOURS, Behave, Peer, answering, response, serving, until

READY = response("200 OK", b'{"ready":true,"requests_in_progress":7}')
NOT_READY = response("200 OK", b'{"ready":false}')
GOOD = answering(READY)
INTERVAL, TIMEOUT = 0.05, 0.3
TOKEN = "s3cret-token"
CALLER = "127.0.0.1"


class Lot:
    """A directory that is checked, and what to say to it."""

    def __init__(self, rules: Rules | None = None, **options: Any) -> None:
        self.registry = rk.Registry(Settings(), builtin=False)
        self.metrics = self.registry.bind(Balancing)
        self.directory = Directory(rules or Rules(), metrics=self.metrics)
        options = {"interval_seconds": INTERVAL, "timeout_seconds": TIMEOUT, "seed": 1, **options}
        self.checker = HealthChecker(self.directory, metrics=self.metrics, **options)
        self._stack = AsyncExitStack()

    async def serve(self, id: str, behave: Behave) -> Peer:
        """Serve as a peer behaves, and announce it."""
        peer = await self._stack.enter_async_context(serving(behave))
        self.announce(id, peer.port)
        return peer

    def announce(self, id: str, port: int, traffic_port: int = 0) -> None:
        self.directory.announce(Backend.checked(id, f"127.0.0.1:{traffic_port or port}", port), CALLER)

    def state(self, id: str) -> State | None:
        return self.directory.state(id)

    def checked(self, id: str) -> float | None:
        return next(entry.checked for entry in self.directory.entries() if entry.backend.id == id)

    def outcome(self, id: str) -> CheckOutcome | None:
        return next(entry.outcome for entry in self.directory.entries() if entry.backend.id == id)

    def count(self, outcome: CheckOutcome) -> float:
        return self.metrics.checks[outcome].value or 0.0

    def more_checks(self) -> Callable[[], bool]:
        before = self.count(CheckOutcome.READY)
        return lambda: self.count(CheckOutcome.READY) > before + 2

    def is_up(self, id: str) -> Callable[[], bool]:
        return lambda: self.state(id) is State.UP

    async def close(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def checking(**options: Any) -> AsyncGenerator[Lot]:
    lot = Lot(**options)
    try:
        async with lot.checker:
            yield lot
    finally:
        await lot.close()


async def test_a_backend_that_is_ready_comes_into_the_pool_at_once() -> None:
    async with checking(interval_seconds=60.0) as lot:
        peer = await lot.serve("a", GOOD)
        await until(lot.is_up("a"))
        (entry,) = lot.directory.entries()
        assert entry.vitals is not None
        assert entry.vitals.requests_in_progress == 7
        (request,) = peer.requests
        assert request.startswith(b"GET /metrics HTTP/1.1\r\n")
        assert b"accept: application/json\r\n" in request
        assert b"authorization" not in request


@pytest.mark.parametrize("name", sorted(BEHAVIOURS))
async def test_no_hostile_answer_is_taken_and_none_delays_the_others(name: str) -> None:
    async with checking() as lot:
        await lot.serve("good", GOOD)
        await until(lot.is_up("good"))
        hostile = await lot.serve("hostile", BEHAVIOURS[name])
        good_before = lot.count(CheckOutcome.READY)
        await until(lambda: lot.state("hostile") is State.DOWN)
        assert lot.state("good") is State.UP
        assert lot.count(CheckOutcome.READY) > good_before
        hostile.behave = GOOD
        await hostile.cut()
        await until(lot.is_up("hostile"))


async def test_a_redirect_is_not_followed() -> None:
    async with checking() as lot, serving(GOOD) as inside:
        location = f"location: http://127.0.0.1:{inside.port}/metrics".encode()
        await lot.serve("a", answering(response("302 Found", b"", location)))
        await until(lambda: lot.count(CheckOutcome.WRONG_STATUS) > 2)
        assert inside.connections == 0


async def test_one_deadline_covers_a_drip() -> None:
    """Each byte comes in time, the answer does not."""
    body = b'{"ready":true}'

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in response("200 OK", body):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(TIMEOUT / 4)

    async with checking() as lot:
        await lot.serve("a", drip)
        await until(lambda: lot.state("a") is State.DOWN)
        assert lot.outcome("a") is CheckOutcome.TIMEOUT


async def test_hostile_backends_that_fill_all_places_do_not_keep_good_ones_from_theirs() -> None:
    """T15: 40 that hang, 4 places; two of those are for backends that have answered."""
    async with checking(places=4) as lot:
        await lot.serve("good", GOOD)
        await lot.serve("fine", GOOD)
        await until(lambda: lot.is_up("good")() and lot.is_up("fine")())
        for number in range(40):
            await lot.serve(f"hangs-{number}", BEHAVIOURS["hangs"])
        await until(lambda: lot.count(CheckOutcome.TIMEOUT) >= 4)
        before = lot.count(CheckOutcome.READY)
        await until(lambda: lot.count(CheckOutcome.READY) >= before + 10)
        assert lot.checker.suspect.taken <= 2
        assert len(lot.checker.suspect.waiting) > 20
        assert (lot.state("good"), lot.state("fine")) == (State.UP, State.UP)


async def test_who_waits_for_a_place_gets_one() -> None:
    async with checking(places=2, timeout_seconds=0.05) as lot:
        for number in range(8):
            await lot.serve(f"hangs-{number}", BEHAVIOURS["hangs"])
        await lot.serve("good", GOOD)
        await until(lot.is_up("good"))


async def test_leaving_and_draining() -> None:
    async with checking() as lot:
        peer = await lot.serve("a", GOOD)
        await until(lot.is_up("a"))
        peer.behave = answering(NOT_READY)
        await peer.cut()
        await until(lambda: lot.state("a") is State.DRAINING)
        assert lot.directory.pool() == ()
        lot.directory.leave("a", CALLER)
        await asyncio.sleep(0)
        count = len(peer.requests)
        await asyncio.sleep(3 * INTERVAL)
        assert len(peer.requests) == count


async def test_a_connection_is_kept() -> None:
    async with checking() as lot:
        peer = await lot.serve("a", GOOD)
        await until(lambda: len(peer.requests) >= 5)
        assert (peer.connections, lot.checker.kept) == (1, 1)


async def test_connections_are_kept_while_there_is_room() -> None:
    async with checking(kept=1) as lot:
        peers = [await lot.serve(id, GOOD) for id in "abc"]
        await until(lambda: all(len(peer.requests) >= 5 for peer in peers))
        assert lot.checker.kept == 1
        assert sorted(peer.connections > 1 for peer in peers) == [False, True, True]


async def test_announcing_again_checks_at_once() -> None:
    async with checking(interval_seconds=60.0) as lot:
        peer = await lot.serve("a", answering(NOT_READY))
        await until(lambda: len(peer.requests) == 1)
        peer.behave = GOOD
        await peer.cut()
        lot.announce("a", peer.port)
        await until(lot.is_up("a"))


async def test_a_change_may_come_from_any_thread() -> None:
    async with checking(interval_seconds=60.0) as lot, serving(GOOD) as peer:
        await asyncio.to_thread(lot.announce, "a", peer.port)
        await until(lot.is_up("a"))


async def test_another_metrics_port_is_checked_instead() -> None:
    async with checking() as lot, serving(GOOD) as one, serving(GOOD) as other:
        lot.announce("a", one.port, 3000)
        await until(lot.is_up("a"))
        lot.announce("a", other.port, 3000)
        await until(lambda: len(other.requests) >= 2)
        count = len(one.requests)
        await asyncio.sleep(2 * INTERVAL)
        assert len(one.requests) == count


async def test_those_who_are_there_at_the_start_are_checked() -> None:
    lot = Lot()
    peers = [await lot.serve(id, GOOD) for id in "abcde"]
    async with lot.checker:
        await until(lambda: len(lot.directory.pool()) == 5)
    assert all(peer.requests for peer in peers)
    await lot.close()


async def test_the_token_is_shown_to_backends_and_to_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = [Secret(TOKEN)]
    async with checking(token=lambda: tokens[0]) as lot:
        peer = await lot.serve("a", GOOD)
        await lot.serve("b", answering(response("401 Unauthorized", TOKEN.encode())))
        await until(lambda: lot.is_up("a")() and lot.state("b") is State.DOWN)
        assert all(f"authorization: Bearer {TOKEN}\r\n".encode() in request for request in peer.requests)
        tokens[0] = Secret("n3xt")
        await until(lambda: b"authorization: Bearer n3xt\r\n" in peer.requests[-1])
        shown = "".join([repr(lot.checker), repr(lot.directory), caplog.text, json.dumps(str(lot.directory.listed()))])
    assert TOKEN not in shown
    assert "n3xt" not in shown


async def test_a_loop_that_was_asleep_blames_nobody() -> None:
    """SIGSTOP of the balancer, or a machine that was paused: deadlines pass, and no backend is at fault."""
    gate = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await gate.wait()
            writer.write(READY)

    async with checking() as lot:
        gate.set()
        peer = await lot.serve("a", slow)
        await until(lot.is_up("a"))
        gate.clear()
        count = len(peer.requests)
        await until(lambda: len(peer.requests) > count)
        time.sleep(3 * TIMEOUT)  # noqa: ASYNC251 - it is the loop that sleeps
        gate.set()
        await until(lambda: lot.count(CheckOutcome.READY) > count + 1)
        assert lot.count(CheckOutcome.TIMEOUT) == 0


async def test_the_wall_clock_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """F18: a day forwards and a day back."""
    async with checking() as lot:
        await lot.serve("a", GOOD)
        await until(lot.is_up("a"))
        for step in (86_400, -86_400):
            monkeypatch.setattr(time, "time", lambda step=step: step)
            await until(lot.more_checks())
            assert lot.state("a") is State.UP
            monkeypatch.undo()


async def test_the_dead_are_forgotten() -> None:
    async with checking(rules=Rules(expire_seconds=0.2)) as lot:
        peer = await lot.serve("a", BEHAVIOURS["broken"])
        await until(lambda: len(lot.directory) == 0)
        assert peer.requests
        assert lot.metrics.expired.value == 1


async def test_nothing_is_left_when_it_ends() -> None:
    before = asyncio.all_tasks()
    lot = Lot()
    async with lot.checker:
        for name in ("hangs", "drips its body", "wrong JSON"):
            await lot.serve(name.replace(" ", "-"), BEHAVIOURS[name])
        await until(lambda: lot.count(CheckOutcome.MALFORMED) > 1)
    await lot.close()
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == before
    lot.announce("later", 9)  # a directory may outlive its checker


async def test_checks_spread_over_the_interval() -> None:
    """A fleet that came at once is not checked at once for ever."""
    async with checking(interval_seconds=0.5) as lot:
        for number in range(40):
            await lot.serve(f"b-{number}", GOOD)
        await until(lambda: lot.count(CheckOutcome.READY) > 4 * 40)
        due = sorted(probe.due % 0.5 for probe in lot.checker._probes.values())
        assert sum(0.0 <= each < 0.25 for each in due) in range(5, 36)


@pytest.mark.parametrize("option", ["interval_seconds", "timeout_seconds"])
def test_a_time_that_is_none_is_refused(option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=option):
        Lot(**options)
