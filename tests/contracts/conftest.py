"""One suite for interchangeable siblings: each test runs with all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from importlib import import_module
from typing import Any

import pytest

from rkmetrics.errors import MissingExtraError
from rkmetrics.planes import PLANES
from tests.contracts.peers import Peers, peers_of
from tests.services.conftest import nats_binary, nats_server

__all__ = ["mode", "nats_binary", "nats_server", "peers", "plane_settings"]


@pytest.fixture(params=sorted(PLANES))
def mode(request: pytest.FixtureRequest) -> str:
    """A plane that can be used here."""
    found: str = request.param
    try:
        import_module(PLANES[found].module)
    except (MissingExtraError, ModuleNotFoundError) as error:
        pytest.skip(f"the {found} plane: {error}")
    if found == "nats":
        request.getfixturevalue("nats_binary")
    return found


@pytest.fixture
def plane_settings(mode: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a plane has to be told: for nats, a real server."""
    return {"nats_server": request.getfixturevalue("nats_server").url} if mode == "nats" else {}


@pytest.fixture
async def peers(mode: str, plane_settings: dict[str, Any]) -> AsyncGenerator[Peers]:
    async with peers_of(mode, **plane_settings) as made:
        yield made
