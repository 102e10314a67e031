"""The page's pure modules, run in the browser that they are written for: tables of input and expected output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from rkmetrics.runtime import previewing
from rkmetrics.settings import Settings
from tests.services.chromium import Chromium, Page
from tests.services.conftest import program


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The preview's first page, which needs no Prometheus."""
    browser = Chromium(program("chromium", "chromium"), tmp_path_factory.mktemp("profile"))
    with previewing(Settings(prometheus_url="http://127.0.0.1:1")) as server:
        opened = browser.open()
        opened.go(f"{server.url}/")
        opened.wait("document.querySelector('.overview')")
        yield opened
    browser.close()


def call(page: Page, module: str, function: str, *arguments: Any) -> Any:
    written = ", ".join(json.dumps(each) for each in arguments)
    return page.js(f"import('./preview/{module}.js').then((found) => found.{function}({written}))")


@pytest.mark.parametrize(
    ("unit", "value", "decimals", "text"),
    [
        ("short", 0, None, "0"),
        ("short", 12, None, "12"),
        ("short", 0.0667, None, "0.0667"),
        ("short", 1234, None, "1.23 K"),
        ("short", -2_500_000, None, "-2.5 Mil"),
        ("none", 1234567, None, "1234567"),
        ("none", 0.1 + 0.2, None, "0.3"),
        ("none", 2, 2, "2.00"),
        ("percentunit", 0.9741, None, "97.4%"),
        ("percentunit", 1, None, "100%"),
        ("percentunit", 0.07, None, "7%"),
        ("percent", 12.34, 1, "12.3%"),
        ("s", 0, None, "0 s"),
        ("s", 0.0000015, None, "1.5 µs"),
        ("s", 0.02425, None, "24.3 ms"),
        ("s", 59, None, "59 s"),
        ("s", 90, None, "1.5 min"),
        ("s", 3600, None, "1 hour"),
        ("s", 172_800, None, "2 days"),
        ("ms", 1500, None, "1.5 s"),
        ("dtdurations", 93_784, None, "1d 2h"),
        ("bytes", 0, None, "0 B"),
        ("bytes", 36_700_160, None, "35 MiB"),
        ("decbytes", 1500, None, "1.5 kB"),
        ("Bps", 1500, None, "1.5 kB/s"),
        ("reqps", 1234, None, "1.23 K req/s"),
        ("cps", 0.4, None, "0.4 c/s"),
        ("ops", 3, None, "3 ops/s"),
        ("bool_yes_no", 0, None, "No"),
        ("bool_yes_no", 1, None, "Yes"),
        ("suffix:rooms", 3, None, "3 rooms"),
        ("prefix:$", 3, None, "$3"),
        ("rooms", 3, None, "3 rooms"),
    ],
)
def test_units(unit: str, value: float, decimals: int | None, text: str, page: Page) -> None:
    assert call(page, "units", "format", unit, value, decimals) == text


@pytest.mark.parametrize(("value", "text"), [("NaN", "NaN"), ("Infinity", "+Inf"), ("-Infinity", "-Inf")])
def test_what_is_no_number_is_said_so(value: str, text: str, page: Page) -> None:
    assert page.js(f"import('./preview/units.js').then((found) => found.format('s', {value}))") == text


NOW = 1_700_000_000_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", NOW),
        ("now-90m", NOW - 5_400_000),
        ("now-1h/h", (NOW - 3_600_000) // 3_600_000 * 3_600_000),
        ("now+1d", NOW + 86_400_000),
        ("1234567890123", 1_234_567_890_123),
        ("2026-01-31T12:00:00Z", 1_769_860_800_000),
        ("yesterday", None),
        ("now-1x", None),
    ],
)
def test_moments(text: str, expected: float | None, page: Page) -> None:
    assert call(page, "time", "moment", text, NOW, False) == expected


@pytest.mark.parametrize(
    ("start", "end", "text"),
    [
        ("now-5m", "now", "Last 5 minutes"),
        ("now-1h", "now", "Last 1 hour"),
        ("now-12d", "now", "Last 12 days"),
        ("now/d", "now", "now/d to now"),
        ("now-2h", "now-1h", "now-2h to now-1h"),
    ],
)
def test_ranges_have_names(start: str, end: str, text: str, page: Page) -> None:
    assert call(page, "time", "rangeText", {"raw": {"from": start, "to": end}}) == text


@pytest.mark.parametrize(("end", "hour"), [(False, (0, 0, 0)), (True, (23, 59, 59))])
def test_a_day_begins_and_ends_where_the_browser_is(end: bool, hour: tuple[int, int, int], page: Page) -> None:
    at = call(page, "time", "moment", "now/d", NOW, end)
    assert (
        tuple(
            page.js(f"(({{h}}) => h)({{ h: ((d) => [d.getHours(), d.getMinutes(), d.getSeconds()])(new Date({at})) }})")
        )
        == hour
    )


