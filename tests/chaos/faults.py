"""The faults: their frequency, and the time limit for recovery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.chaos import agents, broadcasts, nodes, pushes, recipes, strangers


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        share: frequency in relation to the others.
        quick: number in the short suite.
        limit_s: seconds until the training's next step after the fault.
        needs: part of the world that it needs.
    """

    name: str
    recipe: Callable[[Any, int, Random], None]
    share: int
    quick: int = 0
    limit_s: float = 90.0
    needs: str = ""


FAULTS = [
    Fault("learner: kill -9", recipes.kill_learner, 5),
    Fault("learner: kill -9 inside a push", recipes.kill_learner_in_a_push, 6, quick=1),
    Fault("server: kill -9", recipes.kill_server, 2, limit_s=120),
    Fault("server: kill -9 inside a push", recipes.kill_server_in_a_push, 2, limit_s=120),
    Fault("server: SIGTERM", recipes.upgrade_server, 2, limit_s=120),
    Fault("engine: kill -9", recipes.kill_part(recipes.the_engine), 2, limit_s=120),
    Fault("engine's worker: kill -9", recipes.kill_part(recipes.the_worker), 2, limit_s=120),
    Fault("reward worker: kill -9", recipes.kill_reward_worker, 8, quick=1),
    Fault("server: SIGSTOP", recipes.stop(recipes.the_server), 9, quick=1),
    Fault("server: SIGSTOP past deadlines", recipes.stop(recipes.the_server, too_long=True), 3),
    Fault("engine: SIGSTOP", recipes.stop(recipes.the_engine), 9, quick=1),
    Fault("engine: SIGSTOP past deadlines", recipes.stop(recipes.the_engine, too_long=True), 3),
    Fault("engine's worker: SIGSTOP", recipes.stop(recipes.the_worker), 9, quick=1),
    Fault("engine's worker: SIGSTOP past deadlines", recipes.stop(recipes.the_worker, too_long=True), 3),
    Fault("learner: SIGSTOP", recipes.stop(recipes.the_learner), 9, quick=1),
    Fault("learner: SIGSTOP past deadlines", recipes.stop(recipes.the_learner, too_long=True), 3),
    Fault("connections: reset", recipes.reset_connections, 14, quick=1),
    Fault("connections: reset again and again", recipes.reset_again_and_again, 8, quick=1),
    Fault("connections: refused", recipes.refuse_connections, 8, quick=1),
    Fault("connections: delayed", recipes.delay, 8, quick=1),
    Fault("connections: silent", recipes.silence, 8, quick=1),
    Fault("connections: silent past deadlines", recipes.silence_too_long, 3),
    Fault("connections: half-open", recipes.half_open, 3),
    Fault("connections: answer truncated", recipes.cut_answers, 12, quick=1),
    Fault("connections: request truncated", recipes.cut_requests, 10, quick=1),
    Fault("connections: reset inside a push", recipes.cut_a_push, 10, quick=1),
    Fault("wire: cut", recipes.cut_the_wire, 6, quick=1, needs="network"),
    Fault("wire: cut past deadlines", recipes.cut_the_wire_too_long, 2, needs="network"),
    Fault("push: truncated", pushes.truncated_push, 6, quick=1),
    Fault("push: hung up in the middle", pushes.half_a_push, 6, quick=1),
    Fault("push: flipped bit", pushes.flipped_bit, 6, quick=1),
    Fault("push: repeated", pushes.repeated_push, 6, quick=1),
    Fault("push: older", pushes.older_push, 6, quick=1),
    Fault("push: stale fence", pushes.stale_fence, 6, quick=1),
    Fault("push: a stranger's lease", pushes.strangers_push, 4, quick=1),
    Fault("push: refused takeover", pushes.refused_takeover, 5, quick=1),
    Fault("push: refused takeover by another run", pushes.refused_takeover_of_its_place, 5, quick=1),
    Fault("push: long names", pushes.long_names, 4, quick=1),
    Fault("push: the same several times at once", pushes.same_push_at_once, 6, quick=1),
    Fault("group: failed join", strangers.failed_join, 3, quick=1),
    Fault("strangers: requests without end", strangers.endless_requests, 4, quick=1),
    Fault("strangers: idle connections", strangers.idle_connections, 4, quick=1),
    Fault("strangers: large bodies", strangers.large_bodies, 4, quick=1),
    Fault("strangers: structured outputs", strangers.structured_outputs, 4, quick=1),
    Fault("strangers: waiting requests", strangers.waiting_crowd, 3, quick=1),
    Fault("strangers: a page of another site", strangers.requests_of_a_page, 3, quick=1),
    Fault("session: hung up in a call, and left open", agents.hang_up_and_stay_open, 4, quick=1),
    Fault("session: its token used elsewhere", agents.use_token_elsewhere, 3),
    Fault("session: its server kill -9", agents.kill_server, 2, limit_s=120),
    Fault("session: its learner kill -9", agents.kill_learner, 3),
    Fault("disk full", recipes.full_disk, 3, needs="disk"),
    Fault("clock of the learner jumps", recipes.learner_clock_jumps, 6, quick=1, needs="clock"),
    Fault("clock of the servers jumps", recipes.server_clock_jumps, 6, quick=1, needs="clock"),
    Fault("server: off the list for a while", recipes.leave_the_list, 6, needs="several servers"),
    Fault("another version at its address", recipes.another_version_at_its_address, 3, limit_s=150),
    Fault("another model at its address", recipes.another_model_at_its_address, 2, limit_s=150, needs="other"),
]


