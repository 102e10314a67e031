"""`rk.serve()` on real sockets: HTTP/1.1 as it should be, and clients that mean harm (T16, T17)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.asgi.routes import Surface
from rkmetrics.errors import ServeError
from rkmetrics.server import Limits, Server
from rkmetrics.settings import Secret, Settings
from tests.asgi.hosts import OnSocket, Reply, bearer, read_reply

OPEN = Settings(metrics_enabled=True, metrics_access="open")
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
METRICS = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"


class Rooms(rk.MetricSet):
    """Enough lines to fill every buffer between server and client."""

    members = rk.Gauge("rooms_members", "Members in rooms.", across="sum")


@pytest.fixture
def registry() -> rk.Registry:
    return rk.Registry(OPEN, builtin=False)


@pytest.fixture
def server(registry: rk.Registry) -> Iterator[Server]:
    with rk.serve(registry, port=0) as server:
        yield server


@contextlib.contextmanager
def limited(registry: rk.Registry, limits: Limits) -> Iterator[Server]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    listener.setblocking(False)
    registry.health.start()
    with Server(Surface(registry), listener, limits) as server:
        yield server


@contextlib.contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        yield client


def exchange(server: Server, request: bytes, method: str = "GET") -> Reply:
    return OnSocket(server.port).raw(request, method)


def send_for_ever(client: socket.socket, data: bytes) -> None:
    while True:
        client.sendall(data)


@contextlib.contextmanager
def flooding(server: Server, data: bytes) -> Iterator[socket.socket]:
    """A client that sends without end, and reads what it is answered."""
    answered = threading.Event()

    def send(client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            send_for_ever(client, data)

    def read(client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while client.recv(1 << 20):
                answered.set()

    with connected(server) as client:
        threads = [threading.Thread(target=each, args=(client,)) for each in (send, read)]
        for thread in threads:
            thread.start()
        try:
            assert answered.wait(30)
            yield client
        finally:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def drip(client: socket.socket) -> None:
    """Send until the server has had enough."""
    for _ in range(10_000):
        client.sendall(b"X")
        time.sleep(0.01)


def is_closed(client: socket.socket) -> bool:
    """Wait for the server to close; whether it did so, with or without a reset."""
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def big() -> rk.Registry:
    registry = rk.Registry(
        Settings(metrics_enabled=True, metrics_access="open", max_actor_names=100_000), builtin=False
    )
    for number in range(100_000):
        registry.bind(Rooms, actor_name=f"{number:0100d}").members.set(number)
    return registry


# --- HTTP/1.1 ---------------------------------------------------------------------------------------------------------


def test_a_connection_is_kept_for_the_next_request(server: Server) -> None:
    with connected(server) as client:
        for path in (b"/health", b"/metrics", b"/nothing", b"/metadata", b"/metrics"):
            client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
            reply = read_reply(client)
            assert reply.status == (404 if path == b"/nothing" else 200)
            assert reply.header("connection") == "keep-alive"
            assert reply.header("date")


def test_requests_that_come_all_at_once_are_answered_in_order(server: Server) -> None:
    paths = [b"/health", b"/metrics", b"/nothing"] * 300
    with connected(server) as client:
        writer = threading.Thread(
            target=client.sendall, args=(b"".join(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % path for path in paths),)
        )
        writer.start()
        reader = client.makefile("rb")
        statuses: list[int] = []
        for _ in paths:
            statuses.append(int(reader.readline().split()[1]))
            length = 0
            while (line := reader.readline()) != b"\r\n":
                length = int(line.split()[1]) if line.startswith(b"content-length") else length
            reader.read(length)
        writer.join()
        reader.close()
    assert statuses == [200, 200, 404] * 300


def test_a_request_may_come_byte_by_byte(server: Server) -> None:
    with connected(server) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"\r\n" + HEALTH:
            client.sendall(bytes([byte]))
        assert read_reply(client).status == 200


@pytest.mark.parametrize("line", [b"GET /health HTTP/1.0", b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close"])
def test_who_does_not_want_to_keep_the_connection_sees_it_closed(server: Server, line: bytes) -> None:
    with connected(server) as client:
        client.sendall(line + b"\r\n\r\n")
        assert read_reply(client).header("connection") == "close"
        assert is_closed(client)


def test_head_has_no_body_and_the_next_answer_follows(server: Server) -> None:
    with connected(server) as client:
        client.sendall(b"HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n" + HEALTH)
        answers = b""
        while b'"ok"' not in answers:
            answers += client.recv(65536)
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert b"# TYPE" not in answers


def test_a_small_body_is_passed_over_and_the_next_request_answered(server: Server) -> None:
    with connected(server) as client:
        client.sendall(b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n")
        assert read_reply(client).status == 405  # the answer does not wait for the body
        client.sendall(b"x" * 60_000 + HEALTH)
        assert read_reply(client).status == 200


@pytest.mark.parametrize("after", [b"", b"\r\n"])
@pytest.mark.parametrize("body", [b"hello", b"x" * 60_000])
def test_a_connection_is_idle_when_its_body_has_come(registry: rk.Registry, body: bytes, after: bytes) -> None:
    """Nothing of a next request is there, so the deadline of a head does not run."""
    with limited(registry, Limits(head_seconds=0.2, idle_seconds=3600)) as server, connected(server) as client:
        client.sendall(b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body + after)
        assert read_reply(client).status == 405
        with connected(server) as other:
            assert is_closed(other)  # at a deadline that began later
        client.sendall(HEALTH)
        assert read_reply(client).status == 200


def test_a_malformed_head_after_a_head_request_is_answered_with_its_body(server: Server) -> None:
    with connected(server) as client:
        client.sendall(b"HEAD /health HTTP/1.1\r\nHost: a\r\n\r\nmalformed\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        answers = client.makefile("rb").read()
    assert answers.startswith(b"HTTP/1.1 200 OK")
    assert answers.endswith(b"\r\n\r\nnot an HTTP/1.1 request line\n")


def test_who_asks_whether_to_send_a_body_is_answered_and_does_not_send_it(server: Server) -> None:
    head = b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    assert exchange(server, head).status == 405


TOO_MUCH: list[tuple[bytes, int]] = [
    (b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n", 413),
    (b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 68719476736\r\n\r\n" + b"x" * 200_000, 413),
    (b"POST /metrics HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 400),
    (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 100_000 + b"\r\n", 431),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
]


@pytest.mark.parametrize(("request_bytes", "status"), TOO_MUCH)
def test_what_is_too_much_or_malformed_is_answered_and_closed(
    server: Server, registry: rk.Registry, request_bytes: bytes, status: int
) -> None:
    with connected(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(request_bytes)
        reply = read_reply(client)
        assert (reply.status, reply.header("connection")) == (status, "close")
        assert reply.header("cache-control") == "no-store"
        assert is_closed(client)
    assert registry.exporter.http_requests["other", str(status)].value == 1
    assert exchange(server, HEALTH).status == 200


def test_an_absolute_target_is_the_same_route(server: Server) -> None:
    assert exchange(server, b"GET http://anything/health HTTP/1.1\r\nHost: a\r\n\r\n").status == 200


def test_bytes_that_are_no_utf8_are_no_obstacle_and_no_token() -> None:
    registry = rk.Registry(Settings(metrics_enabled=True, metrics_token=Secret(b"s3cret")), builtin=False)
    with rk.serve(registry, port=0) as server:
        host = OnSocket(server.port)
        for value in (b"Bearer \xff", b"\xff\xfe\xfd", b"Bearer s3cret\xff", bytes(range(0x80, 0x100))):
            assert host.ask("GET", "/metrics", [(b"Authorization", value)]).status == 401
        assert host.ask("GET", "/metrics", [*bearer(), (b"X-\x7e", b"\xff"), (b"Accept", b"\xff")]).status == 200


def test_a_large_page_arrives_whole() -> None:
    with rk.serve(big(), port=0) as server:
        reply = exchange(server, METRICS.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert len(reply.body) == int(reply.header("content-length") or 0) > 10_000_000
    assert reply.body.count(b"rooms_members{") == 100_000


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Server]:
    with rk.serve(
        rk.Registry(Settings(metrics_enabled=True, metrics_token=Secret(b"s3cret")), builtin=False), port=0
    ) as server:
        yield server


PIECES = [
    b"GET ",
    b"/metrics",
    b"/health",
    b" HTTP/1.1",
    b"\r\n",
    b"\r\n\r\n",
    b"Host: a",
    b"Content-Length: ",
    b"5",
    b":",
]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=20)), max_size=12).map(b"".join))
@settings(deadline=None, max_examples=200)
def test_no_bytes_get_metrics_a_5xx_or_harm_the_server(fuzzed: Server, sent: bytes) -> None:
    with connected(fuzzed) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(65536):
                answer += part
    assert not answer or answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4"))
    assert b"HTTP/1.1 5" not in answer
    assert b"# TYPE" not in answer
    assert exchange(fuzzed, HEALTH).status == 200


# --- T16: slow clients ------------------------------------------------------------------------------------------------


def test_a_head_that_drips_in_is_cut_off_at_its_deadline(registry: rk.Registry) -> None:
    with limited(registry, Limits(head_seconds=0.2)) as server, connected(server) as client:
        with pytest.raises(ConnectionError):
            drip(client)


def test_a_body_that_never_comes_is_cut_off_too(registry: rk.Registry) -> None:
    with limited(registry, Limits(head_seconds=0.2)) as server, connected(server) as client:
        client.sendall(b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")
        assert read_reply(client).status == 405
        assert is_closed(client)


def test_an_idle_connection_is_closed_in_the_end(registry: rk.Registry) -> None:
    with limited(registry, Limits(idle_seconds=0.2)) as server, connected(server) as client:
        client.sendall(HEALTH)
        assert read_reply(client).status == 200
        assert is_closed(client)


def test_requests_without_end_delay_nobody(registry: rk.Registry) -> None:
    """Who pipelines for ever, and reads, is answered a little in each turn: others are too, and deadlines hold."""
    with limited(registry, Limits(head_seconds=0.2, connections=4)) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(flooding(server, HEALTH * 2000))
        for _ in range(5):
            assert exchange(server, HEALTH).status == 200
            assert exchange(server, METRICS).status == 200
        with connected(server) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
            assert is_closed(slow)


def test_requests_without_end_do_not_hold_up_the_end(registry: rk.Registry) -> None:
    with limited(registry, Limits()) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(flooding(server, HEALTH * 2000))
        server.close()
        assert not server._thread.is_alive()


def test_who_sends_requests_without_end_and_reads_nothing_is_cut_off(registry: rk.Registry) -> None:
    with limited(registry, Limits(head_seconds=0.2, send_seconds=0.2)) as server, connected(server) as client:
        with pytest.raises(ConnectionError):
            send_for_ever(client, HEALTH * 2000)


def test_empty_lines_without_end_are_refused_and_delay_nobody(registry: rk.Registry) -> None:
    with limited(registry, Limits()) as server, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(flooding(server, b"\r\n" * 50_000))
        assert exchange(server, HEALTH).status == 200
        assert exchange(server, b"\r\n" * 50).status == 400


def test_a_few_empty_lines_before_a_request_are_passed_over(server: Server) -> None:
    """RFC 9112, 2.2: old clients end a body with one that they do not count."""
    with connected(server) as client:
        for _ in range(3):
            client.sendall(b"\r\n" * 4 + HEALTH)
            assert read_reply(client).status == 200


def test_half_sent_requests_beyond_every_limit_delay_nobody(registry: rk.Registry) -> None:
    """Slowloris: the deadline is far away, the places are full, and who asks is answered."""
    with limited(registry, Limits(connections=16, head_seconds=3600)) as server, contextlib.ExitStack() as stack:
        threads = threading.active_count()
        slow = [stack.enter_context(connected(server)) for _ in range(200)]
        for client in slow:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\nX-Slow: ")
        for _ in range(50):
            assert exchange(server, HEALTH).status == 200
        assert threading.active_count() == threads


def test_readers_that_do_not_read_delay_nobody_and_are_cut_off() -> None:
    with limited(big(), Limits(connections=16, send_seconds=1)) as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(server)) for _ in range(12)]
        for client in slow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(METRICS)
        for client in slow:
            assert client.recv(1) == b"H"  # its answer is under way
        for _ in range(20):
            assert exchange(server, HEALTH).status == 200
        for client in slow:
            assert is_closed(client)


def test_a_scrape_that_hangs_does_not_hold_up_health(server: Server, registry: rk.Registry) -> None:
    hanging, release = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        release.wait()

    registry.add_collector(hang, name="hanging", timeout_seconds=60)
    with connected(server) as client:
        client.sendall(METRICS)
        hanging.wait()
        for _ in range(20):
            assert exchange(server, HEALTH).status == 200
        release.set()
        assert read_reply(client).status == 200


def test_an_exit_inside_of_an_answer_ends_no_worker(server: Server, registry: rk.Registry) -> None:
    leaving = [True] * 20

    def leave() -> None:
        if leaving:
            leaving.pop()
            raise SystemExit(3)

    registry.add_refresher(leave)
    assert [exchange(server, METRICS).status for _ in range(21)] == [500] * 20 + [200]


def test_more_scrapes_than_may_wait_are_told_to_come_again(registry: rk.Registry) -> None:
    hanging, release = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        release.wait()

    registry.add_collector(hang, name="hanging", timeout_seconds=60)
    with limited(registry, Limits(workers=2, waiting=3)) as server, contextlib.ExitStack() as stack:
        scrapes = [stack.enter_context(connected(server)) for _ in range(5)]
        for client in scrapes:
            client.sendall(METRICS)
            exchange(server, HEALTH)  # the server has read what came before
        reply = exchange(server, METRICS)
        assert (reply.status, reply.header("retry-after")) == (503, "1")
        release.set()
        assert [read_reply(client).status for client in scrapes] == [200] * 5


def test_clients_that_go_away_leave_nothing_behind(server: Server) -> None:
    exchange(server, METRICS)
    before = len(os.listdir("/proc/self/fd"))
    for request in (b"", b"GET", HEALTH, METRICS, METRICS * 10):
        for _ in range(20):
            with connected(server) as client:
                client.sendall(request)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
    for _ in range(200):
        exchange(server, HEALTH)
        if len(os.listdir("/proc/self/fd")) <= before:
            break
    assert len(os.listdir("/proc/self/fd")) <= before


def test_running_out_of_descriptors_is_survived() -> None:
    code = """
