"""Handlers that a worker of Dynamo serves in tests, and that our server serves unchanged. Needs nothing but Python."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

__all__ = ["NAMES", "Handlers"]

NAMES = ("echo", "count", "first", "middle", "who", "forever", "slow")


class Handlers:
    """seen: how each `forever` ended."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    async def echo(self, request: Any) -> AsyncIterator[Any]:
        """The request."""
        yield request

    async def count(self, request: Any) -> AsyncIterator[Any]:
        """n items of a size."""
        for i in range(request["n"]):
            yield {"i": i, "fill": "x" * request.get("size", 0)}

    async def first(self, request: Any) -> AsyncIterator[Any]:
        """Raise before the first item."""
        if request is not None:
            raise ValueError("no first")
        yield request

    async def middle(self, request: Any) -> AsyncIterator[Any]:
        """Raise after it."""
        yield {"i": 0}
        raise ValueError("no middle")

    async def who(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """What the context says."""
        yield {"id": context.id(), "trace_id": context.trace_id, "request": request}

    async def slow(self, request: Any) -> AsyncIterator[Any]:
        """n items, with a pause before each."""
        for i in range(request["n"]):
            await asyncio.sleep(request["seconds"])
            yield {"i": i}

    async def forever(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Go on until it is stopped, and note how that was."""
        made, how = 0, "stopped"
        try:
            while not context.is_stopped():
                yield {"i": made}
                made += 1
                await asyncio.sleep(0.005)
            how = "killed" if context.is_killed() else how
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            self.seen.append({"how": how, "made": made})
