"""What the tests of dashboards and rules share: the source tree, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository; skips where only the tests were copied, beside an installed wheel."""
    if not (ROOT / "rkmetrics" / "errors.py").is_file():
        pytest.skip("not in a source tree")
    return ROOT