import resource, socket, http.client
import rkmetrics as rk
server = rk.serve(rk.Registry(rk.Settings(), builtin=False), port=0)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
clients = []
try:
    while True:
        clients.append(socket.create_connection(("127.0.0.1", server.port)))
except OSError as error:
    assert error.errno == 24, error
for client in clients[:20]:
    client.close()
for _ in range(20):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
server.close()
print("served")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("served\n", 0), done.stderr


# --- starting ---------------------------------------------------------------------------------------------------------


def test_port_zero_takes_a_free_port_and_tells_it(registry: rk.Registry) -> None:
    with rk.serve(registry, port=0) as one, rk.serve(registry, port=0) as two:
        assert one.port != two.port
        assert one.url == f"http://127.0.0.1:{one.port}"
        assert exchange(one, METRICS).status == exchange(two, METRICS).status == 200


def test_settings_give_host_and_port(registry: rk.Registry) -> None:
    with rk.serve(registry, port=0) as server:
        free = server.port
    with rk.serve(rk.Registry(Settings(host="127.0.0.2", port=free), builtin=False)) as server:
        assert (server.host, server.port) == ("127.0.0.2", free)


def test_a_port_that_is_taken_is_said_in_a_sentence(server: Server, registry: rk.Registry) -> None:
    with pytest.raises(ServeError, match=rf"port {server.port}: the port is taken.*RKMETRICS_PORT"):
        rk.serve(registry, port=server.port)


