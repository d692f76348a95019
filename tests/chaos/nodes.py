"""Recipes that take a node of the Ray cluster away, with all that runs on it, and bring another one.

The learner's node is one of those that may go: then its last checkpoint is where the training goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from random import Random

import psutil

from learner.run_dir.checkpoint import last_checkpoint
from tests.chaos.on_cluster import OURS, START_S, ClusterWorld
from tests.chaos.world import NotInjectedError
from tests.support.ray_cluster import RayNode

#: For `learner up` to say that a node is gone, for the next step of the others, and for a push to come.
_NOTICE_S, _STEP_S, _PUSH_S = 180.0, 60.0, 30.0


def lose_power(world: ClusterWorld, server: int, random: Random) -> None:
    """Kill all that runs on a node at once."""
    time.sleep(random.uniform(0, 2))
    _lose(world, random, RayNode.kill)


def lose_power_in_a_push(world: ClusterWorld, server: int, random: Random) -> None:
    """Do that when the learner has begun to push an adapter."""

    def kill(node: RayNode) -> None:
        before = world.newest()[0]
        if not world.until(lambda: world.newest()[0] != before, _PUSH_S):
            raise NotInjectedError("no push came")
        node.kill()

    _lose(world, random, kill)


def kill_raylet(world: ClusterWorld, server: int, random: Random) -> None:
    """Kill Ray's own process on a node: what it ran there must end, although nobody ends it."""
    _lose(world, random, RayNode.kill_raylet)


def _lose(world: ClusterWorld, random: Random, take_away: Callable[[RayNode], object]) -> None:
    """Take a node away; the training goes on without a server of its, and is whole again with another node."""
    if not world.is_whole():
        raise NotInjectedError("a server is not ready")
    node = random.choice(world.nodes())
    has_learner = bool(node.running("learner.cli"))
    losses = world.members.learners_lost
    if has_learner and last_checkpoint(world.output) == world.resumed_from:
        raise NotInjectedError("the learner has saved nothing since it began")
    everything, running = node.processes(), node.running(*OURS)
    take_away(node)
    gone = time.monotonic()
    if at_once := random.random() < 0.5:
        world.cluster.add(1)
    if not has_learner and world.progress(gone, _STEP_S) is None:
        world.checker.violated("hang", f"no step without the server of {node.host}:\n{world.learner.tail()}")
    if not world.until(lambda: world.members.learners_lost > losses or not world.is_whole(), _NOTICE_S):
        world.checker.violated("hang", f"`learner up` does not notice that {node.host} is gone")
    world.require_ended(running, "by a node that is gone")
    if has_learner:
        world.resumed_from = last_checkpoint(world.output)
    node.kill()
    for process in everything:  # Ray's own, which a lost raylet leaves behind
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if not at_once:
        time.sleep(random.uniform(0, 5))
        world.cluster.add(1)
    world.cluster.nodes[-1].wait_ready()
    if not world.until(world.is_whole, START_S):
        world.checker.violated("hang", f"no server on the new node:\n{world.learner.tail()}")
