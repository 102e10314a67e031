"""Keys and values of etcd as backends: what is taken, and what is not. The real etcd is in tests/services."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from rkmetrics.discovery.base import Backend, SourceName
from rkmetrics.discovery.etcd import BackendKeys, prefix_of, registrar
from rkmetrics.etcd.client import Etcd

PREFIX = prefix_of("dynamo")
ONE = Backend.checked("one", "10.0.1.5:3000", 9090)
TWO = Backend.checked("two", "10.0.1.6:3000", 9090)


class Pool:
    """A sink."""

    def __init__(self) -> None:
        self.backends: dict[str, Backend] = {}

    def upsert(self, source: SourceName, backend: Backend) -> bool:
        assert source is SourceName.ETCD
        self.backends[backend.id] = backend
        return True

    def withdraw(self, source: SourceName, id: str) -> bool:
        assert source is SourceName.ETCD
        return self.backends.pop(id, None) is not None

    def resync(self, source: SourceName, backends: Iterable[Backend]) -> None:
        assert source is SourceName.ETCD
        self.backends = {each.id: each for each in backends}


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def keys(pool: Pool) -> BackendKeys:
    return BackendKeys(pool, PREFIX)


def test_a_key_is_a_backend(keys: BackendKeys, pool: Pool) -> None:
    keys.on_put(f"{PREFIX}one", ONE.encode())
    keys.on_put(f"{PREFIX}two", TWO.encode())
    assert pool.backends == {"one": ONE, "two": TWO}
    keys.on_delete(f"{PREFIX}one")
    assert pool.backends == {"two": TWO}


def test_a_list_replaces_what_was_known(keys: BackendKeys, pool: Pool) -> None:
    keys.on_put(f"{PREFIX}one", ONE.encode())
    keys.on_list({f"{PREFIX}two": TWO.encode(), f"{PREFIX}junk": b"{"})
    assert pool.backends == {"two": TWO}


JUNK = {
    "no JSON": b"\xff{",
    "an id of another": TWO.encode(),
    "no address": b'{"id":"one","address":"0.0.0.0:0","metrics_port":9090}',
    "too much": b" " * 100_000,
    "a bomb": b"[" * 8_000,
}


@pytest.mark.parametrize("value", JUNK.values(), ids=JUNK)
def test_what_is_no_backend_is_not_taken_and_ends_what_was_there(
    keys: BackendKeys, pool: Pool, value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    keys.on_put(f"{PREFIX}one", ONE.encode())
    keys.on_put(f"{PREFIX}two", TWO.encode())
    for _ in range(3):
        keys.on_put(f"{PREFIX}one", value)
    assert pool.backends == {"two": TWO}
    assert keys.malformed == 3
    assert len(caplog.records) == 1


def test_a_backend_is_written_under_its_id() -> None:
    entries = registrar(Etcd(["http://127.0.0.1:1"]), ONE, "dynamo")._entries(7)
    assert entries == {"rkmetrics/backends/dynamo/one": ONE.encode()}
