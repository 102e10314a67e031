"""Sample lines from columns of numbers: the readable twin, which says what `_lines.c` does.

A line is four pieces and a newline: pre + actor name + post + number. Only the name and the number change from line to
line of one kind; `exposition.base` keeps the rest:

    chat_messages_total{actor_name="  lobby  ",kind="text"}   12
    ^ pre                             ^ name ^ post           ^ number

A family that is not labelled by actor name has the one name "", and pre holds all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from math import isfinite

from rkmetrics.model import is_unset

__all__ = ["encode", "number"]

_ODD = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}


def number(value: float, /) -> bytes:
    """The shortest digits that read back as value: `repr`, but 12 for 12.0, and +Inf, -Inf, NaN."""
    return _number(value).encode("ascii")


def _number(value: float) -> str:
    text = repr(float(value))
    return _ODD.get(text) or text.removesuffix(".0")


@lru_cache(maxsize=1024)
def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def encode(
    head: bytes,
    pres: tuple[bytes, ...],
    posts: tuple[bytes, ...],
    names: tuple[str, ...],
    values: Sequence[float],
    bounds: int,
    width: int,
    tails: tuple[tuple[int, bytes], ...] = (),
    /,
) -> bytes:
    """The head and the lines of one family; nothing at all when it has no series.

    pres, posts: the pieces of all lines of one actor name: one for each combo, or (bounds >= 0, a histogram of as many
    bounds) bounds + 3: the buckets up to +Inf, the sum, the count. values: laid out as `model` says; buckets come out
    cumulative, so +Inf is always the count. tails: what follows the number at a position in values, in rising order.
    Raises ValueError when the lengths do not fit together, UnicodeEncodeError for a name with surrogates.
    """
    lines_of_combo = 1 if bounds < 0 else bounds + 3
    combos, rest = divmod(len(pres), lines_of_combo)
    if rest or len(posts) != len(pres) or width < max(bounds + 2, 1):
        raise ValueError("pres, posts, bounds and width do not fit together")
    if len(values) != len(names) * combos * width:
        raise ValueError(f"{len(values)} values; expected {len(names)} names x {combos} combos x {width}")
    pieces = [(pre.decode(), post.decode()) for pre, post in zip(pres, posts, strict=True)]
    tail_at = {position: tail.decode() for position, tail in tails}
    lines: list[str] = []
    position = 0
    for name in names:
        shown = _escaped(name)
        for first in range(0, len(pieces), lines_of_combo):
            value = values[position]
            if value == value or not is_unset(value):
                if bounds < 0 and not tail_at and isfinite(value):  # nearly all lines: no function is called for them
                    pre, post = pieces[first]
                    text = repr(value)
                    lines.append(f"{pre}{shown}{post}{text[:-2] if text[-2:] == '.0' else text}\n")
                else:
                    row = values[position : position + width] if bounds >= 0 else (value,)
                    for k, each in _numbers(row, bounds):
                        pre, post = pieces[first + k]
                        tail = tail_at.get(position + k, "") if k <= max(bounds, 0) else ""
                        lines.append(f"{pre}{shown}{post}{_number(each)}{tail}\n")
            position += width
    return head + "".join(lines).encode("utf-8") if lines else b""


def _numbers(row: Sequence[float], bounds: int) -> Iterator[tuple[int, float]]:
    """The numbers of one series' lines, counted."""
    if bounds < 0:
        return enumerate(row)
    cumulative = list(accumulate(row[: bounds + 1]))
    return enumerate((*cumulative, row[bounds + 1], cumulative[-1]))
