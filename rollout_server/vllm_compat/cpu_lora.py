"""Compute LoRA on vLLM's CPU backend with one pair of matrix products per adapter in the batch.

vLLM's own CPU path gathers a copy of A and B for every token. A batch rarely holds more than two adapters (the version
being served and the one being drained), so rows are grouped by adapter instead: y[rows] += (x[rows] Aᵀ) Bᵀ. The
products run in the model's dtype, as PEFT computes them.
"""

from __future__ import annotations

from typing import Any

import torch

#: Adapters of the current batch: (slot, rows [n]; None for all rows).
_groups: list[tuple[int, torch.Tensor | None]] = []


def add_lora(y: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], slices: list[int]) -> None:
    """Add x Aᵢᵀ Bᵢᵀ to y[:, slice i] in place, each row with its own adapter.

    Args:
        y: [tokens, out], the base layer's output.
        x: [tokens, in].
        a, b: for each slice [slots, 1, rank, in] and [slots, 1, slice, rank], the scaling already in B.
        slices: widths of the slices, which lie side by side in y.
    """
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    for slot, rows in _groups:
        mine = x if rows is None else x[rows]
        offset = 0
        for a_i, b_i, width in zip(a, b, slices, strict=True):
            delta = (mine @ a_i[slot, 0].T) @ b_i[slot, 0].T
            part = y[:, offset : offset + width]
            if rows is None:
                part += delta
            else:
                part.index_add_(0, rows, delta)
            offset += width


def install() -> None:
    """Replace the linear LoRA of vLLM's `PunicaWrapperCPU`; no effect on other backends.

    Call it before the model is loaded: a compiled graph keeps the functions that it was traced with. The product is a
    custom op, because the grouping of rows must not be traced into the graph.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "lockstep_add_lora"):
        direct_register_custom_op("lockstep_add_lora", add_lora, mutates_args=["y"], fake_impl=lambda *args: None)
    update = PunicaWrapperCPU.update_metadata

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        token_slots = self.token_lora_indices  # int64 [tokens], -1 for the base model
        slots = token_slots.unique().tolist()
        alone = len(slots) == 1
        _groups[:] = [(s, None if alone else (token_slots == s).nonzero()[:, 0]) for s in slots if s >= 0]

    def add_lora_linear(
        self: Any, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, **_: Any
    ) -> None:
        torch.ops.vllm.lockstep_add_lora(y, x, list(lora_a_stacked), list(lora_b_stacked), list(output_slices))

    def add_lora_logits(self: Any, *args: Any, **kwargs: Any) -> None:
        # lm_head is never adapted (such pushes are refused). vLLM's own version gathers [tokens, vocabulary, rank] of
        # zeros for every step, and raises when prompt logprobs ask for more rows than are sampled: the engine dies.
        return None

    PunicaWrapperCPU.update_metadata = update_metadata
    PunicaWrapperCPU.add_lora_logits = add_lora_logits
    PunicaWrapperCPU.add_lora_linear = add_lora_linear
