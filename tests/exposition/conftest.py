"""Each test begins with nothing said in the log, and leaves none of its names there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rkmetrics.exposition import base


@pytest.fixture(autouse=True)
def nothing_was_said() -> Iterator[None]:
    base._LOGGED.clear()
    yield
    base._LOGGED.clear()
