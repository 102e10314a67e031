"""The index: what events do to it, against a naive model; memory, depth, bounds and threads."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, product
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakSet

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rkmetrics as rk
from rkmetrics.catalogue.kv import IndexOutcome, KvIndexing
from rkmetrics.errors import KvValueError
from rkmetrics.kv import index as index_module
from rkmetrics.kv.base import WorkerKey
from rkmetrics.kv.events import Cleared, KvEvent, Removed, RouterEvent, Stored, StoredBlock, encode_event, stored
from rkmetrics.kv.index import KvIndex

APPLIED, ORPHAN, UNKNOWN, REFUSED = (
    IndexOutcome.APPLIED,
    IndexOutcome.ORPHAN,
    IndexOutcome.UNKNOWN_BLOCK,
    IndexOutcome.REFUSED,
)
A, B, C = 11, 12, 13  # tokens hashes


def event(worker: int, data: Stored | Removed | Cleared, rank: int = 0) -> RouterEvent:
    return RouterEvent(worker, KvEvent(0, data, rank))


def store(worker: int, blocks: dict[int, int], parent: int | None = None, rank: int = 0) -> RouterEvent:
    """blocks: the engine's hash to the tokens hash."""
    return event(worker, Stored(tuple(StoredBlock(*block) for block in blocks.items()), parent), rank)


def remove(worker: int, *hashes: int, rank: int = 0) -> RouterEvent:
    return event(worker, Removed(hashes), rank)


def fed(*events: RouterEvent, **kwargs: Any) -> KvIndex:
    index = KvIndex(**kwargs)
    for each in events:
        assert index.apply(each) is APPLIED
    return index


def scores(index: KvIndex, *hashes: int, early_exit: bool = False) -> dict[int, int]:
    """By worker id, of rank 0."""
    return {key.worker_id: blocks for key, blocks in index.find_matches(hashes, early_exit=early_exit).items()}


# --- what events do ---------------------------------------------------------------------------------------------------


def test_a_worker_scores_the_blocks_it_holds_from_the_first_on() -> None:
    index = fed(store(1, {1: A, 2: B, 3: C}), store(2, {21: A, 22: B}))
    assert scores(index, A, B, C) == {1: 3, 2: 2}
    assert scores(index, A, B) == {1: 2, 2: 2}
    assert scores(index, A, C) == {1: 1, 2: 1}
    assert scores(index, B) == {} == scores(index)


def test_blocks_follow_their_parent() -> None:
    index = fed(store(1, {1: A}), store(1, {2: B, 3: C}, parent=1))
    assert scores(index, A, B, C) == {1: 3}
    index.apply(store(1, {4: C}, parent=2))
    assert scores(index, A, B, C) == {1: 3}, "two hashes of the same tokens are one block"


def test_a_parent_is_known_by_the_hash_of_the_same_worker_and_rank() -> None:
    index = fed(store(1, {1: A}))
    for other in (store(2, {2: B}, parent=1), store(1, {2: B}, parent=1, rank=1), store(1, {2: B}, parent=9)):
        assert index.apply(other) is ORPHAN
    assert index.workers() == {WorkerKey(1, 0): 1}


def test_an_orphan_is_skipped_whole() -> None:
    index = KvIndex()
    assert index.apply(store(1, {1: A, 2: B}, parent=9)) is ORPHAN
    assert (len(index), index.workers()) == (0, {})


def test_ranks_are_apart() -> None:
    index = fed(store(1, {1: A, 2: B}), store(1, {1: A}, rank=3))
    assert index.find_matches([A, B]) == {WorkerKey(1, 0): 2, WorkerKey(1, 3): 1}
    assert index.workers() == {WorkerKey(1, 0): 2, WorkerKey(1, 3): 1}


def test_removed_blocks_are_taken_off_their_worker() -> None:
    index = fed(store(1, {1: A, 2: B, 3: C}), store(2, {1: A, 2: B}), remove(1, 3, 2))
    assert scores(index, A, B, C) == {1: 1, 2: 2}
    assert index.blocks_of(WorkerKey(1)) == {1}


