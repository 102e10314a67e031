"""Reports for people, programs and code review."""

from __future__ import annotations

import json

from rkmetrics.assets.base import Problem
from rkmetrics.assets.report import FORMATS, as_github, as_json, as_sarif, as_text
from rkmetrics.assets.rules import CHECKS

PROBLEM = Problem(
    "unknown-metric", "a b/c,d:e.json", 3, 7, "panel 'Q, %'", "unknown\nmetric", "did you mean 'x'?", 3, 9
)
BARE = Problem("unreadable-file", "f.yaml", 1, 2, "", "not JSON", "", 1, 3)


def test_text_is_a_line_each() -> None:
    assert as_text([PROBLEM, BARE]).splitlines()[-1] == "f.yaml:1:2: not JSON [unreadable-file]"
    assert as_text([]) == ""


def test_github_escapes_what_it_must() -> None:
    assert as_github([PROBLEM]) == (
        "::error file=a b/c%2Cd%3Ae.json,line=3,col=7,endLine=3,endColumn=9,title=unknown-metric::"
        "panel 'Q, %25': unknown%0Ametric; did you mean 'x'?\n"
    )


def test_json_has_all_fields() -> None:
    (found,) = json.loads(as_json([PROBLEM]))
    assert Problem(**found) == PROBLEM
    assert json.loads(as_json([])) == []


def test_sarif_has_what_code_scanning_asks_for() -> None:
    (run,) = json.loads(as_sarif([PROBLEM, BARE]))["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert set(rules) == {check.name for check in CHECKS} | {"syntax", "unreadable-file"}
    first, second = run["results"]
    assert (first["ruleId"], rules[first["ruleIndex"]], second["ruleId"]) == (
        "unknown-metric",
        "unknown-metric",
        "unreadable-file",
    )
    place = first["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "a%20b/c%2Cd%3Ae.json"
    assert place["region"] == {"startLine": 3, "startColumn": 7, "endLine": 3, "endColumn": 9}


def test_formats_are_listed() -> None:
    assert list(FORMATS) == ["text", "json", "sarif", "github"]
