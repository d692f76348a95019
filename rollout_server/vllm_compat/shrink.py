"""[x, h] with h = x Aᵀ, zero where a column is of another slot than the token: the input of `one_product`."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from rollout_server.vllm_compat import versions

logger = logging.getLogger("lockstep.columns")


def extend(x: torch.Tensor, a: torch.Tensor, token_slots: torch.Tensor, column_slots: torch.Tensor) -> torch.Tensor:
    """Return [x, h], of shape [tokens, in + columns]; h is accumulated in float32 and rounded once.

    Args:
        x: [tokens, in].
        a: [columns, in].
        token_slots: [tokens or more], int64; -1 for the base.
        column_slots: [columns], int64.
    """
    kernel = _kernel(x.device, x.dtype) if x.is_cuda else None
    if kernel is not None and kernel.takes(x, a):
        return kernel.extend(x, a, token_slots, column_slots)
    return extend_by_products(x, a, token_slots, column_slots)


def extend_by_products(
    x: torch.Tensor, a: torch.Tensor, token_slots: torch.Tensor, column_slots: torch.Tensor
) -> torch.Tensor:
    """Compute `extend` with torch's own operations: on CPUs, and for the many tokens of prompts."""
    tokens, width = x.shape
    extended = x.new_empty(tokens, width + a.shape[0])
    extended[:, :width] = x
    own = token_slots[:tokens, None] == column_slots
    # Not a product with the mask: what is being written into another slot may overflow.
    extended[:, width:] = torch.where(own, versions.linear_function()(x, a), 0)
    return extended


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the module of the Triton kernel, if on this device it computes what torch does; else None.

    First called while vLLM profiles the model, before it captures graphs.
    """
    if versions.linear_function() is not torch.nn.functional.linear:
        return None  # a product whose results do not depend on the batch
    try:
        from rollout_server.vllm_compat import shrink_kernel

        column_slots = torch.arange(3, device=device).repeat_interleave(16)
        token_slots = torch.arange(-1, 3, device=device).repeat(10)
        x, a = torch.randn(40, 1200, device=device, dtype=dtype), torch.randn(48, 1200, device=device, dtype=dtype)
        arguments = x, a, token_slots, column_slots
        difference = (shrink_kernel.extend(*arguments).float() - extend_by_products(*arguments).float()).abs().max()
    except Exception as error:  # of Triton and its compilers, of any kind
        logger.warning("--apply columns: its Triton kernel does not run here, so decoding is slower: %s", error)
        return None
    if float(difference) < 1.0:  # elements of h have a standard deviation of 35
        return shrink_kernel
    logger.warning("--apply columns: its Triton kernel is wrong by %g here: decoding is slower without", difference)
    return None
