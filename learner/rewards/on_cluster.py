"""Reward workers on the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from learner.cluster.connection import connect
from learner.cluster.resources import Resources, check_fits, nodes
from learner.cluster.workers import WorkerPool
from learner.rewards import worker
from shared.errors import InvalidRequest

#: Resources of Ray's that an actor cannot ask for by name.
_RESERVED = {"object_store_memory", "bundle"}


def workers_on_cluster(needs: Resources) -> Callable[[int, Mapping[int, bytes]], WorkerPool]:
    """Return what starts reward workers on the cluster of $RAY_ADDRESS, or the one that this machine is a node of.

    Args:
        needs: resources of each worker, in Ray's names; by default one core.

    Raises:
        InvalidRequest: no Ray, no cluster, or no node of it has these resources.
    """
    needs = {"CPU": 1.0, **needs}
    if refused := sorted(_RESERVED.intersection(needs)):
        raise InvalidRequest(f"reward_resources: {refused[0]} is Ray's own and nobody's to ask for; leave it out")
    try:
        ray = connect()
        check_fits(nodes(ray), needs, "a reward worker")
    except InvalidRequest as error:
        raise InvalidRequest(f"reward_backend ray: {error.message}") from error
    load = partial(worker.load, sees_gpus=bool(needs.get("GPU")))
    return lambda count, blobs: WorkerPool(ray, count, needs, load, (blobs,))
