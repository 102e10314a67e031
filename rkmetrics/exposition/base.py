"""What the formats share: the lexis of names, labels and numbers, and the cached pieces of sample lines.

References: Prometheus "Exposition formats" (text 0.0.4) and OpenMetrics 1.0.0. What is constant about a family is spelt
once and kept in its Shape's memo; a scrape formats numbers and copies bytes.

One family never harms another (a rule of the product, not of the formats): what cannot be written is left out and said
in the log, once for each name.
"""

from __future__ import annotations

import logging
import math
import re
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rkmetrics.model import Exemplar, Family, MetricFamily, MetricType, Shape
from rkmetrics.native import twin

if TYPE_CHECKING:
    from rkmetrics import _lines as _impl
else:
    _impl = twin("lines")

__all__ = [
    "LABEL_NAME",
    "METRIC_NAME",
    "Coding",
    "Format",
    "Pieces",
    "bound",
    "escape",
    "exemplar_labels",
    "is_time",
    "labels",
    "number",
    "pieces",
    "sample_lines",
    "say_once",
]

encode = _impl.encode
number = _impl.number

_log = logging.getLogger("rkmetrics.exposition")

METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL_NAME = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")

# OpenMetrics 1.0, "Exemplars": names and values of an exemplar's labels together.
EXEMPLAR_CHARACTERS = 128

_YEAR_10000 = 253_402_300_800

# Family names whose trouble was logged. Past the limit nothing more is: the log stays bounded like all else.
_LOGGED: set[str] = set()
_LOGGED_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Format:
    """One exposition format.

    parameters: what a media range may ask of each parameter, in lower case, with "" where it may leave the parameter
    out; a
        parameter that is not listed may ask anything (escaping= does: all our names are in the classic character set).
    encode: families to a whole page. Never raises because of one family.
    """

    name: str
    content_type: str
    media_type: str
    parameters: Mapping[str, tuple[str, ...]]
    encode: Callable[[Iterable[Family]], bytes]


@dataclass(frozen=True, slots=True)
class Coding:
    """One content coding: how a page is packed for the way. named_only: given to who names it, not to who says "*"."""

    name: str
    compress: Callable[[bytes], bytes]
    aliases: tuple[str, ...] = ()
    named_only: bool = False


@dataclass(frozen=True, slots=True)
class Pieces:
    """The constant pieces of one actor name's sample lines, as `_lines_py` explains. bounds: -1 if not a histogram."""

    pres: tuple[bytes, ...]
    posts: tuple[bytes, ...]
    bounds: int


def escape(text: str) -> str:
    """A label value as both text formats want it between quotes."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def bound(value: float) -> str:
    """A bucket's upper bound or a quantile (OpenMetrics 1.0, "Considerations: Canonical Numbers"): 0.005, 1.0, 1e+06,
    +Inf.

    The same in all formats, so that the names of series do not depend on what was negotiated: it is also how Prometheus
    spells the numbers that it reads from protobuf. Go's %g with ".0" where nothing else says that it is a float.
    """
    text = repr(float(value))
    if math.isnan(value) or math.isinf(value):
        return number(value).decode()
    whole, point, fraction = text.lstrip("-").partition(".")
    if not point or "e" in text or len(whole) <= 6:
        return text
    digits = (whole + fraction).rstrip("0")  # Python goes to exponents at 1e16, Go at 1e6
    mantissa = f"{digits[0]}.{digits[1:]}".rstrip(".")
    return f"{'-' if value < 0 else ''}{mantissa}e+{len(whole) - 1:02d}"


def labels(pairs: Iterable[tuple[str, str]]) -> str:
    """Pairs as they stand between braces."""
    return ",".join([f'{name}="{escape(value)}"' for name, value in pairs])


def pieces(shape: Shape) -> Pieces:
    """The pieces of shape's lines, made once. Raises ValueError for a name that would break the page."""
    found = shape.memo.get(Pieces)
    if found is None:
        found = shape.memo[Pieces] = _pieces(shape)
    assert isinstance(found, Pieces)
    return found


def _pieces(shape: Shape) -> Pieces:
    for name, grammar in ((shape.name, METRIC_NAME), *((name, LABEL_NAME) for name in shape.label_names)):
        if not grammar.fullmatch(name):
            raise ValueError(f"{shape.name!r}: {name!r} is not a name that the formats can carry")
    lines = [
        (suffix, [*zip(shape.label_names, combo, strict=True), *extra])
        for combo in shape.combos
        for suffix, extra in _lines_of_series(shape)
    ]
    bounds = len(shape.bounds) if shape.type is MetricType.HISTOGRAM else -1
    if not shape.per_actor:
        whole = tuple(f"{shape.name}{suffix}{_braced(pairs)} ".encode() for suffix, pairs in lines)
        return Pieces(whole, (b"",) * len(whole), bounds)
    pres = tuple(f'{shape.name}{suffix}{{actor_name="'.encode() for suffix, _ in lines)
    posts = tuple(f'"{"," if pairs else ""}{labels(pairs)}}} '.encode() for _, pairs in lines)
    return Pieces(pres, posts, bounds)


def _lines_of_series(shape: Shape) -> list[tuple[str, list[tuple[str, str]]]]:
    """Suffix and further labels of each line, in the order of `_lines_py`: buckets, sum, count."""
    if shape.type is not MetricType.HISTOGRAM:
        return [("", [])]
    buckets = [("_bucket", [("le", bound(upper))]) for upper in (*shape.bounds, math.inf)]
    return [*buckets, ("_sum", []), ("_count", [])]


def _braced(pairs: list[tuple[str, str]]) -> str:
    return f"{{{labels(pairs)}}}" if pairs else ""


def sample_lines(family: MetricFamily, head: bytes, tails: tuple[tuple[int, bytes], ...] = ()) -> bytes:
    """The head and all lines of a family, or nothing when none of its series exists.

    tails: what follows the number at a position in the family's values, in rising order.
    """
    kept = pieces(family.shape)
    values = family.values if isinstance(family.values, (array, memoryview)) else array("d", family.values)
    return encode(head, kept.pres, kept.posts, family.actor_names, values, kept.bounds, family.shape.width, tails)


def exemplar_labels(exemplar: Exemplar) -> tuple[tuple[str, str], ...] | None:
    """The labels of an exemplar that a reader will take, or None: then it is left out, and the sample stays."""
    pairs = exemplar.labels
    if sum(len(name) + len(value) for name, value in pairs) > EXEMPLAR_CHARACTERS:
        return None
    names = {name for name, _ in pairs}
    return pairs if len(names) == len(pairs) and all(map(LABEL_NAME.fullmatch, names)) else None


def say_once(name: str, why: str, *, with_traceback: bool = False) -> None:
    """Say in the log that the family or sample of that name is left out; nothing when it was said before."""
    if name not in _LOGGED and len(_LOGGED) < _LOGGED_LIMIT:
        _LOGGED.add(name)
        _log.error("%.200r is left out of the exposition: %s", name, why, exc_info=with_traceback)


def is_time(seconds: float) -> bool:
    """Whether seconds since 1970 are a time that all formats can hold: protobuf's end with the year 9999."""
    return abs(seconds) < _YEAR_10000
