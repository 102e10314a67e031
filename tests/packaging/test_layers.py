"""The picture of rings in one place: imports point inwards, families meet at the root, and there is no cycle.

Read from the source. Lazy imports inside functions count, imports for type checkers do not. The front door, `rkmetrics`
itself, names everything lazily; nothing inside the package imports it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

DATA, CORE, CODEC, EDGE, ROOT = range(5)

# The longest prefix wins; what is not listed is edge. The catalogue declares MetricSets, which hold cells: core.
RINGS: Mapping[str, int] = {
    "rkmetrics": EDGE,
    "rkmetrics.errors": DATA,
    "rkmetrics.definition": DATA,
    "rkmetrics.model": DATA,
    "rkmetrics.settings": DATA,
    "rkmetrics.native": CORE,
    "rkmetrics.wrapping": CORE,
    "rkmetrics._cells": CORE,
    "rkmetrics._cells_py": CORE,
    "rkmetrics._lines": CORE,
    "rkmetrics._lines_py": CORE,
    "rkmetrics.cells": CORE,
    "rkmetrics.memory": CORE,
    "rkmetrics.metricset": CORE,
    "rkmetrics.catalogue": CORE,
    "rkmetrics.collection": CORE,
    "rkmetrics.guard": CORE,
    "rkmetrics.health": CORE,
    "rkmetrics.lifetime": CORE,
    "rkmetrics.http_answer": CODEC,
    "rkmetrics.http_body": CODEC,
    "rkmetrics.kv.events": CODEC,
    "rkmetrics.kv.hashing": CODEC,
    "rkmetrics.kv.wire": CODEC,
    "rkmetrics.etcd.dynamo": CODEC,
    "rkmetrics.planes.frame": CODEC,
    "rkmetrics.planes.http1": CODEC,
    "rkmetrics.planes.http_base": CODEC,
    "rkmetrics.planes.http2": CODEC,
    "rkmetrics.planes.http2_frames": CODEC,
    "rkmetrics.planes.wire": CODEC,
    "rkmetrics.retry": CORE,
    "rkmetrics.actor": CORE,
    "rkmetrics.registry": CORE,
    "rkmetrics.exposition": CODEC,
    "rkmetrics.promql": CODEC,
    "rkmetrics.runtime": ROOT,
    "rkmetrics.demo": ROOT,
    "rkmetrics.rpc": ROOT,
    "rkmetrics.cli_rpc": ROOT,
    "rkmetrics.cli": ROOT,
    "rkmetrics.commands": ROOT,
    "rkmetrics.__main__": ROOT,
}

# Edge folders whose members meet others only through a base, at the root.
FAMILIES = {"asgi", "bridges", "collectors", "kv", "planes", "discovery", "inspect", "ui", "assets"}

# Edge modules that belong to no family and serve several, with the reason.
SHARED: Mapping[str, str] = {
    "rkmetrics.fetch": "the HTTP client of all who poll or check",
    "rkmetrics.addresses": "where others reach this process, for discovery and the request planes",
    "rkmetrics.nats_link": "a connection to NATS, for the KV plane and the nats request plane",
    "rkmetrics.background": "a thread with a loop, for what goes on beside a program",
    "rkmetrics.etcd.client": "etcd, for discovery and the request planes",
    "rkmetrics.etcd.registrar": "the same",
    "rkmetrics.etcd.watcher": "the same",
}


def ring(module: str) -> int:
    if module.endswith(".base"):
        return CODEC
    while module not in RINGS:
        module = module.rpartition(".")[0]
    return RINGS[module]


def family(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FAMILIES else ""


class Imports(ast.NodeVisitor):
    """What one module imports from rkmetrics when it runs; `eager` of it at once."""

    def __init__(self, module: str, modules: frozenset[str]) -> None:
        self.package = module if f"{module}.__init__" in modules else module.rpartition(".")[0]
        self.modules = modules
        self.found: set[str] = set()
        self.private: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
        else:
            for other in node.orelse:
                self.visit(other)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "rkmetrics")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            base = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            module = ".".join([*base, module] if module else base)
        if module.split(".")[0] != "rkmetrics":
            return
        for alias in node.names:
            if alias.name == "__version__":  # a constant of the front door, read lazily
                continue
            inner = f"{module}.{alias.name}"
            target = inner if inner in self.modules else module
            self.found.add(target)
            last = target.rpartition(".")[2] if target == inner else alias.name
            if last.startswith("_") and target.rpartition(".")[0] != self.package:
                self.private.add(inner)


def read(root: Path) -> dict[str, Imports]:
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.glob("rkmetrics/**/*.py"))
    }
    plain = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    modules = frozenset(plain) | frozenset(paths)
    found: dict[str, Imports] = {}
    for name, path in plain.items():
        found[name] = Imports(name, modules)
        found[name].visit(ast.parse(path.read_text()))
        found[name].found.discard(name)
    return found


@pytest.fixture(scope="session")
def imports(root: Path) -> dict[str, Imports]:
    return read(root)


def edges(imports: Mapping[str, Imports]) -> Iterator[tuple[str, str]]:
    for module, visited in imports.items():
        for target in sorted(visited.found):
            if module != "rkmetrics":
                yield module, target


def test_no_import_points_outward(imports: dict[str, Imports]) -> None:
    outward = [f"{module} -> {target}" for module, target in edges(imports) if ring(target) > ring(module)]
    assert outward == []


def test_edge_families_meet_at_the_root_only(imports: dict[str, Imports]) -> None:
    crossed = [
        f"{module} -> {target}"
        for module, target in edges(imports)
        if ring(module) == EDGE
        and ring(target) == EDGE
        and family(module)
        and family(module) != family(target)
        and target not in SHARED
    ]
    assert crossed == []


def test_there_is_no_cycle(imports: dict[str, Imports]) -> None:
    graph: dict[str, set[str]] = {}
    for module, target in edges(imports):
        graph.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nobody_imports_the_front_door(imports: dict[str, Imports]) -> None:
    assert [module for module, target in edges(imports) if target == "rkmetrics"] == []


def test_what_has_a_leading_underscore_stays_in_its_folder(imports: dict[str, Imports]) -> None:
    assert {module: sorted(visited.private) for module, visited in imports.items() if visited.private} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import rkmetrics.model", {"rkmetrics.model"}),
        ("from rkmetrics import model", {"rkmetrics.model"}),
        ("from rkmetrics.model import Shape", {"rkmetrics.model"}),
        ("from .base import Route", {"rkmetrics.asgi.base"}),
        ("from . import base", {"rkmetrics.asgi.base"}),
        ("from ..model import Shape", {"rkmetrics.model"}),
        ("def f():\n    from rkmetrics.model import Shape", {"rkmetrics.model"}),
        ("if TYPE_CHECKING:\n    from rkmetrics.model import Shape", set()),
        ("import os, json", set()),
    ],
)
def test_imports_are_found_in_each_form(source: str, found: set[str]) -> None:
    modules = frozenset({"rkmetrics", "rkmetrics.model", "rkmetrics.asgi", "rkmetrics.asgi.base", "rkmetrics.asgi.app"})
    visited = Imports("rkmetrics.asgi.app", modules)
    visited.visit(ast.parse(source))
    assert visited.found == found
