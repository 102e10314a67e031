"""The client, the registrar and the watcher at a real etcd, and what goes wrong there (reliability: F8, F9, R12)."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.etcd import Etcd as EtcdCells
from rkmetrics.catalogue.etcd import ResyncReason, StepOutcome
from rkmetrics.discovery.base import Backend, SourceName
from rkmetrics.discovery.etcd import EtcdSource, prefix_of, registrar
from rkmetrics.errors import CompactedError, EtcdUnavailableError, LeaseLostError
from rkmetrics.etcd.client import Etcd
from rkmetrics.etcd.registrar import EtcdRegistrar
from rkmetrics.etcd.watcher import EtcdWatcher
from rkmetrics.settings import Settings
from tests.hostile import until
from tests.services.etcd_server import EtcdServer, cable

MakeEtcd = Callable[..., EtcdServer]
LINES = 15  # R12: of the log, for an outage
_numbers = count()


@pytest.fixture
def prefix() -> str:
    """Keys of a test's own."""
    return f"test-{os.getpid()}-{next(_numbers)}/"


@pytest.fixture
def client(etcd_server: EtcdServer) -> Etcd:
    return Etcd([etcd_server.url])


@pytest.fixture
def metrics() -> EtcdCells:
    return rk.Registry(Settings(), builtin=False).bind(EtcdCells)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1, signed by itself, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate of this test, and is not here")
    both = tmp_path_factory.mktemp("tls") / "both.pem"
    command = [
        openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
    ]  # fmt: skip
    made = subprocess.run([*command, "-keyout", "-", "-out", "-"], check=True, capture_output=True)
    both.write_bytes(made.stdout)
    return both


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.items: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.lists = 0

    def on_put(self, key: str, value: bytes) -> None:
        self.items[key] = value
        self.calls.append(("put", key))

    def on_delete(self, key: str) -> None:
        del self.items[key]
        self.calls.append(("delete", key))

    def on_list(self, items: Mapping[str, bytes]) -> None:
        assert items == self.items
        self.lists += 1


@asynccontextmanager
async def running(*parts: EtcdRegistrar | EtcdWatcher) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def one(key: str, value: bytes) -> Callable[[int], Mapping[str, bytes]]:
    return lambda _: {key: value}


async def lines_for(client: Etcd, prefix: str) -> list[tuple[str, bytes]]:
    items, _ = await client.range(prefix.encode())
    return [(item.key.decode(), item.value) for item in items]


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "rkmetrics.etcd" and each.levelno >= 20]


# --- the client -------------------------------------------------------------------------------------------------------


async def test_keys_are_written_read_and_deleted(client: Etcd, prefix: str) -> None:
    key = prefix.encode() + b"a"
    assert await client.get(key) is None
    revision = await client.put(key, b"\x00\xff value")
    found = await client.get(key)
    assert found is not None
    assert (found.value, found.lease, found.created) == (b"\x00\xff value", 0, revision)
    assert await client.delete(key)
    assert not await client.delete(key)


async def test_a_key_is_created_once(client: Etcd, prefix: str) -> None:
    key = prefix.encode()
    assert await client.create(key, b"first") is None
    found = await client.create(key, b"second")
    assert found is not None
    assert found.value == b"first"
    assert await client.create(key, b"third", over=found.created) is None
    gone = await client.create(key, b"fourth", over=found.created + 1_000_000)
    assert gone is not None


