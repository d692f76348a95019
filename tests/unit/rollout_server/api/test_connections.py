"""What strangers and clumsy clients may do to connections, against a server process without an engine."""

from __future__ import annotations

import contextlib
import errno
import json
import select
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

from rollout_server.api.connections import Connections, Listener, listen
from shared.errors import LockstepError
from tests.unit.rollout_server.api.served import GENERATE_TOKEN, TOKEN, Served, served
from tests.unit.rollout_server.api.wire import (
    CHUNKED,
    ENDLESS_HEADS,
    HEALTH,
    IN_FLIGHT_MIB,
    LIMITS,
    REQUEST,
    TOKEN_LINE,
    answered,
    closed_within,
    generate,
    local_port,
    send,
    status,
)


@pytest.fixture(scope="module", params=["uvloop"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("server") / "log", {"loop": request.param, "limits": LIMITS}) as running:
        yield running


@pytest.mark.parametrize("what", ENDLESS_HEADS)
def test_a_head_without_end_is_refused(server: Served, what: str) -> None:
    first, more, expected = ENDLESS_HEADS[what]
    before = server.memory_mib()
    with server.connect() as wire:
        sent, answer = send(wire, first, more)
    assert sent < IN_FLIGHT_MIB
    assert status(answer) == expected
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert server.memory_mib() - before < 32
    assert server.health_seconds() < 1


def test_a_head_within_the_limits_is_taken(server: Served) -> None:
    with server.connect() as wire:
        head = b"GET /health?%b HTTP/1.1\r\n%bX: %b\r\nConnection: close\r\n\r\n"
        _, answer = send(wire, head % (b"q" * 8000, b"X-Some-Header: some value\r\n" * 200, b"x" * 40_000))
    assert status(answer) == 200


def test_two_heads_are_not_one_large_head(server: Served) -> None:
    with server.connect() as wire:
        half = b"GET /health HTTP/1.1\r\nX: %b\r\n" % (b"x" * 40_000)
        _, answer = send(wire, half + b"\r\n" + half + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("begin", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nX-Header: ", b"\r\n"])
def test_connections_that_fall_silent_are_closed(server: Served, begin: bytes) -> None:
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(server.connect()) for _ in range(50)]
        for wire in silent:
            wire.sendall(begin)
        assert server.health_seconds() < 1
        assert all(closed_within(wire, 8) for wire in silent)


def test_a_head_one_byte_at_a_time(server: Served) -> None:
    began = time.monotonic()
    with server.connect() as wire:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            for byte in b"GET /health HTTP/1.1\r\nX: " + b"x" * 200:
                wire.send(bytes([byte]))
                if select.select([wire], [], [], 0.1)[0]:
                    break
        assert answered(wire) == 408
    assert time.monotonic() - began < 8


def test_an_idle_connection_of_a_client_is_kept(server: Served) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        local = [local_port(client.get("/v1/runs/r"))]
        time.sleep(4.5)  # longer than any of LIMITS, less than httpx keeps one
        local.append(local_port(client.get("/v1/runs/r")))
        time.sleep(0.1)
        local.append(local_port(client.post("/v1/made-up", content=b"{}")))
    assert len(set(local)) == 1


BODY_FORMS = {
    "announced": (b"Content-Length: 16106127360\r\n\r\n", b"x" * 2**16),
    "chunked": (CHUNKED + b"\r\n", b"10000\r\n" + b"x" * 2**16 + b"\r\n"),
    "in small chunks": (CHUNKED + b"\r\n", b"1\r\nx\r\n" * 2**13),
    "with chunk extensions": (CHUNKED + b"\r\n1;", b"x" * 2**16),
    "with trailers": (CHUNKED + b"\r\n0\r\n", b"X-Some-Trailer: value\r\n" * 2**12),
    "with one trailer": (CHUNKED + b"\r\n0\r\nX: ", b"x" * 2**16),
}


@pytest.mark.parametrize("form", BODY_FORMS)
@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (REQUEST, {401}),
        (b"GET /health HTTP/1.1\r\n", {200}),
        (b"DELETE /v1/runs/r HTTP/1.1\r\nAuthorization: Bearer %b\r\n" % GENERATE_TOKEN.encode(), {403}),
        (b"GET /v1/made-up HTTP/1.1\r\n" + TOKEN_LINE, {404}),
        (REQUEST + TOKEN_LINE, {413}),
    ],
    ids=["unauthenticated", "health", "forbidden", "unknown", "too large"],
)
def test_a_body_is_not_read_for_ever_after_its_answer(
    server: Served, head: bytes, expected: set[int], form: str
) -> None:
    line, more = BODY_FORMS[form]
    began, before = time.monotonic(), server.memory_mib()
    with server.connect() as wire:
        sent, answer = send(wire, head + line, more)
    assert sent < IN_FLIGHT_MIB
    # A request that is too large outside of its body is refused before or after the app has answered.
    assert status(answer) in expected | ({431} if "with" in form else set())
    assert answer.count(b"HTTP/1.1 ") == 1
    assert time.monotonic() - began < 8
    assert server.memory_mib() - before < 32


@pytest.mark.parametrize(("state", "expected"), [("full", 429), ("draining", 503), ("loading", 503)])
def test_nor_after_an_answer_for_the_moment(tmp_path: Path, state: str, expected: int) -> None:
    with served(tmp_path / "log", {"limits": LIMITS, state: True}) as server, server.connect() as wire:
        head = b"POST /v1/chat/completions HTTP/1.1\r\n" + TOKEN_LINE + b"Content-Length: 900000000\r\n\r\n"
        sent, answer = send(wire, head, b"x" * 2**16)
        assert sent < IN_FLIGHT_MIB
        assert status(answer) == expected


