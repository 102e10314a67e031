"""Read the YAML that rule files are written in, and keep where each scalar stands.

Not a YAML loader: there are no types, no tags' constructors, no aliases, nothing that runs (the package imports no
general loader, tests/packaging/test_source.py). What is read is YAML 1.2's block mappings and sequences, flow
mappings and sequences, and scalars in all five styles (plain, single and double quotes, literal `|`, folded `>`, with
indicators), comments and several documents. Tags and anchors are stepped over. A line of template (`{{- if ... }}`)
counts as a comment, and `{{` begins text, so that files of Helm charts are read.
Inside double quotes an action of a template may have quotes of its own (`"{{ "{{ $labels.job }}" }}"`).
What is left (complex keys, `? `) is refused with its line. An alias of a scalar is that scalar, any other alias the
text that it is, and a merge key a key like others.

Section numbers are those of YAML 1.2.2.
"""

from __future__ import annotations

import re

from rkmetrics.assets.base import Node, Scalar
from rkmetrics.errors import AssetError

__all__ = ["OTHER", "read_yaml"]

MAX_DEPTH = 60
OTHER = (
    "\0"  # ends the name of a key that comes again below: in a template both may count, `if` one and `else` the other
)

_BLANK = re.compile(r"[ \t\r\n]*")
_COMMENT = re.compile(r"\#[^\n]*|\{\{[^\n]*\}\}[ \t\r]*(?=\n|\Z)")
_SPACES = re.compile(r"[ \t]*")
_END_OF_LINE = re.compile(r"[ \t]*(?:(?<=[ \t])\#[^\n]*|\r)?(?=\n|\Z)")
_DOCUMENT = re.compile(r"(?:---(?=\s|\Z)|\.\.\.(?=\s|\Z)|%[^\n]*)", re.MULTILINE)
_KEY = re.compile(
    r"""(?:"(?:[^"\\\n]|\\.)*"[ \t]*|'(?:[^'\n]|'')*'[ \t]*|(?P<plain>(?:[^\s\-?:,\[\]{}\#&*!|>'"%@`]|[-?:](?=[^\s]))"""
    r"""(?:[^\n:\#]|:(?=[^\s])|(?<=[^\s])\#)*?)):(?=[ \t\r\n]|\Z)"""
)
_ALIAS = re.compile(r"\*([^\s,\[\]{}]+)")  # 7.1
_ACTION = re.compile(r'\{\{(?:"(?:[^"\\\n]|\\.)*"|`[^`\n]*`|[^"`}\\\n]|\}(?!\}))*\}\}')
_PROPERTY = re.compile(r"[!&][^\s]*(?:[ \t]+|(?=\r?\n|\Z))")  # 6.9: tags and anchors
_HEADER = re.compile(r"([|>])([-+]?)([1-9]?)([-+]?)[ \t]*(?:(?<=[ \t])\#[^\n]*)?\r?(?:\n|\Z)")  # 8.1.1
_BREAK = re.compile(r"\r?\n[ \t]*")
_BREAKS = re.compile(r"[ \t]*\r?\n[ \t\r\n]*")
_FLOW_PLAIN = re.compile(r"(?:[^\s,\[\]{}\#:]|:(?=[^\s,\[\]{}])|(?<=[^\s])\#|[ ](?=[^\s,\[\]{}\#:]|:[^\s,\[\]{}]))+")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_NAMED = {  # 5.7
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "\t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", "e": "\x1b",
    " ": " ", '"': '"', "/": "/", "\\": "\\", "N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029",
}  # fmt: skip


def read_yaml(text: str, file: str) -> list[Node]:
    """Return the documents of a text as trees. Raises AssetError with the place."""
    reader = _Reader(text, file)
    found: list[Node] = []
    while reader.content():
        if reader.starts(_DOCUMENT):
            continue
        found.append(reader.block(-1, 0))
        if reader.content() and not _DOCUMENT.match(text, reader.at):
            raise reader.error("expected a key or an entry of the same indentation")
    return found


