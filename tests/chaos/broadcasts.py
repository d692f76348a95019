"""Recipes of faults inside broadcasts, and of errors in the engine, which end it.

A broadcast is held with the workers of a server inside the collective, waiting for the learner (or when all have it,
before the learner is told).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from signal import SIGSTOP, SIGUSR1, SIGUSR2, Signals

from tests.chaos.processes import kill
from tests.chaos.recipes import TOO_LONG_S, Recipe, in_a_push, spare, until, until_ended_and_back
from tests.chaos.recorder import CUT
from tests.chaos.world import NotInjectedError, World

Who = Callable[[World, int], list[int]]


def stop_in_a_push(who: Who, *, too_long: bool = False) -> Recipe:
    """Stop some processes inside a broadcast, which then goes on without them, for a moment or past every deadline."""

    def recipe(world: World, server: int, random: Random) -> None:
        with world.stopped([]) as stopped:
            in_a_push(world, server, random, lambda: stopped.extend(kill(who(world, server), SIGSTOP)))
            if not stopped:
                raise NotInjectedError("it is not running")
            time.sleep(TOO_LONG_S if too_long else random.uniform(0.5, 3))

    return recipe


def kill_part_in_a_push(who: Who) -> Recipe:
    """Kill a process of the engine inside a broadcast: server and learner must notice."""

    def recipe(world: World, server: int, random: Random) -> None:
        spare(world, server)
        generation, killed = world.servers[server].generation, list[int]()
        in_a_push(world, server, random, lambda: killed.extend(kill(who(world, server))))
        if not killed:
            raise NotInjectedError("it is not running")
        until_ended_and_back(world, server, generation)

    return recipe


def silence_in_a_push(world: World, server: int, random: Random) -> None:
    """Deliver nothing between learner and server for a while, in the middle of a broadcast."""
    in_a_push(world, server, random, lambda: world.control("block", server=server, on=True))
    time.sleep(random.choice([random.uniform(0.5, 4), TOO_LONG_S]))
    world.control("block", server=server, on=False)


def half_open_in_a_push(world: World, server: int, random: Random) -> None:
    """Drop what comes over the connections of a broadcast; new ones work."""
    in_a_push(world, server, random, lambda: world.control("half_open", server=server))
    time.sleep(TOO_LONG_S)


def cut_the_group(world: World, server: int, random: Random) -> None:
    """Cut the learner's connections to the workers while they receive from it."""
    file = world.folder / CUT
    file.unlink(missing_ok=True)

    def cut() -> None:
        kill([world.learner.pid], SIGUSR2)
        until(file.exists, 5)

    in_a_push(world, server, random, cut)
    if not file.exists() or not int(file.read_text() or 0):
        raise NotInjectedError("the learner had no connection to the workers")


def engine_error(who: Who, number: Signals) -> Recipe:
    """Raise an error in a process of the engine: the server has to end, and says why."""

    def recipe(world: World, server: int, random: Random) -> None:
        spare(world, server)
        generation = world.servers[server].generation
        time.sleep(random.uniform(0, 1))
        if not kill(who(world, server), number):
            raise NotInjectedError("it is not running")
        until_ended_and_back(world, server, generation)

    return recipe


def no_memory(who: Who) -> Recipe:
    """Ask for memory that is not there, of the GPU where the process uses one."""
    return engine_error(who, SIGUSR2)


def failed_assertion(who: Who) -> Recipe:
    """Let an assertion fail on the GPU, which refuses everything of this process from then on."""
    return engine_error(who, SIGUSR1)