@pytest.mark.parametrize(
    ("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", -1), ("127.0.0.1", 65536), ("\udc80", 0), ("no.such.invalid", 0)]
)
def test_an_address_that_cannot_be_is_a_serve_error(registry: rk.Registry, host: str, port: int) -> None:
    with pytest.raises(ServeError, match="cannot serve on"):
        rk.serve(registry, port=port, host=host)


def test_a_port_is_free_again_after_close(registry: rk.Registry) -> None:
    with rk.serve(registry, port=0) as server:
        assert exchange(server, METRICS).status == 200
    with rk.serve(registry, port=server.port) as again:
        assert again.port == server.port


def test_without_a_thread_serving_is_a_serve_error_and_the_port_is_free() -> None:
    code = """
import threading
import rkmetrics as rk
registry = rk.Registry(rk.Settings(), builtin=False)
with rk.serve(registry, port=0) as server:
    port = server.port
threading.stack_size(1 << 50)  # more than any address space has
try:
    rk.serve(registry, port=port)
except rk.errors.ServeError as error:
    print(error)
threading.stack_size(0)
rk.serve(registry, port=port).close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.startswith("cannot serve: can't start new thread"), done.stderr
    assert done.returncode == 0, done.stderr


def test_without_a_worker_a_scrape_is_told_to_come_again_and_health_is_answered() -> None:
    code = """
