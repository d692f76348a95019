"""The fuzzer sees a server that takes what has no end, keeps connections open, or is late to say that it is well."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.fuzz import connections, watch
from tests.fuzz.connections import ENDLESS_BYTES, HeldConnections, endless, exchange
from tests.fuzz.watch import Watch

Handler = Callable[[socket.socket], None]


@contextlib.contextmanager
def _serving(handle: Handler) -> Iterator[tuple[str, int]]:
    """Handle each connection on a thread of its own."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=_handled, args=(handle, connection), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listening.getsockname()
        listening.shutdown(socket.SHUT_RDWR)


def _handled(handle: Handler, connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        handle(connection)


def _takes_all(connection: socket.socket) -> None:
    while connection.recv(2**16):
        continue


def _refuses(connection: socket.socket) -> None:
    connection.recv(2**16)
    connection.sendall(b"HTTP/1.1 431 Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


def _answers_and_takes_all(connection: socket.socket) -> None:
    connection.recv(2**16)
    connection.sendall(b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n")
    _takes_all(connection)


def _half_closes_and_takes_all(connection: socket.socket) -> None:
    connection.recv(2**16)
    connection.sendall(b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)
    _takes_all(connection)


def _answers(connection: socket.socket) -> None:
    connection.recv(2**16)
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


HEAD, AGAIN = connections.HEADS["a header"]


def test_a_head_without_end_that_is_refused() -> None:
    with _serving(_refuses) as address:
        outcome = exchange(address, endless(HEAD, AGAIN, 2**16), patience_s=5.0)
    assert outcome.closed
    assert outcome.taken < ENDLESS_BYTES
    assert outcome.status in (0, 431)  # the reset may overtake the response


@pytest.mark.parametrize("handle", [_takes_all, _answers_and_takes_all, _half_closes_and_takes_all])
def test_one_that_is_taken(handle: Handler) -> None:
    with _serving(handle) as address:
        outcome = exchange(address, endless(HEAD, AGAIN, 2**16), patience_s=1.0)
    assert outcome.taken >= ENDLESS_BYTES - 2**16


@pytest.mark.parametrize("kind", [*connections.HEADS, *connections.ANSWERED_EARLY])
def test_all_kinds_are_long(kind: str) -> None:
    begin, again = connections.HEADS.get(kind) or connections.ANSWERED_EARLY[kind]
    size = sum(len(piece) for piece in endless(begin, again, 2**16))
    assert size > 0.9 * ENDLESS_BYTES


def test_connections_that_are_never_closed_are_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = connections._Kind(b"", b"", 3, limit_s=0.2)
    monkeypatch.setattr(connections, "_kinds", lambda scale: {"without a byte": kept})
    with _serving(_takes_all) as (host, port), contextlib.closing(HeldConnections(f"http://{host}:{port}")) as held:
        assert held.overdue() == ["3 of 3 connections without a byte are open after 0 s"]


def test_connections_that_are_closed_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = connections._Kind(b"GET", b"a", 3, limit_s=2.0)
    monkeypatch.setattr(connections, "_kinds", lambda scale: {"that trickle": kind})
    with _serving(_refuses) as (host, port), contextlib.closing(HeldConnections(f"http://{host}:{port}")) as held:
        assert held.overdue() == []


def _failures(handle: Handler, health_s: float = watch.HEALTH_S, probes: int = 1) -> list[str]:
    """Return what a watch of this server finds in `probes` requests for `/health`, however slow the machine is."""
    failures: list[str] = []
    begun = threading.Semaphore(0)

    def handled(connection: socket.socket) -> None:
        begun.release()
        handle(connection)

    with (
        _serving(handled) as (host, port),
        Watch(f"http://{host}:{port}", lambda: [1], lambda: "a test", failures.append, health_s),
    ):
        for _ in range(probes + 1):  # the last one begins when those before it have been judged
            assert begun.acquire(timeout=60.0)
    return failures


def test_health_that_answers_at_once() -> None:
    assert _failures(_answers, health_s=30.0) == []


def test_health_that_is_late() -> None:
    def late(connection: socket.socket) -> None:
        time.sleep(0.2)
        _answers(connection)

    assert "is late during a test" in _failures(late, health_s=0.1)[0]


def test_health_that_gives_no_answer() -> None:
    assert "no answer during a test" in _failures(lambda connection: None)[0]


def test_memory_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    held = itertools.chain([10 * 2**30, 10 * 2**30], itertools.repeat(12 * 2**30))
    monkeypatch.setattr(watch, "_resident", lambda pid: next(held))
    assert _failures(_answers, health_s=30.0, probes=2) == ["memory grows during a test: by 2048 MiB"]
