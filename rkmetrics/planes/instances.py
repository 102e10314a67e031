"""Who serves what: a list that does not change, etcd with Dynamo's keys, or our own discovery.

    StaticInstances(["10.0.1.5:9999", "http://10.0.1.6:8888/v1/rpc/generate"])
    EtcdInstances(Etcd(["http://etcd:2379"]))             v1/instances/{namespace}/{component}/{endpoint}/{id}
    DirectoryInstances(["http://balancer:8080"])          /backends?details=1: those in rotation, by their labels

Each tells everything there is, and tells it again when it changes. None of them ever takes silence for a withdrawal:
who cannot be asked has not said that somebody left (F9, F15). What is told may speak other planes than the one who
asks; `Speaking` picks those that can be called.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from rkmetrics.addresses import WILDCARDS
from rkmetrics.errors import BackendError, FetchError, PayloadError
from rkmetrics.etcd.dynamo import INSTANCES
from rkmetrics.etcd.watcher import LOOK_SECONDS, EtcdWatcher
from rkmetrics.fetch import get
from rkmetrics.planes.base import EndpointName, Instance, InstanceListener, InstanceSource
from rkmetrics.retry import Backoff, StateLog, jittered
from rkmetrics.settings import Secret

if TYPE_CHECKING:
    from rkmetrics.catalogue.etcd import Etcd as EtcdCells
    from rkmetrics.etcd.client import Etcd

__all__ = [
    "KINDS",
    "DirectoryInstances",
    "EtcdInstances",
    "Speaking",
    "StaticInstances",
    "Told",
    "keep_following",
    "labels_of",
    "place_of",
    "stable_id",
]

log = logging.getLogger("rkmetrics.planes")

#: The plane of a client to the kind of transport that it can call, as etcd names it.
KINDS: Mapping[str, str] = {"tcp": "tcp", "http": "http", "nats": "nats_tcp", "memory": "memory"}
PLANE_OF: Mapping[str, str] = {kind: plane for plane, kind in KINDS.items()}


def stable_id(text: str) -> int:
    """Return the id of who has only a name: the same everywhere, 63 bits, never 0."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1 or 1


def place_of(kind: str, address: str, endpoint: EndpointName, instance_id: int, path: str = "") -> str:
    """Return the place of an endpoint at an address, as its server lists it. path: what http has in front."""
    return {
        "tcp": f"{address}/{instance_id:x}/{endpoint.endpoint}",
        "http": f"http://{address}{path}/{endpoint.endpoint}",
        "nats_tcp": f"{endpoint.namespace}_{endpoint.component}.{endpoint.endpoint}-{instance_id:x}",
        "memory": f"{instance_id:x}/{endpoint.endpoint}",
    }[kind]


async def keep_following(source: InstanceSource, endpoint: EndpointName, listener: InstanceListener) -> None:
    """Follow a source; a bug in it leaves nobody deaf, and is said in full once."""
    backoff, last = Backoff(), ""
    while True:
        try:
            await source.follow(endpoint, listener)
        except Exception as error:
            level, last = logging.DEBUG if repr(error) == last else logging.ERROR, repr(error)
            told = "the source of %s failed; what is known stays, and it begins again"
            log.log(level, told, endpoint, exc_info=True)
        await asyncio.sleep(backoff.next())


class Speaking:
    """Picks the instances of one plane; says once for each other plane that somebody speaks it."""

    def __init__(self, mode: str) -> None:
        self._mode, self._kind = mode, KINDS[mode]
        self._said: set[str] = set()

    def __call__(self, instances: Iterable[Instance]) -> list[Instance]:
        found: list[Instance] = []
        for instance in instances:
            kind = instance.transport[0]
            if kind == self._kind:
                found.append(instance)
            elif kind not in self._said and len(self._said) < 16:
                self._said.add(kind)
                told = (
                    "%s is served over the plane %r by instance %x, which this client does not speak; it asks those of "
                )
                told += "%r only (DYN_REQUEST_PLANE). Said once"
                name = ".".join(instance[:3])
                log.warning(told, name, PLANE_OF.get(kind, kind), instance.instance_id, self._mode)
        return found


