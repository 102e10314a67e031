"""A thin client on etcd's v3 JSON gateway: one call, one answer, within a time.

Written by hand because the libraries bring grpcio and protobuf (tens of MiB, and versions that quarrel with others'),
or end a watch with its connection. A call has a connection of its own: a process makes one or two each few seconds, and
what never stays open is never half-open. Of several endpoints the one that answered last is asked first; one that does
not answer is passed over, so a call takes `timeout_seconds` for each endpoint at most.

A call may reach etcd and its answer be lost; the next endpoint is then asked to do it again. All calls here can be
done twice; a lease that was granted and never heard of ends by itself.
"""

from __future__ import annotations

import random
import ssl as tls
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from rkmetrics.errors import (
    CompactedError,
    EtcdError,
    EtcdUnavailableError,
    FetchError,
    LeaseLostError,
    PayloadError,
)
from rkmetrics.etcd import wire
from rkmetrics.etcd.wire import KeyValue, WatchNews
from rkmetrics.fetch import Endpoint, send
from rkmetrics.stream import LineCutter, Stream

__all__ = ["ANSWER_LIMIT_BYTES", "KEYS_LIMIT", "PAGE_KEYS", "Etcd"]

T = TypeVar("T")

ANSWER_LIMIT_BYTES = 8 * 1024 * 1024  # of a page, or of one line of a watch
PAGE_KEYS = 500
KEYS_LIMIT = 200_000  # under one prefix
TIMEOUT_SECONDS = 2.0
HEADERS = ((b"content-type", b"application/json"),)

# Answers with these come from etcd's gateway, in JSON; others from something in between, as far as we care.
SPOKEN = frozenset({200, 400, 401, 403, 404, 409, 412, 429, 500, 501, 503, 504})
NOT_FOUND, EXISTS, OUT_OF_RANGE, UNAVAILABLE, UNKNOWN = 5, 9, 11, 14, 2
# gRPC codes: which of them another endpoint, or another time, may mend (deadline, unavailable), and which say more.
ERRORS: Mapping[int, type[EtcdError]] = {
    4: EtcdUnavailableError,
    NOT_FOUND: LeaseLostError,
    OUT_OF_RANGE: CompactedError,
    UNAVAILABLE: EtcdUnavailableError,
}


