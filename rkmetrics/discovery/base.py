"""Values of discovery: what a backend says of itself, how that goes over the wire, and what a source of backends is.

Pure: no socket, no clock, no look-up of names. `Backend.decode` and `Backend.encode` are the body of POST /register,
both ways: the three fields of the protocol ("Minimalist Service Discovery") and what we add to them, all of it
optional; fields that nobody knows are ignored, so that a newer backend may talk to an older balancer.

    {"id": "backend-1", "address": "10.0.1.5:3000", "metrics_port": 9090,
     "announce_interval_seconds": 30, "labels": {"zone": "eu-1a"}}

A host has one spelling here (T13). A number that some resolver takes for an address (2130706433, 0x7f.1, 0177.0.0.1)
is refused, since two parsers would read two addresses from it; so is an IPv4 address in IPv6's clothes. Whether an
address that is well formed may be used at all is for `policy.py` to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, NamedTuple, Protocol

import msgspec

from rkmetrics.errors import BackendError, PayloadError

__all__ = [
    "BODY_LIMIT_BYTES",
    "ID",
    "LABELS_LIMIT",
    "REGISTER_PATH",
    "Address",
    "Backend",
    "Registered",
    "Sink",
    "Source",
    "SourceName",
    "checked_host",
    "ip_of",
]

REGISTER_PATH = "/register"
BODY_LIMIT_BYTES = 8_192  # of a registration; the largest that passes all limits below has 6,5 KB
LABELS_LIMIT = 16
LABEL_VALUE_LIMIT = 128
HOST_LIMIT = 253  # RFC 1035, 2.3.4
DAY_SECONDS = 86_400

#: It stands in a path (DELETE /register/{id}), in logs and in labels, so nothing in it needs an escape.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
LABEL_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)  # what follows "__meta_rkmetrics_label_" in /sd
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
# URL Standard, "ends in a number": what a resolver may read as an IPv4 address is no name.
NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.ASCII)
PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)


# --- addresses --------------------------------------------------------------------------------------------------------

IPAddress = IPv4Address | IPv6Address


def ip_of(host: str) -> IPAddress | None:
    """Return the IP address that a host is written as, in its one spelling; None for a name.

    host: without brackets. Raises ValueError for what is neither. An IPv6 address may be written in any of its forms;
    one with a zone, or with an IPv4 address inside (::ffff:10.0.0.1), is refused.
    """
    if ":" in host:
        address = IPv6Address(host)
        if address.scope_id is not None or address.ipv4_mapped is not None or "." in host:
            raise ValueError
        return address
    if not NUMERIC.fullmatch(host.lower()):
        return None
    return IPv4Address(host)  # strict: four decimal parts, no leading zero


class Address(NamedTuple):
    """Where to connect: host (a name in lower case, or an IP address without brackets) and port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, what: str = "address") -> Address:
        """Read "host:port", an IPv6 address in brackets. Raises BackendError."""
        host, _, port = text.rpartition(":")
        if not PORT.fullmatch(port) or int(port) > 65_535 or not host or not text.isascii():
            raise BackendError(what, text, EXPECTED_ADDRESS)
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed != (":" in host):
            raise BackendError(what, text, EXPECTED_ADDRESS)
        return cls(checked_host(host[1:-1] if bracketed else host, what, text), int(port))

    @property
    def ip(self) -> IPAddress | None:
        """The host as an IP address; None for a name."""
        return ip_of(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


EXPECTED_ADDRESS = (
    "host:port, such as 10.0.1.5:3000, [fd00::5]:3000 or backend-1.internal:3000; an address that others can reach, "
    "in plain decimal, never 0.0.0.0, [::] or port 0"
)


def checked_host(host: str, what: str, shown: str) -> str:
    """Return a host in its one spelling. Raises BackendError that shows `shown`."""
    try:
        address = ip_of(host)
    except ValueError:
        raise BackendError(what, shown, EXPECTED_ADDRESS) from None
    if address is None:
        name = host.lower()
        if len(name) > HOST_LIMIT or not NAME.fullmatch(name):
            raise BackendError(what, shown, EXPECTED_ADDRESS)
        return name
    if address.is_unspecified:  # never advertised: it means "all of mine" to who binds, "myself" to who connects
        raise BackendError(what, shown, EXPECTED_ADDRESS)
    return str(address)


# --- backends ---------------------------------------------------------------------------------------------------------


class _Wire(msgspec.Struct):
    """The body of POST /register as it comes: types and sizes by msgspec, the rest by `Backend.checked`."""

    id: Annotated[str, msgspec.Meta(max_length=128)]
    address: Annotated[str, msgspec.Meta(max_length=HOST_LIMIT + 8)]
    metrics_port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    announce_interval_seconds: Annotated[float, msgspec.Meta(gt=0, le=DAY_SECONDS)] | None = None
    labels: Annotated[dict[str, Annotated[str, msgspec.Meta(max_length=LABEL_VALUE_LIMIT)]], msgspec.Meta(
        max_length=LABELS_LIMIT
    )] = {}  # fmt: skip


_decoder = msgspec.json.Decoder(_Wire)
_encoder = msgspec.json.Encoder()


class Backend(NamedTuple):
    """One backend: where its traffic goes, and on which port of the same host its vitals are.

    announce_interval_seconds: how often it means to say so again; None where it does not say. labels: for people and
    for relabelling in Prometheus, sorted by name; no part of who it is. name: the host name that a balancer has looked
    up for the address; it does not go over the wire. Made by `checked` or `decode`.
    """

    id: str
    address: Address
    metrics_port: int
    announce_interval_seconds: float | None = None
    labels: tuple[tuple[str, str], ...] = ()
    name: str = ""

    @classmethod
    def checked(
        cls,
        id: str,
        address: str,
        metrics_port: int,
        *,
        announce_interval_seconds: float | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Backend:
        """Return a backend that can go over the wire. Raises BackendError."""
        if not ID.fullmatch(id):
            raise BackendError("id", id, "1 to 128 letters, digits and . _ : -, the first a letter or a digit")
        if not 1 <= metrics_port <= 65_535:
            raise BackendError("metrics_port", metrics_port, "a port from 1 to 65535")
        if announce_interval_seconds is not None and not 0 < announce_interval_seconds <= DAY_SECONDS:
            raise BackendError("announce_interval_seconds", announce_interval_seconds, "more than 0, at most a day")
        found = tuple(sorted((labels or {}).items()))
        _check_labels(found)
        return cls(id, Address.parse(address), metrics_port, announce_interval_seconds, found)

    @classmethod
    def decode(cls, data: bytes) -> Backend:
        """Read the body of POST /register. Raises PayloadError or BackendError, whatever the bytes are."""
        if len(data) > BODY_LIMIT_BYTES:
            raise PayloadError("a registration", data, f"more than {BODY_LIMIT_BYTES} bytes")
        try:
            wire = _decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PayloadError("a registration", data, str(error)) from None
        return cls.checked(
            wire.id,
            wire.address,
            wire.metrics_port,
            announce_interval_seconds=wire.announce_interval_seconds,
            labels=wire.labels,
        )

    def encode(self) -> bytes:
        """Return the body of POST /register; what is not set is left out."""
        fields: dict[str, object] = {
            "id": self.id,
            "address": str(self.address),
            "metrics_port": self.metrics_port,
        }
        if self.announce_interval_seconds is not None:
            fields["announce_interval_seconds"] = self.announce_interval_seconds
        if self.labels:
            fields["labels"] = dict(self.labels)
        return _encoder.encode(fields)

    @property
    def metrics_address(self) -> Address:
        """Where its vitals are."""
        return self.address._replace(port=self.metrics_port)


def _check_labels(labels: tuple[tuple[str, str], ...]) -> None:
    if len(labels) > LABELS_LIMIT:
        raise BackendError("labels", len(labels), f"at most {LABELS_LIMIT} of them")
    for name, value in labels:
        if not LABEL_NAME.fullmatch(name):
            raise BackendError("the name of a label", name, "a-z, 0-9 and _, the first a letter, at most 64 of them")
        if len(value) > LABEL_VALUE_LIMIT or CONTROL.search(value):
            raise BackendError(f"label {name}", value, f"up to {LABEL_VALUE_LIMIT} characters, none of control")


class Registered(msgspec.Struct, frozen=True):
    """What a balancer answers to a registration, for the announcer.

    state: as /backends?details=1 names it ("new", "up", "down", "draining"). expires_seconds: a backend that is not
    announced for so long, and fails its checks, is forgotten.
    """

    id: str
    state: str
    expires_seconds: float

    def encode(self) -> bytes:
        """Return the body of the answer."""
        return _encoder.encode(self) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Registered:
        """Read the body of a 200 or 201. Raises PayloadError."""
        try:
            return _registered.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PayloadError("an answer to a registration", data, str(error)) from None


_registered = msgspec.json.Decoder(Registered)


# --- sources ----------------------------------------------------------------------------------------------------------


class SourceName(StrEnum):
    """Where a backend is known from, weakest first: where two say different things of one id, the stronger is right."""

    ANNOUNCED = "announced"
    ETCD = "etcd"
    STATIC = "static"


class Sink(Protocol):
    """Where a source reports to; the directory is one. Safe from any thread; neither call waits or raises."""

    def upsert(self, source: SourceName, backend: Backend) -> bool:
        """The source knows of this backend. False where it is not taken, which is counted and logged."""
        ...

    def withdraw(self, source: SourceName, id: str) -> bool:
        """The source knows of it no longer. False where it was not known from there."""
        ...

    def resync(self, source: SourceName, backends: Iterable[Backend]) -> None:
        """These are all that the source knows of: what else came from there is withdrawn."""
        ...


class Source(Protocol):
    """Watches a place where backends are listed, and tells a sink, for as long as `run` runs."""

    name: SourceName

    async def run(self, sink: Sink) -> None:
        """Watch until cancelled; whatever the place does is logged, counted and tried again, never raised.

        While the place cannot be reached the sink keeps what it has: silence is no withdrawal (F9, F15).
        """
        ...
