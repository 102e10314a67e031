"""The dashboards and rules that ship, as files for Grafana, Prometheus or Kubernetes, with a user's choices in them.

A choice is an edit of the text: queries are parsed, and what is around them keeps its bytes and its comments. Only a
fixed data source rewrites a dashboard as a whole, because a variable has to leave it.

A selector goes into every selector of series. What a rule records has the labels that its grouping keeps, so a rule
groups by the selector's labels as well: otherwise an alert would ask a recording for a label that it does not have, and
be quiet for ever. Only `=` allows that without changing what a sum is the sum of; the other operators take labels that
all recordings have.

Kubernetes objects are written around the texts, line by line: YAML lets a block be indented as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from rkmetrics.assets.base import Document, Query, Scalar, trees
from rkmetrics.assets.documents import document
from rkmetrics.assets.yaml_text import read_yaml
from rkmetrics.errors import AssetError, PromqlError
from rkmetrics.promql import (
    Edit,
    Matcher,
    Node,
    Selector,
    apply,
    groupings,
    metric_words,
    parse,
    parse_variable,
    selectors,
    walk,
)

__all__ = ["KEPT", "SHIPPED", "TARGETS", "Choices", "conflicts", "export", "matchers", "stream", "unused", "write"]

SHIPPED = Path(__file__).resolve().parents[1] / "shipped"
KEPT = ("cluster", "namespace", "job")  # by all recordings; beside them each keeps its level, actor_name or instance
VARIABLE = "datasource"


@dataclass(frozen=True, slots=True)
class Choices:
    """What a user may choose. Empty ones leave things as they ship.

    datasource: the uid of a data source, instead of a variable. selector: matchers, as between braces; see `matchers`.
    runbooks: the URL of the folder that holds docs/. namespace, labels: of Kubernetes objects. folder: of dashboards in
    Grafana. path: where Grafana reads dashboards.
    """

    datasource: str = ""
    selector: str = ""
    runbooks: str = ""
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    folder: str = ""
    path: str = ""


Files = Mapping[str, str]  # path to text


def export(target: str, choices: Choices | None = None, shipped: Path = SHIPPED) -> dict[str, str]:
    """Return the files of a target, by path. Raises AssetError where a file cannot hold a choice, PromqlError for a
    selector that is none."""
    choices = choices or Choices()
    return dict(TARGETS[target](_texts(shipped, choices), choices))


def stream(files: Files) -> str:
    """Return files as one stream of YAML documents, which JSON is too; each says its path."""
    return "".join(f"--- # {path}\n{text}" for path, text in files.items())


def conflicts(files: Files, folder: Path) -> list[Path]:
    """Return what is there already below a folder, and would become another text."""
    paths = {folder / path: text for path, text in files.items()}
    return [path for path, text in paths.items() if path.exists() and not (path.is_file() and _same(path, text))]


def _same(path: Path, text: str) -> bool:
    return path.read_bytes() == text.encode()


def write(files: Files, folder: Path) -> list[Path]:
    """Write files below a folder; return their paths."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8", newline="\n")
    return [folder / path for path in files]


# --- choices ----------------------------------------------------------------------------------------------------------


def matchers(text: str) -> tuple[Matcher, ...]:
    """Return the matchers of a selector: `cluster="eu", job=~"chat|game"`. Raises PromqlError."""
    node = parse(f"{{{text}}}")
    found = node.matchers if isinstance(node, Selector) and node.name is None else ()
    if not found or any(each.label.quote or each.label.opaque or each.value.opaque for each in found):
        raise PromqlError(text, 0, 'expected matchers, such as cluster="eu", without variables')
    return found


def unused(target: str, choices: Choices) -> str:
    """Return what a target has no use for, as a sentence; "" when there is nothing."""
    for each in fields(choices):
        if getattr(choices, each.name) and target not in _USED.get(each.name, TARGETS):
            return f"{each.name} means nothing to {target}; it goes with {' or '.join(_USED[each.name])}"
    return ""


