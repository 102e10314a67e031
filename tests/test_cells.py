"""Both twins of the cells, under one suite; and that any sequence of operations leaves them alike."""

from __future__ import annotations

import gc
import importlib
import math
import struct
import sys
import threading
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkmetrics import _cells_py, model
from rkmetrics.cells import HistogramCell, Timer
from rkmetrics.native import twin

try:
    native: Any = importlib.import_module("rkmetrics._cells")
except ImportError:
    native = None

TWINS = [pytest.param(_cells_py, id="python")]
TWINS.append(
    pytest.param(native, id="c", marks=pytest.mark.skipif(native is None, reason="the extension is not built"))
)

UNSET = model.UNSET_BYTES


@pytest.fixture(params=TWINS)
def cells(request: pytest.FixtureRequest) -> Any:
    return request.param


def block(cells: Any, size: int = 1, start: bytes = UNSET, **kwargs: Any) -> Any:
    return cells.Block(bytearray(start * size), **kwargs)


class Floaty:
    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return float(self.value)


class TestCounter:
    def test_starts_its_series_at_zero(self, cells: Any) -> None:
        b = block(cells)
        counter = cells.Counter(b, 0)
        assert counter.value == 0.0
        assert cells.gather([b], 0, 1) == struct.pack("=d", 0.0)

    def test_keeps_what_was_counted_before_it(self, cells: Any) -> None:
        b = block(cells, start=struct.pack("=d", 7.0))
        assert cells.Counter(b, 0).value == 7.0

    @pytest.mark.parametrize(
        ("args", "kwargs", "value"),
        [
            ((), {}, 1.0),
            ((2,), {}, 2.0),
            ((0.5,), {}, 0.5),
            ((), {"amount": 3}, 3.0),
            ((True,), {}, 1.0),
            ((Floaty(4),), {}, 4.0),
        ],
    )
    def test_adds_any_real_number_of_zero_or_more(self, cells: Any, args: Any, kwargs: Any, value: float) -> None:
        counter = cells.Counter(block(cells), 0)
        counter.inc(*args, **kwargs)
        assert counter.value == value

    @pytest.mark.parametrize("amount", [-1, -0.001, math.nan, math.inf, -math.inf])
    def test_refuses_what_is_not_finite_or_falls_and_counts_nothing(self, cells: Any, amount: float) -> None:
        counter = cells.Counter(block(cells), 0)
        counter.inc(5)
        with pytest.raises(ValueError, match=r"inc\(.*\): expected a finite amount of 0 or more .*nothing was counted"):
            counter.inc(amount)
        assert counter.value == 5.0

    @pytest.mark.parametrize(
        ("args", "kwargs"), [(("x",), {}), ((None,), {}), ((1, 2), {}), ((), {"by": 2}), ((1,), {"amount": 2})]
    )
    def test_refuses_wrong_arguments(self, cells: Any, args: Any, kwargs: Any) -> None:
        counter = cells.Counter(block(cells), 0)
        with pytest.raises((TypeError, ValueError)):
            counter.inc(*args, **kwargs)
        assert counter.value == 0.0

    def test_a_number_that_raises_counts_nothing(self, cells: Any) -> None:
        class Broken:
            def __float__(self) -> float:
                raise OSError("no number")

        counter = cells.Counter(block(cells), 0)
        with pytest.raises(OSError, match="no number"):
            counter.inc(Broken())
        assert counter.value == 0.0

    def test_a_number_that_counts_while_it_is_read_loses_nothing(self, cells: Any) -> None:
        counter = cells.Counter(block(cells), 0)

        class Reentrant:
            def __float__(self) -> float:
                counter.inc(10)
                return 1.0

        counter.inc(Reentrant())
        assert counter.value == 11.0

    def test_hands_exemplars_on_with_place_and_value(self, cells: Any) -> None:
        seen: list[tuple[int, float, Any]] = []
        counter = cells.Counter(block(cells, 3, offer=lambda *offered: seen.append(offered)), 2)
        counter.inc(exemplar={"actor_id": "a"})
        counter.inc(2, exemplar={"actor_id": "b"})
        counter.inc(3, exemplar=None)
        assert seen == [(2, 1.0, {"actor_id": "a"}), (2, 2.0, {"actor_id": "b"})]
        assert counter.value == 6.0

    def test_counts_even_if_the_exemplar_fails(self, cells: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        reported: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", reported.append)

        def fail(*offered: Any) -> None:
            raise RuntimeError("full")

        counter = cells.Counter(block(cells, offer=fail), 0)
        counter.inc(exemplar={"actor_id": "a"})
        assert counter.value == 1.0
        assert [str(report.exc_value) for report in reported] == ["full"]

    def test_does_not_keep_what_a_signal_handler_raises_meanwhile(self, cells: Any) -> None:
        def interrupted(*offered: Any) -> None:
            raise KeyboardInterrupt

        counter = cells.Counter(block(cells, offer=interrupted), 0)
        with pytest.raises(KeyboardInterrupt):
            counter.inc(exemplar={"actor_id": "a"})
        assert counter.value == 1.0


class TestGauge:
    def test_is_unset_until_it_is_updated_and_again_after_clear(self, cells: Any) -> None:
        gauge = cells.Gauge(block(cells), 0)
        seen = [gauge.value]
        for update in (gauge.inc, gauge.clear, gauge.dec):
            update()
            seen.append(gauge.value)
        assert seen == [None, 1.0, None, -1.0]

    @pytest.mark.parametrize("value", [0.0, -1.5, math.inf, -math.inf, 1e308, 5e-324])
    def test_takes_any_number(self, cells: Any, value: float) -> None:
        gauge = cells.Gauge(block(cells), 0)
        gauge.set(value)
        assert gauge.value == value

    def test_a_users_nan_is_a_value_whatever_its_bits(self, cells: Any) -> None:
        b = block(cells)
        gauge = cells.Gauge(b, 0)
        gauge.set(model.UNSET)  # the very bits that mean "unset"
        assert gauge.value is not None
        assert math.isnan(gauge.value)
        gauge.inc(1)
        assert math.isnan(gauge.value)
        assert cells.gather([b], 0, 1) == struct.pack("=d", math.nan)

    def test_infinities_that_cancel_out_are_a_nan_and_not_unset(self, cells: Any) -> None:
        gauge = cells.Gauge(block(cells), 0)
        gauge.set(math.inf)
        gauge.dec(math.inf)
        assert gauge.value is not None
        assert math.isnan(gauge.value)


class TestPeak:
    def region(self, cells: Any, slot_seconds: float) -> bytes:
        return struct.pack(f"={cells.PEAK_REGION}d", slot_seconds, *[-1.0] * (cells.PEAK_REGION - 1))

    def read(self, cells: Any, b: Any, now: float) -> float:
        (value,) = struct.unpack("=d", cells.peaks([b], 0, 1, now))
        return float(value)

    def test_shows_what_rose_and_fell_between_two_readings(self, cells: Any) -> None:
        import time

        b = cells.Block(bytearray(UNSET + self.region(cells, 15.0)))
        gauge = cells.Gauge(b, 0, 1)
        assert model.is_unset(self.read(cells, b, time.monotonic()))
        for _ in range(7):
            gauge.inc()
        gauge.dec(7)
        now = time.monotonic()
        assert self.read(cells, b, now) == 7.0
        assert self.read(cells, b, now + 119.0) == 7.0
        assert self.read(cells, b, now + 15.0 * 10) == 0.0

    def test_counts_what_was_in_force_until_it_changed(self, cells: Any) -> None:
        import time

        b = cells.Block(bytearray(struct.pack("=d", 5.0) + self.region(cells, 15.0)))
        gauge = cells.Gauge(b, 0, 1)
        now = time.monotonic()
        assert self.read(cells, b, now) == 5.0
        gauge.set(1.0)
        assert self.read(cells, b, time.monotonic()) == 5.0

    def test_leaves_memory_alone_that_was_spoiled(self, cells: Any) -> None:
        for seconds in (0.0, -1_000_003.0, math.nan, math.inf, 5e-324):
            buffer = bytearray(UNSET + self.region(cells, 15.0))
            b = cells.Block(buffer)
            gauge = cells.Gauge(b, 0, 1)
            buffer[8:16] = struct.pack("=d", seconds)
            gauge.set(7)
            gauge.inc()
            assert self.read(cells, b, 1e6) == 8.0

    def test_ignores_a_nan(self, cells: Any) -> None:
        import time

        b = cells.Block(bytearray(UNSET + self.region(cells, 15.0)))
        gauge = cells.Gauge(b, 0, 1)
        gauge.set(5)
        gauge.set(math.nan)
        gauge.set(1)
        assert self.read(cells, b, time.monotonic()) == 5.0

    def test_refuses_a_region_without_a_slot_length(self, cells: Any) -> None:
        with pytest.raises(ValueError, match="seconds of a slot"):
            cells.Gauge(cells.Block(bytearray(8 * (1 + cells.PEAK_REGION))), 0, 1)
        with pytest.raises(IndexError):
            cells.Gauge(cells.Block(bytearray(8 * cells.PEAK_REGION)), 0, 1)


class TestGaugeShare:
    def test_adds_its_part_and_takes_it_back_once(self, cells: Any) -> None:
        gauge = cells.Gauge(block(cells), 0)
        first, second = gauge.share(), gauge.share()
        first.set(3)
        second.inc(2)
        second.dec(1)
        assert (first.value, second.value, gauge.value) == (3.0, 1.0, 4.0)
        assert first.close() is True
        assert first.close() is False
        assert gauge.value == 1.0
        assert (first.closed, second.closed) == (True, False)

    def test_ignores_updates_after_the_end(self, cells: Any) -> None:
        gauge = cells.Gauge(block(cells), 0)
        share = gauge.share()
        share.set(1)
        share.close()
        share.set(9)
        share.inc()
        share.dec()
        assert gauge.value == 0.0

    def test_is_withdrawn_when_nobody_holds_it(self, cells: Any) -> None:
        gauge = cells.Gauge(block(cells), 0)
        share = gauge.share()
        share.set(5)
        del share
        assert gauge.value == 0.0

    def test_is_withdrawn_when_a_cycle_that_holds_it_is_collected(self, cells: Any) -> None:
        class Actor:
            def __init__(self) -> None:
                self.me = self
                self.share = gauge.share()
                self.share.inc()

        gauge = cells.Gauge(block(cells), 0)
        for _ in range(10):
            Actor()
        gc.collect()
        assert gauge.value == 0.0

    @pytest.mark.parametrize("part", [math.nan, math.inf, -math.inf])
    def test_refuses_parts_that_could_never_be_withdrawn(self, cells: Any, part: float) -> None:
        share = cells.Gauge(block(cells), 0).share()
        for change in (share.set, share.inc, share.dec):
            with pytest.raises(ValueError, match="finite number"):
                change(part)
        assert share.value == 0.0

    def test_needs_a_gauge(self, cells: Any) -> None:
        if cells is not native:
            pytest.skip("the twin's types are not checked")
        with pytest.raises(TypeError):
            cells.GaugeShare(object())


def histogram(cells: Any, bounds: tuple[float, ...] = (0.1, 1.0, 10.0), native: bool = False) -> tuple[Any, Any]:
    """A histogram over memory full of rubbish, and the block it lives in."""
    made = cells.Bounds(bounds, native)
    memory = cells.Block(bytearray(UNSET + b"\1" * 8 * (made.width - 1)))
    return cells.Histogram(memory, 0, made), memory


class TestHistogram:
    def test_starts_all_its_numbers_at_zero(self, cells: Any) -> None:
        h, _ = histogram(cells)
        assert (h.counts, h.count, h.sum) == ((0, 0, 0, 0), 0, 0.0)

    @pytest.mark.parametrize(
        ("value", "bucket"),
        [(0.0, 0), (0.1, 0), (0.1000001, 1), (1, 1), (9.9, 2), (10.0, 2), (10.1, 3), (1e300, 3), (True, 1)],
    )
    def test_a_bucket_includes_its_upper_bound(self, cells: Any, value: float, bucket: int) -> None:
        h, _ = histogram(cells)
        h.observe(value)
        assert h.counts == tuple(int(i == bucket) for i in range(4))
        assert h.sum == float(value)

    @pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
    def test_refuses_what_would_break_the_sum(self, cells: Any, value: float) -> None:
        h, _ = histogram(cells)
        with pytest.raises(ValueError, match=r"observe\(.*\): expected .*nothing was counted"):
            h.observe(value)
        assert (h.count, h.sum) == (0, 0.0)

    @pytest.mark.parametrize(
        ("args", "kwargs"), [((), {}), (("x",), {}), ((1, 2), {}), ((1,), {"value": 1}), ((), {"seconds": 1})]
    )
    def test_refuses_wrong_arguments(self, cells: Any, args: Any, kwargs: Any) -> None:
        h, _ = histogram(cells)
        with pytest.raises((TypeError, ValueError)):
            h.observe(*args, **kwargs)
        assert h.count == 0

    def test_takes_negative_values_where_a_bound_is_negative(self, cells: Any) -> None:
        h, _ = histogram(cells, (-10.0, 0.0, 10.0))
        h.observe(-3)
        assert (h.counts, h.sum) == ((0, 1, 0, 0), -3.0)

    def test_names_the_bucket_of_an_exemplar(self, cells: Any) -> None:
        seen: list[tuple[int, float, Any]] = []
        memory = cells.Block(bytearray(UNSET * 9), lambda *offered: seen.append(offered))
        h = cells.Histogram(memory, 3, cells.Bounds((1.0, 2.0)))
        h.observe(1.5, exemplar={"trace_id": "t"})
        assert seen == [(4, 1.5, {"trace_id": "t"})]

    @pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 1.0), (math.inf,), (math.nan,), ("x",)])
    def test_bounds_are_finite_and_increase(self, cells: Any, bounds: Any) -> None:
        with pytest.raises((ValueError, TypeError)):
            cells.Bounds(bounds)

    @pytest.mark.parametrize("cells", TWINS)
    @given(
        value=st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)
        | st.integers(-170, 170).map(lambda i: 2 ** (i / 8))
    )
    @settings(max_examples=300, deadline=None)
    def test_native_buckets_hold_what_their_bounds_say(self, cells: Any, value: float) -> None:
        h, memory = histogram(cells, (1.0,), native=True)
        h.observe(value)
        zero, *buckets = struct.unpack(f"={len(memory)}d", cells.gather([memory], 0, len(memory)))[3:]
        index = [model.NATIVE_MIN_INDEX + i for i, count in enumerate(buckets) if count]
        if value <= model.NATIVE_ZERO_THRESHOLD:
            assert (zero, index) == (1.0, [])
            return
        assert (zero, len(index)) == (0.0, 1)
        assert value >= 2 ** ((index[0] - 1) / 8) * (1 - 1e-15)
        assert index[0] == model.NATIVE_MAX_INDEX or value <= 2 ** (index[0] / 8) * (1 + 1e-15)


