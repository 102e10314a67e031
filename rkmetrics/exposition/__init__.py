"""Exposition formats: text 0.0.4, OpenMetrics 1.0.0, Prometheus protobuf. A format is a module and a row here."""

from __future__ import annotations

from rkmetrics.exposition.base import Coding, Format
from rkmetrics.exposition.coding import CODINGS, choose_coding
from rkmetrics.exposition.negotiation import choose, wants
from rkmetrics.exposition.openmetrics import OPENMETRICS
from rkmetrics.exposition.protobuf import PROTOBUF
from rkmetrics.exposition.text import TEXT

__all__ = ["CODINGS", "FORMATS", "Coding", "Format", "choose_coding", "negotiate", "prefers"]

# In our order of preference: what a wildcard gets, and what is answered when nothing else is acceptable.
FORMATS = (TEXT, OPENMETRICS, PROTOBUF)


def negotiate(accept: bytes | None) -> Format:
    """The format that an Accept header asks for (several header lines joined by commas); text when none of ours is."""
    return choose(accept, FORMATS)


def prefers(accept: bytes | None, media_type: str) -> bool:
    """Whether Accept names media_type, such as application/json, and ranks it above every format."""
    return wants(accept, media_type, FORMATS)
