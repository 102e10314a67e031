"""One connection to NATS that comes back by itself, and the riders on it.

    connect ── up ── riders run ── lost ── wait (full jitter, doubling to BACKOFF_CAP_SECONDS) ── connect ...

nats-py keeps the protocol; when to connect again is ours: its own reconnect waits a fixed time, replays what newer
states have replaced long ago, and can hang in a drain towards a server that is frozen. A rider is a coroutine that
begins with each connection and is cancelled with its loss; what it holds back for the next one is its own affair.

A silent link is checked by a round trip every PING_SECONDS; without an answer for PATIENCE_SECONDS it is aborted. So a
frozen server or a cut cable is noticed within ten seconds, and not after the minutes that TCP or nats-py take.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rkmetrics.catalogue.kv import ConnectOutcome
from rkmetrics.errors import MissingExtraError
from rkmetrics.retry import Backoff, StateLog
from rkmetrics.settings import Secret, Settings, mask

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from rkmetrics.catalogue.kv import Nats

__all__ = ["Link", "NatsOptions", "Rider", "flush", "listen", "publish_all", "require_nats"]

log = logging.getLogger("rkmetrics.nats")

CONNECT_SECONDS = 3.0
PING_SECONDS = 2.0
PATIENCE_SECONDS = 4.0
LEAVE_SECONDS = 0.3
LOOK_SECONDS = 0.01
DRAIN_SECONDS = 3.0
BACKOFF_FIRST_SECONDS = 0.1
BACKOFF_CAP_SECONDS = 2.0
#: What waits of a subscription.
LISTEN_MESSAGES, LISTEN_BYTES = 65_536, 32 * 1024 * 1024
#: What nats-py holds for a server that reads slowly; a publisher waits beyond it.
PENDING_BYTES = 2 * 1024 * 1024
_PING = b"PING\r\n"
_FLUSHED_BY = ("_pongs", "_pending", "_pending_data_size", "_flush_queue")


class NatsOptions(NamedTuple):
    """Where NATS is and how to log in; of the ways to log in, the first that is set is used, as by Dynamo's runtime."""

    servers: tuple[str, ...]
    user: str | None = None
    password: Secret | None = None
    token: Secret | None = None
    nkey: Secret | None = None
    credentials_file: str | None = None
    ca_file: str | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> NatsOptions:
        return cls(
            servers=tuple(part.strip() for part in settings.nats_url.split(",") if part.strip()),
            user=settings.nats_username,
            password=settings.nats_password,
            token=settings.nats_token,
            nkey=settings.nats_nkey,
            credentials_file=settings.nats_credentials_file,
            ca_file=settings.nats_ca_file,
        )

    @property
    def shown(self) -> str:
        """The servers as a log may have them."""
        return mask(", ".join(self.servers))

    def arguments(self) -> dict[str, Any]:
        """What nats-py's connect takes. Raises OSError or ssl.SSLError for files that cannot be read."""
        found: dict[str, Any] = {"servers": list(self.servers)}
        if self.user is not None and self.password is not None:
            found |= {"user": self.user, "password": _text(self.password)}
        elif self.token is not None:
            found["token"] = _text(self.token)
        elif self.nkey is not None:
            found["nkeys_seed_str"] = _text(self.nkey)
        elif self.credentials_file is not None:
            found["user_credentials"] = self.credentials_file
        if self.ca_file is not None:
            found["tls"] = ssl.create_default_context(cafile=self.ca_file)
        return found


def _text(secret: Secret) -> str:
    return secret.reveal().decode("utf-8", "surrogateescape")


def require_nats(feature: str) -> None:
    """Raise MissingExtraError where the client library is not installed."""
    try:
        import_module("nats.aio.client")  # here, as it takes 0.3 s that no other start should
    except ImportError as error:
        raise MissingExtraError(feature, "nats", error.name or "nats") from error