@pytest.mark.parametrize(
    ("minutes", "points", "step", "rate"),
    [(15, 600, 15_000, 60_000), (60, 400, 15_000, 60_000), (360, 400, 60_000, 75_000), (1440, 400, 300_000, 315_000)],
)
def test_steps_are_round_and_never_shorter_than_a_scrape(
    minutes: int, points: int, step: int, rate: int, page: Page
) -> None:
    found = call(page, "time", "intervals", {"from": 0, "to": minutes * 60_000}, points, 15_000, 15_000)
    assert (found["stepMs"], found["rateMs"]) == (step, rate)


def test_no_step_asks_prometheus_for_more_points_than_it_gives(page: Page) -> None:
    """11,000 of a series (Prometheus, web/api/v1)."""
    for days in (1, 30, 365):
        span = days * 86_400_000
        assert span / call(page, "time", "intervals", {"from": 0, "to": span}, 20_000, 1000, 1000)["stepMs"] <= 11_000


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ('a{job=~"$job"}', 'a{job=~"(a\\\\.b|c)"}'),
        ("${job:csv} ${job:pipe} ${job:raw}", "a.b,c a.b|c a.b,c"),
        ("${job:regex}", "(a\\.b|c)"),
        ("${job:text} [[job:csv]]", "a.b + c a.b,c"),
        ("${job:queryparam}", "var-job=a.b&var-job=c"),
        ('a{x=~"$all"}', 'a{x=~".+"}'),
        ("[$__range] $__range_s", "[60s] 60"),
        ("$one|$unknown|$__interval", 'x\\"y|$unknown|5s'),
    ],
)
def test_variables_in_queries(text: str, written: str, page: Page) -> None:
    models = [
        {"name": "job", "type": "custom", "multi": True, "query": "a.b,c,d"},
        {"name": "all", "type": "custom", "multi": True, "includeAll": True, "allValue": ".+", "query": "p,q"},
        {"name": "one", "type": "custom", "query": 'x"y'},
    ]
    expression = f"""import("./preview/variables.js").then(async ({{ Variables }}) => {{
        const made = new Variables({json.dumps({"templating": {"list": models}})}, "prometheus");
        const range = {{ from: 0, to: 60000 }};
        await made.load(null, range, {{ job: ["a.b", "c", "gone"] }});
        return made.write({json.dumps(text)}, range, {{ __interval: "5s" }});
    }})"""
    assert page.js(expression) == written


@pytest.mark.parametrize(
    ("regex", "sort", "values"),
    [
        ("", 0, ["n10", "n2", "N3"]),
        ("", 1, ["n10", "n2", "N3"]),
        ("", 7, ["n2", "N3", "n10"]),
        ("", 8, ["n10", "N3", "n2"]),
        ("/n(\\d+)/", 3, ["2", "10"]),
        ("/^N/", 0, ["N3"]),
    ],
)
def test_options_of_query_variables(regex: str, sort: int, values: list[str], page: Page) -> None:
    model = {"name": "n", "type": "query", "query": 'label_values(up{a="b"}, instance)', "regex": regex, "sort": sort}
    expression = f"""import("./preview/variables.js").then(async ({{ Variables }}) => {{
        const made = new Variables({json.dumps({"templating": {"list": [model]}})}, "prometheus");
        const client = {{ labelValues: (label, selector) =>
            (label === "instance" && selector === 'up{{a="b"}}' ? ["n10", "n2", "N3"] : []) }};
        await made.load(client, {{ from: 0, to: 1 }}, {{}});
        return made.list[0].options.map((each) => each.value);
    }})"""
    assert page.js(expression) == values


def field(name: str, values: list[Any], kind: str = "number") -> dict[str, Any]:
    return {"name": name, "type": kind, "refId": "A", "values": values}


def transformed(page: Page, tables: list[list[dict[str, Any]]], *steps: dict[str, Any]) -> Any:
    found = call(page, "transformations", "transform", tables, list(steps))
    return found["unknown"], [{each["name"]: each["values"] for each in fields} for fields in found["tables"]]


def test_merge_joins_rows_that_agree_in_what_they_share(page: Page) -> None:
    one = [field("Time", [1, 1], "time"), field("instance", ["a", "b"], "string"), field("Value #A", [1, 2])]
    two = [field("Time", [1, 1], "time"), field("instance", ["b", "c"], "string"), field("Value #B", [20, 30])]
    unknown, (merged,) = transformed(page, [one, two], {"id": "merge"})
    assert unknown == []
    assert merged["instance"] == ["a", "b", "c"]
    assert (merged["Value #A"], merged["Value #B"]) == ([1, 2, None], [None, 20, 30])


def test_merge_of_one_table_keeps_rows_that_are_alike(page: Page) -> None:
    _, (merged,) = transformed(page, [[field("a", ["x", "x"], "string"), field("Value", [1, 1])]], {"id": "merge"})
    assert merged == {"a": ["x", "x"], "Value": [1, 1]}


def test_organize_hides_orders_and_renames(page: Page) -> None:
    options = {"excludeByName": {"a": True}, "indexByName": {"c": 0, "b": 1}, "renameByName": {"c": "see"}}
    _, (found,) = transformed(
        page, [[field("a", [1]), field("b", [2]), field("c", [3])]], {"id": "organize", "options": options}
    )
    assert list(found.items()) == [("see", [3]), ("b", [2])]


