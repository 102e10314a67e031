"""Files as others write them, through every table: nothing breaks, and no byte moves that is not part of a name.

styles/ holds one file for each way of writing: dashboards of Grafana 4 to 12, exports, library panels, rules of
Prometheus, Thanos, Mimir, VictoriaMetrics, Kubernetes and Grafana, templates of charts, Jsonnet. They were written for
this test. styles/expected.txt says, line by line, what becomes of each by the table that it is about, and what is
refused; for all other tables the names are put back and the bytes compared.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from rkmetrics.assets.base import Document
from rkmetrics.assets.checking import check_documents
from rkmetrics.assets.documents import document, read
from rkmetrics.assets.migrate import Migrated, migrate
from rkmetrics.assets.migrating import migrate_files, unified
from rkmetrics.assets.tables import Table, named, names
from rkmetrics.cli import main
from rkmetrics.errors import AssetError

STYLES = Path(__file__).parent / "styles"
ABOUT = {  # the table that a file is about
    "chart-range.yaml": "rivetkit:B-C",
    "chart-template.yaml": "rivetkit:B-C",
    "classic-export.json": "dynamo",
    "dynamo-rules.yml": "dynamo",
    "extras.yaml": "vllm",
    "foreign-rules.yaml": "vllm",
    "grafana-alerts.yaml": "vllm",
    "grafana-v2.json": "vllm",
    "grafana4-rows.json": "vllm",
    "kubernetes.yaml": "rivetkit:B-C",
    "library-panel.min.json": "rivetkit:B-C",
    "mixin.jsonnet": "vllm",
    "odd.json": "rivetkit:B-C",
    "other-sources.json": "vllm",
}
NOT_READ = ("chart-range.yaml", "mixin.jsonnet")
FILES = [STYLES / name for name in ABOUT]
READ = [read(path) for path in FILES if path.name not in NOT_READ]


def name(document: Document) -> str:
    return Path(document.file).name


def again(document_: Document, text: str) -> Document:
    return document(document_.file, text)


# --- what becomes of each -------------------------------------------------------------------------------------------


def told(migrated: Migrated) -> str:
    """The lines that change, and what is refused, as expected.txt has it."""
    lines = [line for line in unified(migrated).split("\n")[2:] if line.startswith(("-", "+"))]
    lines += [f"! {p.line}:{p.column}: {p.place}: {p.what}" for p in migrated.problems]
    return "".join(f"{line}\n" for line in lines).replace("\r", "<CR>").replace("\ufeff", "<BOM>")


def all_told() -> str:
    parts = [
        f"== {path.name}, {ABOUT[path.name]}\n" + told(*migrate_files([path], [ABOUT[path.name]])) for path in FILES
    ]
    return "\n".join(parts)


def test_each_file_becomes_what_is_expected_line_by_line() -> None:
    assert all_told() == (STYLES / "expected.txt").read_bytes().decode()


def test_every_file_is_one_of_these() -> None:
    there = {path.name for path in STYLES.iterdir()}
    assert there == {*ABOUT, "expected.txt", ".gitattributes"}


# --- every file, every table ----------------------------------------------------------------------------------------

WORD = re.compile(r"[A-Za-z_:][\w:]*")


def forward(table: str) -> tuple[Table, ...]:
    """The table's steps in the direction in which several names become one."""
    old, _, new = table.removeprefix("rivetkit:").partition("-")
    return named(f"rivetkit:{new}-{old}" if new and new < old else table)


def masked(text: str, steps: Sequence[Table]) -> str:
    """A text with each name of a table replaced by its last one, wherever it stands.

    Without the matchers that merged metrics gain.
    """

    def last(match: re.Match[str]) -> str:
        word = match[0]
        for step in steps:
            found, suffix = step.find(word)
            if found and found[0].new:
                word = found[0].new + suffix
            elif not found and step.prefix:
                word = step.prefix.apply(word) or word
        return word

    text = WORD.sub(last, text)
    for label in {label for step in steps for found in step.changes.values() for c in found for label, _ in c.adds}:
        text = re.sub(rf'{label}=(\\*)"\w+\1",?', "", text)
    return text.replace("{}", "")


@pytest.mark.parametrize("table", names())
def test_only_names_differ_and_twice_is_once(table: str) -> None:
    steps, way = named(table), forward(table)
    for before in READ:
        first = migrate(before, steps)
        assert masked(first.text, way) == masked(before.text, way), name(before)
        assert first.changed == bool(first.queries), name(before)
        second = migrate(again(before, first.text), steps)
        assert (second.changed, len(second.problems)) == (False, len(first.problems)), name(before)


