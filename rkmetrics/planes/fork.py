"""What a forked child inherits of servers and clients, and must not have.

The child's copies of sockets are the parent's connections: while the child lives, the parent's port stays taken and its
peers never see an end; what the child reads of them the parent misses. These objects live in the user's own event loop,
which does not run in the child, so there is nothing to stop there: `go_on_in_child` is called at once, puts nothing in
the place of each descriptor, and leaves an object as if it had never been started. The child may start it in a loop of
its own; a server is then another process with the same id, which is for its user to know.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Iterator

from rkmetrics.background import unplug
from rkmetrics.lifetime import PROCESS, Hooks

__all__ = ["at_fork", "descriptors", "unplug_all"]

#: Kept in the child for ever: what is collected there would warn, and close numbers that are others' by then.
_inherited: list[object] = []


def _nothing_to_do(_: float) -> bool:
    """At exit: the user's loop is over by then."""
    return True


def at_fork(owner: object, go_on_in_child: Callable[[], None]) -> Callable[[], None]:
    """Have a bound method called in forked children, until what is returned is called, or its owner is gone."""
    method = weakref.WeakMethod(go_on_in_child)

    def child() -> None:
        call = method()
        if call is not None:
            call()

    remove = PROCESS.add(Hooks(_nothing_to_do, _nothing_to_do, child))
    weakref.finalize(owner, remove).atexit = False
    return remove


def descriptors(things: Iterable[asyncio.Server | asyncio.BaseTransport | None]) -> Iterator[int]:
    """The descriptors of servers and transports that are open."""
    for each in things:
        if isinstance(each, asyncio.BaseTransport):
            sock = each.get_extra_info("socket")
            if sock is not None:
                yield sock.fileno()
        elif each is not None:
            yield from (sock.fileno() for sock in each.sockets)


def unplug_all(numbers: Iterable[int], *kept: object) -> None:
    """Put nothing in the place of descriptors. kept: what may not be collected, as it believes that it has them."""
    for number in list(numbers):
        if number >= 0:
            unplug(number)
    _inherited.extend(kept)
