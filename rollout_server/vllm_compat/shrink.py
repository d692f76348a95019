"""[x, h] with h = x Aᵀ, zero where a column is of another slot than the token: the input of `one_product`."""

from __future__ import annotations

import torch


def extend(x: torch.Tensor, a: torch.Tensor, token_slots: torch.Tensor, column_slots: torch.Tensor) -> torch.Tensor:
    """Return [x, h], of shape [tokens, in + columns]; h is accumulated in float32 and rounded once.

    Args:
        x: [tokens, in].
        a: [columns, in].
        token_slots: [tokens or more], int64; -1 for the base.
        column_slots: [columns], int64.
    """
    tokens, width = x.shape
    extended = x.new_empty(tokens, width + a.shape[0])
    extended[:, :width] = x
    own = token_slots[:tokens, None] == column_slots
    # Not a product with the mask: what is being written into another slot may overflow.
    extended[:, width:] = torch.where(own, x @ a.T, 0)
    return extended
