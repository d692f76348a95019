"""Recipes: functions of a few lines that inject a fault and, if it lasts, repair it before they return.

A recipe takes the world, the index of its server, and its own random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from signal import SIGTERM

from tests.chaos.impostor import Impostor
from tests.chaos.processes import command_line, kill
from tests.chaos.world import GENERATE_S, NotInjectedError, World, ready
from tests.integration.support.server import HTTP

Recipe = Callable[[World, int, Random], None]
#: Longer than the deadline of a rollout, of a push, and of a push on the server.
TOO_LONG_S = GENERATE_S + 2.0
_PUSH_COMES_S = 20.0


# --- processes die


def kill_learner(world: World, server: int, random: Random) -> None:
    time.sleep(random.uniform(0, 2))
    generation = world.learner.generation
    world.learner.kill()
    until(lambda: world.learner.generation > generation, 60)


def kill_learner_in_a_push(world: World, server: int, random: Random) -> None:
    in_a_push(world, server, random, world.learner.kill)


def kill_server(world: World, server: int, random: Random) -> None:
    spare(world, server)
    time.sleep(random.uniform(0, 2))
    world.servers[server].kill()
    until_back(world, server)


def kill_server_in_a_push(world: World, server: int, random: Random) -> None:
    spare(world, server)
    in_a_push(world, server, random, world.servers[server].kill)
    until_back(world, server)


def upgrade_server(world: World, server: int, random: Random) -> None:
    """Send SIGTERM: the server must finish its requests and end with status 0."""
    spare(world, server)
    generation = world.servers[server].generation
    kill([world.servers[server].pid], SIGTERM)
    if not until(lambda: world.servers[server].generation > generation, 60):
        world.checker.violated("hang", "the server does not end after SIGTERM")
    elif (status := world.servers[server].exits[-1][1]) != 0:
        world.checker.violated("drain", f"the server ended with status {status}")
    until_back(world, server)


def kill_part(who: Callable[[World, int], list[int]]) -> Recipe:
    """Kill a process of the engine: the server has to end by itself, and not respond without an engine."""

    def recipe(world: World, server: int, random: Random) -> None:
        spare(world, server)
        generation = world.servers[server].generation
        if not kill(who(world, server)):
            raise NotInjectedError("it is not running")
        until_ended_and_back(world, server, generation)

    return recipe


def kill_reward_worker(world: World, server: int, random: Random) -> None:
    """Kill a reward worker, but not the resource tracker, which would leave semaphores behind."""
    children = [pid for pid in world.learner.children() if b"resource_tracker" not in command_line(pid)]
    if not children or not kill([random.choice(children)]):
        raise NotInjectedError("no reward worker is running")


# --- processes stop and continue


def stop(who: Callable[[World, int], list[int]], *, too_long: bool = False) -> Recipe:
    """Stop some processes, for a moment or longer than every deadline."""

    def recipe(world: World, server: int, random: Random) -> None:
        with world.stopped(who(world, server)):
            time.sleep(TOO_LONG_S if too_long else random.uniform(0.5, 3))

    return recipe


def the_server(world: World, server: int) -> list[int]:
    return [world.servers[server].pid]


def the_engine(world: World, server: int) -> list[int]:
    return world.servers[server].children("VLLM::EngineCor")


def the_worker(world: World, server: int) -> list[int]:
    return world.servers[server].children("VLLM::Worker")


def the_learner(world: World, server: int) -> list[int]:
    return [world.learner.pid]


# --- the network


def reset_connections(world: World, server: int, random: Random) -> None:
    time.sleep(random.uniform(0, 1))
    world.control("reset", server=server)


def reset_again_and_again(world: World, server: int, random: Random) -> None:
    for _ in range(random.randint(5, 20)):
        world.control("reset", server=server)
        time.sleep(random.uniform(0, 0.2))


def refuse_connections(world: World, server: int, random: Random) -> None:
    world.control("refuse", server=server, on=True)
    world.control("reset", server=server)
    time.sleep(random.uniform(0.5, 4))
    world.control("refuse", server=server, on=False)


def delay(world: World, server: int, random: Random) -> None:
    world.control("delay", server=server, seconds=random.uniform(0.05, 0.3))
    time.sleep(random.uniform(1, 3))
    world.control("delay", server=server, seconds=0.0)


def silence(world: World, server: int, random: Random) -> None:
    world.control("block", server=server, on=True)
    time.sleep(random.uniform(0.5, 4))
    world.control("block", server=server, on=False)


def silence_too_long(world: World, server: int, random: Random) -> None:
    world.control("block", server=server, on=True)
    time.sleep(TOO_LONG_S)
    world.control("block", server=server, on=False)


def half_open(world: World, server: int, random: Random) -> None:
    """Drop data on present connections until the learner's deadline; new connections work."""
    if not world.control("half_open", server=server):
        raise NotInjectedError("there is no connection")
    time.sleep(TOO_LONG_S)


