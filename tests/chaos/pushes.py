"""Recipes of pushes beside the learner's, nearly all of which must be refused."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx

from shared.wire import IN_FLIGHT_HEADER, TAKEOVER_HEADER
from tests.chaos import forgery, recipes
from tests.chaos.world import RUN_ID, NotInjectedError, World
from tests.integration.support.server import HTTP

_TAKEOVER = {TAKEOVER_HEADER: "1"}


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
        recipes.kill_learner(world, server, random)
        (fence, step), blob = _served(world, server, fence=1)
    _refused(world, server, forgery.reversioned(blob, fence - 1, step + 1000))


def strangers_push(world: World, server: int, random: Random) -> None:
    (fence, step), blob = _served(world, server)
    _refused(world, server, forgery.reversioned(blob, fence, step + 1), secret="a stranger's lease")


def refused_takeover(world: World, server: int, random: Random) -> None:
    """Take the run over with an adapter that must be refused: run and lease stay the learner's."""
    (fence, step), blob = _served(world, server)
    bad = forgery.flip_a_bit(forgery.reversioned(blob, fence, step + 1), random)
    for body in (bad[: random.randrange(len(bad))], bad):
        _refused(world, server, body, secret="a stranger's lease", **_TAKEOVER)
    _still_ours(world, server, "a refused takeover")


def refused_takeover_of_its_place(world: World, server: int, random: Random) -> None:
    """Give the only place for a run to another run, with an adapter that must be refused."""
    (fence, step), blob = _served(world, server)
    bad = forgery.other_run(forgery.flip_a_bit(forgery.reversioned(blob, fence, step), random), "another-run")
    _refused(world, server, bad, run_id="another-run", secret="a stranger's lease", **_TAKEOVER)
    _still_ours(world, server, "a refused takeover by another run")


def long_names(world: World, server: int, random: Random) -> None:
    """Push adapters of modules whose names are longer than any buffer."""
    (fence, step), blob = _served(world, server)
    for length in random.sample([1_000, 30_000, 70_000, 300_000, 2**20], 3):
        _refused(world, server, forgery.renamed(forgery.reversioned(blob, fence, step + 1), length))
    _still_ours(world, server, "long names")


def same_push_at_once(world: World, server: int, random: Random) -> None:
    """Push the learner's next adapter several times while its own push arrives and requests run, as after a cut."""
    in_flight = "drain" if world.options.deterministic else random.choice(["drain", "keep"])
    body = {
        "run_id": RUN_ID,
        "prompts": [{"token_ids": [5 + i]} for i in range(8)],
        "sampling": {"max_tokens": 100, "n": 2, "ignore_eos": True},
    }
    with ThreadPoolExecutor(9) as pool:
        try:
            if not world.control("hold", server=server, at=1.0, timeout=20):
                raise NotInjectedError("no push came")
            blob = world.newest()[1]
            running = pool.submit(HTTP.post, f"{world.url(server)}/v1/generate", json=body)
            time.sleep(random.uniform(0, 0.3))
            headers = {IN_FLIGHT_HEADER: in_flight}
            url, lease = world.url(server), world.lease
            pushing = [pool.submit(_later, i * 0.02, url, lease, blob, headers) for i in range(8)]
            time.sleep(random.uniform(0, 0.2))
        finally:
            world.control("release", server=server)
        for future in pushing:
            answer = future.result()
            right = answer.status_code in (200, 409)
            world.checker.require("I3", right, f"the same push at once: {answer.status_code} {answer.text[:300]}")
        world.checker.require("I3", running.result().status_code in (200, 404), "a request beside pushes has failed")


def _later(delay_s: float, url: str, lease: Path, blob: bytes, headers: dict[str, str]) -> httpx.Response:
    time.sleep(delay_s)
    return forgery.send(url, RUN_ID, lease, blob, **headers)


def _still_ours(world: World, server: int, after: str) -> None:
    """Check that the learner's run is served, and that its last push is taken again."""
    run = HTTP.get(f"{world.url(server)}/v1/runs/{RUN_ID}", timeout=5)
    served = run.status_code == 200 and run.json()["version"] is not None
    world.checker.require("I3", served, f"after {after} the run is gone: {run.status_code} {run.text[:300]}")
    answer = forgery.send(world.url(server), RUN_ID, world.lease, world.newest()[1])
    ours = answer.status_code in (200, 409)  # 409: the learner has pushed a later one meanwhile
    world.checker.require("I3", ours, f"after {after} the learner's push gets {answer.status_code} {answer.text[:300]}")


def _served(world: World, server: int, *, fence: int = 0) -> tuple[tuple[int, int], bytes]:
    """Wait until this server serves the last push, of a learner as late as `fence`; return version and bytes.

    A server without a run would accept any push.
    """
    deadline = time.monotonic() + (90.0 if fence else 5.0)
    while time.monotonic() < deadline:
        (newest, step), blob = world.newest()
        run = HTTP.get(f"{world.url(server)}/v1/runs/{RUN_ID}", timeout=5)
        version = run.json()["version"] if run.status_code == 200 else None
        if version and newest >= fence and (version["fence"], version["step"]) >= (newest, step):
            return (newest, step), blob
        time.sleep(0.02)
    raise NotInjectedError("the server does not serve the last push")


def _refused(
    world: World,
    server: int,
    blob: bytes,
    *,
    run_id: str = RUN_ID,
    secret: str | None = None,
    may_repeat: bool = False,
    **headers: str,
) -> None:
    answer = forgery.send(world.url(server), run_id, world.lease, blob, secret=secret, **headers)
    refused = 400 <= answer.status_code < 500 or (may_repeat and answer.status_code == 200)
    world.checker.require("I3", refused, f"a bad push returned {answer.status_code}: {answer.text[:300]}")
