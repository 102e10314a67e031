"""What is composed from settings: what must not start, what starts, and the order in which it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import rkmetrics as rk
from rkmetrics.runtime import Plan, dialable, extras, load_registry, running, stop_signal, why_no_token
from rkmetrics.settings import Secret, Settings

LOCAL = Settings(port=0)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:9090"),
        ("0.0.0.0", "127.0.0.1:9090"),
        ("", "127.0.0.1:9090"),
        ("::", "[::1]:9090"),
        ("::1", "[::1]:9090"),
        ("node-2", "node-2:9090"),
    ],
)
def test_an_address_is_written_as_a_client_dials_it(host: str, address: str) -> None:
    assert dialable(host, 9090) == address


def test_a_node_is_healthy_inside_the_block_and_shut_down_after_it() -> None:
    with running(Plan(LOCAL)) as node:
        assert node.registry.health.check().status is rk.Status.OK
        with urllib.request.urlopen(f"{node.url}/health", timeout=10) as answer:
            assert json.load(answer)["status"] == "ok"
        assert node.notes == ()
    assert node.registry.health.check().status is rk.Status.SHUT_DOWN
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{node.url}/health", timeout=10)


def test_a_node_shuts_down_in_order_when_its_block_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        with running(Plan(LOCAL, demo=True)) as node:
            raise ZeroDivisionError
    assert node.registry.health.check().status is rk.Status.SHUT_DOWN


def test_open_leaves_the_settings_alone() -> None:
    with running(Plan(LOCAL, open=True)) as node:
        with urllib.request.urlopen(f"{node.url}/metrics", timeout=10) as answer:
            assert answer.status == 200
        assert not node.registry.settings.metrics_enabled


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(), "no token is set"),
        (Settings(metrics_token_previous=Secret(b"old")), "no token is set"),
        (Settings(metrics_token=Secret("a b")), "METRICS_TOKEN: a token is visible ASCII"),
        (Settings(metrics_token_file="/nowhere/token"), "METRICS_TOKEN_FILE: No such file"),
    ],
)
def test_a_gate_that_can_never_open_does_not_start_and_says_why_once(
    settings: Settings, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert reason in why_no_token(settings)
    enabled = dataclasses.replace(settings, port=0, metrics_enabled=True)
    with pytest.raises(rk.ServeError, match=re.escape(reason)), running(Plan(enabled)):
        pytest.fail("it runs")
    assert caplog.messages == []


def test_a_gate_that_can_open_has_no_reason_not_to() -> None:
    assert why_no_token(Settings(metrics_token=Secret("right"))) == ""
    assert why_no_token(Settings(metrics_access="open")) == ""


def test_settings_without_effect_are_named_once_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with running(Plan(Settings(port=0, shared_dir="/run/cells", inspect_token=Secret("hunter2")))):
        pass
    found = [record.getMessage() for record in caplog.records if record.name == "rkmetrics.runtime"]
    assert found == ["no effect in this version: RKMETRICS_INSPECT_TOKEN, RKMETRICS_SHARED_DIR"]


def test_a_node_on_all_addresses_says_so() -> None:
    with running(Plan(LOCAL)) as node:
        assert not node.everywhere
    with running(Plan(Settings(port=0, host="0.0.0.0"))) as node:
        assert node.everywhere
        assert node.url == f"http://127.0.0.1:{node.server.port}"


def test_a_port_in_use_is_left_to_its_owner() -> None:
    with running(Plan(LOCAL)) as node:
        taken = Settings(port=node.server.port)
        with pytest.raises(rk.ServeError, match=str(taken.port)), running(Plan(taken)):
            pytest.fail("it runs")
        with running(Plan(taken, any_port=True)) as other:
            assert other.server.port != taken.port
            assert other.notes[0].startswith(f"Port {taken.port} is in use, so this node took port {other.server.port}")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import a_module_that_is_missing", "No module named 'a_module_that_is_missing' ({file}, line 1)"),
        ("1 / 0", "ZeroDivisionError: division by zero ({file}, line 1)"),
        ("def registry():\n    raise OSError('no disk')", "OSError: no disk ({file}, line 2)"),
        ("def registry(name): ...", "missing 1 required positional argument: 'name'"),
        ("None.nothing", "'NoneType' object has no attribute 'nothing' ({file}, line 1)"),
        ("other = 1", "has no attribute 'registry'"),
        ("registry = 7", "expected a rkmetrics.Registry, or a function that makes one; found 7"),
        ("def registry(: ...", "SyntaxError: invalid syntax (broken_app.py, line 1)"),
    ],
)
def test_an_application_that_cannot_be_loaded_is_one_sentence_with_the_line(
    source: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "broken_app.py"
    file.write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "broken_app", raising=False)
    with pytest.raises(rk.ServeError, match=re.escape(sentence.format(file=file))) as caught:
        load_registry("broken_app:registry")
    assert str(caught.value).startswith("--app 'broken_app:registry': ")
    assert "\n" not in str(caught.value)
    assert "importlib" not in str(caught.value)


def test_extras_tells_each_extra_of_the_project() -> None:
    assert set(extras()) == {"otlp", "zstd", "serve", "nats", "dynamo", "http"}


def test_the_push_without_its_extra_is_noted_and_the_node_serves() -> None:
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from rkmetrics.runtime import Plan, running
from rkmetrics.settings import Settings
environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
with running(Plan(Settings(port=0), environ=environ)) as node:
    print(node.registry.health.status, *node.notes)
"""
    root = str(Path(__file__).resolve().parents[1])
    environ = {**os.environ, "PYTHONPATH": root}
    out = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("ok ")
    assert "rkmetrics[otlp]" in out.stdout


def test_a_signal_is_waited_for_once_and_then_does_what_it_did() -> None:
    both = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in both]
    with stop_signal() as wait:
        os.kill(os.getpid(), signal.SIGTERM)  # before anybody waits: it is not lost
        assert wait() == "SIGTERM"
        assert [signal.getsignal(number) for number in both] == before
    assert [signal.getsignal(number) for number in both] == before
