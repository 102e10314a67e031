"""What may be registered (T13): each way to an address inside that a stranger might try."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.discovery.policy import SPECIAL, Policy, caller_address, parse_network
from rkmetrics.errors import BackendError

CALLER = ip_address("10.0.1.5")
PORT = (3000, 9090)


def allowed(address: str, *networks: str, caller: str | None = "10.0.1.5", ports: tuple[int, ...] = PORT) -> bool:
    policy = Policy(tuple(map(parse_network, networks)))
    try:
        policy.check(ip_address(address), ports, ip_address(caller) if caller else None)
    except BackendError:
        return False
    return True


@pytest.mark.parametrize(
    ("address", "networks", "passes"),
    [
        ("10.0.1.5", (), True),
        ("10.0.1.6", (), False),
        ("10.0.1.6", ("10.0.0.0/16",), True),
        ("10.1.0.1", ("10.0.0.0/16",), False),
        ("10.0.1.5", ("192.168.0.0/16",), False),
        ("fd00::5", ("fd00::/8",), True),
        ("fd00::5", ("0.0.0.0/0",), False),
        ("8.8.8.8", ("0.0.0.0/0",), True),
        ("127.0.0.1", ("127.0.0.0/8",), True),
        ("127.0.0.1", ("127.0.0.1/32",), True),
        ("169.254.10.1", ("169.254.10.0/24",), True),
        ("::1", ("::1/128",), True),
        ("fe80::1", ("fe80::/10",), True),
    ],
)
def test_networks(address: str, networks: tuple[str, ...], passes: bool) -> None:
    assert allowed(address, *networks) is passes


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "0.1.2.3",
        "169.254.169.254",
        "100.100.100.200",
        "192.0.0.192",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.1.5",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:1::1",
        "fd00:ec2::254",
        "fe80::1",
        "ff02::1",
    ],
)
def test_special_addresses_are_refused_unless_a_network_within_the_range_names_them(address: str) -> None:
    assert not allowed(address, caller=address)
    assert not allowed(address, "0.0.0.0/0", "::/0")
    special = next(each for each in SPECIAL if ip_address(address) in each)
    assert allowed(address, str(special))


@given(st.ip_addresses())
def test_open_networks_open_nothing_special(address: object) -> None:
    found = ip_address(str(address).partition("%")[0])
    assert allowed(str(found), "0.0.0.0/0", "::/0") is not any(found in each for each in SPECIAL)


@pytest.mark.parametrize(
    ("port", "passes"), [(22, False), (25, False), (80, True), (443, True), (1023, False), (1024, True)]
)
def test_ports_of_mail_shells_and_files_are_refused(port: int, passes: bool) -> None:
    assert allowed("10.0.1.5", ports=(port, 9090)) is passes
    assert allowed("10.0.1.5", ports=(3000, port)) is passes


def test_a_source_without_callers_may_list_all_but_the_special() -> None:
    assert allowed("10.9.9.9", caller=None)
    assert not allowed("169.254.169.254", caller=None)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.1.5", "10.0.1.5"),
        ("::ffff:10.0.1.5", "10.0.1.5"),
        ("fe80::1%eth0", "fe80::1"),
        ("fd00::5", "fd00::5"),
        ("", None),
        (None, None),
        ("testclient", None),
        ("/run/socket", None),
    ],
)
def test_callers(host: str | None, address: str | None) -> None:
    assert caller_address(host) == (ip_address(address) if address else None)