class Etcd:
    """Where etcd is, and what it can be asked. To be used from one running event loop at a time.

    endpoints: URLs. ssl: for https, with a client certificate where etcd asks for one; by default the system's
    authorities. All calls raise EtcdError or what is derived from it, and nothing else.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        ssl: tls.SSLContext | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        if not endpoints:
            raise ValueError("endpoints=(): expected at least one URL, such as http://127.0.0.1:2379")
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._shown = [Endpoint.parse(endpoint).authority for endpoint in self._endpoints]
        self._at = random.randrange(len(self._endpoints))  # noqa: S311 - spreads the load, no secret
        self._ssl, self.timeout_seconds = ssl, timeout_seconds

    @property
    def shown(self) -> str:
        """The endpoints as a log may have them: hosts and ports, no credentials."""
        return ", ".join(self._shown)

    # --- leases -------------------------------------------------------------------------------------------------------

    async def grant(self, ttl_seconds: int, lease: int = 0) -> int:
        """Return the id of a lease: a new one, or the one asked for, which may exist already."""
        try:
            return await self._call("lease/grant", {"TTL": str(ttl_seconds), "ID": str(lease)}, _whole("ID"))
        except EtcdError as error:
            if lease and error.code == EXISTS:
                return lease
            raise

    async def keep_alive(self, lease: int) -> int:
        """Return the seconds that the lease has from now on. Raises LeaseLostError."""
        seconds = await self._call("lease/keepalive", {"ID": str(lease)}, _whole("TTL"))
        if seconds <= 0:
            raise LeaseLostError("lease/keepalive", self._shown[self._at], NOT_FOUND, f"no lease {lease:x}")
        return seconds

    async def revoke(self, lease: int) -> bool:
        """End a lease, and its keys with it. False where there is none."""
        try:
            await self._call("lease/revoke", {"ID": str(lease)}, wire.revision_of)
        except LeaseLostError:
            return False
        return True

    # --- keys ---------------------------------------------------------------------------------------------------------

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> int:
        """Write a key, whatever is there; return the store's revision. Raises LeaseLostError."""
        body = {"key": wire.key_field(key), "value": wire.key_field(value), "lease": str(lease)}
        return await self._call("kv/put", body, wire.revision_of)

    async def create(self, key: bytes, value: bytes, lease: int = 0, *, over: int = 0) -> KeyValue | None:
        """Write a key where there is none, or only the one that was created at revision `over`.

        Return the key that is in the way (of revision 0 where the one to be replaced is gone), None where ours is
        written. Raises LeaseLostError.
        """
        return await self._call("kv/txn", wire.stated_put(key, value, lease, over), wire.in_the_way)

    async def get(self, key: bytes) -> KeyValue | None:
        """Return one key; None where there is none."""
        page = await self._call("kv/range", wire.range_body(key), wire.page_of)
        return page.items[0] if page.items else None

    async def range(self, prefix: bytes) -> tuple[list[KeyValue], int]:
        """Return all keys that begin so, of one revision of the store, and that revision."""
        items: list[KeyValue] = []
        key, end, revision = prefix, wire.prefix_end(prefix), 0
        while True:
            body = wire.range_body(key, end, limit=PAGE_KEYS, revision=revision)
            page = await self._call("kv/range", body, wire.page_of)
            items += page.items
            revision = revision or page.revision
            if not page.more or not page.items:
                return items, revision
            if len(items) >= KEYS_LIMIT:
                raise EtcdError("kv/range", self._shown[self._at], 8, f"more than {KEYS_LIMIT} keys under {prefix!r}")
            key = page.items[-1].key + b"\0"

    async def delete(self, key: bytes) -> bool:
        """Delete a key. False where there is none."""
        return await self._call("kv/deleterange", {"key": wire.key_field(key)}, _whole("deleted")) > 0

    async def txn(self, body: Mapping[str, object]) -> Mapping[str, Any]:
        """Do a transaction as the gateway takes it; return its answer."""
        return await self._call("kv/txn", body, _as_it_is)

    async def revision(self) -> int:
        """Ask an endpoint for a sign of life: the store's revision, as that member has it."""
        body = {**wire.range_body(b"\0"), "count_only": True, "serializable": True}
        return await self._call("kv/range", body, wire.revision_of)

    # --- watching -----------------------------------------------------------------------------------------------------

    async def watch(self, prefix: bytes, start: int) -> AsyncGenerator[WatchNews, None]:
        """Give what changes under a prefix from a revision on, for as long as the connection lasts.

        Close it (aclosing). Raises CompactedError, and EtcdUnavailableError at the end of the connection; go on from
        the last revision + 1 then. Silence has no limit here: who wants to know asks `revision()` meanwhile.
        """
        endpoint, shown = self._endpoints[self._at], self._shown[self._at]
        body = wire.encode(wire.watch_body(prefix, wire.prefix_end(prefix), start))
        cutter = LineCutter(ANSWER_LIMIT_BYTES)
        try:
            async with Stream("POST", f"{endpoint}/v3/watch", body=body, headers=HEADERS, ssl=self._ssl) as stream:
                while piece := await stream.read():
                    for line in cutter.feed(piece):
                        yield _news(stream.status, line, shown)
                if rest := cutter.finish():
                    yield _news(stream.status, rest, shown)
        except (FetchError, PayloadError, ValueError) as error:
            self.try_another()
            raise EtcdUnavailableError("watch", shown, UNKNOWN, str(error)) from None
        raise EtcdUnavailableError("watch", shown, UNKNOWN, "the watch ended")

    def try_another(self) -> None:
        """The endpoint that answered last is not to be trusted any more: begin with the next one."""
        self._at = (self._at + 1) % len(self._endpoints)

    # --- calls --------------------------------------------------------------------------------------------------------

    async def _call(self, call: str, body: Mapping[str, object], read: Callable[[dict[str, Any]], T]) -> T:
        """Ask the endpoints in turn, until one answers what can be read."""
        data = wire.encode(body)
        for left in reversed(range(len(self._endpoints))):
            try:
                return await self._ask(call, data, read)
            except EtcdUnavailableError:
                self.try_another()
                if not left:
                    raise
        raise AssertionError

    async def _ask(self, call: str, data: bytes, read: Callable[[dict[str, Any]], T]) -> T:
        url, shown = f"{self._endpoints[self._at]}/v3/{call}", self._shown[self._at]
        try:
            answer = await send(
                "POST",
                url,
                body=data,
                headers=HEADERS,
                timeout_seconds=self.timeout_seconds,
                limit_bytes=ANSWER_LIMIT_BYTES,
                ssl=self._ssl,
            )
            return read(_result(call, shown, answer.status, answer.body))
        except (FetchError, PayloadError) as error:
            raise EtcdUnavailableError(call, shown, UNKNOWN, str(error)) from None


def _whole(name: str) -> Callable[[dict[str, Any]], int]:
    return lambda found: wire.whole(found, name)


def _as_it_is(found: dict[str, Any]) -> dict[str, Any]:
    return found


def _result(call: str, shown: str, status: int, data: bytes) -> dict[str, Any]:
    """Return what is answered; an error is raised."""
    if status not in SPOKEN:
        raise EtcdUnavailableError(call, shown, UNKNOWN, f"status {status}")
    found = wire.decode(data)
    error = wire.error_of(found)
    if error is not None:
        raise ERRORS.get(error[0], EtcdError)(call, shown, *error)
    if status != 200:
        raise EtcdUnavailableError(call, shown, UNKNOWN, f"status {status}")
    return wire.object_of(found, "result") if "result" in found else found


def _news(status: int, line: bytes, shown: str) -> WatchNews:
    news = wire.watch_news(_result("watch", shown, status, line))
    if news.compacted:
        raise CompactedError("watch", shown, OUT_OF_RANGE, "the revision is compacted", news.compacted)
    if news.canceled:
        raise EtcdUnavailableError("watch", shown, UNKNOWN, news.reason or "the watch was canceled")
    return news
