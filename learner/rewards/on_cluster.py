"""Reward workers on the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from learner.cluster.resources import Resources
from learner.cluster.workers import WorkerPool, pools_on_cluster
from learner.rewards import worker


def workers_on_cluster(needs: Resources) -> Callable[[int, Mapping[int, bytes]], WorkerPool]:
    """Return what starts reward workers on the cluster of $RAY_ADDRESS, or the one that this machine is a node of.

    Args:
        needs: resources of each worker, in Ray's names; by default one core.

    Raises:
        InvalidRequest: see `pools_on_cluster`.
    """
    make = pools_on_cluster("reward", {"CPU": 1.0, **needs}, "a reward worker")
    return lambda count, blobs: make(count, worker.load, (blobs,))