class TestBlock:
    def test_refuses_memory_that_cells_cannot_use(self, cells: Any) -> None:
        with pytest.raises(BufferError):
            cells.Block(b"x" * 8)
        with pytest.raises(ValueError, match="multiple of 8"):
            cells.Block(bytearray(12))
        with pytest.raises(TypeError):
            cells.Block(7)

    @pytest.mark.parametrize("offset", [-1, 2, 10**18])
    def test_cells_lie_inside_it(self, cells: Any, offset: int) -> None:
        b = block(cells, 2)
        makers: list[Any] = [lambda: cells.Counter(b, offset), lambda: cells.Gauge(b, offset)]
        makers.append(lambda: cells.Histogram(b, offset, cells.Bounds((1.0,))))
        for make in makers:
            with pytest.raises(IndexError):
                make()
        with pytest.raises(IndexError):
            cells.gather([b], 0, 3)
        with pytest.raises(IndexError):
            b[2]

    def test_outlives_the_buffer_that_it_was_given(self, cells: Any) -> None:
        buffer = bytearray(8)
        counter = cells.Counter(cells.Block(buffer), 0)
        with pytest.raises(BufferError):
            buffer.extend(b"x" * 4096)  # a moved buffer would leave the cell nowhere
        del buffer
        counter.inc(3)
        assert counter.value == 3.0

    def test_gathers_the_same_slice_of_each_block(self, cells: Any) -> None:
        blocks = [cells.Block(bytearray(struct.pack("=3d", i, i + 0.5, -i))) for i in range(4)]
        assert struct.unpack("=8d", cells.gather(blocks, 1, 2)) == (0.5, -0.0, 1.5, -1, 2.5, -2, 3.5, -3)
        assert cells.gather([], 5, 5) == b""
        with pytest.raises(ValueError, match="0 or more"):
            cells.gather(blocks, -1, 2)

    def test_counts_the_series_that_exist(self, cells: Any) -> None:
        zero = struct.pack("=d", 0.0)
        blocks = [cells.Block(bytearray(UNSET + zero * 2 + zero * 3 + UNSET * 3)), cells.Block(bytearray(zero * 9))]
        assert cells.existing(blocks, 0, 9, 3) == 1 + 3
        assert cells.existing(blocks, 3, 3, 1) == 6
        assert cells.existing([], 0, 9, 3) == cells.existing(blocks, 0, 0, 3) == 0
        for wrong in ((blocks, -1, 3, 3), (blocks, 0, 3, 0)):
            with pytest.raises(ValueError, match="or more"):
                cells.existing(*wrong)
        with pytest.raises(IndexError):
            cells.existing(blocks, 0, 10, 1)

    def test_a_cycle_through_its_offer_is_collected(self, cells: Any) -> None:
        import weakref

        class Offer:
            def __call__(self, *offered: Any) -> None: ...

        offer = Offer()
        offer.block = block(cells, offer=offer)  # type: ignore[attr-defined]
        gone = weakref.ref(offer)
        del offer
        gc.collect()
        assert gone() is None


