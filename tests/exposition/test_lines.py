"""Both twins that write sample lines, under one suite: any family gives the same bytes, and digits are repr's."""

from __future__ import annotations

import importlib
import math
import random
import struct
import subprocess
import sys
import threading
from array import array
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkmetrics import _lines_py
from rkmetrics.exposition.base import pieces
from rkmetrics.exposition.openmetrics import tails
from rkmetrics.model import UNSET, MetricFamily
from tests.exposition.families import HOSTILE, own_families

try:
    native: ModuleType | None = importlib.import_module("rkmetrics._lines")
except ImportError:
    native = None

without_build = pytest.mark.skipif(native is None, reason="the extension is not built")
TWINS = [pytest.param(_lines_py, id="python"), pytest.param(native, id="c", marks=without_build)]


@pytest.fixture(params=TWINS)
def lines(request: pytest.FixtureRequest) -> Any:
    return request.param


def encode(lines: Any, values: list[float], *, names: tuple[str, ...] = ("a",), tails: Any = ()) -> bytes:
    """A family with one counter for each name."""
    page = lines.encode(b"# TYPE x\n", (b'x{actor="',), (b'"} ',), names, array("d", values), -1, 1, tails)
    assert isinstance(page, bytes)
    return page


# ---- numbers

NUMBERS = [
    (0.0, "0"),
    (-0.0, "-0"),
    (1.0, "1"),
    (-1.0, "-1"),
    (12.0, "12"),
    (0.1, "0.1"),
    (1 / 3, "0.3333333333333333"),
    (-2.5, "-2.5"),
    (123456.789, "123456.789"),
    (0.0001, "0.0001"),
    (0.00012345, "0.00012345"),
    (0.00001, "1e-05"),
    (0.000012345, "1.2345e-05"),
    (1e15, "1000000000000000"),
    (1e16, "1e+16"),
    (1.5e16, "1.5e+16"),
    (9007199254740991.0, "9007199254740991"),
    (9007199254740992.0, "9007199254740992"),
    (9999999999999998.0, "9999999999999998"),
    (1e100, "1e+100"),
    (5e-324, "5e-324"),
    (2.2250738585072014e-308, "2.2250738585072014e-308"),
    (-2.2250738585072014e-308, "-2.2250738585072014e-308"),
    (1.7976931348623157e308, "1.7976931348623157e+308"),
    (2.0**-24, "5.960464477539063e-08"),
    (math.inf, "+Inf"),
    (-math.inf, "-Inf"),
    (math.nan, "NaN"),
]


@pytest.mark.parametrize(("value", "shown"), NUMBERS)
def test_a_number_has_the_shortest_digits_that_read_back(lines: Any, value: float, shown: str) -> None:
    assert lines.number(value) == shown.encode()
    assert encode(lines, [value]) == b'# TYPE x\nx{actor="a"} %s\n' % shown.encode()


def as_repr(value: float) -> bytes:
    text = repr(value).removesuffix(".0")
    return {"inf": b"+Inf", "-inf": b"-Inf", "nan": b"NaN"}.get(text) or text.encode()


def neighbours(value: float) -> list[float]:
    return [value, -value, math.nextafter(value, math.inf), math.nextafter(value, -math.inf)]


def hard_numbers() -> list[float]:
    """Powers of two and of ten with their neighbours, where intervals are uneven; the first subnormals."""
    powers = [2.0**e for e in range(-1074, 1024)] + [float(f"1e{e}") for e in range(-323, 309)]
    halves = [float(f"{digits}e{e}") for digits in ("5", "9.5", "1.25", "4.35") for e in range(-320, 308)]
    return [each for power in powers + halves for each in neighbours(power)] + [5e-324 * k for k in range(1, 5000)]


def random_numbers(count: int) -> list[float]:
    chance = random.Random(20)
    bits = [value[0] for value in struct.iter_unpack("=d", chance.randbytes(8 * count))]
    decimals = [chance.randrange(10**17) * 10.0 ** chance.randrange(-25, 10) for _ in range(count)]
    wholes = [float(chance.getrandbits(chance.randrange(1, 70))) for _ in range(count)]
    usual = [chance.random() * 10.0 ** chance.randrange(-5, 12) for _ in range(count)]
    return [value for value in bits if not _is_our_unset(value)] + decimals + wholes + usual


def _is_our_unset(value: float) -> bool:
    return struct.pack("=d", value) == struct.pack("=d", UNSET)


def test_digits_are_those_of_repr(lines: Any) -> None:
    values = hard_numbers() + random_numbers(75_000)
    page = lines.encode(b"", (b"",), (b"",), ("",) * len(values), array("d", values), -1, 1)
    assert page.split(b"\n") == [*map(as_repr, values), b""]


