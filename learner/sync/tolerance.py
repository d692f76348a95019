"""Mismatch of learner's and server's logprobs, and how much of it rounding explains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from learner.adapters.exporter import TORCH_DTYPES
from shared.weights import WeightVersion

#: Least tolerance: for models so small that the derivation gives less in float32.
FLOOR = 1e-4
ROUNDINGS_PER_LAYER = 6
#: Of a layer with linear attention, whose state, normalized keys and gates round, too: random weights of Qwen3.5's
#: kind in bfloat16 err by twice the rms of as many layers with attention.
ROUNDINGS_PER_LINEAR_LAYER = 4 * ROUNDINGS_PER_LAYER
SAFETY = 4.0
#: Weights of a layer that a merging server rounds once more: q, k, v, o, gate, up, down.
MERGED_PER_LAYER = 7
#: How often the rms mismatch of a version may be that of the base, which the same two sides have shown at the start.
RMS_SLACK = 4.0
#: Rms in nats by which quantizing a base may move logprobs: SmolLM2-135M's by 1.0 in nf4. Another base is further away.
QUANTIZED_RMS = 1.5
#: How often the largest mismatch of a version may be the rms to accept: a few tokens move by far more than most.
MAX_SLACK = 10.0
#: The learner's own change must be this many times the noise before its direction is compared.
MIN_SIGNAL = 4.0


@dataclass(frozen=True)
class Measurement:
    """Logprobs of all probe tokens at one version, float64 [N], by the learner and by one server process.

    Attributes:
        tolerance: largest mismatch to accept, in nats; see `derived_tolerance`.
        rms_tolerance: largest rms to accept; follows from what this pair has shown on the base.
        usual_rms: up to which no single mismatch is too large: of what this pair has shown on the base, too.
        merge_noise: rms of the server's rounding of merged weights, which differs from version to version.
        server: URL and boot id.
        dtype: in which that server computes.
        is_decisive: small updates reach the logprobs of both sides: in float32, or with one rounding.
    """

    version: WeightVersion | None
    own: np.ndarray
    served: np.ndarray
    tolerance: float
    merge_noise: float = 0.0
    server: str = ""
    dtype: str = ""
    rms_tolerance: float = math.inf
    usual_rms: float = 0.0
    is_decisive: bool = True

    @property
    def mismatch(self) -> np.ndarray:
        """Served - own in nats, float64 [N]."""
        return self.served - self.own

    @property
    def max_mismatch(self) -> float:
        """Largest |served - own| in nats."""
        return float(np.abs(self.mismatch).max())

    @property
    def mean_mismatch(self) -> float:
        """Mean of served - own in nats; its sign is kept."""
        return float(self.mismatch.mean())

    @property
    def rms_mismatch(self) -> float:
        """Root mean square of served - own in nats."""
        return float(np.sqrt(np.mean(self.mismatch**2)))

    @property
    def p99_mismatch(self) -> float:
        """99th percentile of |served - own| in nats."""
        return float(np.quantile(np.abs(self.mismatch), 0.99))

    @property
    def is_acceptable(self) -> bool:
        """Whether the rms is usual, or neither the largest mismatch nor the rms exceeds its tolerance."""
        if self.rms_mismatch <= self.usual_rms:
            return True
        return self.max_mismatch <= self.tolerance and self.rms_mismatch <= self.rms_tolerance

    @property
    def noise(self) -> float:
        """Rms in nats that rounding may add to a change of logprobs since this measurement."""
        return max(math.sqrt(2) * self.rms_mismatch, self.merge_noise, FLOOR / SAFETY)


def slope(reference: Measurement, now: Measurement) -> float | None:
    """Regress the server's change of logprobs on the learner's, through the origin: 1 if it follows, 0 if not.

    None where the learner's change is too small to tell from rounding.
    """
    own, served = now.own - reference.own, now.served - reference.served
    if float(np.sqrt(np.mean(own**2))) < MIN_SIGNAL * reference.noise:
        return None
    return float(served @ own / (own @ own))


def derived_tolerance(
    dtypes: list[str],
    *,
    layers: int,
    width: int,
    logit_std: float,
    logit_max: float,
    linear_layers: int = 0,
    merge_noise: float = 0.0,
) -> float:
    """Derive the largest mismatch in nats that rounding explains between two implementations of one model.

    With unit roundoff u (2^-24 float32, 2^-11 float16, 2^-8 bfloat16), one rounding is a relative error of
    about u / sqrt(3) rms. A layer rounds its values ROUNDINGS_PER_LAYER = 6 times (two norms, two block
    outputs, two residual sums), one with linear attention ROUNDINGS_PER_LINEAR_LAYER = 24 times; over L layers
    independent errors add up to sqrt(6 L) u / sqrt(3) of the final hidden state. Sums over `width` terms are
    accumulated in float32, which adds 2^-24 sqrt(width) each and is all there is in float32. A relative error e
    of the hidden state moves a logit by e * (std of the logits over the vocabulary); rounding the logit itself
    adds u |logit| / sqrt(3). A logprob is the difference of a logit and a weighted mean of logits: sqrt(2). Both
    sides err independently: their variances add. The largest of a few hundred mismatches is within 3.5 sigma, so
    SAFETY = 4 sigma are allowed, and never less than FLOOR. For SmolLM2-135M, bfloat16 against float32, this
    gives 0.78; measured on 228 tokens: rms 0.09, largest 0.34.

    Args:
        dtypes: compute dtype of each side.
        layers: decoder layers; linear_layers: those of them with linear attention. width: hidden size.
        logit_std: rms over probe positions of the logits' standard deviation over the vocabulary.
        logit_max: largest |logit| on the probe.
        merge_noise: `merge_noise` of a server that merges; its variance adds too.
    """
    variance = merge_noise**2
    roundings = ROUNDINGS_PER_LAYER * (layers - linear_layers) + ROUNDINGS_PER_LINEAR_LAYER * linear_layers
    for dtype in dtypes:
        unit = torch.finfo(TORCH_DTYPES[dtype]).eps / 2
        hidden = math.hypot(unit, 2.0**-24 * math.sqrt(width)) * math.sqrt(roundings / 3)
        variance += 2 * ((hidden * logit_std) ** 2 + (unit * logit_max) ** 2 / 3)
    return max(SAFETY * math.sqrt(variance), FLOOR)


def merge_noise(dtype: str, *, layers: int, logit_std: float) -> float:
    """Derive the rms in nats that `--apply merge` adds by rounding W0 + BA to the weights' dtype.

    Independent errors of u / sqrt(3) in the elements of a weight, or of u sqrt(2 / 3) where it is rounded
    stochastically (to bfloat16), change its output by the same relative rms, like one more rounding of that output;
    from there as in `derived_tolerance`. For float16 the derivation does not cover an adapter so small that its updates
    lie below half a unit in the last place of W0: rounding to nearest removes those together. Their joint effect is
    part of the mismatch, and mostly below the tolerance: no check here notices that it is missing.
    """
    unit = torch.finfo(TORCH_DTYPES[dtype]).eps / 2
    stochastic = 2 if dtype == "bfloat16" else 1
    return math.sqrt(stochastic * 2 * MERGED_PER_LAYER * layers / 3) * unit * logit_std
