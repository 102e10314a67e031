"""What the checks found, for people, programs and code review: text, JSON, SARIF 2.1.0, GitHub's annotations.

Each format is a function of problems to text; FORMATS lists them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rkmetrics.assets.base import Problem
from rkmetrics.assets.rules import CHECKS, SYNTAX, UNREADABLE

__all__ = ["FORMATS", "as_github", "as_json", "as_sarif", "as_text", "sentence"]


def sentence(problem: Problem) -> str:
    """Say where in the file, what is wrong and what to do, in one line."""
    where = f"{problem.place}: " if problem.place else ""
    mend = f"; {problem.mend}" if problem.mend else ""
    return f"{where}{problem.what}{mend}"


def as_text(problems: Sequence[Problem]) -> str:
    """A line for each problem, which editors and terminals know how to follow."""
    lines = (f"{p.file}:{p.line}:{p.column}: {sentence(p)} [{p.check}]\n" for p in problems)
    return "".join(lines)


def as_json(problems: Sequence[Problem]) -> str:
    """A list of objects with the fields of a Problem."""
    return json.dumps([asdict(problem) for problem in problems], indent=2, ensure_ascii=False) + "\n"


def as_github(problems: Sequence[Problem]) -> str:
    """Workflow commands, which GitHub shows beside the line (GitHub, "Workflow commands", "Setting an error
    message").
    """
    return "".join(
        f"::error file={_property(p.file)},line={p.line},col={p.column},endLine={p.end_line},"
        f"endColumn={p.end_column},title={_property(p.check)}::{_data(sentence(p))}\n"
        for p in problems
    )


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def as_sarif(problems: Sequence[Problem]) -> str:
    """Static Analysis Results Interchange Format 2.1.0 (OASIS), for code scanning."""
    about = {check.name: check.about for check in CHECKS} | {
        SYNTAX: "not PromQL",
        UNREADABLE: "a file that is not read",
    }
    rules = [{"id": name, "shortDescription": {"text": text}} for name, text in about.items()]
    driver = {"name": "rkmetrics assets check", "rules": rules}
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": [_result(problem, list(about)) for problem in problems],
    }
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False) + "\n"


def _result(problem: Problem, rules: list[str]) -> dict[str, Any]:
    region = {
        "startLine": problem.line,
        "startColumn": problem.column,
        "endLine": problem.end_line,
        "endColumn": problem.end_column,
    }
    place = {"artifactLocation": {"uri": _uri(problem.file)}, "region": region}
    return {
        "ruleId": problem.check,
        "ruleIndex": rules.index(problem.check),
        "level": "error",
        "message": {"text": sentence(problem)},
        "locations": [{"physicalLocation": place}],
    }


def _uri(file: str) -> str:
    from urllib.parse import quote

    return quote(file.replace("\\", "/"))


FORMATS: Mapping[str, Callable[[Sequence[Problem]], str]] = {
    "text": as_text,
    "json": as_json,
    "sarif": as_sarif,
    "github": as_github,
}
