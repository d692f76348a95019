"""Recipes of clumsy and hostile clients beside the learner: each must be refused, and disturb nobody.

Meanwhile `/health` answers within a second and the server's memory stays bounded (`tests.fuzz.watch`). What they send
is the fuzzer's.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import httpx

from rollout_server.settings import ServerSettings
from shared.wire import LEASE_HEADER
from tests.chaos.world import RUN_ID, World
from tests.fuzz import connections, foreign, large, structured
from tests.fuzz.watch import Watch
from tests.integration.support.server import HTTP

_JSON = {"content-type": "application/json"}
_TIMEOUT_S, _SLOW_S = 60.0, 15.0


def endless_requests(world: World, server: int, random: Random) -> None:
    """Send heads, and bodies of requests that have their answer, without end."""
    kinds = {**connections.HEADS, **connections.ANSWERED_EARLY}
    with _watched(world, server, "a request without end"):
        for what in random.sample(sorted(kinds), 4):
            begin, again = kinds[what]
            begin += b"" if what in connections.HEADS else b"\r\n"
            address = connections.address_of(world.url(server))
            outcome = connections.exchange(address, connections.endless(begin, again, 2**16))
            ended = outcome.closed and outcome.taken < connections.ENDLESS_BYTES
            world.checker.require("bounded", ended, f"{what} without end: {outcome}")


def idle_connections(world: World, server: int, random: Random) -> None:
    """Hold some hundred connections for a while, without a request or with a part of one."""
    with _watched(world, server, "idle connections"):
        held = connections.HeldConnections(world.url(server), scale=random.uniform(0.5, 1.5))
        with contextlib.closing(held):
            time.sleep(random.uniform(1, 4))
    _honest(world, server, "idle connections")


def large_bodies(world: World, server: int, random: Random) -> None:
    """Send bodies that are large for a parser, some as large as the server takes them."""
    largest = ServerSettings().max_body_mib * 2**20 - 2000
    worst = large.worst_bodies(largest) if random.random() < 0.5 else large.worst_bodies(2**20)
    with _watched(world, server, "a large body"):
        for path, what, body in random.sample(worst, 3):
            _refused(world, server, path, f"{what} in {len(body)} bytes", body)
    _honest(world, server, "large bodies")


def structured_outputs(world: World, server: int, random: Random) -> None:
    """Send structured outputs that no compiler should be given."""
    with _watched(world, server, "structured outputs"):
        for form in random.sample(structured.FORMS, 3):
            path, body = structured.request(
                random.choice(structured.ROUTES), structured.constraint(form, structured.LARGE)
            )
            _refused(world, server, path, f"structured outputs: {form}", json.dumps(body).encode())
            word = f"word {random.random()}"
            _honest(world, server, f"structured outputs: {form}", structured_outputs={"choice": [word, "another"]})


def waiting_crowd(world: World, server: int, random: Random) -> None:
    """Wait for a step that never comes, with as many completions as one request may have."""
    body = {
        "run_id": RUN_ID,
        "prompts": [{"token_ids": [5, 6]}] * 8,
        "sampling": {"n": 4096, "max_tokens": 1},
        "min_step": 10**9,
        "wait_s": random.uniform(2, 5),
    }
    with _watched(world, server, "requests that wait"), ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(HTTP.post, f"{world.url(server)}/v1/generate", json=body) for _ in range(4)]
        time.sleep(0.5)
        _honest(world, server, "requests that wait")
        for future in waiting:
            with contextlib.suppress(httpx.HTTPError):
                future.result()


def requests_of_a_page(world: World, server: int, random: Random) -> None:
    """Send what a page of another site could make a browser send: to drain the server, and to end the run."""
    lease = json.loads(world.lease.read_text())["secret"]
    for what in random.sample(sorted(foreign.FOREIGN), 5):
        for method, path in (("GET", "/v1/state"), ("DELETE", f"/v1/runs/{RUN_ID}"), ("POST", "/v1/drain")):
            headers = {LEASE_HEADER: lease, **foreign.FOREIGN[what]}
            answer = HTTP.request(method, world.url(server) + path, headers=headers)
            refused = 400 <= answer.status_code < 500
            world.checker.require("foreign", refused, f"{method} {path} with {what} gets {answer.status_code}")
            if not refused:
                return


def failed_join(world: World, server: int, random: Random) -> None:
    """Ask for an invitation to a collective group with the run's own lease, and do not come."""
    lease = json.loads(world.lease.read_text())["secret"]
    path = f"{world.url(server)}/v1/runs/{RUN_ID}/group"
    with HTTP.stream("POST", path, headers={LEASE_HEADER: lease}) as answer:
        if answer.status_code != 200:
            raise httpx.HTTPError(f"no invitation: {answer.status_code}")
        invitation = json.loads(next(answer.iter_lines()))
        world.checker.require("joins", "port" in invitation, f"this is no invitation: {invitation}")
        time.sleep(random.uniform(0, 1))


@contextlib.contextmanager
def _watched(world: World, server: int, during: str) -> Iterator[None]:
    """Check `/health` and the server's memory until the end of the block."""
    process = world.servers[server]
    generation = process.generation

    def fail(what: str) -> None:
        if process.generation == generation:
            world.checker.violated("bounded", what)

    with Watch(world.url(server), lambda: list(process.family()), lambda: during, fail):
        yield
    world.checker.require("bounded", process.generation == generation, f"the server has ended during {during}")


def _refused(world: World, server: int, path: str, what: str, body: bytes) -> None:
    """Send a body; any answer but an error of the server's own is right, if it comes soon."""
    began, status = time.monotonic(), 0
    with contextlib.suppress(httpx.HTTPError):  # it may close the connection before all has been sent
        status = HTTP.post(world.url(server) + path, content=body, headers=_JSON, timeout=_TIMEOUT_S).status_code
    seconds = time.monotonic() - began
    world.checker.require("bounded", status < 500 and seconds < _SLOW_S, f"{what}: {status} after {seconds:.1f} s")


def _honest(world: World, server: int, after: str, **sampling: Any) -> None:
    """Check that an ordinary request is answered."""
    body = {"run_id": RUN_ID, "prompts": [{"token_ids": [5]}], "sampling": {"max_tokens": 4, **sampling}}
    began, status = time.monotonic(), 0
    with contextlib.suppress(httpx.HTTPError):
        status = HTTP.post(f"{world.url(server)}/v1/generate", json=body, timeout=_TIMEOUT_S).status_code
    seconds = time.monotonic() - began
    fine = status in (200, 404, 503) and seconds < structured.HONEST_S  # a server that restarts has no run
    world.checker.require("bounded", fine, f"an honest request gets {status} in {seconds:.1f} s, after {after}")
