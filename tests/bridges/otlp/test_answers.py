from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkmetrics.bridges.otlp.answers import (
    GRPC_OUTCOMES,
    MAX_RETRY_AFTER_SECONDS,
    RULES,
    Answer,
    body_outcome,
    grpc_outcome,
    http_outcome,
    retry_after_seconds,
)
from rkmetrics.catalogue.otlp import Outcome

NOW = 1_700_000_000.0


def test_every_outcome_has_a_rule() -> None:
    assert set(RULES) == set(Outcome)


def test_only_what_otlp_calls_retryable_is_tried_again_over_http() -> None:
    """OTLP, "OTLP/HTTP Response": 429, 502, 503 and 504; all other 4xx and 5xx MUST NOT be retried."""
    again = {status for status in range(200, 600) if RULES[http_outcome(status)].retry}
    assert again == {429, 502, 503, 504}


def test_only_what_otlp_calls_retryable_is_tried_again_over_grpc() -> None:
    """OTLP, "OTLP/gRPC Response", the table of codes."""
    every = {
        *GRPC_OUTCOMES,
        "UNKNOWN",
        "NOT_FOUND",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "INTERNAL",
        "UNIMPLEMENTED",
    }
    again = {code for code in every if RULES[grpc_outcome(code, "", retry_info=False)].retry}
    assert again == {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"}


@pytest.mark.parametrize(("retry_info", "retry"), [(True, True), (False, False)])
def test_resource_exhausted_passes_only_if_the_server_says_when(retry_info: bool, retry: bool) -> None:
    assert RULES[grpc_outcome("RESOURCE_EXHAUSTED", "", retry_info=retry_info)].retry is retry


def test_a_connection_that_never_was_cannot_have_carried_data() -> None:
    assert grpc_outcome("UNAVAILABLE", "failed to connect to all addresses", retry_info=False) is Outcome.UNAVAILABLE
    assert grpc_outcome("UNAVAILABLE", "Socket closed", retry_info=False) is Outcome.UNANSWERED


@pytest.mark.parametrize(
    ("content_type", "decoded", "outcome"),
    [
        ("application/x-protobuf", True, Outcome.OK),
        ("", True, Outcome.OK),
        ("application/x-protobuf", False, Outcome.GARBAGE),
        ("", False, Outcome.GARBAGE),
        ("text/html; charset=utf-8", False, Outcome.GARBAGE),
        ("application/json; charset=utf-8", False, Outcome.OK),
        ("TEXT/PLAIN", False, Outcome.OK),
    ],
)
def test_the_body_of_a_200_is_looked_at(content_type: str, decoded: bool, outcome: Outcome) -> None:
    assert body_outcome(content_type, decoded) is outcome


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("nan", None),
        ("٣", None),
        ("0", 0.0),
        (" 120 ", 120.0),
        ("99999999999", MAX_RETRY_AFTER_SECONDS),
        (format_datetime(datetime.fromtimestamp(NOW + 90, UTC), usegmt=True), 90.0),
        (format_datetime(datetime.fromtimestamp(NOW - 90, UTC), usegmt=True), 0.0),
        ("Wed, 31 Feb 2027 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, NOW) == seconds


@settings(deadline=None)
@given(st.text())
def test_no_retry_after_raises_or_exceeds_the_bound(value: str) -> None:
    seconds = retry_after_seconds(value, NOW)
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER_SECONDS


def test_a_partial_success_is_good() -> None:
    assert [outcome for outcome in Outcome if Answer(outcome).good] == [Outcome.OK, Outcome.PARTIAL]
