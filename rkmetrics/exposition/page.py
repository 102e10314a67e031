"""One page: which families are on it, whatever collectors give.

The rules are those of all formats together, so that every format shows the same families. A name belongs to the first
family that has it, as family or sample; a registry's own families come first. One that clashes with another before it,
or that no format can carry, is left out and said in the log, once for each name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TypeAlias

from rkmetrics.exposition.base import pieces, say_once
from rkmetrics.exposition.foreign import SUFFIXES, fit
from rkmetrics.model import Family, MetricFamily, MetricType, Shape

__all__ = ["shown", "taken", "together"]

# The names that a shape takes, and how many numbers one actor name has.
_Constants: TypeAlias = "tuple[frozenset[str], int]"

# What a family's name takes besides itself: what readers look for in a family of that type.
_TAKEN_SUFFIXES = {kind: ("", *suffixes) for kind, suffixes in SUFFIXES.items()}
_TAKEN_SUFFIXES[MetricType.GAUGEHISTOGRAM] += ("_sum", "_count")  # a histogram in text 0.0.4

_COLUMNAR = (MetricType.COUNTER, MetricType.GAUGE, MetricType.HISTOGRAM)


def together(families: Iterable[Family], encode_one: Callable[[Family], bytes], end: bytes = b"") -> bytes:
    """All families as one page. A family that cannot be encoded is left out. end: what closes the page."""
    parts: list[bytes] = []
    for family in shown(families):
        try:
            parts.append(encode_one(family))
        except Exception:  # whatever it is, it costs this family only
            _say_broken(family)
    parts.append(end)
    return b"".join(parts)


def taken(families: Iterable[Family]) -> set[str]:
    """The names that no further family on a page with these may have."""
    names: set[str] = set()
    for _ in shown(families, names):
        pass
    return names


def shown(families: Iterable[Family], taken: set[str] | None = None) -> Iterator[Family]:
    """The families that a page has, foreign ones made fit, one after another as they come.

    taken: names that these may not have; theirs come to it.
    """
    taken = set() if taken is None else taken
    sound: object = None  # the families of a set share their actor names: they are checked once
    for family in families:
        try:
            if isinstance(family, MetricFamily):
                names = _check(family)
                if family.actor_names is not sound:
                    _check_actor_names(family.actor_names)
                    sound = family.actor_names
                fitted: tuple[tuple[Family, frozenset[str]], ...] = ((family, names),)
            else:
                fitted = tuple([(one, _names(one.name, one.type)) for one in fit(family)])
        except Exception:
            _say_broken(family)
            continue
        for one, names in fitted:
            if taken.isdisjoint(names):
                taken |= names
                yield one
            else:
                say_once(one.name, "a family before it has a name of its")


def _say_broken(family: Family) -> None:
    try:
        name = str(family.name)
    except Exception:  # a user may put anything into a dataclass
        name = type(family).__name__
    say_once(name, "it cannot be written", with_traceback=True)


def _names(name: str, kind: MetricType) -> frozenset[str]:
    """The names that a family takes. name: as in OpenMetrics."""
    return frozenset([name + suffix for suffix in _TAKEN_SUFFIXES[kind]])


def _check(family: MetricFamily) -> frozenset[str]:
    """The names that a family takes. Raises ValueError for one that some format cannot carry."""
    shape = family.shape
    found: _Constants | None = shape.memo.get(_constants)
    if found is None:
        found = shape.memo[_constants] = _constants(shape)
    names, numbers = found
    count = len(family.actor_names)
    if len(family.values) != count * numbers or len(family.start_times) != count:
        raise ValueError(f"{shape.name}: {len(family.values)} values; expected {count} x {numbers}")
    if count > 1 and not shape.per_actor:
        raise ValueError(f"{shape.name}: {count} actor names in a family that is not per actor")
    return names


def _check_actor_names(names: tuple[str, ...]) -> None:
    if len(set(names)) != len(names):
        raise ValueError("an actor name occurs twice")
    "".join(names).encode()  # raises for what is no text in UTF-8


def _constants(shape: Shape) -> _Constants:
    kind, labels = shape.type, shape.label_names
    if kind not in _COLUMNAR or not isinstance(kind, MetricType):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{shape.name}: columns are counters, gauges or histograms, not {kind!r}")
    reserved = {"actor_name"} if shape.per_actor else set[str]()
    if kind is MetricType.HISTOGRAM:
        reserved.add("le")
    if len(set(labels)) != len(labels) or not reserved.isdisjoint(labels):
        raise ValueError(f"{shape.name}: labels {labels!r}: each once, and none of {sorted(reserved)}")
    if len(set(shape.combos)) != len(shape.combos):
        raise ValueError(f"{shape.name}: a series occurs twice in combos")
    edges = (-math.inf, *shape.bounds, math.inf)
    if not all(low < high for low, high in pairwise(edges)):
        raise ValueError(f"{shape.name}: bounds {shape.bounds!r}: expected finite ones that rise")
    if kind is MetricType.COUNTER and shape.name == "_total":
        raise ValueError("_total: in OpenMetrics, a counter without a name")
    pieces(shape)  # raises for names and values that cannot be written
    (shape.help + shape.unit).encode()
    counter = kind is MetricType.COUNTER and shape.name.endswith("_total")
    name = shape.name.removesuffix("_total") if counter else shape.name
    names = frozenset([name]) if kind is MetricType.COUNTER and not counter else _names(name, kind)
    return names, len(shape.combos) * shape.width
