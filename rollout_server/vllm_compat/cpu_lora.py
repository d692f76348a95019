"""LoRA on vLLM's CPU backend with one pair of matrix products for each adapter in the batch.

vLLM's own CPU path gathers a copy of A and B for every token. A batch here rarely holds more than two adapters (the
version being served and the one being drained), so rows are grouped by adapter instead: y[rows] += (x[rows] Aᵀ) Bᵀ.
The products run in the model's dtype, as PEFT computes them.
"""

from __future__ import annotations

from typing import Any

import torch

#: Adapters of the batch being computed: (slot, its rows, or None where every row is its).
_groups: list[tuple[int, torch.Tensor | None]] = []


def set_groups(token_slots: torch.Tensor) -> None:
    """Group the rows of the coming forward pass. `token_slots`: int64 [tokens], -1 for the base model."""
    slots = token_slots.unique().tolist()
    alone = len(slots) == 1
    _groups[:] = [(s, None if alone else (token_slots == s).nonzero()[:, 0]) for s in slots if s >= 0]


def add_lora(y: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], slices: list[int]) -> None:
    """y[:, slice i] += x Aᵢᵀ Bᵢᵀ in place, each row with its own adapter.

    Args:
        y: [tokens, out], the base layer's output.
        x: [tokens, in].
        a: for each slice [slots, 1, rank, in].
        b: for each slice [slots, 1, slice, rank], the scaling already in it.
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


def _add_lora_fake(
    y: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], slices: list[int]
) -> None:
    return None


def install(wrapper_class: Any) -> None:
    """Put this in the place of the linear LoRA of vLLM's `PunicaWrapperCPU`.

    The product is a custom op, because the rows' grouping must not be traced into a compiled graph.
    """
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "lockstep_add_lora"):
        direct_register_custom_op("lockstep_add_lora", add_lora, mutates_args=["y"], fake_impl=_add_lora_fake)
    update = wrapper_class.update_metadata

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        set_groups(self.token_lora_indices)

    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: Any,
        **kwargs: Any,
    ) -> None:
        torch.ops.vllm.lockstep_add_lora(y, x, list(lora_a_stacked), list(lora_b_stacked), list(output_slices))

    def add_lora_logits(self: Any, *args: Any, **kwargs: Any) -> None:
        # lm_head is never adapted (such pushes are refused). vLLM's own version gathers [tokens, vocabulary, rank] of
        # zeros for every step, and raises when prompt logprobs ask for more rows than are sampled: the engine dies.
        return None

    wrapper_class.update_metadata = update_metadata
    wrapper_class.add_lora_logits = add_lora_logits
    wrapper_class.add_lora_linear = add_lora_linear