import http.client, threading
import rkmetrics as rk
server = rk.serve(rk.Registry(rk.Settings(metrics_enabled=True, metrics_access="open")), port=0)
def show():
    for path in ("/health", "/metrics", "/vitals", "/telemetry"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", path)
        print(connection.getresponse().status, end=" ")
        connection.close()
threading.stack_size(1 << 50)  # more than any address space has
show()
threading.stack_size(0)
show()
server.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["200", "503", "503", "503", "200", "200", "200", "200"], done.stderr


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_it_serves_on_ipv6(registry: rk.Registry) -> None:
    try:
        server = rk.serve(registry, port=0, host="::1")
    except ServeError as error:
        pytest.skip(str(error))
    with server, socket.create_connection(("::1", server.port), timeout=10) as client:
        assert server.url == f"http://[::1]:{server.port}"
        client.sendall(HEALTH)
        assert read_reply(client).status == 200


def test_serving_starts_health_unless_the_program_does_so_itself(registry: rk.Registry) -> None:
    with rk.serve(registry, port=0) as server:
        assert exchange(server, HEALTH).status == 200
    registry = rk.Registry(OPEN, builtin=False)
    registry.health.begin_start()
    with rk.serve(registry, port=0) as server:
        reply = exchange(server, HEALTH)
        assert (reply.status, json.loads(reply.body)["status"]) == (503, "starting")


# --- the gate, and open on loopback -----------------------------------------------------------------------------------


def test_a_closed_server_says_how_to_open_it() -> None:
    with rk.serve(rk.Registry(Settings(), builtin=False), port=0) as server:
        reply = exchange(server, METRICS)
    assert reply.status == 403
    assert reply.body.startswith(b"metrics not enabled\n")
    for word in (b"METRICS_ENABLED=1", b"METRICS_TOKEN", b"--open"):
        assert word in reply.body


def test_open_on_loopback_asks_for_no_token_and_answers_to_loopback_names_only() -> None:
    registry = rk.Registry(Settings(metrics_enabled=True, metrics_token=Secret(b"s3cret")), builtin=False)
    with rk.serve(registry, port=0, open_loopback=True) as server:
        for host in (b"localhost", b"127.0.0.1:%d" % server.port):
            assert exchange(server, METRICS.replace(b"Host: a", b"Host: " + host)).status == 200
        reply = exchange(server, METRICS.replace(b"Host: a", b"Host: rebound.example"))
        assert (reply.status, b"localhost" in reply.body) == (403, True)
        assert exchange(server, HEALTH).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_open_anywhere_else_is_refused(registry: rk.Registry, host: str) -> None:
    with pytest.raises(ServeError, match=r"no loopback address|cannot serve"):
        rk.serve(registry, port=0, host=host, open_loopback=True)


def test_any_address_follows_the_same_gate() -> None:
    guarded = rk.Registry(Settings(metrics_enabled=True, metrics_token=Secret(b"s3cret")), builtin=False)
    with rk.serve(guarded, port=0, host="0.0.0.0") as server:
        assert exchange(server, METRICS).status == 401
    with rk.serve(rk.Registry(OPEN, builtin=False), port=0, host="0.0.0.0") as server:
        assert exchange(server, METRICS).status == 200


# --- the end ----------------------------------------------------------------------------------------------------------


def test_close_ends_the_threads_and_the_sockets(registry: rk.Registry) -> None:
    before, threads = len(os.listdir("/proc/self/fd")), threading.enumerate()
    server = rk.serve(registry, port=0)
    with connected(server) as idle, connected(server) as half:
        idle.sendall(METRICS)
        assert read_reply(idle).status == 200
        half.sendall(b"GET /")
        server.close()
        server.close()
        assert is_closed(idle)
        assert is_closed(half)
    assert not server.running
    assert "closed" in repr(server)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=10)
    for thread in threading.enumerate():
        if thread not in threads and thread.name.startswith("rkmetrics-serve"):
            thread.join(10)
    # Threads of other tests may end meanwhile; what matters is that none is new.
    assert [thread for thread in threading.enumerate() if thread not in threads] == []
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_scrape_under_way_is_answered_before_the_end(registry: rk.Registry) -> None:
    hanging, release = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        release.wait()

    registry.add_collector(hang, name="hanging", timeout_seconds=60)
    server = rk.serve(registry, port=0)
    with connected(server) as client:
        client.sendall(METRICS)
        hanging.wait()
        closing = threading.Thread(target=server.close)
        closing.start()
        while server.running:
            time.sleep(0.001)
        release.set()
        reply = read_reply(client)
        assert (reply.status, reply.header("connection")) == (200, "close")
        closing.join()


