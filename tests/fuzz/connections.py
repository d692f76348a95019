"""Connections as no HTTP client makes them: heads and bodies without end, and sockets that are held open."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hypothesis import strategies as st

from tests.fuzz.campaign import Target, every

#: How much is sent of what has no end. A server must have closed the connection before it has taken all of it.
ENDLESS_BYTES = 6 * 2**20
_PATIENCE_S = 6.0
_LEAST_BUFFER = 2**15

_HOST = b"host: 127.0.0.1\r\n"
_GET = b"GET /health HTTP/1.1\r\n" + _HOST
_CHUNKED = b"POST /tokenize HTTP/1.1\r\n" + _HOST + b"transfer-encoding: chunked\r\n\r\n"
#: Kind of a head (or of what surrounds a body) without end -> its beginning, and what follows again and again.
HEADS: dict[str, tuple[bytes, bytes]] = {
    "header lines": (_GET, b"x-a: b\r\n"),
    "the same header": (_GET, b"cookie: a=b\r\n"),
    "a header": (_GET + b"x-a: ", b"a"),
    "a header's name": (_GET, b"a"),
    "a folded header": (_GET + b"x-a: a\r\n", b" a\r\n"),
    "spaces in a header": (_GET + b"x-a:", b" "),
    "Host": (b"GET /health HTTP/1.1\r\nhost: ", b"a"),
    "Authorization": (_GET + b"authorization: Bearer ", b"a"),
    "Content-Length": (b"POST /tokenize HTTP/1.1\r\n" + _HOST + b"content-length: ", b"0"),
    "a lease": (b"PUT /v1/runs/fuzzed/adapter HTTP/1.1\r\n" + _HOST + b"lockstep-lease: ", b"a"),
    "a version": (b"POST /v1/completions HTTP/1.1\r\n" + _HOST + b"lockstep-policy: fuzzed@0.", b"9"),
    "a method": (b"", b"A"),
    "blank lines": (b"", b"\r\n"),
    "a path": (b"GET /", b"a"),
    "a path of escapes": (b"GET /", b"%41"),
    "a run's name": (b"GET /v1/runs/", b"a"),
    "a query": (b"GET /health?", b"a=b&"),
    "a URL with a host": (b"GET http://", b"a"),
    "a protocol": (b"GET /health HTTP/1.1", b"1"),
    "zeros before a chunk's length": (_CHUNKED, b"0"),
    "a chunk's extension": (_CHUNKED + b"1;", b"a"),
    "trailers": (_CHUNKED + b"2\r\n{}\r\n0\r\n", b"x-a: b\r\n"),
}
_LONG = _HOST + b"content-length: 1000000000000\r\n"
_PIECES = _HOST + b"transfer-encoding: chunked\r\n"
_CHUNK = b"400\r\n" + b"a" * 0x400 + b"\r\n"
#: Kind of a request that has its answer before its body -> its head, and what follows again and again.
ANSWERED_EARLY: dict[str, tuple[bytes, bytes]] = {
    "/health with a body": (b"GET /health HTTP/1.1\r\n" + _LONG, b"a"),
    "/health in chunks": (b"GET /health HTTP/1.1\r\n" + _PIECES, _CHUNK),
    "/v1/state with a body": (b"GET /v1/state HTTP/1.1\r\n" + _LONG, b"a"),
    "/v1/state in chunks": (b"GET /v1/state HTTP/1.1\r\n" + _PIECES, _CHUNK),
    "a body too large": (b"POST /v1/generate HTTP/1.1\r\n" + _LONG, b"a"),
    "a body too large for vLLM": (b"POST /v1/chat/completions HTTP/1.1\r\n" + _LONG, b"a"),
    "an unknown path": (b"POST /nowhere HTTP/1.1\r\n" + _LONG, b"a"),
    "a wrong method": (b"PATCH /v1/state HTTP/1.1\r\n" + _LONG, b"a"),
    "no lease": (b"PUT /v1/runs/fuzzed/adapter HTTP/1.1\r\n" + _LONG, b"a"),
    "no lease, in chunks": (b"PUT /v1/runs/fuzzed/adapter HTTP/1.1\r\n" + _PIECES, _CHUNK),
    "no adapter": (b"PUT /v1/runs/fuzzed/adapter HTTP/1.1\r\nlockstep-lease: a stranger's\r\n" + _LONG, b"a"),
    "a run's name that cannot be": (b"PUT /v1/runs/%2e%2e/adapter HTTP/1.1\r\n" + _LONG, b"a"),
    "two lengths": (b"POST /tokenize HTTP/1.1\r\ncontent-length: 7\r\n" + _LONG, b"a"),
    "a length of many digits": (b"POST /tokenize HTTP/1.1\r\n" + _HOST + b"content-length: " + b"9" * 400, b"\r\n"),
}


@dataclass
class Outcome:
    """What became of one connection: the status of the first response (0: none), bytes taken, whether it was closed."""

    status: int = 0
    taken: int = 0
    closed: bool = False


def exchange(address: tuple[str, int], data: Iterator[bytes], patience_s: float = _PATIENCE_S) -> Outcome:
    """Send all of `data`, whatever the server responds, until it closes the connection.

    Args:
        patience_s: seconds to wait when the server takes nothing more, and after the last byte.
    """
    outcome, head, left = Outcome(), b"", b""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LEAST_BUFFER)  # `taken` is what the server took
        connection.settimeout(patience_s)
        reading = True
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.connect(address)
            connection.setblocking(False)
            while True:
                left = left or next(data, b"")
                can_read, can_send, _ = select.select([connection] * reading, [connection] * bool(left), [], patience_s)
                if not can_read and not can_send:
                    break
                if can_read:
                    received = connection.recv(2**16)
                    head += received[: 2**10 - len(head)]
                    reading = bool(received)
                    outcome.closed |= not reading
                if can_send:
                    sent = connection.send(left)
                    outcome.taken += sent
                    left = left[sent:]
                elif not reading:
                    break
            if left:
                outcome.closed = False  # in one direction only
            return _with_status(outcome, head)
        outcome.closed = True
    return _with_status(outcome, head)


def _with_status(outcome: Outcome, head: bytes) -> Outcome:
    words = head.split(b" ", 2)
    outcome.status = int(words[1]) if len(words) > 1 and words[1][:3].isdigit() else 0
    return outcome


def endless(begin: bytes, again: bytes, piece: int, size: int = ENDLESS_BYTES) -> Iterator[bytes]:
    """Yield `begin`, and then `again` until there are `size` bytes, in pieces."""
    if begin:
        yield begin
    unit = again * max(piece // len(again), 1)
    for _ in range(size // len(unit)):
        yield unit


def address_of(url: str) -> tuple[str, int]:
    """Return host and port of a URL."""
    return urlsplit(url).hostname or "", urlsplit(url).port or 80


_PIECE_SIZES = st.sampled_from([200, 1460, 2**16, 2**16])


def fuzz_connections(target: Target, examples: int, number: int) -> None:
    """Send heads without end, and go on after a response; check that heads of a common size are still taken."""

    def send(drawn: tuple[str, int]) -> None:
        what, piece = drawn
        begin, again = HEADS.get(what) or ANSWERED_EARLY[what]
        data = begin if what in HEADS else begin + b"\r\n"
        expect_end(target, what, endless(data, again, piece))

    for kind in (*HEADS, *ANSWERED_EARLY):
        send((kind, 2**16))
    every(st.tuples(st.sampled_from([*HEADS, *ANSWERED_EARLY]), _PIECE_SIZES), examples, number, send)
    for size in (1_000, 4_000, 16_000):
        path, headers = f"/health?a={'a' * (size // 4)}", {"x-a": "a" * size}
        answer = target.send("connections", "GET", path, headers=headers)
        if answer is not None and answer.status_code != 200:
            target.tally.fail(f"connections: a head of {size} bytes gets {answer.status_code}")
    target.expect_unchanged("connections without end")


def expect_end(target: Target, what: str, data: Iterator[bytes]) -> None:
    """Send `data`, which has no end, and check that the server closes the connection."""
    target.during = f"connections: {what} without end"
    outcome = exchange(address_of(target.url), data)
    target.tally.statuses.setdefault("connections", Counter())[outcome.status] += 1
    if outcome.status >= 500:
        target.tally.fail(f"connections: {what} without end gets {outcome.status}")
    if not outcome.closed:
        target.tally.fail(f"connections: {what} without end: {outcome.taken} bytes taken, and it is still open")
    elif outcome.taken >= ENDLESS_BYTES:
        target.tally.fail(f"connections: {what} without end: all {outcome.taken} bytes were taken")


@dataclass
class _Kind:
    """Connections that are held open.

    Attributes:
        first: sent at once; `answered`: and its response is read.
        trickle: sent again and again, one byte a second.
        count: how many connections.
        limit_s: seconds after which the server must have closed them.
    """

    first: bytes
    trickle: bytes
    count: int
    limit_s: float
    open: list[socket.socket] = field(default_factory=list)


def _kinds(scale: float) -> dict[str, _Kind]:
    body = b"POST /tokenize HTTP/1.1\r\n" + _HOST
    some, few = round(200 * scale), round(25 * scale)
    return {
        "without a byte": _Kind(b"", b"", some, 45),
        "with half a head": _Kind(_GET, b"", few, 45),
        "with a head that trickles": _Kind(b"GET /health HTTP/1.1\r\n", b"x-a: b\r\n", few, 45),
        "with a URL that trickles": _Kind(b"GET /", b"a", few, 45),
        "idle after a response": _Kind(_GET + b"\r\n", b"", few, 150),
        "with half a body": _Kind(body + b"content-length: 1000\r\n\r\n{", b"", few, 200),
        "with a body that trickles": _Kind(body + b"content-length: 100000\r\n\r\n", b"[", few, 200),
        "with chunks that trickle": _Kind(body + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n[\r\n", few, 200),
    }


class HeldConnections:
    """A few hundred connections that are idle or trickle until the server closes them.

    Args:
        scale: 1: about 375 connections.
    """

    def __init__(self, url: str, scale: float = 1.0) -> None:
        self._kinds, self._began = _kinds(scale), time.monotonic()
        for kind in self._kinds.values():
            for _ in range(kind.count):
                connection = socket.create_connection(address_of(url), timeout=10.0)
                connection.sendall(kind.first)
                connection.setblocking(False)
                kind.open.append(connection)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._trickle, daemon=True)
        self._thread.start()

    @property
    def open(self) -> dict[str, int]:
        """Return how many of each kind are open."""
        return {name: len(kind.open) for name, kind in self._kinds.items()}

    def overdue(self) -> list[str]:
        """Wait for the shorter of the limits, and return what should have been closed by now."""
        self._thread.join(max(min(k.limit_s for k in self._kinds.values()) - (time.monotonic() - self._began), 0.0))
        age = time.monotonic() - self._began
        return [
            f"{len(kind.open)} of {kind.count} connections {name} are open after {age:.0f} s"
            for name, kind in self._kinds.items()
            if kind.open and age >= kind.limit_s
        ]

    def close(self) -> None:
        """Close those that are still open."""
        self._stopping.set()
        self._thread.join()
        for kind in self._kinds.values():
            while kind.open:
                kind.open.pop().close()

    def _trickle(self) -> None:
        for second in itertools.count():
            for kind in self._kinds.values():
                kind.open = [connection for connection in kind.open if _still_open(connection, kind.trickle, second)]
            if self._stopping.wait(1.0) or not any(kind.open for kind in self._kinds.values()):
                return


def _still_open(connection: socket.socket, trickle: bytes, second: int) -> bool:
    try:
        if trickle:
            connection.send(trickle[second % len(trickle) :][:1])
        while connection.recv(2**16):
            continue
    except BlockingIOError:
        return True
    except OSError:
        pass
    connection.close()
    return False
