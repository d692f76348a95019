"""Measure the mismatch of the rollout server's and the learner's distributions on sampled tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: TRL computes ratios in float32, which ends at e^88.
_LARGEST_LOG_RATIO = 88.0


@dataclass(frozen=True)
class Mismatch:
    """One generation batch, over all ranks.

    `tokens` is how many sampled tokens have both logprobs, and `rms` the root mean square of their differences. `delta`
    is the mean of |ln p_learner - ln p_server| over sampled tokens. `kl` estimates KL(server || learner) by the k3
    estimator, mean(r - 1 - ln r) with r = p_learner / p_server on the server's samples (Schulman 2020, "Approximating
    KL divergence"): never negative, unbiased, small variance. `clipped` is the share of ratios that the correction
    clipped or dropped: of tokens or of sequences, as its mode says. `effective_sample_size` is the share of the samples
    that the weights w of the loss leave, (sum w)^2 / (n sum w^2) (Kish 1965): 1 where all have the same.
    """

    delta: float
    kl: float
    clipped: float
    effective_sample_size: float
    rms: float = 0.0
    tokens: int = 0


def measure(
    batch: Mapping[str, Any],
    total: Callable[[torch.Tensor], torch.Tensor],
    *,
    mode: str | None,
    clip_min: float | None,
    clip_max: float | None,
    off_policy_threshold: float | None = None,
) -> Mismatch:
    """Measure the mismatch of a generation batch that TRL has scored.

    Args:
        batch: `old_per_token_logps`, `sampling_per_token_logps` and `completion_mask` [B, T], and `tool_mask` [B, T]
            where tools were called; `advantages` [B] with an `off_policy_threshold`. Logprobs that are NaN (the server
            had none) have ratio 1, as in TRL, and do not count in `delta` and `kl`.
        total: sums a vector over all ranks; collective.
        mode, clip_min, clip_max: TRL's importance correction, which clips (`*_truncate`) or drops (`*_mask`) ratios
            beyond these bounds, by token or by sequence; None: ratios are not corrected.
        off_policy_threshold: TRL's `off_policy_mask_threshold`, which drops sequences of negative advantage.
    """
    own_BT, served_BT = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
    sampled_BT = batch["completion_mask"].bool()
    if batch.get("tool_mask") is not None:
        sampled_BT = sampled_BT & batch["tool_mask"].bool()
    # Differences of one broken token can be large: e^100 fits into a double only.
    log_ratio_BT = own_BT.double() - served_BT.double()
    mask_BT = sampled_BT & ~log_ratio_BT.isnan()
    log_ratio_BT = log_ratio_BT.masked_fill(~mask_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    if mode is None:
        log_corrected, counted = log_ratio_BT.new_zeros(len(own_BT), 1), sampled_BT.any(-1, keepdim=True)
    elif mode.startswith("sequence"):
        log_corrected, counted = log_ratio_BT.sum(-1, keepdim=True), sampled_BT.any(-1, keepdim=True)
    else:
        log_corrected, counted = log_ratio_BT, sampled_BT
    corrected = log_corrected.clamp(max=_LARGEST_LOG_RATIO).exp()
    low, high = -torch.inf if clip_min is None else clip_min, torch.inf if clip_max is None else clip_max
    beyond = (corrected < low) | (corrected > high)
    clipped = beyond & counted & (mode is not None)
    weights = corrected
    if mode is not None:
        weights = corrected.clamp(low, high) if mode.endswith("truncate") else corrected.masked_fill(beyond, 0.0)
    if off_policy_threshold is not None:
        kl_B = -log_ratio_BT.sum(-1) / sampled_BT.sum(-1).clamp(min=1)
        weights = weights * ((batch["advantages"] >= 0) | (kl_B <= off_policy_threshold))[:, None]
    weights = weights * counted
    k3_BT = ratio_BT - 1 - log_ratio_BT
    sums = [log_ratio_BT.abs().sum(), k3_BT.sum(), mask_BT.sum(), clipped.sum()]
    sums += [counted.sum(), weights.sum(), weights.square().sum(), log_ratio_BT.square().sum()]
    summed = total(torch.stack([s.double() for s in sums])).tolist()
    delta, kl, tokens, clips, units, weight, squares, gap_squares = summed
    effective = weight**2 / (units * squares) if squares else 0.0
    n = max(tokens, 1)
    return Mismatch(
        delta=delta / n,
        kl=kl / n,
        clipped=clips / max(units, 1),
        effective_sample_size=effective if units else 1.0,
        rms=math.sqrt(gap_squares / n),
        tokens=int(tokens),
    )
