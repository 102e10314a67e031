"""What a process calls itself, and where it says that it is."""

from __future__ import annotations

import os
from ipaddress import ip_address

import pytest

from rkmetrics.addresses import advertised, first_address
from rkmetrics.discovery.advertise import backend_here, default_id
from rkmetrics.discovery.base import ID
from rkmetrics.errors import BackendError
from rkmetrics.settings import Settings


@pytest.mark.parametrize(
    ("told", "host", "port", "expected"),
    [
        (None, "10.0.1.5", 3000, "10.0.1.5:3000"),
        (None, "127.0.0.1", 3000, "127.0.0.1:3000"),
        (None, "fd00::5", 3000, "[fd00::5]:3000"),
        ("10.0.1.6", "0.0.0.0", 3000, "10.0.1.6:3000"),
        ("10.0.1.6:80", "0.0.0.0", 3000, "10.0.1.6:80"),
        ("backend.internal:80", "127.0.0.1", 3000, "backend.internal:80"),
        ("fd00::6", "::", 3000, "[fd00::6]:3000"),
        ("[fd00::6]:80", "::", 3000, "[fd00::6]:80"),
    ],
)
def test_the_address_is_what_is_told_or_else_what_is_bound(
    told: str | None, host: str, port: int, expected: str
) -> None:
    assert advertised(told, host, port) == expected


# asyncio binds "::" to IPv6 alone
@pytest.mark.parametrize(
    ("host", "expected"), [("0.0.0.0", "10.0.1.9:3000"), ("", "10.0.1.9:3000"), ("::", "[fd00::9]:3000")]
)
def test_all_addresses_become_the_first_that_is_not_loopback(
    host: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rkmetrics.addresses.local_addresses", lambda: ["127.0.0.1", "::1", "169.254.7.7", "fd00::9", "10.0.1.9"]
    )
    assert advertised(None, host, 3000) == expected


@pytest.mark.parametrize(("host", "port"), [("0.0.0.0", 3000), ("10.0.1.5", 0)])
def test_nobody_is_told_what_means_nothing(host: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkmetrics.addresses.local_addresses", lambda: ["127.0.0.1", "fe80::1"])
    with pytest.raises(BackendError, match="set RKMETRICS_ADVERTISE_ADDRESS"):
        advertised(None, host, port)


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([], None),
        (["127.0.0.1", "::1", "fe80::1", "169.254.1.1", "0.0.0.0"], None),
        (["fd00::1", "10.0.0.1", "10.0.0.2"], "10.0.0.1"),
        (["::1", "fd00::1"], "fd00::1"),
    ],
)
def test_ipv4_comes_before_ipv6(addresses: list[str], expected: str | None) -> None:
    assert first_address(addresses) == expected


def test_the_addresses_of_this_machine_can_be_listed() -> None:
    from rkmetrics.addresses import local_addresses

    assert all(ip_address(address) for address in local_addresses())


def test_the_id_is_the_same_for_a_process_and_another_in_a_child() -> None:
    assert default_id() == default_id()
    assert ID.fullmatch(default_id())
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, default_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 200).decode() != default_id()
    os.close(reader)
    os.close(writer)


def test_a_backend_is_described_by_settings_and_what_is_bound() -> None:
    settings = Settings(advertise_address="10.0.1.5", announce_interval_seconds=7, metrics_port=9191)
    backend = backend_here(settings, host="0.0.0.0", port=3000, id="one", labels={"zone": "a"})
    assert (backend.id, str(backend.address), backend.metrics_port) == ("one", "10.0.1.5:3000", 9191)
    assert (backend.announce_interval_seconds, backend.labels) == (7, (("zone", "a"),))
    assert backend_here(Settings(), host="10.0.1.5", port=3000).metrics_port == 3000
