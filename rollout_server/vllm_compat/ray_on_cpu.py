"""vLLM's Ray executor on CPUs, where vLLM has none: a worker for each CPU that is reserved.

Its workers need no device to be found for them. On GPUs vLLM's own executor is used as it is.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc, ray

_RESOURCE = "CPU"


class CpuRayWorker(RayWorkerProc):  # type: ignore[misc]
    """A worker of one node (0.26 to 0.33)."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """Return the node of this worker, which has no GPU."""
        return ray.get_runtime_context().get_node_id(), []


class CpuRayExecutor(RayExecutorV2):  # type: ignore[misc]
    """The executor, in the engine's process (0.26 to 0.33)."""

    def _init_executor(self) -> None:
        type(current_platform).ray_device_key = _RESOURCE
        ray_executor_v2.RayWorkerProc = CpuRayWorker
        super()._init_executor()

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        return {}  # its bundle of the placement group has reserved the CPU
