from __future__ import annotations

import signal

import httpx

from rollout_server.api.middleware.readiness import ReadinessMiddleware
from rollout_server.api.server import HttpServer


def test_an_idle_connection_is_closed_by_the_client() -> None:
    kept = httpx.Limits().keepalive_expiry
    assert kept is not None
    assert HttpServer(ReadinessMiddleware()).config.timeout_keep_alive > 2 * kept


def test_the_first_signal_is_ours_and_the_second_ends_at_once() -> None:
    told: list[bool] = []
    server = HttpServer(ReadinessMiddleware(), lambda: told.append(True))
    server.handle_exit(signal.SIGTERM, None)
    assert told == [True]
    assert not server.should_exit
    server.handle_exit(signal.SIGINT, None)
    assert told == [True]
    assert server.should_exit
    assert server.force_exit