def test_nor_when_it_stops_after_the_answer(server: Served) -> None:
    with server.connect() as wire:
        wire.sendall(REQUEST + b"Content-Length: 1000\r\n\r\nx")
        assert answered(wire) == 401
        assert closed_within(wire, 6)


def test_a_small_body_after_its_answer_keeps_the_connection(server: Served) -> None:
    with server.connect() as wire:
        for _ in range(3):
            wire.sendall(REQUEST + b"Content-Length: 100000\r\n\r\n")
            assert answered(wire) == 401
            time.sleep(0.1)
            wire.sendall(b"x" * 100_000)
            time.sleep(0.1)
        assert not closed_within(wire, LIMITS["left_seconds"] + 2)
        wire.sendall(HEALTH)
        assert answered(wire) == 200


def test_trailers_are_no_headers(server: Served) -> None:
    with server.connect() as wire:
        body = b"2\r\n{}\r\n0\r\n" + TOKEN_LINE + b"\r\n"
        _, answer = send(wire, REQUEST + CHUNKED + b"Connection: close\r\n\r\n" + body)
    assert status(answer) == 401


def test_requests_without_end_on_one_connection(server: Served) -> None:
    before = server.memory_mib()
    with server.connect() as wire:
        sent, _ = send(wire, b"", HEALTH * 1000)
    assert sent < IN_FLIGHT_MIB
    assert server.memory_mib() - before < 32
    with server.connect() as wire:
        _, answer = send(wire, HEALTH * 9 + HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert answer.count(b"HTTP/1.1 200") == 10


def test_answers_that_a_stranger_does_not_read(server: Served) -> None:
    with server.connect() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(15)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError, TimeoutError):
            while time.monotonic() - began < 20:
                wire.sendall(HEALTH * 5)
                time.sleep(0.0002)
    assert time.monotonic() - began < 20


def test_a_long_answer_is_cut_off_only_if_nobody_reads_it(server: Served) -> None:
    with server.connect() as reader, server.connect() as sleeper:
        for wire in (reader, sleeper):
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            generate(wire, n=8, max_tokens=1_000_000)
        answer = b""
        while part := reader.recv(2**16):
            answer += part
            time.sleep(0.02 if len(answer) < 2**22 else 0)
        assert answer.endswith(b"0\r\n\r\n")
        assert len(answer) > 8 * 2_000_000
        time.sleep(5)
        cut = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while part := sleeper.recv(2**20):
                cut += part
    assert not cut.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("kind", ["websocket", "h2c"])
def test_other_protocols(server: Served, kind: str) -> None:
    upgrade = b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: %b\r\nSec-WebSocket-Version: 13\r\n\r\n"
    with server.connect() as wire:
        _, answer = send(wire, upgrade % kind.encode() + HEALTH)
    assert status(answer) == (400 if kind == "websocket" else 200)
    assert answer.count(b"HTTP/1.1") == 1


def test_requests_that_are_none_leave_no_line_in_the_log(server: Served) -> None:
    before = server.log.read_text()
    for nonsense in (
        b"\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"CONNECT x HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
    ):
        with server.connect() as wire:
            _, answer = send(wire, nonsense)
            assert status(answer) in (400, 401)
    assert server.log.read_text() == before


class _Listening:
    """Each accept raises one of the errors, with these numbers; then comes a connection."""

    def __init__(self, real: socket.socket, *errors: int) -> None:
        self.real, self.errors = real, list(errors)

    def accept(self) -> tuple[socket.socket, object]:
        if self.errors:
            raise OSError(self.errors.pop(0), "an error of accept(2)")
        return self.real.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)


@pytest.mark.parametrize("error", [errno.ECONNABORTED, errno.EPROTO, errno.EHOSTUNREACH, errno.EMFILE, errno.ENOBUFS])
async def test_only_a_shortage_of_this_machine_pauses_accepting(error: int, caplog: pytest.LogCaptureFixture) -> None:
    """A client that breaks its own connection before it is accepted holds up nobody."""
    opened: list[socket.socket] = []
    protocol = Mock(open=lambda accepted, tls: opened.append(accepted))
    (real,) = listen("127.0.0.1", 0)
    with real, socket.create_connection(real.getsockname()):
        listener = Listener(_Listening(real, error, error), Connections(4), lambda: protocol, None)  # type: ignore[arg-type]
        listener._accept()
        listener.close()
    for each in opened:
        each.close()
    short = error in (errno.EMFILE, errno.ENOBUFS)
    assert len(opened) == (0 if short else 1)
    assert ("cannot accept" in caplog.text) == short


@pytest.mark.parametrize("port", [-1, 2**16, 70000])
def test_a_port_that_there_is_not(port: int) -> None:
    """`getaddrinfo` takes the lower 16 bits of it."""
    with pytest.raises(LockstepError, match=f"--port {port}: give one of 0 to 65535"):
        listen("127.0.0.1", port)


def test_a_port_that_is_taken() -> None:
    (taken,) = listen("127.0.0.1", 0)
    with taken, pytest.raises(LockstepError, match="give another --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    for host in ("localhost", "", None):
        for one in listen(host, 0):
            one.close()
