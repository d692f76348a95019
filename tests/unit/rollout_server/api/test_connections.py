"""What strangers and clumsy clients may do to connections, against a server process without an engine."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import pytest
import trustme

from rollout_server.api.connections import Connections, Listener, listen
from shared.errors import LockstepError
from tests.unit.rollout_server.api.served import GENERATE_TOKEN, TOKEN, Served, served

LIMITS = {"first_byte_seconds": 2, "head_seconds": 3, "answer_seconds": 3, "left_seconds": 2, "stall_seconds": 3}
#: Kernels take some MiB of what is sent, whether the server reads it or not.
IN_FLIGHT_MIB = 16
REQUEST = b"POST /v1/generate HTTP/1.1\r\nHost: server\r\nContent-Type: application/json\r\n"
TOKEN_LINE = f"Authorization: Bearer {TOKEN}\r\n".encode()
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: server\r\n\r\n"


@pytest.fixture(scope="module", params=["uvloop"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("server") / "log", {"loop": request.param, "limits": LIMITS}) as running:
        yield running


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    return SimpleNamespace(**{name: str(folder / f"{name}.pem") for name in ("ca", "key", "cert")})


def send(wire: socket.socket, first: bytes, more: bytes = b"", mib: int = 64) -> tuple[float, bytes]:
    """Send `first`, then `more` again and again, up to `mib`; return the MiB sent and all that was answered."""
    sent, answer = 0, b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        wire.sendall(first)
        while more and sent < mib * 2**20:
            sent += wire.send(more)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while part := wire.recv(2**16):
            answer += part
    return sent / 2**20, answer


def status(answer: bytes) -> int:
    return int(answer.split()[1])


def answered(wire: socket.socket) -> int:
    """Read one whole answer; return its status."""
    answer = http.client.HTTPResponse(wire)
    answer.begin()
    answer.read()
    return answer.status


def closed_within(wire: socket.socket, seconds: float) -> bool:
    """Whether the server closes, whatever it sends before."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while (left := deadline - time.monotonic()) > 0:
            if select.select([wire], [], [], left)[0] and not wire.recv(2**16):
                return True
        return False
    return True


ENDLESS_HEADS = {
    "header lines": (b"GET /health HTTP/1.1\r\n", b"X-Some-Header: some value\r\n" * 4096, 431),
    "short header lines": (b"GET /health HTTP/1.1\r\n", b"a:\r\n" * 16384, 431),
    "a header's name": (b"GET /health HTTP/1.1\r\nX", b"x" * 2**16, 431),
    "a header's value": (b"GET /health HTTP/1.1\r\nX: ", b"x" * 2**16, 431),
    "a URL": (b"GET /", b"x" * 2**16, 414),
    "a query": (b"GET /health?", b"x" * 1000, 414),
    "empty lines": (b"\r\n", b"\r\n" * 2**15, 431),
    "nothing that is HTTP": (b"\x00", b"\x00" * 2**16, 400),
    "a method": (b"G", b"G" * 2**16, 400),
}


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
        local = [_local_port(client.get("/v1/runs/r"))]
        time.sleep(4.5)  # longer than any of LIMITS, less than httpx keeps one
        local.append(_local_port(client.get("/v1/runs/r")))
        time.sleep(0.1)
        local.append(_local_port(client.post("/v1/made-up", content=b"{}")))
    assert len(set(local)) == 1


def _local_port(response: httpx.Response) -> int:
    return response.extensions["network_stream"].get_extra_info("client_addr")[1]


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


def _generate(wire: socket.socket, **sampling: int) -> None:
    body = {"prompts": [{"token_ids": [1]}], "policy": "base", "stream": True, "sampling": sampling}
    content = json.dumps(body).encode()
    wire.sendall(REQUEST + TOKEN_LINE + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)


def test_a_long_answer_is_cut_off_only_if_nobody_reads_it(server: Served) -> None:
    with server.connect() as reader, server.connect() as sleeper:
        for wire in (reader, sleeper):
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            _generate(wire, n=8, max_tokens=1_000_000)
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


