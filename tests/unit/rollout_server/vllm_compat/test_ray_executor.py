"""Engines that run on Ray have our executor, and say what a worker of theirs has raised."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from rollout_server.vllm_compat import ray_executor, start_errors


def _chosen(backend: str) -> type[Executor]:
    return Executor.get_class(
        SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend=backend, nnodes=1))
    )


def test_only_engines_on_ray_have_another_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "get_class", staticmethod(Executor.get_class))
    ray_executor.use()
    assert _chosen("ray") is ray_executor.RayExecutor
    assert _chosen("mp") is MultiprocExecutor


def test_the_reason_is_what_the_worker_raised() -> None:
    logger = logging.getLogger("vllm")
    before = list(logger.handlers)
    with start_errors.reported_errors() as first_report:
        start_errors.report_errors()
        try:
            raise RayTaskError("initialize_worker", "a traceback of many lines", ValueError("no weight\nof that name"))
        except RayTaskError:
            logger.exception("EngineCore failed to start.")
        logger.handlers = before
        assert first_report() == "ValueError: no weight of that name"
