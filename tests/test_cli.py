"""The command line as a person or a supervisor uses it: real processes, exit codes, what is on which stream."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import rkmetrics as rk
from rkmetrics.cli import COMMANDS, main

HERE = Path(__file__).resolve().parents[1]
TOKEN = "snowman-token"
SETTINGS = re.compile(r"(RKMETRICS|METRICS|RIVETKIT|DYN|NATS|ETCD|OTEL)_")


def clean_environ(**more: str) -> dict[str, str]:
    """This process's environment without settings, and with the package on the path."""
    environ = {name: value for name, value in os.environ.items() if not SETTINGS.match(name)}
    return {**environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1", **more}


def run(*arguments: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rkmetrics", *arguments]
    return subprocess.run(
        command, env=clean_environ(**environ), cwd=cwd, capture_output=True, text=True, check=False, timeout=60
    )


class Node:
    """A `rkmetrics serve` that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.greeting: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            self.greeting.append(line.rstrip("\n"))
            if line.startswith("Ctrl-C"):
                break
        found = re.search(r"http://\S+", "\n".join(self.greeting))
        assert found, (self.greeting, process.stderr and process.stderr.read())
        self.url = found[0]

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, headers=dict(headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        stdout, stderr = self.process.communicate(timeout=10)
        return self.process.returncode, stdout, stderr


@contextmanager
def serving(*arguments: str, cwd: Path | None = None, **environ: str) -> Iterator[Node]:
    command = [sys.executable, "-m", "rkmetrics", "serve", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=clean_environ(**environ), cwd=cwd, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield Node(process)
        finally:
            process.kill()


# --- what is known ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["serve", "--port", "70000"],
        ["serve", "--host", "a b"],
        ["serve", "--discovery-lb", "lb1"],
        ["serve", "--metrics-port", "0"],
        ["serve", "--advertise", "0.0.0.0"],
        ["assets"],
        ["catalogue", "nonsense"],
        ["scrape-config", "--job", " "],
        ["scrape-config", "--prefix", "internal"],
        ["scrape-config", "--prefix", "/a b"],
        *(
            ["scrape-config", "--target", target]
            for target in ("", "node", "node:", "node:0", "node:65536", ":9090", "http://node:1", "::1:9090", "a,b:1")
        ),
    ],
)
def test_wrong_use_is_2_and_goes_to_stderr(arguments: Sequence[str]) -> None:
    out = run(*arguments)
    assert (out.returncode, out.stdout) == (2, "")
    assert "usage: rkmetrics" in out.stderr


def test_a_bad_setting_is_2_and_names_the_variable() -> None:
    out = run("info", RKMETRICS_PORT="80a")
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr == "rkmetrics: RKMETRICS_PORT='80a': expected a whole number from 0 to 65535 (environment)\n"


def test_all_bad_settings_are_told_at_once() -> None:
    out = run("info", RKMETRICS_PROT="hunter2", METRICS_ACCESS="opne")
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.splitlines() == [
        "rkmetrics: RKMETRICS_PROT: unknown setting; did you mean RKMETRICS_PORT? (environment)",
        "rkmetrics: METRICS_ACCESS='opne': expected one of: token, open (environment)",
    ]


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"], {}) == 0
    assert capsys.readouterr().out == f"{rk.__version__}\n"
    assert main(["version", "--json"], {}) == 0
    assert json.loads(capsys.readouterr().out) == {"version": rk.__version__}


def test_info_says_which_cells_run_and_which_extras_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"], {}) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["cells"]) == (rk.__version__, rk.IMPLEMENTATION)
    assert set(found["extras"]) == {"otlp", "zstd", "serve", "nats", "dynamo", "http"}
    assert main(["info"], {}) == 0
    assert f"cells     {rk.IMPLEMENTATION}\n" in capsys.readouterr().out


def test_catalogue_lists_every_metric_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalogue", "list"], {}) == 0
    text = capsys.readouterr().out
    assert "gauge     rivetkit_actor_active_count{actor_name}" in text
    assert main(["catalogue", "--json"], {}) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(text.splitlines())
    assert all(row["help"] and row["type"] in ("counter", "gauge", "histogram") for row in rows)


def test_budget_adds_up_to_what_the_registry_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--json"], {"RKMETRICS_MAX_ACTOR_NAMES": "3"}) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["actor_names"] == 3
    assert found["total"]["lines"] == sum(metric["lines"] for metric in found["metrics"])
    assert main(["budget"], {}) == 0
    assert "at 200 actor names" in capsys.readouterr().out


def test_settings_show_where_values_come_from_and_no_secret() -> None:
    out = run("settings", "show", METRICS_TOKEN=TOKEN, RIVETKIT_METRICS_ENABLED="1", NATS_SERVER="nats://u:hunter2@h:1")
    assert (out.returncode, out.stderr) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in out.stdout.splitlines()}
    assert lines["METRICS_TOKEN"] == ["<secret>", "METRICS_TOKEN"]
    assert lines["METRICS_ENABLED"] == ["1", "RIVETKIT_METRICS_ENABLED"]
    assert lines["RKMETRICS_PORT"] == ["9090", "default"]
    assert TOKEN not in out.stdout
    assert "hunter2" not in out.stdout


def test_each_command_has_a_summary_and_runs_from_the_same_table() -> None:
    assert all(command.run.__doc__ for command in COMMANDS)
    assert len({command.words for command in COMMANDS}) == len(COMMANDS)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    script = f"{sys.executable} -m rkmetrics catalogue | head -n 1"
    out = subprocess.run(["sh", "-c", script], env=clean_environ(), capture_output=True, text=True, check=False)
    assert (out.returncode, out.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["version"], ["catalogue"], ["scrape-config"], ["--help"]])
def test_an_output_that_cannot_be_written_is_a_sentence(arguments: Sequence[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-m", "rkmetrics", *arguments]
    environ = {name: value for name, value in clean_environ().items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        out = subprocess.run(command, env=environ, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (out.returncode, out.stderr) == (2, "rkmetrics: No space left on device; the output is not complete\n")


def test_generated_pages_are_written_in_the_repository_or_where_one_says(tmp_path: Path) -> None:
    out = run("assets", "docs", cwd=tmp_path)
    assert (out.returncode, out.stdout, len(out.stderr.splitlines())) == (2, "", 1)
    assert "go to the repository" in out.stderr
    (tmp_path / "docs").mkdir()
    assert run("assets", "docs", "--check", cwd=tmp_path).returncode == 2
    assert run("assets", "docs", "nowhere", cwd=tmp_path).stderr.startswith("rkmetrics: nowhere is no folder")
    assert run("assets", "docs", "docs", cwd=tmp_path).stdout.splitlines() == [
        "docs/metrics.md",
        "docs/configuration.md",
    ]
    assert run("assets", "docs", "--check", cwd=tmp_path).returncode == 0


# --- scrape-config ----------------------------------------------------------------------------------------------------


def test_scrape_config_is_what_prometheus_takes(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here: apt-get install prometheus")
    token = tmp_path / "token"
    token.write_text(TOKEN)
    out = run(
        "scrape-config", "--job", 'a "fleet"', "--prefix", "/internal", "--credentials-file", str(token),
        "--target", "[::1]:9090", "--target", "node-2:9090", METRICS_ENABLED="1", METRICS_TOKEN=TOKEN,
    )  # fmt: skip
    assert (out.returncode, out.stderr) == (0, "")
    assert TOKEN not in out.stdout
    assert 'metrics_path: "/internal/metrics"' in out.stdout
    config = tmp_path / "prometheus.yml"
    config.write_text(out.stdout)
    check = subprocess.run(["promtool", "check", "config", config], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


def test_a_prometheus_that_is_configured_so_scrapes_the_node(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus here: apt-get install prometheus")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "app.py").write_text(APP)
    gate = {"METRICS_ENABLED": "1", "METRICS_TOKEN": TOKEN}
    with serving("--port", "0", "--app", "app:registry", cwd=tmp_path, **gate) as node:
        target = node.url.removeprefix("http://")
        out = run("scrape-config", "--target", target, "--credentials-file", str(tmp_path / "token"), cwd=None, **gate)
        # The rest is as printed; a test does not wait for fifteen seconds.
        config = out.stdout.replace("15s", "1s").replace("10s", "1s")
        (tmp_path / "prometheus.yml").write_text(config)
        with prometheus(tmp_path) as url:
            assert ask(url, "up") == [({"instance": target, "job": "rkmetrics"}, "1")]
            labels = {"actor_name": "lobby", "instance": target, "job": "rkmetrics"}
            assert ask(url, "chat_messages_total") == [(labels, "3")]


@contextmanager
def prometheus(folder: Path) -> Iterator[str]:
    """A real Prometheus on a free port, with folder/prometheus.yml."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def ask(url: str, query: str) -> list[tuple[dict[str, str], str]]:
    """What Prometheus answers, once it has an answer: labels without the name, and the value."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/api/v1/query?query={query}", timeout=10) as answer:
                result = json.load(answer)["data"]["result"]
        except OSError:
            result = []
        if result:
            return [({k: v for k, v in row["metric"].items() if k != "__name__"}, row["value"][1]) for row in result]
        time.sleep(0.1)
    pytest.fail(f"no answer to {query}")


def test_scrape_config_of_an_open_node_has_no_credentials() -> None:
    out = run("scrape-config", METRICS_ENABLED="1", METRICS_ACCESS="open")
    assert (out.returncode, "authorization" in out.stdout) == (0, False)


NO_TOKEN = "METRICS_TOKEN or METRICS_TOKEN_FILE"
BAD_TOKEN = "METRICS_TOKEN: a token is visible ASCII characters without spaces and commas"
NO_FILE = "METRICS_TOKEN_FILE: No such file or directory"


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({}, f"no token is set; set METRICS_ENABLED=1 and {NO_TOKEN}"),
        ({"METRICS_ENABLED": "1"}, f"no token is set; set {NO_TOKEN}"),
        ({"METRICS_TOKEN": TOKEN}, "set METRICS_ENABLED=1"),
        ({"METRICS_ACCESS": "open"}, "set METRICS_ENABLED=1"),
        ({"METRICS_ENABLED": "1", "METRICS_TOKEN": "a b"}, f"{BAD_TOKEN}; set {NO_TOKEN}"),
        ({"METRICS_ENABLED": "1", "METRICS_TOKEN_FILE": "/nonexistent"}, f"{NO_FILE}; set {NO_TOKEN}"),
    ],
)
def test_scrape_config_of_a_closed_node_says_why_and_is_a_finding(environ: dict[str, str], reason: str) -> None:
    out = run("scrape-config", cwd=None, **environ)
    first = out.stdout.splitlines()[0]
    assert (out.returncode, out.stderr, first) == (1, "", f"# Metrics are closed: {reason} where the node runs.")
    assert out.stdout.count("Metrics are closed") == 1


def test_scrape_config_says_that_the_credentials_file_is_one_line() -> None:
    out = run("scrape-config", METRICS_ENABLED="1", METRICS_TOKEN=TOKEN)
    assert (out.returncode, "credentials_file holds one line" in out.stdout) == (0, True)


def test_scrape_config_asks_for_a_target_when_the_port_is_any() -> None:
    out = run("scrape-config", RKMETRICS_PORT="0")
    assert (out.returncode, out.stdout) == (2, "")
    assert "--target HOST:PORT" in out.stderr
    assert run("scrape-config", "--target", "node-2:1", RKMETRICS_PORT="0").returncode == 1


# --- serve ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "   "])
def test_serve_refuses_when_metrics_are_enabled_without_a_usable_token(token: str) -> None:
    out = run("serve", "--port", "0", METRICS_ENABLED="1", METRICS_TOKEN=token)
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr == (
        "rkmetrics: METRICS_ENABLED is set, and no token can be used (no token is set): set METRICS_TOKEN or "
        "METRICS_TOKEN_FILE, or METRICS_ACCESS=open to serve metrics to anybody\n"
    )


def test_serve_on_all_addresses_says_where_it_is_bound() -> None:
    with serving("--port", "0", "--host", "0.0.0.0") as node:
        port = node.url.rpartition(":")[2]
        assert f"http://127.0.0.1:{port} (bound to 0.0.0.0:{port}, all addresses)" in node.greeting[0]


def test_serve_warns_of_settings_without_effect() -> None:
    with serving("--port", "0", RKMETRICS_SHARED_DIR="/run/cells", RKMETRICS_INSPECT_TOKEN=TOKEN) as node:
        _, _, stderr = node.stop()
    warnings = [line for line in stderr.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "no effect in this version: RKMETRICS_INSPECT_TOKEN, RKMETRICS_SHARED_DIR" in warnings[0]
    assert TOKEN not in stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_open_is_refused_on_any_address_but_loopback(host: str) -> None:
    out = run("serve", "--open", "--port", "0", "--host", host)
    assert (out.returncode, out.stdout) == (2, "")
    assert "loopback" in out.stderr


def test_a_port_in_use_is_2_and_names_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        out = run("serve", "--port", port)
    assert (out.returncode, out.stdout) == (2, "")
    assert port in out.stderr


def test_serve_is_closed_by_default_and_says_how_to_open_it() -> None:
    with serving("--port", "0") as node:
        assert node.get("/health")[0] == 200
        status, text = node.get("/metrics")
        assert (status, "not enabled" in text) == (403, True)
        assert "METRICS_ENABLED=1" in "\n".join(node.greeting)


def test_serve_with_a_token_opens_to_who_has_it_and_shows_it_nowhere() -> None:
    with serving("--port", "0", METRICS_ENABLED="1", METRICS_TOKEN=TOKEN) as node:
        assert node.get("/metrics")[0] == 401
        status, text = node.get("/metrics", {"Authorization": f"Bearer {TOKEN}"})
        assert (status, "process_cpu_seconds_total" in text) == (200, True)
        code, stdout, stderr = node.stop()
    assert code == 0
    assert TOKEN not in "\n".join(node.greeting) + stdout + stderr


def test_serve_open_needs_no_token_and_exports_this_process() -> None:
    with serving("--port", "0", "--open") as node:
        status, text = node.get("/metrics")
        assert status == 200
        for name in ("rkmetrics_build_info{", "rkmetrics_node_ready 1", "process_resident_memory_bytes "):
            assert name in text
        assert json.loads(node.get("/metadata")[1])["version"] == rk.__version__


APP = """
import rkmetrics as rk
class Chat(rk.MetricSet):
    messages = rk.Counter("chat_messages_total", "Messages handled.")
registry = rk.Registry()
registry.bind(Chat, actor_name="lobby").messages.inc(3)
def make(): return registry
"""


@pytest.mark.parametrize("app", ["chat:registry", "chat:make"])
def test_serve_app_serves_the_registry_of_an_application(tmp_path: Path, app: str) -> None:
    (tmp_path / "chat.py").write_text(APP)
    with serving("--port", "0", "--open", "--app", app, cwd=tmp_path) as node:
        assert 'chat_messages_total{actor_name="lobby"} 3' in node.get("/metrics")[1]
    listed = run("catalogue", "--app", app, cwd=tmp_path)
    assert (listed.returncode, "chat_messages_total{actor_name}" in listed.stdout) == (0, True)


@pytest.mark.parametrize(
    ("app", "part"),
    [
        ("chat", "module:registry"),
        ("nowhere:registry", "no module named 'nowhere'"),
        ("chat:nothing", "nothing"),
        ("chat:rk", "expected a rkmetrics.Registry"),
        ("json:dumps", "TypeError: dumps() missing 1 required positional argument"),
        ("raises:registry", "ZeroDivisionError: division by zero"),
    ],
)
def test_serve_app_says_what_it_did_not_find(tmp_path: Path, app: str, part: str) -> None:
    (tmp_path / "chat.py").write_text(APP)
    (tmp_path / "raises.py").write_text("1 / 0")
    for command in (["serve", "--port", "0"], ["catalogue"], ["budget"]):
        out = run(*command, "--app", app, cwd=tmp_path)
        assert (out.returncode, out.stdout, len(out.stderr.splitlines())) == (2, "", 1)
        assert part in out.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_node_with_exit_code_0(number: int) -> None:
    with serving("--port", "0") as node:
        code, _, stderr = node.stop(number)
    assert code == 0
    assert stderr.splitlines()[-1] == "stopped"
    assert "Traceback" not in stderr


def test_health_tells_each_step_of_a_stop_in_order() -> None:
    with serving("--port", "0", "--open", "--demo") as node:
        assert json.loads(node.get("/health")[1])["status"] == "ok"
        node.process.send_signal(signal.SIGTERM)
        seen = list(_statuses(node))
        node.process.wait(timeout=10)
    steps = ["ok", "draining", "shutting_down", "shut_down"]
    assert "draining" in seen
    assert seen == sorted(seen, key=steps.index)
    assert node.process.returncode == 0


def _statuses(node: Node) -> Iterator[str]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            yield json.loads(node.get("/health")[1])["status"]
        except (OSError, ValueError):
            return


def test_the_demo_takes_another_port_when_the_usual_one_is_in_use() -> None:
    try:
        taken = socket.create_server(("127.0.0.1", 9090))
    except OSError:
        taken = None  # somebody else has it, which serves as well
    try:
        with serving("--open", "--demo") as node:
            assert not node.url.endswith(":9090")
            assert node.greeting[0].startswith("Port 9090 is in use, so this node took port")
            assert node.get("/health")[0] == 200
    finally:
        if taken is not None:
            taken.close()
