"""The extensions under gcc's sanitizers: both modules built anew, and their whole suites run in an interpreter of
their own.

Addresses and undefined behaviour for everything; data races for the threads' test. Leaks are watched where they are
cheap to see: tests/test_cells.py counts allocated blocks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("_cells", "_lines")
GCC = shutil.which("gcc")

pytestmark = pytest.mark.skipif(
    GCC is None
    or not (ROOT / "rkmetrics" / "_cells.c").exists()
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="needs gcc, Python's headers and the sources: apt-get install gcc python3-dev",
)


def runtime(name: str) -> str:
    """Where gcc keeps a sanitizer's library; it must be there before the interpreter starts."""
    assert GCC
    found = subprocess.run([GCC, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"gcc has no {name} here")
    return found


def build(tree: Path, *flags: str) -> None:
    """A copy of the package whose extensions are built with `flags`."""
    assert GCC
    shutil.copytree(ROOT / "rkmetrics", tree / "rkmetrics", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in SOURCES:
        source, made = tree / "rkmetrics" / f"{name}.c", tree / "rkmetrics" / f"{name}{suffix}"
        include = sysconfig.get_path("include")
        command = [GCC, "-std=c11", "-g", "-O1", "-shared", "-fPIC", "-fno-omit-frame-pointer", *flags, f"-I{include}"]
        subprocess.run([*command, "-o", str(made), str(source)], check=True)


def run(tree: Path, preload: str, *tests: str, **options: str) -> None:
    env = {
        **os.environ,
        **options,
        "LD_PRELOAD": preload,
        "PYTHONMALLOC": "malloc",  # so that each object is an allocation that the sanitizer sees
        "PYTHONPATH": str(tree),
        "RKMETRICS_PURE_PYTHON": "",
    }
    python = os.path.realpath(sys.executable)  # a wrapper script would be checked as well
    site = os.pathsep.join([str(tree), *(path for path in sys.path if path.endswith("site-packages"))])
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=tree, env={**env, "PYTHONPATH": site}, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    for word in ("AddressSanitizer", "runtime error", "ThreadSanitizer"):
        assert word not in said, said[-8000:]


SUITES = ("tests/test_cells.py", "tests/exposition/test_lines.py")


def test_no_bad_address_and_no_undefined_behaviour(tmp_path: Path) -> None:
    preload = runtime("libasan.so")
    build(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    left_out = "not allocated_blocks"  # which malloc leaves uncounted
    run(tmp_path, preload, *SUITES, "-k", left_out, ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1")


def test_no_data_race_in_the_extension(tmp_path: Path) -> None:
    preload = runtime("libtsan.so")
    build(tmp_path, "-fsanitize=thread")
    run(tmp_path, preload, "tests/test_cells.py", "-k", "TestThreads", TSAN_OPTIONS="halt_on_error=1")


def test_the_sources_are_right_without_the_global_lock(tmp_path: Path) -> None:
    """Such an interpreter is not at hand everywhere; a build for one is optional, so its errors would pass unseen."""
    if sys.hexversion < 0x030D0000:
        pytest.skip("Python before 3.13 has no free-threaded build")
    assert GCC
    include = sysconfig.get_path("include")
    for name in SOURCES:
        source = ROOT / "rkmetrics" / f"{name}.c"
        subprocess.run(
            [GCC, "-std=c11", "-fsyntax-only", "-Werror", "-DPy_GIL_DISABLED=1", f"-I{include}", source], check=True
        )
