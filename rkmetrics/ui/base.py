"""What every page of ours keeps to: its headers, and the names under which a browser may know this server. Pure.

A page may load what comes from its own server and nothing else: no script or style in the text of a page, no frame
around it, no form, no other host (Content Security Policy Level 3). So even a hostile label value, were it ever to
become markup, could run nothing and send nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Any

from rkmetrics.asgi.base import Headers, Request, Response, Route, text_response
from rkmetrics.catalogue.exporter import Route as RouteName

__all__ = ["CONTENT_TYPES", "PAGE_HEADERS", "KnownHosts", "page", "redirect_to_folder", "under"]

CONTENT_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS: Headers = (
    (b"content-security-policy", POLICY),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
)
ANOTHER_NAME = text_response(
    403, "this server is not known under the name in the Host header; --name adds one, such as that of a proxy\n"
)
ANOTHER_PAGE = text_response(403, "pages of other sites do not ask here (Sec-Fetch-Site)\n")
# Fetch Metadata, "Sec-Fetch-Site": none is a person who typed the address. Older browsers send nothing.
OWN_SITES = frozenset({b"same-origin", b"none"})


class KnownHosts:
    """Lets a request pass that asks for this server under a name that is its own.

    A page of another site may point a name of its own at our address (DNS rebinding), and would then be of the same
    origin as ours. An IP address cannot be pointed elsewhere, so each of them will do; the port says nothing. names:
    more of them. navigable: a link on another site may lead here, as it may to a page; it may not to an API.
    """

    def __init__(self, names: Iterable[str] = (), *, navigable: bool = False) -> None:
        self._names = frozenset(name.lower() for name in names)
        self._navigable = navigable

    def refuse(self, request: Request) -> Response | None:
        """Return the answer to a request that may not pass; None for one that may."""
        if not all(self._is_known(value) for value in request.values(b"host")):
            return ANOTHER_NAME
        sites = frozenset(request.values(b"sec-fetch-site"))
        if sites <= OWN_SITES or (self._navigable and request.values(b"sec-fetch-mode") == [b"navigate"]):
            return None
        return ANOTHER_PAGE

    def _is_known(self, value: bytes) -> bool:
        text = value.decode("latin-1").lower()
        name = text[1 : text.find("]")] if text.startswith("[") else text.partition(":")[0]
        return name == "localhost" or name.endswith(".localhost") or name in self._names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def page(body: bytes, content_type: str) -> Response:
    """Return a file of a page."""
    return Response(200, body, content_type, PAGE_HEADERS)


def redirect_to_folder(path: str) -> Response:
    """Return the way from /a/path to /a/path/, where relative addresses begin; relative itself, for proxies."""
    return Response(308, b"", headers=((b"location", path.rpartition("/")[2].encode() + b"/"), *PAGE_HEADERS))


def under(prefix: str, routes: Iterable[Route[Any]]) -> dict[str, Route[Any]]:
    """Return a route table, each path behind a prefix such as "/preview", or "" for none."""
    table = {prefix + route.path: route for route in routes}
    if prefix:
        away = redirect_to_folder(prefix)
        table[prefix] = Route(prefix, RouteName.OTHER, lambda _, __: away, gated=False)
    return table
