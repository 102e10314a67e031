"""Where a plane listens, and whom it lets in: what the servers of tcp and http share, and where answers are awaited.

A connection is a `Guest`. It may rest for ever, but what has begun has to end: incomplete requests are counted over all
guests, and where no place is left the oldest stranger goes for the newcomer. So whoever opens connections and says
nothing, or half of something, keeps nobody else out (reliability, T16, T20).
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from rkmetrics.addresses import WILDCARDS, advertised, first_address, local_addresses
from rkmetrics.catalogue.planes import IntakeRefusal
from rkmetrics.errors import BackendError, ServeError
from rkmetrics.planes.callhome import CLOSE_SECONDS, CallHome, keep_alive, refuse
from rkmetrics.planes.fork import descriptors
from rkmetrics.planes.serving import PlaneServer

if TYPE_CHECKING:
    from rkmetrics.settings import Settings

__all__ = ["KEPT_LIMIT_BYTES", "SMALL_BYTES", "Guest", "ListeningServer", "call_home", "here", "reachable"]

CONNECTIONS_LIMIT = 10_000
#: All incomplete requests together may take so much, or some of the largest; beyond it whoever has more than a small
#: one incomplete is sent away, and requests that come at once are taken as before.
KEPT_LIMIT_BYTES, SMALL_BYTES = 256 * 1024 * 1024, 64 * 1024
#: After an answer that ends a connection, what is still coming is read and dropped for so long: closing at once would
#: make TCP take the answer back (RFC 9112, 9.6).
LINGER_SECONDS = 2.0


# --- where ------------------------------------------------------------------------------------------------------------


def here(host: str | None) -> str:
    """Return the address to bind where nobody says one: the first that is not loopback, as Dynamo does.

    "*" is all of IPv4: for both versions asyncio makes two sockets, and a free port is another one on each.
    """
    return "0.0.0.0" if host == "*" else host or first_address(local_addresses()) or "127.0.0.1"


def reachable(settings: Settings, host: str, bound: str, port: int) -> str:
    """Return host:port as others reach it. host: what was to be bound; bound, port: what is. Raises BackendError."""
    if host in WILDCARDS:
        return advertised(_told(settings), host, port)
    return f"[{bound}]:{port}" if ":" in bound else f"{bound}:{port}"


def _told(settings: Settings) -> str | None:
    """The host of what is announced for traffic; its port is another's."""
    told = settings.advertise_address
    return told.rpartition(":")[0] if told and ":" in told.strip("[]") and not told.endswith("]") else told


def call_home(settings: Settings, host: str | None) -> CallHome:
    """Return where a client awaits its answers."""
    return CallHome(
        here(host),
        lambda bound, port: reachable(settings, bound, bound, port),
        settings.tcp_max_message_size_bytes,
    )


# --- connections ------------------------------------------------------------------------------------------------------


class Guest(asyncio.Protocol):
    """A connection from a client. known: a request was complete on it; resting: nothing is incomplete on it."""

    def __init__(self, server: ListeningServer) -> None:
        self._server, self._loop = server, asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._kept = 0
        self._over = self.known = False

    @property
    def transport(self) -> asyncio.Transport | None:
        """What carries it, while it stands."""
        return self._transport

    @property
    def resting(self) -> bool:
        return not self._kept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody is there."""
        self._transport = cast("asyncio.Transport", transport)
        if not self._server.admit(self):
            self._transport.abort()
            return
        keep_alive(self._transport)
        self._admitted()

    def _admitted(self) -> None:
        """It was let in."""

    def keep(self, rest: int) -> bool:
        """Count what is incomplete on it. Whether it is to be sent away for that."""
        crowded = self._server.keep(rest - self._kept)
        self._kept = rest
        return crowded and rest > SMALL_BYTES

    def _linger(self, transport: asyncio.Transport) -> None:
        """Send no more, and wait a little for the peer to have read what was said last."""
        self._leave()
        if not transport.is_reading():
            transport.resume_reading()
        if transport.can_write_eof():
            transport.write_eof()

    def _leave(self) -> None:
        """Take nothing more, and be gone soon, whether the peer reads or not."""
        self._over = True
        self.keep(0)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(LINGER_SECONDS, self.abort)

    def pause_writing(self) -> None:
        """The client does not read what it is told: it is not read either."""
        if self._transport is not None and not self._over:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """End it; what was said before is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Break it off."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._transport = None
        self.keep(0)
        if self._timer is not None:
            self._timer.cancel()
        self._server.release(self)


