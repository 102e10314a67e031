"""Where others reach this process, where nobody says so.

An address to bind may stand for all of a machine (0.0.0.0, [::]) and a port may be 0; neither means anything to others,
so neither is ever advertised (facts: Dynamo 0.7 did). For all addresses the first that is not loopback is taken, as
Dynamo does; on hosts with several, RKMETRICS_ADVERTISE_ADDRESS says which.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from ipaddress import ip_address

from rkmetrics.errors import BackendError
from rkmetrics.settings import host_and_port

__all__ = ["WILDCARDS", "advertised", "first_address", "local_addresses"]

WILDCARDS = frozenset({"", "0.0.0.0", "::", "*"})


def advertised(told: str | None, host: str, port: int) -> str:
    """Return host:port as others reach it. told: host, or host:port, which wins over what is bound."""
    if told:
        host, told_port = host_and_port(told)
        port = told_port or port
    if host in WILDCARDS:
        host = first_address(local_addresses(), (6, 4) if host == "::" else (4, 6)) or ""
    if not host or not port:
        raise BackendError("address", f"{host}:{port}", "one that others can reach; set RKMETRICS_ADVERTISE_ADDRESS")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def first_address(addresses: Iterable[str], versions: Iterable[int] = (4, 6)) -> str | None:
    """Return the first that others may reach, IPv4 before IPv6; asyncio binds "::" to IPv6 alone."""
    found = [ip_address(address) for address in addresses]
    good = [each for each in found if not (each.is_loopback or each.is_link_local or each.is_unspecified)]
    return next((str(each) for version in versions for each in good if each.version == version), None)


def local_addresses() -> Iterable[str]:
    """The addresses of the interfaces that are up, in the system's order."""
    import psutil  # 20 ms that only discovery needs

    up = {name for name, each in psutil.net_if_stats().items() if each.isup}
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses if name in up else ():
            if each.family in (socket.AF_INET, socket.AF_INET6):
                yield each.address.partition("%")[0]
