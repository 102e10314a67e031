"""What is exported, to the byte for a small pair of files, and by its meaning for all that ships."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rkmetrics.assets import export as exporting
from rkmetrics.assets.base import Document
from rkmetrics.assets.checking import check_documents
from rkmetrics.assets.documents import document
from rkmetrics.assets.export import SHIPPED, TARGETS, Choices, conflicts, export, matchers, stream, unused, write
from rkmetrics.cli import main
from rkmetrics.errors import AssetError, PromqlError
from rkmetrics.promql import Node, Selector, metric_words, parse, parse_variable, selectors

HERE = Path(__file__).parent / "export"
OBJECTS = Choices(
    selector='cluster="eu-1", team="chat"',
    namespace="monitoring",
    labels={"release": "kps", "app.kubernetes.io/part-of": "fleet"},
)
# What is chosen for each golden file; `export.stream` of it is in export/<target>.golden.yaml.
GOLDEN = {
    "files": Choices(selector='cluster=~"eu-1|eu-2"', runbooks="https://example.org/rkmetrics/"),
    "grafana-provisioning": Choices(datasource="prometheus-1", folder='Fleet "A"', path="/srv/dashboards"),
    "configmap": OBJECTS,
    "prometheusrule": OBJECTS,
}
EVERYTHING = Choices(selector='cluster="eu-1", team="chat"')


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["assets", "export", *map(str, arguments)], {})
    return code, *capsys.readouterr()


def documents(choices: Choices = EVERYTHING, target: str = "files") -> list[Document]:
    return [document(path, text) for path, text in export(target, choices).items()]


def queries(found: list[Document]) -> list[tuple[str, Node]]:
    """All queries that ask for series, with the file that they are in."""
    texts = [(each.file, query) for each in found for query in each.queries]
    nodes = [
        (file, parse_variable(query.scalar.value)[0] if query.variable else parse(query.scalar.value))
        for file, query in texts
    ]
    return [(file, node) for file, node in nodes if node is not None]


# --- to the byte ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_written_to_the_byte(target: str) -> None:
    assert stream(export(target, GOLDEN[target], HERE / "shipped")) == (HERE / f"{target}.golden.yaml").read_text()


def test_without_choices_files_are_as_they_ship() -> None:
    files = export("files")
    assert {path: (SHIPPED / path).read_text() for path in files} == files
    assert {Path(path).parent.as_posix() for path in files} == {"dashboards", "alerts"}


def test_nothing_that_ships_is_left_out(root: Path) -> None:
    shipped = {f"{path.parent.name}/{path.name}" for path in (*root.glob("dashboards/*"), *root.glob("alerts/*.yaml"))}
    dashboards = {Path(path).stem for path in shipped if path.startswith("dashboards/")}
    rules = {Path(path).stem for path in shipped if path.startswith("alerts/")} - {"alertmanager-inhibit"}
    assert export("files").keys() == shipped
    assert export("configmap").keys() == {f"rkmetrics-dashboard-{name}.yaml" for name in dashboards}
    assert export("prometheusrule").keys() == {f"rkmetrics-{name}.yaml" for name in rules}
    assert export("grafana-provisioning").keys() == {
        "provisioning/dashboards/rkmetrics.yaml",
        *(f"dashboards/rkmetrics/{name}.json" for name in dashboards),
    }


# --- the selector -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["files", "configmap", "prometheusrule"])
def test_a_selector_is_in_every_selector_of_every_query(target: str) -> None:
    found = queries(documents(target=target))
    before = queries(documents(Choices(), target))
    assert len(found) == len(before) > 20
    for (_, old), (file, new) in zip(before, found, strict=True):
        for was, now in zip(selectors(old), selectors(new), strict=True):
            assert said(now) == [("cluster", "=", "eu-1"), ("team", "=", "chat"), *said(was)], file
            assert names(now) == names(was)


def said(selector: Selector) -> list[tuple[str, str, str]]:
    return [(each.label.text, each.op, each.value.text) for each in selector.matchers]


def names(selector: Selector) -> list[str]:
    return [word.text for word in metric_words(selector)]


def test_checks_find_nothing_in_what_is_exported() -> None:
    """Alerts and recordings still have the labels that are asked of them."""
    assert check_documents(documents(), labels=["team"]) == []


def test_a_selector_leaves_all_else_alone() -> None:
    """Without what was put in, the text is the one that ships."""
    for path, text in export("files", EVERYTHING).items():
        quoted = r"\\?\"".join(("cluster=", r"eu-1", ", team=", "chat", ""))
        without = re.sub(rf"\{{{quoted}\}}|{quoted}, ?", "", text)
        without = re.sub(r"((?:by|on) \([^)]*), team\)", r"\1)", without)
        without = re.sub(r"((?:by|on) \([^)]*), cluster\)", r"\1)", without) if path.endswith(".json") else without
        assert without == (SHIPPED / path).read_text(), path


@pytest.mark.parametrize(
    ("selector", "why"),
    [
        ("", "expected matchers"),
        ("up", "expected"),
        ('job="a"} or {job="b"', "expected matchers"),
        ('job="$job"', "without variables"),
        ('$x="a"', "without variables"),
        ('"job"="a"', "expected matchers"),
        ('job="a" + 1', "expected"),
        ("job=a", "expected"),
    ],
)
def test_what_is_no_selector_is_refused(selector: str, why: str) -> None:
    with pytest.raises(PromqlError, match=why):
        matchers(selector)


def test_a_comma_at_the_end_of_a_selector_does_no_harm() -> None:
    assert export("files", Choices(selector='cluster="eu-1", ')) == export("files", Choices(selector='cluster="eu-1"'))


def test_a_selector_that_recordings_could_not_answer_is_refused_with_the_place() -> None:
    with pytest.raises(
        AssetError, match=r"small.yaml:12:11: job:\S+:sum has no label 'pod'; select with =, or by clus"
    ):
        export("files", Choices(selector='pod=~"a.*"'), HERE / "shipped")
    assert 'pod="a"' in stream(export("files", Choices(selector='pod="a"'), HERE / "shipped"))
    assert 'job!="a"' in stream(export("files", Choices(selector='job!="a"'), HERE / "shipped"))


def test_a_selector_that_yaml_cannot_hold_there_is_refused_with_the_place() -> None:
    with pytest.raises(AssetError, match=r"small.yaml:7:\d+: cannot hold"):
        export("files", Choices(selector='team="a: b"'), HERE / "shipped")


# --- what others say to it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices", [Choices(), EVERYTHING, Choices(selector='job=~"chat|game"', runbooks="https://example.org")]
)
def test_promtool_takes_the_rules(choices: Choices, tmp_path: Path) -> None:
    promtool = shutil.which("promtool") or pytest.skip("promtool is not installed; apt-get install prometheus")
    rules = [path for path in write(export("files", choices), tmp_path) if path.suffix == ".yaml"]
    rules = [path for path in rules if path.name != "alertmanager-inhibit.yaml"]
    out = subprocess.run(
        [promtool, "check", "rules", "--lint=all", "--lint-fatal", *rules],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr


def test_the_spec_of_a_prometheusrule_is_the_rule_file(tmp_path: Path) -> None:
    promtool = shutil.which("promtool") or pytest.skip("promtool is not installed; apt-get install prometheus")
    plain = export("files", OBJECTS_PLAIN)
    for path, text in export("prometheusrule", OBJECTS).items():
        head, _, spec = text.partition("spec:\n")
        rules = "".join(line.removeprefix("  ") for line in spec.splitlines(keepends=True))
        source = plain[f"alerts/{path.removeprefix('rkmetrics-')}"]
        assert rules == source[source.index("groups:\n") :]
        assert "\nkind: PrometheusRule\n" in f"\n{head}"
        (tmp_path / path).write_text(rules)
    out = subprocess.run(
        [promtool, "check", "rules", *tmp_path.iterdir()], capture_output=True, timeout=60, check=False
    )
    assert out.returncode == 0, out.stderr


OBJECTS_PLAIN = Choices(selector=OBJECTS.selector)


def test_a_config_map_carries_the_dashboard() -> None:
    plain = export("files", OBJECTS_PLAIN)
    for path, text in export("configmap", OBJECTS).items():
        name = path.removeprefix("rkmetrics-dashboard-").removesuffix(".yaml")
        _, _, block = text.partition(f"  rkmetrics-{name}.json: |\n")
        carried = "".join(line.removeprefix("    ") for line in block.splitlines(keepends=True))
        assert carried == plain[f"dashboards/{name}.json"]
        assert len(text) < 200_000  # kubectl apply keeps a copy in an annotation: 256 KiB at most


def test_a_fixed_data_source_leaves_no_variable() -> None:
    for path, text in export("grafana-provisioning", Choices(datasource="prom-1")).items():
        if path.endswith(".json"):
            dashboard = json.loads(text)
            assert "${datasource}" not in text
            assert "datasource" not in [each["name"] for each in dashboard["templating"]["list"]]
            assert dashboard["panels"]
            assert '"uid": "prom-1"' in text


# --- files ------------------------------------------------------------------------------------------------------------


def test_exporting_twice_is_exporting_once(tmp_path: Path) -> None:
    files = export("files", EVERYTHING)
    assert conflicts(files, tmp_path) == []
    assert write(files, tmp_path) == [tmp_path / path for path in files]
    assert conflicts(files, tmp_path) == []
    assert {path: (tmp_path / path).read_text() for path in files} == files


def test_what_a_target_has_no_use_for_is_named() -> None:
    assert unused("files", EVERYTHING) == ""
    assert unused("files", OBJECTS) == "namespace means nothing to files; it goes with configmap or prometheusrule"
    for target, choices in GOLDEN.items():
        assert unused(target, choices) == ""


def test_it_is_printed_or_written_and_nothing_is_lost(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "prometheusrule", "--namespace", "monitoring", "--label", "release=kps")
    expected = export("prometheusrule", Choices(namespace="monitoring", labels={"release": "kps"}))
    assert (code, out) == (0, stream(expected))
    assert run(capsys, "prometheusrule", "--namespace", "monitoring", "--label", "release=kps")[1] == out

    code, out, _ = run(capsys, "files", "-o", tmp_path, "--selector", 'cluster="eu-1", team="chat"')
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert (code, out.splitlines()) == (0, [str(tmp_path / path) for path in export("files")])
    assert written == export("files", EVERYTHING)

    changed = tmp_path / "alerts/kv.yaml"
    changed.write_text("mine")
    code, out, err = run(capsys, "files", "-o", tmp_path)
    assert (code, out, f"{changed}: is there already, and differs; --force" in err) == (2, "", True)
    assert changed.read_text() == "mine"
    assert run(capsys, "files", "-o", tmp_path, "--force")[0] == 0
    assert changed.read_text() == (SHIPPED / "alerts/kv.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["files", "--namespace", "x"], "namespace means nothing to files"),
        (["configmap", "--runbooks", "https://example.org"], "runbooks means nothing to configmap"),
        (["files", "--selector", "job=="], "expected one of = != =~ !~"),
        (["files", "--selector", 'pod=~"a"'], "has no label 'pod'"),
    ],
)
def test_wrong_use_is_two_and_says_what_was_expected(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--namespace", "Monitoring"),
        ("--namespace", "x-"),
        ("--label", "release"),
        ("--label", "a b=c"),
        ("--label", "release=a b"),
        ("--datasource", "a b"),
        ("--runbooks", "docs"),
        ("--path", "dashboards"),
        ("--folder", "a\nb"),
    ],
)
def test_values_that_an_object_could_not_have_are_refused(
    capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["assets", "export", "configmap", flag, value], {})
    assert ended.value.code == 2
    assert f"argument {flag}: {value!r}: expected" in capsys.readouterr().err


def test_the_command_knows_all_targets() -> None:
    from rkmetrics.cli import COMMANDS

    command = next(command for command in COMMANDS if command.words == ("assets", "export"))
    ((names, options), *_) = command.arguments
    assert (names, options["choices"]) == (("target",), tuple(exporting.TARGETS))
