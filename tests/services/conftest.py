"""Real servers for tests, started where they are installed; without them tests are skipped and say what to type."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

# For bugs only: what is waited for comes within a second or two.
PATIENCE_SECONDS = 60


def program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; apt-get install {package}")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """A Prometheus that scrapes every 200 ms, and is asked over its HTTP API."""

    def __init__(self, binary: str, folder: Path, targets: dict[str, str], flags: tuple[str, ...]) -> None:
        """targets: job to URL."""
        self.url = f"http://127.0.0.1:{free_port()}"
        config = folder / "prometheus.yml"
        config.write_text(json.dumps(_config(targets)))  # JSON is YAML
        self._log = (folder / "prometheus.log").open("w+")
        command = [
            binary,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            *flags,
        ]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def log(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an API answer."""
        with urlopen(f"{self.url}{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found = self.get("/api/v1/query", query=expression)["result"]
        assert isinstance(found, list)
        return found

    def wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with suppress(URLError, ConnectionError):
                if holds():
                    return
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_SECONDS)
        self._log.close()


def _config(targets: dict[str, str]) -> dict[str, Any]:
    jobs = []
    for job, url in targets.items():
        host, _, path = url.removeprefix("http://").partition("/")
        jobs.append({"job_name": job, "metrics_path": f"/{path}", "static_configs": [{"targets": [host]}]})
    interval = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
    return {"global": interval, "scrape_configs": [{**job, **interval} for job in jobs]}


@pytest.fixture(scope="module")
def start_prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Prometheus]]:
    """start(targets, *flags)."""
    binary = program("prometheus", "prometheus")
    started: list[Prometheus] = []

    def start(targets: dict[str, str], *flags: str) -> Prometheus:
        server = Prometheus(binary, tmp_path_factory.mktemp("prometheus"), targets, flags)
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("promtool", "prometheus")
