"""The product of `--apply columns` as one operation of compiled graphs: y = [x, h] [W, B]ᵀ + bias, with h = x Aᵀ."""

from __future__ import annotations

import torch

from rollout_server.vllm_compat import shrink, versions


def one_product(
    x: torch.Tensor,
    a: torch.Tensor,
    wide: torch.Tensor,
    bias: torch.Tensor | None,
    token_slots: torch.Tensor,
    column_slots: torch.Tensor,
    base_only: torch.Tensor | None,
) -> torch.Tensor:
    """Return y [tokens, out], accumulated in float32 and rounded once.

    Args:
        x: [tokens, in].
        a: [columns, in], A of all slots.
        wide: [out, in + columns], W and B of all slots.
        bias: [out].
        token_slots: [tokens or more], int64; -1 for the base.
        column_slots: [columns], int64.
        base_only: [1] in host memory, whether no token of the batch has a slot; None: it is looked up.
    """
    tokens, width = x.shape
    linear = versions.linear_function()
    if base_only is None:
        base_only = (token_slots[:tokens] < 0).all()
    if base_only:  # vLLM captures graphs of such batches apart
        return linear(x, wide[:, :width], bias)
    return linear(shrink.extend(x, a, token_slots, column_slots), wide, bias)


def register() -> None:
    """Make it an operation that is not traced: `torch.ops.vllm.lockstep_one_product`."""
    from vllm.utils.torch_utils import direct_register_custom_op

    def fake(x: torch.Tensor, a: torch.Tensor, wide: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(x.shape[0], wide.shape[0])

    if not hasattr(torch.ops.vllm, "lockstep_one_product"):
        direct_register_custom_op("lockstep_one_product", one_product, fake_impl=fake)