def test_a_worker_without_a_block_on_the_way_scores_those_after_it() -> None:
    """As Dynamo's tree does: the walk goes on as long as anybody holds the block."""
    index = fed(store(1, {1: A, 2: B}), store(2, {1: A, 2: B}), remove(1, 1))
    assert scores(index, A, B) == {1: 1, 2: 2}


def test_a_block_that_nobody_holds_loses_its_children() -> None:
    index = fed(store(1, {1: A, 2: B, 3: C}), remove(1, 1))
    assert scores(index, A, B, C) == {}
    assert index.blocks_of(WorkerKey(1)) == {2, 3}
    index.apply(store(1, {1: A}))
    assert scores(index, A, B, C) == {1: 1}


def test_children_are_there_again_when_their_place_is_stored() -> None:
    index = fed(store(1, {1: A, 2: B, 3: C}), remove(1, 1), store(1, {1: A, 2: B}))
    assert scores(index, A, B, C) == {1: 3}
    assert len(index) == 3


def test_children_may_be_there_again_beside_others_and_in_another_place() -> None:
    index = fed(store(1, {1: A, 2: B}), store(1, {3: C, 4: A}, parent=1), remove(1, 1), store(1, {1: A, 3: C}))
    assert scores(index, A, C, A) == {1: 3}
    assert scores(index, A, B) == {1: 1}
    index = fed(store(1, {1: A, 2: B, 3: C}), remove(1, 1), store(1, {4: C, 2: A}))
    assert scores(index, C, A, C) == {1: 3}
    index.apply(remove(1, 2))
    assert scores(index, C, A, C) == {1: 1}


def test_a_block_that_is_stored_elsewhere_has_moved() -> None:
    index = fed(store(1, {1: A, 2: B}), store(1, {3: C, 2: B}))
    assert scores(index, A, B) == {1: 1}
    assert scores(index, C, B) == {1: 2}
    assert len(index) == 3


def test_a_block_never_follows_itself() -> None:
    index = fed(store(1, {1: A, 2: B}), store(1, {1: C}, parent=2))
    assert scores(index, A, B, C) == {}
    index.apply(store(1, {3: A, 2: B}))
    assert scores(index, A, B, C) == {1: 3}
    assert fed(event(1, Stored((StoredBlock(1, A), StoredBlock(1, A))))).find_matches([A, A]) == {}


def test_the_same_tokens_under_two_hashes_are_held_until_both_are_removed() -> None:
    index = fed(store(1, {1: A}), store(1, {2: A}), store(1, {3: A}), remove(1, 1), remove(1, 3))
    assert scores(index, A) == {1: 1}
    index.apply(remove(1, 2))
    assert scores(index, A) == {}


def test_removal_goes_on_after_a_block_that_is_not_known() -> None:
    index = fed(store(1, {1: A, 2: B}))
    assert index.apply(remove(1, 9, 2)) is UNKNOWN
    assert scores(index, A, B) == {1: 1}
    assert index.apply(remove(2, 1)) is UNKNOWN
    assert index.apply(remove(2)) is APPLIED


def test_cleared_takes_all_ranks_of_a_worker() -> None:
    """As Dynamo's tree does; see the head of the module."""
    index = fed(store(1, {1: A, 2: B}), store(1, {1: A}, rank=1), store(2, {1: A}), event(1, Cleared(), rank=1))
    assert index.workers() == {WorkerKey(2): 1}
    assert scores(index, A, B) == {2: 1}
    assert index.apply(event(7, Cleared())) is APPLIED


def test_an_event_without_blocks_changes_nothing() -> None:
    index = fed(store(1, {}))
    assert (len(index), index.workers()) == (0, {})


def test_early_exit_ends_where_one_worker_is_left() -> None:
    index = fed(store(1, {1: A, 2: B, 3: C}), store(2, {1: A}))
    assert scores(index, A, B, C, early_exit=True) == {1: 2, 2: 1}


