"""The queue of KV events that wait: bounded, in order, and nothing goes without being counted."""

from __future__ import annotations

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.kv import KvPublishing
from rkmetrics.kv.events import Cleared, KvEvent, Removed, RouterEvent, decode_event, encode_event
from rkmetrics.kv.nats.events import QUEUE_BYTES, EventQueue


@pytest.fixture
def cells() -> KvPublishing:
    return rk.Registry(rk.Settings(), strict=True, builtin=False).bind(KvPublishing)


@pytest.fixture
def queue(cells: KvPublishing) -> EventQueue:
    return EventQueue(lambda event: encode_event(event, "0.8"), cells, limit=1_000)


def event(event_id: int, blocks: int = 1) -> RouterEvent:
    return RouterEvent(1, KvEvent(event_id, Removed(tuple(range(2**63, 2**63 + blocks)))))


def put(queue: EventQueue, number: int) -> None:
    for event_id in range(number):
        queue.put(event(event_id))


def numbers(queue: EventQueue) -> list[int]:
    """What is sent next, as (number) of what was put."""
    return [entry.number for entry in queue.take(512)]


def test_what_is_acknowledged_in_order_goes_from_the_front_on(queue: EventQueue, cells: KvPublishing) -> None:
    put(queue, 4)
    entries = queue.take(512)
    for place, entry in enumerate(entries[:3], start=10):
        entry.place = place
    assert queue.settle() is None
    assert (len(queue), queue.in_flight, cells.events["sent"].value) == (1, 1, 3)


def test_one_answer_that_is_lost_costs_one_event_sent_again(queue: EventQueue, cells: KvPublishing) -> None:
    put(queue, 4)
    first, *others = queue.take(512)
    for place, entry in enumerate(others, start=11):
        entry.place = place
    assert queue.settle() is None
    queue.rewind()
    assert numbers(queue) == [1]
    first.place = 10  # the stream had it, and says so again
    assert queue.settle() is None
    assert (len(queue), queue.in_flight) == (0, 0)
    assert (cells.events["sent"].value, cells.events["repeated"].value) == (4, 1)


def test_one_event_that_is_lost_brings_all_after_it_into_order_again(queue: EventQueue) -> None:
    put(queue, 4)
    first, *others = queue.take(512)
    for place, entry in enumerate(others, start=10):
        entry.place = place
    queue.rewind()
    assert numbers(queue) == [1]
    first.place = 20  # behind those that follow it
    assert queue.settle() == 2
    queue.rewind(2)
    again = queue.take(512)
    assert [(entry.number, entry.generation) for entry in again] == [(2, 1), (3, 1), (4, 1)]
    for place, entry in enumerate(again, start=21):
        entry.place = place
    assert queue.settle() is None
    assert len(queue) == 0


def test_a_stream_that_was_made_anew_counts_from_one_and_nothing_goes_round_in_circles(queue: EventQueue) -> None:
    put(queue, 3)
    first, second, third = queue.take(512)
    first.place, second.place = 1_000, 1
    assert queue.settle() == second.number
    queue.rewind(second.number)
    for place, entry in enumerate(queue.take(512), start=2):
        entry.place = place
    assert queue.settle() is None
    assert third.place == 3
    assert len(queue) == 0


def test_events_of_long_prompts_fill_the_queue_before_there_are_many(queue: EventQueue, cells: KvPublishing) -> None:
    large = event(0, blocks=50_000)
    fit = QUEUE_BYTES // len(encode_event(large, "0.8"))
    assert fit < 20
    for _ in range(fit):
        queue.put(large)
    assert len(queue) == fit
    queue.put(large)
    first, other = queue.take(512)
    assert decode_event(first.payload).event.data == Cleared()
    assert decode_event(other.payload) == large
    assert cells.events["dropped"].value == fit


def test_an_event_larger_than_the_queue_is_not_the_end_of_it(queue: EventQueue) -> None:
    queue.put(event(0, blocks=QUEUE_BYTES // 20 + 1))
    queue.put(event(1))
    assert [decode_event(entry.payload).event.event_id for entry in queue.take(512)] == [0, 1]


def test_room_comes_back_with_what_is_sent(cells: KvPublishing) -> None:
    queue = EventQueue(lambda _: bytes(QUEUE_BYTES), cells)
    for place in range(1, 10):
        queue.put(event(place))
        for entry in queue.take(512):
            entry.place = place
        assert queue.settle() is None
    assert (cells.events["sent"].value, cells.events["dropped"].value) == (9, 0)


def test_what_comes_after_the_end_is_counted_and_not_kept(queue: EventQueue, cells: KvPublishing) -> None:
    put(queue, 2)
    queue.close()
    put(queue, 3)
    assert (len(queue), cells.events["dropped"].value, cells.events_pending.value) == (0, 5, 0)
