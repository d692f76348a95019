"""Actors of a job: what runs on the nodes, and what they are given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.cluster.connection import ADDRESS_VARIABLE, answer, import_ray
from learner.cluster.directory import find_directory
from learner.cluster.hosted import Command, Hosted


class HostedActor(Hosted):
    """A hosted command, as an actor; where it listens, it is listed in the job's directory once it is ready."""

    def __init__(self, command: Command, name: str, job: str) -> None:
        ray = import_ray()
        context = ray.get_runtime_context()

        def announce(url: str) -> None:
            listed = find_directory(ray, job).announce.remote(name, url, context.get_node_id())
            answer(ray, listed, "the directory of the job")

        # Ray sets this to the cores that it reserves, which are labels: the command takes those that it finds.
        if b"OMP_NUM_THREADS=" not in Path("/proc/self/environ").read_bytes():
            os.environ.pop("OMP_NUM_THREADS", None)
        environment = {ADDRESS_VARIABLE: context.gcs_address}
        super().__init__(command, ray.util.get_node_ip_address(), environment, announce)


def host(
    ray: Any,
    command: Command,
    name: str,
    job: str,
    *,
    group: Any,
    bundle: int,
    restarts: int,
    leaves: Sequence[str] = (),
) -> Any:
    """Start an actor in a bundle of a placement group, whose resources it takes, and return it.

    Args:
        restarts: how often Ray starts it again where its node is gone; -1: always.
        leaves: resources of the bundle that it does not take.
    """
    resources = {name: value for name, value in group.bundle_specs[bundle].items() if name not in leaves}
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=bundle
    )
    actor = ray.remote(HostedActor).options(
        num_cpus=resources.pop("CPU", 0),
        num_gpus=resources.pop("GPU", 0),
        resources=resources or None,
        max_restarts=restarts,
        max_concurrency=8,
        scheduling_strategy=strategy,
    )
    return actor.remote(command, name, job)
