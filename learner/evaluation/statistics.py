"""Standard errors and 95% intervals of mean scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Standard errors on either side of the mean that cover 95% of a normal distribution.
Z95 = 1.959964


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent values and its standard error."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def normal_interval(mean: float, stderr: float) -> tuple[float, float]:
    """Return the 95% interval of a normally distributed mean."""
    return mean - Z95 * stderr, mean + Z95 * stderr


def wilson_interval(mean: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion: the mean of `n` scores between 0 and 1.

    Exact for answers that are right or wrong. For partial credit it is too wide rather than too narrow, since no
    score between 0 and 1 varies more than a right-or-wrong one of the same mean.
    """
    z2, p = Z95 * Z95, min(max(mean, 0.0), 1.0)
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At p = 0 and 1 an end is p itself, but for rounding.
    return min(p, max(0.0, center - half)), max(p, min(1.0, center + half))
