"""TRL is imported without vLLM, which a learner does not use."""

from __future__ import annotations

from importlib import util

from trl import import_utils

from learner.trainer.import_of_trl import without_vllm


def test_trl_asks_what_is_replaced() -> None:
    spec = util.find_spec("trl.generation.vllm_generation")
    assert spec
    assert spec.loader
    before, module = import_utils.is_vllm_available, util.module_from_spec(spec)
    with without_vllm():
        spec.loader.exec_module(module)
    assert not hasattr(module, "SamplingParams")
    assert import_utils.is_vllm_available is before
