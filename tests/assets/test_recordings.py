"""What ships beside the alerts: recordings, each with a test, and what Alertmanager is to keep quiet."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rkmetrics.assets import stamp
from rkmetrics.assets.base import Node, Scalar, trees
from rkmetrics.assets.yaml_text import read_yaml
from rkmetrics.catalogue import catalog_version
from tests.assets.test_alerts import FILES, alerts, mappings, run, text

RECORDED = re.compile(r"[a-z_]+:[a-z_]+:\w+")  # level:metric:operation


@pytest.fixture(scope="module")
def promtool() -> str:
    return shutil.which("promtool") or pytest.skip("promtool is not installed; apt-get install prometheus")


def recorded(root: Path) -> dict[str, str]:
    return {text(rule["record"]): text(rule["expr"]) for rule in mappings(root / "alerts/recording.yaml", "record")}


def test_no_file_of_rules_is_left_out_of_these_tests(root: Path) -> None:
    others = {"recording", "alertmanager-inhibit"}
    assert {path.stem for path in root.glob("alerts/*.yaml")} == {*FILES, *others}
    assert {path.stem for path in root.glob("alerts/tests/*.yaml")} == {
        f"{each}_test" for each in (*FILES, "recording")
    }


def test_promtool_finds_nothing_wrong_with_the_recordings(root: Path, promtool: str) -> None:
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", root / "alerts/recording.yaml")


def test_recordings_are_what_they_are_called(root: Path, promtool: str) -> None:
    run(promtool, "test", "rules", root / "alerts/tests/recording_test.yaml")


def test_each_recording_is_tested_named_by_the_rule_and_keeps_what_tells_fleets_apart(root: Path) -> None:
    cases = mappings(root / "alerts/tests/recording_test.yaml", "exp_samples")
    found = recorded(root)
    assert {text(case["expr"]) for case in cases} == found.keys()
    assert [name for name in found if not RECORDED.fullmatch(name)] == []
    groupings = [by for expr in found.values() for by in re.findall(r"by \(([^)]*)\)", expr)]
    assert [by for by in groupings if not by.startswith("cluster, namespace, job")] == []


def test_each_recording_is_used(root: Path) -> None:
    """By an alert, by another recording, or by a dashboard: nobody pays for what nobody reads."""
    files = [*root.glob("alerts/*.yaml"), *root.glob("dashboards/*.json")]
    used = [name for path in files for name in RECORDED.findall(path.read_text())]
    assert [name for name in recorded(root) if used.count(name) < 2] == []


# --- the version of the catalogue -------------------------------------------------------------------------------------


def test_the_rules_say_which_catalogue_they_are_for(root: Path) -> None:
    assert stamp.stale(root / "alerts") == [], "run `make docs`"
    for name in stamp.STAMPED:
        assert catalog_version() in (root / "alerts" / name).read_text()


def test_another_catalogue_is_written_into_the_rules_and_their_tests(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "alerts", tmp_path / "alerts")
    paths = [tmp_path / "alerts" / name for name in stamp.STAMPED]
    current = [path.read_text() for path in paths]
    for path in paths:
        path.write_text(path.read_text().replace(catalog_version(), "0ddba115"))
    assert stamp.stale(tmp_path / "alerts") == paths
    assert stamp.write(tmp_path / "alerts") == paths
    assert [path.read_text() for path in paths] == current
    assert stamp.write(tmp_path / "alerts") == stamp.write(tmp_path / "nowhere") == []


# --- inhibition -------------------------------------------------------------------------------------------------------


def inhibitions(root: Path) -> list[dict[str, Node]]:
    return mappings(root / "alerts/alertmanager-inhibit.yaml", "source_matchers")


def listed(node: Node) -> list[str]:
    assert isinstance(node, list)
    return [text(each) for each in node]


def matched(matcher: str, names: set[str]) -> set[str]:
    """The alerts whose name a matcher takes; all of them for a matcher of something else."""
    label, op, value = re.fullmatch(r"(\w+) (=|!=|=~|!~) \"?([^\"]*)\"?", matcher).groups()  # type: ignore[union-attr]
    if label != "alertname":
        return names
    found = {name for name in names if re.fullmatch(value, name)}
    return names - found if op.startswith("!") else found


def test_each_inhibition_is_of_alerts_that_there_are(root: Path) -> None:
    names = {name for file in FILES for name in alerts(root, file)}
    assert len(inhibitions(root)) > 5
    for rule in inhibitions(root):
        for side in ("source_matchers", "target_matchers"):
            for matcher in listed(rule[side]):
                assert matched(matcher, names), matcher
                for part in re.findall(r"RkMetrics\w+", matcher):
                    assert any(name.startswith(part) for name in names), part


def test_no_alert_keeps_itself_quiet_and_each_tells_fleets_apart(root: Path) -> None:
    names = {name for file in FILES for name in alerts(root, file)}
    for rule in inhibitions(root):
        source, target = (
            set.intersection(*(matched(matcher, names) for matcher in listed(rule[side])))
            for side in ("source_matchers", "target_matchers")
        )
        assert source
        assert target
        assert not source & target
        assert listed(rule["equal"])[:3] == ["cluster", "namespace", "job"]


def test_alertmanager_takes_it(root: Path, tmp_path: Path) -> None:
    amtool = shutil.which("amtool") or pytest.skip("amtool is not installed; apt-get install prometheus-alertmanager")
    config = tmp_path / "alertmanager.yml"
    config.write_text(
        "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n"
        + (root / "alerts/alertmanager-inhibit.yaml").read_text()
    )
    out = subprocess.run([amtool, "check-config", config], capture_output=True, text=True, check=False, timeout=60)
    assert (out.returncode, f"{len(inhibitions(root))} inhibit rules" in out.stdout) == (0, True), out.stderr


def test_the_snippet_is_nothing_but_inhibitions(root: Path) -> None:
    path = root / "alerts/alertmanager-inhibit.yaml"
    (tree,) = read_yaml(path.read_text(), path.name)
    assert isinstance(tree, dict)
    assert tree.keys() == {"inhibit_rules"}
    assert not any(isinstance(found, Scalar) for each in trees(tree) for found in each.values())