def test_tokens_are_looked_up_by_their_hashes() -> None:
    pytest.importorskip("xxhash", reason="hashes are XXH3: pip install 'rkmetrics[dynamo]'")
    index = KvIndex()
    index.apply(RouterEvent(1, stored(range(8), [1, 2], 4, event_id=0)))
    assert index.find_matches_for_tokens(range(7), 4) == {WorkerKey(1): 1}
    assert index.find_matches_for_tokens(range(20), 4) == {WorkerKey(1): 2}
    with pytest.raises(KvValueError, match="block_size=0"):
        index.find_matches_for_tokens([1], 0)


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(KvValueError, match="data='gone'"):
        KvIndex().apply(event(1, "gone"))  # type: ignore[arg-type]
    with pytest.raises(KvValueError, match="max_blocks=0"):
        KvIndex(max_blocks=0)


# --- workers ----------------------------------------------------------------------------------------------------------


def several() -> KvIndex:
    return fed(store(1, {1: A, 2: B}), store(1, {1: A}, rank=1), store(2, {1: A}), store(3, {1: A, 3: C}))


def test_a_worker_is_removed_with_all_its_ranks() -> None:
    index = several()
    index.remove_worker(1)
    assert index.find_matches([A, B]) == {WorkerKey(2): 1, WorkerKey(3): 1}
    assert len(index) == 3
    index.remove_worker(9)
    assert len(index) == 3


def test_only_those_retained_stay() -> None:
    index = several()
    index.retain([3, 9])
    assert index.workers() == {WorkerKey(3): 2}
    index.clear()
    assert (len(index), index.workers(), index.dump()) == (0, {}, [])


# --- against a model --------------------------------------------------------------------------------------------------

Key: TypeAlias = tuple[int, int]


