"""The learner's Prometheus endpoint, over real connections."""

from __future__ import annotations

import http.client

import pytest

from learner.monitors.prometheus import LearnerMetrics
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from learner.utils.ports import free_port


def _serve(host: str) -> int:
    pool = ServerPool(lambda url: pytest.fail("nobody is called"), ServerDiscovery(["http://a:1"]))
    port = free_port()
    LearnerMetrics(pool, run_id="a-secret-run", model="m").serve(host, port)
    return port


def _get(port: int, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("GET", "/metrics", skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def test_pages_in_a_browser_of_this_machine_read_nothing() -> None:
    port = _serve("127.0.0.1")
    for page in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        status, body = _get(port, page)
        assert status == 403, page
        assert b"a-secret-run" not in body
    for own in ({}, {"Host": f"localhost:{port}"}, {"Sec-Fetch-Site": "none"}):
        status, body = _get(port, own)
        assert status == 200
        assert b"a-secret-run" in body


def test_a_network_that_was_let_in_uses_any_name() -> None:
    assert _get(_serve("0.0.0.0"), {"Host": "learner.corp.example:9100"})[0] == 200
