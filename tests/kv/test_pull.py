"""The page of KV metrics, the route that shows it, and the poller among good and hostile servers (F25)."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

import rkmetrics as rk
from rkmetrics.catalogue.kv import PollOutcome, ReportSource
from rkmetrics.errors import KvValueError, PayloadError
from rkmetrics.kv.aggregator import KvMetricsAggregator
from rkmetrics.kv.base import U64, ForwardPassMetrics, KvStats, KvUpdate, WorkerKey, WorkerStats, checked
from rkmetrics.kv.page import PATH, LatestMetrics, load_metrics, read_document, runtime_stats
from rkmetrics.kv.pull import KvMetricsPoller
from rkmetrics.settings import Settings
from tests.asgi.hosts import HOSTS
from tests.hostile import BEHAVIOURS, Behave, Peer, answering, response, serving, until

TOKEN = "s3cret-token"
OPEN = Settings(metrics_enabled=True, metrics_access="open")
GATED = Settings(metrics_enabled=True, metrics_token=rk.Secret(TOKEN))
ONE, TWO = WorkerKey(1), WorkerKey(2, 1)


def metrics(active: int, total: int = 100, usage: float = 0.5, hit_rate: float = 0.25) -> ForwardPassMetrics:
    return ForwardPassMetrics(
        WorkerStats(request_active_slots=active, request_total_slots=16, num_requests_waiting=1),
        KvStats(
            kv_active_blocks=active,
            kv_total_blocks=total,
            gpu_cache_usage_perc=usage,
            gpu_prefix_cache_hit_rate=hit_rate,
        ),
    )


class Worker:
    """Publishes into a LatestMetrics, as a publisher does."""

    def __init__(self, latest: LatestMetrics, key: WorkerKey = ONE) -> None:
        self.latest, self.key, self.sequence = latest, key, 0

    def publish(self, active: int, **fields: Any) -> None:
        self.sequence += 1
        found, data = checked(metrics(active, **fields))
        self.latest.offer(KvUpdate(self.key, found, data, self.sequence))


@pytest.fixture
def latest() -> LatestMetrics:
    return LatestMetrics()


def page(*workers: dict[str, object], incarnation: str = "i") -> bytes:
    return json.dumps({"runtime": "x", "incarnation": incarnation, "sequence": 1, "workers": workers}).encode()


def row(worker_id: object = 1, sequence: object = 1, **fields: object) -> dict[str, object]:
    data = json.loads(checked(metrics(7))[1])
    return {"worker_id": worker_id, "dp_rank": 0, "sequence": sequence, "age_seconds": 0.5, "data": data, **fields}


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_has_each_worker_with_its_own_json() -> None:
    now = [100.0]
    latest = LatestMetrics(clock=lambda: now[0])
    Worker(latest, TWO).publish(2)
    worker = Worker(latest)
    worker.publish(1)
    now[0] += 0.5
    worker.publish(3)
    document = json.loads(latest.document())
    assert document == {
        "runtime": "rkmetrics",
        "incarnation": latest.incarnation,
        "sequence": 3,
        "workers": [
            {"worker_id": 1, "dp_rank": 0, "sequence": 2, "age_seconds": 0.0, "data": document["workers"][0]["data"]},
            {"worker_id": 2, "dp_rank": 1, "sequence": 1, "age_seconds": 0.5, "data": document["workers"][1]["data"]},
        ],
    }
    assert checked(metrics(3))[1] in latest.document()


def test_what_a_page_says_is_what_a_reader_finds(latest: LatestMetrics) -> None:
    Worker(latest, WorkerKey(U64, 7)).publish(5)
    (report,) = read_document(latest.document())
    assert (report.key, report.active_blocks, report.metrics) == (WorkerKey(U64, 7), 5, metrics(5))
    assert (report.sequence, report.incarnation) == (1, latest.incarnation)


def test_the_tag_changes_with_each_change_and_not_with_time() -> None:
    now = [100.0]
    latest = LatestMetrics(clock=lambda: now[0])
    worker, tags = Worker(latest), [latest.etag()]
    for active in (1, 1, None):
        if active is None:
            latest.withdraw(ONE)
        else:
            worker.publish(active)
        tags.append(latest.etag())
        now[0] += 1
        assert latest.etag() == tags[-1]
    assert len(set(tags)) == 4
    assert LatestMetrics().etag() not in tags
    assert json.loads(latest.document())["workers"] == []


def test_offers_of_many_threads_all_count(latest: LatestMetrics) -> None:
    def publish(worker: Worker) -> None:
        for active in range(200):
            worker.publish(active)

    threads = [threading.Thread(target=publish, args=(Worker(latest, WorkerKey(i)),)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        latest.document()
    for thread in threads:
        thread.join()
    assert latest.version == 800
    assert [report.active_blocks for report in read_document(latest.document())] == [199] * 4


def test_what_begins_again_has_another_incarnation_and_no_workers(latest: LatestMetrics) -> None:
    Worker(latest).publish(1)
    before = latest.etag(), latest.incarnation
    latest.renew()
    assert latest.etag() != before[0]
    assert json.loads(latest.document()) | {"incarnation": ""} == {
        "runtime": "rkmetrics",
        "incarnation": "",
        "sequence": 0,
        "workers": [],
    }


BAD_PAGES = [
    b"",
    b"[]",
    b"null",
    b"\xff",
    b"{",
    b"[" * 60_000,
    page() + b"x",
    page(row("1")),
    page(row(-1)),
    page(row(U64 + 1)),
    page(row(10**30)),
    page(row(1.5)),
    page(row(True)),
    page(row(age_seconds=-1)),
    page(row(age_seconds="now")),
    page(row(sequence=None)),
    page(row(data={})),
    page(row(data=[])),
    page(incarnation="i" * 1000),
    page(row()).replace(b'"age_seconds": 0.5', b'"age_seconds": 1e999'),
    page(row()).replace(b'"age_seconds": 0.5', b'"age_seconds": NaN'),
]


@pytest.mark.parametrize("data", BAD_PAGES, ids=lambda data: repr(data[:50]))
def test_what_is_no_page_is_a_payload_error(data: bytes) -> None:
    with pytest.raises(PayloadError):
        read_document(data)


def test_a_page_may_have_more_in_it() -> None:
    (report,) = read_document(page(row(1, more={"deep": [1]})))
    assert (report.key, report.age_seconds) == (ONE, 0.5)


# --- payloads ---------------------------------------------------------------------------------------------------------


def test_load_metrics_is_the_json_of_a_worker(latest: LatestMetrics) -> None:
    assert load_metrics(latest) is None
    Worker(latest, TWO).publish(2)
    Worker(latest).publish(1)
    assert load_metrics(latest) == checked(metrics(1))[1]
    assert load_metrics(latest, TWO) == checked(metrics(2))[1]
    assert load_metrics(latest, WorkerKey(3)) is None


def test_runtime_stats_is_one_flat_document_for_all_workers(latest: LatestMetrics) -> None:
    Worker(latest).publish(10, total=100, usage=0.1, hit_rate=0.5)
    Worker(latest, TWO).publish(90, total=300, usage=0.3, hit_rate=0.25)
    assert json.loads(runtime_stats(latest, "vllm", gauges={"more": 1.5}, now=lambda: 1700000000.9)) == {
        "schema_version": 1,
        "worker_id": "1",
        "backend": "vllm",
        "ts": 1700000000,
        "metrics": {
            "gauges": {
                "kv_active_blocks": 100.0,
                "kv_total_blocks": 400.0,
                "gpu_cache_usage_perc": 0.25,
                "gpu_prefix_cache_hit_rate": 0.375,
                "request_active_slots": 100.0,
                "request_total_slots": 32.0,
                "num_requests_waiting": 2.0,
                "more": 1.5,
            }
        },
    }


def test_runtime_stats_has_gauges_of_floats_and_a_hundred_at_most(latest: LatestMetrics) -> None:
    Worker(latest).publish(1, total=0)
    text = runtime_stats(latest, "b", worker_id="w", gauges={f"g{i}": float(i) for i in range(200)})
    document = json.loads(text)
    assert (document["worker_id"], len(document["metrics"]["gauges"])) == ("w", 100)
    assert all(isinstance(value, float) for value in document["metrics"]["gauges"].values())
    assert document["metrics"]["gauges"]["gpu_cache_usage_perc"] == 0.5


def test_runtime_stats_without_workers_has_none_of_their_gauges(latest: LatestMetrics) -> None:
    assert json.loads(runtime_stats(latest, "b"))["metrics"] == {"gauges": {}}


# --- the route --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_shows_the_page_to_who_may_see_it(host: str, latest: LatestMetrics) -> None:
    registry = rk.Registry(GATED)
    registry.offer_document("kv_metrics", latest)
    Worker(latest).publish(4)
    bearer = (b"authorization", f"Bearer {TOKEN}".encode())
    with HOSTS[host](registry) as served:
        assert served.ask("GET", PATH).status == 401
        whole = served.ask("GET", PATH, [bearer])
        assert (whole.status, whole.header("content-type")) == (200, "application/json")
        assert [report.active_blocks for report in read_document(whole.body)] == [4]
        tag = (whole.header("etag") or "").encode()
        assert tag == latest.etag()
        same = served.ask("GET", PATH, [bearer, (b"if-none-match", tag)])
        assert (same.status, same.body, same.header("etag")) == (304, b"", tag.decode())
        assert [name for name, _ in same.headers if name in ("content-length", "content-type")] == []
        head = served.ask("HEAD", PATH, [bearer])
        assert (head.status, head.body, head.header("etag")) == (200, b"", tag.decode())
        assert served.ask("HEAD", PATH, [bearer, (b"if-none-match", tag)]).status == 304
        assert served.ask("POST", PATH, [bearer]).header("allow") == "GET, HEAD"
        Worker(latest).publish(5)
        assert served.ask("GET", PATH, [bearer, (b"if-none-match", tag)]).status == 200


# --- the poller: targets and arguments --------------------------------------------------------------------------------


def poller(*targets: str, **options: Any) -> KvMetricsPoller:
    return KvMetricsPoller(targets, KvMetricsAggregator(), **options)


def test_a_base_url_gets_the_path_and_a_full_one_keeps_its_own() -> None:
    targets = poller("http://a:1", "http://b:1/", "http://c/x/kv_metrics", "http://u:pw@d/p?key=secret").targets
    assert targets == (
        "http://a:1/kv_metrics",
        "http://b:1/kv_metrics",
        "http://c/x/kv_metrics",
        "http://d/p",
    )


def test_a_target_is_polled_once_however_it_is_written() -> None:
    polls = poller("http://a:1", "http://a:1/", "http://A:1/kv_metrics")
    assert polls.targets == ("http://a:1/kv_metrics",)
    assert polls.remove("http://a:1")
    assert not polls.remove("http://a:1")
    assert not polls.targets


@pytest.mark.parametrize("target", ["", "a:1", "ftp://a", "http://user:hunter2@a:x/"])
def test_what_is_no_url_is_refused_without_showing_credentials(target: str) -> None:
    with pytest.raises(KvValueError, match="target") as raised:
        poller(target)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("options", [{"interval_seconds": 0}, {"timeout_seconds": -1}, {"jitter": 2}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(KvValueError, match=next(iter(options))):
        poller(**options)


@pytest.mark.parametrize("token", ["", "two words", "line\r\nx: y", "\xe9", rk.Secret(b"a b")])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(token: Any) -> None:
    with pytest.raises(KvValueError, match="<secret>"):
        poller(token=token)


def test_a_repr_has_no_token() -> None:
    assert TOKEN not in repr(poller("http://a", token=TOKEN)) + repr(poller("http://a", token=rk.Secret(TOKEN)))


def test_a_worker_is_stale_after_three_intervals_unless_told_otherwise() -> None:
    assert poller(interval_seconds=2).stale_after_seconds == 6
    assert poller(interval_seconds=2, stale_after_seconds=1).stale_after_seconds == 1


# --- the poller at work -----------------------------------------------------------------------------------------------

FAST: dict[str, Any] = {"interval_seconds": 0.02, "timeout_seconds": 10.0}


class Polls:
    """An aggregator with a registry, and how polls ended."""

    def __init__(self) -> None:
        self.registry = rk.Registry(OPEN, builtin=False)
        self.aggregator = KvMetricsAggregator(self.registry)
        found = self.aggregator.metrics
        assert found is not None
        self.metrics = found

    def count(self, outcome: PollOutcome) -> int:
        return int(self.metrics.polls[outcome].value)

    def reached(self, outcome: PollOutcome, count: int) -> bool:
        return self.count(outcome) >= count

    def active(self, key: WorkerKey = ONE) -> int | None:
        state = self.aggregator.worker(key)
        return state.active_blocks if state else None


@pytest.fixture
def polls() -> Polls:
    return Polls()


@asynccontextmanager
async def served(latest: LatestMetrics, settings: Settings = OPEN) -> AsyncIterator[str]:
    registry = rk.Registry(settings, builtin=False)
    registry.offer_document("kv_metrics", latest)
    with rk.serve(registry, port=0) as server:
        yield server.url


async def test_workers_of_our_own_server_are_polled_by_one_connection(polls: Polls, latest: LatestMetrics) -> None:
    worker, other = Worker(latest), Worker(latest, TWO)
    worker.publish(3)
    other.publish(4)
    async with served(latest) as url, KvMetricsPoller([url], polls.aggregator, **FAST):
        await until(lambda: polls.count(PollOutcome.UNCHANGED) >= 3)
        assert polls.count(PollOutcome.OK) == 1
        assert (polls.active(), polls.active(TWO)) == (3, 4)
        worker.publish(5)
        await until(lambda: polls.active() == 5)
        latest.withdraw(TWO)
        await until(lambda: polls.active(TWO) is None)
    assert set(polls.aggregator.workers()) == {ONE}
    assert polls.metrics.poll_duration.count >= 5
    assert polls.metrics.reports[ReportSource.PULL].value == 2 + 2 + 1
    assert polls.aggregator.workers()[ONE].missed == 0


async def test_a_page_without_workers_is_a_good_answer(polls: Polls) -> None:
    with rk.serve(rk.Registry(OPEN, builtin=False), port=0) as server:
        async with KvMetricsPoller([server.url], polls.aggregator, **FAST):
            await until(lambda: polls.count(PollOutcome.UNCHANGED))
    assert (len(polls.aggregator), polls.count(PollOutcome.OK)) == (0, 1)


async def test_the_token_opens_the_gate_and_shows_nowhere(
    polls: Polls, latest: LatestMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    Worker(latest).publish(1)
    async with served(latest, GATED) as url:
        async with KvMetricsPoller([url], polls.aggregator, token=TOKEN, **FAST):
            await until(lambda: polls.active() == 1)
        async with KvMetricsPoller([url], polls.aggregator, token=rk.Secret("wrong-token"), **FAST):
            await until(lambda: polls.count(PollOutcome.UNAUTHORIZED) >= 2)
    assert TOKEN not in caplog.text
    assert "wrong-token" not in caplog.text
    assert caplog.text.count("unauthorized") == 1


async def test_an_echo_of_the_request_puts_no_token_into_the_log(
    polls: Polls, caplog: pytest.LogCaptureFixture
) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(response("200 OK", b"Bearer " + TOKEN.encode() + head, b"etag: " + TOKEN.encode()))
        await writer.drain()

    async with serving(echo) as peer, KvMetricsPoller([peer.url], polls.aggregator, token=TOKEN, **FAST):
        await until(lambda: polls.count(PollOutcome.MALFORMED))
    assert TOKEN.encode() in peer.requests[0]
    assert TOKEN not in caplog.text


async def test_targets_change_while_it_runs(polls: Polls, latest: LatestMetrics) -> None:
    other = LatestMetrics()
    Worker(latest).publish(1)
    Worker(other, TWO).publish(2)
    async with served(latest) as first, served(other) as second:
        async with KvMetricsPoller([], polls.aggregator, **FAST) as running:
            running.add(first)
            await until(lambda: polls.active() == 1)
            running.add(second)
            await until(lambda: polls.active(TWO) == 2)
            assert running.remove(first)
            assert set(polls.aggregator.workers()) == {TWO}
            before = polls.count(PollOutcome.UNCHANGED)
            await until(lambda: polls.count(PollOutcome.UNCHANGED) > before + 2)
            assert set(polls.aggregator.workers()) == {TWO}


async def test_a_worker_that_somebody_else_forgot_comes_back(polls: Polls, latest: LatestMetrics) -> None:
    Worker(latest).publish(1)
    async with served(latest) as url, KvMetricsPoller([url], polls.aggregator, **FAST):
        await until(lambda: polls.active() == 1)
        polls.aggregator.forget(1)
        await until(lambda: polls.active() == 1)


async def test_a_poller_may_run_again_and_not_twice_at_once(polls: Polls, latest: LatestMetrics) -> None:
    Worker(latest).publish(1)
    async with served(latest) as url:
        again = KvMetricsPoller([url], polls.aggregator, **FAST)
        for _ in range(2):
            wanted = polls.count(PollOutcome.UNCHANGED) + 1
            async with again:
                await until(partial(polls.reached, PollOutcome.UNCHANGED, wanted))
                with pytest.raises(RuntimeError, match="already"):
                    await again.__aenter__()


async def test_gaps_are_counted_and_a_restart_is_none(polls: Polls) -> None:
    pages = [page(row(1, 5)), page(row(1, 9)), page(row(1, 2), incarnation="j"), page(row(1, 4), incarnation="j")]
    behave = answering(*(response("200 OK", each) for each in pages))
    async with serving(behave) as peer, KvMetricsPoller([peer.url], polls.aggregator, **FAST):
        await until(lambda: polls.count(PollOutcome.OK) >= 4)
    assert polls.aggregator.workers()[ONE].missed == 3 + 1
    assert b"if-none-match" not in b"".join(peer.requests)  # there was no tag


async def test_a_tag_that_could_be_another_header_is_not_sent_back(polls: Polls) -> None:
    behave = answering(response("200 OK", page(row()), b'etag: "a" x: y'))
    async with serving(behave) as peer, KvMetricsPoller([peer.url], polls.aggregator, **FAST):
        await until(lambda: len(peer.requests) >= 3)
    assert b"if-none-match" not in b"".join(peer.requests)


# --- the poller and servers that misbehave ----------------------------------------------------------------------------

OUTCOMES: dict[str, PollOutcome] = {
    "hangs": PollOutcome.TIMEOUT,
    "drips its headers": PollOutcome.TIMEOUT,
    "drips its body": PollOutcome.TIMEOUT,
    "garbage": PollOutcome.MALFORMED,
    "another protocol": PollOutcome.MALFORMED,
    "redirect": PollOutcome.REFUSED,
    "gzip": PollOutcome.MALFORMED,
    "a length of 1 GiB": PollOutcome.TOO_LARGE,
    "a body without end": PollOutcome.TOO_LARGE,
    "headers without end": PollOutcome.TOO_LARGE,
    "chunks without end": PollOutcome.TOO_LARGE,
    "tiny chunks without end": PollOutcome.TOO_LARGE,
    "two lengths": PollOutcome.MALFORMED,
    "vanishes": PollOutcome.UNREACHABLE,
    "resets": PollOutcome.UNREACHABLE,
    "half a head": PollOutcome.UNREACHABLE,
    "half a body": PollOutcome.UNREACHABLE,
    "wrong JSON": PollOutcome.MALFORMED,
    "other JSON": PollOutcome.MALFORMED,
    "no JSON": PollOutcome.MALFORMED,
    "JSON bomb": PollOutcome.MALFORMED,
    "no UTF-8": PollOutcome.MALFORMED,
    "unauthorized": PollOutcome.UNAUTHORIZED,
    "forbidden": PollOutcome.UNAUTHORIZED,
    "broken": PollOutcome.REFUSED,
    "not modified, unasked": PollOutcome.REFUSED,
}


def test_every_bad_behaviour_is_tried() -> None:
    assert OUTCOMES.keys() == BEHAVIOURS.keys()


async def go_over(peer: Peer, behave: Behave) -> None:
    """Let the connections end, and behave so on the next ones."""
    peer.behave = behave
    await peer.cut()


@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_the_last_state_is_kept_through_trouble_which_is_said_once_and_counted(
    name: str, polls: Polls, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rkmetrics")
    good, outcome = answering(response("200 OK", page(row()))), OUTCOMES[name]
    options = FAST | ({"timeout_seconds": 0.05} if outcome is PollOutcome.TIMEOUT else {})
    async with serving(good) as peer, KvMetricsPoller([peer.url], polls.aggregator, **options):
        await until(lambda: polls.active() == 7)
        caplog.clear()
        await go_over(peer, BEHAVIOURS[name])
        await until(lambda: polls.count(outcome) >= 2)
        state = polls.aggregator.workers()[ONE]
        assert state.metrics == metrics(7)
        await until(lambda: polls.aggregator.workers()[ONE].stale)
        assert polls.aggregator.total().workers == 0
        assert polls.aggregator.total(include_stale=True).workers == 1
        await go_over(peer, good)
        before = polls.count(PollOutcome.OK)
        await until(lambda: polls.count(PollOutcome.OK) > before)
        await until(lambda: not polls.aggregator.workers()[ONE].stale)
    said = [record.getMessage() for record in caplog.records]
    assert [f": {outcome}: " in said[0], "works again" in said[-1]] == [True, True]
    # Ending the connections may be a failure of another kind, once.
    assert len(said) == len([text for text in said if "unreachable" in text and outcome != "unreachable"]) + 2


async def test_a_target_that_is_down_is_asked_less_and_less_and_found_again(
    polls: Polls, latest: LatestMetrics
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    async with KvMetricsPoller([f"http://127.0.0.1:{port}"], polls.aggregator, **FAST) as running:
        await until(lambda: polls.count(PollOutcome.UNREACHABLE) >= 3)
        assert [running.backoff(n) <= min(5.0, 0.02 * 2**n) for n in (1, 5, 50)] == [True] * 3
        assert running.backoff(1000) >= 2.5
        async with serving(answering(response("200 OK", page(row()))), port=port):
            await until(lambda: polls.active() == 7)


async def test_an_interval_longer_than_the_longest_pause_after_failures_stays_as_it_is() -> None:
    assert poller(interval_seconds=60).backoff(1) == poller(interval_seconds=60).backoff(99) == 60


async def test_polls_of_a_slow_target_are_skipped_and_do_not_pile_up(polls: Polls) -> None:
    release = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await release.wait()
        writer.write(response("200 OK", page(row())))
        await reader.read()

    async with serving(slow) as peer, KvMetricsPoller([peer.url], polls.aggregator, **FAST):
        await until(lambda: polls.count(PollOutcome.SKIPPED) >= 3)
        assert (peer.connections, len(peer.requests)) == (1, 1)
        release.set()
        await until(lambda: polls.active() == 7)


async def test_a_hanging_target_delays_no_other(polls: Polls, latest: LatestMetrics) -> None:
    """F14 for polls: forty that hang, and one that is fine."""
    Worker(latest).publish(1)
    async with serving(BEHAVIOURS["hangs"]) as peer, served(latest) as url:
        targets = [*(f"{peer.url}/{number}" for number in range(40)), url]
        async with KvMetricsPoller(targets, polls.aggregator, **FAST):
            await until(lambda: polls.count(PollOutcome.UNCHANGED) >= 5)
            assert polls.count(PollOutcome.TIMEOUT) == 0
            assert polls.active() == 1


async def test_a_server_that_closes_after_each_answer_costs_a_connection_and_nothing_else(polls: Polls) -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response("200 OK", page(row()), b'etag: "a"'))
        await writer.drain()

    async with serving(once) as peer, KvMetricsPoller([peer.url], polls.aggregator, **FAST):
        await until(lambda: polls.count(PollOutcome.OK) >= 4)
    assert polls.count(PollOutcome.UNREACHABLE) == 0
    assert peer.connections >= 4


async def test_a_poller_without_a_registry_polls_too(latest: LatestMetrics) -> None:
    aggregator = KvMetricsAggregator()
    Worker(latest).publish(1)
    async with served(latest) as url, KvMetricsPoller([url], aggregator, **FAST):
        await until(lambda: len(aggregator))


async def test_leaving_the_block_ends_everything_at_once(polls: Polls) -> None:
    async with serving(BEHAVIOURS["hangs"]) as peer:
        async with KvMetricsPoller([peer.url, "http://192.0.2.1:9"], polls.aggregator, **FAST):
            await until(lambda: peer.connections)
        assert [task for task in asyncio.all_tasks() if "_connect" in repr(task)] == []


async def test_uvloop_polls_too(latest: LatestMetrics) -> None:
    uvloop = pytest.importorskip("uvloop", reason="another event loop: pip install uvloop")

    def run() -> int:
        async def poll() -> int:
            found = Polls()
            async with served(latest) as url, KvMetricsPoller([url], found.aggregator, **FAST):
                await until(lambda: found.count(PollOutcome.UNCHANGED) >= 3)
            return found.active() or 0

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(poll())

    Worker(latest).publish(6)
    assert await asyncio.to_thread(run) == 6