class Model:
    """What the index should be: tables and edges, searched through from end to end."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.held: dict[Key, dict[int, int]] = {}  # a worker's block hash to a node
        self.edges: dict[tuple[int, int], int] = {}  # (node, tokens hash) to a node; 0 is the root
        self.fresh = count(1)

    def size(self) -> int:
        return sum(map(len, self.held.values()))

    def holders(self, node: int) -> set[Key]:
        return {key for key, table in self.held.items() if node in table.values()}

    def tidy(self) -> None:
        gone = {
            node for edge in self.edges.items() for node in (edge[0][0], edge[1]) if node and not self.holders(node)
        }
        self.edges = {k: v for k, v in self.edges.items() if k[0] not in gone and v not in gone}
        self.held = {key: table for key, table in self.held.items() if table}

    def parent(self, node: int) -> int | None:
        return next((edge[0] for edge, child in self.edges.items() if child == node), None)

    def ancestors(self, node: int | None) -> Iterator[int]:
        while node is not None:
            yield node
            node = self.parent(node)

    def apply(self, given: RouterEvent) -> IndexOutcome:
        key, data = (given.worker_id, given.event.dp_rank), given.event.data
        if isinstance(data, Cleared):
            self.forget(lambda worker: worker == key[0])
            return APPLIED
        outcome = self.store(key, data) if isinstance(data, Stored) else self.remove(key, data)
        self.tidy()
        return outcome

    def store(self, key: Key, data: Stored) -> IndexOutcome:
        table = self.held.get(key, {})
        node = 0 if data.parent_hash is None else table.get(data.parent_hash)
        if node is None:
            return ORPHAN
        fresh = {block.block_hash for block in data.blocks} - table.keys()
        if fresh and self.size() + len(fresh) > self.max_blocks:
            return REFUSED
        table = self.held.setdefault(key, {})
        for block in data.blocks:
            node = table[block.block_hash] = self.place(node, block, table.get(block.block_hash))
            self.tidy()
        return APPLIED

    def place(self, node: int, block: StoredBlock, known: int | None) -> int:
        edge = (node, block.tokens_hash)
        if edge not in self.edges:
            free = known is not None and self.parent(known) is None and known not in self.ancestors(node)
            self.edges[edge] = known if known is not None and free else next(self.fresh)
        return self.edges[edge]

    def remove(self, key: Key, data: Removed) -> IndexOutcome:
        found = [self.held.get(key, {}).pop(block_hash, None) for block_hash in data.block_hashes]
        return UNKNOWN if None in found else APPLIED

    def forget(self, gone: Any) -> None:
        self.held = {key: table for key, table in self.held.items() if not gone(key[0])}
        self.tidy()

    def find(self, hashes: Iterable[int], early_exit: bool) -> dict[Key, int]:
        scores: dict[Key, int] = {}
        node = 0
        for tokens_hash in hashes:
            if (node, tokens_hash) not in self.edges:
                break
            node = self.edges[node, tokens_hash]
            for key in self.holders(node):
                scores[key] = scores.get(key, 0) + 1
            if early_exit and len(self.holders(node)) == 1:
                break
        return scores


workers, ranks = st.sampled_from([1, 1, 1, 2, 2, 3]), st.sampled_from([0, 0, 0, 0, 1])
names, tokens = st.integers(1, 4), st.integers(1, 2)
blocks = st.lists(st.builds(StoredBlock, names, tokens), max_size=4).map(tuple)


@st.composite
def engine_blocks(draw: st.DrawFn) -> Stored:
    """Blocks as a real engine names them: by all that is before."""
    path = draw(st.lists(tokens, min_size=1, max_size=4))
    hashes = [int("".join(map(str, path[: i + 1]))) + 100 for i in range(len(path))]
    cut = draw(st.integers(0, len(path) - 1))
    made = tuple(StoredBlock(*block) for block in zip(hashes[cut:], path[cut:], strict=True))
    return Stored(made, hashes[cut - 1] if cut else None)


engine_hashes = st.lists(tokens, min_size=1, max_size=4).map(lambda path: int("".join(map(str, path))) + 100)
changes = st.one_of(
    engine_blocks(),
    engine_blocks(),
    st.builds(Removed, st.lists(engine_hashes, min_size=1, max_size=2).map(tuple)),
    st.builds(Stored, blocks, st.none() | names),
    st.builds(Removed, st.lists(names | engine_hashes, max_size=3).map(tuple)),
    st.just(Cleared()),
)
steps = st.lists(st.builds(event, workers, changes, ranks), max_size=40)
QUERIES = list(product((1, 2), repeat=5))


def check(index: KvIndex, model: Model, queries: Sequence[Sequence[int]]) -> None:
    assert len(index) == model.size()
    assert index.workers() == {key: len(table) for key, table in model.held.items()}
    for query in queries:
        for early_exit in (False, True):
            assert index.find_matches(query, early_exit=early_exit) == model.find(query, early_exit)


@settings(max_examples=150, deadline=None)
@given(steps, st.sampled_from([1, 5, 12, 1000]))
def test_any_events_do_what_they_do_to_the_model(events: list[RouterEvent], max_blocks: int) -> None:
    index, model = KvIndex(max_blocks=max_blocks), Model(max_blocks)
    for each in events:
        assert index.apply(each) is model.apply(each)
        check(index, model, [])
    check(index, model, QUERIES)
    assert {key: index.blocks_of(WorkerKey(*key)) for key in model.held} == {k: set(t) for k, t in model.held.items()}


@settings(max_examples=100, deadline=None)
@given(steps, st.sets(workers), steps)
def test_workers_leave_the_index_as_they_leave_the_model(
    before: list[RouterEvent], stay: set[int], after: list[RouterEvent]
) -> None:
    index, model = KvIndex(), Model(1000)
    for each in before:
        index.apply(each), model.apply(each)
    index.retain(stay)
    model.forget(lambda worker: worker not in stay)
    check(index, model, QUERIES)
    index.remove_worker(1)
    model.forget(lambda worker: worker == 1)
    for each in after:
        assert index.apply(each) is model.apply(each)
    check(index, model, QUERIES)


@settings(max_examples=150, deadline=None)
@given(steps, steps)
def test_a_dump_makes_an_equal_index(before: list[RouterEvent], after: list[RouterEvent]) -> None:
    """Equal also in what later events do, which the model knows."""
    index, model, copy = KvIndex(), Model(1000), KvIndex()
    for each in before:
        index.apply(each), model.apply(each)
    for each in index.dump():
        assert copy.apply(each) is APPLIED
    check(copy, model, QUERIES)
    for each in after:
        assert copy.apply(each) is model.apply(each)
    check(copy, model, QUERIES)


def test_a_dump_has_all_hashes_of_a_block_and_islands_as_they_were() -> None:
    index = fed(
        store(1, {1: A, 2: B}), store(1, {1: A, 5: B}), store(2, {1: A, 2: B, 3: C}), remove(1, 1), remove(2, 1)
    )
    copy = fed(*index.dump())
    assert copy.workers() == index.workers() == {WorkerKey(1): 2, WorkerKey(2): 2}
    assert scores(copy, A, B, C) == {}
    for each in (store(1, {1: A, 2: B}), remove(1, 2)):
        assert index.apply(each) is copy.apply(each) is APPLIED
    assert scores(index, A, B, C) == scores(copy, A, B, C) == {1: 2, 2: 2}


def test_a_dump_has_one_event_for_a_path() -> None:
    index = fed(store(1, {1: A, 2: B}), store(1, {3: C}, parent=2), store(2, {1: A, 4: C}))
    assert [(each.worker_id, each.event.data) for each in index.dump()] == [
        (1, Stored((StoredBlock(1, A), StoredBlock(2, B), StoredBlock(3, C)))),
        (2, Stored((StoredBlock(1, A), StoredBlock(4, C)))),
    ]
    assert [each.event.event_id for each in index.dump()] == [0, 1]


# --- memory, depth, bounds --------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[WeakSet[Any]]:
    """The nodes that exist. Nodes that can be counted are seen by the collector too, so it is off."""
    nodes: WeakSet[Any] = WeakSet()

    class Watched(index_module._Node, gc=True, eq=False, weakref=True):
        def __post_init__(self) -> None:
            nodes.add(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_Node", Watched)
        gc.disable()
        try:
            yield nodes
        finally:
            gc.enable()


@settings(max_examples=60, deadline=None)
@given(steps, st.booleans())
def test_memory_follows_what_is_held(events: list[RouterEvent], dropped: bool) -> None:
    with counted() as nodes:
        index = KvIndex()
        for each in events:
            index.apply(each)
        held = [(key, block_hash) for key in index.workers() for block_hash in index.blocks_of(key)]
        assert len(nodes) <= len(held) + 1, "the root, and what is held"
        if dropped:
            del index
            assert len(nodes) == 0
            return
        for key, block_hash in held:
            index.apply(remove(key.worker_id, block_hash, rank=key.dp_rank))
        assert (len(index), index.workers(), len(nodes)) == (0, {}, 1)
        assert (index._root.child, index._root.others, index._aliases) == (None, None, {})


def test_a_table_of_many_first_blocks_goes_with_the_last_of_them() -> None:
    index = fed(*(store(1, {i: i}) for i in range(50)), *(remove(1, i) for i in range(50)))
    assert (index._root.child, index._root.others) == (None, None)


def chain(worker: int, length: int) -> RouterEvent:
    return event(worker, Stored(tuple(StoredBlock(i, i) for i in range(length))))


@pytest.mark.parametrize("order", ["first to last", "last to first", "cleared", "worker", "first only", "dropped"])
def test_a_chain_of_a_million_blocks_ends_without_recursion(order: str) -> None:
    length = 1_000_000 if order in ("first only", "dropped") else 200_000
    index = fed(chain(1, length))
    if order == "dropped":
        del index
        return
    hashes = range(length) if order == "first to last" else range(length - 1, -1, -1)
    if order.endswith(("to last", "to first")):
        index.apply(event(1, Removed(tuple(hashes))))
    elif order == "cleared":
        index.apply(event(1, Cleared()))
    elif order == "worker":
        index.remove_worker(1)
    else:
        index.apply(remove(1, 0))
        assert len(index) == length - 1
        return
    assert (len(index), index.find_matches([0])) == (0, {})


def test_what_does_not_fit_is_refused_whole_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "rkmetrics.kv")
    index = fed(store(1, {1: A, 2: B}), max_blocks=3)
    assert index.apply(store(2, {1: A, 2: B})) is REFUSED
    assert index.apply(store(1, {3: C, 4: C}, parent=2)) is REFUSED
    assert (len(index), scores(index, A, B, C)) == (2, {1: 2})
    assert [record.getMessage() for record in caplog.records] == [
        "The KV index holds 2 blocks of at most 3: new ones are refused"
    ]


def test_what_is_known_already_fits_always() -> None:
    index = fed(store(1, {1: A, 2: B}), max_blocks=2)
    assert index.apply(store(1, {1: A, 2: B})) is APPLIED
    assert index.apply(store(1, {2: C})) is APPLIED, "it moves"
    assert (len(index), scores(index, C)) == (2, {1: 1})


def test_a_full_index_is_said_again_after_there_was_room(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "rkmetrics.kv")
    index = fed(chain(1, 20), max_blocks=20)
    for last in (19, 18):  # one block is free, and taken: that is no room
        assert index.apply(store(2, {last: last})) is REFUSED
        index.apply(remove(1, last))
        assert index.apply(store(2, {last: last})) is APPLIED
    assert len(caplog.records) == 1
    index.apply(remove(1, 17, 16, 15))
    assert index.apply(store(3, dict.fromkeys(range(9), A))) is REFUSED
    assert len(caplog.records) == 2


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_events_are_counted_and_blocks_shown() -> None:
    registry = rk.Registry(rk.Settings(), builtin=False)
    index = KvIndex(registry, max_blocks=4)
    bound = registry.bind(KvIndexing)
    for each in (store(1, {1: A, 2: B}), store(2, {1: A}), store(2, {9: A}, parent=8), remove(1, 7)):
        index.apply(each)
    index.apply(chain(3, 9))
    assert index.receive(b"{") is IndexOutcome.MALFORMED
    assert index.receive(encode_event(store(2, {2: B}, parent=1), "0.7")) is APPLIED
    counts = {outcome: bound.events[outcome].value for outcome in IndexOutcome}
    assert counts == {APPLIED: 3, ORPHAN: 1, UNKNOWN: 1, REFUSED: 1, IndexOutcome.MALFORMED: 1}
    assert (bound.blocks.value, bound.workers.value) == (4, 2)
    index.remove_worker(1)
    assert (bound.blocks.value, bound.workers.value) == (2, 1)


def test_the_events_of_a_real_worker_are_applied() -> None:
    payloads = (Path(__file__).parents[1] / "data" / "dynamo" / "0.7.1" / "kv_events.jsonl").read_bytes().splitlines()
    index = KvIndex()
    assert [index.receive(payload) for payload in payloads] == [APPLIED] * len(payloads)
    hashes = [14643705804678351452, 483935686894639516, 1363306219480167028]
    assert list(index.find_matches(hashes).values()) == [3]


# --- threads ----------------------------------------------------------------------------------------------------------


@contextmanager
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_look_ups_beside_changes_see_all_that_does_not_change() -> None:
    """Worker 1 keeps its path; others come and go on the same path, beside it and before it."""
    path = dict(zip(range(1, 9), range(101, 109), strict=True))
    index = fed(store(9, {1: 100}), store(1, path))  # 100 is the first child of the root, and goes
    index.apply(remove(9, 1))
    wrong: list[Any] = []
    done = threading.Event()

    def change(worker: int) -> None:
        for i in range(600):
            index.apply(store(worker, path))
            index.apply(store(worker, {50: 100 + i % 3, 51: 7}))
            index.apply(remove(worker, *reversed(path)) if i % 2 else event(worker, Cleared()))
            index.apply(remove(worker, 50, 51))
            if not i % 50:
                index.dump(), index.workers(), index.blocks_of(WorkerKey(1))

    def look() -> None:
        while not done.is_set():
            found = index.find_matches(path.values())
            if found.get(WorkerKey(1)) != 8 or not all(0 < blocks <= 8 for blocks in found.values()):
                wrong.append(found)

    writers = [threading.Thread(target=change, args=(worker,)) for worker in (2, 3)]
    reader = threading.Thread(target=look)
    with quick_switches():
        for thread in (*writers, reader):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        reader.join()
    assert wrong == []
    assert (index.workers(), index.find_matches(path.values())) == ({WorkerKey(1): 8}, {WorkerKey(1): 8})
