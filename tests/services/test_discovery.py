"""Balancers among real processes: killed, stopped, drained, cut off; and a Prometheus that follows /sd (F10 to F15)."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.asgi.auth import Gate
from rkmetrics.discovery.balancer import Balancer
from rkmetrics.discovery.routes import routes
from rkmetrics.settings import Secret, Settings
from tests.hostile import OK, response
from tests.services.conftest import Prometheus
from tests.services.discovery_fleet import TOKEN, BalancerProcess, Fleet, Get, fetch, states, up, wait
from tests.services.nats_server import free_port

SETTINGS = Settings(
    metrics_enabled=True,
    metrics_access="open",
    registration_token=Secret(TOKEN),
    registration_rate=1_000,
    allowed_networks=("127.0.0.0/8",),
    health_check_interval_seconds=0.25,
    health_check_timeout_seconds=1.0,
)
PROCESSES, EACH = 10, 5


@contextmanager
def balancing(settings: Settings = SETTINGS) -> Generator[tuple[Balancer, str]]:
    """A balancer in this process, and where it is."""
    registry = rk.Registry(settings, builtin=False)
    balancer = Balancer(registry)
    more = routes(balancer, Gate.for_registrations(settings))
    with balancer.in_thread(), rk.serve(registry, port=0, more=more) as server:
        yield balancer, server.url


def getter(url: str) -> Get:
    return lambda path: fetch(f"{url}{path}")


@pytest.fixture(scope="module")
def balancers() -> Iterator[tuple[str, str]]:
    """Two of them, for all tests that do them no harm."""
    with balancing() as (_, one), balancing() as (_, other):
        yield one, other


@pytest.fixture(scope="module")
def fleet(balancers: tuple[str, str]) -> Iterator[Fleet]:
    """50 backends in 10 processes."""
    fleet = Fleet(balancers, "fleet")
    try:
        yield fleet.start(PROCESSES, EACH)
    finally:
        fleet.close()


@pytest.fixture
def get(balancers: tuple[str, str]) -> Get:
    return getter(balancers[0])


def steady(get: Get) -> set[str]:
    """Those in the pool that nobody does anything to."""
    return {id for id in up(get) if id.startswith("fleet-")}


def test_a_fleet_announces_itself_and_two_balancers_agree(balancers: tuple[str, str], fleet: Fleet) -> None:
    gets = [getter(url) for url in balancers]
    wait(lambda: all(up(get) == fleet.ids() for get in gets))
    one, other = (get("/backends") for get in gets)
    assert one == other
    assert len(one) == PROCESSES * EACH


def test_prometheus_scrapes_the_fleet_by_sd_and_drops_what_drains(
    balancers: tuple[str, str], fleet: Fleet, start_prometheus: Callable[..., Prometheus], tmp_path: Path
) -> None:
    get = getter(balancers[0])
    wait(lambda: up(get) == fleet.ids())
    prometheus = start_prometheus({"fleet": sd_job(balancers[0])})
    count = len(fleet.ids())
    prometheus.wait(lambda: len(prometheus.query("up == 1")) == count)
    for sample in prometheus.query("up"):
        assert set(sample["metric"]) == {"__name__", "instance", "job", "backend"}  # none that a backend could choose
    prometheus.wait(lambda: len(prometheus.query("rkmetrics_build_info")) == count)

    gone = fleet.ids(0)
    fleet.signal(0, signal.SIGTERM)
    prometheus.wait(lambda: not targets(prometheus) & gone)
    assert fleet.processes[0].wait(60) == 0
    prometheus.wait(lambda: targets(prometheus) == fleet.ids() - gone)
    prometheus.wait(lambda: {one["metric"]["backend"] for one in prometheus.query("up")} == fleet.ids() - gone)
    assert [line for line in prometheus.log().split("\n") if "level=error" in line] == []


def sd_job(balancer: str) -> dict[str, Any]:
    return {
        "http_sd_configs": [{"url": f"{balancer}/sd", "refresh_interval": "200ms"}],
        "relabel_configs": [{"source_labels": ["__meta_rkmetrics_id"], "target_label": "backend"}],
    }


def targets(prometheus: Prometheus) -> set[str]:
    return {target["labels"]["backend"] for target in prometheus.get("/api/v1/targets")["activeTargets"]}


def test_a_backend_that_is_killed_leaves_and_returns_when_it_announces_itself(
    balancers: tuple[str, str], get: Get
) -> None:
    """F10."""
    fleet = Fleet(balancers, "killed")
    try:
        fleet.start(1)
        wait(lambda: fleet.ids() <= up(get))
        fleet.signal(0, signal.SIGKILL)
        wait(lambda: not fleet.ids() & up(get))
        assert states(get)["killed-0-0"] == "down"
        again = Fleet(balancers, "killed").start(1)  # the same id, from another port
        try:
            wait(lambda: again.ids() <= up(get))
        finally:
            again.close()
    finally:
        fleet.close()


def test_a_backend_that_hangs_leaves_and_is_back_when_it_goes_on(balancers: tuple[str, str], get: Get) -> None:
    """F12: SIGSTOP. Its kernel still takes connections, and nothing answers them."""
    fleet = Fleet(balancers, "hung")
    try:
        fleet.start(1)
        wait(lambda: fleet.ids() <= up(get))
        others = steady(get)
        fleet.signal(0, signal.SIGSTOP)
        wait(lambda: not fleet.ids() & up(get))
        assert states(get)["hung-0-0"] == "down"
        wait(lambda: others <= up(get))
        fleet.signal(0, signal.SIGCONT)
        wait(lambda: fleet.ids() <= up(get))
    finally:
        fleet.close()


def test_a_backend_that_ends_in_order_is_gone_before_it_ends(balancers: tuple[str, str], get: Get) -> None:
    """F11: draining first, then de-registered, then out."""
    fleet = Fleet(balancers, "ended")
    try:
        fleet.start(1)
        wait(lambda: fleet.ids() <= up(get))
        fleet.signal(0, signal.SIGTERM)
        wait(lambda: not fleet.ids() & up(get))
        assert fleet.processes[0].poll() is None
        assert fleet.processes[0].wait(60) == 0
        assert "ended-0-0" not in states(get)
    finally:
        fleet.close()


# --- backends that misbehave on the wire ------------------------------------------------------------------------------


class Misbehaving:
    """A socket that answers as it is told: `answer` may be changed at any time."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self._clients: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._pool = ThreadPoolExecutor(64)  # Prometheus comes too
        self._pool.submit(self._accept)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.append(client)
            self._pool.submit(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                while client.recv(65_536):
                    self._send(client)
            except OSError:
                pass

    def _send(self, client: socket.socket) -> None:
        for at in range(0, len(self.answer), 1 if self.answer.startswith(SLOW) else 1 << 16):
            client.sendall(self.answer[at : at + (1 if self.answer.startswith(SLOW) else 1 << 16)])
            time.sleep(0.3 if self.answer.startswith(SLOW) else 0)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self._pool.shutdown(wait=True, cancel_futures=True)


SLOW = b"HTTP/1.1 200 Slow"
READY = response("200 OK", b'{"ready":true}')
ANSWERS = {
    "slow drip": (SLOW + b"\r\ncontent-length: 14\r\n\r\n" + b'{"ready":true}', "timeout"),
    "half-open": (b"", "timeout"),
    "wrong JSON": (response("200 OK", b'{"ready":"true"}'), "malformed"),
    "no JSON": (response("200 OK", b"ready"), "malformed"),
    "bomb": (OK + b"content-length: 100000000\r\n\r\n", "too_large"),
    "redirect": (response("302 Found", b"", b"location: http://169.254.169.254/"), "wrong_status"),
}


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_backend_whose_answers_go_wrong_leaves_and_returns(get: Get, balancers: tuple[str, str], name: str) -> None:
    answer, outcome = ANSWERS[name]
    backend, id = Misbehaving(READY), name.replace(" ", "-")
    try:
        register(balancers[0], id, backend.port)
        wait(lambda: id in up(get))
        others = steady(get)
        backend.answer = answer
        wait(lambda: id not in up(get))
        (found,) = (each for each in get("/backends?details=1")["backends"] if each["id"] == id)
        assert (found["state"], found["last_check"]) == ("down", outcome)
        wait(lambda: others <= up(get))
        backend.answer = READY
        wait(lambda: id in up(get))
    finally:
        fetch(f"{balancers[0]}/register/{id}", TOKEN, "DELETE")
        backend.close()


def register(balancer: str, id: str, port: int) -> None:
    fetch(f"{balancer}/register", TOKEN, "POST", {"id": id, "address": f"127.0.0.1:{port}", "metrics_port": port})


def test_a_backend_that_flaps_is_kept_out_for_longer_and_longer(get: Get, balancers: tuple[str, str]) -> None:
    backend = Misbehaving(READY)
    try:
        register(balancers[0], "flaps", backend.port)
        kept_out: list[int] = []
        for _ in range(4):
            wait(lambda: "flaps" in up(get))
            backend.answer = response("200 OK", b'{"ready":false}')
            wait(lambda: states(get)["flaps"] == "draining")
            backend.answer = READY
            kept_out.append(detail(get, "flaps")["damping"])
        assert kept_out == sorted(kept_out)
        assert (kept_out[0], kept_out[-1] >= 2) == (0, True)
    finally:
        fetch(f"{balancers[0]}/register/flaps", TOKEN, "DELETE")
        backend.close()


def detail(get: Get, id: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in get("/backends?details=1")["backends"] if each["id"] == id)
    return found


# --- balancers that go away -------------------------------------------------------------------------------------------


def test_a_balancer_that_was_killed_has_its_list_again_from_announcements() -> None:
    """F13. And one that was stopped for longer than all its time-outs blames nobody."""
    balancer = BalancerProcess(free_port(), RKMETRICS_HEALTH_CHECK_TIMEOUT="2s").start()
    fleet = Fleet([balancer.url], "seen")
    try:
        get = getter(balancer.url)
        fleet.start(3, 2)
        wait(lambda: up(get) == fleet.ids())
        balancer.kill()
        balancer.start()
        wait(lambda: up(get) == fleet.ids())

        assert balancer.process is not None
        balancer.process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        balancer.process.send_signal(signal.SIGCONT)
        for _ in range(10):
            assert up(get) == fleet.ids()
            time.sleep(0.1)
        assert departures(balancer.url) == 0

        balancer.process.send_signal(signal.SIGTERM)
        assert balancer.process.wait(60) == 0
    finally:
        fleet.close()
        balancer.kill()


def departures(url: str) -> float:
    page = fetch(f"{url}/metrics").decode().split("\n")
    lines = [line for line in page if line.startswith("rkmetrics_discovery_departures_total{")]
    assert lines
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_a_balancer_does_not_start_where_nobody_could_read_or_everybody_could_join() -> None:
    for variables, says in (
        ({}, "nobody could read /backends"),
        ({"METRICS_TOKEN": "a"}, "nobody could register"),
        ({"METRICS_TOKEN": "a", "RKMETRICS_ALLOWED_NETWORKS": "10.0.0.1/8"}, "expected a network such as 10.0.0.0/8"),
    ):
        process = BalancerProcess(free_port())
        process._environment = {"PATH": os.environ["PATH"], **variables}
        with pytest.raises(AssertionError, match=says):
            process.start()
        process.kill()


# --- a network that is cut in two -------------------------------------------------------------------------------------

CLONE_NEWNET = 0x40000000


class Network:
    """Two network namespaces, with a cable between them that can be pulled: the balancer's, and the backends'."""

    def __init__(self) -> None:
        self.near, self.far = f"rk-near-{os.getpid()}", f"rk-far-{os.getpid()}"
        self._inside = ThreadPoolExecutor(1, initializer=_enter, initargs=(self.near,))

    def open(self) -> None:
        for command in (
            f"netns add {self.near}",
            f"netns add {self.far}",
            f"link add rk-a type veth peer name rk-b netns {self.far}",
            f"link set rk-a netns {self.near}",
            f"-n {self.near} addr add 10.66.0.1/24 dev rk-a",
            f"-n {self.far} addr add 10.66.0.2/24 dev rk-b",
            f"-n {self.near} link set lo up",
            f"-n {self.far} link set lo up",
        ):
            ip(command)
        self.plug()

    def plug(self) -> None:
        ip(f"-n {self.near} link set rk-a up")
        ip(f"-n {self.far} link set rk-b up")

    def pull(self) -> None:
        ip(f"-n {self.far} link set rk-b down")

    def get(self, url: str) -> Any:
        """Fetch from inside the balancer's namespace."""
        return self._inside.submit(fetch, url).result()

    def close(self) -> None:
        self._inside.shutdown()
        for name in (self.near, self.far):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def _enter(name: str) -> None:
    """Move this thread into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}") as namespace:
        assert libc.setns(namespace.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("cutting a network needs root and iproute2")
    network = Network()
    try:
        network.open()
    except subprocess.CalledProcessError as error:
        network.close()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield network
    network.close()


def test_a_balancer_that_is_cut_off_keeps_its_pool(network: Network) -> None:
    """F15: the cable is pulled for longer than any backend may be silent, and nothing is lost."""
    near, far = (("ip", "netns", "exec", name) for name in (network.near, network.far))
    balancer = BalancerProcess(8080, host="10.66.0.1", prefix=near, RKMETRICS_ALLOWED_NETWORKS="10.66.0.0/24")
    fleet = Fleet([balancer.url], "far")
    with ExitStack() as stack:
        stack.callback(balancer.kill)
        stack.callback(fleet.close)
        balancer.start()
        fleet.start(4, 1, host="10.66.0.2", prefix=far)

        def get(path: str) -> Any:
            return network.get(f"{balancer.url}{path}")

        wait(lambda: up(get) == fleet.ids())
        network.pull()
        wait(lambda: set(states(get).values()) == {"down"})
        assert up(get) == fleet.ids()
        assert get("/backends?details=1")["panic"] is True
        network.plug()
        wait(lambda: set(states(get).values()) == {"up"})
        assert up(get) == fleet.ids()
        assert get("/backends?details=1")["panic"] is False

        fleet.signal(0, signal.SIGKILL)  # the network is there again, so one that dies leaves
        wait(lambda: up(get) == fleet.ids(1, 2, 3))
        assert json.dumps(get("/backends"))
