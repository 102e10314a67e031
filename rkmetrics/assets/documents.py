"""Read a file of dashboards or rules, whichever it is: by what is in it, not by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rkmetrics.assets import alerts, dashboards
from rkmetrics.assets.base import Document, Node, Query, Scalar, trees
from rkmetrics.assets.json_text import read_json
from rkmetrics.assets.yaml_text import OTHER, read_yaml
from rkmetrics.errors import AssetError

__all__ = ["SUFFIXES", "document", "found", "read"]

SUFFIXES = (".json", ".yaml", ".yml", ".rules")
MAX_BYTES = 32 << 20


def found(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield files as they are, and of folders the files below them that may hold dashboards or rules."""
    for path in paths:
        if path.is_dir():
            below = (file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            yield from sorted(file for file in below if not _hidden(file.relative_to(path)))
        else:
            yield path


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "node_modules" for part in path.parts)


def read(path: Path) -> Document:
    """Read a file. Raises AssetError for one that cannot be read, OSError for one that is not there."""
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        raise AssetError(str(path), 1, 1, f"{len(data):,} bytes; {MAX_BYTES:,} are read at most")
    try:
        return document(str(path), data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise AssetError(str(path), line, 1, "not UTF-8") from None


def document(file: str, text: str) -> Document:
    """Read the text of a file. Raises AssetError."""
    if text.lstrip("\ufeff \t\r\n").startswith(("{", "[")) and not text.lstrip().startswith("{{"):
        queries: Iterable[Query] = dashboards.queries(read_json(text, file))
        return Document(file, text, "dashboard", tuple(queries))
    if jsonnet := _JSONNET.match(text):
        line = text.count("\n", 0, jsonnet.end()) + 1
        raise AssetError(file, line, 1, "Jsonnet is not read, but the JSON or YAML that it renders")
    made = Document(file, text, "rules", ())
    return replace(made, queries=tuple(query for root in read_yaml(text, file) for query in _of_yaml(root, made)))


# As text it would be YAML: one long scalar, in which nobody finds a query.
_JSONNET = re.compile(
    r"(?:\s|\#[^\n]*(?:\n|\Z))*(?=local\s+\w+\s*(?:\([^\n]*\))?\s*=|//|/\*|\(?\s*import\s+['\"]|function\s*\()"
)


def _of_yaml(root: Node, around: Document) -> Iterator[Query]:
    """The queries of a YAML tree, and of the files that a ConfigMap carries in it."""
    yield from alerts.queries(root)
    for node in trees(root):
        for key, inner in node.items():
            name = key.rstrip(OTHER)
            if name.endswith(SUFFIXES) and isinstance(inner, Scalar) and inner.style == "block":
                yield from _carried(name, inner, around)


def _carried(name: str, outer: Scalar, around: Document) -> Iterator[Query]:
    """The queries of a file inside a block scalar. Places are those of the file around it."""
    inside = Document(name, outer.value, "", ())
    try:
        found = document(name, outer.value).queries
    except AssetError as error:
        at = outer.offsets[min(inside.offset(error.line, error.column), len(outer.value))]
        raise AssetError(around.file, *around.position(at), f"{name}: {error.reason}") from None
    for query in found:
        yield replace(
            query,
            place=f"{name}: {query.place}",
            scalar=_moved(query.scalar, outer),
            record=query.record and _moved(query.record, outer),
            legend=query.legend and _moved(query.legend, outer),
        )


def _moved(scalar: Scalar, outer: Scalar) -> Scalar:
    """A scalar of a text that is itself a scalar: its characters stand where those of the outer one do."""
    return replace(scalar, offsets=[outer.offsets[at] for at in scalar.offsets])
