"""Which addresses may be registered, and so be fetched by the balancer and be sent traffic by its proxies.

What a stranger posts here is connected to from inside (T13: server-side request forgery). So an address passes only by
a rule, and what is connected to is the very address that was checked: a name is looked up once, at registration, and
its address stands in the table; who changes the name's record later (DNS rebinding) changes nothing. Spellings are
`base.ip_of`'s affair: one for each address.

    networks     an address passes where it is
    none         the caller's own, and no special one
    some         inside one of them; a special one only where a network that lies within the special range names it, so
                 that 0.0.0.0/0 opens neither loopback nor 169.254.169.254

The caller is the other end of the connection. No header says who it is (T9): behind a proxy every caller is the proxy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from rkmetrics.errors import BackendError

__all__ = ["LOOPBACK", "PORTS", "SPECIAL", "Policy", "caller_address", "parse_network"]

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

#: Never by default: range -> what it is. RFC 6890 and its registries, and where clouds put their metadata.
SPECIAL: Mapping[IPNetwork, str] = {
    ip_network(text): what
    for text, what in (
        ("0.0.0.0/8", "this host"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local, and the metadata of most clouds"),
        ("100.100.100.200/32", "the metadata of Alibaba's cloud"),
        ("192.0.0.0/24", "protocol assignments, and the metadata of Oracle's cloud"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved, and broadcast"),
        ("::/96", "unspecified, loopback, or an IPv4 address inside"),
        ("::ffff:0:0/96", "an IPv4 address inside"),
        ("64:ff9b::/96", "an IPv4 address inside (NAT64)"),
        ("64:ff9b:1::/48", "an IPv4 address inside (NAT64)"),
        ("2001::/32", "an IPv4 address inside (Teredo)"),
        ("2002::/16", "an IPv4 address inside (6to4)"),
        ("fd00:ec2::254/128", "the metadata of Amazon's cloud"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
}
LOOPBACK: tuple[IPNetwork, ...] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
#: Web servers, and what needs no privilege; never the mail, shell and file servers below.
PORTS: tuple[range, ...] = (range(80, 81), range(443, 444), range(1_024, 65_536))


def parse_network(text: str) -> IPNetwork:
    """Read a network, or an address as a network of one. Raises ValueError."""
    return ip_network(text)  # strict: 10.0.0.1/8 is a mistake


def caller_address(host: str | None) -> IPAddress | None:
    """Return the other end of a connection; None where it has no IP address (a Unix socket).

    A listener for both families writes IPv4 callers as ::ffff:10.0.0.5.
    """
    try:
        found = ip_address((host or "").partition("%")[0])
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


class Policy(NamedTuple):
    """What may be registered. networks: none for the caller's own address only. ports: of traffic and of vitals."""

    networks: tuple[IPNetwork, ...] = ()
    ports: tuple[range, ...] = PORTS

    def check(self, address: IPAddress, ports: Iterable[int], caller: IPAddress | None) -> None:
        """Raise BackendError for an address that is not allowed. caller: None for a source that is not announced."""
        for port in ports:
            if not any(port in span for span in self.ports):
                raise BackendError("port", port, f"one that this balancer allows: {_shown(self.ports)}")
        special = next((each for each in SPECIAL if address in each), None)
        if special is not None and not self._names(address, special):
            raise BackendError("address", str(address), f"none that is special ({SPECIAL[special]})")
        if not self._allows(address, caller):
            raise BackendError("address", str(address), self._expected(caller))

    def _names(self, address: IPAddress, special: IPNetwork) -> bool:
        return any(address in each and _is_within(each, special) for each in self.networks)

    def _allows(self, address: IPAddress, caller: IPAddress | None) -> bool:
        if self.networks:
            return any(address in each for each in self.networks)
        return caller is None or address == caller

    def _expected(self, caller: IPAddress | None) -> str:
        if self.networks:
            return "one inside RKMETRICS_ALLOWED_NETWORKS of the balancer"
        return f"the caller's own ({caller}); RKMETRICS_ALLOWED_NETWORKS of the balancer allows others"


def _is_within(inner: IPNetwork, outer: IPNetwork) -> bool:
    if isinstance(inner, IPv4Network):
        return isinstance(outer, IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, IPv6Network) and inner.subnet_of(outer)


def _shown(ports: Iterable[range]) -> str:
    return ", ".join(str(each.start) if len(each) == 1 else f"{each.start}-{each.stop - 1}" for each in ports)
