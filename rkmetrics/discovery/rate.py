"""How often one caller may register: a bucket of tokens for each, and a bounded number of buckets (T15)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from threading import Lock

__all__ = ["Rate"]

IPV6_SUBNET_BITS = 64  # which one host may fill with addresses of its own


class Rate:
    """So many a second for each caller, after a burst. Safe from any thread.

    callers: buckets that are kept. The one that was idle for the longest makes room, and is most likely full again.
    """

    def __init__(
        self, per_second: float, burst: float, *, callers: int = 16_384, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second, self._burst, self._callers, self._clock = per_second, burst, callers, clock
        self._buckets: OrderedDict[object, tuple[float, float]] = OrderedDict()  # what is left, and when it was
        self._lock = Lock()

    def admit(self, caller: IPv4Address | IPv6Address | None) -> float:
        """Take one; return 0, or the seconds to wait until there is one again."""
        key = _key(caller)
        with self._lock:
            now = self._clock()
            left, before = self._buckets.pop(key, (self._burst, now))
            left = min(self._burst, left + (now - before) * self._per_second)
            self._buckets[key] = (left - 1 if left >= 1 else left), now
            if len(self._buckets) > self._callers:
                self._buckets.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) / self._per_second

    def __len__(self) -> int:
        return len(self._buckets)


def _key(caller: IPv4Address | IPv6Address | None) -> object:
    return int(caller) >> IPV6_SUBNET_BITS if isinstance(caller, IPv6Address) else caller
