"""The preview in a real browser, against a real Prometheus that scrapes the demo and a balancer."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from rkmetrics.runtime import Plan, balancing, previewing, running
from rkmetrics.settings import Settings
from rkmetrics.ui.dashboards import SHIPPED
from tests.services.chromium import Chromium, Page
from tests.services.conftest import Prometheus, program

KEYS = sorted(json.loads(path.read_text())["uid"] for path in SHIPPED.glob("*.json"))
PANELS = """[...document.querySelectorAll("article.panel")].map((each) => ({
  title: each.querySelector("h3").textContent, state: each.dataset.state, type: each.dataset.type,
  about: each.querySelector("button.about").title, text: each.querySelector(".body").innerText,
  drawn: each.querySelector(".tile, .tables table") !== null || [...each.querySelectorAll("canvas")].some((canvas) =>
    canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((channel) => channel > 0))}))"""


@dataclass
class Lab:
    """A Prometheus with some seconds of the demo in it, and the preview in front of it."""

    prometheus: Prometheus
    url: str

    def at(self, key: str, refresh: str = "", **variables: str) -> str:
        chosen = "".join(f"&var-{name}={value}" for name, value in variables.items())
        return f"{self.url}/?d={key}&from=now-1m&to=now&refresh={refresh}{chosen}"


@pytest.fixture(scope="module")
def lab(start_prometheus: Callable[..., Prometheus]) -> Iterator[Lab]:
    """The demo as `rkmetrics serve --demo --open` runs it, announced to a balancer."""
    with ExitStack() as stack:
        balancer = stack.enter_context(balancing(Plan(Settings(port=0, metrics_enabled=True), open=True)))
        announced = Settings(port=0, metrics_enabled=True, load_balancers=(balancer.url,))
        node = stack.enter_context(running(Plan(announced, demo=True, open=True)))
        jobs = {"demo": f"{node.url}/metrics", "balancer": f"{balancer.url}/metrics"}
        prometheus = start_prometheus(jobs)
        prometheus.wait(lambda: len(prometheus.query("up == 1")) == 2)
        prometheus.wait(lambda: bool(prometheus.query("sum(rkmetrics_kv_prefix_cache_hits_total) > 0")))
        prometheus.wait(lambda: bool(prometheus.query("sum(rivetkit_actor_stopped_total) > 0")))
        settings = Settings(prometheus_url=prometheus.url)
        server = stack.enter_context(previewing(settings, scrape_interval_seconds=1.0))
        yield Lab(prometheus, server.url)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    started = Chromium(program("chromium", "chromium"), tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def page(browser: Chromium) -> Iterator[Page]:
    opened = browser.open()
    yield opened
    opened.close()


def shown(page: Page, url: str) -> list[dict[str, Any]]:
    """Load a dashboard, and return its panels once each has its answer."""
    page.go(url)
    page.wait(ROUND)
    return list(page.js(PANELS))


ROUND = 'location.href !== "about:blank" && document.body.dataset.round'


def next_round(page: Page, action: str) -> None:
    """Do something on the page, and wait until it has asked again and has all answers."""
    before = page.js("Number(document.body.dataset.round)")
    page.js(action)
    page.wait(f"Number(document.body.dataset.round) > {before}")


def queries(page: Page) -> list[str]:
    """The PromQL of all queries so far."""
    found = [parse_qs(urlsplit(url).query).get("query", []) for url in page.urls()]
    return [query for each in found for query in each]


# --- every dashboard --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("key", KEYS)
def test_every_dashboard_shows_the_demo(key: str, scheme: str, lab: Lab, browser: Chromium) -> None:
    """No panel in error; those without data say in their description when they are empty; nothing leaves the host."""
    page = browser.open(scheme=scheme)
    panels = shown(page, lab.at(key))
    assert len(panels) >= 5
    assert [each for each in panels if each["state"] not in ("ok", "empty")] == []
    assert [each["title"] for each in panels if each["state"] == "empty" and "mpty" not in each["about"]] == []
    assert [each["title"] for each in panels if each["state"] == "ok" and not each["drawn"]] == []
    assert sum(each["state"] == "ok" for each in panels) >= 5
    assert page.troubles() == []
    assert {f"{urlsplit(url).scheme}://{urlsplit(url).netloc}" for url in page.urls() if "about:" not in url} == {
        lab.url
    }
    assert page.js("[...document.querySelectorAll('.notes')].map((each) => each.textContent).join('')") == ""
    page.close()


def test_the_first_page_leads_to_each_dashboard(lab: Lab, page: Page) -> None:
    page.go(f"{lab.url}/")
    page.wait("document.querySelectorAll('.overview a').length")
    links = page.js("[...document.querySelectorAll('.overview a')].map((each) => each.href)")
    assert sorted(parse_qs(urlsplit(link).query)["d"][0] for link in links) == KEYS
    page.js("document.querySelector('.overview a').click()")
    page.wait(ROUND)
    assert page.troubles() == []


def test_numbers_are_those_of_prometheus(lab: Lab, page: Page, tmp_path: Path) -> None:
    """A stat, a gauge, a table, mappings, thresholds and units, read back from what is on the page."""
    model = dashboard(
        panel("stat", "2500", unit="short"),
        panel("stat", "vector(1536)", unit="bytes", id=2),
        panel("gauge", "0.254", unit="percentunit", id=3, max=1),
        panel("stat", "1", id=4, mappings=[{"type": "value", "options": {"1": {"text": "on air", "color": "blue"}}}]),
        panel("stat", "rkmetrics_nothing_of_that_name", id=5, noValue="none so far"),
        panel("stat", "vector(0)", id=6),
        panel("table", 'label_replace(vector(90), "kind", "a<b>", "", "")', id=7, unit="s"),
        panel("stat", "vector(0.0042)", id=8, unit="s", decimals=1),
        panel("timeseries", "rkmetrics_nothing_of_that_name", id=9),
        panel("mystery", "1", id=10),
        panel("stat", "sum(", id=11),
        panel("stat", f"vector(time()) < {time.time() - 30}", id=12),
        panel("stat", "vector(13)", id=13),
    )
    with preview_of(model, lab, tmp_path) as url:
        panels = dict(enumerate(shown(page, url), 1))
    texts = {at: " ".join(each["text"].split()) for at, each in panels.items()}
    assert texts[1] == "2.5 K"
    assert texts[2] == "1.5 KiB"
    assert page.js("document.querySelector('[data-panel=\"3\"] text').textContent") == "25.4%"
    assert texts[4] == "on air"
    assert (texts[5], panels[5]["state"]) == ("none so far", "empty")
    assert (texts[6], panels[6]["state"]) == ("0", "ok")  # zero is not nothing
    assert "a<b>" in texts[7]
    assert "1.5 min" in texts[7]
    assert texts[8] == "4.2 ms"
    assert (texts[9], panels[9]["state"]) == ("No data", "empty")
    assert (panels[10]["state"], "type mystery are not known" in texts[10]) == ("error", True)
    assert "gone since" in texts[12]
    assert "gone since" not in texts[6]
    assert texts[13] == "13"
    assert (panels[11]["state"], "sum(" in texts[11], "parse error" in texts[11]) == ("error", True, True)


def panel(kind: str, expr: str, *, id: int = 1, **defaults: Any) -> dict[str, Any]:
    target: dict[str, Any] = {"refId": "A", "expr": expr, "legendFormat": "one"}
    if id == 13:
        target |= {"instant": True, "range": False}
    if kind == "table":
        target |= {"format": "table", "instant": True, "range": False}
    place = {"x": (id - 1) % 4 * 6, "y": (id - 1) // 4 * 6, "w": 6, "h": 6}
    config = {"defaults": defaults}
    return {"id": id, "type": kind, "title": kind, "targets": [target], "gridPos": place, "fieldConfig": config}


def dashboard(*panels: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"uid": "own", "title": "Own", "panels": list(panels), **more}


@contextmanager
def preview_of(model: dict[str, Any], lab: Lab, folder: Path, **options: Any) -> Iterator[str]:
    """The address of a preview of one dashboard."""
    path = folder / "own.json"
    path.write_text(json.dumps(model))
    settings = Settings(prometheus_url=lab.prometheus.url)
    with previewing(settings, [path], scrape_interval_seconds=1.0, **options) as server:
        yield f"{server.url}{options.get('prefix', '')}/?from=now-1m&to=now&refresh="


# --- what a person does -----------------------------------------------------------------------------------------------


def click(page: Page, selector: str) -> None:
    next_round(page, f"document.querySelector({selector!r}).click()")


def test_a_variable_changes_the_queries_and_the_address(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-kv"))
    assert any('instance=~".+"' in query for query in queries(page))
    name = page.js("document.querySelectorAll('[data-variable=instance] input')[1].value")
    page.events.clear()
    page.js("document.querySelector('[data-variable=instance] summary').click()")
    click(page, f"[data-variable=instance] input[value='{name}']")
    pattern = name.replace(".", "\\\\.")
    asked = [query for query in queries(page) if "instance=~" in query]
    assert asked
    assert [query for query in asked if f'instance=~"{pattern}"' not in query] == []
    assert parse_qs(urlsplit(page.js("location.href")).query)["var-instance"] == [name]
    assert page.js("document.querySelector('[data-variable=instance]').open")
    assert page.js("document.querySelector('[data-variable=instance] .value').textContent") == name
    along = parse_qs(urlsplit(page.js("document.querySelector('nav a').href")).query)
    assert (along["var-instance"], along["from"], along["d"]) == ([name], ["now-1m"], ["rkmetrics-actor"])


def test_a_variable_that_depends_on_another_follows_it(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-kv", job="balancer"))
    offered = page.js("[...document.querySelectorAll('[data-variable=instance] input')].map((each) => each.value)")
    known = {each["metric"]["instance"] for each in lab.prometheus.query('rkmetrics_build_info{job="balancer"}')}
    assert offered == ["$__all", *known]


def spans(page: Page) -> set[int]:
    """The seconds that range queries of panels went over; annotations ask with another step."""
    parts = [parse_qs(urlsplit(url).query) for url in page.urls() if "query_range" in url]
    return {round(float(each["end"][0]) - float(each["start"][0])) for each in parts}


def test_the_time_range_can_be_chosen(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-runtime"))
    page.events.clear()
    click(page, ".presets [data-from=now-15m]")
    assert {round(span / 60) for span in spans(page)} == {15}
    assert "from=now-15m" in page.js("location.search")
    page.events.clear()
    fill = """(from, to) => { const form = document.querySelector("form.absolute");
        form.From.value = from; form.To.value = to; form.requestSubmit(); }"""
    next_round(page, f"({fill})('2026-01-31 12:00', '2026-01-31 13:00')")
    assert {round(span / 3600) for span in spans(page)} == {1}
    assert page.js("document.querySelector('[data-control=range] .value').textContent") == (
        "2026-01-31 12:00:00 to 2026-01-31 13:00:00"
    )
    page.js(f"({fill})('yesterday-ish', 'now')")
    assert "expected now-1h" in page.js("document.querySelector('.absolute .hint').textContent")


FIRST_PLOT = """((box) => [box.x, box.y, box.width, box.height])
    (document.querySelector("[data-type=timeseries] .u-over").getBoundingClientRect())"""


def test_drawing_over_a_plot_zooms_in(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-runtime"))
    left, top, width, height = page.js(FIRST_PLOT)
    middle = top + height / 2
    page.events.clear()
    before = page.js("Number(document.body.dataset.round)")
    page.mouse("mouseMoved", left + width * 0.4, middle)
    page.mouse("mousePressed", left + width * 0.4, middle)
    page.mouse("mouseMoved", left + width * 0.6, top + height * 0.6)
    page.mouse("mouseMoved", left + width * 0.9, top + height * 0.6)
    page.mouse("mouseReleased", left + width * 0.9, top + height * 0.6)
    page.wait(f"Number(document.body.dataset.round) > {before}")
    assert max(spans(page)) <= 32


def test_the_pointer_shows_values_and_the_crosshair_is_on_all_plots(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-fleet"))  # whose heatmap follows the crosshair and has nothing to say
    left, top, width, height = page.js(FIRST_PLOT)
    page.mouse("mouseMoved", left + width * 0.5, top + height * 0.4)
    page.mouse("mouseMoved", left + width - 4, top + height * 0.5)
    page.wait("!document.querySelector('.tooltip').hidden")
    text = page.js("document.querySelector('.tooltip').innerText")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", text)
    assert "agent" in text
    assert "null" not in text
    page.wait(
        "[...document.querySelectorAll('.u-cursor-x')].filter((each) => !each.classList.contains('u-off')).length > 3"
    )


def test_it_refreshes_by_itself_and_not_while_nobody_looks(lab: Lab, browser: Chromium, page: Page) -> None:
    url = lab.at("rkmetrics-kv", refresh="1s")
    shown(page, url)
    page.wait("Number(document.body.dataset.round) >= 3")
    hide = """(hidden) => { Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange")); }"""
    page.js(f"({hide})(true)")
    page.wait("!document.querySelector('[aria-busy]')")
    stopped = page.js("Number(document.body.dataset.round)")
    other = browser.open()  # the clock: it goes on asking
    shown(other, url)
    other.wait("Number(document.body.dataset.round) >= 3")
    other.close()
    assert page.js("Number(document.body.dataset.round)") <= stopped + 1  # the one that was under way
    still = page.js("Number(document.body.dataset.round)")
    page.js(f"({hide})(false)")
    page.wait(f"Number(document.body.dataset.round) > {still}")


def test_a_refresh_can_be_chosen(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-kv"))
    choose = """((select) => { select.value = "5s"; select.dispatchEvent(new Event("change")); })
        (document.querySelector(".refresh select"))"""
    next_round(page, choose)
    assert "refresh=5s" in page.js("location.search")
    page.wait("Number(document.body.dataset.round) >= 3")


def test_a_new_round_ends_the_one_that_is_under_way(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-fleet"))
    page.events.clear()
    with stopped(lab.prometheus):
        page.js("document.querySelector('.refresh button').click()")
        page.wait("document.querySelector('#status').textContent === '…'")
        asked = len(page.urls())
        page.js("document.querySelector('.refresh button').click()")
        while len(page.urls()) == asked:
            assert page.troubles() == []
        ended = [each for kind, each in page.events if kind == "Network.loadingFailed"]
    assert asked > 0
    assert [each["canceled"] for each in ended] == [True] * asked
    page.wait("document.querySelector('#status').textContent.startsWith('Updated')")
    assert {each["state"] for each in page.js(PANELS)} <= {"ok", "empty"}


@contextmanager
def stopped(prometheus: Prometheus) -> Iterator[None]:
    """A Prometheus that takes connections, and does not answer."""
    prometheus._process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        prometheus._process.send_signal(signal.SIGCONT)


def test_what_two_panels_ask_goes_out_once(lab: Lab, page: Page, tmp_path: Path) -> None:
    twice = dashboard(panel("stat", "count(up)"), panel("stat", "count(up)", id=2))
    with preview_of(twice, lab, tmp_path) as url:
        shown(page, url)
    assert queries(page) == ["count(up)"]


def test_rows_open_and_close_and_closed_ones_ask_nothing(lab: Lab, page: Page, tmp_path: Path) -> None:
    row = {"id": 9, "type": "row", "title": "More", "collapsed": True, "gridPos": {"x": 0, "y": 6, "w": 24, "h": 1},
           "panels": [panel("stat", "count(up)", id=2)]}  # fmt: skip
    with preview_of(dashboard(panel("stat", "1"), row), lab, tmp_path) as url:
        shown(page, url)
        assert queries(page) == ["1"]
        next_round(page, "document.querySelector('details.section summary').click()")
        assert "count(up)" in queries(page)


def test_series_are_switched_off_by_their_legend_and_tables_sorted_by_their_heads(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-fleet"))
    page.js("document.querySelector('.legend button').click()")
    assert page.js("document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    column = "[...document.querySelectorAll('.tables tbody tr')].map((each) => each.cells[0].textContent)"
    page.js("document.querySelector('.tables th button').click()")
    down = page.js(column)
    page.js("document.querySelector('.tables th button').click()")
    assert page.js(column) == down[::-1]
    assert page.js("document.querySelector('.tables th').getAttribute('aria-sort')") == "ascending"


def test_the_keyboard_is_enough(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-kv"))
    page.js("document.querySelector('[data-control=range] summary').focus()")
    page.key("Enter", 13, "\r")
    page.wait("document.querySelector('[data-control=range]').open")
    page.key("Escape", 27)
    page.wait("!document.querySelector('[data-control=range]').open")
    assert page.js("document.activeElement.tagName") == "SUMMARY"
    page.js("document.querySelector('button.about').focus()")
    page.key("Enter", 13, "\r")
    page.wait("document.querySelector('dialog[open]')")
    assert "rkmetrics_kv_active_blocks" in page.js("document.querySelector('dialog').innerText")
    page.key("Escape", 27)
    page.wait("!document.querySelector('dialog')")
    unnamed = """[...document.querySelectorAll("button, select, input, summary, a")].filter((each) =>
        !(each.textContent.trim() || each.ariaLabel || each.labels?.[0]?.textContent || each.placeholder)).length"""
    assert page.js(unnamed) == 0


def test_a_refresh_leaves_the_focus_and_an_open_menu_where_they_are(lab: Lab, page: Page) -> None:
    shown(page, lab.at("rkmetrics-fleet", refresh="1s"))
    page.js("document.querySelectorAll('.legend button')[2].focus()")
    name = page.js("document.activeElement.textContent")
    page.js("document.querySelector('[data-control=range]').open = true")
    page.js("document.querySelector('form.absolute').From.value = 'now-9'")
    page.wait(f"Number(document.body.dataset.round) > {page.js('Number(document.body.dataset.round)') + 1}")
    assert page.js("document.activeElement.textContent") == name
    assert page.js("document.querySelector('form.absolute').From.value") == "now-9"


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_prometheus_that_is_killed_shows_and_comes_back(
    start_prometheus: Callable[..., Prometheus], page: Page
) -> None:
    prometheus = start_prometheus({})
    prometheus.wait(lambda: bool(prometheus.query("vector(1)")))
    process = prometheus._process
    with previewing(Settings(prometheus_url=prometheus.url), [SHIPPED / "kv.json"]) as server:
        panels = shown(page, f"{server.url}/?from=now-5m&to=now&refresh=1s")
        assert {each["state"] for each in panels} == {"empty"}
        process.kill()
        process.wait()
        page.wait(
            "document.querySelectorAll('[data-state=error]').length === document.querySelectorAll('.panel').length"
        )
        text = page.js("document.querySelector('[data-state=error]').innerText")
        assert "Prometheus: unreachable" in text
        assert "rkmetrics_kv_active_blocks" in text
        assert "in trouble" in page.wait("document.querySelector('#status.bad')?.textContent")
        prometheus._process = subprocess.Popen(process.args, stdout=prometheus._log, stderr=subprocess.STDOUT)
        page.wait(
            "document.querySelectorAll('[data-state=empty]').length === document.querySelectorAll('.panel').length"
        )
        assert page.js("document.querySelector('.trouble')") is None


def test_a_preview_that_ends_is_said_too(lab: Lab, page: Page, tmp_path: Path) -> None:
    with preview_of(dashboard(panel("stat", "1")), lab, tmp_path) as url:
        shown(page, url.replace("refresh=", "refresh=1s"))
    page.wait("document.querySelector('[data-state=error]')")
    assert "is `rkmetrics preview` still running?" in page.js("document.querySelector('.trouble').textContent")


def test_it_works_behind_a_prefix(lab: Lab, page: Page, tmp_path: Path) -> None:
    with preview_of(dashboard(panel("stat", "2")), lab, tmp_path, prefix="/ops/preview") as url:
        (found,) = shown(page, url)
        assert (found["state"], found["text"].strip()) == ("ok", "2")
    assert {urlsplit(each).path.startswith("/ops/preview/") for each in page.urls() if "about:" not in each} == {True}
    assert page.troubles() == []


def test_labels_are_text_whatever_is_in_them(lab: Lab, page: Page, tmp_path: Path) -> None:
    evil = "<img src=x onerror=document.title=1>"
    hostile = panel("timeseries", f'label_replace(vector(1), "kind", "{evil}", "", "")')
    hostile["targets"][0]["legendFormat"] = "{{kind}}"
    text = {"id": 2, "type": "text", "title": evil, "options": {"content": f"**a** {evil} [b](javascript:alert(1))"}}
    with preview_of(dashboard(hostile, {**text, "gridPos": {"x": 12, "y": 0, "w": 6, "h": 6}}), lab, tmp_path) as url:
        shown(page, url)
    assert page.js("document.querySelector('.legend button').textContent") == evil
    assert page.js("document.querySelectorAll('main img, main a').length") == 0
    assert (page.js("document.title"), page.troubles()) == ("Own", [])