_USED: Mapping[str, tuple[str, ...]] = {
    "datasource": ("files", "grafana-provisioning", "configmap"),
    "runbooks": ("files", "prometheusrule"),
    "namespace": ("configmap", "prometheusrule"),
    "labels": ("configmap", "prometheusrule"),
    "folder": ("grafana-provisioning", "configmap"),
    "path": ("grafana-provisioning",),
}


def _texts(shipped: Path, choices: Choices) -> dict[str, str]:
    """All that ships, by path, with the choices in it."""
    paths = [*sorted(shipped.glob("dashboards/*.json")), *sorted(shipped.glob("alerts/*.yaml"))]
    return {
        path.relative_to(shipped).as_posix(): _chosen(path.name, path.read_text(encoding="utf-8"), choices)
        for path in paths
    }


def _chosen(name: str, text: str, choices: Choices) -> str:
    found = document(name, text)
    edits = list(_narrowing(found, choices.selector)) if choices.selector else []
    if found.kind == "rules":
        return apply(text, [*edits, *(_runbooks(found, choices.runbooks) if choices.runbooks else ())])
    text = apply(text, edits)
    return _with_datasource(text, choices.datasource) if choices.datasource else text


def _runbooks(rules: Document, base: str) -> Iterator[Edit]:
    for tree in trees(read_yaml(rules.text, rules.file)):
        url = tree.get("runbook_url")
        if isinstance(url, Scalar):
            yield _edit(rules, url, Edit(0, 0, f"{base.rstrip('/')}/"))


def _with_datasource(text: str, uid: str) -> str:
    """A dashboard of one data source: its uid stands where the variable stood, and the variable is gone."""
    dashboard = json.loads(text.replace(f'"${{{VARIABLE}}}"', _quoted(uid)))  # as a whole string, with its quotes
    listed = dashboard["templating"]["list"]
    listed[:] = [each for each in listed if each["name"] != VARIABLE]
    return json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n"


# --- the selector -----------------------------------------------------------------------------------------------------


def _narrowing(found: Document, selector: str) -> Iterator[Edit]:
    """Edits that put matchers into all queries of a document."""
    chosen = matchers(selector)
    text = ", ".join(f"{{{selector}}}"[each.start : each.end] for each in chosen)
    for query in found.queries:
        node = parse_variable(query.scalar.value)[0] if query.variable else parse(query.scalar.value)
        if node is None:
            continue
        edits = [edit for each in selectors(node) for edit in _narrowed(found, query, each, chosen, text)]
        edits += _kept(node, chosen) if found.kind == "rules" else ()
        for edit in edits:
            yield _edit(found, query.scalar, edit)


def _narrowed(found: Document, query: Query, node: Selector, chosen: Iterable[Matcher], text: str) -> Iterator[Edit]:
    recorded = next((word.text for word in metric_words(node) if ":" in word.text), "")
    lost = [each.label.text for each in chosen if recorded and each.op != "=" and not _has(recorded, each.label.text)]
    if lost:
        reason = f"{recorded} has no label {lost[0]!r}; select with =, or by {', '.join(KEPT)}"
        raise AssetError(found.file, *found.position(query.scalar.offsets[node.start]), reason)
    if node.brace < 0:
        yield Edit(node.end, node.end, f"{{{text}}}")
    else:
        rest = query.scalar.value[node.brace : node.end - 1]
        comma = "," if rest.strip() else ""
        yield Edit(node.brace, node.brace, f"{text}{comma}{'' if rest[:1].isspace() else comma and ' '}")


def _has(recorded: str, label: str) -> bool:
    """Whether a recording has a label. The first part of its name is its level: what it keeps beside KEPT."""
    return label in (*KEPT, recorded.partition(":")[0])


def _kept(node: Node, chosen: Iterable[Matcher]) -> Iterator[Edit]:
    """Edits that keep the selector's labels through groupings and matchings."""
    wanted = [each.label.text for each in chosen if each.op == "="]
    for grouping in (grouping for each in walk(node) for grouping in groupings(each)):
        there = {word.text for word in grouping.labels}
        new = [label for label in dict.fromkeys(wanted) if label not in there]
        if new and grouping.labels and grouping.keyword in ("by", "on"):
            end = grouping.labels[-1].end
            yield Edit(end, end, "".join(f", {label}" for label in new))


