"""Every allocation of the extensions fails once: what comes is a MemoryError, never a crash and never a lost number.

CPython's own test module makes the n-th allocation fail. Each operation runs in a child of its own kind: a crash
there is an exit code here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("_testcapi", reason="this Python has no _testcapi")
pytest.importorskip("rkmetrics._cells", reason="the extension is not built")

ROOT = Path(__file__).parents[2]

SETUP = """
import faulthandler, struct, sys
faulthandler.enable()
import _testcapi
from rkmetrics import _cells as c, _lines, model
UNSET = model.UNSET_BYTES
bounds = c.Bounds((0.1, 1.0), True)
block = c.Block(bytearray(UNSET * 400), lambda *offered: None)
counter, gauge, histogram = c.Counter(block, 0), c.Gauge(block, 1), c.Histogram(block, 2, bounds)
share = gauge.share()
labels = {"actor_id": "x"}
buffer, many = bytearray(80), tuple([block] * 20)
pres, names, posts = (b"x_total{a=\\"",), ("one", "two") * 500, (b"\\"} ",)
values = memoryview(struct.pack("=1000d", *[0.1 * i for i in range(1000)])).cast("d")
"""

OPERATIONS = {
    "block": "c.Block(buffer)",
    "bounds": "c.Bounds((0.1, 1.0, 10.0))",
    "counter": "c.Counter(block, 0)",
    "gauge": "c.Gauge(block, 1)",
    "histogram": "c.Histogram(block, 2, bounds)",
    "inc": "counter.inc(2.5, exemplar=labels)",
    "inc refused": "counter.inc(-1.0)",
    "inc wrong": "counter.inc(by=1)",
    "set": "gauge.set(7)",
    "share": "gauge.share().set(3)",
    "observe": "histogram.observe(0.5, exemplar=labels)",
    "observe refused": "histogram.observe(-0.5)",
    "counts": "(histogram.counts, histogram.count, histogram.sum, counter.value, gauge.value)",
    "existing": "c.existing(many, 0, 300, 3)",
    "gather": "c.gather(many, 0, 300)",
    "gather refused": "c.gather(many, 0, 500)",
    "lines": "_lines.encode(b'# head', pres, posts, names, values, -1, 1)",
    "lines refused": "_lines.encode(b'', pres, posts, names, values, 3, 5)",
    "number": "_lines.number(0.1)",
}

PROGRAM = """
operation = compile({operation!r}, "operation", "eval")
failed = 0
for n in range(200):
    _testcapi.set_nomemory(n, n + 1)
    try:
        eval(operation)
    except MemoryError:
        failed += 1
    except (ValueError, TypeError, IndexError):
        pass
    finally:
        _testcapi.remove_mem_hooks()
before = counter.value
counter.inc()
assert counter.value == before + 1
share.set(1)
assert histogram.count == histogram.counts[0] + histogram.counts[1] + histogram.counts[2]
print("survived", failed)

"""


ALLOCATE_NOTHING = {"set"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_allocation_that_fails_is_a_memory_error_and_no_more(name: str) -> None:
    source = textwrap.dedent(SETUP) + textwrap.dedent(PROGRAM.format(operation=OPERATIONS[name]))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    word, failed = done.stdout.split()
    assert word == "survived"
    assert name in ALLOCATE_NOTHING or int(failed) > 0  # else this test would look away