def test_a_client_that_never_reads_does_not_hold_up_the_end() -> None:
    with limited(big(), Limits(grace_seconds=0.2)) as server, connected(server) as client:
        client.sendall(METRICS)
        assert client.recv(1) == b"H"
        server.close()
        assert not server.running


def test_a_program_that_ends_does_not_wait_for_its_server() -> None:
    code = (
        "import rkmetrics as rk, socket\n"
        "server = rk.serve(rk.Registry(rk.Settings(), builtin=False), port=0)\n"
        "client = socket.create_connection(('127.0.0.1', server.port))\n"
        "client.sendall(b'GET /metadata')\n"
        "print('ended')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("ended\n", "")


# --- forks ------------------------------------------------------------------------------------------------------------


def in_child(act: Callable[[], object], out: Path) -> str:
    """Run act in a forked child; return what it returned or raised, as text."""
    pid = os.fork()
    if pid == 0:
        try:
            said = repr(act())
        except BaseException as error:
            said = repr(error)
        out.write_text(said)
        os._exit(0)
    os.waitpid(pid, 0)
    return out.read_text()


def serve_and_ask() -> int:
    with rk.serve(rk.Registry(OPEN, builtin=False), port=0) as own:
        return exchange(own, METRICS).status


@contextlib.contextmanager
def child_that_lives_on(*unused: socket.socket) -> Iterator[None]:
    """A forked child, from when it runs until the block ends."""
    alive, born = os.pipe()
    ended, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        for each in unused:
            each.close()
        os.close(end)
        os.write(born, b"!")
        os.read(ended, 1)
        os._exit(0)
    os.read(alive, 1)
    try:
        yield
    finally:
        os.close(end)
        os.waitpid(pid, 0)
        for descriptor in (alive, born, ended):
            os.close(descriptor)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
class TestFork:
    """The children of a process that serves (T29)."""

    def test_a_child_has_no_server_and_its_close_touches_nothing(self, server: Server, tmp_path: Path) -> None:
        def close_it() -> str:
            server.close()
            return repr(server)

        assert in_child(close_it, tmp_path / "out") == repr(f"<Server {server.url} closed>")
        assert server.running
        assert exchange(server, METRICS).status == 200

    def test_a_child_may_serve_by_itself(self, server: Server, tmp_path: Path) -> None:
        assert in_child(serve_and_ask, tmp_path / "out") == "200"
        assert exchange(server, METRICS).status == 200

    def test_a_child_holds_no_connection_open(self, server: Server) -> None:
        """The client sees the end of an answer though a child, forked meanwhile, lives on."""
        with connected(server) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n")
            exchange(server, HEALTH)
            with child_that_lives_on(client):
                client.sendall(b"Connection: close\r\n\r\n")
                assert read_reply(client).status == 200
                assert is_closed(client)

    def test_a_child_that_lives_on_does_not_keep_the_port(self, registry: rk.Registry) -> None:
        server = rk.serve(registry, port=0)
        with child_that_lives_on():
            server.close()
            with rk.serve(registry, port=server.port) as again:
                assert exchange(again, METRICS).status == 200
