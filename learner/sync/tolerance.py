"""How far rounding alone may take the server's logprobs from the learner's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from learner.adapters.exporter import TORCH_DTYPES
from shared.weights import WeightVersion

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


#: The learner's own change must be this many times the noise before its direction is compared.
MIN_SIGNAL = 4.0


@dataclass(frozen=True)
class Measurement:
    """Logprobs of all probe tokens at one version, float64 [N], by the learner and by one server process.

    Attributes:
        merge_noise: rms of what the server's rounding of merged weights adds, which differs from version to version.
        server: URL and epoch.
    """

    version: WeightVersion | None
    own: np.ndarray
    served: np.ndarray
    tolerance: float
    merge_noise: float = 0.0
    server: str = ""

    @property
    def max_gap(self) -> float:
        """Largest |served - own| in nats."""
        return float(np.abs(self.served - self.own).max())

    @property
    def rms_gap(self) -> float:
        """Root mean square of served - own in nats."""
        return float(np.sqrt(np.mean((self.served - self.own) ** 2)))


def slope(reference: Measurement, now: Measurement) -> float | None:
    """How much of the learner's change the server shows: 1 all, 0 none. None: too small to tell."""
    own, served = now.own - reference.own, now.served - reference.served
    moved = float(np.sqrt(np.mean(own**2)))
    if moved < MIN_SIGNAL * noise(reference):
        return None
    return float(served @ own / (own @ own))


def noise(reference: Measurement) -> float:
    """Rms of what rounding may add to a change of logprobs since `reference`."""
    return max(math.sqrt(2) * reference.rms_gap, reference.merge_noise, FLOOR / SAFETY)
