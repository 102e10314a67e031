"""Backends and balancers as real processes: they find each other, lose each other, and part in order (F10 to F13)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

from tests.services.etcd_server import EtcdServer
from tests.services.nats_server import free_port

pytest.importorskip("uvicorn", reason="the server of the example is not installed: pip install 'rkmetrics[serve]'")

# For bugs only.
PATIENCE_SECONDS = 60
QUICK = {
    "RKMETRICS_HEALTH_CHECK_INTERVAL": "0.2",
    "RKMETRICS_HEALTH_CHECK_TIMEOUT": "0.5",
    "RKMETRICS_ANNOUNCE_INTERVAL": "0.5",
    "METRICS_ENABLED": "1",
    "METRICS_ACCESS": "open",
}

APP = """
import asyncio, os, signal
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import rkmetrics as rk
from rkmetrics.discovery import Announcer, backend_here

registry = rk.Registry()
backend = backend_here(registry.settings, host="127.0.0.1", port=int(os.environ["PORT"]), id=os.environ["ID"])

@asynccontextmanager
async def lifespan(app):
    async with Announcer(registry, backend, drain_on=(signal.SIGTERM,)):
        yield
    print("lifespan over", flush=True)

async def slow(request):
    await asyncio.sleep(1.5)
    return PlainTextResponse("done")

app = Starlette(routes=[Route("/slow", slow), *rk.asgi.routes(registry)], lifespan=lifespan)
app.add_middleware(rk.asgi.Middleware, registry=registry)
"""


class Program:
    """A process, what it printed, and the URL at which it is."""

    def __init__(self, folder: Path, port: int, *arguments: str, **environ: str) -> None:
        self.port, self.log_file = port, folder / f"{port}.log"
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{folder}", **QUICK, **environ}
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments], env=environ, stdout=log, stderr=log, cwd=folder
            )

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; 0 where nobody answers."""
        request = Request(f"http://{self.place}{path}", headers={"accept": "application/json"})
        try:
            with urlopen(request, timeout=10) as answer:
                return int(answer.status), answer.read()
        except HTTPError as error:
            with error:
                return error.code, error.read()
        except (URLError, OSError):
            return 0, b""

    def json(self, path: str) -> Any:
        status, body = self.get(path)
        return json.loads(body) if status == 200 else None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()


Start = Callable[..., Program]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Start]:
    """start(*arguments of python -m, port=..., **environment)."""
    (tmp_path / "backend_app.py").write_text(APP)
    started: list[Program] = []

    def start(*arguments: str, port: int | None = None, **environ: str) -> Program:
        port = port or free_port()
        filled = [argument.replace("PORT", str(port)) for argument in arguments]
        started.append(Program(tmp_path, port, *filled, **environ))
        return started[-1]

    yield start
    for program in started:
        program.kill()


def balancer(programs: Start, port: int | None = None, **environ: str) -> Program:
    found = programs("rkmetrics", "lb", "--open", "--port", "PORT", port=port, **environ)
    until(lambda: found.get("/health")[0] == 200)
    return found


def backend(programs: Start, id: str, *balancers: Program) -> Program:
    """An ASGI application under uvicorn."""
    port = free_port()
    return programs(
        *("uvicorn", "backend_app:app", "--port", "PORT", "--log-level", "warning"),
        port=port,
        PORT=str(port),
        ID=id,
        RKMETRICS_LOAD_BALANCERS=",".join(each.place for each in balancers),
    )


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lists(balancer: Program, *backends: Program) -> Callable[[], bool]:
    return lambda: sorted(balancer.json("/backends") or []) == sorted(each.place for each in backends)


# --- in order ---------------------------------------------------------------------------------------------------------


def test_sigterm_drains_in_order_and_no_request_is_lost(programs: Start) -> None:
    """F11: ready=false, then unlisted, then requests in progress end, then the port closes."""
    one, two = balancer(programs), balancer(programs)
    leaves, stays = backend(programs, "leaves", one, two), backend(programs, "stays", one, two)
    until(lambda: lists(one, leaves, stays)() and lists(two, leaves, stays)())
    in_progress: list[tuple[int, bytes]] = []
    client = threading.Thread(target=lambda: in_progress.append(leaves.get("/slow")))
    client.start()
    until(lambda: leaves.json("/vitals")["requests_in_progress"])
    lost = time.monotonic()
    leaves.send(signal.SIGTERM)

    until(lambda: leaves.get("/health")[0] == 503)
    assert not leaves.json("/metrics")["ready"]
    until(lambda: lists(one, stays)() and lists(two, stays)())
    unlisted = time.monotonic()
    assert leaves.get("/health")[0] == 503  # the port is open, as a proxy may still send
    client.join()
    assert in_progress == [(200, b"done")]
    assert leaves.end() in (0, -signal.SIGTERM)
    print(f"unlisted after {unlisted - lost:.2f} s, ended after {time.monotonic() - lost:.2f} s")
    assert "lifespan over" in leaves.log
    assert "Traceback" not in leaves.log


