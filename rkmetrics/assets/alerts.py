"""Find the queries in rule files: Prometheus' own, PrometheusRule objects, tests of promtool, Grafana's provisioning.

As with dashboards the walk looks for what they share: a mapping with `expr`. A name beside it (`alert`, `record`, or
`title` of Grafana) says where we are.
"""

from __future__ import annotations

from collections.abc import Iterator

from rkmetrics.assets.base import Node, Query, Scalar, trees

__all__ = ["queries"]


def queries(root: Node) -> Iterator[Query]:
    """Yield every PromQL query of a tree, in the order of the file."""
    for node in trees(root):
        expr = node.get("expr")
        if isinstance(expr, Scalar) and expr.value.strip():
            record = node.get("record")
            yield Query(
                _place(node),
                expr,
                record=record if isinstance(record, Scalar) else None,
                labels=_labels(node),
                templates=tuple(_templates(node)),
            )


def _place(node: dict[str, Node]) -> str:
    for key, word in (("alert", "alert"), ("record", "record"), ("title", "alert")):
        found = node.get(key)
        if isinstance(found, Scalar):
            return f"{word} {found.value!r}"
    return ""


def _labels(node: dict[str, Node]) -> tuple[str, ...]:
    found = node.get("labels")
    return tuple(found) if isinstance(found, dict) else ()


def _templates(node: dict[str, Node]) -> Iterator[Scalar]:
    for key in ("labels", "annotations"):
        found = node.get(key)
        if "alert" in node and isinstance(found, dict):
            yield from (text for text in found.values() if isinstance(text, Scalar))
