"""The alerts that ship: promtool takes them, each has a case in which it fires and one in which it is quiet, and each
has a section in its runbook.

What they name is checked against the catalogue in test_shipped.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rkmetrics.assets.base import Node, Scalar, trees
from rkmetrics.assets.yaml_text import read_yaml

FILES = ("actors", "discovery", "exporter", "kv", "planes", "runtime", "slo")
# What these are about is no process and no actor: a job as a whole, or all of them.
WHOLE = {
    "RkMetricsAbsent": set[str](),
    "RkMetricsAllTargetsDown": {"job"},
    "RkMetricsNoNodeReady": {"job"},
    "RkMetricsCatalogMismatch": {"job", "version", "catalog"},
    "RkMetricsResponseBudgetBurnFast": {"job"},
    "RkMetricsResponseBudgetBurnSlow": {"job"},
}
SECTIONS = ("What it means", "What users see", "What to look at first", "What to do")
HEADING = re.compile(r"^## (RkMetrics\w+)$", re.MULTILINE)
PROMTOOL = "promtool is not installed; apt-get install prometheus"

pytestmark = pytest.mark.parametrize("file", FILES)


@pytest.fixture(scope="module")
def promtool() -> str:
    return shutil.which("promtool") or pytest.skip(PROMTOOL)


def run(*command: str | Path) -> None:
    out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert out.returncode == 0, out.stdout + out.stderr


def mappings(path: Path, key: str) -> list[dict[str, Node]]:
    """The mappings of a YAML file that have a key."""
    return [found for tree in read_yaml(path.read_text(), path.name) for found in trees(tree) if key in found]


def text(node: Node | None) -> str:
    assert isinstance(node, Scalar), node
    return node.value


def inner(node: dict[str, Node], key: str) -> dict[str, str]:
    found = node[key]
    assert isinstance(found, dict)
    return {name: text(value) for name, value in found.items()}


def alerts(root: Path, file: str) -> dict[str, dict[str, Node]]:
    return {text(rule["alert"]): rule for rule in mappings(root / "alerts" / f"{file}.yaml", "alert")}


def runbook(root: Path, file: str) -> dict[str, str]:
    """The sections of a runbook that are named after an alert."""
    _, *parts = HEADING.split((root / f"docs/runbooks/{file}.md").read_text())
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_promtool_finds_nothing_wrong(file: str, root: Path, promtool: str) -> None:
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", root / f"alerts/{file}.yaml")


def test_alerts_fire_and_are_quiet_when_they_should(file: str, root: Path, promtool: str) -> None:
    run(promtool, "test", "rules", root / f"alerts/tests/{file}_test.yaml")


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_quiet(file: str, root: Path) -> None:
    cases = mappings(root / f"alerts/tests/{file}_test.yaml", "alertname")
    fires = {text(case["alertname"]) for case in cases if case["exp_alerts"]}
    quiet = {text(case["alertname"]) for case in cases if not case["exp_alerts"]}
    assert fires == quiet == alerts(root, file).keys()


def test_cases_are_named_after_what_they_expect(file: str, root: Path) -> None:
    for case in mappings(root / f"alerts/tests/{file}_test.yaml", "alert_rule_test"):
        expected = case["alert_rule_test"]
        assert isinstance(expected, list)
        for each in expected:
            assert isinstance(each, dict)
            verdict = "fires" if each["exp_alerts"] else "is quiet"
            assert text(case["name"]).startswith(f"{text(each['alertname'])} {verdict} - ")


def test_each_alert_says_what_a_person_needs(file: str, root: Path) -> None:
    for name, rule in alerts(root, file).items():
        labels, annotations = inner(rule, "labels"), inner(rule, "annotations")
        assert name.startswith("RkMetrics")
        assert re.fullmatch(r"[1-9]\d*m", text(rule["for"])), name
        assert labels.keys() == {"severity", "component"} | ({"slo"} if file == "slo" else set()), name
        assert labels["severity"] in ("critical", "warning", "info"), name
        assert re.fullmatch(r"[A-Z][^{}]*\.", annotations["summary"]), (
            f"{name}: a sentence that is the same for a group"
        )
        assert annotations["description"].endswith("."), name
        assert _says_whom(name, set(re.findall(r"\$labels\.(\w+)", annotations["description"]))), name
        assert (root / f"dashboards/{annotations['dashboard_uid'].removeprefix('rkmetrics-')}.json").is_file(), name


def _says_whom(name: str, labels: set[str]) -> bool:
    """Whether a description names its job, and the process or the actor that it is about."""
    return labels == WHOLE[name] if name in WHOLE else "job" in labels and bool(labels & {"instance", "actor_name"})


def test_each_alert_has_a_section_in_the_runbook_and_the_reverse(file: str, root: Path) -> None:
    shipped = alerts(root, file)
    assert list(runbook(root, file)) == list(shipped), "the order of the sections is that of the rules"
    for name, rule in shipped.items():
        assert inner(rule, "annotations")["runbook_url"] == f"docs/runbooks/{file}.md#{name.lower()}"


def test_each_alert_is_on_the_page_of_all_alerts(file: str, root: Path) -> None:
    page = (root / "docs/alerts.md").read_text()
    rows = re.findall(rf"^\| \[(\w+)\]\(runbooks/{file}.md#(\w+)\) \| (\w+) \| (\w+) \| [^|]+ \|$", page, re.M)
    assert rows == [
        (name, name.lower(), inner(rule, "labels")["severity"], text(rule["for"]))
        for name, rule in alerts(root, file).items()
    ]


def test_each_section_says_the_same_four_things(file: str, root: Path) -> None:
    for name, section in runbook(root, file).items():
        assert tuple(re.findall(r"^\*\*([^*]+)\.\*\*", section, re.MULTILINE)) == SECTIONS, name


def test_panels_that_a_runbook_names_are_on_a_dashboard(file: str, root: Path) -> None:
    page = (root / f"docs/runbooks/{file}.md").read_text()
    titles = {text(each["title"]) for path in root.glob("dashboards/*.json") for each in mappings(path, "title")}
    lists = re.findall(r"[Pp]anels? ((?:\*[^*]+\*(?:, | and )?)+)", page)
    assert {title for each in lists for title in re.findall(r"\*([^*]+)\*", each)} <= titles


def test_links_inside_a_runbook_lead_somewhere(file: str, root: Path) -> None:
    page = (root / f"docs/runbooks/{file}.md").read_text()
    anchors = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in re.findall(r"^#+ (.*)$", page, re.M)}
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= anchors
    for other, anchor in re.findall(r"\]\(((?:\.\./)?\w+\.md)#([^)]*)\)", page):
        titles = re.findall(r"^#+ (.*)$", (root / "docs/runbooks" / other).read_text(), re.M)
        assert anchor in {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}, (other, anchor)
