from __future__ import annotations

from collections.abc import Callable
from threading import Barrier, Thread

from rkmetrics.collectors.base import PerProcess, Turn


def test_a_value_is_made_once() -> None:
    own = PerProcess(object)
    assert own.get() is own.get()


def test_a_forked_child_makes_its_own_value(script: Callable[..., str]) -> None:
    out = script("""
import os
from rkmetrics.collectors.base import PerProcess
own = PerProcess(os.getpid)
assert own.get() == os.getpid()
reader, writer = os.pipe()
if not os.fork():
    os.write(writer, str(own.get() == os.getpid()).encode())
    os._exit(0)
os.wait()
print(os.read(reader, 9).decode(), own.get() == os.getpid())
""")
    assert out.split() == ["True", "True"]


def test_a_turn_is_taken_by_one_until_it_is_given_back() -> None:
    turn = Turn()
    assert (turn.take(), turn.take()) == (True, False)
    turn.give()
    assert turn.take()


def test_of_many_threads_one_takes_the_turn() -> None:
    turn, barrier, taken = Turn(), Barrier(8), list[bool]()

    def take() -> None:
        barrier.wait()
        taken.append(turn.take())

    threads = [Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 7 + [True]
