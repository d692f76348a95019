"""How far rounding alone may take the server's logprobs from the learner's."""

from __future__ import annotations

import math

import torch

from learner.adapters.exporter import TORCH_DTYPES

#: Largest gap in float32 where models are so small that the derivation below gives less.
FLOOR = 1e-4
ROUNDINGS_PER_LAYER = 6
SAFETY = 4.0
#: Weights of a layer that a merging server rounds once more: q, k, v, o, gate, up, down.
MERGED_PER_LAYER = 7


def derived_tolerance(
    dtypes: list[str], *, layers: int, width: int, logit_std: float, logit_max: float, merge_noise: float = 0.0
) -> float:
    """Largest |gap| in nats that rounding explains between two implementations of one model.

    With unit roundoff u (2^-24 float32, 2^-11 float16, 2^-8 bfloat16), one rounding is a relative error of
    about u / sqrt(3) rms. A layer rounds its values ROUNDINGS_PER_LAYER = 6 times (two norms, two block
    outputs, two residual sums); over L layers independent errors add up to sqrt(6 L) u / sqrt(3) of the
    final hidden state. Sums over `width` terms are accumulated in float32, which adds 2^-24 sqrt(width) each
    and is all there is in float32. A relative error e of the hidden state moves a logit by e * (std of the
    logits over the vocabulary); rounding the logit itself adds u |logit| / sqrt(3). A logprob is the
    difference of a logit and a weighted mean of logits: sqrt(2). Both sides err independently: their
    variances add. The largest of a few hundred gaps is within 3.5 sigma, so SAFETY = 4 sigma are allowed, and
    never less than FLOOR. For SmolLM2-135M, bfloat16 against float32, this gives 0.78; measured on 228
    tokens: rms 0.09, largest 0.34.

    Args:
        dtypes: compute dtype of each side.
        layers: decoder layers. width: hidden size.
        logit_std: rms over probe positions of the logits' standard deviation over the vocabulary.
        logit_max: largest |logit| on the probe.
        merge_noise: rms of what `merge_noise` says of a server that merges; its variance adds too.
    """
    variance = merge_noise**2
    for dtype in dtypes:
        unit = torch.finfo(TORCH_DTYPES[dtype]).eps / 2
        hidden = math.hypot(unit, 2.0**-24 * math.sqrt(width)) * math.sqrt(ROUNDINGS_PER_LAYER * layers / 3)
        variance += 2 * ((hidden * logit_std) ** 2 + (unit * logit_max) ** 2 / 3)
    return max(SAFETY * math.sqrt(variance), FLOOR)


def merge_noise(dtype: str, *, layers: int, logit_std: float) -> float:
    """Rms in nats that `--apply merge` adds by rounding W0 + BA to the weights' dtype.

    Independent errors of u / sqrt(3) in the elements of a weight change its output by the same relative rms, like one
    more rounding of that output; from there as in `derived_tolerance`. The derivation does not cover an adapter so
    small that whole updates lie below half a unit in the last place of W0: rounding takes those away together. Their
    joint effect shows in the gap, and where it is larger than the tolerance, merging in this dtype is not exact enough.
    """
    unit = torch.finfo(TORCH_DTYPES[dtype]).eps / 2
    return math.sqrt(2 * MERGED_PER_LAYER * layers / 3) * unit * logit_std