# ---- lines


def test_a_family_without_series_is_nothing(lines: Any) -> None:
    assert encode(lines, [UNSET]) == b""
    assert encode(lines, [], names=()) == b""
    assert lines.encode(b"head\n", (), (), ("a",), array("d"), -1, 1) == b""


def test_series_that_do_not_exist_are_left_out(lines: Any) -> None:
    page = encode(lines, [1, UNSET, math.nan], names=("a", "b", "c"))
    assert page == b'# TYPE x\nx{actor="a"} 1\nx{actor="c"} NaN\n'


@pytest.mark.parametrize("name", [*HOSTILE, "x" * 100_000, '"' * 5000])
def test_any_actor_name_stays_between_its_quotes(lines: Any, name: str) -> None:
    escaped = name.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    page = encode(lines, [1, 2, 3], names=("before", name, "after"))
    assert page.decode() == f'# TYPE x\nx{{actor="before"}} 1\nx{{actor="{escaped}"}} 2\nx{{actor="after"}} 3\n'


def test_tails_stand_where_they_belong(lines: Any) -> None:
    page = encode(
        lines, [1, UNSET, 3], names=("a", "b", "c"), tails=((0, b" # first"), (1, b" # unset"), (2, b" # last"))
    )
    assert page == b'# TYPE x\nx{actor="a"} 1 # first\nx{actor="c"} 3 # last\n'


def test_a_histogram_is_cumulative_and_its_count_is_its_last_bucket(lines: Any) -> None:
    pres, posts = (b"b ", b"b ", b"b ", b"sum ", b"count ") * 2, (b"1 ", b"2 ", b"+Inf ", b"", b"") * 2
    rows = [3, 0, 2, 7.5, 99, 99, 1, 1, 1, 0.25, 99, 99]  # 99: native numbers, not for text
    page = lines.encode(
        b"", pres, posts, ("",), array("d", rows), 2, 6, ((2, b" # inf"), (3, b" # sum"), (4, b" # none"))
    )
    assert page.split(b"\n") == [
        *(b"b 1 3", b"b 2 3", b"b +Inf 5 # inf", b"sum 7.5", b"count 5"),
        *(b"b 1 1", b"b 2 2", b"b +Inf 3", b"sum 0.25", b"count 3", b""),
    ]


def test_more_lines_than_are_written_with_the_lock_held_come_out_the_same(lines: Any) -> None:
    names = tuple(f"room-{i}" for i in range(20_000))
    page = encode(lines, [float(i) for i in range(20_000)], names=names).split(b"\n")
    assert page[1:-1] == [b'x{actor="room-%d"} %d' % (i, i) for i in range(20_000)]


BAD_CALLS: list[tuple[type[Exception], tuple[object, ...]]] = [
    (ValueError, (b"", (b"",), (), ("a",), array("d", [1]), -1, 1)),
    (ValueError, (b"", (b"",), (b"",), ("a",), array("d", [1, 2]), -1, 1)),
    (ValueError, (b"", (b"",), (b"",), ("a",), array("d", [1]), 0, 2)),
    (ValueError, (b"", (b"",) * 3, (b"",) * 3, ("a",), array("d", [1, 2]), 0, 1)),
    (ValueError, (b"", (b"",), (b"",), ("a",), array("d", [1]), -1, 0)),
    (ValueError, (b"", (b"",), (b"",), (), array("d", [1]), -1, 1)),
    (UnicodeEncodeError, (b"", (b"",), (b"",), ("\ud800",), array("d", [1]), -1, 1)),
]


@pytest.mark.parametrize(("error", "arguments"), BAD_CALLS)
def test_what_does_not_fit_together_is_refused(
    lines: Any, error: type[Exception], arguments: tuple[object, ...]
) -> None:
    with pytest.raises(error):
        lines.encode(*arguments)


GOOD: tuple[object, ...] = (b"", (b"",), (b"",), ("a",), array("d", [1]), -1, 1, ())
WRONG: list[object] = [
    None,
    7,
    "text",
    b"bytes",
    (1,),
    (None,),
    [],
    array("f", [1]),
    memoryview(b"12345678"),
    object(),
    ((1,),),
]


@without_build
@pytest.mark.parametrize("place", range(len(GOOD)))
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_arguments_of_wrong_types_raise_and_nothing_else(place: int, wrong: object) -> None:
    assert native is not None
    arguments = (*GOOD[:place], wrong, *GOOD[place + 1 :])
    if place == 0 and isinstance(wrong, bytes):
        assert native.encode(*arguments) == b"bytesa1\n"
    else:
        with pytest.raises((TypeError, ValueError)):
            native.encode(*arguments)


