"""A reader that takes its time gets the whole answer, however long the worker has been done with it."""

from __future__ import annotations

import asyncio

import pytest

from rkmetrics.planes import callhome
from rkmetrics.planes.callhome import Answer, Homes
from rkmetrics.planes.wire import AGAIN, Control, RequestHeader
from tests.contracts.peers import until


class Transport(asyncio.Transport):
    """One whose peer reads nothing: what is written waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.ended = b"", ""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.waiting += data

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = self.ended or "closed, and what waits is sent"

    def abort(self) -> None:
        self.ended, self.waiting = "broken off", b""


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Transport:
    monkeypatch.setattr(callhome, "WORKER_IDLE_SECONDS", 0.02)
    return Transport()


def answer_over(transport: Transport) -> Answer:
    answer = Answer(Homes(), "127.0.0.1:1")
    answer.connection_made(transport)
    answer.begin(RequestHeader("id", "127.0.0.1:1", "subject", reuse=True), nobody)
    answer.end(final=True)
    return answer


def nobody(control: Control) -> None:
    raise AssertionError(control)


async def test_what_a_caller_has_not_read_yet_is_not_broken_off(transport: Transport) -> None:
    """Once a connection that waited for "again" was ended as idle, and the end of the answer with it."""
    answer_over(transport)
    await until(lambda: transport.ended)
    assert transport.ended == "closed, and what waits is sent"
    assert b"sentinel" in transport.waiting


async def test_a_caller_that_never_reads_is_given_up(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callhome, "SLOW_SECONDS", 0.05)
    answer_over(transport)
    await until(lambda: transport.ended == "broken off")


async def test_a_kept_connection_ends_when_nobody_needs_it(transport: Transport) -> None:
    answer = answer_over(transport)
    answer.data_received(AGAIN)
    await until(lambda: transport.ended == "broken off")
