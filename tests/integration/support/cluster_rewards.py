"""Rewards and agents on a Ray cluster, some of which hang or end their processes; then all of them hang.

python -m tests.integration.support.cluster_rewards     # on the cluster of $RAY_ADDRESS
"""

from __future__ import annotations

import json
import os
import threading
from functools import partial
from types import SimpleNamespace

from learner.rewards.calls import RewardCall
from learner.rewards.on_cluster import workers_on_cluster
from learner.rewards.pool import RewardPool
from learner.utils.threads import start
from tests.integration.support.cluster_agents import Agents

WORKERS = 2


def lengths(completions, **_):
    if "dies" in completions:
        os._exit(3)
    if "hangs" in completions:
        while True:  # as code that never returns to Python: no signal and no exception ends it
            pass
    if "tells" in completions:
        return [float("LOCKSTEP_TOKEN" in os.environ)]
    return [float(len(completion)) for completion in completions]


def group(*completions: str) -> RewardCall:
    rows = {"prompts": ["p"] * len(completions), "completions": list(completions)}
    return RewardCall(rows, SimpleNamespace(global_step=7))


def main() -> None:
    agents = Agents()
    episodes = start(partial(agents.run, "lives", "dies", "hangs", "lives"), "agents")
    functions = {0: ("lengths", lengths)}
    pool = RewardPool(functions, workers=WORKERS, timeout_s=2.0, make_workers=workers_on_cluster({}))
    outcomes = [pool.submit(0, call) for call in (group("a", "dies", "ccc", "hangs"), group("eeeee"), group("tells"))]
    parts = [[result and result.rewards for _, result in pool.wait(outcome)] for outcome in outcomes]
    print(json.dumps([parts, episodes.result()]), flush=True)
    start(partial(agents.run, "hangs", hanging_s=3600.0), "agents")
    pool.timeout_s = 3600.0
    for _ in range(WORKERS):
        pool.submit(0, group("hangs"))
    threading.Event().wait()


if __name__ == "__main__":
    main()
