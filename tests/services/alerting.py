"""A real Alertmanager, and rules that are quick enough to wait for."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from rkmetrics.assets.base import Scalar, trees
from rkmetrics.assets.yaml_text import read_yaml
from rkmetrics.promql import Edit, apply
from tests.services.nats_server import free_port

__all__ = ["QUICKER", "Alertmanager", "quick"]

# `for` of each rule and `interval` of each group are divided by it: a minute is a second. Windows of queries are not.
QUICKER = 60
PATIENCE_SECONDS = 60
CONFIG = "route: {receiver: nobody, group_wait: 1s}\nreceivers: [{name: nobody}]\n"
SECONDS = {"s": 1, "m": 60, "h": 3600}


def quick(rules: str) -> str:
    """Return a rule file whose alerts wait, and whose groups are evaluated, QUICKER times sooner."""
    found = [tree[key] for root in read_yaml(rules, "rules") for tree in trees(root) for key in tree.keys() & TIMES]
    return apply(rules, (_quicker(each) for each in found if isinstance(each, Scalar)))


TIMES = {"for", "interval"}


def _quicker(each: Scalar) -> Edit:
    match = re.fullmatch(r"(\d+)([smh])", each.value)
    assert match, each.value
    seconds = int(match[1]) * SECONDS[match[2]] / QUICKER
    return Edit(each.offsets[0], each.offsets[-1], f"{max(1, round(seconds))}s")


class Alertmanager:
    """One that tells nobody, and is asked over its HTTP API."""

    def __init__(self, binary: str, folder: Path, inhibitions: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        config = folder / "alertmanager.yml"
        config.write_text(CONFIG + inhibitions)
        self._log = (folder / "alertmanager.log").open("w+")
        command = [
            binary,
            f"--config.file={config}",
            f"--storage.path={folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            "--cluster.listen-address=",
        ]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def alerts(self) -> dict[tuple[str, str], list[str]]:
        """What fires, by name and instance, and the names of the alerts that keep it quiet."""
        with urlopen(f"{self.url}/api/v2/alerts", timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)
        names = {alert["fingerprint"]: alert["labels"]["alertname"] for alert in found}
        return {
            (alert["labels"]["alertname"], alert["labels"].get("instance", "")): sorted(
                {names[each] for each in alert["status"]["inhibitedBy"]}
            )
            for alert in found
        }

    def wait(self, holds: Callable[[dict[tuple[str, str], list[str]]], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        found: object = "no answer"
        while True:
            with suppress(URLError, ConnectionError):
                found = alerts = self.alerts()
                if holds(alerts):
                    return
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, found
            time.sleep(0.1)

    def log(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_SECONDS)
        self._log.close()
