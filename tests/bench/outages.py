"""How long discovery takes to notice, at the settings that ship: `python -m tests.bench.outages [--away SECONDS]`.

etcd: a lease of 10 s; a watcher beside it sees what others see. Balancer: checks each 5 s with a time-out of 2 s. Takes
about five minutes, nearly all of it waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.request import urlopen

from rkmetrics.etcd.client import Etcd
from rkmetrics.etcd.registrar import EtcdRegistrar
from rkmetrics.etcd.watcher import EtcdWatcher
from tests.services.etcd_server import EtcdServer, cable
from tests.services.nats_server import free_port

TIMES = 5


class Seen:
    """What a balancer would see, with the times at which it did."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def on_put(self, key: str, value: bytes) -> None:
        self.keys.add(key)

    def on_delete(self, key: str) -> None:
        self.keys.discard(key)

    def on_list(self, items: Mapping[str, bytes]) -> None:
        pass


async def until(holds: Callable[[], object]) -> float:
    """Wait; return the seconds."""
    began = time.monotonic()
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    return time.monotonic() - began


def shown(what: str, values: list[float]) -> None:
    middle, most = statistics.median(values), max(values)
    print(f"{what:<50} median {middle:6.2f} s   most {most:6.2f} s   of {len(values)}", flush=True)


async def at_etcd(server: EtcdServer, away: float) -> None:
    direct, seen = Etcd([server.url]), Seen()
    async with cable(server) as line:
        keeper = EtcdRegistrar(Etcd([line.url]), lambda lease: {f"bench/{lease:x}": b"here"})
        watcher = EtcdWatcher(direct, "bench/", seen)
        tasks = [asyncio.create_task(keeper.run()), asyncio.create_task(watcher.run())]
        await until(lambda: seen.keys)
        key = f"bench/{keeper.lease:x}".encode()
        for what, harm in (("lease revoked -> listed again", direct.revoke), ("key deleted -> listed again", None)):
            values: list[float] = []
            for _ in range(TIMES):
                await asyncio.sleep(1)
                await (harm(keeper.lease) if harm else direct.delete(key))
                await until(lambda: not seen.keys)
                values.append(await until(lambda: seen.keys))
            shown(what, values)
        line.cut()
        shown("backend cut off from etcd -> unlisted", [await until(lambda: not seen.keys)])
        await asyncio.sleep(away)
        line.mend()
        shown(f"mended after {away:g} s more -> listed again", [await until(lambda: seen.keys)])
        await asyncio.sleep(4)
        server.stop()
        await asyncio.sleep(away)
        assert seen.keys
        print(f"etcd killed for {away:g} s: what is known stays", flush=True)
        server.start()
        shown("etcd is back -> the watcher follows", [await until(lambda: watcher.up)])
        shown("              -> the registrar is sure", [await until(lambda: keeper.listed)])
        assert seen.keys
        for task in tasks[:1]:
            task.cancel()
        values = [await until(lambda: not seen.keys)]
        shown("backend killed -> unlisted", values)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    environ = {"PATH": os.environ["PATH"], "METRICS_ENABLED": "1", "METRICS_ACCESS": "open"}
    command = [sys.executable, "-m", "rkmetrics", *arguments]
    return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def serve(balancer: int) -> subprocess.Popen[bytes]:
    return start("serve", "--discovery-lb", f"127.0.0.1:{balancer}", "--metrics-port", str(free_port()))


def listed(port: int) -> list[str]:
    try:
        with urlopen(f"http://127.0.0.1:{port}/backends", timeout=5) as answer:
            found: list[str] = json.load(answer)
            return found
    except OSError:
        return []


async def at_a_balancer() -> None:
    port = free_port()
    balancer = start("lb", "--open", "--port", str(port))
    others = [serve(port) for _ in range(3)]
    await until(lambda: len(listed(port)) == 3)
    up: list[float] = []
    term: list[float] = []
    ended: list[float] = []
    killed: list[float] = []
    for number in range(TIMES * 2):
        began = time.monotonic()
        backend = serve(port)
        await until(lambda: len(listed(port)) == 4)
        up.append(time.monotonic() - began)
        await asyncio.sleep(number * 0.53)
        backend.send_signal(signal.SIGTERM if number % 2 else signal.SIGKILL)
        began = time.monotonic()
        await until(lambda: len(listed(port)) == 3)
        (term if number % 2 else killed).append(time.monotonic() - began)
        await asyncio.to_thread(backend.wait)
        if number % 2:
            ended.append(time.monotonic() - began)
    shown("process started -> listed at the balancer", up)
    shown("SIGTERM -> unlisted at the balancer", term)
    shown("        -> process ended", ended)
    shown("SIGKILL -> unlisted at the balancer", killed)
    frozen = others[0]
    hung: list[float] = []
    back: list[float] = []
    for _ in range(3):
        frozen.send_signal(signal.SIGSTOP)
        hung.append(await until(lambda: len(listed(port)) == 2))
        frozen.send_signal(signal.SIGCONT)
        back.append(await until(lambda: len(listed(port)) == 3))
    shown("SIGSTOP -> unlisted at the balancer", hung)
    shown("SIGCONT -> listed again", back)
    again: list[float] = []
    for _ in range(3):
        balancer.kill()
        balancer.wait()
        began = time.monotonic()
        balancer = start("lb", "--open", "--port", str(port))
        await until(lambda: len(listed(port)) == 3)
        again.append(time.monotonic() - began)
    shown("balancer killed and started -> all listed", again)
    for each in (*others, balancer):
        each.kill()
        each.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--away", type=float, default=60.0)
    away = parser.parse_args().away
    asyncio.run(at_a_balancer())
    binary = shutil.which("etcd")
    if binary is None:
        print("etcd is not installed; apt-get install etcd-server")
        return
    with tempfile.TemporaryDirectory() as folder:
        server = EtcdServer(binary, Path(folder)).start()
        try:
            asyncio.run(at_etcd(server, away))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