def _edit(found: Document, scalar: Scalar, edit: Edit) -> Edit:
    done = scalar.edit(edit)
    if done is None:
        raise AssetError(found.file, *found.position(scalar.offsets[edit.start]), f"cannot hold {edit.text!r} here")
    return done


# --- targets ----------------------------------------------------------------------------------------------------------

PROVIDER = """\
apiVersion: 1
providers:
  - name: rkmetrics
    folder: {folder}
    type: file
    disableDeletion: false
    allowUiUpdates: false
    options:
      path: {path}
"""
CONFIG_MAP = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: rkmetrics-dashboard-{name}
{namespace}  labels:
{labels}  annotations:
    grafana_folder: {folder}
data:
  rkmetrics-{name}.json: |
{text}"""
PROMETHEUS_RULE = """\
{comment}apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: rkmetrics-{name}
{namespace}  labels:
{labels}spec:
{text}"""
FOLDER, PATH = "rkmetrics", "/var/lib/grafana/dashboards/rkmetrics"
SIDECAR = {"grafana_dashboard": "1"}  # what Grafana's sidecar looks for, if nobody told it otherwise
NAMED = {"app.kubernetes.io/name": "rkmetrics"}


def _files(texts: Files, _: Choices) -> Iterator[tuple[str, str]]:
    yield from texts.items()


def _provisioning(texts: Files, choices: Choices) -> Iterator[tuple[str, str]]:
    provider = PROVIDER.format(folder=_quoted(choices.folder or FOLDER), path=_quoted(choices.path or PATH))
    yield "provisioning/dashboards/rkmetrics.yaml", provider
    for name, text in _below("dashboards", texts):
        yield f"dashboards/rkmetrics/{name}.json", text


def _config_maps(texts: Files, choices: Choices) -> Iterator[tuple[str, str]]:
    for name, text in _below("dashboards", texts):
        folder = _quoted(choices.folder or FOLDER)
        yield (
            f"rkmetrics-dashboard-{name}.yaml",
            CONFIG_MAP.format(name=name, text=_indented(text, 4), folder=folder, **_metadata(choices, SIDECAR)),
        )


def _prometheus_rules(texts: Files, choices: Choices) -> Iterator[tuple[str, str]]:
    for name, text in _below("alerts", texts):
        comment, groups, rules = text.partition("groups:\n")
        if groups:  # the others are not Prometheus'
            spec = _indented(groups + rules, 2)
            yield (
                f"rkmetrics-{name}.yaml",
                PROMETHEUS_RULE.format(name=name, comment=comment, text=spec, **_metadata(choices, NAMED)),
            )


TARGETS: Mapping[str, Callable[[Files, Choices], Iterator[tuple[str, str]]]] = {
    "files": _files,
    "grafana-provisioning": _provisioning,
    "configmap": _config_maps,
    "prometheusrule": _prometheus_rules,
}


def _below(folder: str, texts: Files) -> Iterator[tuple[str, str]]:
    for path, text in texts.items():
        if path.startswith(f"{folder}/"):
            yield Path(path).stem, text


def _metadata(choices: Choices, labels: Mapping[str, str]) -> dict[str, str]:
    namespace = f"  namespace: {_quoted(choices.namespace)}\n" if choices.namespace else ""
    rows = sorted({**labels, **choices.labels}.items())
    return {"namespace": namespace, "labels": "".join(f"    {key}: {_quoted(value)}\n" for key, value in rows)}


def _indented(text: str, spaces: int) -> str:
    return "".join(" " * spaces + line if line.strip() else line for line in text.splitlines(keepends=True))


def _quoted(text: str) -> str:
    """A YAML double-quoted scalar (YAML 1.2, 7.3.1): JSON's escapes are a part of its own."""
    return json.dumps(text)