@without_build
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        GOOD[:6],
        (*GOOD, 1),
        (*GOOD[:5], 2**70, 1),
        (*GOOD[:5], 2**62, 2**62 + 2),
        (*GOOD[:7], ((2, b""), (1, b""))),
        (*GOOD[:7], ((-1, b""),)),
        (*GOOD[:7], ((2**70, b""),)),
        (*GOOD[:3], ("a", "b"), memoryview(array("d", [1, 2, 3, 4]))[::2], -1, 1),
        (*GOOD[:4], memoryview(array("d", [1])).cast("B").cast("d", (1, 1)), -1, 1),
    ],
)
def test_hostile_arguments_raise_and_nothing_else(arguments: tuple[object, ...]) -> None:
    assert native is not None
    with pytest.raises((TypeError, ValueError, OverflowError, BufferError)):
        native.encode(*arguments)


@without_build
def test_numbers_that_are_not_aligned_are_read_all_the_same() -> None:
    assert native is not None
    shifted = memoryview(b"x" + struct.pack("=2d", 1.5, 2.5))[1:].cast("d")
    assert native.encode(b"", (b"",), (b" ",), ("a", "b"), shifted, -1, 1) == b"a 1.5\nb 2.5\n"


@without_build
def test_a_racing_writer_makes_wrong_numbers_and_no_more() -> None:
    """The contract says immutable; if it is broken, memory stays whole."""
    assert native is not None
    values = array("d", [1.0] * 20_000)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for position in range(0, len(values), 7):
                values[position] = UNSET if values[position] == 1.0 else 1.0

    racer = threading.Thread(target=write)
    racer.start()
    try:
        for _ in range(50):
            page = native.encode(b"", (b"x ",), (b"",), ("",) * len(values), values, -1, 1)
            assert set(page.split(b"\n")) <= {b"x 1", b"x NaN", b""}
    finally:
        stop.set()
        racer.join()


@without_build
@settings(deadline=None)
@given(own_families())
def test_both_twins_write_the_same_bytes(families: tuple[MetricFamily, ...]) -> None:
    assert native is not None
    for family in families:
        kept = pieces(family.shape)
        arguments = (
            b"head\n",
            kept.pres,
            kept.posts,
            family.actor_names,
            family.values,
            kept.bounds,
            family.shape.width,
        )
        marked = tuple((at, b" # %d" % at) for at in sorted(family.exemplars))
        for with_tails in ((), tails(family), marked):
            assert native.encode(*arguments, with_tails) == _lines_py.encode(*arguments, with_tails)


@without_build
@given(st.floats())
def test_both_twins_write_the_same_number(value: float) -> None:
    assert native is not None
    assert native.number(value) == _lines_py.number(value)


@without_build
def test_both_twins_have_the_same_names() -> None:
    assert native is not None
    assert native.__all__ == _lines_py.__all__ == ["encode", "number"]
    assert _lines_py.__name__ != native.__name__


LEAKS = """
import gc, sys, tracemalloc
from array import array
from rkmetrics import _lines
names = ("plain", 'quo"ted', "Zürich", "new\\nline")
family = (b"head", (b"p",) * 4, (b"q",) * 4, names, array("d", range(12)), 1, 3, ((0, b"t"), (1, b"u")))
bad = (None, (None,), ("\\ud800",), ((0, None),), 2**70)
wrong = [(*family[:k], each, *family[k + 1:]) for k in range(8) for each in bad]
def work():
    _lines.encode(*family)
    _lines.number(1.5)
    for arguments in wrong:
        try:
            _lines.encode(*arguments)
        except (TypeError, ValueError, OverflowError):
            pass
for _ in range(100):
    work()
held = [sys.getrefcount(each) for part in family for each in ([part, *part] if isinstance(part, tuple) else [part])]
gc.collect()
tracemalloc.start()
before = tracemalloc.get_traced_memory()[0]
for _ in range(2000):
    work()
gc.collect()
grown = tracemalloc.get_traced_memory()[0] - before
after = [sys.getrefcount(each) for part in family for each in ([part, *part] if isinstance(part, tuple) else [part])]
assert after == held, (held, after)
assert grown < 4000, grown
"""


@without_build
def test_nothing_leaks_whether_it_works_or_raises() -> None:
    """A process of its own, so that nothing else moves the figures."""
    result = subprocess.run([sys.executable, "-c", LEAKS], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_the_table_of_powers_is_what_its_script_writes() -> None:
    root = Path(__file__).parents[2]
    script = root / "tools" / "pow10.py"
    if not script.exists():
        pytest.skip("not in a source tree")
    made = subprocess.run([sys.executable, script], capture_output=True, timeout=60, check=True).stdout
    assert made == (root / "rkmetrics" / "_pow10.h").read_bytes()
