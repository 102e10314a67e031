"""What goes to etcd's v3 JSON gateway and what comes back, as values. Pure: no socket, no clock.

Reference: etcd 3.4, "gRPC gateway" and rpc.proto. 64-bit numbers are JSON strings, and numbers in later versions; bytes
are base64; what is absent means 0, false or empty. Answers of calls that stream (keep-alive, watch) are under "result",
errors of a call are {"error", "message", "code"}, of a stream {"error": {"message", "grpc_code"}}.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import msgspec

from rkmetrics.errors import PayloadError

__all__ = [
    "Event",
    "KeyValue",
    "Page",
    "WatchNews",
    "decode",
    "encode",
    "error_of",
    "in_the_way",
    "key_field",
    "object_of",
    "page_of",
    "prefix_end",
    "range_body",
    "revision_of",
    "stated_put",
    "watch_body",
    "watch_news",
    "whole",
]

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder()


class KeyValue(NamedTuple):
    """One key as etcd has it. lease: 0 for none."""

    key: bytes
    value: bytes
    lease: int
    created: int
    modified: int


class Page(NamedTuple):
    """One answer of a range: the keys in order, whether there are more, the revision of the store."""

    items: tuple[KeyValue, ...]
    more: bool
    revision: int


class Event(NamedTuple):
    """One change. A deleted key has no value."""

    item: KeyValue
    deleted: bool


class WatchNews(NamedTuple):
    """One line of a watch. compacted: the first revision that there still is, where the one asked for is gone."""

    events: tuple[Event, ...]
    revision: int
    created: bool
    canceled: bool
    compacted: int
    reason: str
    fragment: bool


def encode(body: Mapping[str, object]) -> bytes:
    """Return a request's body."""
    return _encoder.encode(body)


def decode(data: bytes) -> dict[str, Any]:
    """Read an answer, whatever the bytes are. Raises PayloadError."""
    try:
        found = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PayloadError("an answer of etcd", data, str(error)) from None
    if not isinstance(found, dict):
        raise PayloadError("an answer of etcd", data, "expected an object")
    return cast("dict[str, Any]", found)


def error_of(found: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return code and message of an answer that is an error; None for one that is not.

    The codes are gRPC's; 2 is "unknown".
    """
    inner = found.get("error")
    if inner is None and "code" not in found:
        return None
    fields = cast("Mapping[str, Any]", inner if isinstance(inner, dict) else found)
    message = fields.get("message") or fields.get("error") or ""
    code = fields.get("grpc_code", fields.get("code", 2))
    return (code if isinstance(code, int) else 2), str(message)


# --- fields -----------------------------------------------------------------------------------------------------------


def whole(found: Mapping[str, Any], name: str) -> int:
    """Return a 64-bit number. Raises PayloadError."""
    value = found.get(name, 0)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and value.isascii() and len(value) <= 20:
        return int(value)
    raise PayloadError("an answer of etcd", str(value).encode(), f"{name} is no number")


def _bytes(found: Mapping[str, Any], name: str) -> bytes:
    value = found.get(name, "")
    try:
        return b64decode(value, validate=True)
    except (ValueError, TypeError):
        raise PayloadError("an answer of etcd", str(value).encode(), f"{name} is not base64") from None


def _objects(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value: object = found.get(name) or []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in cast("list[object]", value)):
        raise PayloadError("an answer of etcd", repr(found[name]).encode(), f"{name} is no list of objects")
    return cast("list[dict[str, Any]]", value)


def object_of(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object inside an answer. Raises PayloadError."""
    value = found.get(name, {})
    if not isinstance(value, dict):
        raise PayloadError("an answer of etcd", str(value).encode(), f"{name} is no object")
    return cast("dict[str, Any]", value)


def revision_of(found: Mapping[str, Any]) -> int:
    """Return the revision in the header of an answer."""
    return whole(object_of(found, "header"), "revision")


def _item(found: Mapping[str, Any]) -> KeyValue:
    return KeyValue(
        _bytes(found, "key"),
        _bytes(found, "value"),
        whole(found, "lease"),
        whole(found, "create_revision"),
        whole(found, "mod_revision"),
    )


# --- requests ---------------------------------------------------------------------------------------------------------


def key_field(key: bytes) -> str:
    """Return bytes as the gateway takes them."""
    return b64encode(key).decode("ascii")


def prefix_end(prefix: bytes) -> bytes:
    """Return the end of the range of all keys that begin so (rpc.proto, RangeRequest.range_end)."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\0"


def range_body(key: bytes, end: bytes | None = None, *, limit: int = 0, revision: int = 0) -> dict[str, object]:
    """Ask for a key, or for a range of them; revision 0 is the newest."""
    body: dict[str, object] = {"key": key_field(key), "limit": str(limit), "revision": str(revision)}
    return body if end is None else {**body, "range_end": key_field(end)}


def stated_put(key: bytes, value: bytes, lease: int, created: int = 0) -> dict[str, object]:
    """Put a key if it is in the state that we know: not there (0), or the one of that creation. Else read it."""
    name = key_field(key)
    return {
        "compare": [{"key": name, "target": "CREATE", "result": "EQUAL", "create_revision": str(created)}],
        "success": [{"request_put": {"key": name, "value": key_field(value), "lease": str(lease)}}],
        "failure": [{"request_range": {"key": name}}],
    }


def watch_body(key: bytes, end: bytes, start: int) -> dict[str, object]:
    """Watch a range from a revision on; large news comes in fragments."""
    create = {"key": key_field(key), "range_end": key_field(end), "start_revision": str(start), "fragment": True}
    return {"create_request": create}


# --- answers ----------------------------------------------------------------------------------------------------------


def page_of(found: Mapping[str, Any]) -> Page:
    """Read the answer of a range."""
    items = tuple(_item(each) for each in _objects(found, "kvs"))
    return Page(items, bool(found.get("more")), revision_of(found))


def in_the_way(found: Mapping[str, Any]) -> KeyValue | None:
    """Return the key that kept a `stated_put` from being done: None when it was done, a key of revision 0 where the
    one to be replaced is gone."""
    if found.get("succeeded"):
        return None
    pages = [page_of(object_of(each, "response_range")) for each in _objects(found, "responses")]
    return next((item for page in pages for item in page.items), KeyValue(b"", b"", 0, 0, 0))


def watch_news(found: Mapping[str, Any]) -> WatchNews:
    """Read one line of a watch, without the "result" around it."""
    events = tuple(
        Event(_item(object_of(each, "kv")), each.get("type") in ("DELETE", 1)) for each in _objects(found, "events")
    )
    return WatchNews(
        events,
        revision_of(found),
        bool(found.get("created")),
        bool(found.get("canceled")),
        whole(found, "compact_revision"),
        str(found.get("cancel_reason", "")),
        bool(found.get("fragment")),
    )
