"""A short run of `make fuzz` with a fixed seed, against the server of these tests."""

from __future__ import annotations

from pathlib import Path

from learner.servers.client import RolloutClient
from tests.fuzz.campaign import Tally, Target, pushed
from tests.fuzz.connections import fuzz_connections
from tests.fuzz.routes import BODIES, fuzz_adapters, fuzz_announcements, fuzz_bodies, fuzz_raw
from tests.fuzz.schema import fuzz_schema, own_schema
from tests.integration.support import policy as P
from tests.integration.support.server import ServerProcess

SEED = 20


def test_no_request_breaks_the_server_or_changes_what_it_serves(
    server: ServerProcess, client: RolloutClient, model: Path
) -> None:
    tally, pids = Tally(), server.engine_processes()
    target = Target(server.url, tally, alive=lambda: server.engine_processes() == pids)
    good = pushed(target, P.make_policy(model), "fuzzed")
    try:
        for path in BODIES:
            fuzz_bodies(target, path, 60, SEED)
        fuzz_raw(target, 150, SEED)
        fuzz_connections(target, 60, SEED)
        fuzz_announcements(target, 20, SEED)
        fuzz_adapters(target, good, 150, SEED)
        fuzz_schema(target, "schema", own_schema(target), 60, SEED)
    finally:
        target.close()
    client.delete_run("fuzzed", P.LEASE)
    assert not tally.failures, "\n".join(tally.failures[:5])
    assert tally.requests > 600
