"""The product of `--apply columns` as one operation of compiled graphs: y = [x, h] [W, B]ᵀ + bias, with h = x Aᵀ."""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

import torch

from rollout_server.vllm_compat import versions

logger = logging.getLogger("lockstep.columns")


def one_product(
    x: torch.Tensor,
    wide: torch.Tensor,
    bias: torch.Tensor | None,
    token_slots: torch.Tensor,
    column_slots: torch.Tensor,
    base_only: torch.Tensor | None,
    slices: list[int],
    slots: int,
    rank: int,
) -> torch.Tensor:
    """Return y [tokens, out], accumulated in float32 and rounded once, as h is.

    Args:
        x: [tokens, in].
        wide: [out + columns, in + columns], W, right of it B of all slots, below it A of all slots.
        bias: [out].
        token_slots: [tokens or more], int64; -1 for the base.
        column_slots: [columns], int64.
        base_only: [1] in host memory, whether no token of the batch has a slot; None: it is looked up.
        slices: rows of W of each slice. Columns are slices by slots by rank, and what aligns them.
    """
    (tokens, width), out = x.shape, sum(slices)
    linear = versions.linear_function()
    if base_only is None:
        base_only = (token_slots[:tokens] < 0).all()
    if base_only:  # vLLM captures graphs of such batches apart
        return linear(x, wide[:out, :width], bias)
    few = _few_tokens(x.device, x.dtype) if x.is_cuda else None
    if few is not None and few.takes(x, slices):
        return few.one_product(x, wide, bias, token_slots, slices, slots, rank)
    return by_columns(x, wide, bias, token_slots, column_slots, out)


def by_columns(
    x: torch.Tensor,
    wide: torch.Tensor,
    bias: torch.Tensor | None,
    token_slots: torch.Tensor,
    column_slots: torch.Tensor,
    out: int,
) -> torch.Tensor:
    """Compute `one_product` with torch's own operations: on CPUs, and for the many tokens of prompts."""
    tokens, width = x.shape
    linear = versions.linear_function()
    extended = x.new_empty(tokens, wide.shape[1])
    extended[:, :width] = x
    own = token_slots[:tokens, None] == column_slots
    # Not a product with the mask: what is being written into another slot may overflow.
    extended[:, width:] = torch.where(own, linear(x, wide[out:, :width]), 0)
    return linear(extended, wide[:out], bias)


@functools.cache
def _few_tokens(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the product for few tokens, if on this device its kernels compute what torch does; else None.

    First called while vLLM profiles the model, before it captures graphs.
    """
    if versions.linear_function() is not torch.nn.functional.linear:
        return None  # a product whose results do not depend on the batch
    wrong = ""
    for own_product in (True, False):
        try:
            from rollout_server.vllm_compat import expand_kernel

            product = functools.partial(expand_kernel.one_product, own_product=own_product)
            differences = [
                _difference(product, device, dtype, slices, tokens, width, rank)
                for slices in ([96, 48], [8192])  # sizes for which blocks differ
                for tokens in (1, 32, 40)
                for width, rank in ((1200, 8), (1024, 32), (2048, 128))
            ]
        except Exception as error:  # of Triton and its compilers, of any kind
            wrong = str(error)
            continue
        # Elements of y have a standard deviation of 1.4. NaN is not below, and is no maximum either.
        if all(difference < 0.1 for difference in differences):
            return SimpleNamespace(takes=expand_kernel.takes, one_product=product)
        wrong = f"wrong by {', '.join(f'{difference:g}' for difference in differences)}"
    logger.warning("--apply columns: its Triton kernels cannot be used here, so decoding is slower: %s", wrong)
    return None


def _difference(
    product: Any, device: torch.device, dtype: torch.dtype, slices: list[int], tokens: int, width: int, rank: int
) -> float:
    """Return how far a product for few tokens is from `by_columns`, at most."""
    slots, out = 3, sum(slices)
    column_slots = torch.arange(slots, device=device).repeat_interleave(rank).repeat(len(slices))
    token_slots = torch.arange(-1, slots, device=device).repeat(tokens)
    wide = torch.randn(out + len(column_slots), width + len(column_slots), device=device, dtype=dtype) / width**0.5
    row = 0
    for index, rows in enumerate(slices):
        own = slice(index * slots * rank, (index + 1) * slots * rank)
        kept = wide[row : row + rows, width:][:, own].clone()
        wide[row : row + rows, width:] = 0
        wide[row : row + rows, width:][:, own] = kept
        row += rows
    x, bias = (torch.randn(*size, device=device, dtype=dtype) for size in ((tokens, width), (out,)))
    # Memory that the kernels get next: what they read before it was written shows.
    spoiled = torch.full((4, tokens, out + len(column_slots)), torch.nan, device=device)
    del spoiled
    found = product(x, wide, bias, token_slots, slices, slots, rank)
    expected = by_columns(x, wide, bias, token_slots, column_slots, out)
    return float((found.float() - expected.float()).abs().max())


def register() -> None:
    """Make it an operation that is not traced: `torch.ops.vllm.lockstep_one_product`."""
    from vllm.utils.torch_utils import direct_register_custom_op

    def fake(x: torch.Tensor, *others: Any) -> torch.Tensor:
        *_, slices, _slots, _rank = others
        return x.new_empty(x.shape[0], sum(slices))

    if not hasattr(torch.ops.vllm, "lockstep_one_product"):
        direct_register_custom_op("lockstep_one_product", one_product, fake_impl=fake)
