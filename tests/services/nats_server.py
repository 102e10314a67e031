"""A real nats-server that tests start, kill, freeze and start again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tests.waiting import free_port

__all__ = ["NatsServer", "free_port"]

# For bugs only: a server is up within a second.
PATIENCE_SECONDS = 60


class NatsServer:
    """One server with monitoring, on ports of its own that stay the same over restarts.

    config: more of its configuration, as text.
    """

    def __init__(
        self, binary: str, folder: Path, *, jetstream: bool = True, jetstream_limits: str = "", config: str = ""
    ) -> None:
        self._binary, self._folder, self._jetstream = binary, folder, jetstream
        self._jetstream_limits = jetstream_limits
        self.config = config
        self.port, self._monitor = free_port(), 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> NatsServer:
        """Start it. A port that was free a moment ago may be somebody's outgoing one by now: then once more."""
        for _ in range(20):
            self._monitor = free_port()
            self._launch()
            if self._is_up():
                return self
            time.sleep(0.2)
        raise AssertionError(self.log())

    def _launch(self) -> None:
        store = (
            f'jetstream {{ store_dir: "{self._folder / "store"}", {self._jetstream_limits} }}\n'
            if self._jetstream
            else ""
        )
        path = self._folder / "nats.conf"
        path.write_text(f"listen: 127.0.0.1:{self.port}\nhttp: 127.0.0.1:{self._monitor}\n{store}{self.config}\n")
        log = (self._folder / "nats.log").open("ab")
        self._process = subprocess.Popen([self._binary, "-c", str(path)], stdout=log, stderr=log)
        log.close()

    def _is_up(self) -> bool:
        """Whether it came up; False where it ended because of a port."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with suppress(URLError, ConnectionError):
                self.monitor("healthz")
                return True
            assert self._process is not None
            if self._process.poll() is not None:
                assert "address already in use" in self.log(), self.log()
                return False
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        return (self._folder / "nats.log").read_text()

    def monitor(self, page: str) -> dict[str, Any]:
        """A page of the monitoring port: varz, connz, subsz, jsz."""
        with urlopen(f"http://127.0.0.1:{self._monitor}/{page}", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def traffic(self) -> tuple[int, int, int]:
        """Connections since the start, messages in, messages out."""
        varz = self.monitor("varz")
        return int(varz["total_connections"]), int(varz["in_msgs"]), int(varz["out_msgs"])

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
        os.waitpid(self._process.pid, os.WUNTRACED)  # its threads do not stop at once
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)
