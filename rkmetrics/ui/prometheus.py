"""A way for a page to one Prometheus: five reading calls of its HTTP API, and nothing else.

The browser cannot ask Prometheus itself: the page's policy allows its own server only, Prometheus sends no CORS header
by default, and credentials for it belong on no page. What passes is a closed list, both of calls and of their
parameters; the server is the one that was named at the start. No redirect is followed, time and size are limited, and
of the answer only status and JSON body come through.

References: Prometheus, "HTTP API", stable under /api/v1.
"""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from rkmetrics.asgi.base import JSON, Later, Request, Response
from rkmetrics.errors import FetchError, ServeError
from rkmetrics.fetch import Endpoint, get
from rkmetrics.http_answer import Answer, Reason
from rkmetrics.settings import Secret
from rkmetrics.ui.base import PAGE_HEADERS

if TYPE_CHECKING:
    from rkmetrics.settings import Settings

__all__ = ["CALLS", "Prometheus", "authorization", "refusal"]

TIMEOUT_SECONDS = 30.0
LIMIT_BYTES = 32 * 1024 * 1024
QUERY_LIMIT_BYTES = 32_768  # all parameters together, decoded

LABEL_VALUES = "/api/v1/label/{id}/values"
LABEL_VALUES_OF = re.compile(r"/api/v1/label/[A-Za-z_][A-Za-z0-9_]*/values")
_SELECTION = frozenset({b"match[]", b"start", b"end", b"limit"})
CALLS: Mapping[str, frozenset[bytes]] = {
    "/api/v1/query": frozenset({b"query", b"time", b"limit"}),
    "/api/v1/query_range": frozenset({b"query", b"start", b"end", b"step", b"limit"}),
    "/api/v1/labels": _SELECTION,
    "/api/v1/series": _SELECTION,
    LABEL_VALUES: _SELECTION,
}
EVALUATES = frozenset({"/api/v1/query", "/api/v1/query_range"})  # these take a time-out

# With these it says in JSON what it found, or what is wrong with a query ("HTTP API", "Format overview").
ITS_OWN = frozenset({200, 400, 422, 503})
OTHERWISE: Mapping[int, str] = {
    401: "asks for credentials that it was not given: set RKMETRICS_PROMETHEUS_TOKEN, or _USERNAME and _PASSWORD",
    403: "does not let these credentials in (RKMETRICS_PROMETHEUS_TOKEN, or _USERNAME and _PASSWORD)",
    404: "has no Prometheus API at this address; is a path missing, such as /prometheus?",
}
STATUSES: Mapping[str, int] = {Reason.TIMEOUT: 504}


class Prometheus:
    """One Prometheus, or what speaks its API. url: with the path in front of /api/v1, if there is one."""

    def __init__(
        self, url: str, authorization: Secret | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self._url, self._authorization, self._timeout_seconds = url.rstrip("/"), authorization, timeout_seconds
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise ServeError("credentials in the URL of Prometheus are not sent: set RKMETRICS_PROMETHEUS_USERNAME")
        try:
            self.shown = Endpoint.parse(url).shown.rstrip("/")
        except FetchError as error:
            raise ServeError(f"RKMETRICS_PROMETHEUS_URL: {error.detail}") from None

    def answer(self, request: Request) -> Response | Later:
        """Return the answer to a call that is in the list."""
        fields = request.fields()
        call = _call(request.path)
        if call is None:
            return refusal(404, f"{request.path} is no call that is passed on")
        unknown = next((name for name, _ in fields if name not in CALLS[call]), None)
        if unknown is not None:
            return refusal(400, f"{unknown.decode('utf-8', 'replace')!r} is no parameter that is passed on")
        if sum(len(name) + len(value) for name, value in fields) > QUERY_LIMIT_BYTES:
            return refusal(400, f"more than {QUERY_LIMIT_BYTES} bytes of parameters")
        if call in EVALUATES:
            fields.append((b"timeout", b"%dms" % (1000 * self._timeout_seconds)))
        url = f"{self._url}{request.path}?{urlencode(fields)}"
        return Later(lambda: asyncio.run(self._ask(url)), lambda: self._ask(url))

    async def _ask(self, url: str) -> Response:
        headers = [(b"authorization", self._authorization.reveal())] if self._authorization else []
        try:
            answer = await get(url, headers=headers, timeout_seconds=self._timeout_seconds, limit_bytes=LIMIT_BYTES)
        except FetchError as error:
            return refusal(
                STATUSES.get(error.reason, 502), f"Prometheus: {error.reason}: {error.detail} ({self.shown})"
            )
        if answer.status in ITS_OWN and _is_json(answer):
            return Response(answer.status, answer.body, JSON, PAGE_HEADERS)
        return refusal(502, f"{self.shown} {_otherwise(answer)}")

    def __repr__(self) -> str:
        return f"Prometheus({self.shown!r})"


def _call(path: str) -> str | None:
    if path in CALLS and path != LABEL_VALUES:
        return path
    return LABEL_VALUES if LABEL_VALUES_OF.fullmatch(path) else None


def _is_json(answer: Answer) -> bool:
    return (answer.value(b"content-type") or b"").partition(b";")[0].strip().lower() == JSON.encode()


def _otherwise(answer: Answer) -> str:
    if 300 <= answer.status < 400:
        return f"sends elsewhere ({answer.status}), which is not followed: name the last address itself"
    return OTHERWISE.get(answer.status, f"does not answer as Prometheus does (status {answer.status})")


def refusal(status: int, why: str) -> Response:
    """Return an error in the form of Prometheus' own, so that the page reads one form only."""
    body = json.dumps({"status": "error", "errorType": "preview", "error": why})
    return Response(status, body.encode(), JSON, PAGE_HEADERS)


def authorization(settings: Settings) -> Secret | None:
    """Return the Authorization header that the settings describe. Raises ServeError when they describe two."""
    token, user, password = settings.prometheus_token, settings.prometheus_username, settings.prometheus_password
    if token and (user or password):
        raise ServeError("RKMETRICS_PROMETHEUS_TOKEN and _USERNAME are two ways to log in: set one of them")
    if token:
        return Secret(b"Bearer " + token.reveal())
    if not user:
        return None
    return Secret(b"Basic " + b64encode(user.encode() + b":" + (password.reveal() if password else b"")))
