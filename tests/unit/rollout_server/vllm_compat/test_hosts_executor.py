"""The executor of an engine over several hosts, and processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import time
from types import SimpleNamespace

import psutil
import pytest
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from rollout_server.vllm_compat import hosts_executor, parents

_CONTEXT = multiprocessing.get_context("fork")


@pytest.mark.parametrize(("nodes", "kind"), [(1, MultiprocExecutor), (2, hosts_executor.HeadExecutor)])
def test_only_engines_of_several_hosts_have_another_executor(monkeypatch, nodes: int, kind: type) -> None:
    monkeypatch.setattr(Executor, "get_class", staticmethod(Executor.get_class))
    hosts_executor.use()
    parallel = SimpleNamespace(distributed_executor_backend="mp", nnodes=nodes)
    assert Executor.get_class(SimpleNamespace(parallel_config=parallel)) is kind


def test_the_worker_that_ends_first_ends_the_others() -> None:
    processes = [_CONTEXT.Process(target=time.sleep, args=(seconds,)) for seconds in (60, 0.1)]
    for process in processes:
        process.start()
    workers = [SimpleNamespace(rank=2 + index, proc=process) for index, process in enumerate(processes)]
    executor = SimpleNamespace(workers=workers, shutdown=lambda: [process.kill() for process in processes])
    assert hosts_executor.first_to_end(executor) == "worker 3 has ended (0)"
    assert psutil.wait_procs([psutil.Process(process.pid) for process in processes if process.is_alive()], 5.0)[1] == []


def _child() -> None:
    parents.end_with_parent()
    time.sleep(60)


def _parent(pids) -> None:
    child = _CONTEXT.Process(target=_child)
    child.start()
    pids.put(child.pid)
    time.sleep(60)


def test_a_process_ends_with_its_parent_that_is_killed() -> None:
    pids = _CONTEXT.SimpleQueue()
    parent = _CONTEXT.Process(target=_parent, args=(pids,))
    parent.start()
    child = psutil.Process(pids.get())
    parent.kill()
    assert psutil.wait_procs([child], 10.0)[1] == []