def test_requests_that_go_where_the_balancer_says_are_all_answered_while_backends_come_and_go(programs: Start) -> None:
    """What it is all for: a proxy that reads /backends before each request never meets a closed port."""
    one = balancer(programs)
    fleet = [backend(programs, f"backend-{number}", one) for number in range(3)]
    until(lists(one, *fleet))
    answers: list[int] = []
    over = threading.Event()

    def proxy() -> None:
        while not over.is_set():
            for place in one.json("/backends"):
                request = Request(f"http://{place}/metadata")
                try:
                    with urlopen(request, timeout=10) as answer:
                        answers.append(answer.status)
                except OSError:
                    answers.append(0)
            time.sleep(0.01)

    client = threading.Thread(target=proxy)
    client.start()
    for leaving in fleet[:2]:
        leaving.send(signal.SIGTERM)
        leaving.end()
    until(lambda: len(answers) > 50)  # however slow the machine is
    over.set()
    client.join()
    assert set(answers) == {200}
    assert lists(one, fleet[2])()


def test_a_second_sigterm_ends_at_once_what_the_first_would_have_waited_for(programs: Start) -> None:
    one = balancer(programs)
    leaves = backend(programs, "leaves", one)
    until(lists(one, leaves))
    one.send(signal.SIGSTOP)  # nobody checks, nobody hears
    leaves.send(signal.SIGTERM)
    until(lambda: leaves.get("/health")[0] == 503)
    leaves.send(signal.SIGTERM)
    assert leaves.end() in (0, -signal.SIGTERM)
    one.send(signal.SIGCONT)


def test_rkmetrics_serve_announces_drains_and_ends_well(programs: Start) -> None:
    one = balancer(programs)
    node = programs("rkmetrics", "serve", "--discovery-lb", one.place, "--metrics-port", "PORT")
    until(lists(one, node))
    assert f"at {node.place}, metrics on port {node.port}: {one.place}" in node.log
    node.send(signal.SIGTERM)
    until(lists(one))
    assert node.end() == 0
    assert "Traceback" not in node.log
    assert one.json("/backends?details=1")["backends"] == []  # it took its leave, and was not just found silent


def test_rkmetrics_serve_ends_well_without_its_balancers(programs: Start) -> None:
    """F11, R12: nobody waits for who is not there."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        places = f"127.0.0.1:1,127.0.0.1:{silent.getsockname()[1]}"
        node = programs("rkmetrics", "serve", "--discovery-lb", places, "--port", "PORT")
        until(lambda: node.get("/health")[0] == 200)
        node.send(signal.SIGTERM)
        assert node.end() == 0
    assert "Traceback" not in node.log


def test_a_node_that_cannot_say_where_it_is_does_not_start(programs: Start) -> None:
    arguments = ("--discovery-lb", "127.0.0.1:1", "--advertise", "under_score")
    node = programs("rkmetrics", "serve", *arguments, "--port", "PORT")
    assert node.end() == 2
    assert "cannot announce this node: address='under_score:" in node.log


# --- out of order -----------------------------------------------------------------------------------------------------


def test_a_backend_that_is_killed_or_hangs_leaves_the_list_and_one_that_goes_on_returns(programs: Start) -> None:
    """F10, F12."""
    one = balancer(programs)
    ids = ("killed", "frozen", "stays", "stays, too")
    killed, frozen, *stay = [backend(programs, id.replace(", ", "-"), one) for id in ids]
    until(lists(one, killed, frozen, *stay))
    killed.kill()
    until(lists(one, frozen, *stay))
    frozen.send(signal.SIGSTOP)
    until(lists(one, *stay))
    frozen.send(signal.SIGCONT)
    until(lists(one, frozen, *stay))


def test_a_balancer_that_comes_late_or_again_has_the_list_by_announcements(programs: Start) -> None:
    """F13."""
    port = free_port()
    absent = Program.__new__(Program)
    absent.port = port
    early = backend(programs, "early", absent)
    until(lambda: early.get("/health")[0] == 200)
    one = balancer(programs, port)
    until(lists(one, early))
    one.kill()
    one = balancer(programs, port)
    until(lists(one, early))
    assert early.log.count("knows us as") <= early.log.count("does not know us") + 1


# --- by way of etcd ---------------------------------------------------------------------------------------------------


def test_a_balancer_finds_backends_in_etcd_and_loses_them_with_their_lease(
    programs: Start, etcd_server: EtcdServer
) -> None:
    environ = {"ETCD_ENDPOINTS": etcd_server.url, "DYN_NAMESPACE": f"test-{os.getpid()}"}
    one = balancer(programs, None, **environ)
    node = programs("rkmetrics", "serve", "--port", "PORT", **environ)
    until(lists(one, node))
    assert one.json("/backends?details=1")["backends"][0]["sources"] == ["etcd"]
    node.send(signal.SIGTERM)
    assert node.end() == 0
    until(lists(one))
    assert one.json("/backends?details=1")["backends"] == []
