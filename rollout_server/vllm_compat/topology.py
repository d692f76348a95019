"""Process layouts of vLLM that a rollout server supports: every worker of every engine must receive every push."""

from __future__ import annotations

from typing import Any

_ELSEWHERE = "run outside this server, which could not reach their workers"


def on_ray(parallel: Any) -> bool:
    """Return whether the workers are actors of a Ray cluster, perhaps on several hosts."""
    return bool(parallel.distributed_executor_backend == "ray")


def node_address() -> str:
    """Return the address of this worker's host on the Ray cluster (0.26 to 0.33)."""
    import ray

    return str(ray.util.get_node_ip_address())


def workers(parallel: Any) -> int:
    """Count the workers of all engines. `parallel`: vLLM's resolved ParallelConfig."""
    return int(parallel.world_size_across_dp)


def refusal(parallel: Any, *, mixture_of_experts: bool) -> str | None:
    """Return why this layout is not supported, and what to do instead; None if it is."""
    engines, local = parallel.data_parallel_size, parallel.data_parallel_size_local
    executor = parallel.distributed_executor_backend
    several = "start several rollout servers"
    if parallel.pipeline_parallel_size > 1:
        return "--pipeline-parallel-size: no worker would hold all layers of an adapter; use --tensor-parallel-size"
    if parallel.nnodes > 1:
        return (
            f"--nnodes {parallel.nnodes}: such workers {_ELSEWHERE}; place them on several hosts with "
            "--distributed-executor-backend ray"
        )
    if on_ray(parallel):
        if engines > 1:
            return f"--data-parallel-size: an engine on a Ray cluster is one; leave it out, or {several}"
    elif executor not in (None, "uni", "mp"):
        return f"--distributed-executor-backend {executor}: such workers {_ELSEWHERE}; use ray, mp, or leave it out"
    if engines == 1:
        return None
    if parallel.data_parallel_backend != "mp":
        return (
            f"--data-parallel-backend {parallel.data_parallel_backend}: such engines {_ELSEWHERE}; "
            "use mp, or leave it out"
        )
    if parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb or local != engines:
        return (
            f"{local} of {engines} data-parallel engines would be this server's (external or hybrid load balancing, or "
            f"engines on several hosts), and the others {_ELSEWHERE}; give --data-parallel-size alone, or {several}"
        )
    if mixture_of_experts:
        return (
            "--data-parallel-size: engines of a mixture of experts step together, which pushes are not proven against; "
            f"use --tensor-parallel-size, or {several}"
        )
    return None
