"""Find the queries in rule files: Prometheus' own, PrometheusRule objects, tests of promtool, Grafana's provisioning.

As with dashboards the walk looks for what they share: a mapping with `expr`. A name beside it (`alert`, `record`, or
`title` of Grafana) says where we are. Groups of vmalert that ask Graphite or VictoriaLogs, and what a data source other
than Prometheus is asked for, are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from rkmetrics.assets.base import Node, Query, Scalar
from rkmetrics.assets.dashboards import foreign
from rkmetrics.assets.yaml_text import OTHER

__all__ = ["queries"]


def queries(root: Node) -> Iterator[Query]:
    """Yield every PromQL query of a tree, in the order of the file."""
    for node in _mappings(root):
        for expr in (found for key, found in node.items() if key.rstrip(OTHER) == "expr"):
            if not isinstance(expr, Scalar) or not expr.value.strip():
                continue
            record = node.get("record")
            yield Query(
                _place(node),
                expr,
                record=record if isinstance(record, Scalar) else None,
                labels=_labels(node),
                templates=tuple(_templates(node)),
            )


def _mappings(root: Node) -> Iterator[dict[str, Node]]:
    """Every mapping that may hold PromQL, outer ones first, in the order of the file."""
    waiting: list[Node] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict) and not (_of_vmalert(node) or foreign(node)):
            yield node
            waiting.extend(reversed(list(node.values())))
        elif isinstance(node, list):
            waiting.extend(reversed(node))


def _of_vmalert(node: dict[str, Node]) -> bool:
    kind = node.get("type")
    return "rules" in node and isinstance(kind, Scalar) and kind.value in ("graphite", "vlogs")


def _place(node: dict[str, Node]) -> str:
    for key, word in (("alert", "alert"), ("record", "record"), ("title", "alert")):
        found = node.get(key)
        if isinstance(found, Scalar):
            return f"{word} {found.value!r}"
    return ""


def _labels(node: dict[str, Node]) -> tuple[str, ...]:
    found = node.get("labels")
    return tuple(dict.fromkeys(label.rstrip(OTHER) for label in found)) if isinstance(found, dict) else ()


def _templates(node: dict[str, Node]) -> Iterator[Scalar]:
    for key in ("labels", "annotations"):
        found = node.get(key)
        if "alert" in node and isinstance(found, dict):
            yield from (text for text in found.values() if isinstance(text, Scalar))
