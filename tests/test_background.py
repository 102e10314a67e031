"""A loop in a thread: it starts, is called, stops, and stays behind in a fork."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

import pytest

from rkmetrics.background import LoopThread


class Waiting:
    """Waits until it is told to stop."""

    def __init__(self) -> None:
        self.forgot = False
        self.thread = LoopThread("test-thread", self.main, self.stop, self.forget)

    async def main(self) -> None:
        self.event = asyncio.Event()
        await self.event.wait()

    def stop(self, _: float) -> None:
        self.event.set()

    def forget(self) -> None:
        self.forgot = True


async def answer() -> int:
    return 7


async def never() -> None:
    await asyncio.Event().wait()


async def wrong() -> None:
    raise RuntimeError("a bug")


def test_it_runs_is_called_and_stops_and_may_start_again() -> None:
    waiting = Waiting()
    assert waiting.thread.call(answer(), 1) is None
    for _ in range(2):
        waiting.thread.start()
        waiting.thread.start()
        assert waiting.thread.running
        assert waiting.thread.call(answer(), 10) == 7
        assert waiting.thread.call(never(), 0.01) is None
        assert waiting.thread.call(wrong(), 10) is None
        assert waiting.thread.stop(10)
        assert not waiting.thread.running
    assert waiting.thread.call(answer(), 1) is None
    assert waiting.thread.stop(1)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_has_neither_the_thread_nor_what_it_had_open() -> None:
    waiting = Waiting()
    ours, theirs = socket.socketpair()
    waiting.thread.start()

    async def listen() -> None:
        asyncio.get_running_loop().add_reader(ours, lambda: None)

    waiting.thread.call(listen(), 10)
    child = os.fork()
    if not child:
        held = os.path.samestat(os.fstat(ours.fileno()), os.stat(os.devnull))
        os._exit(0 if waiting.forgot and not waiting.thread.running and held else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert waiting.thread.call(answer(), 10) == 7  # the parent's loop was not harmed

    async def unlisten() -> None:
        asyncio.get_running_loop().remove_reader(ours)

    waiting.thread.call(unlisten(), 10)
    assert waiting.thread.stop(10)
    ours.close()
    theirs.close()


def test_a_program_ends_without_stopping_it() -> None:
    program = """
import asyncio
from rkmetrics.background import LoopThread

async def main():
    global event
    event = asyncio.Event()
    await event.wait()
    print("told")

LoopThread("x", main, lambda _: event.set()).start()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "told\n", "")


def test_a_look_up_that_hangs_holds_up_neither_others_nor_the_end() -> None:
    program = """
import asyncio, socket, sys, time
from rkmetrics.background import LoopThread

real = socket.getaddrinfo

def getaddrinfo(host, *rest, **more):
    if host == "hangs":
        time.sleep(3600)
    return real(host, *rest, **more)

socket.getaddrinfo = getaddrinfo

async def main():
    global event
    event = asyncio.Event()
    await event.wait()

async def look_up():
    loop = asyncio.get_running_loop()
    hung = [asyncio.ensure_future(loop.getaddrinfo("hangs", 1)) for _ in range(50)]
    found = await loop.getaddrinfo("127.0.0.1", 1)
    try:
        await loop.getaddrinfo("127.0.0.1", "no such service")
    except OSError:
        print(len(found) > 0)

thread = LoopThread("x", main, lambda _: event.set())
thread.start()
thread.call(look_up(), 60)
print(thread.stop(60))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "True\nTrue\n", "")
