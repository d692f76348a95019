"""TRL is imported without vLLM, which a learner does not use."""

from __future__ import annotations

from importlib import util

from learner.trainer.without_vllm import without_vllm


def test_trl_asks_what_is_replaced() -> None:
    def imports_vllm() -> bool:
        spec = util.find_spec("trl.generation.vllm_generation")
        assert spec
        assert spec.loader
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return hasattr(module, "SamplingParams")

    with without_vllm():
        assert not imports_vllm()
    assert imports_vllm()
