"""Which worker holds which KV cache blocks, fed by events and asked by a router.

A tree of token blocks: an edge is a tokens_hash, a path from the root is a prefix, and a node knows the workers that
hold its block. Each worker has a table from its engine's block_hash to the node, since that is how events name blocks.
What events do is what Dynamo's RadixTree does, but nodes that nobody holds are taken out: memory follows what is held.

- A node that loses its last worker loses its children: nobody can use what follows a block that is gone. Children that
  are still held become the tops of islands, which no look-up reaches, until a `stored` event names one of them again in
  its place; then it is there with all that follows it.
- A block hash that is stored in another place has moved there; Dynamo leaves the worker in the old one for good.
- `removed` goes on after a block that is not known, where Dynamo stops. Of two block hashes with the same tokens (two
  LoRA adapters, say) the removal of one does not take the block from the worker.
- `cleared` takes the blocks of all ranks of the worker, as Dynamo's does: too little known costs a cache hit, too much
  sends requests to the wrong place.

Layouts that were tried, with 500,000 blocks of eight workers in the index:

    nodes as                                      a block stored    bytes a block    full collection    64 matched
    objects with slots, a dict of children each          2100 ns              424             123 ms        3.3 us
    objects with slots, first child in a slot             890 ns              218              60 ms        2.5 us
    numbers; one dict of (parent, hash), lists            720 ns              309              17 ms        5.0 us
    msgspec structs with gc=False, first child so         300 ns              201               1 ms        2.5 us

The collector does not see structs with gc=False, so it never walks them, and never finds a cycle of them. Parent and
child are one: links are cut wherever a node goes, and by a finaliser when the index goes. That also keeps the end of a
chain of a million blocks from being a million nested calls.

`holders` is a tuple that is replaced and never changed, and mostly the same object along a path: a look-up adds up runs
of it, and needs no lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import finalize

import msgspec

from rkmetrics.catalogue.kv import IndexOutcome, KvIndexing
from rkmetrics.errors import KvValueError, PayloadError
from rkmetrics.kv.base import WorkerKey
from rkmetrics.kv.events import Cleared, KvEvent, Removed, RouterEvent, Stored, StoredBlock, decode_event
from rkmetrics.kv.hashing import block_hashes

if TYPE_CHECKING:
    from rkmetrics.registry import Registry

__all__ = ["MAX_BLOCKS", "KvIndex"]

log = logging.getLogger("rkmetrics.kv")

#: How many blocks an index holds at most, counted once for each worker: about 1 GB.
MAX_BLOCKS = 5_000_000

# Part of an index that was full has to be free before that is worth a second word.
_ROOM_AGAIN = 0.1

_Holders = tuple[WorkerKey, ...]


class _Node(msgspec.Struct, gc=False, eq=False):
    """One block after what is on the path to it. Most have one child, which needs no dict; `others` are the rest.

    Always held by somebody, and so in a table, or the root. parent: None in the root, and in the top of an island.
    """

    tokens_hash: int
    parent: _Node | None
    holders: _Holders
    child: _Node | None = None
    others: dict[int, _Node] | None = None

    def find(self, tokens_hash: int) -> _Node | None:
        child = self.child
        if child is not None and child.tokens_hash == tokens_hash:
            return child
        return self.others.get(tokens_hash) if self.others is not None else None

    def link(self, node: _Node) -> None:
        """Take in a node whose parent this is. It keeps its place for good: a reader may be on its way to it."""
        if self.child is None:
            self.child = node
        elif self.others is None:
            self.others = {node.tokens_hash: node}
        else:
            self.others[node.tokens_hash] = node

    def cut(self) -> None:
        """Leave the tree: without a parent, and without children, which become islands."""
        if self.parent is not None:
            self.parent.drop(self)
            self.parent = None
        if self.child is not None:
            self.child.parent = None
            self.child = None
        if self.others is not None:
            for child in self.others.values():
                child.parent = None
            self.others = None

    def drop(self, node: _Node) -> None:
        if self.child is node:
            self.child = None
        elif self.others is not None:
            del self.others[node.tokens_hash]
            if not self.others:
                self.others = None

    def follows(self, node: _Node) -> bool:
        """Whether a node is on the way from here up."""
        step: _Node | None = self
        while step is not None and step is not node:
            step = step.parent
        return step is node


class _Worker:
    """What one rank of a worker holds: its engine's block hash to the node."""

    __slots__ = ("alone", "blocks", "key")

    def __init__(self, key: WorkerKey) -> None:
        self.key = key
        self.alone: _Holders = (key,)
        self.blocks: dict[int, _Node] = {}


