"""The http plane on real sockets: what its settings do, and other people's clients and servers."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest

import rkmetrics as rk
from rkmetrics.errors import RpcRefusedError, RpcTimeoutError, RpcUnreachableError, ServeError
from rkmetrics.planes.http import HttpClient, HttpServer
from tests.contracts.peers import free_port, peers_of, until
from tests.hostile import answering, response, serving
from tests.planes.test_http import frame
from tests.services.http_peers import (
    PREFACE,
    attacked,
    honest,
    no_pools,
    over_either,
    payload,
    pools,
    port_of,
    post,
    said,
)

# --- calls ------------------------------------------------------------------------------------------------------------


@over_either
async def test_calls_over_either_version(prior: bool) -> None:
    async with peers_of("http", http2_prior_knowledge=prior) as peers:
        await peers.serve(honest=honest)
        trace = "00-c3d24ab1c7b61ed16507aec3031220c9-73a6176ac9b87120-01"
        assert await peers.items("honest", {"a": 1}, traceparent=trace) == [{"got": {"a": 1}}, trace]
        found = await asyncio.gather(*(peers.items("honest", at) for at in range(300)))
        assert [each[0]["got"] for each in found] == list(range(300))
        large = "x" * 5_000_000
        assert (await peers.items("honest", large))[0] == {"got": 5_000_000}
        assert peers.called == {"ok": 302}


@over_either
async def test_the_url_says_nothing_of_the_instance(prior: bool) -> None:
    async with peers_of("http", http2_prior_knowledge=prior, http_rpc_root_path="/x/y/") as peers:
        await peers.serve(honest=honest)
        kind, url = peers.instance("honest").transport
        assert (kind, url) == ("http", f"http://127.0.0.1:{port_of(peers)}/x/y/honest")
        assert (await peers.items("honest", 1))[0] == {"got": 1}
        other = peers.instance("honest")._replace(transport=(kind, url.replace("/x/y", "/v1/rpc")))
        with pytest.raises(RpcRefusedError, match=r"Endpoint not found \(status 404\)") as refused:
            await peers.clients[0].call(other, 1)
        assert not refused.value.delivered


async def test_the_root_may_be_the_root() -> None:
    async with peers_of("http", http_rpc_root_path="/") as peers:
        await peers.serve(honest=honest)
        assert peers.instance("honest").transport[1].endswith(f"{port_of(peers)}/honest")
        assert (await peers.items("honest", 1))[0] == {"got": 1}


async def test_a_taken_port_is_told_with_the_variable_to_set() -> None:
    async with peers_of("http") as peers:
        await peers.serve(honest=honest)
        taken = rk.Settings(http_rpc_host="127.0.0.1", http_rpc_port=port_of(peers))
        second = HttpServer(rk.Registry(taken, builtin=False), instance_id=1)
        second.endpoint("backend.honest", honest)
        with pytest.raises(
            ServeError, match=rf"127.0.0.1:{port_of(peers)}.*set DYN_HTTP_RPC_HOST and DYN_HTTP_RPC_PORT"
        ):
            await second.start()
        assert list(second.endpoints) != []
        assert not second.started


@pytest.mark.parametrize("host", ["0.0.0.0", "*"])
async def test_what_is_advertised_can_be_reached(host: str) -> None:
    settings = {"http_rpc_host": host, "advertise_address": "127.0.0.1:3000"}
    async with peers_of("http", **settings) as peers:
        server = cast("HttpServer", await peers.serve(honest=honest))
        assert server.address == f"127.0.0.1:{port_of(peers)}"
        assert port_of(peers) not in (0, 3000)
        assert (await peers.items("honest", 1))[0] == {"got": 1}


# --- what a client hears ----------------------------------------------------------------------------------------------


@over_either
async def test_nobody_there_means_not_delivered(prior: bool) -> None:
    async with peers_of("http", http2_prior_knowledge=prior) as peers:
        await peers.serve(honest=honest)
        gone = peers.instance("honest")._replace(transport=("http", f"http://127.0.0.1:{free_port()}/v1/rpc/honest"))
        client = await peers.client()
        with pytest.raises(RpcUnreachableError, match="no connection") as unreachable:
            await client.call(gone, 1)
        assert not unreachable.value.delivered


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1:1/a", "127.0.0.1:1/a", "http://127.0.0.1/a", "http://127.0.0.1:99999/a", "http://a:1/b\r\nc"],
)
async def test_what_is_no_url_of_an_endpoint_is_not_called(url: str) -> None:
    async with peers_of("http") as peers:
        await peers.serve(honest=honest)
        client = await peers.client()
        for transport, match in ((("http", url), "expected http://host:port/path"), (("tcp", "a:1/b"), "speaks http")):
            with pytest.raises(RpcUnreachableError, match=match) as unreachable:
                await client.call(peers.instance("honest")._replace(transport=transport), 1)
            assert not unreachable.value.delivered


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)


async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request, and end the connection under the next one."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(response("404 Not Found", b"first"))
    await reader.readuntil(b"\r\n\r\n")


@over_either
async def test_a_request_without_an_acknowledgement_may_have_been_delivered(prior: bool) -> None:
    """Also where the connection was used before: a request is sent once, as a handler must not run twice."""
    async with peers_of("http", http2_prior_knowledge=prior) as peers:
        await peers.serve(honest=honest)
        client = await peers.client()
        async with serving(hang_up) as peer:
            at = peers.instance("honest")._replace(transport=("http", f"{peer.url}/v1/rpc/honest"))
            with pytest.raises(RpcUnreachableError) as unreachable:
                await client.call(at, 1)
            assert unreachable.value.delivered
            if not prior:
                peer.behave = once
                with pytest.raises(RpcRefusedError, match="first"):
                    await client.call(at, 1)
                with pytest.raises(RpcUnreachableError, match="no acknowledgement") as unreachable:
                    await client.call(at, 1)
                assert unreachable.value.delivered
                assert len(peer.requests) == 2


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (
            response("500 Internal Server Error", b"Trace\x1b[31m\r\nback\0"),
            r"^ns.backend.honest at .*: Trace \[31m  back \(status 500\)$",
        ),
        (response("503 Service Unavailable"), r"refused \(status 503\)"),
        (response("302 Found", b"", b"location: http://127.0.0.1:1/"), r"refused \(status 302\)"),
        (response("418 I'm a teapot", b"\xff" * 10), "\ufffd" * 10),
    ],
)
async def test_what_a_server_says_of_a_refusal_is_shown_clean(answer: bytes, match: str) -> None:
    async with peers_of("http") as peers:
        await peers.serve(honest=honest)
        client = await peers.client()
        async with serving(answering(answer)) as peer:
            at = peers.instance("honest")._replace(transport=("http", f"{peer.url}/v1/rpc/honest"))
            with pytest.raises(RpcRefusedError, match=match) as refused:
                await client.call(at, 1)
            assert not refused.value.delivered
            assert len(str(refused.value)) < 1_200


@pytest.mark.parametrize(
    "answer", [b"\x16\x03\x01", b"HTTP/1.1 202 Accepted\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n"]
)
@over_either
async def test_a_server_that_speaks_otherwise_is_told_apart(answer: bytes, prior: bool) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(answer)
        await reader.read()

    async with peers_of("http", http2_prior_knowledge=prior, http_request_timeout_seconds=60) as peers:
        await peers.serve(honest=honest)
        client = await peers.client()
        async with serving(behave) as peer:
            at = peers.instance("honest")._replace(transport=("http", f"{peer.url}/v1/rpc/honest"))
            if prior and len(answer) < 9:
                return  # too short for a frame: it may still become one
            with pytest.raises(RpcUnreachableError):
                await client.call(at, 1)


# --- settings ---------------------------------------------------------------------------------------------------------


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@over_either
async def test_dyn_http_request_timeout(prior: bool) -> None:
    for seconds in (0.05, 0.2):
        async with peers_of("http", http2_prior_knowledge=prior, http_request_timeout_seconds=seconds) as peers:
            await peers.serve(honest=honest)
            client = await peers.client()
            async with serving(silent) as peer:
                at = peers.instance("honest")._replace(transport=("http", f"{peer.url}/v1/rpc/honest"))
                with pytest.raises(RpcTimeoutError, match=f"no acknowledgement in {seconds:g} s"):
                    await client.call(at, 1)
                if not prior:  # what does not answer is no longer waited for
                    await until(partial(no_pools, client))


@pytest.mark.parametrize("most", [0, 2, 100])
async def test_dyn_http2_pool_max_idle_per_host(most: int) -> None:
    together = asyncio.Barrier(6)

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await together.wait()  # so that each takes a connection of its own
        writer.write(response("404 Not Found"))
        await reader.read()

    async with peers_of("http", http2_pool_max_idle_per_host=most) as peers, serving(behave) as peer:
        await peers.serve(honest=honest)
        client = await peers.client()
        at = peers.instance("honest")._replace(transport=("http", f"{peer.url}/v1/rpc/honest"))
        found = await asyncio.gather(*(client.call(at, 1) for _ in range(6)), return_exceptions=True)
        assert [type(each) for each in found] == [RpcRefusedError] * 6
        assert (peer.connections, pools(client)) == (6, min(most, 6))


@pytest.mark.parametrize("most", [0, 1, 100])
async def test_dyn_http2_pool_max_idle_per_host_over_http_2(most: int) -> None:
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    async with peers_of("http", http2_prior_knowledge=True, http2_pool_max_idle_per_host=most) as peers:
        await peers.serve(honest=honest)
        await asyncio.gather(*(peers.items("honest", at) for at in range(6)))
        assert pools(peers.clients[0]) == min(most, 1)


@over_either
async def test_dyn_http2_pool_idle_timeout_secs(prior: bool) -> None:
    short = {
        "http2_pool_idle_timeout_seconds": 0.05,
        "http2_keep_alive_interval_seconds": 0.01,
    }  # pings count for nothing
    async with peers_of("http", http2_prior_knowledge=prior, **short) as peers:
        await peers.serve(honest=honest)
        await peers.items("honest", 1)
        await until(lambda: not pools(peers.clients[0]))
        await until(lambda: not peers.count("server_connections"))
        await peers.items("honest", 1)
    async with peers_of("http", http2_prior_knowledge=prior, http2_pool_idle_timeout_seconds=600) as peers:
        await peers.serve(honest=honest)
        await peers.items("honest", 1)
        await asyncio.sleep(0.2)
        assert pools(peers.clients[0]) == 1


async def test_dyn_http2_prior_knowledge() -> None:
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    for prior, begin in ((False, b"POST /v1/rpc/honest HTTP/1.1"), (True, b"PRI * HTTP/2.0")):
        got: list[bytes] = []

        async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, got: list[bytes] = got) -> None:
            got.append(await reader.readuntil(b"\r\n"))

        async with peers_of("http", http2_prior_knowledge=prior) as peers, serving(note) as peer:
            await peers.serve(honest=honest)
            client = await peers.client()
            at = peers.instance("honest")._replace(transport=("http", f"{peer.url}/v1/rpc/honest"))
            with pytest.raises(RpcUnreachableError):
                await client.call(at, 1)
        assert got == [begin + b"\r\n"]


async def test_dyn_http2_keep_alive_at_the_server() -> None:
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    times = {"http2_keep_alive_interval_seconds": 0.05, "http2_keep_alive_timeout_seconds": 0.05}
    async with peers_of("http", **times) as peers:
        await peers.serve(honest=honest)
        assert frame(6, b"rkmetric") in await said(port_of(peers), PREFACE)
        assert peers.count("refused_total", reason="too_slow") == 1
    async with peers_of("http", http2_prior_knowledge=True, **times) as peers:  # a client that answers stays
        await peers.serve(honest=honest)
        await peers.items("honest", 1)
        await asyncio.sleep(0.3)
        assert pools(peers.clients[0]) == 1


async def test_dyn_http2_keep_alive_at_the_client() -> None:
    """Long before the call would time out."""
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    times = {"http2_keep_alive_interval_seconds": 0.05, "http2_keep_alive_timeout_seconds": 0.05}
    async with peers_of("http", http2_prior_knowledge=True, http_request_timeout_seconds=600, **times) as peers:
        await peers.serve(honest=honest)
        client = await peers.client()
        async with serving(silent) as peer:
            at = peers.instance("honest")._replace(transport=("http", f"{peer.url}/v1/rpc/honest"))
            with pytest.raises(RpcUnreachableError, match="does not answer a PING") as unreachable:
                await client.call(at, 1)
            assert unreachable.value.delivered


async def test_dyn_http2_max_concurrent_streams() -> None:
    """A client of ours never has more at once, however many calls it makes."""
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    async with peers_of("http", http2_prior_knowledge=True, http2_max_concurrent_streams=2) as peers:
        await peers.serve(honest=honest)
        await peers.items("honest", 1)  # the server's settings are known by then
        large = "x" * 200_000
        found = await asyncio.gather(*(peers.items("honest", large) for _ in range(20)))
        assert [each[0] for each in found] == [{"got": 200_000}] * 20
        assert peers.count("refused_total") == 0


@over_either
async def test_dyn_tcp_max_message_size_is_the_limit_of_a_body(prior: bool) -> None:
    async with peers_of("http", http2_prior_knowledge=prior, tcp_max_message_size_bytes=10_000) as peers:
        await peers.serve(honest=honest)
        assert (await peers.items("honest", "x" * 5_000))[0] == {"got": 5_000}
        with pytest.raises(RpcRefusedError, match="DYN_TCP_MAX_MESSAGE_SIZE"):
            await peers.items("honest", "x" * 20_000)
        head = b"POST /v1/rpc/honest HTTP/1.1\r\nhost: a\r\ncontent-length: 10001\r\n\r\n"
        answer = await said(port_of(peers), head)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"\r\nconnection: close\r\n" in answer
        assert peers.count("refused_total", reason="too_large") == 1


# --- other people's clients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "header", "reason"),
    [
        (post(payload()), 202, (b"content-length", b"0"), ""),
        (post(payload(), path="/v1/rpc/other"), 404, (b"content-length", b"18"), "unknown_endpoint"),
        (post(payload(), path="/v1/rpc/honest/"), 404, None, "unknown_endpoint"),
        (post(payload(), path="/v1/rpc/"), 404, None, "unknown_endpoint"),
        (post(payload(), path="/v1/rpc/hone%73t"), 404, None, "unknown_endpoint"),
        (post(payload(), path="/health"), 404, None, "unknown_endpoint"),
        (post(b"", method="GET"), 405, (b"allow", b"POST"), "malformed"),
        (post(b"", method="DELETE"), 405, (b"allow", b"POST"), "malformed"),
        (post(b"", method="GET", path="/health"), 404, None, "unknown_endpoint"),
        (post(b""), 400, None, "malformed"),
        (post(b"garbage"), 400, None, "malformed"),
        (post(payload(), "origin: https://evil.example"), 403, None, "forbidden"),
        (
            post(payload(), "transfer-encoding: chunked", "content-length: 3"),
            400,
            (b"connection", b"close"),
            "malformed",
        ),
        (post(payload(), "x: y\r\n z"), 400, (b"connection", b"close"), "malformed"),
    ],
)
async def test_h11_reads_each_answer(data: bytes, status: int, header: tuple[bytes, bytes] | None, reason: str) -> None:
    """h11 is another reader of the same standard, and a strict one."""
    h11: Any = pytest.importorskip("h11", reason="the other reader comes with the tests' own packages")
    async with peers_of("http") as peers:
        await peers.serve(honest=honest)
        head = await said(port_of(peers), data, until_end=False)
        reader = h11.Connection(h11.CLIENT)
        reader.send(
            h11.Request(
                method="GET" if b"GET" in data[:4] else "POST",
                target="/",
                headers=[("host", "a"), ("content-length", "0")],
            )
        )
        reader.send(h11.EndOfMessage())
        reader.receive_data(head)
        answer = reader.next_event()
        assert isinstance(answer, h11.Response)
        assert answer.status_code == status
        assert header is None or header in list(answer.headers)
        assert peers.count("refused_total") == (1 if reason else 0)
        assert peers.count("refused_total", reason=reason or "flood") == (1 if reason else 0)


async def test_busy_and_draining_say_when_to_come_back() -> None:
    async with peers_of("http") as peers:
        blocked = asyncio.Event()

        async def block(request: Any) -> str:
            await blocked.wait()
            return "done"

        server = await peers.serve(honest=block, requests_limit=1)
        call = asyncio.create_task(peers.items("honest", 1))
        await until(lambda: peers.count("server_requests_in_flight"))
        busy = await said(port_of(peers), post(payload()), until_end=False)
        assert busy.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in busy
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(peers))
        writer.write(post(payload()))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
        await reader.readexactly(len("Too many requests"))
        stopping = asyncio.create_task(server.stop(60))
        await until(lambda: cast("HttpServer", server).draining)
        writer.write(post(payload()))
        answer = await reader.read()  # to the end of the connection
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answer
        assert b"\r\nconnection: close\r\n" in answer
        assert answer.endswith(b"Draining")
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port_of(peers))
        blocked.set()
        assert await call == ["done"]
        assert await stopping
        writer.close()


async def test_a_drain_is_told_to_clients_of_http_2() -> None:
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    async with peers_of("http", http2_prior_knowledge=True) as peers:
        blocked = asyncio.Event()

        async def block(request: Any) -> str:
            await blocked.wait()
            return "done"

        server = await peers.serve(honest=block)
        call = asyncio.create_task(peers.items("honest", 1))
        await until(lambda: peers.count("server_requests_in_flight"))
        assert pools(peers.clients[0]) == 1
        stopping = asyncio.create_task(server.stop(60))
        await until(lambda: not pools(peers.clients[0]))
        with pytest.raises(RpcUnreachableError) as unreachable:
            await peers.call("honest", 2)
        assert not unreachable.value.delivered
        blocked.set()
        assert await call == ["done"]
        assert await stopping


async def test_a_connection_that_takes_no_more_ends_with_its_last_request_or_its_client() -> None:
    pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    ended = 0

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal ended
        await reader.read(10)
        writer.write(frame(4) + frame(7, b"\x7f\xff\xff\xff\0\0\0\0"))
        await reader.read()
        ended += 1

    async with serving(leave) as peer:
        for seconds in (0.1, 600):
            async with peers_of("http", http2_prior_knowledge=True, http_request_timeout_seconds=seconds) as peers:
                await peers.serve(honest=honest)
                client = await peers.client()
                at = peers.instance("honest")._replace(transport=("http", f"{peer.url}/v1/rpc/honest"))
                call = asyncio.create_task(client.call(at, 1))
                await until(lambda: peer.connections > ended)
                if seconds < 1:
                    with pytest.raises(RpcTimeoutError):
                        await call
                    await until(lambda: ended)
                else:
                    await until(partial(no_pools, client))
                    await client.close()
                    with pytest.raises(RpcUnreachableError, match="closed"):
                        await call
            await until(lambda: ended == peer.connections)
    assert ended == 2


async def test_addresses_of_ipv6() -> None:
    try:
        (await asyncio.start_server(lambda *_: None, "::1", 0)).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    async with peers_of("http", http_rpc_host="::1") as peers:
        await peers.serve(honest=honest)
        assert peers.instance("honest").transport[1].startswith("http://[::1]:")
        assert (await peers.items("honest", 1))[0] == {"got": 1}


CURL = shutil.which("curl")


@pytest.mark.skipif(CURL is None, reason="curl is not installed; apt-get install curl")
@pytest.mark.parametrize("flag", ["--http1.1", "--http1.0", "--http2-prior-knowledge"])
async def test_curl_is_acknowledged(flag: str, tmp_path: Any) -> None:
    """Real clients of each version, nghttp2 among them; a large body makes curl ask first (100-continue)."""
    assert CURL is not None
    if "http2" in flag:
        pytest.importorskip("h2", reason="HTTP/2: pip install 'rkmetrics[http]'")
    async with peers_of("http") as peers:
        await peers.serve(honest=honest)
        for size, root, expected in ((10, "/v1/rpc", "202"), (3_000_000, "/v1/rpc", "202"), (10, "/v2", "404")):
            body = tmp_path / "body"
            body.write_bytes(payload(json.dumps("x" * size).encode()))
            url = f"http://127.0.0.1:{port_of(peers)}{root}/honest"
            command = [
                CURL,
                "-sS",
                flag,
                "-o",
                "/dev/null",
                "-w",
                "%{http_code} %{http_version}",
                "--data-binary",
                f"@{body}",
                url,
            ]
            found = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
            version = {"--http1.1": "1.1", "--http1.0": "1.1", "--http2-prior-knowledge": "2"}[flag]
            assert (found.stdout, found.stderr) == (f"{expected} {version}", "")


async def test_a_server_of_uvicorn_is_called() -> None:
    """Another server than ours: it acknowledges, keeps connections, and refuses."""
    uvicorn = pytest.importorskip("uvicorn")
    got: list[tuple[str, bytes, dict[bytes, bytes]]] = []

    async def app(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        got.append((scope["path"], body, dict(scope["headers"])))
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"busy"})

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", log_level="error"))
    server.install_signal_handlers = lambda: None
    task = asyncio.create_task(server._serve())
    try:
        await until(lambda: server.started)
        async with peers_of("http") as peers:
            await peers.serve(honest=honest)
            client = await peers.client()
            at = peers.instance("honest")._replace(transport=("http", f"http://127.0.0.1:{port}/v1/rpc/honest"))
            for _ in range(3):
                with pytest.raises(RpcRefusedError, match=r"busy \(status 503\)"):
                    await client.call(at, {"a": 1})
            assert pools(client) == 1
    finally:
        server.should_exit = True
        await task
    assert [each[0] for each in got] == ["/v1/rpc/honest"] * 3
    assert {each[2][b"content-type"] for each in got} == {b"application/octet-stream"}
    assert all(each[1].endswith(b'{"a":1}') for each in got)


# --- without the extra ---


async def test_without_h2_its_preface_is_answered_in_http_1_and_said_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "h2", None)
    for module in [name for name in sys.modules if name.startswith("h2.") or name == "rkmetrics.planes.http2"]:
        monkeypatch.delitem(sys.modules, module)
    async with attacked() as under:
        assert (await said(under.port, PREFACE)).startswith(b"HTTP/1.1 400 ")
        await under.serves()
    assert "pip install 'rkmetrics[http]'" in caplog.text


def test_a_client_of_http_2_without_h2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h2", None)
    for module in [name for name in sys.modules if name.startswith("h2.") or name == "rkmetrics.planes.http2"]:
        monkeypatch.delitem(sys.modules, module)
    registry = rk.Registry(rk.Settings(http2_prior_knowledge=True), builtin=False)
    with pytest.raises(rk.MissingExtraError, match=r"rkmetrics\[http\]"):
        HttpClient(registry)
