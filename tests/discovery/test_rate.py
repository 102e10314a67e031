"""One caller's flood is its own affair (T15)."""

from __future__ import annotations

from ipaddress import ip_address

from rkmetrics.discovery.rate import Rate

ONE, OTHER = ip_address("10.0.0.1"), ip_address("10.0.0.2")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_then_so_many_a_second() -> None:
    clock = Clock()
    rate = Rate(2, 5, clock=clock)
    assert [rate.admit(ONE) == 0 for _ in range(7)] == [True] * 5 + [False] * 2
    assert 0 < rate.admit(ONE) <= 0.5
    clock.now += 0.5
    assert [rate.admit(ONE) == 0 for _ in range(2)] == [True, False]
    assert rate.admit(OTHER) == 0


def test_an_ipv6_host_has_one_bucket_for_all_its_addresses() -> None:
    rate = Rate(1, 3, clock=Clock())
    passed = [rate.admit(ip_address(f"2a00::{number:x}")) == 0 for number in range(1, 10)]
    assert passed == [True] * 3 + [False] * 6


def test_buckets_are_bounded() -> None:
    rate = Rate(1, 1, callers=100, clock=Clock())
    for number in range(1000):
        rate.admit(ip_address(number))
    assert len(rate) == 100


def test_a_clock_that_stands_still_gives_nothing_away() -> None:
    rate = Rate(10, 1, clock=Clock())
    assert [rate.admit(ONE) == 0 for _ in range(3)] == [True, False, False]
