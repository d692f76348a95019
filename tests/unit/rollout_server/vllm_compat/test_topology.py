"""Layouts whose workers a server could not all reach are refused by name; the others are not."""

from __future__ import annotations

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
    "hosts": ({"nnodes": 2}, "--nnodes 2"),
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
