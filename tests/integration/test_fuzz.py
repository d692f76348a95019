"""A short run of `make fuzz` with a fixed seed, against the server of these tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from learner.servers.client import RolloutClient
from tests.fuzz.campaign import Tally, Target, pushed
from tests.fuzz.connections import fuzz_connections
from tests.fuzz.foreign import fuzz_foreign
from tests.fuzz.large import fuzz_large
from tests.fuzz.pushes import fuzz_pushes
from tests.fuzz.routes import BODIES, fuzz_adapters, fuzz_announcements, fuzz_bodies, fuzz_raw
from tests.fuzz.schema import fuzz_schema, own_schema
from tests.fuzz.structured import fuzz_structured
from tests.fuzz.waiting import fuzz_waiting
from tests.fuzz.watch import Watch
from tests.integration.support import policy as P
from tests.integration.support.server import ServerProcess

SEED = 20


@dataclass(frozen=True)
class _Fuzzed:
    target: Target
    good: bytes  # an adapter that is served


@pytest.fixture
def fuzzed(server: ServerProcess, client: RolloutClient, model: Path) -> Iterator[_Fuzzed]:
    """A server whose engine lives, and serves what it did, to the end."""
    tally, pids = Tally(), server.engine_processes()
    target = Target(server.url, tally, alive=lambda: server.engine_processes() == pids)
    good = pushed(target, P.make_policy(model), "fuzzed")
    try:
        yield _Fuzzed(target, good)
    finally:
        target.close()
        client.delete_run("fuzzed", P.LEASE)
    assert not tally.failures, "\n".join(failure[:1000] for failure in tally.failures[:20])


def test_no_request_breaks_the_server_or_changes_what_it_serves(fuzzed: _Fuzzed) -> None:
    target = fuzzed.target
    for path in BODIES:
        fuzz_bodies(target, path, 60, SEED)
    fuzz_raw(target, 150, SEED)
    fuzz_announcements(target, 20, SEED)
    fuzz_adapters(target, fuzzed.good, 150, SEED)
    fuzz_schema(target, "schema", own_schema(target), 60, SEED)
    assert target.tally.requests > 600


def test_the_worst_requests_keep_nobody_waiting_and_take_little_memory(fuzzed: _Fuzzed, server: ServerProcess) -> None:
    target = fuzzed.target
    # Other tests share this machine's cores; `make fuzz` has them to itself, and a limit of a second.
    with Watch(server.url, server.processes, lambda: target.during, target.tally.fail, health_s=10.0):
        fuzz_connections(target, 1, SEED)
        fuzz_large(target, 2, SEED)
        fuzz_structured(target, 2, SEED)
        fuzz_waiting(target, 3, SEED)
        fuzz_foreign(target, fuzzed.good, 1, SEED)
        fuzz_pushes(target, fuzzed.good, 1, SEED)
    assert target.tally.requests > 200
