"""Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) of a LoRA training."""

from __future__ import annotations

import torch

#: Dense bfloat16 products, in operations per second, by a part of the device's name; the first that fits counts.
#: From the vendor's data sheets, without sparsity.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
#: Passes of a LoRA training over a weight: forward, and backward to the activations; another one where it is scored
#: without gradient before.
_PASSES, _SCORING = 2, 1


def peak_flops(device: torch.device) -> float | None:
    """Return the bfloat16 operations per second that a device is sold with; None for a CPU or an unknown one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def multiplied_weights(model: torch.nn.Module) -> int | None:
    """Return the weights of the base's linear layers that every token is multiplied with, without the head.

    The head sees completions only. Adapters are left out: they are a few percent. None where the number depends on the
    token: mixtures of experts, and models that see images.

    Args:
        model: with or without a PEFT wrapper, on the CPU or sharded: only the layers' sizes are read.
    """
    config = model.config
    text = config.get_text_config()
    if getattr(config, "vision_config", None) is not None or any(
        getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    ):
        return None
    head = model.get_output_embeddings()
    heads = {id(head), id(getattr(head, "base_layer", None))}
    return sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in heads and "lora_" not in name
    )


def training_flops(weights: int, tokens: float, *, scored: bool = True) -> float:
    """Return the operations of a training on prompts and completions of so many tokens, attention left out.

    Args:
        scored: in a pass of its own, before the one that is differentiated.

    Example:
        assert training_flops(1_000, 10) == 60_000
    """
    return 2.0 * (_PASSES + _SCORING * scored) * weights * tokens
