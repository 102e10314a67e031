"""YAML as rule files have it: each style of scalar, each place, to the character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.assets.base import Node, Scalar
from rkmetrics.assets.yaml_text import read_yaml
from rkmetrics.errors import AssetError


def plain(node: Node) -> object:
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return [plain(value) for value in node] if isinstance(node, list) else node.value


def scalars(node: Node) -> list[Scalar]:
    if isinstance(node, Scalar):
        return [node]
    return [found for child in (node.values() if isinstance(node, dict) else node) for found in scalars(child)]


TABLE = [
    ("a: b", {"a": "b"}),
    ("a: b # no\nc: d#yes", {"a": "b", "c": "d#yes"}),
    ("a:\n  b:\n    c: d\ne: f", {"a": {"b": {"c": "d"}}, "e": "f"}),
    ("a:\n- b\n- c", {"a": ["b", "c"]}),
    ("a:\n  - b: 1\n    c: 2\n  -\n    d: 3", {"a": [{"b": "1", "c": "2"}, {"d": "3"}]}),
    ("- - a\n  - b\n- c", [["a", "b"], "c"]),
    ("a: x\n  y\n\n  z", {"a": "x y\nz"}),
    ("a: 'it''s'\nb: \"q\\\"\\u0041\\x41\"", {"a": "it's", "b": 'q"AA'}),
    ("a: 'x\n  y\n\n  z'", {"a": "x y\nz"}),
    ('a: "x\\\n  y\n  z"', {"a": "xy z"}),
    ("a: |\n  x\n    y\n\n  z\n", {"a": "x\n  y\n\nz\n"}),
    ("a: |-\n  x\nb: c", {"a": "x", "b": "c"}),
    ("a: |+\n  x\n\nb: c", {"a": "x\n\n", "b": "c"}),
    ("a: >\n  x\n  y\n\n  z\n    w\n  v\n", {"a": "x y\nz\n  w\nv\n"}),
    ("a: |2\n    x\n", {"a": "  x\n"}),
    ("a: | # says\n  x # stays\n", {"a": "x # stays\n"}),
    ("a: {b: c, 'd': \"e\", f: [g, {h: i}], j: }", {"a": {"b": "c", "d": "e", "f": ["g", {"h": "i"}], "j": ""}}),
    ("a: [\n  b,  # no\n  c d\n    e\n]", {"a": ["b", "c d e"]}),
    ("a: !tag b\nc: &x d\ne: *x", {"a": "b", "c": "d", "e": "d"}),
    (
        'a: "{{ "{{ $l.x }}" }} {{ required "b \\"c" .V }}: {{ `"` }}"',
        {"a": '{{ "{{ $l.x }}" }} {{ required "b \\"c" .V }}: {{ `"` }}'},
    ),
    ('a: {b: "{{ printf \\"x\\" 1 }}"}', {"a": {"b": '{{ printf "x" 1 }}'}}),
    ('{a: "{{ x", b: "y"}', {"a": "{{ x", "b": "y"}),
    ("? a", None),
    ("a: b: c\nd", None),
    ("a: [b", None),
    ("a: 'b", None),
    ("a: {b c", None),
    ("a: 'b' c", None),
    ('a: "\\q"', None),
    ("a:\n  b: c\n d: e", None),
    ("- a\nb: c", None),
    ("{{- if .x }}\na: b\n{{- end }}\nc: '{{ .y }}'", {"a": "b", "c": "{{ .y }}"}),
    ("a: {{ .Values.a }}-x\nb: c", {"a": "{{ .Values.a }}-x", "b": "c"}),
    ("a:\nb: c", {"a": "", "b": "c"}),
    ("\"k: 1\": a\n'k''': b\nk-2: c\nk 3: d", {"k: 1": "a", "k'": "b", "k-2": "c", "k 3": "d"}),
    ('expr: a{b="c"} > 1 and d:e:f\n', {"expr": 'a{b="c"} > 1 and d:e:f'}),
    ("a: -1\nb: ?x\nc: :y", {"a": "-1", "b": "?x", "c": ":y"}),
]


@pytest.mark.parametrize(("text", "expected"), TABLE)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_is_read(text: str, expected: object, end: str) -> None:
    if expected is None:
        with pytest.raises(AssetError, match=r"^f:[1-9]\d*:[1-9]\d*: "):
            read_yaml(text.replace("\n", end), "f")
    else:
        (root,) = read_yaml(text.replace("\n", end), "f")
        assert plain(root) == expected


def test_documents_are_read_one_by_one() -> None:
    text = "%YAML 1.2\n---\na: b\n---\n# nothing\n...\n---\n- c\n"
    assert [plain(root) for root in read_yaml(text, "f")] == [{"a": "b"}, ["c"]]
    assert read_yaml("\n# nothing\n", "f") == []


@pytest.mark.parametrize("text", [text for text, expected in TABLE if expected is not None])
def test_each_character_knows_where_it_stands(text: str) -> None:
    for scalar in scalars(read_yaml(text, "f")[0]):
        assert len(scalar.offsets) == len(scalar.value) + 1
        assert list(scalar.offsets) == sorted(scalar.offsets)
        found = [text[at] for at in scalar.offsets[:-1]]
        said = [got if got in " \n\\" else character for got, character in zip(found, scalar.value, strict=True)]
        assert said == found


def test_a_text_that_is_nested_too_deeply_is_refused() -> None:
    for text in ("- " * 200 + "a", "[" * 200, "a:\n" + "".join(" " * i + "a:\n" for i in range(1, 200))):
        with pytest.raises(AssetError, match="nested deeper"):
            read_yaml(text, "f")


PIECES = st.sampled_from(
    [
        "a",
        ": ",
        "- ",
        "\n",
        " ",
        "  ",
        "'",
        '"',
        "|",
        ">",
        "{",
        "}",
        "[",
        "]",
        ",",
        "#",
        "\\",
        "---",
        "&x ",
        "!t ",
        "? ",
        "\r\n",
        "{{",
        "\t",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        roots = read_yaml(text, "f")
    except AssetError as error:
        assert error.line <= text.count("\n") + 1  # noqa: PT017 - what else could it raise
    else:
        for scalar in (found for root in roots for found in scalars(root)):
            assert len(scalar.offsets) == len(scalar.value) + 1