async def listen(nc: Client, subject: str, hear: Callable[[Msg], Awaitable[None]], *, queue: str = "") -> Subscription:
    """Subscribe. What the listener's loop has no time for waits up to a limit; past it nats-py drops and tells.

    queue: the group of which each message reaches one.
    """
    client: Any = nc  # nats-py's annotations leave a type open
    subscription: Subscription = await client.subscribe(
        subject, queue, cb=hear, pending_msgs_limit=LISTEN_MESSAGES, pending_bytes_limit=LISTEN_BYTES
    )
    return subscription


async def flush(nc: Client) -> None:
    """Return when all that was sent is at the server: a PING, and its PONG. Who has a limit sets it around this.

    nats-py's own `flush` writes its PING past what still waits to be written, so that the PONG says nothing of that;
    it holds its caller's cancellation back while its queue is full; and what it waits with stays with the reader, which
    ends for good when a PONG comes after the wait was cancelled.
    """
    client: Any = nc
    if nc.is_closed or not all(hasattr(client, name) for name in _FLUSHED_BY):
        await nc.flush()
        return
    loop = asyncio.get_running_loop()
    answered = loop.create_future()
    client._pongs.append(answered)
    client._pending.append(_PING)
    client._pending_data_size += len(_PING)
    with suppress(asyncio.QueueFull):  # it is about to write all there is
        client._flush_queue.put_nowait(loop.create_future())
    await asyncio.shield(answered)


async def publish_all(nc: Client, subject: str, payloads: Sequence[bytes]) -> None:
    """Publish many messages of one subject, each with the server's limit kept by the caller.

    nats-py checks and queues one at a time, for 2 us each; as one command, which its parser of nothing but bytes takes
    as well, they cost a tenth. The last one goes its usual way, which also wakes the flusher.
    """
    client: Any = nc
    if len(payloads) > 1 and nc.is_connected and hasattr(client, "_send_command"):
        head = f"PUB {subject} ".encode()
        await client._send_command(b"".join([b"%b%d\r\n%b\r\n" % (head, len(each), each) for each in payloads[:-1]]))
        payloads = payloads[-1:]
    for payload in payloads:
        await nc.publish(subject, payload)


class Rider(Protocol):
    """Something that uses a connection while it lasts."""

    async def run(self, nc: Client) -> None:
        """Work until cancelled, which comes with the loss of the connection; begins again with the next one."""

    async def drain(self, nc: Client) -> None:
        """Send what waits, as the link is about to be closed on purpose; cut off after a while."""

    def waits(self) -> bool:
        """Whether there is something to send."""
        ...


