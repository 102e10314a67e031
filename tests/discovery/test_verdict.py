"""What an answer, or none, says of its backend (T14)."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.catalogue.discovery import CheckOutcome
from rkmetrics.discovery.verdict import BLIND, Vitals, judge_answer, judge_failure
from rkmetrics.fetch import Failure
from rkmetrics.http_answer import Answer, Reason

SEED: dict[str, Any] = {
    "ready": True,
    "requests_in_progress": 42,
    "cpu_usage": 35.2,
    "memory_usage": 67.8,
    "gpu_usage": 0.0,
    "failed_responses": 15,
    "connected_peers": 3,
    "backoff_requests": 0,
    "uptime_seconds": 86400,
    "version": "1.0.0",
}


def judged(body: object, status: int = 200) -> tuple[CheckOutcome, Vitals | None]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return judge_answer(Answer(status, (), data, True))


def test_the_protocols_vitals_are_read() -> None:
    outcome, vitals = judged(SEED)
    assert outcome is CheckOutcome.READY
    assert vitals is not None
    assert vitals == Vitals(**SEED)
    assert vitals.load == (42, 67.8)


@pytest.mark.parametrize("extra", [{}, {"gpu_usage": None}, {"new_field": {"of": "tomorrow"}}])
def test_what_is_not_needed_may_be_missing(extra: dict[str, Any]) -> None:
    assert judged({"ready": True, **extra})[0] is CheckOutcome.READY


@pytest.mark.parametrize("ready", [1, "true", "True", [True], {"is": True}, None, 1.0, "ready"])
def test_nothing_but_true_means_true(ready: object) -> None:
    assert judged({**SEED, "ready": ready})[0] is CheckOutcome.MALFORMED


def test_false_means_false() -> None:
    assert judged({**SEED, "ready": False})[0] is CheckOutcome.NOT_READY


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b"[{}]",
        b'{"ready":true',
        b'{"ready":true}{"ready":true}',
        b'{"ready":true,"cpu_usage":NaN}',
        b'{"ready":true,"cpu_usage":1e999}',
        b'{"ready":true,"cpu_usage":"35"}',
        b'{"ready":true,"requests_in_progress":-5}',
        b'{"ready":true,"requests_in_progress":1.5}',
        b'{"ready":true,"requests_in_progress":99999999999999999999999}',
        b'{"ready":true,"version":7}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"\xff\xfe",
        b"<html>ready: true</html>",
    ],
)
def test_what_is_no_vitals_is_a_miss(body: bytes) -> None:
    assert judged(body) == (CheckOutcome.MALFORMED, None)


@given(st.binary(max_size=60))
def test_no_bytes_raise(body: bytes) -> None:
    judged(body)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (401, CheckOutcome.UNAUTHORIZED),
        (403, CheckOutcome.UNAUTHORIZED),
        (302, CheckOutcome.WRONG_STATUS),
        (204, CheckOutcome.WRONG_STATUS),
        (206, CheckOutcome.WRONG_STATUS),
        (500, CheckOutcome.WRONG_STATUS),
        (503, CheckOutcome.WRONG_STATUS),
    ],
)
def test_another_status_is_a_miss_whatever_the_body_says(status: int, outcome: CheckOutcome) -> None:
    assert judged(SEED, status) == (outcome, None)


@pytest.mark.parametrize("reason", list(Reason))
def test_each_failure_has_its_outcome(reason: Reason) -> None:
    assert judge_failure(Failure(reason, "for some reason")) not in (CheckOutcome.READY, CheckOutcome.NOT_READY)


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (errno.ECONNREFUSED, CheckOutcome.REFUSED),
        (errno.EHOSTUNREACH, CheckOutcome.UNREACHABLE),
        (errno.ENETUNREACH, CheckOutcome.UNREACHABLE),
        (errno.EMFILE, CheckOutcome.NOT_SENT),
        (errno.EADDRNOTAVAIL, CheckOutcome.NOT_SENT),
    ],
)
def test_a_dead_process_differs_from_a_dead_network_and_from_our_own_limits(number: int, outcome: CheckOutcome) -> None:
    error = OSError(number, f"Connect call failed {os.strerror(number)}")
    assert judge_failure(Failure(Reason.UNREACHABLE, str(error))) is outcome
    assert (outcome in BLIND) is (outcome is CheckOutcome.UNREACHABLE)
