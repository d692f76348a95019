"""Logprobs of the probe as learner and server see them, and what their difference and their movement say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from learner.tolerance import FLOOR, SAFETY
from shared.weights import WeightVersion

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
