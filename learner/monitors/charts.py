"""Curves in a terminal, and means over neighboring values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

_WIDTH = 40


def sparkline(values: Sequence[float]) -> str:
    """Draw the values as one line of at most 40 block characters."""
    if not values:
        return ""
    count = min(len(values), _WIDTH)
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [fmean(values[start:end]) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low)) if high > low else 0] for value in means)


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values up to each value; fewer at the beginning."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