def test_other_transformations(page: Page) -> None:
    table = [field("k", ["b", "a", "c"], "string"), field("v", [1, 3, 2])]
    sort = {"id": "sortBy", "options": {"sort": [{"field": "v", "desc": True}]}}
    limit = {"id": "limit", "options": {"limitField": 2}}
    assert transformed(page, [table], sort, limit)[1] == [{"k": ["a", "c"], "v": [3, 2]}]
    reduced = {"id": "reduce", "options": {"reducers": ["max", "mean"]}}
    assert transformed(page, [table], reduced)[1] == [{"Field": ["v"], "Max": [3], "Mean": [2]}]
    joined = {"id": "joinByField", "options": {"byField": "k"}}
    other = [field("k", ["a"], "string"), field("w", [9])]
    assert transformed(page, [table, other], joined)[1] == [
        {"k": ["b", "a", "c"], "v": [1, 3, 2], "w": [None, 9, None]}
    ]
    renamed = {"id": "renameByRegex", "options": {"regex": "(.)", "renamePattern": "the $1"}}
    assert list(transformed(page, [other], renamed)[1][0]) == ["the k", "the w"]
    assert transformed(page, [table], {"id": "calculateField"})[0] == ["calculateField"]


def test_a_gap_stays_a_gap(page: Page) -> None:
    result = [{"metric": {"a": "x"}, "values": [[10, "1"], [30, "+Inf"]]}]
    span = {"start": 10_000, "end": 40_000}
    (series,) = call(page, "frames", "rangeSeries", {"refId": "A", "legendFormat": "{{a}} {{b}}"}, result, span, 10_000)
    assert series["name"] == "x"
    assert series["values"][:2] == [1, None]
    assert series["values"][3] is None


@pytest.mark.parametrize(
    ("matcher", "options", "fits"),
    [
        ("byName", "errors", True),
        ("byName", "error", False),
        ("byRegexp", "/^err/", True),
        ("byRegexp", "x", False),
        ("byFrameRefID", "A", True),
        ("byType", "number", True),
        ("byNames", {"names": ["errors"]}, True),
        ("byUnknown", "errors", False),
    ],
)
def test_overrides(matcher: str, options: Any, fits: bool, page: Page) -> None:
    properties = [{"id": "unit", "value": "s"}, {"id": "custom.stacking.mode", "value": "normal"}]
    config = {
        "defaults": {"unit": "short"},
        "overrides": [{"matcher": {"id": matcher, "options": options}, "properties": properties}],
    }
    found = call(page, "fields", "configOf", config, {"name": "errors", "type": "number", "refId": "A"})
    assert found["unit"] == ("s" if fits else "short")
    assert found["custom"] == ({"stacking": {"mode": "normal"}} if fits else {})


STEPS = {"mode": "absolute", "steps": [{"value": None, "color": "#000001"}, {"value": 10, "color": "#000002"}]}
MAPPINGS = [
    {"type": "value", "options": {"3": {"text": "three", "color": "#000003"}}},
    {"type": "range", "options": {"from": 20, "to": 30, "result": {"text": "many"}}},
    {"type": "special", "options": {"match": "null", "result": {"text": "nothing"}}},
]


@pytest.mark.parametrize(
    ("value", "text", "colour"),
    [
        (0, "0", "#000001"),
        (9.99, "9.99", "#000001"),
        (10, "10", "#000002"),
        (3, "three", "#000003"),
        (25, "many", "#000002"),
        (None, "nothing", None),
    ],
)
def test_thresholds_and_mappings(value: float | None, text: str, colour: str | None, page: Page) -> None:
    found = call(page, "fields", "display", {"thresholds": STEPS, "mappings": MAPPINGS}, value)
    assert found["text"] == text
    assert colour in (None, found["colour"])


@pytest.mark.parametrize(
    ("legend", "names"),
    [
        ({"calcs": ["lastNotNull"], "sortBy": "Last *", "sortDesc": True}, ["b", "a", "d", "c"]),
        ({"calcs": ["lastNotNull"], "sortBy": "Last *"}, ["d", "a", "b", "c"]),
        ({"calcs": ["max"], "sortBy": "Max", "sortDesc": True}, ["d", "b", "a", "c"]),
        ({"sortBy": "Name", "sortDesc": True}, ["d", "c", "b", "a"]),
        ({"calcs": ["max"], "sortBy": "Last *"}, ["a", "b", "c", "d"]),  # no such column
        ({"calcs": ["max"]}, ["a", "b", "c", "d"]),
    ],
)
def test_legends_stand_in_the_order_that_is_asked_for(legend: dict[str, Any], names: list[str], page: Page) -> None:
    entries = [
        {"name": "a", "values": [1, 2]},
        {"name": "b", "values": [0, 5, None]},
        {"name": "c", "values": [None]},  # without a number: last, in either direction
        {"name": "d", "values": [9, 0]},
    ]
    found = call(page, "panels/legend", "ordered", legend, entries)
    assert [each["name"] for each in found] == names
