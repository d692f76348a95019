"""Bounds on connections: what may come before a token has been shown, for how long, and how many there may be.

uvicorn has none of these: a head, a trailer, or a body whose request has been answered may be endless, a connection
that sends nothing is kept for ever, and one in a TLS handshake cannot be seen.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from shared.errors import InvalidRequest, LockstepError, Timeout, TooLarge

logger = logging.getLogger("lockstep.api")

#: In the `extensions` of a scope: a function that `AuthMiddleware` calls for a request that may pass.
ADMIT = "lockstep.admit"
#: In one turn of the event loop: few enough for the earlier ones to be read before many newer ones have come.
_ACCEPTED_AT_ONCE = 16
_BACKLOG = 1024
_SHUTDOWN_SECONDS = 5.0
#: Of one of a name's addresses, where another may do: IPv6 is often switched off.
_NOT_OF_THIS_MACHINE = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
#: Of a connection that its client, or the network, has broken before it was accepted (accept(2)); others are ours.
_BROKEN_BEFORE = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
        errno.EPERM,
    }
)
_DESCRIPTORS = 2**16
#: For the engine's sockets, files, and connections that have been closed in this turn of the event loop.
_OTHER_DESCRIPTORS = 768


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may send, and the seconds that it may take."""

    head_bytes: int = 2**16
    url_bytes: int = 2**13
    headers: int = 256
    #: Requests that wait for the answer to an earlier one of their connection.
    pipelined: int = 16
    #: Still read of a body whose request has been answered: a client that is sending it may see the answer only then.
    left_bytes: int = 2**20
    left_seconds: int = 5
    #: From the connection to its first byte; the TLS handshake has as many.
    first_byte_seconds: int = 15
    #: From the first byte of a head to its last.
    head_seconds: int = 15
    #: From a head without a token to the end of its answer.
    answer_seconds: int = 15
    #: Without a byte sent, although an answer waits for the client to read.
    stall_seconds: int = 120


class Connections:
    """All open connections. When there are too many, one is closed: the oldest of those that have shown no token, else
    of those that are idle.

    Args:
        most: connections that may be open at once.
    """

    def __init__(self, most: int, limits: ConnectionLimits | None = None) -> None:
        self.most, self.limits = most, limits or ConnectionLimits()
        #: Seconds in which the event loop ran: a loop that was blocked must not end those whom it did not listen to.
        self.now = 0
        self._strangers = OrderedDict[Connection, None]()
        self._idle = OrderedDict[Connection, None]()
        self._busy = OrderedDict[Connection, None]()

    def __len__(self) -> int:
        return len(self._strangers) + len(self._idle) + len(self._busy)

    def add(self, connection: Connection) -> bool:
        """Count a new connection; return False if there is no room, and nobody who could make some."""
        if len(self) >= self.most:
            if not (closable := self._strangers or self._idle):
                return False
            closable.popitem(last=False)[0].abort()
        self._strangers[connection] = None
        return True

    def admit(self, connection: Connection) -> None:
        """Count it among those that have shown a token, with a request under way."""
        for kind in (self._strangers, self._idle):
            if connection in kind:
                del kind[connection]
                self._busy[connection] = None

    def rest(self, connection: Connection) -> None:
        """Count it as idle, if it has shown a token."""
        if connection in self._busy:
            del self._busy[connection]
            self._idle[connection] = None

    def discard(self, connection: Connection) -> None:
        """Count it no more."""
        for kind in (self._strangers, self._idle, self._busy):
            kind.pop(connection, None)

    def tick(self) -> None:
        """Look after all connections; called once in a second."""
        self.now += 1
        for connection in (*self._strangers, *self._idle, *self._busy):
            connection.look(self.now)


