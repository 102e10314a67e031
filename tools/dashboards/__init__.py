"""Write dashboards/*.json: `python -m tools.dashboards`, or `make dashboards`. `--check` only compares.

A board is a module that declares what is shown (rows of panels, each with its queries); render.py turns it into what
Grafana reads, with the types of Grafana's own SDK. The result is committed, so that neither users nor the package
need the SDK. Metrics and values of labels are the catalogue's objects, not text: a rename or a slip fails here.

To add a row: a Row at the end of ROWS of its board, then `make dashboards`. At the end, since a panel's number counts
from the top, and people's links hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from tools.dashboards.base import Board

__all__ = ["BOARDS", "board"]

# File in dashboards/ -> module whose BOARD it is. In the order of an incident: the fleet, one actor, what is below.
BOARDS: Mapping[str, str] = {
    "fleet": "tools.dashboards.fleet",
    "actor": "tools.dashboards.actor",
    "kv": "tools.dashboards.kv",
    "planes": "tools.dashboards.planes",
    "runtime": "tools.dashboards.runtime",
    "backends": "tools.dashboards.backends",
    "exporter": "tools.dashboards.exporter",
}


def board(name: str) -> Board:
    """Return the board of a file."""
    found = import_module(BOARDS[name]).BOARD
    assert isinstance(found, Board)
    return found