class KvIndex:
    """Workers and the blocks they hold.

    registry: events and blocks are counted there (KvIndexing). max_blocks: may be held, counted once for each worker;
    a `stored` event that does not fit is refused. Hashes in events and look-ups are u64, as decode_event gives.

    Safe from any thread. What changes the index takes a lock; look-ups take none and never wait, as each of their steps
    reads one reference. A look-up beside a change may see a part of it, and sees all that the change does not touch.
    """

    def __init__(self, registry: Registry | None = None, *, max_blocks: int = MAX_BLOCKS) -> None:
        if max_blocks < 1:
            raise KvValueError("max_blocks", max_blocks, "1 or more")
        self.max_blocks = max_blocks
        self._lock = threading.Lock()
        self._root = _Node(0, None, ())
        self._workers: dict[tuple[int, int], _Worker] = {}
        # How many hashes of a worker name a node, less one; empty unless an engine gives several to the same tokens.
        self._aliases: dict[tuple[_Node, WorkerKey], int] = {}
        self._size = 0
        self._full = False
        self._counts, self._show = _cells(registry)
        finalize(self, _dismantle, self._root, self._workers).atexit = False

    # --- events -------------------------------------------------------------------------------------------------------

    def receive(self, payload: bytes) -> IndexOutcome:
        """Apply an event as it came from a peer; MALFORMED where it is none."""
        try:
            event = decode_event(payload)
        except PayloadError as error:
            log.debug("%s", error)
            self._counts[IndexOutcome.MALFORMED](1)
            return IndexOutcome.MALFORMED
        return self.apply(event)

    def apply(self, event: RouterEvent) -> IndexOutcome:
        """Apply an event, and say what became of it. Raises KvValueError for what is none."""
        data = event.event.data
        step = _STEPS.get(type(data))
        if step is None:
            raise KvValueError("data", data, "Stored, Removed or Cleared")
        with self._lock:
            outcome = step(self, (event.worker_id, event.event.dp_rank), data)
            self._show(self._size, len(self._workers))
        self._counts[outcome](1)
        if self._full or outcome is IndexOutcome.REFUSED:
            self._say(outcome)
        return outcome

    def _say(self, outcome: IndexOutcome) -> None:
        """One word when the index is full, and the next not before there was room again."""
        if outcome is not IndexOutcome.REFUSED:
            self._full = self._size > self.max_blocks * (1 - _ROOM_AGAIN)
        elif not self._full:
            self._full = True
            log.warning("The KV index holds %d blocks of at most %d: new ones are refused", self._size, self.max_blocks)

    def _store(self, key: tuple[int, int], data: Stored) -> IndexOutcome:
        worker, node = self._workers.get(key), self._root
        if data.parent_hash is not None:
            parent = worker.blocks.get(data.parent_hash) if worker else None
            if parent is None:
                return IndexOutcome.ORPHAN
            node = parent
        if self._size + len(data.blocks) > self.max_blocks and self._exceeds(worker, data.blocks):
            return IndexOutcome.REFUSED
        if data.blocks:
            self._extend(worker or self._enter(key), node, data.blocks)
        return IndexOutcome.APPLIED

    def _exceeds(self, worker: _Worker | None, blocks: Iterable[StoredBlock]) -> bool:
        named = {block.block_hash for block in blocks}
        if worker is not None:
            named -= worker.blocks.keys()
        return bool(named) and self._size + len(named) > self.max_blocks

    def _extend(self, worker: _Worker, node: _Node, blocks: Iterable[StoredBlock]) -> None:
        """Give a worker a path of blocks, from a node on."""
        held, alone = worker.blocks, worker.alone
        before = len(held)
        for block in blocks:
            child = node.child
            if child is None or child.tokens_hash != block.tokens_hash:  # as _Node.find, without the call
                child = node.others.get(block.tokens_hash) if node.others is not None else None
            known = held.get(block.block_hash)
            if child is None:
                if known is None:
                    child = held[block.block_hash] = _Node(block.tokens_hash, node, alone)
                    node.link(child)
                else:
                    child = self._relink(worker, node, known, block)
            elif known is not child:
                self._share(worker, child, node.holders)
                held[block.block_hash] = child
                if known is not None:
                    self._leave(worker.key, known)
            node = child
        self._size += len(held) - before

    def _relink(self, worker: _Worker, node: _Node, known: _Node, block: StoredBlock) -> _Node:
        """Put a block that the worker held elsewhere under a node: an island as it is, anything else by itself."""
        if known.parent is None and not node.follows(known):
            known.tokens_hash, known.parent = block.tokens_hash, node
            node.link(known)
            return known
        child = _Node(block.tokens_hash, node, worker.alone)
        node.link(child)
        worker.blocks[block.block_hash] = child
        self._leave(worker.key, known)  # last: it may be above the node, which then is the top of an island
        return child

    def _share(self, worker: _Worker, node: _Node, near: _Holders) -> None:
        if worker.key in node.holders:
            self._aliases[node, worker.key] = self._aliases.get((node, worker.key), 0) + 1
        else:
            node.holders = _same((*node.holders, worker.key), near)

    def _remove(self, key: tuple[int, int], data: Removed) -> IndexOutcome:
        worker = self._workers.get(key)
        missing = False
        for block_hash in data.block_hashes:
            node = worker.blocks.pop(block_hash, None) if worker else None
            if worker is None or node is None:
                missing = True
                continue
            self._size -= 1
            self._leave(worker.key, node)
        if worker and not worker.blocks:
            del self._workers[key]
        return IndexOutcome.UNKNOWN_BLOCK if missing else IndexOutcome.APPLIED

    def _clear(self, key: tuple[int, int], _: Cleared) -> IndexOutcome:
        self._forget(lambda worker_id: worker_id == key[0])
        return IndexOutcome.APPLIED

    # --- workers ------------------------------------------------------------------------------------------------------

    def remove_worker(self, worker_id: int) -> None:
        """Forget all ranks of a worker."""
        self._drop(lambda known: known == worker_id)

    def retain(self, worker_ids: Collection[int]) -> None:
        """Forget all workers but these."""
        self._drop(lambda known: known not in worker_ids)

    def clear(self) -> None:
        """Forget everything."""
        self.retain(())

    def _drop(self, gone: Callable[[int], bool]) -> None:
        with self._lock:
            self._forget(gone)
            self._show(self._size, len(self._workers))

    def _forget(self, gone: Callable[[int], bool]) -> None:
        for key in [key for key in self._workers if gone(key[0])]:
            worker = self._workers.pop(key)
            for node in worker.blocks.values():
                self._leave(worker.key, node)
            self._size -= len(worker.blocks)

    def _enter(self, key: tuple[int, int]) -> _Worker:
        worker = self._workers[key] = _Worker(WorkerKey(*key))
        return worker

    def _leave(self, key: WorkerKey, node: _Node) -> None:
        """Take a worker off a node, once for each of its hashes."""
        if self._aliases and self._unalias(node, key):
            return
        holders = node.holders
        if len(holders) == 1:
            node.holders = ()
            node.cut()
            return
        place = holders.index(key)
        left = holders[:place] + holders[place + 1 :]
        node.holders = _same(left, node.child.holders) if node.child is not None else left

    def _unalias(self, node: _Node, key: WorkerKey) -> bool:
        more = self._aliases.pop((node, key), 0)
        if more > 1:
            self._aliases[node, key] = more - 1
        return more > 0

    # --- look-ups -----------------------------------------------------------------------------------------------------

    def find_matches(self, hashes: Iterable[int], *, early_exit: bool = False) -> dict[WorkerKey, int]:
        """Return how many of the blocks, from the first on, each worker holds; workers without any are left out.

        hashes: of the tokens, from the first block on. It ends at the first block that nobody holds. early_exit: also
        after one that a single worker holds.
        """
        scores: dict[WorkerKey, int] = {}
        node, run = self._root, 0
        holders: _Holders = ()
        for tokens_hash in hashes:
            child = node.child
            if child is None or child.tokens_hash != tokens_hash:  # as _Node.find, without the call
                others = node.others
                child = others.get(tokens_hash) if others is not None else None
                if child is None:
                    break
            node, found = child, child.holders
            if found is holders:
                run += 1
                continue
            _add(scores, holders, run)
            holders, run = found, 1
            if early_exit and len(holders) == 1:
                break
        _add(scores, holders, run)
        return scores

    def find_matches_for_tokens(
        self, token_ids: Iterable[int], block_size: int, *, early_exit: bool = False
    ) -> dict[WorkerKey, int]:
        """The same, of tokens. Raises KvValueError (hashing.block_hashes), MissingExtraError without xxhash."""
        return self.find_matches(block_hashes(token_ids, block_size), early_exit=early_exit)

    def __len__(self) -> int:
        """How many blocks are held, counted once for each worker."""
        return self._size

    def workers(self) -> dict[WorkerKey, int]:
        """Each worker that holds blocks, and how many."""
        return {worker.key: len(worker.blocks) for worker in list(self._workers.values())}

    def blocks_of(self, worker: WorkerKey) -> frozenset[int]:
        """The engine's hashes of the blocks that a worker holds."""
        with self._lock:
            found = self._workers.get(worker)
            return frozenset(found.blocks) if found else frozenset()

    def dump(self) -> list[RouterEvent]:
        """Return events that make an empty index equal to this one. Changes wait meanwhile."""
        with self._lock:
            return _Dump(self._root).events(self._workers.values())