# --- a list -----------------------------------------------------------------------------------------------------------

#: An address, an id with an address, or an instance.
Told = str | tuple[int, str] | Instance

HEX = re.compile(r"[0-9a-f]{1,16}", re.ASCII)
SUBJECT = re.compile(r"[A-Za-z0-9_-]+\.(?P<endpoint>[A-Za-z0-9_-]+)-(?P<id>[0-9a-f]{1,16})", re.ASCII)
EXPECTED = (
    "host:port, host:port/endpoint, host:port/id/endpoint (tcp), http://host:port/path/endpoint (http) or "
    "namespace_component.endpoint-id (nats), each with an address that is somebody's and a port from 1 to 65535"
)


class StaticInstances(InstanceSource):
    """Instances that are known from the start: addresses, pairs of id and address, or what a server says of itself.

    mode: the plane of an address that is host:port only; it is then asked for any endpoint. path: where endpoints are
    over http. An address with an endpoint is asked for that one only. Ids come from the address where none is given.
    Raises BackendError.
    """

    def __init__(self, told: Iterable[Told], *, mode: str = "tcp", path: str = "/v1/rpc") -> None:
        self._mode, self._path = mode, path
        self._instances, self._places = list[Instance](), list[tuple[int, str]]()
        for each in told:
            if isinstance(each, Instance):
                self._instances.append(each)
            else:
                self._places.append((0, each) if isinstance(each, str) else each)
        for _, place in self._places:
            _read_place(place)

    def instances(self, endpoint: EndpointName) -> tuple[Instance, ...]:
        """Return those of an endpoint."""
        found = {each.instance_id: each for each in self._instances if each[:3] == endpoint}
        for told_id, place in self._places:
            kind, where, id, last = _read_place(place)
            if not last:
                kind, where = self._whole(where, endpoint)
            elif last != endpoint.endpoint:
                continue
            number = told_id or id
            found[number] = Instance(*endpoint, number, (kind, where))
        return tuple(found.values())

    def _whole(self, address: str, endpoint: EndpointName) -> tuple[str, str]:
        if self._mode == "http":
            return "http", f"http://{address}{self._path}/{endpoint.endpoint}"
        return "tcp", f"{address}/{endpoint.endpoint}"  # our servers take the form of 0.7 too, and it has no id

    async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
        listener(self.instances(endpoint))
        await asyncio.Event().wait()


def _read_place(text: str) -> tuple[str, str, int, str]:
    """Read an address: its kind, itself, the id it has or gets, and its endpoint ("": any). Raises BackendError."""
    subject = SUBJECT.fullmatch(text)
    if subject is not None:
        return "nats_tcp", text, int(subject["id"], 16), subject["endpoint"]
    kind, rest = ("http", text.removeprefix("http://")) if text.startswith("http://") else ("tcp", text)
    address, slash, path = rest.partition("/")
    parts = path.split("/") if slash else []
    host, _, port = address.rpartition(":")
    good_port = port.isascii() and port.isdigit() and 0 < int(port) < 65_536
    if not text.isascii() or not text.isprintable() or not good_port or host.strip("[]") in WILDCARDS or "" in parts:
        raise BackendError("instance", text, EXPECTED)
    if kind == "http":
        if not parts:
            raise BackendError("instance", text, EXPECTED)
        return kind, text, stable_id(address), parts[-1]
    if len(parts) > 2 or (len(parts) == 2 and not HEX.fullmatch(parts[0])):
        raise BackendError("instance", text, EXPECTED)
    number = int(parts[0], 16) if len(parts) == 2 else stable_id(address)
    return kind, text, number, parts[-1] if parts else ""


# --- etcd -------------------------------------------------------------------------------------------------------------


