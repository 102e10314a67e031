"""The manual keeps step: generated pages are current, its examples run, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rkmetrics.assets.docs import PAGES, stale, write
from rkmetrics.catalogue import sets
from rkmetrics.settings import SETTINGS

FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
HERE = Path(__file__).resolve().parents[2]
DOCUMENTS = [path for path in [HERE / "README.md", *sorted(HERE.glob("docs/**/*.md"))] if path.is_file()]
EXAMPLES = [path for path in DOCUMENTS if FENCE.search(path.read_text())]


def test_generated_pages_are_current(root: Path) -> None:
    assert stale(root / "docs") == [], "run `make docs`"


def test_pages_that_are_written_are_current_then(tmp_path: Path) -> None:
    assert write(tmp_path) == list(PAGES)
    assert (stale(tmp_path), write(tmp_path)) == ([], [])
    (tmp_path / "metrics.md").write_text("old")
    assert stale(tmp_path) == ["metrics.md"]


def test_every_setting_and_every_metric_is_on_its_page() -> None:
    settings, metrics = PAGES["configuration.md"](), PAGES["metrics.md"]()
    assert [row.variable for row in SETTINGS if f"`{row.variable}`" not in settings] == []
    names = [definition.name for known in sets() for definition in known.definitions()]
    assert [name for name in names if f"| `{name}` |" not in metrics] == []


@pytest.mark.parametrize("document", EXAMPLES, ids=lambda path: str(path.relative_to(HERE)))
def test_examples_run(document: Path, tmp_path: Path) -> None:
    """All Python examples of a page are one program, each going on where the last one ended."""
    program = "\n".join(FENCE.findall(document.read_text()))
    script = f"import sys; sys.path.insert(0, {str(HERE)!r})\n{program}"
    out = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(HERE)))
def test_links_lead_somewhere(document: Path) -> None:
    assert [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()] == []


def test_each_decision_is_listed(root: Path) -> None:
    listed = (root / "docs/decisions/README.md").read_text()
    assert [path.name for path in root.glob("docs/decisions/0*.md") if f"({path.name})" not in listed] == []


def test_each_page_is_listed_on_the_front_page(root: Path) -> None:
    listed = (root / "docs/index.md").read_text()
    pages = {path.name for path in root.glob("docs/*.md")} - {"index.md"}
    assert sorted(page for page in pages if f"({page})" not in listed) == []
