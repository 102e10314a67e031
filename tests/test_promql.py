"""PromQL text as dashboards and rules have it: what is found in it, that it is rewritten to the byte, and what is
refused.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkmetrics.errors import PromqlError
from rkmetrics.promql import (
    Aggregation,
    Binary,
    Call,
    Edit,
    Node,
    Ranged,
    Selector,
    Word,
    alternatives,
    apply,
    escape,
    label_words,
    metric_words,
    parse,
    parse_variable,
    rename,
    selectors,
    walk,
)

HERE = Path(__file__).resolve().parent
EXPRESSIONS = [
    row["expr"] for row in json.loads((HERE / "data/rivetkit/dashboard-breakage.json").read_text())["expressions"]
]


def names(node: Node) -> list[str]:
    return [word.text for selector in selectors(node) for word in metric_words(selector)]


def labels(node: Node) -> list[str]:
    return [word.text for word in label_words(node)]


# Query, metrics, labels. What Prometheus itself takes stands first; promtool is asked about it below.
PROMQL = [
    ("up", ["up"], []),
    ("sum(a)", ["a"], []),
    ("sum", ["sum"], []),
    ("sum by (le, job) (rate(a_bucket[5m]))", ["a_bucket"], ["le", "job"]),
    ("SUM BY (x) (a)", ["a"], ["x"]),
    ("sum(a) by (x,)", ["a"], ["x"]),
    ("sum without () (a)", ["a"], []),
    ("topk by (x) (5, a)", ["a"], ["x"]),
    ("count_values('version', a)", ["a"], []),
    ('{__name__="a", x!="b"}', ["a"], ["x"]),
    ('{__name__=~"a|b"}', ["a", "b"], []),
    ('{__name__=~"(?:a|b)"}', ["a", "b"], []),
    ('{__name__=~"a_.*"}', [], []),
    ('a{x="1",y!="2",z=~"3",w!~"4",}', ["a"], ["x", "y", "z", "w"]),
    ("a{x='it\\'s', y=`\\d`}", ["a"], ["x", "y"]),
    ('a{x="}) by (y) # no comment"}', ["a"], ["x"]),
    ("a # sum by (x) (b)\n + c", ["a", "c"], []),
    ("a{by='x', on='y', sum='z', offset='o'}", ["a"], ["by", "on", "sum", "offset"]),
    ("by:on:sum", ["by:on:sum"], []),
    ("a + on (x) group_left (y, z) b", ["a", "b"], ["x", "y", "z"]),
    ("a / ignoring (x) group_right b", ["a", "b"], ["x"]),
    ("a == bool 1", ["a"], []),
    ("a and on () b or c unless ignoring (x) d", ["a", "b", "c", "d"], ["x"]),
    ("a atan2 b", ["a", "b"], []),
    ("-a ^ -2", ["a"], []),
    ("a offset 5m", ["a"], []),
    ("a offset -1h30m", ["a"], []),
    ("a[5m] offset 1w", ["a"], []),
    ("a @ 1609746000.5", ["a"], []),
    ("a[5m:] @ end()", ["a"], []),
    ("a[5m] @ start() offset 1d", ["a"], []),
    ("max_over_time(rate(a[5m])[1h:30s])", ["a"], []),
    ("histogram_quantile(0.95, sum by (le) (rate(a_bucket[5m])))", ["a_bucket"], ["le"]),
    ("label_replace(a, 'x', '$1', 'y', '(.*):.*')", ["a"], []),
    ("a > 0x1F", ["a"], []),
    ("a > 1e-3", ["a"], []),
    ("a > .5", ["a"], []),
    ("a != NaN", ["a"], []),
    ("a < Inf", ["a"], []),
    ("vector(1)", [], []),
    ("time() - a", ["a"], []),
    ("level:a:rate5m{}", ["level:a:rate5m"], []),
    ("\n\ta\r\n", ["a"], []),
]
BEYOND = [
    ('{"a.b", "x.y"="1"}', ["a.b"], ["x.y"]),
    ('sum by ("x.y") ({"a.b"})', ["a.b"], ["x.y"]),
    ("a[$__rate_interval]", ["a"], []),
    ("a[$__range:$step]", ["a"], []),
    ("a[[[range]]]", ["a"], []),
    ("a[${range:raw}]", ["a"], []),
    ('a{x=~"$x", y=~"${y:regex}", z="[[z]]"}', ["a"], ["x", "y", "z"]),
    ("a{$filters}", ["a"], []),
    ('a{$filters, x="1"}', ["a"], ["x"]),
    ("a{x=$x}", ["a"], ["x"]),
    ('a{$label="1"}', ["a"], ["$label"]),
    ("sum by ($by) (a)", ["a"], ["$by"]),
    ("$fn(a[5m])", ["a"], []),
    ("$agg by (x) (a)", ["a"], ["x"]),
    ("rivet_$what{x='1'}", ["rivet_$what"], ["x"]),
    ("${prefix}_total", ["${prefix}_total"], []),
    ("a $op b", ["a", "b"], []),
    ("a $offset", ["a"], []),
    ("a > $limit", ["a", "$limit"], []),
    ("histogram_quantile($q, a_bucket)", ["$q", "a_bucket"], []),
    ("a[5m] smoothed", ["a"], []),
    ("a + fill(0) b", ["a", "b"], []),
]


@pytest.mark.parametrize(("query", "metrics", "found"), PROMQL + BEYOND)
def test_metrics_and_labels_are_found(query: str, metrics: list[str], found: list[str]) -> None:
    node = parse(query)
    assert (names(node), labels(node)) == (metrics, found)


@pytest.mark.parametrize("query", [query for query, *_ in PROMQL + BEYOND] + EXPRESSIONS)
def test_each_word_knows_where_it_stands(query: str) -> None:
    node, asked = parse_variable(query)
    words = [*asked, *(label_words(node) if node else ())]
    words += [word for selector in selectors(node) for word in metric_words(selector)] if node else []
    assert [word.text for word in words] == [query[word.start : word.end] for word in words]


def test_the_metrics_of_109_public_queries_are_those_that_were_listed_by_hand() -> None:
    rows = json.loads((HERE / "data/rivetkit/dashboard-breakage.json").read_text())["expressions"]
    for row in rows:
        node, _ = parse_variable(row["expr"])
        found = set(names(node)) if node else set()
        assert found - {"up"} == set(row["metrics"]) - {"up"}, row["expr"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_what_we_say_it_takes(tmp_path: Path) -> None:
    queries = [query for query, *_ in PROMQL if query[1:4] != "[5m"]  # a rule records no range
    assert refused_by_promtool(queries, tmp_path) == set()


def refused_by_promtool(queries: list[str], folder: Path) -> set[int]:
    """Which queries promtool refuses, by their place in the list."""
    rules = [{"record": f"r:{i}:r", "expr": query} for i, query in enumerate(queries)]
    path = folder / "rules.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "g", "rules": rules}]}))
    out = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    return {int(place) for place in re.findall(r'rule \d+, "r:(\d+):r": ', out.stderr)}


def spliced(random: Random) -> str:
    """A query with a piece of another in it: often broken, now and then something new."""
    one, two = (random.choice(PROMQL)[0] for _ in range(2))
    at, start = random.randrange(len(one) + 1), random.randrange(len(two) + 1)
    return one[:at] + two[start : start + random.randrange(12)] + one[at + random.randrange(4) :]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_what_prometheus_takes_is_read(tmp_path: Path) -> None:
    random = Random(7)
    queries = [query for query in (spliced(random) for _ in range(3000)) if query.strip()]
    refused = refused_by_promtool(queries, tmp_path)
    taken = [query for i, query in enumerate(queries) if i not in refused]
    assert (len(taken) > 500, len(refused) > 500) == (True, True)
    for query in taken:
        parse(query)


@pytest.mark.parametrize(
    ("query", "position"),
    [
        ("", 0),
        ("sum(", 4),
        ("a{", 2),
        ("a{x}", 3),
        ("a{x=1}", 4),
        ("a b", 2),
        ("a.b", 1),
        ('a{x="', 4),
        ("a[5m", 1),
        ("sum by (a", 9),
        ("sum by (1) (a)", 8),
        ("a +", 3),
        ("a)", 1),
        ('{app="x"} |= "y"', 10),
        ("(" * 1000, 60),
        ("a" + " + a" * 1000, 802),
        ("a" + " offset 1m" * 1000, 2012),
    ],
)
def test_what_cannot_be_read_is_refused_where_it_begins(query: str, position: int) -> None:
    with pytest.raises(PromqlError) as caught:
        parse(query)
    assert caught.value.position == position


@pytest.mark.parametrize(
    ("query", "tree"),
    [
        ("a + b * c", "(a + (b * c))"),
        ("a - b - c", "((a - b) - c)"),
        ("a ^ b ^ c", "(a ^ (b ^ c))"),
        ("a or b and c", "(a or (b and c))"),
        ("a unless b == c", "(a unless (b == c))"),
        ("-a ^ b * c", "((a ^ b) * c)"),
    ],
)
def test_operators_bind_as_prometheus_says(query: str, tree: str) -> None:
    def shown(node: Node) -> str:
        if isinstance(node, Binary):
            return f"({shown(node.left)} {node.op} {shown(node.right)})"
        return shown(getattr(node, "inner", None) or node) if hasattr(node, "inner") else query[node.start : node.end]

    assert shown(parse(query)) == tree


def test_the_tree_says_functions_windows_and_groupings() -> None:
    query = 'sum by (x) (rate(a{x="1"}[5m])) / avg_over_time(b[1h:1m])'
    nodes = list(walk(parse(query)))
    assert [node.op.text for node in nodes if isinstance(node, Aggregation)] == ["sum"]
    assert [node.function.text for node in nodes if isinstance(node, Call)] == ["rate", "avg_over_time"]
    assert [(node.window, node.subquery) for node in nodes if isinstance(node, Ranged)] == [
        ("5m", False),
        ("1h:1m", True),
    ]


def test_alternatives_are_listed_with_their_places_or_not_at_all() -> None:
    def of(query: str) -> object:
        node = parse(query)
        assert isinstance(node, Selector)
        found = alternatives(node.matchers[0])
        return found and [(word.text, query[word.start : word.end]) for word in found]

    assert of('a{x="b|c"}') == [("b|c", "b|c")]
    assert of('a{x=~"b|c"}') == [("b", "b"), ("c", "c")]
    assert of('a{x=~"^(b|c)$"}') == [("b", "b"), ("c", "c")]
    assert of('a{x=~"b.*|c"}') is None
    assert of('a{x=~"b\\\\.c"}') is None


@pytest.mark.parametrize(
    ("query", "metrics", "asked"),
    [
        ("label_values(a, x)", ["a"], ["x"]),
        ('label_values(a{y=~"$y",z="(,)"}, x)', ["a"], ["x"]),
        ("label_values(x)", [], ["x"]),
        ("metrics(rivet_.*)", [], []),
        ("label_names()", [], []),
        ("query_result(max_over_time(a[1h]))", ["a"], []),
        ("a", ["a"], []),
    ],
)
def test_variables_queries_are_read_as_grafana_does(query: str, metrics: list[str], asked: list[str]) -> None:
    node, words = parse_variable(query)
    assert (names(node) if node else [], [word.text for word in words]) == (metrics, asked)
    assert [query[word.start : word.end] for word in words] == asked


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("rate( a [5m]) # a", "rate( b [5m]) # a"),
        ('{__name__="a"}', '{__name__="b"}'),
        ("{__name__=~'a|c'}", "{__name__=~'b|c'}"),
        ('{"a", x="a"}', '{"b", y="a"}'),
        ("sum by (x, a) (a{x='x'})", "sum by (y, a) (b{y='x'})"),
        ("sum(aa) + a + a_sum", "sum(aa) + b + a_sum"),
        ("$a + a$a", "$a + a$a"),
    ],
)
def test_renaming_changes_names_and_labels_and_nothing_else(query: str, expected: str) -> None:
    assert rename(query, {"a": "b"}, {"x": "y"}) == expected
    assert rename(expected, {"b": "a"}, {"y": "x"}) == query


def test_text_between_quotes_is_escaped_as_they_ask() -> None:
    assert [escape('a"b', quote) for quote in ('"', "'", "`", "")] == ['a\\"b', 'a"b', 'a"b', None]
    assert escape("`", "`") is None


def test_edits_apply_in_any_order() -> None:
    assert apply("abc", [Edit(2, 3, "C"), Edit(0, 1, "A")]) == "AbC"


PIECES = st.sampled_from(
    [
        "a",
        "sum",
        "by",
        "(",
        ")",
        "(x)",
        "{",
        "}",
        "[5m]",
        "[",
        "]",
        ",",
        '"x"',
        "=",
        "=~",
        "+",
        "-",
        "or",
        "on",
        "group_left",
        "$x",
        "${x:y}",
        "[[x]]",
        "5m",
        "offset",
        "@",
        "'",
        "`",
        "rate(",
        ".",
        ":",
    ]
)


def read_or_refused(text: str) -> None:
    """Both readers come to an end, and renaming nothing changes nothing."""
    for change in (lambda text: rename(text, {}), lambda text: (parse_variable(text), text)[1]):
        with suppress(PromqlError):
            assert change(text) == text


@given(st.one_of(st.text(), st.lists(PIECES).map(" ".join), st.lists(PIECES).map("".join)))
def test_any_text_is_read_or_refused_and_stays_as_it_is(text: str) -> None:
    read_or_refused(text)


@given(st.sampled_from(EXPRESSIONS + [query for query, *_ in PROMQL + BEYOND]), st.data())
def test_a_query_with_a_piece_cut_or_doubled_never_crashes(query: str, data: st.DataObject) -> None:
    start, end = sorted((data.draw(st.integers(0, len(query))), data.draw(st.integers(0, len(query)))))
    read_or_refused(query[:start] + query[end:])
    read_or_refused(query[:end] + query[start:])


def test_a_word_of_grafana_is_opaque() -> None:
    assert [Word(text, 0, 1).opaque for text in ("a", "$a", "a${b}", "[[a]]", "5$")] == [False, True, True, True, False]
