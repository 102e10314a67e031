"""100,000 backends and several balancers, by a clock that jumps: `python -m tests.bench.discovery_simulation`.

The check loop and the table are the real ones; the network is not there. A loop whose time moves on to whatever is due
next runs them, and a channel answers after a chance delay, or never. What comes out are times of the protocol: how soon
each balancer knows, when they agree, what a cut does. How much CPU checks cost is for `discovery.py` to say.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rkmetrics.discovery import health
from rkmetrics.discovery.base import Backend
from rkmetrics.discovery.directory import Directory, Rules, State
from rkmetrics.discovery.health import HealthChecker
from rkmetrics.fetch import Endpoint, Failure
from rkmetrics.http_answer import Answer, Reason

CALLER = "10.0.0.1"
READY = Answer(200, (), b'{"ready":true,"requests_in_progress":3}', True)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Never waits: its time moves on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None = None) -> Any:
            if timeout:
                self.now += timeout
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


class World:
    """The backends, and what is between them and the balancers. dead: to whom, after their death, what happens."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.refusing: set[int] = set()
        self.silent: set[int] = set()
        self.cut: set[int] = set()  # balancers
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something then; one timer for all, since the loop's own are many times as large."""
        self._count += 1
        when = self.loop.now + seconds
        if not self._due or when < self._due[0][0]:
            self.loop.call_at(when, self._turn)
        heapq.heappush(self._due, (when, self._count, call))

    def _turn(self) -> None:
        while self._due and self._due[0][0] <= self.loop.now + 1e-4:
            heapq.heappop(self._due)[2]()
        if self._due:
            self.loop.call_at(self._due[0][0], self._turn)


WORLDS: list[World] = []


class Channel:
    """Stands in for fetch.Channel. The balancer is in the path, the backend in the port."""

    __slots__ = ("_answered", "_failed", "_request", "endpoint")

    def __init__(
        self, endpoint: Endpoint, answered: Callable[[Answer], None], failed: Callable[[Failure], None]
    ) -> None:
        self.endpoint, self._answered, self._failed = endpoint, answered, failed
        self._request = 0

    def request(self, _: bytes) -> None:
        world = WORLDS[0]
        self._request += 1
        request, number = self._request, _number(self.endpoint)
        if int(self.endpoint.target[1:]) in world.cut or number in world.silent:
            return

        def end() -> None:
            if request != self._request:
                return
            if number in world.refusing:
                self._failed(Failure(Reason.UNREACHABLE, "[Errno 111] Connect call failed"))
            else:
                self._answered(READY)

        world.later(random.expovariate(1 / 0.002), end)

    def expire(self) -> None:
        self._request += 1
        self._failed(Failure(Reason.TIMEOUT, "no complete answer in time"))

    def close(self) -> None:
        self._request += 1


def _number(endpoint: Endpoint) -> int:
    _, second, third, fourth = map(int, endpoint.address.split("."))
    return second * 62_500 + third * 250 + fourth - 1


def _backend(number: int) -> Backend:
    host = f"10.{number // 62_500}.{number // 250 % 250}.{number % 250 + 1}"
    return Backend.checked(f"b-{number}", f"{host}:3000", 9090)


class Balancer:
    """One of them. gone: when each backend left its pool."""

    def __init__(self, number: int, count: int, loop: VirtualLoop) -> None:
        rules = Rules(limit=count, limit_per_caller=count)
        self.directory = Directory(rules, clock=loop.time)
        self.checker = HealthChecker(self.directory, path=f"/{number}", places=count)
        for each in range(count):
            self.directory.announce(_backend(each), CALLER)

    def states(self) -> dict[State, int]:
        return dict(self.directory._states)

    def since(self, state: State) -> list[float]:
        return [entry.since for entry in self.directory.entries() if entry.state is state]

    def ages(self) -> list[float]:
        now = self.directory.clock()
        return sorted(now - (entry.checked or 0.0) for entry in self.directory.entries())


def _quantiles(values: Sequence[float]) -> str:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(part * len(ordered)))] for part in (0.5, 0.99)]
    return f"median {at[0]:.1f} s, p99 {at[1]:.1f} s, last {ordered[-1]:.1f} s"


async def run(loop: VirtualLoop, count: int, balancers: int) -> None:
    world = World(loop)
    WORLDS[:] = [world]
    all_of_them = [Balancer(number, count, loop) for number in range(balancers)]
    for each in all_of_them:
        await each.checker.__aenter__()
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{loop.now:6.1f} s, {time.perf_counter() - began:4.0f} s of work] {what}", flush=True)

    await asyncio.sleep(12)
    up = [len(each.directory.pool()) for each in all_of_them]
    say(f"up at each balancer: {up}; all were up after {max(max(each.since(State.UP)) for each in all_of_them):.1f} s")
    ages = [age for each in all_of_them for age in each.ages()]
    say(f"age of what is known: {_quantiles(ages)}")

    struck = loop.now
    world.refusing |= set(range(count // 100))
    world.silent |= set(range(count // 100, count // 20))
    await asyncio.sleep(16)
    for number, each in enumerate(all_of_them):
        gone = [since - struck for since in each.since(State.DOWN)]
        say(f"5 % die: balancer {number} knows of {len(gone)}: {_quantiles(gone)}; panic: {each.directory.panic}")
    say(f"the lists are the same: {len({each.directory.pool() for each in all_of_them}) == 1}")

    world.cut = {0}
    await asyncio.sleep(16)
    cut = all_of_them[0].directory
    say(f"balancer 0 is cut off: it lists {len(cut.pool())}, panic: {cut.panic}")
    world.cut, joined = set(), loop.now
    await asyncio.sleep(12)
    back = [since - joined for since in all_of_them[0].since(State.UP) if since > joined]
    say(f"balancer 0 is back: {len(back)} backends up again: {_quantiles(back)}")
    say(f"the lists are the same: {len({each.directory.pool() for each in all_of_them}) == 1}")
    for each in all_of_them:
        await each.checker.__aexit__(None, None, None)


def main(argv: Sequence[str]) -> None:
    count, balancers = (int(argv[0]), int(argv[1])) if len(argv) > 1 else (100_000, 3)
    health.Channel = Channel  # type: ignore[assignment, attr-defined]
    loop = VirtualLoop()
    print(f"{count:,} backends, {balancers} balancers, checks each 5 s, time-out 2 s")
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(run(loop, count, balancers))


if __name__ == "__main__":
    main(sys.argv[1:])
