"""Find the queries in Grafana's JSON: dashboards of the classic and the v2 schema, library panels, alert rules.

The walk looks for what all of these have in common rather than for one schema's paths: a query is an object with a
text `expr`, and what belongs to a data source says so beside it or further out. So rows, nested panels, `__elements`,
API answers (`{"dashboard": ...}`), lists of dashboards and tomorrow's containers need no row here. What is known to
be another data source's (Loki has `expr` too) is left alone; "-- Mixed --", variables and unknown sources count as
Prometheus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rkmetrics.assets.base import Node, Query, Scalar

__all__ = ["foreign", "queries"]

_PROMETHEUS = re.compile(r".*prometheus.*|victoriametrics-metrics.*|", re.IGNORECASE)
_NOT_A_TYPE = re.compile(r"\$|-- ")  # "${DS_PROMETHEUS}", "-- Mixed --"


@dataclass(frozen=True, slots=True)
class _Context:
    """Where the walk is. source: the type of the data source, "" where it is not known."""

    place: str = ""
    source: str = ""


def queries(root: Node) -> Iterator[Query]:
    """Yield every PromQL query of a dashboard, in the order of the file."""
    yield from _walk(root, _Context())


def foreign(node: dict[str, Node]) -> bool:
    """Whether an object names a data source beside it that has no PromQL."""
    source = _source(node)
    return source is not None and not _PROMETHEUS.fullmatch(source)


def _walk(node: Node, context: _Context) -> Iterator[Query]:
    if isinstance(node, list):
        for entry in node:
            yield from _walk(entry, context)
    elif isinstance(node, dict) and _text(node, "kind") not in _NO_QUERIES:
        context = _entered(node, context)
        if _PROMETHEUS.fullmatch(context.source):
            yield from _own(node, context)
        for key, child in node.items():
            yield from _walk(child, _below(key, context))


def _below(key: str, context: _Context) -> _Context:
    """A panel's own titles end where other panels begin; a data source does not."""
    return replace(context, place="") if key in ("panels", "elements", "__elements") else context


def _entered(node: dict[str, Node], context: _Context) -> _Context:
    place = next((shown for find in _PLACES if (shown := find(node))), context.place)
    source = _source(node)
    ref = _text(node, "refId")
    if ref and "target" not in place and "panel" in place:
        place = f"{place}, target {ref}"
    return _Context(place, context.source if source is None else source)


def _panel(node: dict[str, Node]) -> str:
    """Classic panels have targets, v2 panels a vizConfig; alert rules of Grafana have data."""
    if {"targets", "vizConfig", "libraryPanel", "fieldConfig"} & node.keys() and "title" in node:
        return f"panel {_text(node, 'title')!r}"
    return f"alert {_text(node, 'title')!r}" if "condition" in node and "title" in node else ""


def _variable(node: dict[str, Node]) -> str:
    named = "name" in node and ("refresh" in node or _text(node, "type") == "query" or "definition" in node)
    return f"variable {_text(node, 'name')!r}" if named else ""


def _annotation(node: dict[str, Node]) -> str:
    return f"annotation {_text(node, 'name')!r}" if "iconColor" in node and "name" in node else ""


# v2: variables whose `query` is a list of choices. Classic ones say so in `type`.
_NO_QUERIES = frozenset(f"{kind}Variable" for kind in ("Custom", "Interval", "Text", "Constant", "Datasource"))

_PLACES = (_panel, _annotation, _variable)


def _source(node: dict[str, Node]) -> str | None:
    """The type of the data source that an object names; "" for one that it leaves open, None where it names none.

    Classic: "datasource": {"type": ...} or a name. v2: "group" (or "kind", in v2alpha1) of a DataQuery.
    """
    source = node.get("datasource")
    if isinstance(source, Scalar) and (named := _NAMED.search(source.value)):
        return named[0].lower()
    if isinstance(source, dict) and "type" in source:
        kind = _text(source, "type")
        return "" if kind in ("datasource", "grafana") or _NOT_A_TYPE.match(kind) else kind
    if _text(node, "kind") == "DataQuery" and "group" in node:
        return _text(node, "group")
    if "spec" in node and _text(node, "kind") in _V2_SOURCES:
        return _text(node, "kind")
    return None


# Before Grafana 8.3 a data source was its name; people call them what they are.
_NAMED = re.compile(r"loki|tempo|elastic|influx|graphite|mysql|postgres|clickhouse", re.IGNORECASE)
_V2_SOURCES = frozenset(("prometheus", "loki", "tempo", "mysql", "postgres", "influxdb", "elasticsearch", "graphite"))


def _own(node: dict[str, Node], context: _Context) -> Iterator[Query]:
    """The queries that an object itself holds."""
    legend = node.get("legendFormat")
    expr = node.get("expr")
    if isinstance(expr, Scalar) and expr.value.strip():
        yield Query(context.place, expr, legend=legend if isinstance(legend, Scalar) else None)
    if context.place.startswith("variable"):
        yield from (Query(context.place, found, variable=True) for found in _asked(node))


def _asked(node: dict[str, Node]) -> Iterator[Scalar]:
    """The texts of a variable's query; `definition` repeats it for the list of variables."""
    kind = _text(node, "type")
    if kind not in ("", "query") or "expr" in node:
        return
    for key in ("definition", "query"):
        found = node.get(key)
        if isinstance(found, Scalar) and found.value.strip():
            yield found


def _text(node: dict[str, Node], key: str) -> str:
    found = node.get(key)
    return found.value if isinstance(found, Scalar) else ""
