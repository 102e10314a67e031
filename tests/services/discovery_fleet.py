"""Backends as processes of their own, and balancers, for tests of discovery. Run as a script, this is a backend.

A process serves `count` backends, each with a registry and a metrics port of its own, and announces all of them each
`interval` seconds to each balancer, as the protocol has it. SIGTERM drains them: not ready, a moment, de-registered.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "r3gister"
PATIENCE_SECONDS = 60  # for bugs only
Get = Callable[[str], Any]


def fetch(url: str, token: str = "", method: str = "GET", body: object = None) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, headers, method=method), timeout=10) as answer:
        text = answer.read()
    return json.loads(text) if text.startswith((b"{", b"[")) else text


def wait(holds: Callable[[], object], what: str = "", *, pause: float = 0.02) -> float:
    """Wait until something is so; return the seconds that it took."""
    start = time.monotonic()
    while True:
        with suppress(URLError, ConnectionError, HTTPException, TimeoutError):
            if holds():
                return time.monotonic() - start
        assert time.monotonic() - start < PATIENCE_SECONDS, what
        time.sleep(pause)


class Fleet:
    """Processes of backends. ids: "<name>-<process>-<backend>"."""

    def __init__(self, balancers: Sequence[str], name: str = "b") -> None:
        self.balancers, self.name = balancers, name
        self.processes: list[subprocess.Popen[str]] = []
        self.ports: list[list[int]] = []

    def start(
        self,
        processes: int,
        each: int = 1,
        *,
        host: str = "127.0.0.1",
        interval: float = 0.5,
        prefix: Sequence[str] = (),
    ) -> Self:
        """Start processes, and wait until each of them serves."""
        first = len(self.processes)
        for number in range(first, first + processes):
            command = [sys.executable, __file__, f"--name={self.name}-{number}", f"--count={each}", f"--host={host}"]
            command += [f"--interval={interval}", *self.balancers]
            self.processes.append(
                subprocess.Popen([*prefix, *command], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
            )
        for process in self.processes[first:]:
            assert process.stdout is not None
            self.ports.append(json.loads(process.stdout.readline()))
        return self

    def ids(self, *processes: int) -> set[str]:
        numbers = processes or range(len(self.processes))
        return {f"{self.name}-{number}-{each}" for number in numbers for each in range(len(self.ports[number]))}

    def signal(self, process: int, number: signal.Signals) -> None:
        self.processes[process].send_signal(number)

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
        for process in self.processes:
            process.wait(PATIENCE_SECONDS)
            assert process.stdout is not None
            process.stdout.close()


ENVIRONMENT: Mapping[str, str] = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)}


class BalancerProcess:
    """`rkmetrics lb` as a process, open to be read, with a token for registrations."""

    def __init__(self, port: int, *, host: str = "127.0.0.1", prefix: Sequence[str] = (), **variables: str) -> None:
        self.port, self.host, self._prefix = port, host, prefix
        self.url = f"http://{host}:{port}"
        self._environment = {
            **ENVIRONMENT,
            "METRICS_ACCESS": "open",
            "RKMETRICS_REGISTRATION_TOKEN": TOKEN,
            "RKMETRICS_ALLOWED_NETWORKS": "127.0.0.0/8",
            "RKMETRICS_HEALTH_CHECK_INTERVAL": "250ms",
            "RKMETRICS_HEALTH_CHECK_TIMEOUT": "1s",
            **variables,
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Self:
        command = [*self._prefix, sys.executable, "-m", "rkmetrics", "lb", f"--host={self.host}", f"--port={self.port}"]
        with tempfile.TemporaryFile("w+") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=self._environment
            )
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            log.seek(0)
            assert "balances at" in line, log.read()
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE_SECONDS)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


def up(get: Get) -> set[str]:
    """The ids that are in the pool."""
    return {each["id"] for each in get("/backends?details=1")["backends"] if each["in_pool"]}


def states(get: Get) -> dict[str, str]:
    return {each["id"]: each["state"] for each in get("/backends?details=1")["backends"]}


# --- the script -------------------------------------------------------------------------------------------------------


def serve(arguments: argparse.Namespace) -> None:
    import rkmetrics as rk
    from rkmetrics.settings import Settings

    settings = Settings(metrics_enabled=True, metrics_access="open")
    registries = [rk.Registry(settings, builtin=False) for _ in range(arguments.count)]
    servers = [rk.serve(registry, 0, arguments.host) for registry in registries]
    ports = [server.port for server in servers]
    stop = threading.Event()

    def told(_number: int, _frame: object) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, told)
    print(json.dumps(ports), flush=True)
    bodies = [
        {"id": f"{arguments.name}-{number}", "address": f"{arguments.host}:{port}", "metrics_port": port}
        for number, port in enumerate(ports)
    ]

    def tell(method: str) -> None:
        for balancer in arguments.balancers:
            for body in bodies:
                with suppress(OSError, HTTPException):
                    if method == "POST":
                        fetch(f"{balancer}/register", TOKEN, "POST", body)
                    else:
                        fetch(f"{balancer}/register/{body['id']}", TOKEN, "DELETE")

    while not stop.is_set():
        tell("POST")
        stop.wait(arguments.interval)
    for registry in registries:
        registry.health.begin_drain()
    time.sleep(arguments.drain)
    tell("DELETE")
    for server in servers:
        server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--interval", type=float, default=0.5)
    parser.add_argument("--drain", type=float, default=2.0)
    parser.add_argument("balancers", nargs="*")
    serve(parser.parse_args())
