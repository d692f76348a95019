"""A real rollout server whose workers are on the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.support.forked import FORKING
from tests.integration.support.server import ENVIRONMENT, ServerProcess
from tests.support.ray_cluster import RayCluster, RayNode

#: The second node has room for one worker, so that each has a node of its own.
_CPUS = 1
#: Ray's own is 15: beside other tests its workers would hardly be run.
NICENESS = {"RAY_worker_niceness": "0"}


@contextlib.contextmanager
def two_nodes() -> Iterator[RayCluster]:
    """Run a cluster of two nodes, with a CPU on each, until the end of the block."""
    with RayCluster({**ENVIRONMENT, **NICENESS, "PYTHONPATH": FORKING}) as cluster:
        cluster.add(_CPUS).wait_ready()
        cluster.add(_CPUS).wait_ready()
        yield cluster


@contextlib.contextmanager
def running_on(cluster: RayCluster, model: Path, folder: Path, *flags: str) -> Iterator[ServerOnCluster]:
    """Run a server with a worker on each node, ready and with its log in `folder`, until the end of the block."""
    process = ServerOnCluster(cluster, model, folder / "server.log", *flags)
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


class ServerOnCluster(ServerProcess):
    """`rollout-server --distributed-executor-backend ray --tensor-parallel-size 2` on the first node's machine."""

    def __init__(self, cluster: RayCluster, model: Path, log: Path, *flags: str) -> None:
        self.cluster = cluster
        spread = ["--distributed-executor-backend", "ray", "--tensor-parallel-size", "2"]
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("RAY_ADDRESS", cluster.address)
            super().__init__(model, log, *flags, *spread, forked=False)

    def wait_ready(self, timeout_s: float = 600.0) -> None:
        """Wait longer than for others: both nodes import everything."""
        super().wait_ready(timeout_s)

    def worker(self, rank: int) -> psutil.Process:
        """Return the process of a worker; the first is beside the engine, on the first node."""
        (found,) = vllm_processes(self.cluster.nodes[rank])
        return found


def vllm_processes(node: RayNode) -> list[psutil.Process]:
    """Return the workers of vLLM on a node."""
    found = []
    for process in node.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::CpuRayWorker"):
                found.append(process)
    return found
