"""JSON with places: it agrees with the standard library, and each character knows where it stands."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.assets.base import Node, Scalar
from rkmetrics.assets.json_text import read_json
from rkmetrics.errors import AssetError
from rkmetrics.promql import Edit, apply

VALUES = st.recursive(
    st.text(max_size=20) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def plain(node: Node, text: str) -> object:
    if isinstance(node, dict):
        return {key: plain(value, text) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value, text) for value in node]
    return node.value if node.style == "json" else json.loads(node.value)


@given(VALUES, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_it_reads_what_the_standard_library_wrote(value: object, ascii_only: bool, indent: int | str | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert plain(read_json(text, "f"), text) == value


@given(st.text(min_size=1), st.data())
def test_an_edit_of_a_string_is_an_edit_of_the_file(said: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(said)))
    end = data.draw(st.integers(start, len(said)))
    text = f' [{json.dumps(said)} , "rest"]'
    root = read_json(text, "f")
    assert isinstance(root, list)
    scalar = root[0]
    assert isinstance(scalar, Scalar)
    edit = scalar.edit(Edit(start, end, 'a"\n'))
    assert edit is not None
    assert json.loads(apply(text, [edit])) == [said[:start] + 'a"\n' + said[end:], "rest"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "1:1"),
        ("{", "1:2"),
        ('{"a" 1}', "1:6"),
        ('{"a": 1,}', "1:9"),
        ("[1 2]", "1:4"),
        ('["a\n"]', "1:2"),
        ('["\\q"]', "1:2"),
        ("[1]\n x", "2:2"),
        ("[tru]", "1:2"),
        ("[" * 200, "1:102"),
    ],
)
def test_what_is_no_json_is_refused_where_it_begins(text: str, place: str) -> None:
    with pytest.raises(AssetError, match=f"^f:{place}: not JSON: "):
        read_json(text, "f")


@given(st.text(alphabet='{}[]",:\\ua1e+-. \ntrue\ufeff'))
def test_any_text_is_read_or_refused_as_the_standard_library_does(text: str) -> None:
    try:
        json.loads(text.lstrip("\ufeff"), parse_constant=lambda _: (_ for _ in ()).throw(ValueError()))
        fine = "\ufeff" not in text
    except ValueError:
        fine = False
    try:
        read_json(text, "f")
    except AssetError:
        assert not fine
