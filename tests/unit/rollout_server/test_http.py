from __future__ import annotations

import httpx

from rollout_server.gate import Gate
from rollout_server.http import make_server


def test_an_idle_connection_is_closed_by_the_client() -> None:
    kept = httpx.Limits().keepalive_expiry
    assert kept is not None and make_server(Gate()).config.timeout_keep_alive > 2 * kept
