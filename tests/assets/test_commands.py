"""`rkmetrics assets` and `rkmetrics catalogue diff` as a person or a pipeline uses them: streams, exit codes, files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rkmetrics.assets.rules import CHECKS, SYNTAX, UNREADABLE
from rkmetrics.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
CHECKS_FOLDER = Path(__file__).parent / "checks"
PEGBOARD = ROOT / "tests/data/rivetkit/pegboard.json"

APP = """
import rkmetrics as rk
class Inn(rk.MetricSet):
    rooms = rk.Gauge("inn_rooms", "Rooms.", across="sum", renamed_from=(rk.Rename("inn_chambers", since="1.0"),))
registry = rk.Registry(rk.Settings(), builtin=False)
registry.bind(Inn, actor_name="a")
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments], {})
    out, err = capsys.readouterr()
    return code, out, err


def test_check_says_nothing_but_the_count_when_all_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "assets", "check", CHECKS_FOLDER / "v2.good.json", CHECKS_FOLDER / "styles.good.yaml")
    assert (code, out, err) == (0, "", "11 queries in 2 files: 0 problems\n")


def test_check_finds_and_reports_in_each_format(capsys: pytest.CaptureFixture[str]) -> None:
    bad = CHECKS_FOLDER / "unknown-metric.library.bad.json"
    code, out, _ = run(capsys, "assets", "check", bad)
    assert (code, out.startswith(f"{bad}:")) == (1, True)
    for form in ("json", "sarif"):
        code, out, _ = run(capsys, "assets", "check", bad, "--format", form)
        assert (code, bool(json.loads(out))) == (1, True)
    assert (
        run(capsys, "assets", "check", bad, "--json")[1] == run(capsys, "assets", "check", bad, "--format", "json")[1]
    )
    assert run(capsys, "assets", "check", bad, "--format", "github")[1].startswith("::error file=")
    assert run(capsys, "assets", "check", bad, "--ignore", "unknown-metric")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "no/such/file"], "no/such/file: no such file or folder"),
        (["check", str(PEGBOARD), "--ignore", "nothing"], "--ignore nothing: expected one of: renamed-metric"),
        (["check", str(PEGBOARD), "--table", "nothing"], "--table nothing: expected one of: catalogue"),
        (["migrate", str(PEGBOARD), "--table", "nothing"], "--table nothing: expected one of: catalogue"),
        (["migrate", "no/such/file"], "no/such/file: no such file or folder"),
        (["check", str(PEGBOARD), "--app", "no_such_module:x"], "no module named"),
    ],
)
def test_wrong_use_is_two_and_says_what_was_expected(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, out, err = run(capsys, "assets", *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_a_file_that_cannot_be_read_is_a_finding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    code, out, _ = run(capsys, "assets", "check", tmp_path)
    assert (code, out) == (1, f"{tmp_path}/a.json:1:2: not JSON: expected a string [unreadable-file]\n")
    code, _, err = run(capsys, "assets", "migrate", tmp_path)
    assert (code, "not JSON" in err) == (1, True)


def test_migrate_shows_checks_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = tmp_path / "pegboard.json"
    shutil.copy(PEGBOARD, copy)
    table = ("--table", "rivetkit:B-C")
    code, out, err = run(capsys, "assets", "migrate", copy, *table, "--diff")
    assert (code, out.count("\n-"), out.count("\n+"), copy.read_bytes() == PEGBOARD.read_bytes()) == (1, 10, 11, True)
    assert err.endswith("10 queries to rewrite in 1 files; 2 that cannot be\n")
    assert run(capsys, "assets", "migrate", copy, *table, "--check")[:2] == (1, f"{copy}\n")
    code, out, err = run(capsys, "assets", "migrate", copy, *table)
    assert (code, out) == (1, "")
    assert err.endswith("10 queries rewritten in 1 files; 2 that cannot be\n")
    assert run(capsys, "assets", "migrate", copy, *table, "--check")[:2] == (1, "")  # two are left to a person
    assert run(capsys, "assets", "migrate", copy, "--table", "rivetkit:C-B")[0] == 1
    assert copy.read_bytes() == PEGBOARD.read_bytes()


@pytest.mark.skipif(shutil.which("patch") is None, reason="patch is not installed")
def test_a_diff_applied_is_the_migration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copy(PEGBOARD, tmp_path / f"{name}.json")
    diff = run(capsys, "assets", "migrate", tmp_path / "one.json", "--table", "rivetkit:B-C", "--diff")[1]
    subprocess.run(["patch", "-s", str(tmp_path / "one.json")], input=diff, text=True, check=True)
    run(capsys, "assets", "migrate", tmp_path / "two.json", "--table", "rivetkit:B-C")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_an_applications_metrics_are_checked_migrated_and_aliased(tmp_path: Path) -> None:
    (tmp_path / "inn.py").write_text(APP)
    (tmp_path / "rules.yaml").write_text("- expr: sum(inn_chambers) + sum(inn_romos)\n")

    def rkmetrics(*arguments: str) -> tuple[int, str]:
        command = [*arguments, "--app", "inn:registry"]
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rkmetrics.cli import main"
        script = f"{start}; sys.exit(main({command!r}, {{}}))"
        out = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        return out.returncode, out.stdout

    code, out = rkmetrics("assets", "check", "rules.yaml")
    assert (code, re.findall(r"\[(.*)\]", out)) == (1, ["renamed-metric", "unknown-metric"])
    assert rkmetrics("assets", "migrate", "rules.yaml") == (0, "")
    assert (tmp_path / "rules.yaml").read_text() == "- expr: sum(inn_rooms) + sum(inn_romos)\n"
    assert "record: inn_chambers # since 1.0, until 1.2.0" in rkmetrics("assets", "aliases", "--version", "1.1")[1]


def test_aliases_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "assets", "aliases")[1].count("- record:") >= 50
    assert run(capsys, "assets", "aliases", "--version", "9.0")[1].endswith("groups: []\n")
    assert run(capsys, "assets", "aliases", "--version", "0.3.0", "--keep", "3")[1].count("- record:") >= 50


def test_catalogue_diff(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    text = run(capsys, "catalogue", "--json")[1]
    assert text == run(capsys, "catalogue", "list", "--json")[1]
    old.write_text(text)
    new.write_text(json.dumps(json.loads(text)[1:]))
    assert run(capsys, "catalogue", "diff", old, old) == (0, "no change\n", "")
    code, out, _ = run(capsys, "catalogue", "diff", old, new)
    assert (code, out) == (
        1,
        "unexplained rivetkit_actor_active_count: removed, and no entry says what to query instead\n",
    )
    assert json.loads(run(capsys, "catalogue", "diff", new, old, "--json")[1])[0]["effect"] == "added"
    assert run(capsys, "catalogue", "diff", new, old)[0] == 0
    assert run(capsys, "catalogue", "diff", old)[0] == 2
    assert run(capsys, "catalogue", "diff", old, tmp_path / "none.json")[0] == 2
    assert run(capsys, "catalogue", "list", old)[0] == 2


def test_each_check_has_a_section_and_each_section_a_check(root: Path) -> None:
    page = (root / "docs/checks.md").read_text()
    sections = re.findall(r"^## (\S+)$", page, re.MULTILINE)
    assert sections == [*(check.name for check in CHECKS), SYNTAX, UNREADABLE]
    assert [check.name for check in CHECKS if check.about not in page] == []


def test_each_hook_of_pre_commit_is_a_command(root: Path) -> None:
    text = (root / ".pre-commit-hooks.yaml").read_text()
    entries = re.findall(r"entry: rkmetrics (\S+) (\S+)", text)
    assert set(entries) <= {command.words for command in COMMANDS}
    assert entries
