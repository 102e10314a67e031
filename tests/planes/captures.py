"""What real runtimes of Dynamo sent: the captured request planes of releases 0.7.1 to 1.0.2, by file."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CALLER_SAYS",
    "DATA",
    "HTTP",
    "NATS",
    "TCP_ACKS",
    "TCP_REQUESTS",
    "TWO_PARTS",
    "WORKER_SAYS",
    "name",
    "payload",
]

DATA = Path(__file__).parents[1] / "data" / "dynamo"


def _files(pattern: str) -> list[Path]:
    found = sorted(DATA.glob(pattern))
    assert found, pattern
    return found


WORKER_SAYS = _files("*/*/rpc_*.callhome_worker_to_client.bin")
CALLER_SAYS = _files("*/*/rpc_*.callhome_client_to_worker.bin")
TCP_REQUESTS = _files("*/tcp/rpc_*.request.bin")
TCP_ACKS = _files("*/tcp/rpc_*.ack.bin")
TWO_PARTS = _files("*/http/rpc_*.twopart.bin")
HTTP = _files("*/http/rpc_*.request.bin")
NATS = _files("*/nats/rpc_*.nats_pub.bin")


def name(file: Path) -> str:
    """How a file is called in a test's name."""
    return file.relative_to(DATA).as_posix()


def payload(file: Path) -> bytes:
    """The two parts of a request, without what carried them."""
    data = file.read_bytes()
    if file in HTTP:
        return data.partition(b"\r\n\r\n")[2]
    if file in NATS:
        line, _, rest = data.partition(b"\r\n")
        sizes = [int(word) for word in line.split() if word.isdigit()]
        headers = sizes[0] if len(sizes) == 2 else 0
        return rest[headers : sizes[-1]]
    if file in TCP_REQUESTS:
        from rkmetrics.planes.frame import RequestReader

        (request,) = RequestReader(1 << 20).feed(data)
        return request.payload
    return data
