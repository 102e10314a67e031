"""How a process is called and where others reach it, where nobody says so."""

from __future__ import annotations

import os
import re
import secrets
import socket
from functools import cache

from rkmetrics.addresses import advertised
from rkmetrics.discovery.base import Backend
from rkmetrics.settings import Settings

__all__ = ["backend_here", "default_id"]

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


@cache
def _id_of(pid: int) -> str:
    host = re.sub(r"[^A-Za-z0-9.-]+", "-", socket.gethostname())[:ID_HOST_CHARACTERS].strip(".-")
    return f"{host or 'backend'}-{secrets.token_hex(4)}"


def default_id() -> str:
    """Return a name for this process that stays the same while it lives; a forked child has another."""
    return _id_of(os.getpid())
