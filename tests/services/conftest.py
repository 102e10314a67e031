"""Real servers for tests, started where they are installed; without them tests are skipped and say what to type."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

import rkmetrics as rk
from rkmetrics.kv.plane import KvPlane
from tests.services.etcd_server import EtcdServer
from tests.services.nats_server import NatsServer, free_port

# For bugs only: what is waited for comes within a second or two.
PATIENCE_SECONDS = 60


def program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; apt-get install {package}")
    return found


class Prometheus:
    """A Prometheus that scrapes every 200 ms, and is asked over its HTTP API."""

    def __init__(
        self,
        binary: str,
        folder: Path,
        targets: Mapping[str, Target],
        flags: tuple[str, ...],
        more: Mapping[str, Any],
    ) -> None:
        """targets: job to the URL of its one target, or to the rest of its configuration. more: other sections."""
        self.url = f"http://127.0.0.1:{free_port()}"
        config = folder / "prometheus.yml"
        config.write_text(json.dumps({**_config(targets), **more}))  # JSON is YAML
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


Target = str | dict[str, Any]


def _config(targets: Mapping[str, Target]) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = []
    for job, found in targets.items():
        jobs.append({"job_name": job, **(_static(found) if isinstance(found, str) else found)})
    interval = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
    return {
        "global": {**interval, "evaluation_interval": "1s"},
        "scrape_configs": [{**interval, **job} for job in jobs],
    }


def _static(url: str) -> dict[str, Any]:
    host, _, path = url.removeprefix("http://").partition("/")
    return {"metrics_path": f"/{path}", "static_configs": [{"targets": [host]}]}


@pytest.fixture(scope="module")
def start_prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Prometheus]]:
    """start(targets, *flags, **sections)."""
    binary = program("prometheus", "prometheus")
    started: list[Prometheus] = []

    def start(targets: Mapping[str, Target], *flags: str, **more: Any) -> Prometheus:
        server = Prometheus(binary, tmp_path_factory.mktemp("prometheus"), targets, flags, more)
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("promtool", "prometheus")


@pytest.fixture(scope="session")
def nats_binary() -> str:
    pytest.importorskip("nats", reason="the client of NATS is not installed: pip install 'rkmetrics[nats]'")
    return program("nats-server", "nats-server")


@pytest.fixture(scope="session")
def nats_server(nats_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One for all tests that do it no harm; each takes a namespace of its own."""
    server = NatsServer(nats_binary, tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture
def make_nats(nats_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., NatsServer]]:
    """Servers of a test's own; not started yet."""
    made: list[NatsServer] = []

    def make(**options: Any) -> NatsServer:
        made.append(NatsServer(nats_binary, tmp_path_factory.mktemp("nats"), **options))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture(scope="session")
def etcd_binary() -> str:
    return program("etcd", "etcd-server")


@pytest.fixture(scope="session")
def etcd_server(etcd_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One for all tests that do it no harm; each takes a prefix of its own."""
    server = EtcdServer(etcd_binary, tmp_path_factory.mktemp("etcd")).start()
    yield server
    server.stop()


@pytest.fixture
def make_etcd(etcd_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., EtcdServer]]:
    """Servers of a test's own; not started yet."""
    made: list[EtcdServer] = []

    def make(**options: Any) -> EtcdServer:
        made.append(EtcdServer(etcd_binary, tmp_path_factory.mktemp("etcd"), **options))
        return made[-1]

    yield make
    for server in made:
        server.stop()


_numbers = count()


@pytest.fixture
def registries() -> Iterator[Callable[..., rk.Registry]]:
    """Registries whose planes are closed at the end."""
    made: list[rk.Registry] = []

    def make(server: NatsServer, mode: str = "nats", **more: Any) -> rk.Registry:
        settings = {"request_plane": mode, "nats_server": server.url, "namespace": f"ns{next(_numbers)}"} | more
        made.append(rk.Registry(rk.Settings(**settings), strict=True, builtin=False))
        return made[-1]

    yield make
    for registry in made:
        KvPlane.of(registry).close()