class EtcdInstances(InstanceSource):
    """Instances as Dynamo's runtimes, and our servers, list them in etcd. malformed: values that were not taken."""

    def __init__(self, client: Etcd, *, metrics: EtcdCells | None = None, look_seconds: float = LOOK_SECONDS) -> None:
        self._client, self._metrics, self._look_seconds = client, metrics, look_seconds
        self.malformed = 0

    async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
        keys = _Keys(endpoint, listener, self._count)
        prefix = f"{INSTANCES}{endpoint.namespace}/{endpoint.component}/{endpoint.endpoint}/"
        watcher = EtcdWatcher(self._client, prefix, keys, metrics=self._metrics, look_seconds=self._look_seconds)
        await watcher.run()

    def _count(self) -> None:
        self.malformed += 1


#: Of a place; longer than any that a plane can call. Bad keys that each have their own line; of one, so much is shown.
PLACE_CHARACTERS, BAD_SAID, SHOWN_CHARACTERS = 2_000, 100, 200


def _usable(instance: Instance, endpoint: EndpointName, value: bytes) -> Instance:
    """Return an instance as it is. Raises PayloadError for one of another endpoint, as names with a '/' can make it
    out to be here, and for a place that is none: it goes into logs and errors."""
    if instance[:3] != endpoint:
        raise PayloadError("a Dynamo instance", value, f"it is of another endpoint than {endpoint}")
    kind, place = instance.transport
    if len(place) > PLACE_CHARACTERS or len(kind) > PLACE_CHARACTERS or not (kind + place).isprintable():
        raise PayloadError("a Dynamo instance", value, "its place is too long, or has characters that are none of one")
    return instance


class _Keys:
    """What a watcher tells of keys, told as instances: once for all that came together."""

    def __init__(self, endpoint: EndpointName, listener: InstanceListener, malformed: Callable[[], None]) -> None:
        self._endpoint, self._listener, self._malformed = endpoint, listener, malformed
        self._loop = asyncio.get_running_loop()
        self._found: dict[str, Instance] = {}
        self._bad: dict[str, StateLog] = {}
        self._more = StateLog(log)  # of bad ones beyond BAD_SAID
        self._listed = self._told = False

    def on_put(self, key: str, value: bytes) -> None:
        """A key is there, or has another value."""
        try:
            instance = _usable(Instance.decode(key, value), self._endpoint, value)
        except PayloadError as error:
            self._malformed()
            said, shown = self._said_of(key), key[:SHOWN_CHARACTERS]
            told = "etcd: %r is no instance and is passed over: %s"
            said.note(f"{shown}: {error}", logging.WARNING, told, shown, error)
            self._found.pop(key, None)
        else:
            self._bad.pop(key, None)
            self._found[key] = instance
        self._soon()

    def _said_of(self, key: str) -> StateLog:
        """What was said of a bad key; of many, a few lines in a while."""
        if key not in self._bad and len(self._bad) >= BAD_SAID:
            return self._more
        return self._bad.setdefault(key, StateLog(log))

    def on_delete(self, key: str) -> None:
        """A key is gone."""
        self._bad.pop(key, None)
        self._found.pop(key, None)
        self._soon()

    def on_list(self, items: Mapping[str, bytes]) -> None:
        """Those were all."""
        self._listed = True
        self._soon()

    def _soon(self) -> None:
        if self._listed and not self._told:
            self._told = True
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._told = False
        self._listener(tuple(self._found.values()))


# --- our own discovery ------------------------------------------------------------------------------------------------

#: Labels by which a backend says what it serves. rpc: its plane; rpc_path: of http; rpc_0, rpc_1, ...: endpoints.
PLANE_LABEL, PATH_LABEL = "rpc", "rpc_path"
ENDPOINT_LABEL = re.compile(r"rpc_[0-9]{1,2}", re.ASCII)
ENDPOINTS_LIMIT = 12  # a backend has 16 labels at most
BODY_LIMIT_BYTES = 16 * 1024 * 1024
INTERVAL_SECONDS = 1.0


