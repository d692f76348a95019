"""A server of the learner among connections that say nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app

from learner.monitors import http_server
from tests.integration.support.waiting import until


@pytest.fixture
def port() -> Iterator[int]:
    registry = CollectorRegistry()
    Gauge("a_gauge", "for tests", registry=registry).set(7)
    server = http_server.start_http_server(make_wsgi_app(registry), "127.0.0.1", 0, "metrics_port")
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "begin", [b"", b"GET /metrics HTTP/1.1\r\nX: ", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"]
)
def test_many_connections_take_few_threads(port: int, begin: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with contextlib.ExitStack() as opened:
        for _ in range(100):
            wire = opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            with contextlib.suppress(ConnectionError):
                wire.sendall(begin)
        assert "a_gauge 7.0" in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
        until(lambda: threading.active_count() - before <= http_server._CONNECTIONS + 1, 10.0)
    assert "Traceback" not in capfd.readouterr().err


def test_a_connection_that_says_nothing_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server._Request, "timeout", 0.5)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as wire:
        assert wire.recv(1) == b""
