"""Dynamo's instances: bytes as its runtime writes them."""

from __future__ import annotations

import pytest

from rkmetrics.errors import PayloadError
from rkmetrics.etcd.dynamo import Instance, instance_entries

KEY = "v1/instances/dynamo/backend/generate/7d7ba1fbd0159306"
# 0.7.1, and 0.6.0, which prints it in lines and leaves the type out.
VALUES = [
    b'{"type":"Endpoint","component":"backend","endpoint":"generate","namespace":"dynamo",'
    b'"instance_id":9041998779776340742,"transport":{"http":"http://127.0.0.1:8888/v1/rpc/generate"}}',
    b'{\n  "component": "backend",\n  "endpoint": "generate",\n  "namespace": "dynamo",\n'
    b'  "instance_id": 9041998779776340742,\n  "transport": {\n'
    b'    "http": "http://127.0.0.1:8888/v1/rpc/generate"\n  }\n}',
]
INSTANCE = Instance(
    "dynamo", "backend", "generate", 0x7D7BA1FBD0159306, ("http", "http://127.0.0.1:8888/v1/rpc/generate")
)


@pytest.mark.parametrize("value", VALUES)
def test_an_instance_is_read_as_dynamo_writes_it(value: bytes) -> None:
    assert Instance.decode(KEY, value) == INSTANCE


def test_an_instance_is_written_as_dynamo_writes_it() -> None:
    assert (INSTANCE.key, INSTANCE.encode()) == (KEY, VALUES[0])


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff",
        VALUES[0].replace(b"backend", b"other"),
        VALUES[0].replace(b'"http":', b'"a":"b","http":'),
    ],
)
def test_what_is_no_instance_is_refused(value: bytes) -> None:
    with pytest.raises(PayloadError, match="not a Dynamo instance"):
        Instance.decode(KEY, value)


def test_the_id_is_that_of_the_lease() -> None:
    entries = instance_entries("dynamo", "backend", "generate", lambda id: ("tcp", f"127.0.0.1:9999/{id:x}/generate"))
    found = entries(0xABC)
    assert list(found) == ["v1/instances/dynamo/backend/generate/abc"]
    assert b'"instance_id":2748,"transport":{"tcp":"127.0.0.1:9999/abc/generate"}' in next(iter(found.values()))


@pytest.mark.parametrize("name", ["", "a/b", "a b", "é"])
def test_a_name_that_breaks_the_key_is_wrong_use(name: str) -> None:
    with pytest.raises(ValueError, match="expected letters"):
        instance_entries("dynamo", name, "generate", lambda _: ("tcp", ""))
