"""Process layouts of vLLM that a rollout server supports: every worker of every engine must receive every push."""

from __future__ import annotations

from typing import Any

_ELSEWHERE = "run outside this server, which could not reach their workers"
_NO_PIPELINE = "--pipeline-parallel-size: no worker would hold all layers of an adapter; use --tensor-parallel-size"
_ONE_ENGINE = "the engine of several hosts is one; leave it out, or start several rollout servers"


def on_ray(parallel: Any) -> bool:
    """Return whether the workers are actors of a Ray cluster, perhaps on several hosts."""
    return bool(parallel.distributed_executor_backend == "ray")


def over_hosts(parallel: Any) -> bool:
    """Return whether the workers are processes of several hosts, each of which runs this command (`--nnodes`)."""
    return bool(parallel.nnodes > 1)


def node_address(parallel: Any) -> str:
    """Return the address of this host by which vLLM's processes on others know it (0.26 to 0.33)."""
    if on_ray(parallel):
        import ray

        return str(ray.util.get_node_ip_address())
    from vllm.utils.network_utils import get_ip

    return str(get_ip())


def workers_of(parallel: Any, node_rank: int) -> str:
    """Return which workers run on one of `nnodes` hosts, in words."""
    each = int(parallel.world_size) // int(parallel.nnodes)
    first, last = node_rank * each, (node_rank + 1) * each - 1
    return f"worker {first}" if first == last else f"workers {first} to {last}"


def workers(parallel: Any) -> int:
    """Count the workers of all engines. `parallel`: vLLM's resolved ParallelConfig."""
    return int(parallel.world_size_across_dp)


def refusal_of_hosts(args: Any) -> str | None:
    """Return why flags of an engine over several hosts cannot work, and what to do instead; None if they can.

    vLLM would say it in other words, or start and wait. `args`: parsed flags.
    """
    nodes, rank, tensor = args.nnodes, args.node_rank, args.tensor_parallel_size
    if nodes <= 1:
        if rank > 0:
            return f"--node-rank {rank}: the other hosts of an engine have the head's flags; give --nnodes too"
        return None
    if not 0 <= rank < nodes:
        return f"--node-rank {rank}: of --nnodes {nodes} the head has 0, and the last {nodes - 1}"
    if args.headless and rank == 0:
        return "--headless: the host with --node-rank 0 is the server; leave it out there"
    if args.pipeline_parallel_size > 1:
        return _NO_PIPELINE
    if args.data_parallel_size > 1:
        return f"--data-parallel-size beside --nnodes: {_ONE_ENGINE}"
    if args.distributed_executor_backend not in (None, "mp"):
        return (
            f"--distributed-executor-backend {args.distributed_executor_backend} beside --nnodes: leave out one of them"
        )
    if tensor % nodes or tensor < nodes:
        return f"--nnodes {nodes}: --tensor-parallel-size {tensor} is no multiple of it"
    if not args.master_addr:
        return f"--nnodes {nodes}: give --master-addr, the head's address, which the other hosts can reach"
    return None


def refusal(parallel: Any, *, mixture_of_experts: bool) -> str | None:
    """Return why this layout is not supported, and what to do instead; None if it is."""
    engines, local = parallel.data_parallel_size, parallel.data_parallel_size_local
    executor = parallel.distributed_executor_backend
    several = "start several rollout servers"
    if parallel.pipeline_parallel_size > 1:
        return _NO_PIPELINE
    if on_ray(parallel) or over_hosts(parallel):
        if engines > 1:
            return f"--data-parallel-size: {_ONE_ENGINE}"
        if not on_ray(parallel) and executor != "mp":
            return (
                f"--nnodes {parallel.nnodes}: --distributed-executor-backend {executor} runs on one host; leave it out"
            )
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
