"""Layouts whose workers a server could not all reach are refused by name; the others are not."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from vllm.config import ParallelConfig

from rollout_server.ipc.client import Workers
from rollout_server.vllm_compat import topology
from shared.errors import ErrorCode, LockstepError


def _layout(**changes) -> SimpleNamespace:
    """As vLLM resolves two data-parallel engines of one host."""
    plain = {
        "data_parallel_size": 2,
        "data_parallel_size_local": 2,
        "data_parallel_backend": "mp",
        "data_parallel_external_lb": False,
        "data_parallel_hybrid_lb": False,
        "pipeline_parallel_size": 1,
        "nnodes": 1,
        "distributed_executor_backend": "mp",
    }
    assert all(hasattr(ParallelConfig, name) or name in ParallelConfig.__dataclass_fields__ for name in plain)
    return SimpleNamespace(**{**plain, **changes})


REFUSED = {
    "pipeline": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    "engines-of-hosts": ({"nnodes": 2}, "--data-parallel-size: the engine of several hosts is one"),
    "one-host": (
        {"nnodes": 2, "data_parallel_size": 1, "distributed_executor_backend": "uni"},
        "--distributed-executor-backend uni runs on one host",
    ),
    "engines-on-ray": ({"distributed_executor_backend": "ray"}, "--data-parallel-size"),
    "launcher": ({"distributed_executor_backend": "external_launcher"}, "external_launcher"),
    "ray-engines": ({"data_parallel_backend": "ray"}, "--data-parallel-backend ray"),
    "external": ({"data_parallel_external_lb": True, "data_parallel_size_local": 1}, "1 of 2 data-parallel engines"),
    "hybrid": ({"data_parallel_hybrid_lb": True}, "hybrid load balancing"),
    "engines-on-hosts": ({"data_parallel_size": 4}, "2 of 4 data-parallel engines"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    changes, word = REFUSED[case]
    assert word in str(topology.refusal(_layout(**changes), mixture_of_experts=False))


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize("executor", [None, "uni", "mp"])
def test_engines_of_this_host_are_served(engines: int, executor: str | None) -> None:
    layout = _layout(
        data_parallel_size=engines, data_parallel_size_local=engines, distributed_executor_backend=executor
    )
    assert topology.refusal(layout, mixture_of_experts=False) is None


def test_an_engine_of_a_ray_cluster_is_served() -> None:
    layout = _layout(data_parallel_size=1, data_parallel_size_local=1, distributed_executor_backend="ray")
    assert topology.refusal(layout, mixture_of_experts=True) is None
    assert topology.on_ray(layout)
    assert not topology.on_ray(_layout())


def test_an_engine_of_several_hosts_is_served() -> None:
    layout = _layout(data_parallel_size=1, data_parallel_size_local=1, nnodes=2)
    assert topology.refusal(layout, mixture_of_experts=True) is None
    assert topology.over_hosts(layout)
    assert not topology.over_hosts(_layout())


def _hosts(**changes) -> SimpleNamespace:
    plain = {
        "nnodes": 2,
        "node_rank": 1,
        "headless": False,
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "distributed_executor_backend": None,
        "master_addr": "10.0.0.1",
    }
    return SimpleNamespace(**{**plain, **changes})


HOSTS_REFUSED = {
    "alone": ({"nnodes": 1}, "--node-rank 1: .* give --nnodes too"),
    "rank": ({"node_rank": 2}, "--node-rank 2: of --nnodes 2 the head has 0, and the last 1"),
    "negative": ({"node_rank": -1}, "--node-rank -1"),
    "headless": ({"node_rank": 0, "headless": True}, "--headless"),
    "pipeline": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    "engines": ({"data_parallel_size": 2}, "--data-parallel-size beside --nnodes"),
    "ray": ({"distributed_executor_backend": "ray"}, "--distributed-executor-backend ray beside --nnodes"),
    "uneven": ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3 is no multiple"),
    "few": ({"tensor_parallel_size": 1}, "--tensor-parallel-size 1 is no multiple"),
    "nowhere": ({"master_addr": ""}, "give --master-addr"),
}


@pytest.mark.parametrize("case", HOSTS_REFUSED)
def test_hosts_refused(case: str) -> None:
    changes, words = HOSTS_REFUSED[case]
    assert re.search(words, str(topology.refusal_of_hosts(_hosts(**changes))))


@pytest.mark.parametrize("changes", [{}, {"headless": True}, {"node_rank": 0}, {"nnodes": 1, "node_rank": 0}])
def test_hosts_served(changes: dict) -> None:
    assert topology.refusal_of_hosts(_hosts(**changes)) is None


def test_a_host_knows_its_address_and_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.7")
    parallel = ParallelConfig(
        tensor_parallel_size=4, nnodes=2, node_rank=1, distributed_executor_backend="mp", master_addr="10.0.0.1"
    )
    assert topology.node_address(parallel) == "10.0.0.7"
    assert [topology.workers_of(parallel, rank) for rank in (0, 1)] == ["workers 0 to 1", "workers 2 to 3"]
    assert topology.workers_of(ParallelConfig(tensor_parallel_size=2, nnodes=2), 1) == "worker 1"


def test_a_mixture_of_experts_has_one_engine() -> None:
    one = _layout(data_parallel_size=1, data_parallel_size_local=1)
    assert topology.refusal(one, mixture_of_experts=True) is None
    assert "--tensor-parallel-size" in str(topology.refusal(_layout(), mixture_of_experts=True))


def test_workers_of_all_engines_are_counted() -> None:
    config = ParallelConfig(tensor_parallel_size=2, data_parallel_size=2, data_parallel_size_local=2)
    assert topology.workers(config) == 4


async def test_a_missing_worker_ends_the_start(tmp_path) -> None:
    with pytest.raises(LockstepError) as refusal:
        await Workers.connect([tmp_path / "1.sock"], 2, lambda reason: None)
    assert refusal.value.code is ErrorCode.INVALID_REQUEST
    assert "1 of the engine's 2 workers" in refusal.value.message
