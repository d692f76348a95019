"""vLLM's Ray executor, which says why it could not start, and runs on CPUs, too: a worker for each reserved CPU."""

from __future__ import annotations

import logging
import os
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor import Executor, ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc, ray

from rollout_server.vllm_compat import parents, start_errors
from shared.placement import PLACEMENT_VARIABLE

_SAY_S = 15.0

logger = logging.getLogger("lockstep.server")


class CpuRayWorker(RayWorkerProc):  # type: ignore[misc]
    """A worker on the CPUs of a node (0.26 to 0.33)."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """Return the node of this worker, which has no GPU."""
        return ray.get_runtime_context().get_node_id(), []


class RayExecutor(RayExecutorV2):  # type: ignore[misc]
    """The executor, in the engine's process (0.26 to 0.33)."""

    def _init_executor(self) -> None:
        parents.end_with_parent()  # the server; links to its workers come last
        start_errors.report_errors()  # of its workers: none of them is started by the server
        if current_platform.is_cpu():
            type(current_platform).ray_device_key = "CPU"
            ray_executor_v2.RayWorkerProc = CpuRayWorker
        if name := os.environ.get(PLACEMENT_VARIABLE):
            self.parallel_config.placement_group = _reserved(name, self.parallel_config.ray_runtime_env)
        super()._init_executor()

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        # On CPUs the bundle of the placement group has reserved what a worker needs.
        return {} if current_platform.is_cpu() else RayExecutorV2._get_actor_resource_kwargs()


def _reserved(name: str, runtime_env: Any) -> Any:
    """Return the placement group NAMESPACE/NAME once all its bundles have room, which a node that died took along."""
    namespace, _, own = name.partition("/")
    ray.init(namespace=namespace, runtime_env=runtime_env)
    group = ray.util.get_placement_group(own)
    while not group.wait(_SAY_S):
        logger.warning("waiting for room on the cluster for this engine's workers: %s", group.bundle_specs)
    return group


def use() -> None:
    """Let engines of this process that are to run on Ray have `RayExecutor`."""
    get_class = Executor.get_class

    def chosen(vllm_config: Any) -> type[Executor]:
        executor: type[Executor] = get_class(vllm_config)
        return RayExecutor if executor is RayExecutorV2 else executor

    Executor.get_class = staticmethod(chosen)
