"""The table of collectors, and how a registry gets them."""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from weakref import ref

import pytest

from rkmetrics import collectors
from rkmetrics.catalogue.node import Node
from rkmetrics.catalogue.runtime import Process, Runtime
from rkmetrics.model import MetricFamily
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings

# Fed by the application, the middleware or a GPU: absent until then.
UNFED = {
    "rkmetrics_node_requests_in_progress",
    "rkmetrics_node_connected_peers",
    "rkmetrics_node_backoff_requests",
    "rkmetrics_node_gpu_usage_ratio",
    "rkmetrics_event_loop_overdue_seconds",
}


def test_every_module_with_install_is_in_the_table() -> None:
    folder = Path(collectors.__file__).parent
    found = {
        path.stem
        for path in folder.glob("*.py")
        if path.stem != "__init__"
        and any(
            isinstance(node, ast.FunctionDef) and node.name == "install" for node in ast.parse(path.read_text()).body
        )
    }
    assert found == set(collectors.COLLECTORS)
    assert all(callable(import_module(module).install) for module in collectors.COLLECTORS.values())


def test_every_family_has_a_series_after_one_collection(registry: Registry) -> None:
    names = {definition.name for known in (Node, Process, Runtime) for definition in known.definitions()}
    families = [family for family in registry.collect() if family.name in names]
    assert {family.name for family in families} == names
    empty = {family.name for family in families if isinstance(family, MetricFamily) and not list(family.series())}
    assert empty == UNFED


def test_installing_again_changes_nothing(registry: Registry) -> None:
    before = len(gc.callbacks), len(registry.collect())
    collectors.install(registry)
    assert (len(gc.callbacks), len(registry.collect())) == before


def test_a_registry_without_built_ins_has_none_of_them() -> None:
    bare = Registry(Settings(), builtin=False)
    assert {Node, Process, Runtime}.isdisjoint(bare.sets())


def test_a_collector_that_cannot_be_loaded_costs_its_own_families_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, look: Callable[..., object]
) -> None:
    monkeypatch.setattr(collectors, "COLLECTORS", {"absent": "rkmetrics.collectors.absent", **collectors.COLLECTORS})
    registry = Registry(Settings())
    assert look("rkmetrics_collector_errors_total", registry, collector="absent") == 1.0
    assert look("process_threads", registry) is not None
    assert "'absent'" in caplog.text


def test_siblings_are_loaded_when_they_are_asked_for(script: Callable[..., str]) -> None:
    loaded = script(
        "import rkmetrics.collectors as c\n"
        "before = 'rkmetrics.collectors.eventloop' in sys.modules\n"
        "print(before, callable(c.eventloop.watch), 'psutil' in sys.modules, hasattr(c, 'nonsense'))"
    )
    assert loaded.split() == ["False", "True", "False", "False"]


def test_a_registry_can_be_dropped_and_takes_its_collectors_along() -> None:
    gc.collect()  # those of earlier tests
    callbacks = len(gc.callbacks)
    registry = Registry(Settings())
    registry.collect()
    assert len(gc.callbacks) == callbacks + 1
    gone = ref(registry)
    del registry
    gc.collect()
    assert gone() is None
    assert len(gc.callbacks) == callbacks