class _Reader:
    """A cursor on the text. Each method reads what its name says and leaves the cursor behind it."""

    def __init__(self, text: str, file: str) -> None:
        self.text, self.file, self.at = text, file, int(text.startswith("\ufeff"))
        self.anchors: dict[str, Node] = {}

    # --- places -------------------------------------------------------------------------------------------------------

    def error(self, reason: str) -> AssetError:
        return AssetError(
            self.file, self.text.count("\n", 0, self.at) + 1, self.column() + 1, f"not read as YAML: {reason}"
        )

    def column(self) -> int:
        return self.at - (self.text.rfind("\n", 0, self.at) + 1)

    def starts(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self.text, self.at)
        if match:
            self.at = match.end()
        return match

    def content(self) -> bool:
        """Go to what is neither space nor comment; whether there is something."""
        while True:
            self.starts(_BLANK)
            alone = self.at == 0 or self.text[self.at - 1] in " \t\r\n\ufeff"
            if not alone or not self.starts(_COMMENT):
                return self.at < len(self.text)

    def line_ends(self) -> bool:
        return bool(_END_OF_LINE.match(self.text, self.at))

    # --- blocks (8.2) -------------------------------------------------------------------------------------------------

    def block(self, parent: int, depth: int) -> Node:
        """Read what is indented deeper than `parent`."""
        if depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH} levels")
        column = self.column() if self.content() else -1
        if column <= parent or (_DOCUMENT.match(self.text, self.at) and column == 0):
            return Scalar("", range(self.at, self.at + 1), "plain")
        if self._is_entry():
            return self._sequence(column, depth)
        if _KEY.match(self.text, self.at):
            return self._mapping(column, depth)
        return self._inline(parent, depth)

    def _is_entry(self) -> bool:
        return self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] in ("", " ", "\n", "\r")

    def _sequence(self, column: int, depth: int) -> Node:
        found: list[Node] = []
        while self.content() and self.column() == column and self._is_entry():
            self.at += 1
            self.starts(_SPACES)
            found.append(self._value(column, depth, same_column=False))
        return found

    def _mapping(self, column: int, depth: int) -> Node:
        found: dict[str, Node] = {}
        while self.content() and self.column() == column and not self._is_entry():
            key = self.starts(_KEY)
            if key is None:
                if found and _DOCUMENT.match(self.text, self.at):
                    break
                raise self.error("expected 'key: value'")
            self.starts(_SPACES)
            name = self._key(key)
            if name in found:
                times = sum(known.rstrip(OTHER) == name for known in found)
                found[name + OTHER * times] = found.pop(name)
            found[name] = self._value(column, depth, same_column=True)
        return found

    def _key(self, match: re.Match[str]) -> str:
        if match["plain"] is not None:
            return match["plain"].rstrip()
        return _Reader(match[0], self.file).quoted().value

    def _value(self, column: int, depth: int, *, same_column: bool) -> Node:
        """Read what follows `key:` or `-`, and remember it under its anchor."""
        names: list[str] = []
        while found := self.starts(_PROPERTY):
            names += [found[0].strip()[1:]] if found[0].startswith("&") else []
        node = self._unnamed(column, depth, same_column=same_column)
        self.anchors.update((name, node) for name in names)
        return node

    def _unnamed(self, column: int, depth: int, *, same_column: bool) -> Node:
        """8.2.2: a sequence may stand in the column of its key."""
        if not self.line_ends():
            if not same_column and (self._is_entry() or _KEY.match(self.text, self.at)):
                return self.block(column, depth + 1)
            return self._inline(column, depth)
        here = self.at
        if same_column and self.content() and self.column() == column and self._is_entry():
            return self._sequence(column, depth + 1)
        if self.content() and self.column() > column:
            return self.block(column, depth + 1)
        return Scalar("", range(here, here + 1), "plain")

    def _inline(self, parent: int, depth: int) -> Node:
        first = self.text[self.at]
        if first in "|>" and (header := self.starts(_HEADER)):
            return self._block_scalar(parent, header)
        if first in "{[" and not self.text.startswith("{{", self.at):
            node = self._flow(depth)
        elif first in "\"'":
            node = self.quoted()
        else:
            return self._meant(self._plain(parent))
        if not self.line_ends():
            raise self.error("expected the end of the line")
        return node

    def _meant(self, plain: Scalar) -> Scalar:
        """The scalar that an alias stands for."""
        alias = _ALIAS.fullmatch(plain.value)
        node = self.anchors.get(alias[1]) if alias else None
        return node if isinstance(node, Scalar) else plain

    # --- scalars (7.3, 8.1) -------------------------------------------------------------------------------------------

    def _plain(self, parent: int) -> Scalar:
        """Read a plain scalar and the lines that continue it, which are indented deeper than `parent`."""
        if self.text[self.at] in "?*&!%@`" and not self.text[self.at + 1 : self.at + 2].isalnum():
            raise self.error(f"a value that begins with {self.text[self.at]!r}")
        lines = [self._plain_line()]
        while True:
            before = self.at
            blank = 0
            while self.starts(_BREAK):
                blank += 1
                if self.text[self.at : self.at + 1] not in ("\n", "\r"):
                    break
            ends = self.at >= len(self.text) or not blank or self.column() <= parent
            if ends or self.text[self.at] == "#" or (self.column() == 0 and _DOCUMENT.match(self.text, self.at)):
                self.at = before
                return self._folded(lines, "plain")
            lines += [(self.at, "")] * (blank - 1)
            lines.append(self._plain_line())

    def _plain_line(self) -> tuple[int, str]:
        match = re.compile(r"[^\n]*?(?=[ \t]+\#|[ \t]*\r?(?:\n|\Z))").match(self.text, self.at)
        start, line = self.at, match[0] if match else ""
        self.at = start + len(line)
        self.starts(_END_OF_LINE)
        return start, line

    @staticmethod
    def _folded(lines: list[tuple[int, str]], style: str) -> Scalar:
        """Join lines as 6.5 says: a break is a space, and n blank lines between are n breaks."""
        first, text = lines[0]
        value, offsets, end = [text], list(range(first, first + len(text))), first + len(text)
        blank = 0
        for start, line in lines[1:]:
            if not line:
                blank += 1
                continue
            joint = "\n" * blank or " "
            value += (joint, line)
            offsets += [end] * len(joint)
            offsets += range(start, start + len(line))
            end, blank = start + len(line), 0
        return Scalar("".join(value), [*offsets, end], style)

    def quoted(self) -> Scalar:
        quote = self.text[self.at]
        piece = re.compile(r"''|[^']" if quote == "'" else r'\\(?:\r?\n[ \t]*|x..|u.{4}|U.{8}|.)|[^"\\]', re.DOTALL)
        start, value, offsets = self.at, "", list[int]()
        self.at += 1
        while not self.text.startswith(quote, self.at) or (self.text.startswith(quote * 2, self.at) and quote == "'"):
            action = _ACTION.match(self.text, self.at) if quote == '"' else None
            if action and '"' in action[0]:
                value += action[0]
                offsets += range(action.start(), action.end())
                self.at = action.end()
                continue
            at, folded = self.at, self._fold()
            match = None if folded else self.starts(piece)
            if not folded and match is None:
                self.at = start
                raise self.error("the quoted text has no end")
            said = folded or self._said(match[0] if match else "", quote)
            value += said
            offsets += [at] * len(said)
        self.at += 1
        return Scalar(value, [*offsets, self.at - 1], "single" if quote == "'" else "double")

    def _fold(self) -> str:
        """Step over a line break inside quotes, with the space around it; return what it stands for, or nothing."""
        match = self.starts(re.compile(r"[ \t]*(?:\r?\n[ \t]*)+"))
        return "" if match is None else "\n" * (match[0].count("\n") - 1) or " "

    def _said(self, piece: str, quote: str) -> str:
        if quote == "'":
            return piece[0]
        if not piece.startswith("\\"):
            return piece
        if "\n" in piece:
            return ""
        match = _ESCAPE.fullmatch(piece)
        digits = match and (match[1] or match[2] or match[3])
        if digits and int(digits, 16) <= 0x10FFFF:
            return chr(int(digits, 16))
        if match is None or digits or match[4] not in _NAMED:
            raise self.error(f"{piece!r} is no escape")
        return _NAMED[match[4]]

    def _block_scalar(self, parent: int, header: re.Match[str]) -> Scalar:
        folded, chomp = header[1] == ">", header[2] or header[4]
        lines = self._block_lines(parent, int(header[3] or 0))
        value, offsets, before = "", list[int](), ""
        last = max((i for i, (_, line, _) in enumerate(lines) if line), default=-1)
        for i, (start, line, end) in enumerate(lines):
            after = lines[i + 1][1] if i < last else ""
            value += line
            offsets += range(start, start + len(line))
            joint = self._joint(before, line, after) if folded and i < last else "\n"
            value += joint
            offsets += [end] * len(joint)
            before = line or before
        kept = len(value) if chomp == "+" else len(value.rstrip("\n")) + (chomp != "-" and bool(value.strip("\n")))
        kept = min(kept, len(value))
        return Scalar(value[:kept], [*offsets[:kept], offsets[kept] if kept < len(offsets) else self.at], "block")

    @staticmethod
    def _joint(before: str, line: str, after: str) -> str:
        """What the break behind a line of a folded scalar stands for (8.1.3): lines indented further keep theirs."""
        spaced = (line or before)[:1] in (" ", "\t") or after[:1] in (" ", "\t")
        if spaced or not line:
            return "\n"
        return " " if after else ""

    def _block_lines(self, parent: int, explicit: int) -> list[tuple[int, str, int]]:
        indent = max(parent, 0) + explicit if explicit else 0
        lines: list[tuple[int, str, int]] = []
        while self.at < len(self.text):
            end = self.text.find("\n", self.at)
            end = len(self.text) if end < 0 else end
            raw = self.text[self.at : end].removesuffix("\r")
            depth = len(raw) - len(raw.lstrip(" "))
            if raw.strip(" ") and not indent:
                indent = depth if depth > parent else -1
            if raw.strip(" ") and (indent < 0 or depth < indent):
                break
            cut = min(max(indent, 0), len(raw)) if indent else len(raw)
            lines.append((self.at + cut, raw[cut:], self.at + len(raw)))
            self.at = min(end + 1, len(self.text))
        return lines

    # --- flow (7.4) ---------------------------------------------------------------------------------------------------

    def _flow(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH} levels")
        self._flow_space()
        first = self.text[self.at : self.at + 1]
        if first == "{":
            return self._flow_mapping(depth)
        if first == "[":
            return self._flow_sequence(depth)
        if first in ('"', "'"):
            return self.quoted()
        match = self.starts(_FLOW_PLAIN)
        if match is None:
            return Scalar("", range(self.at, self.at + 1), "flow")
        lines = [(match.start(), match[0])]
        while (pause := _BREAKS.match(self.text, self.at)) and (more := _FLOW_PLAIN.match(self.text, pause.end())):
            lines += [(pause.end(), "")] * (pause[0].count("\n") - 1)
            lines.append((more.start(), more[0]))
            self.at = more.end()
        return self._folded(lines, "flow")

    def _flow_space(self) -> None:
        self.content()

    def _flow_takes(self, character: str) -> bool:
        self._flow_space()
        found = self.text.startswith(character, self.at)
        self.at += found
        return found

    def _flow_mapping(self, depth: int) -> Node:
        found: dict[str, Node] = {}
        self.at += 1
        while not self._flow_takes("}"):
            key = self._flow(depth + 1)
            value = self._flow(depth + 1) if self._flow_takes(":") else Scalar("", range(self.at, self.at + 1), "flow")
            if not isinstance(key, Scalar):
                raise self.error("a key that is no text")
            found[key.value] = value
            self._flow_separator("}")
        return found

    def _flow_sequence(self, depth: int) -> Node:
        found: list[Node] = []
        self.at += 1
        while not self._flow_takes("]"):
            found.append(self._flow(depth + 1))
            self._flow_separator("]")
        return found

    def _flow_separator(self, end: str) -> None:
        if not self._flow_takes(",") and not (self._flow_takes(end)):
            raise self.error(f"expected ',' or {end!r}")
        if self.text[self.at - 1] == end:
            self.at -= 1
