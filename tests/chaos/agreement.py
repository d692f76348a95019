"""What a server says of itself, and whether it can be pushed to: the two must agree after every fault."""

from __future__ import annotations

import time

import httpx

from tests.chaos.world import Training
from tests.integration.support.server import HTTP

_EVERY_S = 0.1


def check(world: Training, within: float) -> None:
    """Check every server: while it says that it is ready, the learner's next push must reach it `within` seconds.

    A server that is down, or says that it is not ready, is left to the other checks; after a push it must be healthy.
    """
    for index, url in enumerate(world.addresses()):
        _check(world, index, url, within)


def _check(world: Training, index: int, url: str, within: float) -> None:
    began = time.monotonic()
    while time.monotonic() < began + within:
        if world.learner.done.is_set() or not says_ready(url):
            return
        if any(receipt["server"] == index and receipt["time"] > began for receipt in world.control.receipts()):
            right = (said := says(url)) in ((200, 200), None)
            world.checker.require("agreement", right, f"server {index} takes pushes, and says {said}")
            return
        time.sleep(_EVERY_S)
    if world.learner.done.is_set():
        return
    last = max((r["step"] for r in world.control.receipts() if r["server"] == index), default=None)
    what = f"server {index} says that it is ready, and has taken no push for {within:.0f} s: its last was step {last}"
    world.checker.require("agreement", False, what)


def says(url: str) -> tuple[int, int] | None:
    """Return the statuses of `/health` and `/ready`; None if the server cannot be reached."""
    try:
        health, ready = (HTTP.get(url + path, timeout=5.0).status_code for path in ("/health", "/ready"))
    except httpx.HTTPError:
        return None
    return health, ready


def says_ready(url: str) -> bool:
    """Return whether both are 200."""
    return says(url) == (200, 200)
