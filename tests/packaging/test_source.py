"""What must not stand in the package's source."""

from __future__ import annotations

import ast
from pathlib import Path

# R19: nothing that can run what it reads. `yaml` is absent because the package reads no YAML with a general loader.
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}


def forbidden(source: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(node.func.id)
    return found


def test_the_package_runs_nothing_that_it_reads(root: Path) -> None:
    found = {
        str(path.relative_to(root)): forbidden(path.read_text()) for path in sorted(root.glob("rkmetrics/**/*.py"))
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_a_forbidden_import_or_call_would_be_found() -> None:
    source = "import pickle\nfrom marshal import loads\ndef f(x):\n    import yaml.constructor\n    return eval(x)\n"
    assert sorted(forbidden(source)) == ["eval", "marshal", "pickle", "yaml.constructor"]


def test_no_file_is_named_after_nothing_in_particular(root: Path) -> None:
    names = {path.stem for path in root.glob("rkmetrics/**/*.py")}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "manager", "misc"})
