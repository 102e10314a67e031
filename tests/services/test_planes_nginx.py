"""The manual's way to a load balancer in front of the http plane works: nginx with two workers."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.planes.base import RpcContext
from tests.contracts.peers import until
from tests.services.conftest import program
from tests.services.kv import counted
from tests.services.nats_server import free_port
from tests.services.test_proxies import CONFIG

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planes.md"
TRACE = "00-c3d24ab1c7b61ed16507aec3031220c9-73a6176ac9b87120-01"


def example(port: int, workers: list[int]) -> str:
    """The page's block, for these ports."""
    if not PAGE.is_file():
        pytest.skip("not in a source tree")
    found = re.search(r"^```nginx\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    text = found[1].replace("listen 80;", f"listen 127.0.0.1:{port};")
    for host, worker in zip(("10.0.1.5:8888", "10.0.1.6:8888"), workers, strict=True):
        assert host in text
        text = text.replace(host, f"127.0.0.1:{worker}")
    return text


@asynccontextmanager
async def nginx(folder: Path, config: str) -> AsyncGenerator[None]:
    command = [program("nginx", "nginx-light"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    (folder / "backends.conf").write_text("")
    own = "user root;\n" if os.geteuid() == 0 else ""  # whose workers cannot write into the folder of a test otherwise
    (folder / "nginx.conf").write_text(own + CONFIG.format(folder=folder, server=config))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: ASYNC220 - it is short
    try:
        await until(lambda: (folder / "nginx.pid").exists() and (folder / "nginx.pid").read_text())
        yield
    finally:
        process.terminate()
        process.wait()


def worker(port: int) -> Any:
    registry = rk.Registry(rk.Settings(request_plane="http", http_rpc_host="127.0.0.1", http_rpc_port=port))
    server = rk.rpc.server(registry)

    async def generate(request: Any, context: RpcContext) -> dict[str, Any]:
        return {"port": port, "size": len(request), "trace": context.request.traceparent}

    server.endpoint("backend.generate", generate)
    return server


async def test_nginx_spreads_calls_over_workers_and_passes_over_one_that_is_gone(tmp_path: Path) -> None:
    ports, front = [free_port(), free_port()], free_port()
    workers = {port: worker(port) for port in ports}
    registry = rk.Registry(rk.Settings(request_plane="http", http_rpc_host="127.0.0.1"))
    address = f"http://127.0.0.1:{front}/v1/rpc/generate"
    async with workers[ports[1]], rk.rpc.client(registry) as client, nginx(tmp_path, example(front, ports)):
        async with rk.rpc.router(client, "backend.generate", instances=[address]) as router, workers[ports[0]]:

            async def call(text: str) -> Any:
                return await (await router.generate(text, traceparent=TRACE)).one()

            await until(lambda: router.instance_ids())
            found = await asyncio.gather(*(call("x" * number) for number in range(200)))
            assert [each["size"] for each in found] == list(range(200))
            assert {each["trace"] for each in found} == {TRACE}
            assert set(Counter(each["port"] for each in found)) == set(ports)
            assert (await call("x" * 5_000_000))["size"] == 5_000_000
            await workers[ports[0]].stop()
            found = await asyncio.gather(*(call("y") for _ in range(50)))
            assert {each["port"] for each in found} == {ports[1]}
            assert counted(registry, "rkmetrics_rpc_client_calls_total", outcome="ok") == 251
