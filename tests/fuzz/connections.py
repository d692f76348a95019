"""Connections that never come to an end: heads, bodies after their answer, trailers, silence."""

from __future__ import annotations

import contextlib
import socket
import time
from urllib.parse import urlsplit

from hypothesis import strategies as st

from tests.fuzz.campaign import Target, every

_NAME = "connections"
#: What a connection may cost, the buffers of kernels included, and for how long.
_MOST_MIB, _MOST_SECONDS, _HEALTH_SECONDS = 24, 30.0, 1.0
_SILENT_AT_ONCE = 200

#: None of them reads a body: what a token holder may send has other limits.
_LINES = st.sampled_from(["GET /health", "GET /v1/state", "POST /ready", "PUT /v1/runs/fuzzed/adapter", "GET /"])
_FRAMES = st.sampled_from(
    [
        "",
        "Transfer-Encoding: chunked\r\n\r\n",
        "Content-Length: 99999999999\r\n\r\n",
        "Expect: 100-continue\r\n",
        "\r\n",
    ]
)
_REPEATED = [
    b"x",
    b"a:\r\n",
    b"X-H: v\r\n",
    b"\r\n",
    b"1\r\nx\r\n",
    b"1;x=y\r\nx\r\n",
    b"0\r\n",
    b"\x00",
    b"%41",
    b": ",
]
_REQUEST, _CHUNK = b"GET /health HTTP/1.1\r\n\r\n", b"400\r\n" + b"x" * 1024 + b"\r\n"
_PIECES = st.sampled_from([b"", _REQUEST, _CHUNK, *_REPEATED])


@st.composite
def _connections(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Draw what a connection begins with, and what it repeats; nothing: it falls silent."""
    begin = f"{draw(_LINES)} HTTP/1.1\r\n{draw(_FRAMES)}{draw(st.sampled_from(['', '0', '1;', 'X: ']))}".encode()
    return begin[: draw(st.integers(0, len(begin))) or None], draw(_PIECES) * draw(st.sampled_from([1, 10, 4000]))


def fuzz_connections(target: Target, examples: int, number: int) -> None:
    """Open connections that send without end, or nothing: they must end, and `/health` must answer meanwhile."""
    url = urlsplit(target.url)
    silent: list[tuple[socket.socket, bytes]] = []

    def send(drawn: tuple[bytes, bytes]) -> None:
        begin, more = drawn
        wire = socket.create_connection((url.hostname or "", url.port or 0), timeout=_MOST_SECONDS)
        if not more and len(silent) < _SILENT_AT_ONCE:
            silent.append((wire, begin))
        with contextlib.suppress(ConnectionError):
            wire.sendall(begin)
        if more:
            with wire:
                _send_on(target, wire, begin, more)
        began = time.monotonic()
        healthy = target.http.get("/health").status_code == 200
        if not healthy or time.monotonic() - began > _HEALTH_SECONDS:
            target.tally.fail(f"{_NAME}: /health took {time.monotonic() - began:.1f} s after {begin!r} {more[:40]!r}")

    every(_connections(), examples, number, send)
    for wire, begin in silent:
        with wire:
            _read_to_end(target, wire, begin, b"")
    target.expect_unchanged(_NAME)


def _send_on(target: Target, wire: socket.socket, begin: bytes, more: bytes) -> None:
    sent, deadline = 0, time.monotonic() + _MOST_SECONDS
    with contextlib.suppress(ConnectionError, TimeoutError):
        while sent < _MOST_MIB * 2**20 and time.monotonic() < deadline:
            sent += wire.send(more)
        target.tally.fail(f"{_NAME}: still taken after {sent / 2**20:.0f} MiB: {begin!r} {more[:40]!r}")
        return
    _read_to_end(target, wire, begin, more)


def _read_to_end(target: Target, wire: socket.socket, begin: bytes, more: bytes) -> None:
    answer, began = b"", time.monotonic()
    try:
        while part := wire.recv(2**16):
            answer = (answer + part)[:4096]
    except ConnectionError:
        pass
    except TimeoutError:
        target.tally.fail(f"{_NAME}: still open after {_MOST_SECONDS} s: {begin!r} {more[:40]!r}")
    status = int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0
    seconds = time.monotonic() - began
    target.judge(
        _NAME, "", "", status, answer.decode(errors="replace"), 0.0 if not more else seconds, (begin, more[:40])
    )
