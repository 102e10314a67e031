"""`import rkmetrics` is cheap: it loads nothing optional and less than prometheus_client does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What the package may use, and nobody pays for until they do.
HEAVY = {
    "asyncio",
    "google",
    "grpc",
    "gzip",
    "http",
    "msgspec",
    "nats",
    "h2",
    "multiprocessing",
    "opentelemetry",
    "prometheus_client",
    "psutil",
    "socket",
    "ssl",
    "starlette",
    "subprocess",
    "urllib",
    "uvicorn",
    "xxhash",
    "zstandard",
}


def loaded_by(code: str, folder: Path) -> set[str]:
    """Modules that code loads in an interpreter of its own, on top of what a bare one has."""
    script = (
        f"import sys; before = set(sys.modules); sys.path.insert(0, {str(Path.cwd())!r}); {code}; "
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=folder)
    return set(out.stdout.split())


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    tops = {name.split(".")[0] for name in loaded_by("import rkmetrics", tmp_path)}
    assert sorted(tops.intersection(HEAVY)) == []


def test_importing_the_package_loads_fewer_modules_than_prometheus_client(tmp_path: Path) -> None:
    assert len(loaded_by("import rkmetrics", tmp_path)) < len(loaded_by("import prometheus_client", tmp_path))


def test_declaring_and_counting_load_nothing_heavy_where_the_process_is_not_measured(tmp_path: Path) -> None:
    code = (
        "import rkmetrics as rk; "
        "C = type('C', (rk.MetricSet,), {'n': rk.Counter('chat_messages_total', 'Messages.')}); "
        "r = rk.Registry(rk.Settings(), builtin=False); r.bind(C, actor_name='lobby').n.inc()"
    )
    tops = {name.split(".")[0] for name in loaded_by(code, tmp_path)}
    assert sorted(tops.intersection(HEAVY)) == []


BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {path!r})
"""


@pytest.mark.parametrize(
    "code",
    [
        "import rkmetrics as rk; assert rk.Registry(rk.Settings()).collect()",
        "import rkmetrics.cli; raise SystemExit(rkmetrics.cli.main(['catalogue']))",
        "import rkmetrics.cli; raise SystemExit(rkmetrics.cli.main(['info']))",
    ],
)
def test_the_core_works_where_no_extra_is_installed(tmp_path: Path, code: str) -> None:
    extras = {"opentelemetry", "grpc", "zstandard", "uvicorn", "fastapi", "httpx2", "google", "requests"}
    extras |= {"nats", "xxhash", "h2"}
    script = BLOCK.format(names=extras, path=str(Path.cwd())) + code
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (out.returncode, out.stderr) == (0, "")