def _crowd(server: Served, count: int, opened: contextlib.ExitStack, begin: Callable[[socket.socket], None]) -> None:
    for _ in range(count):
        wire = opened.enter_context(server.connect())
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            begin(wire)


@pytest.mark.parametrize("given", [{"most": 40}, {"descriptors": 256}], ids=["limit", "descriptors"])
@pytest.mark.parametrize("begin", [b"", b"GET /health HTTP/1.1\r\nX: ", HEALTH])
def test_more_connections_than_there_may_be(tmp_path: Path, given: dict[str, int], begin: bytes) -> None:
    """With seconds as by default: nobody leaves because time is up."""
    with served(tmp_path / "log", given) as server, contextlib.ExitStack() as opened:
        kept = httpx.Limits(keepalive_expiry=60)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        known = opened.enter_context(httpx.Client(base_url=server.url, headers=headers, limits=kept))
        first = _local_port(known.get("/v1/runs/r"))
        busy = opened.enter_context(server.connect())
        _generate(busy, n=40, max_tokens=1)
        assert busy.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(2):
            _crowd(server, 150, opened, lambda wire: wire.sendall(begin))
            assert server.health_seconds() < 1
            assert server.get("/v1/runs/r", TOKEN).status_code == 200
            assert _local_port(known.get("/v1/runs/r")) == first
        answer = b""
        while part := busy.recv(2**16):
            answer += part
        assert answer.endswith(b"0\r\n\r\n")
        assert "cannot accept" not in server.log.read_text()


def test_who_is_idle_leaves_before_who_is_busy(tmp_path: Path) -> None:
    with served(tmp_path / "log", {"most": 8}) as server, contextlib.ExitStack() as opened:
        busy = [opened.enter_context(server.connect()) for _ in range(4)]
        for wire in busy:
            _generate(wire, n=15, max_tokens=1)
        time.sleep(0.3)
        idle = []
        for _ in range(8):
            idle.append(wire := opened.enter_context(server.connect()))
            wire.sendall(b"GET /v1/runs/r HTTP/1.1\r\n" + TOKEN_LINE + b"\r\n")
            assert answered(wire) == 200
        assert [closed_within(wire, 0.1) for wire in idle] == [True] * 4 + [False] * 4
        for wire in busy:
            assert send(wire, b"")[1].endswith(b"0\r\n\r\n")


def test_tls_handshakes_that_never_end(tmp_path: Path, pems: SimpleNamespace) -> None:
    tls = {"ssl_certfile": pems.cert, "ssl_keyfile": pems.key}
    with (
        served(tmp_path / "log", {"tls": tls, "most": 40, "limits": LIMITS}, pems.ca) as server,
        contextlib.ExitStack() as opened,
    ):
        trusting = ssl.create_default_context(cafile=pems.ca)
        with trusting.wrap_socket(server.connect(), server_hostname="localhost") as wire:
            _, answer = send(wire, b"GET /v1/runs/r HTTP/1.1\r\nConnection: close\r\n" + TOKEN_LINE + b"\r\n")
            assert status(answer) == 200
        for begin in (b"", b"\x16\x03\x01\x02\x00\x01", b"GET /health HTTP/1.1\r\n\r\n"):
            _crowd(server, 100, opened, lambda wire, begin=begin: wire.sendall(begin))  # type: ignore[misc]
            assert server.health_seconds() < 1
        last = opened.enter_context(server.connect())
        assert closed_within(last, 6)
        with trusting.wrap_socket(server.connect(), server_hostname="localhost") as wire:
            assert closed_within(wire, 6)  # the handshake done, and nothing after it
        with trusting.wrap_socket(server.connect(), server_hostname="localhost") as wire:
            sent, answer = send(wire, *ENDLESS_HEADS["header lines"][:2])
            assert sent < IN_FLIGHT_MIB
            assert status(answer) == 431
        assert "Traceback" not in server.log.read_text()


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


def test_a_port_that_is_taken() -> None:
    (taken,) = listen("127.0.0.1", 0)
    with taken, pytest.raises(LockstepError, match="give another --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    for host in ("localhost", "", None):
        for one in listen(host, 0):
            one.close()
