"""Recipes of pushes that must be refused; all but one with the run's own lease."""

from __future__ import annotations

import time
from random import Random

from tests.chaos import forgery
from tests.chaos.world import RUN_ID, NotInjectedError, World
from tests.integration.support.server import HTTP


def truncated_push(world: World, server: int, random: Random) -> None:
    (fence, step), blob = _served(world, server)
    blob = forgery.reversioned(blob, fence, step + 1)
    _refused(world, server, blob[: random.randrange(len(blob))])


def half_a_push(world: World, server: int, random: Random) -> None:
    (fence, step), blob = _served(world, server)
    blob = forgery.reversioned(blob, fence, step + 1)
    forgery.send_half(world.url(server), RUN_ID, world.lease, blob, random.uniform(0.05, 0.95))


def flipped_bit(world: World, server: int, random: Random) -> None:
    (fence, step), blob = _served(world, server)
    _refused(world, server, forgery.flip_a_bit(forgery.reversioned(blob, fence, step + 1), random))


def repeated_push(world: World, server: int, random: Random) -> None:
    """Push the last adapter again: it is either served already, and nothing changes, or too old."""
    blob = _served(world, server)[1]
    for _ in range(3):
        answer = forgery.send(world.url(server), RUN_ID, world.lease, blob)
        fine = answer.json().get("repeated") is True if answer.status_code == 200 else answer.status_code == 409
        world.checker.require("I3", fine, f"a repeated push returned {answer.status_code} {answer.text[:300]}")


def older_push(world: World, server: int, random: Random) -> None:
    (fence, step), blob = _served(world, server)
    _refused(world, server, forgery.reversioned(blob, fence, max(step - random.randint(1, 5), 0)), may_repeat=step == 0)


def stale_fence(world: World, server: int, random: Random) -> None:
    """Push as a learner that was replaced: a later step with the former fence."""
    (fence, step), blob = _served(world, server)
    if not fence:
        raise NotInjectedError("this is the first learner")
    _refused(world, server, forgery.reversioned(blob, fence - 1, step + 1000))


def strangers_push(world: World, server: int, random: Random) -> None:
    (fence, step), blob = _served(world, server)
    _refused(world, server, forgery.reversioned(blob, fence, step + 1), secret="a stranger's lease")


def _served(world: World, server: int) -> tuple[tuple[int, int], bytes]:
    """Wait until this server serves the last push, and return it; a server without a run would accept any push."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        (fence, step), blob = world.newest()
        run = HTTP.get(f"{world.url(server)}/v1/runs/{RUN_ID}", timeout=5)
        version = run.json()["version"] if run.status_code == 200 else None
        if version and (version["fence"], version["step"]) >= (fence, step):
            return (fence, step), blob
    raise NotInjectedError("the server does not serve the last push")


def _refused(world: World, server: int, blob: bytes, *, secret: str | None = None, may_repeat: bool = False) -> None:
    answer = forgery.send(world.url(server), RUN_ID, world.lease, blob, secret=secret)
    refused = 400 <= answer.status_code < 500 or (may_repeat and answer.status_code == 200)
    world.checker.require("I3", refused, f"a bad push returned {answer.status_code}: {answer.text[:300]}")