def labels_of(mode: str, endpoints: Sequence[EndpointName], path: str = "") -> dict[str, str]:
    """Return the labels of a backend that serves endpoints. Raises BackendError for too many of them."""
    if len(endpoints) > ENDPOINTS_LIMIT:
        raise BackendError("endpoints", len(endpoints), f"at most {ENDPOINTS_LIMIT}, as each is a label; or use etcd")
    labels = {PLANE_LABEL: mode, **({PATH_LABEL: path} if path else {})}
    return labels | {f"rpc_{number}": str(name) for number, name in enumerate(endpoints)}


class _Backend(msgspec.Struct):
    """One of /backends?details=1, as far as it matters here."""

    id: str
    address: str
    in_pool: bool
    labels: dict[str, str] = {}


class _Page(msgspec.Struct):
    backends: list[_Backend]


_read_page = msgspec.json.Decoder(_Page).decode


class DirectoryInstances(InstanceSource):
    """Instances among the backends of load balancers (rkmetrics lb), those in rotation.

    balancers: URLs; each backend announces itself to all of them, so the first that answers is believed. token: of the
    balancer's metrics, which guards its lists. An instance's id is made from the backend's.
    """

    def __init__(
        self,
        balancers: Sequence[str],
        *,
        token: Secret | None = None,
        interval_seconds: float = INTERVAL_SECONDS,
        timeout_seconds: float = 2.0,
    ) -> None:
        if not balancers:
            raise BackendError("balancers", balancers, "at least one URL, such as http://balancer:8080")
        whole = [each if "://" in each else f"http://{each}" for each in balancers]
        self._urls = [f"{each.rstrip('/')}/backends?details=1" for each in whole]
        self._headers = ((b"authorization", b"Bearer " + token.reveal()),) if token else ()
        self._interval_seconds, self._timeout_seconds = interval_seconds, timeout_seconds
        self._log = StateLog(log)

    async def follow(self, endpoint: EndpointName, listener: InstanceListener) -> None:
        known: tuple[Instance, ...] | None = None
        backoff = Backoff(0.1, max(self._interval_seconds, 2.0))
        while True:
            found = await self._ask(endpoint)
            if found is None:
                await asyncio.sleep(backoff.next())
                continue
            backoff.reset()
            if found != known:
                known = found
                listener(found)
            await asyncio.sleep(jittered(self._interval_seconds))

    async def _ask(self, endpoint: EndpointName) -> tuple[Instance, ...] | None:
        """Ask the balancers in turn, the one that answered last first; None where none does."""
        reasons: list[str] = []
        for url in list(self._urls):
            try:
                page = await self._page(url)
            except (FetchError, PayloadError) as error:
                reasons.append(str(error))
                self._urls.append(self._urls.pop(0))
            else:
                self._log.note("up", logging.DEBUG, "instances of %s come from %s", endpoint, url.partition("?")[0])
                return self._instances(page, endpoint)
        told = "no balancer lists instances of %s (%s); what is known stays, and tries go on"
        self._log.note("down", logging.WARNING, told, endpoint, "; ".join(reasons))
        return None

    async def _page(self, url: str) -> _Page:
        answer = await get(
            url, headers=self._headers, timeout_seconds=self._timeout_seconds, limit_bytes=BODY_LIMIT_BYTES
        )
        if answer.status != 200:
            mend = "; it takes METRICS_TOKEN of the balancer" if answer.status in (401, 403) else ""
            raise FetchError(url.partition("?")[0], "status", f"status {answer.status}{mend}")
        try:
            return _read_page(answer.body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PayloadError("a list of backends", answer.body, str(error)) from None

    @staticmethod
    def _instances(page: _Page, endpoint: EndpointName) -> tuple[Instance, ...]:
        found: list[Instance] = []
        for backend in page.backends:
            kind = KINDS.get(backend.labels.get(PLANE_LABEL, ""))
            served = (value for name, value in backend.labels.items() if ENDPOINT_LABEL.fullmatch(name))
            if backend.in_pool and kind is not None and str(endpoint) in served:
                number = stable_id(backend.id)
                place = place_of(kind, backend.address, endpoint, number, backend.labels.get(PATH_LABEL, ""))
                found.append(Instance(*endpoint, number, (kind, place)))
        return tuple(sorted(found))
