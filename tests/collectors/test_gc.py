"""Real collections, by gc.collect(): what they cost and free shows once in each registry."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from rkmetrics.model import HistogramValue
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings

Look = Callable[..., "float | HistogramValue | None"]


@pytest.fixture(autouse=True)
def only_ours() -> object:
    """Collections happen when a test asks for them."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pauses(look: Look, registry: Registry, generation: int) -> int:
    value = look("rkmetrics_gc_pause_seconds", registry, generation=str(generation))
    assert isinstance(value, HistogramValue)
    return value.count


def litter(cycles: int) -> None:
    for _ in range(cycles):
        ring: list[object] = []
        ring.append(ring)


@pytest.mark.parametrize("generation", [0, 2])
def test_a_collection_shows_in_its_generation(registry: Registry, look: Look, generation: int) -> None:
    before = pauses(look, registry, generation)
    gc.collect(generation)
    assert pauses(look, registry, generation) == before + 1


def test_a_pause_takes_time(registry: Registry, look: Look) -> None:
    gc.collect()
    value = look("rkmetrics_gc_pause_seconds", generation="2")
    assert isinstance(value, HistogramValue)
    assert value.sum > 0


def test_what_is_freed_is_counted(registry: Registry, look: Look) -> None:
    litter(1000)
    freed = gc.collect()
    assert freed >= 1000
    assert look("rkmetrics_gc_collected_objects_total", generation="2") == freed
    assert look("rkmetrics_gc_uncollectable_objects_total", generation="2") == 0


def test_several_registries_count_each_collection_once(look: Look) -> None:
    registries = [Registry(Settings()) for _ in range(3)]
    before = [pauses(look, registry, 2) for registry in registries]
    gc.collect()
    assert [pauses(look, registry, 2) for registry in registries] == [count + 1 for count in before]


def test_a_callback_that_leaves_while_others_run_breaks_no_count(registry: Registry, look: Look) -> None:
    """CPython walks gc.callbacks by position, so one that is taken out hides the next from that call."""

    def leaving(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(leaving)

    gc.callbacks.insert(0, leaving)
    before = pauses(look, registry, 2)
    gc.collect()
    gc.collect()
    assert before + 1 <= pauses(look, registry, 2) <= before + 2


def test_the_callback_leaves_no_garbage(registry: Registry) -> None:
    gc.collect()
    for _ in range(100):
        gc.collect(0)
    assert gc.collect() == 0