_STEPS: Mapping[type, Callable[[KvIndex, tuple[int, int], Any], IndexOutcome]] = {
    Stored: KvIndex._store,
    Removed: KvIndex._remove,
    Cleared: KvIndex._clear,
}


def _add(scores: dict[WorkerKey, int], holders: _Holders, blocks: int) -> None:
    for worker in holders:
        scores[worker] = scores.get(worker, 0) + blocks


def _same(holders: _Holders, near: _Holders) -> _Holders:
    """The tuple of a neighbour where it says the same: less memory, and longer runs in look-ups."""
    return near if near == holders else holders


def _dismantle(root: _Node, workers: dict[tuple[int, int], _Worker]) -> None:
    """Cut all links of an index that is gone, one by one."""
    for worker in workers.values():
        for node in worker.blocks.values():
            node.parent = node.child = node.others = None
    root.child = root.others = None


def _cells(
    registry: Registry | None,
) -> tuple[Mapping[IndexOutcome, Callable[[float], object]], Callable[[int, int], object]]:
    """What counts an event by its outcome, and what shows blocks and workers."""
    if registry is None:
        return dict.fromkeys(IndexOutcome, _nowhere), _nowhere
    bound = registry.bind(KvIndexing)

    def show(blocks: int, workers: int) -> None:
        bound.blocks.set(blocks)
        bound.workers.set(workers)

    show(0, 0)
    return {outcome: bound.events[outcome].inc for outcome in IndexOutcome}, show


