"""The wheel that a machine without a compiler builds: complete, and it works from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

IGNORED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "tests", "docs")

SCRIPT = """
import rkmetrics as rk
from rkmetrics.cells import IMPLEMENTATION
class Chat(rk.MetricSet):
    messages = rk.Counter("chat_messages_total", "Messages handled.", kind=rk.OneOf("text", "image"))
registry = rk.Registry(rk.Settings(), builtin=False)
registry.bind(Chat, actor_name="lobby").messages["text"].inc()
family = next(family for family in registry.collect() if family.name == "chat_messages_total")
print(IMPLEMENTATION, rk.__file__, [series.value for series in family.series()])
"""


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built with a compiler that fails, from a clean copy: an earlier build would be used again."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(root, source, ignore=IGNORED)
    build = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    env = {**os.environ, "CC": "false"}
    out = subprocess.run(
        [sys.executable, "-c", build], cwd=source, env=env, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    return next(folder.glob("*.whl"))


def test_it_holds_the_package_and_nothing_else(wheel: Path, root: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rkmetrics"}
    expected = {str(path.relative_to(root)) for path in root.glob("rkmetrics/**/*.py")}
    assert expected <= set(names)
    assert {"rkmetrics/py.typed", "rkmetrics/assets/rivetkit.json"} <= set(names)
    pages = {str(path.relative_to(root)) for path in root.glob("rkmetrics/ui/pages/**/*") if path.is_file()}
    shipped = {f"rkmetrics/shipped/{path.relative_to(root)}" for path in root.glob("dashboards/*.json")}
    assert len(pages) > 20
    assert len(shipped) >= 6
    assert pages | shipped <= set(names)
    shipped = {
        f"{path.parent.name}/{path.name}" for path in (*root.glob("alerts/*.yaml"), *root.glob("dashboards/*.json"))
    }
    assert {name.removeprefix("rkmetrics/shipped/") for name in names if "/shipped/" in name} == shipped
    assert [name for name in names if name.endswith((".so", ".pyd"))] == []
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_it_counts_from_another_folder_with_the_python_cells(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RKMETRICS_", "PYTHON"))}
    # -S: without site-packages, where an editable install would lend its compiled modules. The core needs none of it.
    out = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(target)!r})\n{SCRIPT}"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    implementation, place, values = out.stdout.split(maxsplit=2)
    assert (implementation, values.strip()) == ("python", "[1.0, 0.0]")
    assert Path(place).is_relative_to(target)