# --- servers ----------------------------------------------------------------------------------------------------------


class ListeningServer(PlaneServer):
    """A server that clients connect to. connections_limit, kept_limit_bytes: what strangers may take; to be changed
    before it starts. kept_requests: so many of the largest may be incomplete in any case."""

    connections_limit, kept_limit_bytes, kept_requests = CONNECTIONS_LIMIT, KEPT_LIMIT_BYTES, 2

    @property
    def limit_bytes(self) -> int:
        """Of a request."""
        return self.settings.tcp_max_message_size_bytes

    @property
    @abstractmethod
    def _place(self) -> tuple[str | None, int]:
        """Host and port of the settings."""

    @abstractmethod
    def _guest(self) -> Guest:
        """Somebody connects."""

    async def _listen(self) -> None:
        told, port = self._place
        host = here(told)
        self._guests: dict[Guest, None] = {}  # the oldest first
        self._left = asyncio.Event()
        self._kept = 0
        try:
            self._server = await asyncio.get_running_loop().create_server(self._guest, host, port, backlog=1_024)
        except (OSError, ValueError) as error:  # ValueError: a name that no look-up takes
            name = f"DYN_{self.mode.upper()}_RPC"
            raise ServeError(
                f"the {self.mode} plane cannot listen at {host}:{port}: {error}; set {name}_HOST and {name}_PORT "
                "(0 takes a free port)"
            ) from error
        bound, port = self._server.sockets[0].getsockname()[:2]
        try:
            self._address = reachable(self.settings, host, bound, port)
        except BackendError:
            self._server.close()
            raise

    @property
    def address(self) -> str:
        """host:port, as others reach it."""
        return self._address

    def _open_files(self) -> Iterable[int]:
        return descriptors([self._server, *(guest.transport for guest in self._guests)])

    async def _close(self) -> None:
        await refuse(self._server)
        for guest in list(self._guests):
            guest.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                while self._guests:
                    self._left.clear()
                    await self._left.wait()
        for guest in list(self._guests):  # who does not read what was said last
            guest.abort()
        await self._server.wait_closed()

    # --- who is let in ------------------------------------------------------------------------------------------------

    def keep(self, more_bytes: int) -> bool:
        """Count what is kept of incomplete requests. Whether that is too much."""
        self._kept += more_bytes
        limit = max(self.kept_limit_bytes, self.kept_requests * self.limit_bytes)
        return more_bytes > 0 and self._kept > limit

    @property
    def kept_bytes(self) -> int:
        """What is kept of incomplete requests."""
        return self._kept

    def admit(self, guest: Guest) -> bool:
        """Whether there is room for another connection. Where there is none, the oldest is ended for it: of those that
        never had an answer and say nothing, then of those that never had one, then of those that rest."""
        if len(self._guests) >= self.connections_limit:
            self.note(IntakeRefusal.BUSY, f"{self.connections_limit} connections are there already")
            oldest = self._oldest()
            if oldest is None:
                return False
            self.release(oldest)
            oldest.abort()
        self._guests[guest] = None
        self.connections.set(len(self._guests))
        return True

    def _oldest(self) -> Guest | None:
        strangers = [each for each in self._guests if not each.known]
        silent = next((each for each in strangers if each.resting), None)
        return silent or next(iter(strangers), None) or next((each for each in self._guests if each.resting), None)

    def release(self, guest: Guest) -> None:
        """A connection ended."""
        if guest in self._guests:
            del self._guests[guest]
            self._left.set()
            self.connections.set(len(self._guests))
