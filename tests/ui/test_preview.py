"""The server of the preview: a closed list of calls to one Prometheus, and a page that nobody else can use."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import rkmetrics as rk
from rkmetrics.asgi.base import Later, Request, Response
from rkmetrics.errors import AssetError, ServeError
from rkmetrics.runtime import previewing
from rkmetrics.server import Server
from rkmetrics.settings import Secret, Settings
from rkmetrics.ui.dashboards import SHIPPED, find
from rkmetrics.ui.preview import routes
from rkmetrics.ui.prometheus import CALLS, Prometheus, authorization

TOKEN = "snowman-token"
GOOD = b'{"status":"success","data":{"resultType":"vector","result":[]}}'


@dataclass
class Upstream:
    """A server in the place of Prometheus: says what it is told to, and remembers what it was asked."""

    url: str = ""
    status: int = 200
    body: bytes = GOOD
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    held: threading.Event | None = None  # an answer waits for it
    asked: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append((handler.path, dict(handler.headers.items())))
        if self.held is not None:
            self.held.wait(30)
        handler.send_response(self.status)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(self.body)))
        handler.end_headers()
        handler.wfile.write(self.body)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    made = Upstream()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(ConnectionError):  # of a client that waited long enough
                made.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    if made.held is not None:
        made.held.set()
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=sent)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, found, answer.read())
    finally:
        connection.close()


@pytest.fixture
def server(upstream: Upstream) -> Iterator[Server]:
    with previewing(Settings(prometheus_url=upstream.url)) as server:
        yield server


def closed_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return server.server_port


# --- the way to Prometheus --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/api/v1/query", {"query": "up", "time": "12.5"}),
        ("/api/v1/query_range", {"query": "sum(rate(a_total[5m]))", "start": "1", "end": "2", "step": "15"}),
        ("/api/v1/labels", {"start": "1", "end": "2"}),
        ("/api/v1/label/actor_name/values", {"match[]": '{job="a&b"}', "start": "1", "end": "2"}),
        ("/api/v1/series", {"match[]": "up"}),
    ],
)
def test_each_call_of_the_list_passes(
    path: str, parameters: dict[str, str], server: Server, upstream: Upstream
) -> None:
    reply = ask(server, f"{path}?{urlencode(parameters)}")
    assert (reply.status, reply.body) == (200, GOOD)
    assert reply.headers["content-type"] == "application/json"
    ((asked, _),) = upstream.asked
    sent = dict(parse_qsl(urlsplit(asked).query))
    assert urlsplit(asked).path == path
    assert {name: value for name, value in sent.items() if name != "timeout"} == parameters


@pytest.mark.parametrize("path", ["/api/v1/query", "/api/v1/query_range"])
def test_prometheus_gives_up_as_early_as_we_do(path: str, server: Server, upstream: Upstream) -> None:
    ask(server, f"{path}?query=up")
    assert dict(parse_qsl(urlsplit(upstream.asked[0][0]).query))["timeout"] == "30000ms"


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/status/config",
        "/api/v1/targets",
        "/api/v1/rules",
        "/api/v1/admin/tsdb/snapshot",
        "/api/v1/query_exemplars?query=up",
        "/api/v1/query/",
        "/api/v1//query",
        "/api/v1/label/a/b/values",
        "/api/v1/label//values",
        "/api/v1/label/a%2fb/values",
        "/api/v1/label/../values",
        "/api/v1/label/{id}/values",
        "/api/v1/../../metrics",
        "/-/quit",
        "/-/reload",
        "/federate",
        "http://127.0.0.1:1/api/v1/targets",
    ],
)
def test_no_other_call_passes(path: str, server: Server, upstream: Upstream) -> None:
    assert ask(server, path).status == 404
    assert upstream.asked == []


@pytest.mark.parametrize("query", ["query=up&timeout=1h", "query=up&url=http://other", "query=up&stats=all", "debug=1"])
def test_no_other_parameter_passes(query: str, server: Server, upstream: Upstream) -> None:
    reply = ask(server, f"/api/v1/query?{query}")
    assert reply.status == 400
    assert "is no parameter that is passed on" in reply.error
    assert upstream.asked == []


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_reads(method: str, server: Server, upstream: Upstream) -> None:
    reply = ask(server, "/api/v1/query?query=up", method)
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
    assert upstream.asked == []


def test_a_long_query_is_refused(server: Server, upstream: Upstream) -> None:
    reply = ask(server, f"/api/v1/query?query={'a' * 40_000}")
    assert (reply.status, reply.error) == (400, "more than 32768 bytes of parameters")
    assert upstream.asked == []


def test_an_answer_that_is_too_large_is_refused(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkmetrics.ui.prometheus.LIMIT_BYTES", 1000)
    upstream.body = b" " * 1001
    reply = answer(Prometheus(upstream.url), "/api/v1/query", b"query=up")
    assert reply.status == 502
    assert "too_large" in json.loads(reply.body)["error"]


def answer(prometheus: Prometheus, path: str, query: bytes = b"") -> Response:
    """The answer as a worker thread makes it."""
    found = prometheus.answer(Request("GET", path, query))
    return found.run() if isinstance(found, Later) else found


def test_an_answer_that_takes_too_long_is_a_504(upstream: Upstream) -> None:
    upstream.held = threading.Event()
    begun = time.monotonic()
    reply = answer(Prometheus(upstream.url, timeout_seconds=0.2), "/api/v1/query", b"query=up")
    assert reply.status == 504
    assert "timeout" in json.loads(reply.body)["error"]
    assert time.monotonic() - begun < 10


def test_a_slow_query_does_not_keep_the_page_waiting(server: Server, upstream: Upstream) -> None:
    upstream.held = threading.Event()
    waiting = threading.Thread(target=ask, args=(server, "/api/v1/query?query=slow"))
    waiting.start()
    assert ask(server, "/").status == 200
    assert waiting.is_alive()
    upstream.held.set()
    waiting.join()


def test_what_prometheus_says_of_a_bad_query_comes_through(server: Server, upstream: Upstream) -> None:
    upstream.status = 400
    upstream.body = b'{"status":"error","errorType":"bad_data","error":"parse error"}'
    reply = ask(server, "/api/v1/query?query=sum(")
    assert (reply.status, reply.body) == (400, upstream.body)


def test_a_prometheus_that_is_down_is_a_502_that_says_so() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with previewing(Settings(prometheus_url=url)) as server:
        reply = ask(server, "/api/v1/query?query=up")
        assert reply.status == 502
        assert reply.error.startswith("Prometheus: unreachable:")
        assert reply.error.endswith(f"({url})")
        assert ask(server, "/").status == 200


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "asks for credentials that it was not given: set RKMETRICS_PROMETHEUS_TOKEN"),
        (403, "does not let these credentials in"),
        (404, "has no Prometheus API at this address"),
        (500, "does not answer as Prometheus does (status 500)"),
    ],
)
def test_other_answers_become_a_sentence(status: int, says: str, server: Server, upstream: Upstream) -> None:
    upstream.status, upstream.body = status, b"<b>secrets of an inner host</b>"
    reply = ask(server, "/api/v1/query?query=up")
    assert reply.status == 502
    assert says in reply.error
    assert b"secrets" not in reply.body


def test_a_page_that_is_no_prometheus_is_a_502(server: Server, upstream: Upstream) -> None:
    upstream.headers, upstream.body = {"Content-Type": "text/html"}, b"<script>alert(1)</script>"
    reply = ask(server, "/api/v1/query?query=up")
    assert (reply.status, b"script" in reply.body) == (502, False)


def test_no_redirect_is_followed(server: Server, upstream: Upstream) -> None:
    upstream.status, upstream.headers = 302, {"Location": f"{upstream.url}/elsewhere"}
    reply = ask(server, "/api/v1/query?query=up")
    assert reply.status == 502
    assert "which is not followed" in reply.error
    assert len(upstream.asked) == 1


def test_nothing_else_of_the_answer_comes_through(server: Server, upstream: Upstream) -> None:
    upstream.headers |= {"Set-Cookie": "a=b", "Access-Control-Allow-Origin": "*", "X-Inner": "1"}
    reply = ask(server, "/api/v1/query?query=up")
    assert reply.status == 200
    assert set(reply.headers).isdisjoint({"set-cookie", "access-control-allow-origin", "x-inner"})


# --- credentials ------------------------------------------------------------------------------------------------------

LOGINS = [
    (Settings(prometheus_token=Secret(TOKEN)), f"Bearer {TOKEN}"),
    (Settings(prometheus_username="ana", prometheus_password=Secret("pa:ss")), "Basic YW5hOnBhOnNz"),
    (Settings(), None),
]


@pytest.mark.parametrize(("settings", "header"), LOGINS)
def test_it_logs_in_as_the_settings_say(settings: Settings, header: str | None, upstream: Upstream) -> None:
    answer(Prometheus(upstream.url, authorization(settings)), "/api/v1/query", b"query=up")
    assert upstream.asked[0][1].get("authorization") == header


def test_a_token_is_in_no_answer_no_repr_and_no_error(upstream: Upstream) -> None:
    settings = Settings(prometheus_url=upstream.url, prometheus_token=Secret(TOKEN))
    with previewing(settings) as server:
        replies = [ask(server, path) for path in ("/", "/dashboards", "/metadata", "/health", "/api/v1/query?query=up")]
        for upstream.status in (401, 403, 500, 302):
            replies.append(ask(server, "/api/v1/query?query=up"))
        assert len(upstream.asked) == 5
    for reply in replies:
        assert TOKEN not in f"{reply.headers}{reply.body!r}"
    assert TOKEN not in repr(Prometheus(upstream.url, authorization(settings)))


def test_what_the_browser_sends_for_itself_goes_nowhere(server: Server, upstream: Upstream) -> None:
    ask(
        server, "/api/v1/query?query=up", Authorization="Bearer of-the-browser", Cookie="a=b", X_Forwarded_For="1.2.3.4"
    )
    assert "of-the-browser" not in str(upstream.asked)
    assert {name.lower() for name in upstream.asked[0][1]} == {"host", "accept-encoding", "connection"}


def test_two_ways_to_log_in_are_refused() -> None:
    with pytest.raises(ServeError, match="two ways to log in"):
        authorization(Settings(prometheus_token=Secret(TOKEN), prometheus_username="ana"))


def test_credentials_in_the_url_are_refused_and_not_shown() -> None:
    with pytest.raises(ServeError, match="RKMETRICS_PROMETHEUS_USERNAME") as caught:
        Prometheus("http://ana:hunter2@prometheus:9090")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[::1", "http://a:99999", "http://a b"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ServeError, match="RKMETRICS_PROMETHEUS_URL: expected an absolute URL"):
        Prometheus(url)


# --- who may ask ------------------------------------------------------------------------------------------------------

PATHS = ["/", "/preview/main.js", "/dashboards", "/dashboards/rkmetrics-kv", "/api/v1/query?query=up"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "evil.example:80", "", "127.0.0.1.evil.example"]
)
def test_a_name_that_is_not_its_own_gets_nothing(path: str, host: str, server: Server, upstream: Upstream) -> None:
    """DNS rebinding: the page of another site makes its own name lead here."""
    assert ask(server, path, Host=host).status == 403
    assert upstream.asked == []


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "preview.localhost", "10.1.2.3"]
)
def test_its_own_names_are_fine(host: str, server: Server) -> None:
    assert [ask(server, path, Host=host).status for path in PATHS] == [200] * len(PATHS)


def test_a_name_can_be_added(upstream: Upstream) -> None:
    with previewing(Settings(prometheus_url=upstream.url), names=["Ops.example"]) as server:
        assert ask(server, "/", Host="ops.example:443").status == 200
        assert ask(server, "/", Host="other.example").status == 403


@pytest.mark.parametrize(
    ("path", "site", "mode", "status"),
    [
        ("/api/v1/query?query=up", "same-origin", "cors", 200),
        ("/api/v1/query?query=up", "none", "navigate", 200),
        ("/api/v1/query?query=up", "cross-site", "no-cors", 403),
        ("/api/v1/query?query=up", "same-site", "cors", 403),
        ("/dashboards", "cross-site", "no-cors", 403),
        ("/", "cross-site", "navigate", 200),
        ("/", "cross-site", "no-cors", 403),
    ],
)
def test_pages_of_other_sites_may_link_here_and_no_more(
    path: str, site: str, mode: str, status: int, server: Server
) -> None:
    assert ask(server, path, Sec_Fetch_Site=site, Sec_Fetch_Mode=mode).status == status


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_says_what_a_page_may_do(path: str, server: Server) -> None:
    headers = ask(server, path).headers
    policy = {part.split()[0]: part.split()[1:] for part in headers["content-security-policy"].split(";")}
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_addresses_than_loopback_need_a_word(host: str, upstream: Upstream) -> None:
    with pytest.raises(ServeError, match="METRICS_ACCESS=open"):
        with previewing(Settings(prometheus_url=upstream.url), host=host):
            pass


def test_with_the_word_it_binds_everywhere(upstream: Upstream) -> None:
    settings = Settings(prometheus_url=upstream.url, metrics_access="open")
    with previewing(settings, host="0.0.0.0") as server:
        assert ask(server, "/api/v1/query?query=up").status == 200


# --- the page and its dashboards --------------------------------------------------------------------------------------


def test_the_page_has_no_script_and_no_style_in_it_and_names_no_other_host(server: Server) -> None:
    page = ask(server, "/").body.decode()
    assert "<style" not in page
    assert " style=" not in page
    assert page.count("<script") == page.count("<script src=") + page.count('<script type="module" src=')
    assert "//" not in page.replace("<!doctype html>", "")
    assert 'src="/' not in page
    assert 'href="/' not in page


def test_every_file_that_a_module_names_is_served(server: Server) -> None:
    seen: set[str] = set()
    ahead = ["/preview/main.js"]
    while ahead:
        path = ahead.pop()
        seen.add(path)
        reply = ask(server, path)
        assert (path, reply.status, reply.headers["content-type"]) == (path, 200, "text/javascript; charset=utf-8")
        for name in re.findall(rb'from "(\.[^"]+)"', reply.body):
            target = str(Path(path).parent / name.decode()).replace("/panels/../", "/")
            if target not in seen:
                ahead.append(target)
    folder = Path(SHIPPED).parents[1] / "ui" / "pages"
    assert seen == {f"/{path.relative_to(folder).as_posix()}" for path in (folder / "preview").rglob("*.js")}


@pytest.mark.parametrize("path", ["/vendor/uplot/LICENSE", "/preview/", "/preview", "/preview/../base.py", "/vendor/"])
def test_no_other_file_is_served(path: str, server: Server) -> None:
    assert ask(server, path).status == 404


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("uPlot.iife.min.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
        ("uPlot.min.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
    ],
)
def test_the_plot_library_is_1_6_32_unchanged(name: str, digest: str, server: Server) -> None:
    assert hashlib.sha256(ask(server, f"/vendor/uplot/{name}").body).hexdigest() == digest


def test_the_shipped_dashboards_are_there_as_they_are_in_their_files(server: Server) -> None:
    listed = json.loads(ask(server, "/dashboards").body)["dashboards"]
    files = {json.loads(path.read_text())["uid"]: path for path in SHIPPED.glob("*.json")}
    assert {each["key"] for each in listed} == set(files)
    for key, path in files.items():
        assert json.loads(ask(server, f"/dashboards/{key}").body) == json.loads(path.read_text())
    assert ask(server, "/dashboards/other").status == 404


def write(path: Path, **model: object) -> Path:
    path.write_text(json.dumps({"panels": [], **model}))
    return path


def test_a_dashboard_is_read_anew_each_time(tmp_path: Path, upstream: Upstream) -> None:
    path = write(tmp_path / "own.json", uid="own", title="before")
    with previewing(Settings(prometheus_url=upstream.url), [path]) as server:
        write(path, uid="own", title="after")
        assert json.loads(ask(server, "/dashboards/own").body)["title"] == "after"
        path.write_text("{")
        reply = ask(server, "/dashboards/own")
        assert (reply.status, "not JSON" in reply.error) == (500, True)


def test_folders_are_looked_through_and_uids_become_part_of_an_address(tmp_path: Path) -> None:
    write(tmp_path / "b.json", title="B", uid="ä / b")
    write(tmp_path / "a.json")
    assert {key: each.title for key, each in find([tmp_path]).items()} == {"-b": "B", "a": "a"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "no Grafana dashboard"),
        ('{"elements": {}}', "no Grafana dashboard"),
        ("\udcff", "be read"),
    ],
)
def test_a_file_that_is_no_dashboard_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AssetError, match=reason):
        find([path])


def test_two_of_one_uid_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no dashboard in"):
        find([tmp_path])
    paths = [write(tmp_path / name, uid="same") for name in ("a.json", "b.json")]
    with pytest.raises(ServeError, match="have one uid, 'same'"):
        find(paths)


# --- behind a prefix --------------------------------------------------------------------------------------------------


def test_it_works_behind_a_prefix_that_a_proxy_leaves(upstream: Upstream) -> None:
    with previewing(Settings(prometheus_url=upstream.url), prefix="/ops/preview") as server:
        assert [ask(server, f"/ops/preview{path}").status for path in PATHS] == [200] * len(PATHS)
        assert ask(server, "/ops/preview/api/v1/label/job/values").status == 200
        reply = ask(server, "/ops/preview")
        assert (reply.status, reply.headers["location"]) == (308, "preview/")
        assert ask(server, "/").status == 404
        assert [urlsplit(path).path for path, _ in upstream.asked] == ["/api/v1/query", "/api/v1/label/job/values"]


def test_it_can_be_mounted_in_an_application(upstream: Upstream) -> None:
    pytest.importorskip("httpx2", reason="the test client needs it")
    from starlette.testclient import TestClient

    rows = routes(find([SHIPPED]), Prometheus(upstream.url), names=["testserver"])
    registry = rk.Registry(Settings(), builtin=False)
    client = TestClient(Starlette(routes=[Mount("/ops", rk.asgi.app(registry, more=rows))]))
    assert [client.get(f"/ops{path}").status_code for path in PATHS] == [200] * len(PATHS)
    assert client.get("/ops/api/v1/label/job/values").json() == json.loads(GOOD)


def test_prometheus_may_lie_behind_a_prefix_too(upstream: Upstream) -> None:
    with previewing(Settings(prometheus_url=f"{upstream.url}/prom/")) as server:
        assert ask(server, "/api/v1/query?query=up").status == 200
    assert urlsplit(upstream.asked[0][0]).path == "/prom/api/v1/query"


def test_the_list_of_calls_is_short() -> None:
    """A new row is a decision: it opens one more call of Prometheus to whoever reaches the page."""
    assert sorted(CALLS) == [
        "/api/v1/label/{id}/values",
        "/api/v1/labels",
        "/api/v1/query",
        "/api/v1/query_range",
        "/api/v1/series",
    ]