def _nowhere(*_: float) -> None:
    pass


# --- dump -------------------------------------------------------------------------------------------------------------


class _Dump:
    """An index as events: for each worker its paths, parents first.

    Where a worker does not hold a block on the way to one it holds, the event has that block too, under a hash of ours,
    and a last event removes it. The same makes islands: their tops hang on a block that is removed in the end.
    """

    def __init__(self, root: _Node) -> None:
        self._root = root
        self._above: dict[_Node, _Node] = {}  # the top of an island to what it hangs on
        self._free = (number for number in count(1) if root.find(number) is None)

    def events(self, workers: Iterable[_Worker]) -> list[RouterEvent]:
        found: list[tuple[WorkerKey, Stored | Removed]] = []
        last: list[tuple[WorkerKey, Stored | Removed]] = []
        for worker in workers:
            paths = _Paths(self, worker)
            found += [(worker.key, stored) for stored in paths.all()]
            if paths.lent:
                last.append((worker.key, Removed(tuple(paths.lent))))
        return [
            RouterEvent(key.worker_id, KvEvent(event_id, data, key.dp_rank))
            for event_id, (key, data) in enumerate(found + last)
        ]

    def parent(self, node: _Node) -> _Node:
        if node.parent is not None:
            return node.parent
        if node not in self._above:
            self._above[node] = _Node(next(self._free), self._root, ())
        return self._above[node]

    def is_root(self, node: _Node) -> bool:
        return node is self._root


class _Paths:
    """The paths of one worker. lent: hashes of blocks that it does not hold."""

    def __init__(self, dump: _Dump, worker: _Worker) -> None:
        self._dump, self._blocks = dump, worker.blocks
        self._names = {node: block_hash for block_hash, node in worker.blocks.items()}
        self._free = (number for number in count(1) if number not in worker.blocks)
        self._done: set[_Node] = set()
        self.lent: list[int] = []

    def all(self) -> Iterator[Stored]:
        """Latest first, as that is mostly the end of a path; then the other hashes of the same blocks."""
        for node in reversed(self._blocks.values()):
            if node not in self._done:
                yield self._path(node)
        for block_hash, node in self._blocks.items():
            if self._names[node] != block_hash:
                yield self._stored([StoredBlock(block_hash, node.tokens_hash)], self._dump.parent(node))

    def _path(self, node: _Node) -> Stored:
        """From what was not there yet, down to a node."""
        blocks: list[StoredBlock] = []
        while not self._dump.is_root(node) and node not in self._done:
            blocks.append(StoredBlock(self._name(node), node.tokens_hash))
            self._done.add(node)
            node = self._dump.parent(node)
        return self._stored(blocks[::-1], node)

    def _stored(self, blocks: Iterable[StoredBlock], above: _Node) -> Stored:
        return Stored(tuple(blocks), None if self._dump.is_root(above) else self._names[above])

    def _name(self, node: _Node) -> int:
        if node not in self._names:
            self._names[node] = next(self._free)
            self.lent.append(self._names[node])
        return self._names[node]
