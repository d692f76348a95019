"""Many connections at once, against a server process without an engine."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import trustme

from tests.unit.rollout_server.api.served import TOKEN, Served, served
from tests.unit.rollout_server.api.wire import (
    ENDLESS_HEADS,
    HEALTH,
    IN_FLIGHT_MIB,
    LIMITS,
    TOKEN_LINE,
    answered,
    closed_within,
    generate,
    local_port,
    send,
    status,
)


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    return SimpleNamespace(**{name: str(folder / f"{name}.pem") for name in ("ca", "key", "cert")})


def _crowd(server: Served, count: int, opened: contextlib.ExitStack, begin: Callable[[socket.socket], None]) -> None:
    for _ in range(count):
        wire = opened.enter_context(server.connect())
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            begin(wire)


@pytest.fixture(scope="module", params=[{"most": 40}, {"descriptors": 256}], ids=["limit", "descriptors"])
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With seconds as by default: nobody leaves because time is up."""
    with served(tmp_path_factory.mktemp("limited") / "log", request.param) as running:
        yield running


@pytest.mark.parametrize("begin", [b"", b"GET /health HTTP/1.1\r\nX: ", HEALTH])
def test_more_connections_than_there_may_be(limited: Served, begin: bytes) -> None:
    with contextlib.ExitStack() as opened:
        kept = httpx.Limits(keepalive_expiry=60)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        known = opened.enter_context(httpx.Client(base_url=limited.url, headers=headers, limits=kept))
        first = local_port(known.get("/v1/runs/r"))
        busy = opened.enter_context(limited.connect())
        generate(busy, n=40, max_tokens=1)
        assert busy.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(2):
            _crowd(limited, 150, opened, lambda wire: wire.sendall(begin))
            assert limited.health_seconds() < 1
            assert limited.get("/v1/runs/r", TOKEN).status_code == 200
            assert local_port(known.get("/v1/runs/r")) == first
        answer = b""
        while part := busy.recv(2**16):
            answer += part
        assert answer.endswith(b"0\r\n\r\n")
        assert "cannot accept" not in limited.log.read_text()


def test_who_is_idle_leaves_before_who_is_busy(tmp_path: Path) -> None:
    with served(tmp_path / "log", {"most": 8}) as server, contextlib.ExitStack() as opened:
        busy = [opened.enter_context(server.connect()) for _ in range(4)]
        for wire in busy:
            generate(wire, n=15, max_tokens=1)
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
