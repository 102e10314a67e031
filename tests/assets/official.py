"""Whether a dashboard is what Grafana's official types describe: those of the SDK, made from Grafana's own schema.

The SDK reads without a word what it does not know. So what is read is written again, and what got lost was no part of
the schema; and what was read is compared with the types that its classes declare.
"""

from __future__ import annotations

import json
import types
import typing
import warnings
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any, cast

with warnings.catch_warnings():  # the SDK would rather have v2
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import dashboard

__all__ = ["violations"]

_SCALARS: dict[Any, tuple[type, ...]] = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}


def violations(board: dict[str, Any]) -> Iterator[str]:
    """Yield what the schema does not have, and what has another type than it says.

    An empty `current` of a variable is what Grafana itself writes for "nothing chosen"; the schema has no word for it.
    """
    _register()
    try:
        read = dashboard.Dashboard.from_json(board)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        yield f"cannot be read: {error!r}"
        return
    yield from _lost(board, _plain(read), "")
    yield from _mistyped(read, dashboard.Dashboard, "")


def _plain(model: object) -> Any:
    return json.loads(json.dumps(model, cls=JSONEncoder))


@cache
def _register() -> None:
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()


def _lost(before: Any, after: Any, place: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in _dict(before).items():
            if key in after:
                yield from _lost(value, after[key], f"{place}.{key}")
            else:
                yield f"{place}.{key} is no part of the schema"
    elif isinstance(before, list) and isinstance(after, list) and len(_list(before)) == len(_list(after)):
        for index, (one, other) in enumerate(zip(_list(before), _list(after), strict=True)):
            yield from _lost(one, other, f"{place}[{index}]")
    elif before != after:
        yield f"{place} is read as {after!r}"


def _mistyped(value: Any, expected: Any, place: str) -> Iterator[str]:
    """Compare a value with a type as it is written in the SDK's classes."""
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        yield from _none_of(value, [each for each in inner if each is not type(None)], len(inner), place)
    elif origin is typing.Literal:
        if value not in inner:
            yield f"{place}: {value!r} is none of {inner}"
    elif origin is list and isinstance(value, list):
        for index, each in enumerate(_list(value)):
            yield from _mistyped(each, inner[0], f"{place}[{index}]")
    elif origin is dict and isinstance(value, dict):
        for key, each in _dict(value).items():
            yield from _mistyped(each, inner[1], f"{place}.{key}")
    elif origin is not None:
        yield f"{place}: {value!r} is no {origin.__name__}"
    else:
        yield from _unlike(value, expected, place)


def _none_of(value: Any, choices: list[Any], several: int, place: str) -> Iterator[str]:
    """A value that may be missing, or of one of several types; of classes its own is the one to look at."""
    if value is None and len(choices) < several:
        return
    likely = [each for each in choices if isinstance(each, type) and type(value) is each] or choices
    found = [list(_mistyped(value, each, place)) for each in likely]
    if all(found):
        yield from min(found, key=len)


def _unlike(value: Any, expected: Any, place: str) -> Iterator[str]:
    if expected in _SCALARS:
        if not isinstance(value, _SCALARS[expected]) or (isinstance(value, bool) and expected is not bool):
            yield f"{place}: {value!r} is no {expected.__name__}"
    elif isinstance(expected, type) and issubclass(expected, Enum):
        if value not in [member.value for member in expected]:
            yield f"{place}: {value!r} is no {expected.__name__}"
    elif expected not in (object, Any) or hasattr(value, "to_json"):
        yield from _members(value, type(value) if expected in (object, Any) else expected, place)


def _members(value: Any, expected: Any, place: str) -> Iterator[str]:
    read = value
    if isinstance(value, dict) and hasattr(expected, "from_json"):  # some lists are handed on as they are
        read = expected.from_json(value)
        yield from _lost(value, _plain(read), place)
    if not isinstance(read, expected):
        yield f"{place}: {value!r} is no {expected.__name__}"
        return
    hints = typing.get_type_hints(expected)
    for name, each in _dict(read.__dict__).items():
        yield from _mistyped(each, hints.get(name, object), f"{place}.{name}")


def _dict(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value)


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value)
