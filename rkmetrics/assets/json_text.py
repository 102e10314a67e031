"""Read JSON (RFC 8259) and keep where each string stands, which `json.loads` forgets.

Numbers, true, false and null become scalars too, as they are written: nobody here computes with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from rkmetrics.assets.base import Node, Scalar
from rkmetrics.errors import AssetError

__all__ = ["read_json"]

MAX_DEPTH = 100

_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"')
_OTHER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_CHARACTER = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL
)


def read_json(text: str, file: str) -> Node:
    """Return a JSON text as a tree. Raises AssetError with the place."""
    reader = _Reader(text, file)
    node = reader.value(0)
    reader.skip()
    if reader.at < len(text):
        raise reader.error("expected the end of the file")
    return node


def _offsets(raw: str, start: int) -> Sequence[int]:
    if "\\" not in raw:
        return range(start, start + len(raw) + 1)
    return [start + match.start() for match in _CHARACTER.finditer(raw)] + [start + len(raw)]


class _Reader:
    def __init__(self, text: str, file: str) -> None:
        self.text, self.file, self.at = text, file, 0

    def error(self, reason: str) -> AssetError:
        line = self.text.count("\n", 0, self.at)
        column = self.at - (self.text.rfind("\n", 0, self.at) + 1)
        return AssetError(self.file, line + 1, column + 1, f"not JSON: {reason}")

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def take(self, character: str) -> bool:
        self.skip()
        found = self.text.startswith(character, self.at)
        self.at += found
        return found

    def expect(self, character: str) -> None:
        if not self.take(character):
            raise self.error(f"expected {character!r}")

    def value(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH} levels")
        if self.take("{"):
            return self._mapping(depth)
        if self.take("["):
            return self._sequence(depth)
        return self._string() if self.text.startswith('"', self.at) else self._other()

    def _mapping(self, depth: int) -> Node:
        found: dict[str, Node] = {}
        while not self.take("}"):
            if found:
                self.expect(",")
                self.skip()
            key = self._string().value
            self.expect(":")
            found[key] = self.value(depth + 1)
        return found

    def _sequence(self, depth: int) -> Node:
        found: list[Node] = []
        while not self.take("]"):
            if found:
                self.expect(",")
            found.append(self.value(depth + 1))
        return found

    def _string(self) -> Scalar:
        match = _STRING.match(self.text, self.at)
        if match is None:
            raise self.error("expected a string")
        self.at = match.end()
        return Scalar(json.loads(match[0]), _offsets(match[0][1:-1], match.start() + 1), "json")

    def _other(self) -> Scalar:
        match = _OTHER.match(self.text, self.at)
        if match is None:
            raise self.error("expected a value")
        self.at = match.end()
        return Scalar(match[0], range(match.start(), match.end() + 1), "plain")
