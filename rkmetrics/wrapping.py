"""Functions that run inside a block of their own each time they are called: what timers and tasks are as decorators."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, aclosing
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

__all__ = ["inside"]

P = ParamSpec("P")
R = TypeVar("R")


def inside(block: Callable[[], AbstractContextManager[object]], function: Callable[P, R]) -> Callable[P, R]:
    """The function, each call of which runs in a new block.

    A coroutine is in its block over its whole run; a generator, asynchronous or not, from its first item to its last,
    and what its consumer does in between counts too.
    """
    for fits, wrap in _KINDS:
        if fits(function):
            return cast("Callable[P, R]", wraps(function)(wrap(block, function)))
    return cast("Callable[P, R]", wraps(function)(_call(block, function)))


def _call(block: Callable[[], AbstractContextManager[object]], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with block():
            return function(*args, **kwargs)

    return call


def _coroutine(block: Callable[[], AbstractContextManager[object]], function: Callable[..., Any]) -> Callable[..., Any]:
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        with block():
            return await function(*args, **kwargs)

    return coroutine


def _generator(block: Callable[[], AbstractContextManager[object]], function: Callable[..., Any]) -> Callable[..., Any]:
    def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with block():
            made: Generator[Any, Any, Any] = function(*args, **kwargs)
            return (yield from made)

    return generator


def _asyncgen(block: Callable[[], AbstractContextManager[object]], function: Callable[..., Any]) -> Callable[..., Any]:
    async def asyncgen(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with block():
            async with aclosing(function(*args, **kwargs)) as items:
                sent: Any = None
                while True:
                    try:
                        item = await items.asend(sent)
                    except StopAsyncIteration:
                        return
                    sent = yield item

    return asyncgen


_KINDS: tuple[tuple[Callable[[Any], bool], Callable[..., Callable[..., Any]]], ...] = (
    (inspect.iscoroutinefunction, _coroutine),
    (inspect.isasyncgenfunction, _asyncgen),
    (inspect.isgeneratorfunction, _generator),
)