class Link:
    """A connection for some riders, in the running event loop. `run()` lasts until `stop()`.

    name: how the connection calls itself at the server. connections: counted there while they stand.
    """

    def __init__(self, options: NatsOptions, cells: Nats, *, name: str) -> None:
        self._options, self._cells, self._name, self._drain_seconds = options, cells, name, DRAIN_SECONDS
        self._riders: dict[Rider, asyncio.Task[None] | None] = {}
        self._nc: Client | None = None  # what stands
        self._trying: Client | None = None  # what stands, or is to
        self._stopping = asyncio.Event()
        self._backoff, self._log = Backoff(BACKOFF_FIRST_SECONDS, BACKOFF_CAP_SECONDS), StateLog(log)
        self._standing, self._wanted = cells.connections.share(), cells.connections_wanted.share()
        self._stop_by = 0.0
        self._was_up = False
        self._failing = False  # the last try did
        self._troubles: set[str] = set()  # said of the connection that stands
        self._last_error: BaseException | None = None
        self._closed = asyncio.Event()

    # --- riders -------------------------------------------------------------------------------------------------------

    def add(self, rider: Rider) -> None:
        """Take a rider on; it starts at once if the connection stands."""
        self._riders.setdefault(rider, None)
        if self._nc is not None and self._riders[rider] is None:
            self._board(rider, self._nc)

    async def remove(self, rider: Rider) -> None:
        """Let a rider send what waits, and go on without it. Whoever calls has a limit."""
        try:
            while rider.waits() and not self._failing:  # the first connection may be on its way
                if self._nc is not None:
                    await self._drain([rider], self._nc)
                    break
                await asyncio.sleep(LOOK_SECONDS)
        finally:  # also past the limit
            await _cancel([self._riders.pop(rider, None)])

    def _board(self, rider: Rider, nc: Client) -> None:
        self._riders[rider] = asyncio.create_task(self._carry(rider, nc), name=f"rkmetrics {type(rider).__name__}")

    async def _carry(self, rider: Rider, nc: Client) -> None:
        """Run a rider; what goes wrong in it ends neither the others nor the link."""
        from nats.errors import Error

        backoff = Backoff(BACKOFF_FIRST_SECONDS, BACKOFF_CAP_SECONDS)
        while not nc.is_closed:
            try:
                await rider.run(nc)
                return
            except (Error, OSError, TimeoutError) as error:
                log.debug("NATS: %s stopped (%r) and starts again", type(rider).__name__, error)
            except Exception:
                log.exception("NATS: %s failed and starts again", type(rider).__name__)
            await asyncio.sleep(backoff.next())

    async def _drain(self, riders: Iterable[Rider], nc: Client) -> None:
        with suppress(Exception):
            async with asyncio.timeout(self._drain_seconds):
                await asyncio.gather(*(rider.drain(nc) for rider in riders), return_exceptions=True)
                await flush(nc)

    # --- the connection -----------------------------------------------------------------------------------------------

    def stop(self, drain_seconds: float = DRAIN_SECONDS) -> None:
        """End `run()`, after what waits was sent, if the server is there and takes it within that time."""
        self._drain_seconds, self._stop_by = drain_seconds, time.monotonic() + drain_seconds
        self._stopping.set()

    @property
    def _over(self) -> bool:
        """Whether to end. A program that stops as soon as it published waits for its first connection; for one that
        cannot be had, nobody waits."""
        if not self._stopping.is_set():
            return False
        return self._failing or time.monotonic() > self._stop_by or not any(rider.waits() for rider in self._riders)

    def forget(self) -> None:
        """In a forked child: the connection is the parent's, and counted there."""
        self._standing.close()
        self._wanted.close()

    async def run(self) -> None:
        """Keep the connection, until stopped or cancelled."""
        self._wanted.set(1)
        try:
            while not self._over:
                nc = await self._connect()
                if nc is None:
                    await self._rest(self._backoff.next())
                else:
                    await self._ride(nc)
        finally:
            await _cancel(self._riders.values())
            self._standing.close()
            self._wanted.close()

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _connect(self) -> Client | None:
        """Try once. None, said and counted, when it does not work."""
        from nats.aio.client import Client

        nc = self._trying = Client()
        self._last_error = None
        try:
            async with asyncio.timeout(CONNECT_SECONDS * len(self._options.servers) + 1):
                await nc.connect(
                    **self._options.arguments(),
                    name=f"rkmetrics {self._name}",
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=CONNECT_SECONDS,  # type: ignore[arg-type] # whole seconds are not needed
                    ping_interval=3600,  # ours is in _watch
                    pending_size=PENDING_BYTES,
                    error_cb=self._heard,
                    closed_cb=self._hear_end,
                )
        except asyncio.CancelledError:
            _abort(nc)
            raise
        except Exception as error:
            _abort(nc)
            self._failing = True
            self._failed(error)
            return None
        self._failing = False
        self._cells.connects[ConnectOutcome.OK].inc()
        level = logging.WARNING if self._was_up else logging.INFO
        self._log.note("up", level, "NATS (%s): connected to %s", self._name, _where(nc))
        self._was_up = True
        return nc

    async def _heard(self, error: Exception) -> None:
        """nats-py's errors that end nothing: a try that failed, a permission, a slow consumer. Each is said once."""
        from nats.errors import ConnectionClosedError, SlowConsumerError, StaleConnectionError

        self._last_error = error
        if isinstance(error, SlowConsumerError):
            self._cells.dropped.inc()
        if isinstance(error, ConnectionClosedError | StaleConnectionError | OSError):
            return  # the end of the connection, which has a line of its own
        kind = f"{type(error).__name__} {_one_line(error)[:60]}"
        if self._nc is not None and kind not in self._troubles and len(self._troubles) < StateLog.BURST:
            self._troubles.add(kind)
            log.warning("NATS (%s): %s", self._name, mask(_one_line(error)))

    async def _hear_end(self) -> None:
        self._closed.set()

    def _failed(self, error: BaseException) -> None:
        outcome = _outcome(error, self._last_error)
        told = self._last_error if _says_nothing(error) and self._last_error is not None else error
        self._cells.connects[outcome].inc()
        self._log.note(
            f"down {outcome}",
            logging.WARNING,
            "NATS (%s): no connection to %s (%s: %s); trying again every %g s at most, and nothing waits for it",
            self._name,
            self._options.shown,
            outcome.value,
            mask(_one_line(told)),
            BACKOFF_CAP_SECONDS,
        )

    async def _ride(self, nc: Client) -> None:
        """Have the riders run until the connection is lost, or all ends."""
        self._nc, self._troubles = nc, set()
        self._closed.clear()
        self._standing.set(1)
        began = time.monotonic()
        for rider in list(self._riders):
            self._board(rider, nc)
        lost = asyncio.create_task(self._watch(nc))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({lost, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not lost.done():
                await self._drain(list(self._riders), nc)
        finally:
            self._nc = None
            self._standing.set(0)
            try:
                await _cancel([lost, stopping, *self._riders.values()])
                self._riders = dict.fromkeys(self._riders)
                await _leave(nc)
            finally:  # also where this is cancelled once more
                _abort(nc)
        if not self._stopping.is_set():
            self._cells.disconnects.inc()
            if time.monotonic() - began > BACKOFF_CAP_SECONDS:
                self._backoff.reset()
            told = "NATS (%s): connection to %s lost; connecting again"
            self._log.note("lost", logging.WARNING, told, self._name, _where(nc))
            await self._rest(self._backoff.next())

    async def _watch(self, nc: Client) -> None:
        """Return when the connection is gone, or answers no more."""
        while not nc.is_closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(PING_SECONDS):
                    await self._closed.wait()
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await flush(nc)
            except TimeoutError:
                log.debug("NATS (%s): no answer for %g s", self._name, PATIENCE_SECONDS)
                return
            except Exception as error:
                log.debug("NATS: %r", error)
                return


async def _leave(nc: Client) -> None:
    """Close, and do not wait long: towards a frozen server, nats-py would wait for ever."""
    with suppress(Exception):
        async with asyncio.timeout(LEAVE_SECONDS):
            await nc.close()


def _writer(nc: Client | None) -> Any:
    """nats-py's stream writer; None before there is one."""
    return getattr(getattr(nc, "_transport", None), "_io_writer", None)


def _abort(nc: Client) -> None:
    """Let the socket and nats-py's tasks go, whatever is in their buffers."""
    writer = _writer(nc)
    if writer is not None:
        writer.transport.abort()
    for name in ("_reading_task", "_ping_interval_task", "_flusher_task"):
        task = getattr(nc, name, None)
        if task is not None:
            task.cancel()


async def _cancel(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def _where(nc: Client) -> str:
    server: Any = getattr(nc, "_current_server", None)  # `connected_url` is None once the connection is lost
    return f"{server.uri.hostname}:{server.uri.port}" if server else "the server"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _says_nothing(error: BaseException) -> bool:
    from nats.errors import NoServersError

    return isinstance(error, NoServersError | TimeoutError)


def _outcome(error: BaseException, heard: BaseException | None) -> ConnectOutcome:
    """What a failed try counts as; nats-py says "no servers" and has told the reason before."""
    from nats.errors import AuthorizationError

    for each in (error, heard):
        text = str(each).lower()
        if isinstance(each, AuthorizationError) or "authorization" in text or "authentication" in text:
            return ConnectOutcome.UNAUTHORIZED
        if isinstance(each, TimeoutError):
            return ConnectOutcome.TIMEOUT
        if isinstance(each, FileNotFoundError | PermissionError):  # a certificate, a file of credentials
            return ConnectOutcome.ERROR
        if isinstance(each, OSError) and not isinstance(each, ssl.SSLError):
            return ConnectOutcome.UNREACHABLE
    return ConnectOutcome.ERROR
