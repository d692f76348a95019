"""Mixtures of experts are served without adapters on their experts, which no learner may train.

vLLM gives every expert slots of every adapter, and chooses kernels for them: Triton's, of which there are none on a
CPU, where its engine dies while it warms up.
"""

from __future__ import annotations

import functools
from typing import Any


def leave_experts_alone() -> None:
    """Let vLLM compute experts as it does without LoRA (0.26 to 0.33). Call it before the model is made."""
    from vllm.lora import model_manager
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    wrap, finish = model_manager.from_layer, getattr(FusedMoEConfig, "__post_init__", None)
    if hasattr(wrap, "__wrapped__"):
        return
    experts = tuple(
        kind for name in ("MoERunner", "FusedMoE") if isinstance(kind := getattr(model_manager, name, None), type)
    )

    @functools.wraps(wrap)
    def wrap_others(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return layer if isinstance(layer, experts) else wrap(layer, *args, **kwargs)

    def finish_without_lora(self: Any) -> None:
        if finish is not None:
            finish(self)
        self.is_lora_enabled = False

    model_manager.from_layer = wrap_others
    FusedMoEConfig.__post_init__ = finish_without_lora
