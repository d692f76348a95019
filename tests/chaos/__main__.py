"""`make chaos`: inject a seeded random schedule of faults into a real training run.

python -m tests.chaos [--quick] [--faults N] [--seed N] [--steps N] [--servers K] [--json FILE]
python -m tests.chaos --gpu          # learner and servers on a GPU each; faults inside broadcasts, errors on a GPU
python -m tests.chaos --broadcast    # the same without GPUs
python -m tests.chaos --cluster      # nodes of a Ray cluster are taken away, and replaced
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import shutil
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from random import Random

import httpx

from learner.utils.processes import stop_on_signals
from tests.chaos import agreement, ending
from tests.chaos.devices import Devices
from tests.chaos.faults import BROADCAST_FAULTS, FAULTS, NODE_FAULTS, Fault, plan
from tests.chaos.on_cluster import ClusterWorld
from tests.chaos.report import Record, say, table
from tests.chaos.surroundings import UnavailableError
from tests.chaos.world import NotInjectedError, Options, Training, World

_BEGIN_S, _END_S = 180.0, 180.0
_TRIES = 5  # of faults that cannot be injected


def main() -> int:
    """Run the suite and return the exit code: 0 only without violations and with every fault injected."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="each cheap fault once, a few of the others: minutes")
    add(
        "--faults",
        type=int,
        help="how many faults, not with --quick (default: 210; 40 with --gpu or --broadcast; 8 with --cluster)",
    )
    add("--seed", type=int, default=secrets.randbelow(10**6), help="of the schedule (default: random, and printed)")
    add("--steps", type=int, help="optimizer steps of the training (default: 16 to 60 for each fault)")
    add("--servers", type=int, help="rollout servers (default: 1; 2 with --cluster)")
    add("--cluster", action="store_true", help="`learner up --cluster` on a Ray cluster, whose nodes die")
    add("--broadcast", action="store_true", help="pushes by broadcast, most faults inside them")
    add(
        "--gpu",
        action="store_true",
        help="the same on GPUs, by NCCL: the learner on the first, the servers on the second, or all on the only one",
    )
    add("--deadline-s", type=float, default=math.inf, help="inject nothing new after this many seconds, and end soon")
    add(
        "--deterministic",
        action="store_true",
        help="synchronous, one server; compare the final adapter with that of an undisturbed training",
    )
    add("--only", default="", help="only faults whose name contains this")
    add("--json", type=Path, help="write the results to this file")
    add("--keep", type=Path, help="keep logs and checkpoints in this folder")
    options = parser.parse_args()
    try:
        options.devices = Devices.of_this_machine() if options.gpu else Devices()
    except UnavailableError as error:
        parser.error(f"--gpu: {error}")
    options.broadcast = options.broadcast or options.gpu
    options.faults = options.faults or (8 if options.cluster else 40 if options.broadcast else 210)
    options.servers = options.servers or (2 if options.cluster else 1)
    names = [fault.name for fault in _known(options)]
    if not any(options.only in name for name in names):
        parser.error(f"--only {options.only}: no such fault; there are {', '.join(names)}")
    if options.deterministic and (options.cluster or options.broadcast):
        parser.error("--deterministic is for one server, without --cluster, --gpu and --broadcast")
    if options.cluster and (options.broadcast or options.deadline_s < math.inf):
        parser.error("--cluster goes without --gpu, --broadcast and --deadline-s")
    if options.gpu:
        say(str(options.devices))
    say(f"seed {options.seed}: repeat with --seed {options.seed}")
    folder = Path(tempfile.mkdtemp(prefix="lockstep-chaos-"))
    try:
        with stop_on_signals():
            return run(options, folder)
    finally:
        if options.keep:
            shutil.copytree(folder, options.keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("control"))
        shutil.rmtree(folder, ignore_errors=True)


def _known(options: argparse.Namespace) -> list[Fault]:
    if options.cluster:
        return NODE_FAULTS
    return BROADCAST_FAULTS if options.broadcast else FAULTS


