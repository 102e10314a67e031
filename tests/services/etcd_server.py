"""A real etcd that tests start, kill, freeze and start again, and a cable to it that can be cut."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from ssl import create_default_context
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from tests.services.nats_server import free_port

__all__ = ["Cable", "EtcdServer", "cable"]

# For bugs only: a server is up within a second.
PATIENCE_SECONDS = 60


class EtcdServer:
    """One member, on ports of its own that stay the same over restarts.

    certificate: of 127.0.0.1, with its key (PEM); it is served over TLS then. members: all of a cluster, of which it is
    one; by default it is the only one.
    """

    def __init__(self, binary: str, folder: Path, *, certificate: Path | None = None) -> None:
        self._binary, self._folder, self._certificate = binary, folder, certificate
        self.port, self._peer_port = free_port(), free_port()
        self.members: Sequence[EtcdServer] = (self,)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._certificate else 'http'}://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        return f"member-{self._peer_port}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self._peer_port}"

    def launch(self) -> None:
        """Start a member of a cluster, which is not up before most of them are."""
        self._launch()

    def start(self) -> EtcdServer:
        """Start it. A port that was free a moment ago may be somebody's outgoing one by now: then once more."""
        for _ in range(20):
            self._launch()
            if self._is_up():
                return self
            time.sleep(0.2)
        raise AssertionError(self.log())

    def is_leader(self) -> bool:
        """Whether a cluster stands, and this one leads it."""
        found = self.call("maintenance/status")
        return bool(found.get("leader") == found["header"]["member_id"])

    def _launch(self) -> None:
        cluster = ",".join(f"{each.name}={each.peer_url}" for each in self.members)
        command = [
            self._binary,
            *("--name", self.name, "--data-dir", str(self._folder / "data")),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", cluster),
        ]
        if self._certificate is not None:
            command += ["--cert-file", str(self._certificate), "--key-file", str(self._certificate)]
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def _is_up(self) -> bool:
        """Whether it came up; False where it ended because of a port."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with suppress(URLError, ConnectionError):
                self.call("maintenance/status")
                return True
            assert self._process is not None
            if self._process.poll() is not None:
                assert "address already in use" in self.log(), self.log()
                return False
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        return (self._folder / "etcd.log").read_text()

    def call(self, call: str, **body: object) -> dict[str, Any]:
        """One call of the gateway, by other means than the client that is tested."""
        request = Request(f"{self.url}/v3/{call}", json.dumps(body).encode(), method="POST")
        context = None if self._certificate is None else create_default_context(cafile=str(self._certificate))
        with urlopen(request, timeout=10, context=context) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def forget(self) -> None:
        """Lose all data, while it is stopped."""
        assert self._process is None
        shutil.rmtree(self._folder / "data")

    def compact(self) -> None:
        """Throw away all history before now."""
        revision = self.call("kv/range", key="AA==")["header"]["revision"]
        self.call("kv/compaction", revision=revision, physical=True)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it; by default as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            process.wait(PATIENCE_SECONDS)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block it holds its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


class Cable:
    """A TCP proxy. cut: what is sent gets nowhere, and nobody is told, as on a cut network."""

    def __init__(self, port: int) -> None:
        self._target, self.port = port, 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._whole = asyncio.Event()
        self._whole.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        """What was on the way while it was cut is lost, and so are its connections: as after minutes of it."""
        for task in list(self._tasks):
            task.cancel()
        self._whole.set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        try:
            await self._whole.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            writers.append(back)
            await asyncio.wait(
                [asyncio.ensure_future(self._pump(reader, back)), asyncio.ensure_future(self._pump(there, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for each in writers:
                each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.CancelledError):
            while data := await reader.read(65_536):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def cable(server: EtcdServer) -> AsyncIterator[Cable]:
    made = Cable(server.port)
    listener = await asyncio.start_server(made.connected, "127.0.0.1", 0)
    made.port = int(listener.sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        listener.close()
        await made.close()
        await asyncio.sleep(0)
