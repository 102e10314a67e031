"""`__all__` is what a module offers: nothing listed is missing, nothing public is left out."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import rkmetrics
from rkmetrics.errors import MissingExtraError

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(rkmetrics.__path__, "rkmetrics.")
    if not module.name.rpartition(".")[2].startswith("_")
)


def load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (MissingExtraError, ModuleNotFoundError) as error:
        if str(error.name or "").startswith("rkmetrics"):
            raise
        pytest.skip(str(error))


def public(module: ModuleType) -> set[str]:
    """Functions and classes that the module itself defines under a public name."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


@pytest.mark.parametrize("name", ["rkmetrics", *MODULES])
def test_all_is_sorted_exists_and_is_complete(name: str) -> None:
    module = load(name)
    listed = list(vars(module)["__all__"])
    assert [entry for entry in listed if not hasattr(module, entry)] == []
    assert len(listed) == len(set(listed))
    assert sorted(public(module) - set(listed)) == []


def test_each_name_of_the_front_door_is_documented() -> None:
    assert [name for name in rkmetrics.__all__ if not inspect.getdoc(getattr(rkmetrics, name))] == []
