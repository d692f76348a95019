"""vLLM's executor of an engine over several hosts without Ray (`--nnodes`), on the head and on the others."""

from __future__ import annotations

from multiprocessing import connection
from typing import Any

from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from rollout_server.vllm_compat import parents


class HeadExecutor(MultiprocExecutor):  # type: ignore[misc]
    """The executor in the engine's process, on the head (0.26 to 0.33)."""

    def _init_executor(self) -> None:
        parents.end_with_parent()  # the server; links to its workers come last
        super()._init_executor()


def use() -> None:
    """Let engines of this process that are to run over several hosts have `HeadExecutor`."""
    get_class = Executor.get_class

    def chosen(vllm_config: Any) -> type[Executor]:
        executor: type[Executor] = get_class(vllm_config)
        return HeadExecutor if executor is MultiprocExecutor and vllm_config.parallel_config.nnodes > 1 else executor

    Executor.get_class = staticmethod(chosen)


def load(vllm_config: Any) -> Any:
    """Start the workers of this host, which is not the head, and return when they have loaded the model.

    As `run_headless` of `vllm serve` does (0.26 to 0.33).
    """
    return MultiprocExecutor(vllm_config, monitor_workers=False)


def first_to_end(executor: Any) -> str:
    """Wait until a worker of `load` has ended, end the others, and return which one it was."""
    workers = {worker.proc.sentinel: worker for worker in executor.workers}
    (found, *_) = connection.wait(list(workers))
    worker = workers[found]
    worker.proc.join()
    executor.shutdown()
    return f"worker {worker.rank} has ended ({worker.proc.exitcode})"