operations = st.lists(
    st.one_of(
        st.tuples(st.just("inc"), st.floats(allow_nan=True, allow_infinity=True) | st.integers(-5, 10**6)),
        st.tuples(st.just("g.inc"), st.floats(-1e9, 1e9)),
        st.tuples(st.just("g.set"), st.floats()),
        st.tuples(st.just("g.clear"), st.none()),
        st.tuples(st.just("share"), st.none()),
        st.tuples(st.just("share.set"), st.floats()),
        st.tuples(st.just("share.inc"), st.floats(-100, 100)),
        st.tuples(st.just("share.close"), st.none()),
        st.tuples(st.just("share.drop"), st.none()),
        st.tuples(st.just("observe"), st.floats() | st.integers(-3, 100)),
    ),
    max_size=40,
)


class World:
    """A counter, a gauge with shares and a native histogram in one block, of one twin."""

    def __init__(self, cells: Any) -> None:
        bounds = cells.Bounds((0.1, 1.0, 10.0), True)
        self.cells, self.width = cells, 2 + bounds.width
        self.block = cells.Block(bytearray(UNSET * self.width))
        self.counter, self.gauge = cells.Counter(self.block, 0), cells.Gauge(self.block, 1)
        self.histogram = cells.Histogram(self.block, 2, bounds)
        self.shares: list[Any] = [self.gauge.share()]

    def apply(self, name: str, value: Any) -> str:
        calls = {
            "inc": self.counter.inc,
            "g.inc": self.gauge.inc,
            "g.set": self.gauge.set,
            "g.clear": lambda _: self.gauge.clear(),
            "share": lambda _: self.shares.append(self.gauge.share()),
            "share.set": self.shares[-1].set,
            "share.inc": self.shares[-1].inc,
            "share.close": lambda _: self.shares[-1].close(),
            "share.drop": lambda _: self.shares.__setitem__(-1, self.gauge.share()),
            "observe": self.histogram.observe,
        }
        try:
            return repr(calls[name](value))
        except (ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    def snapshot(self) -> bytes:
        return bytes(self.cells.gather([self.block], 0, self.width))


@pytest.mark.skipif(native is None, reason="the extension is not built")
@given(operations)
@settings(max_examples=300, deadline=None)
def test_any_sequence_of_operations_leaves_both_twins_alike(sequence: list[tuple[str, Any]]) -> None:
    worlds = World(_cells_py), World(native)
    for name, value in sequence:
        answers = [world.apply(name, value) for world in worlds]
        assert answers[0] == answers[1]
    assert worlds[0].snapshot() == worlds[1].snapshot()


class TestThreads:
    def test_sums_are_exact(self, cells: Any) -> None:
        b = block(cells, 3)
        counter, gauge = cells.Counter(b, 0), cells.Gauge(b, 1)
        h, _ = histogram(cells)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=self.work, args=(counter, gauge, h)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert (counter.value, gauge.value, h.count, h.sum) == (40_000.0, 0.0, 40_000, 20_000.0)

    def test_the_first_updates_of_a_place_race_and_lose_nothing(self, cells: Any) -> None:
        def first(start: threading.Barrier, make: Any, update: Any) -> None:
            start.wait()
            update(make())

        bounds = cells.Bounds((1.0, 2.0))
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(150):
                b, start = block(cells, 6), threading.Barrier(4)
                cases: list[tuple[Any, Any]] = [
                    (lambda b=b: cells.Counter(b, 0), lambda cell: cell.inc(1)),
                    (lambda b=b: cells.Gauge(b, 1), lambda cell: cell.inc(1)),
                    (lambda b=b: cells.Histogram(b, 2, bounds), lambda cell: cell.observe(0.5)),
                ]
                for make, update in cases:
                    threads = [threading.Thread(target=first, args=(start, make, update)) for _ in range(4)]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                assert (b[0], b[1], b[2], b[5]) == (4.0, 4.0, 4.0, 2.0)
        finally:
            sys.setswitchinterval(interval)

    def test_a_share_that_several_threads_use_comes_out_even(self, cells: Any) -> None:
        gauge = cells.Gauge(block(cells), 0)
        share = gauge.share()

        def work() -> None:
            for _ in range(5_000):
                share.inc(3)
                share.dec(3)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert (share.value, gauge.value) == (0.0, 0.0)

    @staticmethod
    def work(counter: Any, gauge: Any, h: Any) -> None:
        for _ in range(5_000):
            counter.inc()
            gauge.inc(2)
            h.observe(0.5)
            share = gauge.share()
            share.set(3)
            share.close()
            gauge.dec(2)


@pytest.mark.skipif(native is None, reason="the extension is not built")
class TestReferences:
    """The extension keeps reference counts and memory: what is made is freed."""

    def churn(self) -> None:
        cells: Any = native
        bounds = cells.Bounds((0.1, 1.0))
        offers: list[Any] = []
        b = cells.Block(bytearray(UNSET * 8), lambda *offered: offers.append(offered))
        counter, gauge, h = cells.Counter(b, 0), cells.Gauge(b, 1), cells.Histogram(b, 2, bounds)
        labels = {"actor_id": "x"}
        for amount in (1, 2.5, Floaty(3)):
            counter.inc(amount, exemplar=labels)
            counter.inc(amount=amount)
            gauge.set(amount)
            gauge.inc(amount)
            gauge.dec(amount=amount)
            h.observe(amount, exemplar=labels)
            h.observe(value=amount)
        share = gauge.share()
        share.set(2)
        share.inc()
        share.dec(amount=2)
        share.close()
        gauge.share().set(1)
        wrongs: list[Any] = [
            lambda: counter.inc(-1),
            lambda: counter.inc("x"),
            lambda: h.observe(-1),
            lambda: counter.inc(by=1),
        ]
        for wrong in wrongs:
            with pytest.raises((ValueError, TypeError)):
                wrong()
        bads: list[Any] = [
            lambda: cells.Counter(b, 99),
            lambda: cells.gather([1], 0, 1),
            lambda: cells.Bounds((2.0, 1.0)),
        ]
        for bad in bads:
            with pytest.raises((IndexError, TypeError, ValueError)):
                bad()
        cells.gather([b, b], 0, 8)
        assert (counter.value, gauge.value, h.counts, h.count, h.sum) is not None

    def test_allocated_blocks_do_not_grow(self) -> None:
        for _ in range(50):
            self.churn()
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(200):
            self.churn()
        gc.collect()
        assert sys.getallocatedblocks() - before < 100

    def test_a_cell_keeps_its_block_and_lets_it_go(self) -> None:
        cells: Any = native
        b = block(cells, 4)
        before = sys.getrefcount(b)
        made = [cells.Counter(b, 0), cells.Gauge(b, 1), cells.Histogram(b, 0, cells.Bounds((1.0,)))]
        assert sys.getrefcount(b) == before + 3
        del made
        assert sys.getrefcount(b) == before

    def test_counters_cost_little(self) -> None:
        cells: Any = native
        b = block(cells)
        assert sys.getsizeof(cells.Counter(b, 0)) <= 32
        assert sys.getsizeof(cells.Gauge(b, 0)) <= 40
        assert not gc.is_tracked(cells.Counter(b, 0))


class TestTimer:
    def test_the_cell_is_the_native_object_itself(self) -> None:
        """A class derived from it would keep CPython from calling observe() the fast way: a third of its time."""
        assert type(self.cell()) is HistogramCell is twin("cells").Histogram

    def cell(self) -> HistogramCell:
        from rkmetrics import cells

        bounds = cells.Bounds((0.5, 60.0))
        return HistogramCell(cells.Block(bytearray(UNSET * 8)), 0, bounds)

    def test_times_a_block_and_also_one_that_raises(self) -> None:
        cell = self.cell()
        with cell.time():
            pass
        with pytest.raises(KeyError):
            with cell.time():
                raise KeyError
        assert cell.count == 2
        assert 0 < cell.sum < 60

    def test_times_each_call_of_a_function_also_recursive_ones(self) -> None:
        cell = self.cell()

        @cell.time()
        def down(n: int) -> int:
            """Count down."""
            return down(n - 1) if n else 0

        assert down(3) == 0
        assert cell.count == 4
        assert (down.__name__, down.__doc__) == ("down", "Count down.")

    async def test_times_coroutines_over_their_whole_run(self) -> None:
        import asyncio

        cell = self.cell()

        @cell.time()
        async def wait(seconds: float) -> str:
            await asyncio.sleep(seconds)
            return "done"

        assert list(await asyncio.gather(wait(0.01), wait(0.02))) == ["done", "done"]
        async with cell.time() as timer:
            assert isinstance(timer, Timer)
        assert cell.count == 3
        assert cell.sum >= 0.03

    async def test_times_generators_from_the_first_item_to_the_last(self) -> None:
        import asyncio
        import time

        cell = self.cell()

        @cell.time()
        def items() -> Generator[int, int]:
            yield 1
            time.sleep(0.01)
            got = yield 2
            yield got

        @cell.time()
        async def stream() -> AsyncGenerator[int, int]:
            got = yield 1
            await asyncio.sleep(0.01)
            yield got

        made = items()
        assert [next(made), next(made), made.send(7)] == [1, 2, 7]
        assert list(made) == []
        tokens = stream()
        assert [await anext(tokens), await tokens.asend(5)] == [1, 5]
        await tokens.aclose()
        assert cell.count == 2
        assert cell.sum >= 0.02

    async def test_counts_a_cancelled_coroutine(self) -> None:
        import asyncio

        cell = self.cell()

        @cell.time()
        async def forever() -> None:
            await asyncio.Event().wait()

        task = asyncio.create_task(forever())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cell.count == 1