@pytest.mark.parametrize("table", names())
def test_what_is_refused_stays_and_says_where(table: str) -> None:
    for before in READ:
        found = migrate(before, named(table))
        kept = [query.scalar.value for query in again(before, found.text).queries]
        by_place = {problem.place: problem for problem in found.problems}
        refused = [q for q in before.queries if q.scalar.value in kept and q.place in by_place]
        assert len(refused) >= len(by_place), name(before)
        lines = before.text.split("\n")
        for problem in found.problems:
            assert lines[problem.line - 1][problem.column - 1 :].strip(), (name(before), problem)
            assert (problem.end_line, problem.end_column) > (problem.line, problem.column)


@pytest.mark.parametrize("table", names())
def test_the_way_back_restores_every_byte_or_says_what_it_could_not(table: str) -> None:
    steps = named(table)
    back = [step.inverse(f"back {step.name}") for step in reversed(steps)]
    for before in READ:
        if migrate(before, back).changed:  # it had names of both sides
            continue
        there = migrate(before, steps)
        home = migrate(again(before, there.text), back)
        assert home.text == before.text or home.problems, name(before)
        if table not in ("vllm", "catalogue"):  # of these, several old names became one
            assert home.text == before.text, name(before)


def test_other_sources_and_foreign_metrics_keep_their_bytes_whatever_the_table() -> None:
    for path in (STYLES / "other-sources.json", STYLES / "foreign-rules.yaml"):
        (found,) = migrate_files([path], [table for table in names() if "rivetkit" not in table or "A-" in table])
        assert (found.changed, found.problems) == (False, [])


# --- check, diff and write agree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["catalogue", "dynamo", "vllm", "rivetkit:B-C", "rivetkit:B-D", "rivetkit:B-A"])
def test_check_and_diff_say_what_is_then_written(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, patched = tmp_path / "styles", tmp_path / "patched"
    for copy in (folder, patched):
        shutil.copytree(STYLES, copy, ignore=shutil.ignore_patterns("expected.txt", ".*"))
    monkeypatch.chdir(folder)
    command = ["assets", "migrate", "--table", table, *sorted(ABOUT)]

    code_of_check = main([*command, "--check"], {})
    checked = capsys.readouterr()
    code_of_diff = main([*command, "--diff"], {})
    diff = capsys.readouterr()
    assert all((folder / file).read_bytes() == (STYLES / file).read_bytes() for file in ABOUT)
    code = main(command, {})
    written = capsys.readouterr()

    changed = [file for file in sorted(ABOUT) if (folder / file).read_bytes() != (STYLES / file).read_bytes()]
    assert checked.out.splitlines() == changed
    assert re.findall(r"^\+\+\+ b/(.*)$", diff.out, re.MULTILINE) == changed
    assert checked.err == diff.err == written.err.replace(" rewritten in ", " to rewrite in ")
    assert all(f"{file}:" in written.err for file in NOT_READ)
    assert (code_of_check, code_of_diff, code) == (1, 1, 1)  # NOT_READ are left, always
    if shutil.which("patch"):
        subprocess.run(["patch", "--binary", "-s", "-p1", "-d", patched], input=diff.out.encode(), check=True)
        assert all((patched / file).read_bytes() == (folder / file).read_bytes() for file in ABOUT)


@pytest.mark.parametrize("file", NOT_READ)
def test_what_is_not_read_is_refused_with_its_line(file: str) -> None:
    with pytest.raises(AssetError) as refused:
        read(STYLES / file)
    assert refused.value.line in (1, 7)


# --- checks ---------------------------------------------------------------------------------------------------------

FINDINGS = {  # all that there is to find: old names of ours, and queries in other languages
    "chart-template.yaml": ["renamed-metric", "renamed-metric", "renamed-metric", "syntax"],
    "dynamo-rules.yml": ["syntax"],
    "extras.yaml": ["syntax"],
    "kubernetes.yaml": ["renamed-metric"] * 6,
    "library-panel.min.json": ["renamed-metric"] * 4,
    "odd.json": ["renamed-metric"] * 4,
}


@pytest.mark.parametrize("before", READ, ids=name)
def test_nothing_is_found_in_what_is_not_ours(before: Document) -> None:
    assert [problem.check for problem in check_documents([before])] == FINDINGS.get(name(before), [])


def test_old_names_of_others_are_found_only_when_asked_for() -> None:
    found = check_documents(READ, tables=["dynamo", "vllm"], ignore=["syntax"])
    assert {problem.check for problem in found} == {"renamed-metric"}
    foreign = {"other-sources.json", "foreign-rules.yaml"}
    assert not foreign & {Path(problem.file).name for problem in found}