def cut_answers(world: World, server: int, random: Random) -> None:
    world.control("cut", server=server, side=1, after=random.randrange(3000))


def cut_requests(world: World, server: int, random: Random) -> None:
    world.control("cut", server=server, side=0, after=random.randrange(3000))


def cut_a_push(world: World, server: int, random: Random) -> None:
    in_a_push(world, server, random, lambda: world.control("reset", server=server))


def cut_the_wire(world: World, server: int, random: Random) -> None:
    world.network.wire(up=False)
    time.sleep(random.uniform(0.5, 4))
    world.network.wire(up=True)


def cut_the_wire_too_long(world: World, server: int, random: Random) -> None:
    world.network.wire(up=False)
    time.sleep(TOO_LONG_S)
    world.network.wire(up=True)


# --- disk, clocks, addresses


def full_disk(world: World, server: int, random: Random) -> None:
    generation = world.learner.generation
    world.disk.fill(but=random.choice([0, 20_000, 300_000]))
    until(lambda: world.learner.generation > generation, random.uniform(3, 12))
    world.disk.free()


def learner_clock_jumps(world: World, server: int, random: Random) -> None:
    _jump(world, "learner", random)


def server_clock_jumps(world: World, server: int, random: Random) -> None:
    _jump(world, "server", random)


def leave_the_list(world: World, server: int, random: Random) -> None:
    """Take a server off the list for a while, as an operator or Kubernetes would."""
    world.list_servers(but=server)
    time.sleep(random.uniform(3, 15))
    world.list_servers()


def another_version_at_its_address(world: World, server: int, random: Random) -> None:
    state = HTTP.get(f"{world.url(server)}/v1/state", timeout=5).json()
    _at_its_address(world, server, Impostor(state).port, random)


def another_model_at_its_address(world: World, server: int, random: Random) -> None:
    assert world.other is not None
    port = int(world.other.command[world.other.command.index("--port") + 1])
    _at_its_address(world, server, port, random)
    runs = HTTP.get(f"http://127.0.0.1:{port}/v1/state", timeout=5).json()["runs"]
    world.checker.require("another model", not runs, f"it has accepted pushes: {runs}")


# --- helpers


def until(condition: Callable[[], object], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def until_ended_and_back(world: World, server: int, generation: int) -> None:
    """Wait until a server whose engine is broken has ended by itself and the supervisor has restarted it."""
    if not until(lambda: world.servers[server].generation > generation, 60):
        world.checker.violated("engine death", "the server goes on with a broken engine")
    until_back(world, server)


def until_back(world: World, server: int) -> None:
    """Wait until the supervisor has restarted a single server; with several, the training need not wait for it."""
    if world.server_list:
        return
    time.sleep(0.5)
    if not until(lambda: ready(world.url(server)), 240):
        world.checker.violated("hang", f"server {server} does not come back:\n{world.servers[server].tail()}")


def spare(world: World, server: int) -> None:
    """Skip the fault if no other of several servers is up: the training would have to wait for one."""
    others = [index for index in range(len(world.servers)) if index != server]
    if others and not any(ready(world.url(index)) for index in others):
        raise NotInjectedError("no other server is up")


def in_a_push(world: World, server: int, random: Random, action: Callable[[], object]) -> None:
    """Run `action` when a part of the next push has reached the server, or while its workers receive a broadcast."""
    broadcast, at = world.options.broadcast, random.uniform(0.01, 1)
    try:
        if not world.control("hold", server=server, at=at, timeout=_PUSH_COMES_S, broadcast=broadcast):
            raise NotInjectedError("no push came" if not broadcast else "no broadcast came")
        action()
        time.sleep(0.2)
    finally:
        world.control("release", server=server)


def _jump(world: World, name: str, random: Random) -> None:
    world.clocks[name].set(random.choice([-1, 1]) * random.choice([5, 120, 7200, 3e6]))
    time.sleep(random.uniform(0.5, 2))
    if random.random() < 0.5:
        world.clocks[name].set(0)


def _at_its_address(world: World, server: int, port: int, random: Random) -> None:
    generation = world.learner.generation
    before = world.control("upstream", server=server, port=port)
    until(lambda: world.learner.generation > generation, random.uniform(1, 8))
    world.control("upstream", server=server, port=before)
