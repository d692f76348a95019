"""Measure the mismatch of the rollout server's and the learner's distributions on sampled tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Mismatch:
    """One generation batch, over all ranks.

    `delta` is the mean of |ln p_learner - ln p_server| over sampled tokens. `kl` estimates KL(server || learner) by
    the k3 estimator, mean(r - 1 - ln r) with r = p_learner / p_server on the server's samples (Schulman 2020,
    "Approximating KL divergence"): never negative, unbiased, small variance. `clipped` is the share of ratios that
    the correction clipped or dropped: of tokens or of sequences, as its mode says.
    """

    delta: float
    kl: float
    clipped: float


def measure(
    batch: Mapping[str, Any],
    total: Callable[[torch.Tensor], torch.Tensor],
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Mismatch:
    """Measure the mismatch of a generation batch that TRL has scored.

    Args:
        batch: `old_per_token_logps`, `sampling_per_token_logps` and `completion_mask` [B, T], and `tool_mask` [B, T]
            where tools were called. Logprobs that are NaN (the server had none) do not count, as in TRL.
        total: sums a vector over all ranks; collective.
        mode, clip_min, clip_max: TRL's importance correction, which clips (`*_truncate`) or drops (`*_mask`) ratios
            beyond these bounds, by token or by sequence.
    """
    own_BT, served_BT = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
    mask_BT = batch["completion_mask"].bool()
    if batch.get("tool_mask") is not None:
        mask_BT = mask_BT & batch["tool_mask"].bool()
    # Differences of one broken token can be large: e^100 fits into a double only.
    log_ratio_BT = own_BT.double() - served_BT.double()
    mask_BT = mask_BT & ~log_ratio_BT.isnan()
    log_ratio_BT = log_ratio_BT.masked_fill(~mask_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    by_sequence = mode.startswith("sequence")
    counted = mask_BT.any(-1) if by_sequence else mask_BT
    corrected = log_ratio_BT.sum(-1).exp() if by_sequence else ratio_BT
    low, high = -torch.inf if clip_min is None else clip_min, torch.inf if clip_max is None else clip_max
    clipped = ((corrected < low) | (corrected > high)) & counted
    k3_BT = ratio_BT - 1 - log_ratio_BT
    sums = [log_ratio_BT.abs().sum(), k3_BT.sum(), mask_BT.sum(), clipped.sum(), counted.sum()]
    delta, kl, tokens, clips, units = total(torch.stack([s.double() for s in sums])).tolist()
    return Mismatch(delta / max(tokens, 1), kl / max(tokens, 1), clips / max(units, 1))