def run(options: argparse.Namespace, folder: Path) -> int:
    """Run the suite in `folder`."""
    random, began = Random(options.seed), time.monotonic()
    count, deadline = 10**6 if options.quick else options.faults, began + options.deadline_s
    world = (ClusterWorld if options.cluster else World)(
        Options(
            folder,
            options.seed,
            steps=0,
            servers=options.servers,
            quick=options.quick,
            deterministic=options.deterministic,
            broadcast=options.broadcast,
            devices=options.devices,
        )
    )
    missing = {*world.unavailable, *(["other"] if options.quick else [])}
    for name, why in world.unavailable.items():
        say(f"no faults that need {name}: {why}")
    faults = plan(random, count, quick=options.quick, missing=missing, only=options.only, faults=_known(options))
    # With several servers the training goes on during most faults.
    pace = 60 if options.cluster else 28 if options.servers > 1 else 16 if options.broadcast else 21
    world.options.steps = options.steps or pace * len(faults) + 10
    with world:
        records = disturb(world, faults, random, deadline)
        in_time = time.monotonic() < deadline
        ended = finish(world)
        world.checker.stop()
        if ended and options.deterministic and isinstance(world, World):
            ending.same_bytes(world)
        world.close()
        if ended:
            ending.check(world)
        seconds, violations = time.monotonic() - began, world.checker.violations
        text, ok = table(records, world, seconds)
        print(text, flush=True)
        if any(not record.injected for record in records):
            print("some faults could not be injected, so this run has not passed", flush=True)
        if len(records) < len(faults) and not in_time:
            print(f"{len(records)} of {len(faults)} faults came within {options.deadline_s:.0f} s", flush=True)
        elif len(records) < len(faults):
            print(f"only {len(records)} of {len(faults)} faults came before the end: give more --steps", flush=True)
        if options.json:
            document = {
                "seed": options.seed,
                "seconds": seconds,
                "steps": world.options.steps,
                "servers": options.servers,
                "faults": [asdict(record) for record in records],
                "violations": [asdict(v) for v in violations],
                "checks": world.checker.checks,
                "largest_gap": world.checker.largest_gap,
                "largest_share": world.checker.largest_share,
                "broadcasts": world.broadcasts(),
                "devices": str(options.devices),
                "left_out": world.unavailable,
                "learner_exits": world.learner.exits,
                "server_exits": {server.name: server.exits for server in getattr(world, "servers", ())},
            }
            options.json.write_text(json.dumps(document, indent=1))
    return 0 if ok and ended and (len(records) == len(faults) or not in_time) else 1


def disturb(world: Training, faults: list[Fault], random: Random, deadline: float = math.inf) -> list[Record]:
    """Inject one fault after the other, spread over the training's steps; the training must recover from each.

    A fault that cannot be injected is put off, a few times. None begins after `deadline`; the training then ends soon.
    """
    records: list[Record] = []
    if world.progress(time.monotonic(), _BEGIN_S) is None:
        world.checker.violated("hang", f"the training does not start:\n{world.learner.tail()}")
        return records
    waiting = deque((fault, 1) for fault in faults)
    while waiting:
        if time.monotonic() > deadline:
            say(f"no further faults after {len(records)}: the time is up")
            break
        (fault, attempt), number = waiting.popleft(), len(records)
        # The last quarter is for the steps that pass during faults.
        if not _reach(world, number * world.options.steps * 3 // 4 // len(faults)):
            break
        own, server = Random(random.random()), random.randrange(world.options.servers)
        time.sleep(own.uniform(0, 0.5))
        record = _inject(world, fault, server, own)
        say(f"{number + 1}/{len(faults)} step {world.step()}  {record}")
        if record.injected or attempt == _TRIES:
            records.append(record)
        else:  # later, when the world is in another state
            waiting.append((fault, attempt + 1))
    if deadline < math.inf:
        world.end_early()
    world.during = "the end"
    world.hurry()
    return records


def _reach(world: Training, step: int) -> bool:
    """Wait for a step; return False if the training has ended or makes no progress."""
    while world.step() < step and not world.learner.done.is_set():
        if world.progress(time.monotonic(), 90.0) is None:
            world.checker.violated("hang", f"no step for 90 s without a fault:\n{world.learner.tail()}")
            return False
    return not world.learner.done.is_set()


def _inject(world: Training, fault: Fault, server: int, random: Random) -> Record:
    world.during, began = fault.name, time.monotonic()
    generation, violations = world.learner.generation, len(world.checker.violations)
    try:
        fault.recipe(world, server, random)
    except (NotInjectedError, httpx.HTTPError) as error:  # one of several servers may be down
        return Record(fault.name, server, injected=False, note=f"{type(error).__name__}: {error}")
    lifted = time.monotonic()
    recovery = world.progress(lifted, fault.limit_s)
    if recovery is None:
        world.checker.violated("hang", f"no step within {fault.limit_s:.0f} s:\n{world.learner.tail()}")
        world.learner.kill()
    else:
        agreement.check(world, fault.limit_s)
    return Record(
        fault.name,
        server,
        True,
        lasted=lifted - began,
        recovery=recovery,
        learner_restarts=world.learner.generation - generation,
        violations=len(world.checker.violations) - violations,
    )


def finish(world: Training) -> bool:
    """Wait for the training's end; return False if it does not come."""
    while not world.learner.done.is_set():
        if world.progress(time.monotonic(), _END_S) is None:
            world.checker.violated("hang", f"the training does not end:\n{world.learner.tail()}")
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