class _Refusal(Exception):
    """Ends the parsing of a request that cannot be taken."""

    def __init__(self, status: int, error: LockstepError) -> None:
        super().__init__()
        self.status, self.error = status, error


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP connection within `ConnectionLimits`."""

    def __init__(self, connections: Connections, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._all, self._limits = connections, connections.limits
        self._extensions: dict[str, Any] = {ADMIT: self._admit}
        self._admitted = False
        self._opening: asyncio.Task[Any] | None = None
        #: Whether nothing of the next request has come.
        self._resting = True
        self._deadline: float = connections.now + self._limits.first_byte_seconds
        #: Bytes since the last complete head or piece of a body: of heads, trailers, chunk extensions, empty lines.
        self._overhead = 0
        #: Bytes that are still read of a request that has been answered; None: it is not the end.
        self._left: int | None = None
        self._refused = False
        self._unsent, self._stalled_since = 0, 0

    def open(self, accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Begin on a socket that has just been accepted."""
        timeouts = {"ssl_shutdown_timeout": _SHUTDOWN_SECONDS} if tls else {}
        opening = self.loop.connect_accepted_socket(lambda: self, accepted, ssl=tls, **timeouts)
        self._opening = self.loop.create_task(opening)
        self._opening.add_done_callback(partial(self._opened, accepted))

    def _opened(self, accepted: socket.socket, opening: asyncio.Task[Any]) -> None:
        if not opening.cancelled():
            opening.exception()  # the client's handshake; nobody else wants to know
        if self.transport is None:
            self._all.discard(self)
            accepted.close()

    def abort(self) -> None:
        """Close at once, whatever has not been sent."""
        if self.transport is not None:
            self.transport.abort()
        elif self._opening is not None:
            self._opening.cancel()

    def look(self, now: int) -> None:
        """End what is overdue."""
        if now >= self._deadline:
            if self._resting or self._left is not None or self._waits():
                self.abort()
            else:
                self._refuse(408, Timeout(f"the head of the request took more than {self._limits.head_seconds} s"))
        elif self.transport is not None and (self.flow.write_paused or self.transport.is_closing()):
            unsent = self.transport.get_write_buffer_size()
            if unsent != self._unsent:
                self._unsent, self._stalled_since = unsent, now
            elif now - self._stalled_since >= self._limits.stall_seconds:
                self.abort()
        else:
            self._unsent, self._stalled_since = 0, now

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._end_after(self._limits.first_byte_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.discard(self)
        self._extensions.clear()  # no cycle for the garbage collector
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                self.abort()
            if self._left < 0 or self._refused:
                return
        elif self._resting:
            self._resting = False
            self._end_after(self._limits.head_seconds)
        self._overhead += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return  # what follows is another protocol
        except httptools.HttpParserError as error:
            malformed = _Refusal(400, InvalidRequest("this is not a request of HTTP/1.1"))
            refusal = error.__context__ if isinstance(error.__context__, _Refusal) else malformed
            self._refuse(refusal.status, refusal.error)
            return
        if self._overhead > self._limits.head_bytes:
            self._refuse(431, self._too_large())

    # httptools' callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > (most := self._limits.url_bytes):
            raise _Refusal(414, TooLarge(f"the URL is longer than {most} bytes", limit=most))

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= (most := self._limits.headers):
            raise _Refusal(431, TooLarge(f"the request has more than {most} headers", limit=most))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._overhead = 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._limits.head_bytes:
            raise _Refusal(431, self._too_large())
        if len(self.pipeline) >= (most := self._limits.pipelined):
            raise _Refusal(400, InvalidRequest(f"more than {most} requests wait for the answer to an earlier one"))
        upgrade = self.parser.should_upgrade()
        if upgrade and self._get_upgrade() == b"websocket":
            raise _Refusal(400, InvalidRequest("this server has no websockets"))
        super().on_headers_complete()
        if upgrade:
            self.cycle.keep_alive = False  # the rest of the connection has not been parsed
        self.headers = []  # trailers must not become headers
        self._resting = False
        if self._admitted:
            self._admit()
        else:
            self._end_after(self._limits.answer_seconds)

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._left is not None:
            self._left = None
            self._rest()

    # uvicorn's callbacks

    def on_response_complete(self) -> None:
        next_one = bool(self.pipeline)
        super().on_response_complete()
        self._unset_keepalive_if_required()  # uvicorn's timer: `look` ends idle connections
        if next_one and not self.transport.is_closing():
            self._end_after(math.inf if self._admitted else self._limits.answer_seconds)
            return
        self._rest()
        if self.transport.is_closing():
            # Those who have shown a token may read a long answer for as long as they read.
            self._end_after(math.inf if self._admitted else self._limits.left_seconds)
        elif self.cycle.more_body:
            self._left = self._limits.left_bytes
            self._end_after(self._limits.left_seconds)

    def _should_upgrade(self) -> bool:
        return False

    # ours

    def _admit(self) -> None:
        self._admitted = True
        self._end_after(math.inf)
        self._all.admit(self)

    def _rest(self) -> None:
        self._resting = True
        self._end_after(self.timeout_keep_alive)
        self._all.rest(self)

    def _end_after(self, seconds: float) -> None:
        self._deadline = self._all.now + seconds

    def _waits(self) -> bool:
        """Whether an answer is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def _too_large(self) -> LockstepError:
        most = self._limits.head_bytes
        return TooLarge(f"the request's lines (head, chunk sizes, trailers) are longer than {most} bytes", limit=most)

    def _refuse(self, status: int, error: LockstepError) -> None:
        """Answer and close, but read a little more first: a client that still sends might not see the answer."""
        if self._has_answered() or self.transport.is_closing():
            self.abort()
            return
        if self._waits():
            self.cycle.disconnected = True  # whoever reads its body
            self.cycle.message_event.set()
        self._refused, self._left = True, self._limits.left_bytes
        self._end_after(self._limits.left_seconds)
        body = error.body().model_dump_json().encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _has_answered(self) -> bool:
        """Whether the request being read has its answer, or an earlier one still waits for its own."""
        if self._waits():
            return self.cycle.response_started or not self.cycle.more_body or bool(self.pipeline)
        return self._left is not None


class Listener:
    """Accepts connections on one socket, in place of `asyncio.Server`, which hides those in their TLS handshake.

    Args:
        listening: bound, and listening.
        connection: makes the protocol of a new connection.
    """

    def __init__(
        self,
        listening: socket.socket,
        connections: Connections,
        connection: Callable[[], Connection],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._listening, self._connections, self._connection, self._tls = listening, connections, connection, tls
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        listening.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accept nothing more."""
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()

    async def wait_closed(self) -> None:
        """Return at once; uvicorn calls it."""

    def _listen(self) -> None:
        self._again = None
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _BROKEN_BEFORE:
                    continue
                # No descriptor is left, and none will be in this turn of the event loop.
                logger.warning("cannot accept connections: %s; trying again in a second", error)
                self._loop.remove_reader(self._listening)
                self._again = self._loop.call_later(1.0, self._listen)
                return
            connection = self._connection()
            if self._connections.add(connection):
                accepted.setblocking(False)
                connection.open(accepted, self._tls)
            else:
                accepted.close()


def connections_that_fit() -> int:
    """Raise this process's soft limit on descriptors; return how many connections that leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _DESCRIPTORS if soft == resource.RLIM_INFINITY else max(soft - _OTHER_DESCRIPTORS, soft // 2)


def listen(host: str | None, port: int) -> list[socket.socket]:
    """Listen on all addresses of `host`, on all of this machine if it is empty.

    Raises:
        LockstepError: `invalid_request` if that is not possible.
    """
    if not 0 <= port < 2**16:
        raise InvalidRequest(f"--port {port}: give one of 0 to 65535")
    opened: list[socket.socket] = []
    problem: OSError | None = None
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            try:
                opened.append(socket.create_server(address, family=family, backlog=_BACKLOG))
            except OSError as error:
                if error.errno not in _NOT_OF_THIS_MACHINE:
                    raise
                problem = error
        if not opened:
            raise problem or OSError("it has no address")
    except OSError as error:
        for one in opened:
            one.close()
        if error.errno == errno.EADDRINUSE:
            raise InvalidRequest(
                f"port {port} is in use (`ss -ltnp 'sport = :{port}'` shows by what): end that, or give another --port"
            ) from error
        raise InvalidRequest(f"cannot listen on {host or '*'}:{port} ({error}); give another --port") from error
    return opened
