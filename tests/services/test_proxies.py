"""The manual's way to a proxy works: nginx follows /backends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.conftest import program
from tests.services.discovery_fleet import BalancerProcess, Fleet, fetch, up, wait
from tests.services.nats_server import free_port

PAGE = Path(__file__).resolve().parents[2] / "docs" / "discovery.md"

CONFIG = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/backends.conf;
    {server}
}}
"""


def examples(language: str) -> list[str]:
    """The page's blocks in a language."""
    if not PAGE.is_file():
        pytest.skip("not in a source tree")
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def example(language: str) -> str:
    return examples(language)[0]


@pytest.fixture
def nginx() -> str:
    for name in ("jq", "curl"):
        program(name, name)
    return program("nginx", "nginx")


@pytest.fixture
def balancer() -> Iterator[BalancerProcess]:
    balancer = BalancerProcess(free_port()).start()
    yield balancer
    balancer.kill()


@pytest.fixture
def fleet(balancer: BalancerProcess) -> Iterator[Fleet]:
    fleet = Fleet([balancer.url], "web")
    yield fleet.start(2)
    fleet.close()


def test_nginx_follows_the_list(nginx: str, balancer: BalancerProcess, fleet: Fleet, tmp_path: Path) -> None:
    port, server = free_port(), example("nginx")
    config, script = tmp_path / "nginx.conf", tmp_path / "follow.sh"
    config.write_text(CONFIG.format(folder=tmp_path, server=server.replace("listen 80", f"listen 127.0.0.1:{port}")))
    script.write_text(example("sh"))
    command = f"{nginx} -p {tmp_path} -c {config}"
    variables = {"BALANCER": balancer.url, "CONF": str(tmp_path / "backends.conf"), "NGINX": command}

    def follow(nginx: str = command) -> int:
        environment = {**os.environ, **variables, "NGINX": nginx}
        return subprocess.run(["sh", script], env=environment, check=False, capture_output=True).returncode

    def get(path: str) -> object:
        return fetch(f"{balancer.url}{path}")

    wait(lambda: up(get) == fleet.ids())
    assert follow("true") == 0  # before nginx runs
    process = subprocess.Popen(command.split(), stderr=subprocess.DEVNULL)
    try:
        through = f"http://127.0.0.1:{port}/metadata"
        wait(lambda: fetch(through)["runtime"] == "rkmetrics")
        fleet.signal(0, signal.SIGKILL)
        wait(lambda: up(get) == fleet.ids(1))
        assert follow() == 0
        servers = re.findall(r"server (\S+)", (tmp_path / "backends.conf").read_text())
        assert servers == [f"127.0.0.1:{fleet.ports[1][0]}"]
        wait(lambda: all(fetch(through)["runtime"] == "rkmetrics" for _ in range(20)))

        fleet.signal(1, signal.SIGKILL)
        wait(lambda: not up(get))
        assert follow() != 0  # an empty list is no upstream, and nothing is changed
        assert servers == re.findall(r"server (\S+)", (tmp_path / "backends.conf").read_text())
    finally:
        process.terminate()
        process.wait(60)


def test_envoys_file_is_made_of_the_list(tmp_path: Path) -> None:
    jq = shutil.which("jq")
    if jq is None:
        pytest.skip("jq is not installed; apt-get install jq")
    (_, block) = examples("sh")
    made = subprocess.run(
        ["sh", "-c", block], input='["10.0.1.5:3000","[fd00::5]:3001"]', capture_output=True, text=True, check=True
    )
    addresses = re.findall(r'"address": "([^"]+)",\s+"port_value": (\d+)', made.stdout)
    assert addresses == [("10.0.1.5", "3000"), ("fd00::5", "3001")]
