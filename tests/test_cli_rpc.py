"""`rkmetrics rpc`: call an endpoint, and list who serves it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.cli import main

ENVIRONMENT = {"DYN_TCP_RPC_HOST": "127.0.0.1"}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, int]]:
    """The address of a server that runs in a thread of its own, and its id."""
    started, told = threading.Event(), list[Any]()

    async def count(request: dict[str, int]) -> AsyncIterator[dict[str, int]]:
        for number in range(request["n"]):
            yield {"number": number}

    async def run() -> None:
        server = rk.rpc.server(rk.Registry(rk.Settings.from_env(ENVIRONMENT), builtin=False))
        server.endpoint("backend.generate", count)
        ending = asyncio.Event()
        async with server:
            told.extend((next(iter(server.instances())), asyncio.get_running_loop(), ending))
            started.set()
            await ending.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    started.wait()
    instance, loop, ending = told
    yield instance.transport[1], instance.instance_id
    loop.call_soon_threadsafe(ending.set)
    thread.join()


def test_an_endpoint_is_called_and_its_items_are_lines(
    served: tuple[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    place, id = served
    for extra in ([], ["--to", f"{id:x}"], ["--timeout", "30s"]):
        arguments = ["rpc", "call", "backend.generate", '{"n": 2}', "--instances", place, *extra]
        assert main(arguments, ENVIRONMENT) == 0
        assert capsys.readouterr().out == '{"number": 0}\n{"number": 1}\n'


def test_instances_are_listed(served: tuple[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    place, id = served
    assert main(["rpc", "instances", "backend.generate", "--instances", place], ENVIRONMENT) == 0
    assert capsys.readouterr().out == f"{id:>16x}  tcp   {place}\n"
    more = ["--instances", "http://b:1/v1/rpc/generate", "--json"]
    assert main(["rpc", "instances", "backend.generate", "--instances", place, *more], ENVIRONMENT) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["plane"] for row in rows} == {"tcp", "http"}
    assert main(["rpc", "instances", "backend.other", "--instances", place], ENVIRONMENT) == 1  # it serves another


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rpc", "call", "backend.generate", "1"], "one of the three ways"),
        (["rpc", "instances", "backend.generate"], "one of the three ways"),
        (["rpc", "call", "backend.generate", "1", "--instances", "0.0.0.0:1"], "expected host:port"),
        (["rpc", "instances", "backend.generate", "--instances", "nowhere"], "expected host:port"),
    ],
)
def test_what_cannot_be_asked_is_wrong_use(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments, ENVIRONMENT) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["rpc", "call", "generate", "1"],
        ["rpc", "call", "backend.generate", "{"],
        ["rpc", "call", "backend.generate", "1", "--to", "xyz"],
        ["rpc"],
    ],
)
def test_what_cannot_be_read_is_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments, ENVIRONMENT)
    assert error.value.code == 2
    assert "usage: rkmetrics rpc" in capsys.readouterr().err


def test_a_call_that_fails_is_trouble_and_no_traceback(
    served: tuple[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = served
    assert main(["rpc", "call", "backend.generate", "{}", "--instances", place], ENVIRONMENT) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert "rkmetrics: dynamo.backend.generate" in found.err
    assert "KeyError: 'n'" in found.err
