"""Read PromQL text: which metrics, labels, values and functions it has and where each stands. Evaluates nothing.

The grammar is Prometheus' ("Querying basics", "Operators", "UTF-8 support"), in which Grafana's variables ($x,
${x:format}, [[x]], $__rate_interval) may stand for any word, number, operator or part of one: such a word is
`opaque`, and nobody can say more about it. The parser takes more than Prometheus does (it checks no types, no
argument counts) and nothing less; what it cannot read raises PromqlError with the position.

Each Word knows the exact span that would be replaced, so that an edit changes what it names and not a byte beside it.

A real parser rather than a search for names: `sum` is an aggregation in one place, a label in another and text in a
third; and whether a label is still there at some point can only be told from the tree. Depth is bounded, because the
text comes from strangers and trees are walked by recursion.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from rkmetrics.errors import PromqlError

__all__ = [
    "Aggregation",
    "Binary",
    "Call",
    "Edit",
    "Grouping",
    "Literal",
    "Matcher",
    "Node",
    "Parser",
    "Ranged",
    "Selector",
    "Token",
    "Word",
    "Wrapped",
    "alternatives",
    "apply",
    "children",
    "escape",
    "groupings",
    "label_words",
    "metric_words",
    "parse",
    "parse_variable",
    "rename",
    "selectors",
    "tokens",
    "walk",
]

MAX_DEPTH = 60  # nested parentheses, calls and signs
MAX_CHAIN = 200  # operators and suffixes in all: in a row, each is a level of the tree as well

# Grafana, "Variable syntax": $name, ${name}, ${name:format}, ${name.field:format}, [[name]], [[name:format]].
_VARIABLE = r"\$\{[^{}\s]*\}|\$[A-Za-z_0-9]+|\[\[\w+(?:\.\w+)?(?::\w+)?\]\]"
_VARIABLES = re.compile(_VARIABLE)

# Prometheus "Querying basics": strings in three kinds of quotes, of which backticks know no escapes.
_STRING = r'"(?:[^"\\\n]|\\[^\n])*"|' r"'(?:[^'\\\n]|\\[^\n])*'|" r"`[^`]*`"
_TOKEN = re.compile(
    rf"(?P<space>[ \t\r\n]+|\#[^\n]*)"
    rf"|(?P<string>{_STRING})"
    rf"|(?P<number>(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][+-][0-9]+|(?:[0-9]|\.[0-9])(?:{_VARIABLE}|[A-Za-z0-9_.])*)"
    rf"|(?P<word>(?:{_VARIABLE}|[A-Za-z_:])(?:{_VARIABLE}|[A-Za-z0-9_:])*)"
    rf"|(?P<range>\[(?:{_VARIABLE}|[^\[\]])*\])"
    rf"|(?P<op>==|!=|=~|!~|>=|<=|[-+*/%^=<>(){{}},@])"
)
_PLAIN_WORD = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")

# Prometheus "Operators", "Binary operator precedence", from the loosest; all but ^ associate to the left.
_PRECEDENCE: Mapping[str, int] = {
    "or": 1,
    **dict.fromkeys(("and", "unless"), 2),
    **dict.fromkeys(("==", "!=", "<=", "<", ">=", ">"), 3),
    **dict.fromkeys(("+", "-"), 4),
    **dict.fromkeys(("*", "/", "%", "atan2"), 5),
    "^": 6,
}
_OPAQUE_OPERATOR = 3  # a variable between two operands: as loose as a comparison, which it most often is
_SIGN = 5  # -a ^ b is -(a ^ b), -a * b is (-a) * b

AGGREGATIONS = frozenset(
    [
        "sum",
        "avg",
        "count",
        "min",
        "max",
        "group",
        "stddev",
        "stdvar",
        "topk",
        "bottomk",
        "count_values",
        "quantile",
        "limitk",
        "limit_ratio",
    ]
)
_MATCHING = frozenset(("on", "ignoring"))
_INCLUDING = frozenset(("group_left", "group_right"))
_FILLING = frozenset(("fill", "fill_left", "fill_right"))
_SUFFIXES = frozenset(("anchored", "smoothed"))


class Token(NamedTuple):
    """A piece of the text: its kind (string, number, word, range, op or end) and its span."""

    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Word:
    """A name or a value, and the span that would be replaced: inside the quotes, where it has some."""

    text: str
    start: int
    end: int
    quote: str = ""

    @property
    def opaque(self) -> bool:
        """Whether Grafana puts something of its own in it."""
        return bool(_VARIABLES.search(self.text))


@dataclass(frozen=True, slots=True)
class Matcher:
    """`label op "value"`. The span runs from the label to the value's closing quote."""

    label: Word
    op: str
    value: Word
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Grouping:
    """by, without, on, ignoring, group_left or group_right, and their labels."""

    keyword: str
    labels: tuple[Word, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A part of a query; text[start:end] is all of it."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Literal(Node):
    """A number, a duration or a string."""

    value: Word


@dataclass(frozen=True, slots=True)
class Selector(Node):
    """Series by name and matchers. brace: the position behind `{`, or -1 where there are no braces."""

    name: Word | None
    matchers: tuple[Matcher, ...]
    brace: int = -1


@dataclass(frozen=True, slots=True)
class Call(Node):
    """A function and its arguments."""

    function: Word
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Aggregation(Node):
    """An aggregation, what it groups by and its arguments."""

    op: Word
    grouping: Grouping | None
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Binary(Node):
    """An operator between two operands; op is in lower case."""

    op: str
    left: Node
    right: Node
    matching: Grouping | None = None
    include: Grouping | None = None


@dataclass(frozen=True, slots=True)
class Ranged(Node):
    """A range of samples. window: what the brackets hold; subquery: whether it has a resolution."""

    inner: Node
    window: str
    subquery: bool


@dataclass(frozen=True, slots=True)
class Wrapped(Node):
    """An operand in parentheses, with a sign, an offset or a time: what it is made of stays the same."""

    inner: Node


class Edit(NamedTuple):
    """Replace text[start:end]."""

    start: int
    end: int
    text: str


# --- text to tokens ---------------------------------------------------------------------------------------------------


def tokens(text: str) -> list[Token]:
    """Return the pieces of a text, without space and comments, and an "end" behind them. Raises PromqlError."""
    found: list[Token] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise PromqlError(text, at, _why_no_token(text[at]))
        if match.lastgroup != "space":
            found.append(Token(str(match.lastgroup), match[0], at, match.end()))
        at = match.end()
    return [*found, Token("end", "", len(text), len(text))]


def _why_no_token(character: str) -> str:
    if character in "\"'`":
        return "the string has no end"
    return "the bracket has no end" if character == "[" else "expected an operand or an operator"


def _word(token: Token) -> Word:
    if token.kind == "string":
        return Word(_unquoted(token.text), token.start + 1, token.end - 1, token.text[0])
    return Word(token.text, token.start, token.end)


_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_NAMED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def _unquoted(literal: str) -> str:
    """What a string says (Go's escapes, which Prometheus takes). An escape that it would refuse stays as it is."""
    inner = literal[1:-1]
    return inner if literal[0] == "`" or "\\" not in inner else _ESCAPE.sub(_unescaped, inner)


def _unescaped(match: re.Match[str]) -> str:
    digits = match[1] or match[2] or match[3] or match[4]
    if not digits:
        return _NAMED.get(match[5], match[5])
    code = int(digits, 8 if match[4] else 16)
    return chr(code) if code <= 0x10FFFF else match[0]


def escape(text: str, quote: str) -> str | None:
    """Return a text as it stands between such quotes; None where it cannot. Without quotes it must be a plain word."""
    if not quote:
        return text if _PLAIN_WORD.fullmatch(text) else None
    if quote == "`":
        return None if "`" in text else text
    return text.replace("\\", "\\\\").replace(quote, "\\" + quote).replace("\n", "\\n")


# --- tokens to a tree -------------------------------------------------------------------------------------------------


def parse(text: str) -> Node:
    """Return what a query is made of. Raises PromqlError."""
    parser = Parser(text)
    node = parser.expression()
    if parser.next.kind != "end":
        parser.fail("expected an operator or the end")
    return node


class Parser:
    """Recursive descent over tokens; operators by precedence climbing."""

    def __init__(self, text: str) -> None:
        self.text, self._tokens = text, tokens(text)
        self._at, self._depth, self._chain = 0, 0, 0

    @property
    def next(self) -> Token:
        """The token that comes next."""
        return self._tokens[self._at]

    def fail(self, why: str) -> NoReturn:
        """Raise the error for the next token."""
        raise PromqlError(self.text, self.next.start, why)

    def expression(self, loosest: int = 1) -> Node:
        """Read operands joined by operators that bind as tightly as `loosest`, or tighter."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH} levels")
        left = self._operand()
        while (strength := self._strength()) >= loosest:
            self._count()
            left = self._binary(left, strength)
        self._depth -= 1
        return left

    def _count(self) -> None:
        self._chain += 1
        if self._chain > MAX_CHAIN:
            self.fail(f"more than {MAX_CHAIN} operators")

    def _advance(self) -> Token:
        token = self.next
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _after_next(self) -> Token:
        return self._tokens[min(self._at + 1, len(self._tokens) - 1)]

    def _is(self, text: str) -> bool:
        return self.next.kind == "op" and self.next.text == text

    def _is_word(self, words: Iterable[str]) -> bool:
        return self.next.kind == "word" and self.next.text.lower() in words

    def _expect(self, text: str) -> Token:
        if not self._is(text):
            self.fail(f"expected {text!r}")
        return self._advance()

    def _strength(self) -> int:
        """How tightly the next token binds as an operator; 0 where it is none."""
        if self.next.kind == "op":
            return _PRECEDENCE.get(self.next.text, 0)
        if self.next.kind != "word":
            return 0
        return _OPAQUE_OPERATOR if _is_opaque(self.next) else _PRECEDENCE.get(self.next.text.lower(), 0)

    def _binary(self, left: Node, strength: int) -> Node:
        op = self._advance().text.lower()
        if self._is_word(("bool",)):
            self._advance()
        matching = self._grouping() if self._is_word(_MATCHING) else None
        include = self._grouping(optional=True) if self._is_word(_INCLUDING) else None
        while self._is_word(_FILLING) and self._after_next().text == "(":
            self._advance()
            self._arguments()
        right = self.expression(strength if op == "^" else strength + 1)
        return Binary(left.start, right.end, op, left, right, matching, include)

    def _operand(self) -> Node:
        token = self.next
        if self._is("-") or self._is("+"):
            self._advance()
            inner = self.expression(_SIGN + 1)
            return Wrapped(token.start, inner.end, inner)
        return self._with_suffixes(self._primary())

    def _primary(self) -> Node:
        token = self.next
        if token.kind in ("number", "string"):
            self._advance()
            return Literal(token.start, token.end, _word(token))
        if token.kind == "word":
            return self._named()
        if self._is("{"):
            return self._selector(None)
        self._expect_operand()
        inner = self.expression()
        return Wrapped(token.start, self._expect(")").end, inner)

    def _expect_operand(self) -> None:
        if not self._is("("):
            self.fail("expected an operand")
        self._advance()

    def _named(self) -> Node:
        token, after = self.next, self._after_next()
        lower = token.text.lower()
        grouped = after.kind == "word" and after.text.lower() in ("by", "without")
        if grouped and (lower in AGGREGATIONS or _is_opaque(token)):
            return self._aggregation()
        if after.kind == "op" and after.text == "(":
            return self._aggregation() if lower in AGGREGATIONS else self._call()
        if lower in ("inf", "nan"):
            self._advance()
            return Literal(token.start, token.end, _word(token))
        return self._selector(self._advance())

    def _call(self) -> Node:
        name = self._advance()
        args, end = self._arguments()
        return Call(name.start, end, _word(name), args)

    def _aggregation(self) -> Node:
        name = self._advance()
        grouping = self._grouping() if self._is_word(("by", "without")) else None
        args, end = self._arguments()
        if grouping is None and self._is_word(("by", "without")):
            grouping = self._grouping()
            end = self._tokens[self._at - 1].end
        return Aggregation(name.start, end, _word(name), grouping, args)

    def _arguments(self) -> tuple[tuple[Node, ...], int]:
        self._expect("(")
        args: list[Node] = []
        while not self._is(")"):
            args.append(self.expression())
            if not self._is(")"):
                self._expect(",")
        return tuple(args), self._advance().end

    def _grouping(self, *, optional: bool = False) -> Grouping:
        keyword = self._advance().text.lower()
        labels: list[Word] = []
        if optional and not self._is("("):
            return Grouping(keyword, ())
        self._expect("(")
        while not self._is(")"):
            if self.next.kind not in ("word", "string"):
                self.fail("expected a label")
            labels.append(_word(self._advance()))
            if not self._is(")"):
                self._expect(",")
        self._advance()
        return Grouping(keyword, tuple(labels))

    def _selector(self, token: Token | None) -> Node:
        name = None if token is None else _word(token)
        start = self.next.start if token is None else token.start
        if not self._is("{"):
            return Selector(start, self._tokens[self._at - 1].end, name, ())
        brace = self._advance().end
        matchers: list[Matcher] = []
        while not self._is("}"):
            found = self._matcher()
            if isinstance(found, Matcher):
                matchers.append(found)
            elif found is not None:
                name = name or found
            if not self._is("}"):
                self._separator()
        return Selector(start, self._advance().end, name, tuple(matchers), brace)

    def _separator(self) -> None:
        if self._is_word(("or",)):  # a union of matchers, as VictoriaMetrics has it
            self._advance()
        else:
            self._expect(",")

    def _matcher(self) -> Matcher | Word | None:
        """A matcher; the name of the metric in quotes ({"a.b"}); None for a variable that holds matchers."""
        token = self.next
        if token.kind not in ("word", "string"):
            self.fail("expected a label")
        self._advance()
        if not (self.next.kind == "op" and self.next.text in ("=", "!=", "=~", "!~")):
            if token.kind == "string":
                return _word(token)
            if not _is_opaque(token):
                self.fail("expected one of = != =~ !~")
            return None
        op = self._advance().text
        value = self.next
        if value.kind != "string" and not _is_opaque(value):
            self.fail("expected a value in quotes")
        self._advance()
        return Matcher(_word(token), op, _word(value), token.start, value.end)

    def _with_suffixes(self, node: Node) -> Node:
        while (suffixed := self._suffix(node)) is not None:
            self._count()
            node = suffixed
        return node

    def _suffix(self, node: Node) -> Node | None:
        token = self.next
        if token.kind == "range":
            self._advance()
            window = token.text[1:-1]
            return Ranged(node.start, token.end, node, window, ":" in _VARIABLES.sub("", window))
        if self._is_word(("offset",)) or self._is("@"):
            self._advance()
            return Wrapped(node.start, self._moment().end, node)
        if self._is_word(_SUFFIXES) or (_is_opaque(token) and not self._starts_operand(self._after_next())):
            self._advance()
            return Wrapped(node.start, token.end, node)
        return None

    def _moment(self) -> Node:
        """What follows `offset` or `@`: a signed number or duration, start(), end(), or a sum in parentheses."""
        while self._is("-") or self._is("+"):
            self._advance()
        return self._primary()

    @staticmethod
    def _starts_operand(token: Token) -> bool:
        if token.kind == "word":
            return token.text.lower() not in {*_PRECEDENCE, "offset", "by", "without"}
        return token.kind in ("number", "string") or token.text in ("(", "{")


def _is_opaque(token: Token) -> bool:
    return token.kind == "word" and bool(_VARIABLES.search(token.text))


# --- Grafana's variables ----------------------------------------------------------------------------------------------

# Grafana's own patterns, "Prometheus template variables": label_values(expr, label), label_values(label),
# query_result(expr), metrics(regex), label_names(). Anything else is a query for series.
_LABEL_VALUES = re.compile(rf"\s*label_values\((?:(.+),)?\s*({_VARIABLE}|[A-Za-z_]\w*)\s*\)\s*", re.DOTALL)
_QUERY_RESULT = re.compile(r"\s*query_result\((.+)\)\s*", re.DOTALL)
_OTHERS = re.compile(r"\s*(?:metrics|label_names)\((.*)\)\s*", re.DOTALL)


def parse_variable(text: str) -> tuple[Node | None, tuple[Word, ...]]:
    """Return the query inside a dashboard variable's query, and the label that it asks for. Raises PromqlError."""
    values = _LABEL_VALUES.fullmatch(text)
    if values:
        label = Word(values[2], *values.span(2))
        return (None if values[1] is None else _within(text, *values.span(1))), (label,)
    if _OTHERS.fullmatch(text):
        return None, ()
    result = _QUERY_RESULT.fullmatch(text)
    return (_within(text, *result.span(1)) if result else parse(text)), ()


def _within(text: str, start: int, end: int) -> Node:
    """Parse a part of a text, with positions of the whole: what is around it becomes space."""
    return parse(" " * start + text[start:end])


# --- what a tree holds ------------------------------------------------------------------------------------------------


def walk(node: Node) -> Iterator[Node]:
    """Yield a node and all below it, in the order of the text."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(children(node)))


def children(node: Node) -> tuple[Node, ...]:
    """Return the parts that a node is directly made of."""
    if isinstance(node, Call | Aggregation):
        return node.args
    if isinstance(node, Binary):
        return node.left, node.right
    return (node.inner,) if isinstance(node, Ranged | Wrapped) else ()


def selectors(node: Node) -> Iterator[Selector]:
    """Yield every selector below a node."""
    return (found for found in walk(node) if isinstance(found, Selector))


def metric_words(selector: Selector) -> Iterator[Word]:
    """Yield the names of the metrics that a selector asks for: its name, or what it compares `__name__` with.

    A pattern is left out, unless it is a list of names ("a|b"). Opaque words are among them.
    """
    if selector.name is not None:
        yield selector.name
    for matcher in selector.matchers:
        if matcher.label.text == "__name__":
            yield from alternatives(matcher) or ()


_PLAIN_VALUE = re.compile(r"[^\\^$.|?*+()\[\]{}]*")
_GROUPED = re.compile(r"(?:\^)?\((?:\?:)?([^()]*)\)(?:\$)?")


def alternatives(matcher: Matcher) -> tuple[Word, ...] | None:
    """Return the values that a matcher compares with, each with its span; None where they cannot be listed.

    A regular expression can be listed if it is plain words joined by "|", in parentheses or not.
    """
    value = matcher.value
    if matcher.op in ("=", "!=") or value.opaque:
        return (value,)
    if len(value.text) != value.end - value.start:  # escapes: characters and positions differ
        return None
    grouped = _GROUPED.fullmatch(value.text)
    inner, start = (grouped[1], value.start + grouped.start(1)) if grouped else (value.text, value.start)
    found: list[Word] = []
    for part in inner.split("|"):
        if not _PLAIN_VALUE.fullmatch(part):
            return None
        found.append(Word(part, start, start + len(part), value.quote))
        start += len(part) + 1
    return tuple(found)


def label_words(node: Node) -> Iterator[Word]:
    """Yield every label that a query names: in matchers, groupings and matchings. Not `__name__`."""
    for found in walk(node):
        if isinstance(found, Selector):
            yield from (matcher.label for matcher in found.matchers if matcher.label.text != "__name__")
        for grouping in groupings(found):
            yield from grouping.labels


def groupings(node: Node) -> Iterator[Grouping]:
    """Yield what an aggregation groups by, or what an operator matches on and includes."""
    if isinstance(node, Aggregation) and node.grouping:
        yield node.grouping
    if isinstance(node, Binary):
        yield from (grouping for grouping in (node.matching, node.include) if grouping)


# --- writing ----------------------------------------------------------------------------------------------------------


def apply(text: str, edits: Iterable[Edit]) -> str:
    """Return a text with edits applied; all else keeps its bytes. Edits do not overlap; one span is edited once."""
    parts: list[str] = []
    at = 0
    for edit in sorted(set(edits)):
        parts += (text[at : edit.start], edit.text)
        at = edit.end
    return "".join((*parts, text[at:]))


def rename(text: str, names: Mapping[str, str], labels: Mapping[str, str] | None = None) -> str:
    """Return a query with metrics and labels renamed. Raises PromqlError."""
    node = parse(text)
    metrics = (word for selector in selectors(node) for word in metric_words(selector))
    changes = [(word, names) for word in metrics] + [(word, labels or {}) for word in label_words(node)]
    return apply(text, (edit for word, table in changes if (edit := _renamed(word, table))))


def _renamed(word: Word, table: Mapping[str, str]) -> Edit | None:
    new = escape(table[word.text], word.quote) if word.text in table else None
    return None if new is None else Edit(word.start, word.end, new)
