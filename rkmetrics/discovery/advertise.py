"""How a process is called and where others reach it, where nobody says so.

An address to bind may stand for all of a machine (0.0.0.0, [::]) and a port may be 0; neither means anything to others,
so neither is ever advertised (facts: Dynamo 0.7 did). For all addresses the first that is not loopback is taken, as
Dynamo does; on hosts with several, RKMETRICS_ADVERTISE_ADDRESS says which.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Iterable
from functools import cache
from ipaddress import ip_address

from rkmetrics.discovery.base import Backend
from rkmetrics.errors import BackendError
from rkmetrics.settings import Settings, host_and_port

__all__ = ["advertised", "backend_here", "default_id", "first_address"]

WILDCARDS = frozenset({"", "0.0.0.0", "::", "*"})
ID_HOST_CHARACTERS = 100


def backend_here(
    settings: Settings,
    *,
    host: str,
    port: int,
    metrics_port: int | None = None,
    id: str | None = None,
    labels: dict[str, str] | None = None,
) -> Backend:
    """Describe this process: what is bound, or what the settings say instead. Raises BackendError.

    host, port: where its traffic goes. metrics_port: by default RKMETRICS_METRICS_PORT, then the port.
    """
    return Backend.checked(
        id or default_id(),
        advertised(settings.advertise_address, host, port),
        metrics_port or settings.metrics_port or port,
        announce_interval_seconds=settings.announce_interval_seconds,
        labels=labels,
    )


def advertised(told: str | None, host: str, port: int) -> str:
    """Return host:port as others reach it. told: host, or host:port, which wins over what is bound."""
    if told:
        host, told_port = host_and_port(told)
        port = told_port or port
    if host in WILDCARDS:
        host = first_address(_addresses()) or ""
    if not host or not port:
        raise BackendError("address", f"{host}:{port}", "one that others can reach; set RKMETRICS_ADVERTISE_ADDRESS")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@cache
def _id_of(pid: int) -> str:
    host = re.sub(r"[^A-Za-z0-9.-]+", "-", socket.gethostname())[:ID_HOST_CHARACTERS].strip(".-")
    return f"{host or 'backend'}-{secrets.token_hex(4)}"


def default_id() -> str:
    """Return a name for this process that stays the same while it lives; a forked child has another."""
    return _id_of(os.getpid())


def first_address(addresses: Iterable[str]) -> str | None:
    """Return the first that others may reach, IPv4 before IPv6."""
    found = [ip_address(address) for address in addresses]
    good = [each for each in found if not (each.is_loopback or each.is_link_local or each.is_unspecified)]
    return next((str(each) for version in (4, 6) for each in good if each.version == version), None)


def _addresses() -> Iterable[str]:
    """The addresses of the interfaces that are up, in the system's order."""
    import psutil  # 20 ms that only discovery needs

    up = {name for name, each in psutil.net_if_stats().items() if each.isup}
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses if name in up else ():
            if each.family in (socket.AF_INET, socket.AF_INET6):
                yield each.address.partition("%")[0]