#: Of a training that pushes by broadcast, or whose learner and servers share the only GPU. Most come inside a push; few
#: end a server, which takes half a minute to come back.
BROADCAST_FAULTS = [
    Fault("learner: kill -9 inside a push", recipes.kill_learner_in_a_push, 4, quick=1),
    Fault("learner: SIGSTOP inside a push", broadcasts.stop_in_a_push(recipes.the_learner), 4, quick=1),
    Fault(
        "learner: SIGSTOP inside a push, past deadlines",
        broadcasts.stop_in_a_push(recipes.the_learner, too_long=True),
        1,
        quick=1,
    ),
    Fault("server: kill -9 inside a push", recipes.kill_server_in_a_push, 1, quick=1, limit_s=120),
    Fault("server: SIGSTOP inside a push", broadcasts.stop_in_a_push(recipes.the_server), 3, quick=1),
    Fault("engine: kill -9 inside a push", broadcasts.kill_part_in_a_push(recipes.the_engine), 1, limit_s=120),
    Fault("engine: SIGSTOP inside a push", broadcasts.stop_in_a_push(recipes.the_engine), 3, quick=1),
    Fault("engine: SIGSTOP", recipes.stop(recipes.the_engine), 2),
    Fault(
        "engine's worker: kill -9 inside a push",
        broadcasts.kill_part_in_a_push(recipes.the_worker),
        1,
        quick=1,
        limit_s=120,
    ),
    Fault("engine's worker: SIGSTOP inside a push", broadcasts.stop_in_a_push(recipes.the_worker), 4, quick=1),
    Fault(
        "engine's worker: SIGSTOP inside a push, past deadlines",
        broadcasts.stop_in_a_push(recipes.the_worker, too_long=True),
        2,
        quick=1,
    ),
    Fault("engine's worker: SIGSTOP", recipes.stop(recipes.the_worker), 2),
    Fault("engine's worker: no memory", broadcasts.no_memory(recipes.the_worker), 1, quick=1, limit_s=120),
    Fault(
        "engine's worker: failed assertion on the GPU",
        broadcasts.failed_assertion(recipes.the_worker),
        1,
        limit_s=120,
        needs="a GPU",
    ),
    Fault("connections: reset inside a push", recipes.cut_a_push, 4, quick=1),
    Fault("connections: silent inside a push", broadcasts.silence_in_a_push, 3, quick=1),
    Fault("connections: half-open inside a push", broadcasts.half_open_in_a_push, 1),
    Fault("connections: answer truncated", recipes.cut_answers, 3, quick=1),
    Fault("group: its connections are cut inside a push", broadcasts.cut_the_group, 4, quick=1),
    Fault("group: failed join", strangers.failed_join, 2, quick=1),
    Fault("push: flipped bit", pushes.flipped_bit, 1),
    Fault("push: older", pushes.older_push, 1, quick=1),
    Fault("push: stale fence", pushes.stale_fence, 1),
    Fault("push: refused takeover", pushes.refused_takeover, 1),
]


#: Of a training on a Ray cluster.
NODE_FAULTS = [
    Fault("node: its power fails", nodes.lose_power, 2, quick=1, limit_s=300),
    Fault("node: its power fails inside a push", nodes.lose_power_in_a_push, 2, limit_s=300),
    Fault("node: its raylet is killed", nodes.kill_raylet, 1, quick=1, limit_s=300),
]


def plan(
    random: Random, count: int, *, quick: bool, missing: set[str], only: str = "", faults: Sequence[Fault] = FAULTS
) -> list[Fault]:
    """Draw faults whose names contain `only`, and their order. With `quick`, their numbers are those of the table."""
    known = [fault for fault in faults if fault.needs not in missing and only in fault.name]
    if quick:
        chosen = [fault for fault in known for _ in range(fault.quick)]
    else:
        total = sum(fault.share for fault in known)
        numbers = {fault: max(round(count * fault.share / total), 1) for fault in known}
        cheap = [fault for fault in known if fault.share >= 9] or known
        while sum(numbers.values()) < count:
            numbers[random.choice(cheap)] += 1
        while sum(numbers.values()) > max(count, len(known)):
            numbers[max(numbers, key=lambda fault: numbers[fault])] -= 1
        chosen = [fault for fault, number in numbers.items() for _ in range(number)]
    random.shuffle(chosen)
    return chosen[:count]
