"""A child that is forked while a server and a client run has neither, and holds nothing of the parent's open."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = '''
import asyncio, os, socket, sys
import rkmetrics as rk
from rkmetrics.catalogue.planes import Plane, RpcCalling, RpcIntake, RpcServing
from rkmetrics.errors import RpcError
from rkmetrics.planes.tcp import TcpClient, TcpServer

registry = rk.Registry(rk.Settings(tcp_rpc_host="127.0.0.1"), builtin=False)
go_on = asyncio.Event()

async def echo(request):
    return request

async def wait(request):
    yield 1
    await go_on.wait()
    yield 2

def make():
    server = TcpServer(registry, instance_id=7)
    server.endpoint("backend.echo", echo)
    server.endpoint("backend.wait", wait)
    return server

def sockets():
    """How many descriptors are sockets."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
        except OSError:
            pass
    return found

def child(server, client, instances, before):
    """In the child: a loop of its own, and its own client calls the parent; then its own server."""
    held = sockets()
    gauges = [registry.bind(RpcIntake).connections[Plane.TCP].value,
              registry.bind(RpcServing, actor_name="backend").in_flight[Plane.TCP].value,
              registry.bind(RpcCalling, actor_name="backend").in_flight[Plane.TCP].value]

    async def run():
        assert not server.started
        assert await (await client.call(instances["echo"], "from the child")).one() == "from the child"
        await client.close()
        async with server:
            (mine,) = [each for each in server.instances() if each.endpoint == "echo"]
            assert mine.transport != instances["echo"].transport
            async with TcpClient(registry) as other:
                assert await (await other.call(mine, "mine")).one() == "mine"

    asyncio.run(run())
    return held, gauges

async def main():
    server, client = make(), TcpClient(registry)
    await server.start()
    instances = {each.endpoint: each for each in server.instances()}
    host, port = server.address.split(":")
    response = await client.call(instances["wait"], {})
    assert await anext(aiter(response)) == 1
    stranger = socket.create_connection((host, int(port)))
    await asyncio.sleep(0.05)
    before = sockets()
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            stranger.close()
            asyncio.set_event_loop(None)
            held, gauges = child(server, client, instances, before)
            assert held <= 2, f"{held} sockets of {before}"  # the loop's own pair
            assert gauges == [0, 0, 0], gauges
            os.write(tell, b"y")
            signal = os.read(told_child, 1)  # lives until the parent has seen that it holds nothing
            os._exit(0)
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr, flush=True)
            os.write(tell, b"n")
            os._exit(1)
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(None, os.read, told, 1) == b"y"
    go_on.set()
    assert [item async for item in response] == [2]  # the child read nothing of it
    assert await (await client.call(instances["echo"], "parent")).one() == "parent"
    await client.close()
    assert await server.stop(5)
    stranger.setblocking(False)
    assert await asyncio.wait_for(loop.sock_recv(stranger, 1), 10) == b""  # the parent's end is the end
    try:
        socket.create_connection((host, int(port)), 5)
    except ConnectionRefusedError:
        print("refused")
    await make().start()
    os.write(tell_child, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    print("done")

told_child, tell_child = os.pipe()
asyncio.run(main())
'''


def test_a_forked_child_has_neither_and_holds_nothing_open() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (run.stdout, run.returncode) == ("refused\ndone\n", 0), run.stderr


def test_who_is_collected_is_no_longer_asked() -> None:
    import gc

    from rkmetrics.lifetime import PROCESS
    from rkmetrics.planes.fork import at_fork

    class Owner:
        def forked(self) -> None:
            raise AssertionError

    before = len(PROCESS._running)
    owner = Owner()
    at_fork(owner, owner.forked)
    assert len(PROCESS._running) == before + 1
    del owner
    gc.collect()
    assert len(PROCESS._running) == before