async def test_many_keys_come_in_pages_of_one_revision(
    client: Etcd, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rkmetrics.etcd.client.PAGE_KEYS", 7)
    keys = [f"{prefix}{number:03}" for number in range(30)]
    for key in keys:
        await client.put(key.encode(), b"")
    assert [key for key, _ in await lines_for(client, prefix)] == keys


async def test_a_lease_ends_and_can_be_granted_again_under_its_id(client: Etcd, prefix: str) -> None:
    lease = await client.grant(10)
    await client.put(prefix.encode(), b"", lease)
    assert await client.keep_alive(lease) == 10
    assert await client.grant(10, lease) == lease  # there already
    assert await client.revoke(lease)
    assert not await client.revoke(lease)
    assert await client.get(prefix.encode()) is None
    with pytest.raises(LeaseLostError):
        await client.keep_alive(lease)
    with pytest.raises(LeaseLostError):
        await client.put(prefix.encode(), b"", lease)
    assert await client.grant(10, lease) == lease
    assert await client.keep_alive(lease) == 10
    await client.revoke(lease)


async def test_a_watch_gives_what_was_and_what_comes(client: Etcd, prefix: str) -> None:
    revision = await client.put(prefix.encode() + b"a", b"1")
    seen: list[tuple[bytes, bytes, bool]] = []
    watch = client.watch(prefix.encode(), revision)
    async for news in watch:
        seen += [(item.key.removeprefix(prefix.encode()), item.value, deleted) for item, deleted in news.events]
        if len(seen) == 1:
            await client.put(prefix.encode() + b"b", b"2" * 100_000)
            await client.delete(prefix.encode() + b"a")
        if len(seen) == 3:
            break
    await watch.aclose()
    assert seen == [(b"a", b"1", False), (b"b", b"2" * 100_000, False), (b"a", b"", True)]


async def test_a_compacted_watch_says_so(make_etcd: MakeEtcd) -> None:
    server = make_etcd().start()
    client = Etcd([server.url])
    for number in range(5):
        await client.put(b"a", str(number).encode())
    server.compact()
    with pytest.raises(CompactedError) as caught:
        async for _ in client.watch(b"a", 1):
            pass
    assert caught.value.revision == 6


async def test_another_endpoint_is_asked_where_one_is_away(etcd_server: EtcdServer, prefix: str) -> None:
    client = Etcd(["http://127.0.0.1:1", etcd_server.url, "http://127.0.0.1:2"], timeout_seconds=5)
    for _ in range(4):
        await client.put(prefix.encode(), b"")
    with pytest.raises(EtcdUnavailableError, match=r"etcd kv/put at 127.0.0.1:1: .*unreachable"):
        await Etcd(["http://127.0.0.1:1"]).put(b"a", b"")


# --- the registrar ----------------------------------------------------------------------------------------------------


async def test_a_key_is_kept_beyond_its_lease_and_revoked_at_the_end(
    client: Etcd, prefix: str, metrics: EtcdCells
) -> None:
    keeper = EtcdRegistrar(client, one(prefix, b"here"), ttl_seconds=1, metrics=metrics)
    async with running(keeper):
        await until(lambda: keeper.listed)
        await asyncio.sleep(2.5)  # etcd ends a lease of 1 s after 2 s
        assert await lines_for(client, prefix) == [(prefix, b"here")]
        assert metrics.keys.value == metrics.keys_wanted.value == 1
    assert await keeper.withdraw()
    assert await lines_for(client, prefix) == []
    assert metrics.keys.value == 0
    assert metrics.leases_lost.value == 0


async def test_who_does_not_withdraw_is_gone_with_the_lease(client: Etcd, prefix: str) -> None:
    keeper = EtcdRegistrar(client, one(prefix, b"here"), ttl_seconds=1)
    async with running(keeper):
        await until(lambda: keeper.listed)
    heard = Heard()
    async with running(EtcdWatcher(client, prefix, heard)):
        await until(lambda: heard.calls == [("put", prefix), ("delete", prefix)])


@pytest.mark.parametrize("harm", ["revoke", "delete", "overwrite"])
async def test_a_key_that_is_taken_away_comes_back_and_stays_one(
    client: Etcd, prefix: str, metrics: EtcdCells, harm: str
) -> None:
    """F8. The lease keeps its id, so a key that is made of it keeps its name."""

    def entries(lease: int) -> Mapping[str, bytes]:
        return {f"{prefix}{lease:x}": b"here"}

    keeper = EtcdRegistrar(client, entries, ttl_seconds=1, metrics=metrics)
    heard = Heard()
    async with running(keeper, EtcdWatcher(client, prefix, heard)):
        await until(lambda: len(heard.calls) == 1)
        lease, key = keeper.lease, f"{prefix}{keeper.lease:x}"
        if harm == "revoke":
            await client.revoke(lease)
        elif harm == "delete":
            await client.delete(key.encode())
        else:
            await client.put(key.encode(), b"something else", lease)
        await until(lambda: len(heard.calls) == 3)
        assert heard.items == {key: b"here"}
        await until(lambda: keeper.listed)
        assert keeper.lease == lease
    assert await keeper.withdraw()
    assert await lines_for(client, prefix) == []
    assert metrics.leases_lost.value == (harm == "revoke")


async def test_of_two_registrars_one_has_the_key_and_the_other_gets_it_after_that(
    client: Etcd, prefix: str, metrics: EtcdCells
) -> None:
    first = EtcdRegistrar(client, one(prefix, b"first"), ttl_seconds=1)
    second = EtcdRegistrar(client, one(prefix, b"second"), ttl_seconds=1, metrics=metrics)
    async with running(first):
        await until(lambda: first.listed)
        async with running(second):
            await until(lambda: metrics.steps[StepOutcome.CONFLICT].value >= 2)
            assert await lines_for(client, prefix) == [(prefix, b"first")]
            assert not second.listed
        async with running(second):
            await first.withdraw()
            first.lease = -1  # it is not to come again
            await until(lambda: second.listed)
            assert await lines_for(client, prefix) == [(prefix, b"second")]
    await second.withdraw()


async def test_a_former_life_that_says_the_same_is_taken_over_at_once(client: Etcd, prefix: str) -> None:
    former = EtcdRegistrar(client, one(prefix, b"same"), ttl_seconds=60)
    async with running(former):
        await until(lambda: former.listed)  # and then it crashes
    latter = EtcdRegistrar(client, one(prefix, b"same"), ttl_seconds=60)
    async with running(latter):
        await until(lambda: latter.listed)
        await former.withdraw()
        assert await lines_for(client, prefix) == [(prefix, b"same")]
    await latter.withdraw()


# --- the watcher ------------------------------------------------------------------------------------------------------


async def test_a_watcher_hears_what_is_there_and_each_change(client: Etcd, prefix: str, metrics: EtcdCells) -> None:
    await client.put(f"{prefix}a".encode(), b"1")
    heard = Heard()
    watcher = EtcdWatcher(client, prefix, heard, metrics=metrics)
    async with running(watcher):
        await until(lambda: watcher.up)
        await client.put(f"{prefix}b".encode(), b"2")
        await client.put(f"{prefix}a".encode(), b"3")
        await client.put(prefix.encode() + b"\xff", b"no text")
        await client.delete(f"{prefix}b".encode())
        await until(lambda: len(heard.calls) == 4)
        assert metrics.watches.value == 1
    assert heard.items == watcher.items == {f"{prefix}a": b"3"}
    assert heard.lists == 1
    assert metrics.watches.value == 0
    assert metrics.resyncs[ResyncReason.START].value == 1


async def test_a_watch_is_opened_anew_now_and_then_and_nothing_is_heard_twice(client: Etcd, prefix: str) -> None:
    heard = Heard()
    async with running(EtcdWatcher(client, prefix, heard, watch_seconds=0.02)):
        for number in range(40):
            await client.put(f"{prefix}{number}".encode(), b"")
        await until(lambda: len(heard.items) == 40)
    assert len(heard.calls) == 40
    assert heard.lists == 1


async def test_a_listener_that_raises_ends_nothing(client: Etcd, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Heard):
        def on_put(self, key: str, value: bytes) -> None:
            super().on_put(key, value)
            raise RuntimeError("a bug")

    heard = Bad()
    async with running(EtcdWatcher(client, prefix, heard)):
        for number in range(3):
            await client.put(f"{prefix}{number}".encode(), b"")
        await until(lambda: len(heard.items) == 3)
    assert "a listener failed" in caplog.text


# --- what goes wrong --------------------------------------------------------------------------------------------------


async def test_all_goes_on_over_a_crash_of_etcd(
    make_etcd: MakeEtcd, prefix: str, metrics: EtcdCells, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    server = make_etcd().start()
    client = Etcd([server.url], timeout_seconds=1)
    heard, keeper = Heard(), EtcdRegistrar(client, one(f"{prefix}a", b"here"), ttl_seconds=2, metrics=metrics)
    async with running(keeper, EtcdWatcher(client, prefix, heard, metrics=metrics)):
        await until(lambda: heard.items)
        server.stop()
        await until(lambda: not keeper.listed)
        assert heard.items == {f"{prefix}a": b"here"}  # silence is no withdrawal
        server.start()
        await until(lambda: keeper.listed and metrics.watches.value)
        await client.put(f"{prefix}b".encode(), b"")
        await until(lambda: f"{prefix}b" in heard.items)
        assert await lines_for(client, prefix) == [(f"{prefix}a", b"here"), (f"{prefix}b", b"")]
    assert metrics.resyncs[ResyncReason.START].value == 1  # by revision: nothing was listed again
    assert len(log_lines(caplog)) <= LINES


async def test_what_happened_while_nobody_looked_is_told_even_when_history_is_gone(
    make_etcd: MakeEtcd, prefix: str, metrics: EtcdCells
) -> None:
    server = make_etcd().start()
    direct, heard = Etcd([server.url]), Heard()
    await direct.put(f"{prefix}stays".encode(), b"1")
    await direct.put(f"{prefix}goes".encode(), b"1")
    await direct.put(f"{prefix}changes".encode(), b"1")
    async with cable(server) as line:
        client = Etcd([line.url], timeout_seconds=0.3)
        watcher = EtcdWatcher(client, prefix, heard, metrics=metrics, look_seconds=0.1)
        async with running(watcher):
            await until(lambda: watcher.up)
            line.cut()
            await until(lambda: not watcher.up)
            await direct.delete(f"{prefix}goes".encode())
            await direct.put(f"{prefix}changes".encode(), b"2")
            await direct.put(f"{prefix}comes".encode(), b"1")
            server.compact()
            heard.calls.clear()
            line.mend()
            await until(lambda: len(heard.calls) >= 3)
    expected = [("put", "changes"), ("put", "comes"), ("delete", "goes")]
    assert sorted((call, key.removeprefix(prefix)) for call, key in heard.calls) == sorted(expected)
    assert metrics.resyncs[ResyncReason.COMPACTED].value == 1


async def test_an_etcd_that_was_made_anew_is_listed_again(make_etcd: MakeEtcd, prefix: str, metrics: EtcdCells) -> None:
    """A watch from a revision that the new store has not reached would wait for it in silence."""
    old, new = make_etcd().start(), make_etcd()
    client, heard = Etcd([old.url], timeout_seconds=1), Heard()
    for number in range(20):
        await client.put(f"{prefix}{number}".encode(), b"")
    watcher = EtcdWatcher(client, prefix, heard, metrics=metrics, look_seconds=0.1)
    async with running(watcher):
        await until(lambda: len(heard.items) == 20)
        old.stop()
        new.port = old.port
        new.start()
        await client.put(f"{prefix}new".encode(), b"")
        await until(lambda: list(heard.items) == [f"{prefix}new"])
    assert metrics.resyncs[ResyncReason.REWOUND].value >= 1


async def test_a_frozen_etcd_is_noticed_and_holds_up_nothing(
    make_etcd: MakeEtcd, prefix: str, metrics: EtcdCells
) -> None:
    server = make_etcd().start()
    client, heard = Etcd([server.url], timeout_seconds=0.3), Heard()
    watcher = EtcdWatcher(client, prefix, heard, metrics=metrics, look_seconds=0.1)
    keeper = EtcdRegistrar(client, one(prefix, b"here"), ttl_seconds=1, metrics=metrics)
    async with running(watcher, keeper):
        await until(lambda: watcher.up and keeper.listed)
        with server.frozen():
            await until(lambda: not watcher.up and not keeper.listed)
            assert not await keeper.withdraw()
        await until(lambda: watcher.up and keeper.listed)
        await until(lambda: heard.items == {prefix: b"here"})


async def test_an_outage_past_the_lease_unlists_and_the_end_of_it_lists_again(
    make_etcd: MakeEtcd, prefix: str, metrics: EtcdCells, caplog: pytest.LogCaptureFixture
) -> None:
    """F9: others see the key go with its lease, and come again."""
    caplog.set_level(logging.INFO, "rkmetrics")
    server = make_etcd().start()
    heard = Heard()
    async with cable(server) as line:
        keeper = EtcdRegistrar(
            Etcd([line.url], timeout_seconds=0.3), one(prefix, b"here"), ttl_seconds=1, metrics=metrics
        )
        async with running(keeper, EtcdWatcher(Etcd([server.url]), prefix, heard)):
            await until(lambda: heard.calls == [("put", prefix)])
            lease = keeper.lease
            line.cut()
            await until(lambda: heard.calls[1:] == [("delete", prefix)])
            line.mend()
            await until(lambda: heard.calls[2:] == [("put", prefix)])
            await until(lambda: keeper.listed)
            assert keeper.lease == lease
    assert metrics.leases_lost.value == 1
    assert len(log_lines(caplog)) <= LINES


async def test_a_cluster_that_loses_its_leader_keeps_keys_and_watches(
    make_etcd: MakeEtcd, prefix: str, metrics: EtcdCells
) -> None:
    members = [make_etcd() for _ in range(3)]
    for each in members:
        each.members = members
    for each in members:
        each.launch()
    client = Etcd([each.url for each in members], timeout_seconds=1)
    heard, keeper = Heard(), EtcdRegistrar(client, one(f"{prefix}a", b"here"), ttl_seconds=3, metrics=metrics)
    watcher = EtcdWatcher(client, prefix, heard, metrics=metrics, look_seconds=0.2)
    async with running(keeper, watcher):
        await until(lambda: keeper.listed and watcher.up and heard.items)
        leader = next(each for each in members if each.is_leader())
        leader.stop()
        others = Etcd([each.url for each in members if each is not leader], timeout_seconds=1)
        while True:
            with suppress(EtcdUnavailableError):  # until they have elected another
                await others.put(f"{prefix}b".encode(), b"")
                break
        await until(lambda: f"{prefix}b" in heard.items)
        await until(lambda: keeper.listed)
        assert await lines_for(others, prefix) == [(f"{prefix}a", b"here"), (f"{prefix}b", b"")]
    assert ("delete", f"{prefix}a") not in heard.calls
    assert metrics.leases_lost.value == 0


async def test_etcd_is_spoken_to_over_tls(make_etcd: MakeEtcd, certificate: Path, prefix: str) -> None:
    server = make_etcd(certificate=certificate).start()
    context = ssl.create_default_context(cafile=str(certificate))
    client, heard = Etcd([server.url], ssl=context), Heard()
    keeper = EtcdRegistrar(client, one(prefix, b"here"))
    async with running(keeper, EtcdWatcher(client, prefix, heard)):
        await until(lambda: heard.items == {prefix: b"here"})
    assert await keeper.withdraw()
    with pytest.raises(EtcdUnavailableError, match="tls"):
        await Etcd([server.url]).get(prefix.encode())


# --- discovery --------------------------------------------------------------------------------------------------------


class Pool:
    """A sink."""

    def __init__(self) -> None:
        self.backends: dict[str, Backend] = {}
        self.resyncs = 0

    def upsert(self, source: SourceName, backend: Backend) -> bool:
        assert source is SourceName.ETCD
        self.backends[backend.id] = backend
        return True

    def withdraw(self, source: SourceName, id: str) -> bool:
        assert source is SourceName.ETCD
        return self.backends.pop(id, None) is not None

    def resync(self, source: SourceName, backends: object) -> None:
        assert source is SourceName.ETCD
        assert isinstance(backends, list)
        self.backends = {each.id: each for each in backends}
        self.resyncs += 1


async def test_backends_reach_a_balancer_through_etcd_and_junk_does_not(client: Etcd, prefix: str) -> None:
    namespace = prefix.strip("/")
    good = Backend.checked("one", "10.0.1.5:3000", 9090, labels={"zone": "a"})
    forged = Backend.checked("one", "10.6.6.6:3000", 9090)
    three = Backend.checked("three", "10.0.1.7:3000", 9090)
    pool, source, keeper = Pool(), EtcdSource(client, namespace), registrar(client, good, namespace)
    await client.put(f"{prefix_of(namespace)}junk".encode(), b"\xff{")
    watching = asyncio.create_task(source.run(pool))
    try:
        async with running(keeper):
            await until(lambda: pool.backends == {"one": good})
            await client.put(f"{prefix_of(namespace)}two".encode(), forged.encode())
            await client.put(f"{prefix_of(namespace)}three".encode(), three.encode())
            await until(lambda: "three" in pool.backends)  # so the one before was looked at
            assert pool.backends == {"one": good, "three": three}
            await client.delete(f"{prefix_of(namespace)}three".encode())
        await keeper.withdraw()
        await until(lambda: not pool.backends)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    assert pool.resyncs == 1
