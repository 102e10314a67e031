"""Waiting and saying: bounded, random where many wait, and once for each change."""

from __future__ import annotations

import logging

import pytest

from rkmetrics.retry import Backoff, StateLog, jittered


def test_a_wait_doubles_up_to_its_cap_is_random_and_never_nothing() -> None:
    backoff = Backoff(1.0, 8.0)
    for span in (1, 2, 4, 8, 8, 8):
        assert 0.5 <= backoff.next() <= span
    backoff.reset()
    assert 0.5 <= backoff.next() <= 1


def test_waits_differ() -> None:
    backoff = Backoff(0.001, 1000.0)
    for _ in range(30):
        backoff.next()
    assert len({backoff.next() for _ in range(20)}) > 10


def test_a_jittered_span_is_never_longer() -> None:
    spans = [jittered(10, 0.2) for _ in range(100)]
    assert all(8 <= span <= 10 for span in spans)
    assert len(set(spans)) > 10


def test_a_change_is_said_once_and_flapping_is_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    log = StateLog(logging.getLogger("test"), lambda: now)
    for state in ("up", "up", "down", "down"):
        log.note(state, logging.INFO, "it is %s", state)
    assert caplog.messages == ["it is up", "it is down"]
    for number in range(20):
        log.note(f"state {number}", logging.INFO, "it is %s", number)
    assert len(caplog.messages) == StateLog.BURST
    now = StateLog.REFILL_SECONDS
    log.note("well", logging.INFO, "it is well")
    assert caplog.messages[-1] == "it is well (and 16 more changes that were not said)"
