"""Evidence for the version that a server samples from, from logprobs that rounding blurs.

Let s be served logprobs, o the learner's own at the pushed version v, and d the learner's movement since an earlier
version u. The *share* is 1 + the regression of s - o on d: 1 where the server serves v, 0 where it serves u. No
movement of one step needs to be visible: what proofs find adds up in a sequential test. Steps that go the same way meet
the same noise as long as the policy hardly changes, so a proof counts for what it tells beyond the one before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

#: A server that serves what was pushed is accused once in so many proofs, at most.
PROOFS_PER_FALSE_ALARM = 1e6
#: The most that the noise of two proofs is taken to be alike.
_MOST_ALIKE = 0.98


@dataclass(frozen=True)
class Share:
    """Part of a movement that has arrived, with its standard error.

    Attributes:
        movement_N, left_N: the movement, and what it does not explain of s - o.
    """

    value: float
    error: float
    movement_N: np.ndarray = field(repr=False)
    left_N: np.ndarray = field(repr=False)

    def alike(self, other: Share) -> float:
        """Return the correlation of the errors of both: of their noise, as far as their movements go the same way."""
        return cosine(self.left_N, other.left_N) * cosine(self.movement_N, other.movement_N)


def share(residual_N: np.ndarray, movement_N: np.ndarray, rows_N: np.ndarray, noise: float = 0.0) -> Share | None:
    """Regress s - o on the learner's movement, through the origin; None where nothing moved.

    The standard error is the largest of three: that of independent tokens with `noise`, that of tokens with unequal
    noise (White 1980), and that of sequences whose tokens err together (Liang and Zeger 1986).

    Args:
        residual_N: s - o at the pushed version.
        movement_N: o minus the learner's logprobs at the earlier version.
        rows_N: the sequence of every token.
        noise: least rms of `residual_N` in nats, without what the server may have missed.
    """
    power = float(movement_N @ movement_N)
    if not power:
        return None
    slope = float(residual_N @ movement_N) / power
    left_N = residual_N - slope * movement_N
    scores = np.bincount(rows_N, weights=left_N * movement_N)
    sequences = len(set(rows_N.tolist()))
    by_sequence = float(scores @ scores) * sequences / max(sequences - 1, 1)
    by_token = float((left_N * movement_N) @ (left_N * movement_N))
    independent = max(float(left_N @ left_N) / len(left_N), noise**2) * power
    return Share(1.0 + slope, math.sqrt(max(by_sequence, by_token, independent)) / power, movement_N, left_N)


class Suspicion:
    """Sequential test of "the server serves the version before" against "it serves what was pushed".

    Adds up the log likelihood ratio of each proof given the one before, and begins anew where it falls below 0 (Page
    1954, "Continuous inspection schemes"), so that a server that got stuck late is found as fast. While all is well the
    ratio has mean 1, so e^limit proofs pass between two false alarms on average (Lorden 1971).

    Attributes:
        total: of the present sum; an alarm is due at `limit`.
    """

    limit = math.log(PROOFS_PER_FALSE_ALARM)

    def __init__(self) -> None:
        self.total = 0.0
        self._before: Share | None = None

    def add(self, found: Share) -> bool:
        """Add what one proof has found; return whether the server stands accused.

        No single proof counts for more than half of what an alarm needs: errors are not quite normal.
        """
        before, self._before = self._before, found
        alike = known = 0.0
        if before is not None:
            alike = max(-_MOST_ALIKE, min(found.alike(before), _MOST_ALIKE))
            known = alike * found.error / before.error

        def surprise(share: float) -> float:
            """What is new of an error, squared, if the shares of both proofs are this one."""
            new = found.value - share - (known * (before.value - share) if before is not None else 0.0)
            return new**2

        # ln of the likelihood of share 0 by that of share 1; autoregressive noise.
        ratio = (surprise(1.0) - surprise(0.0)) / (2 * found.error**2 * (1 - alike**2))
        self.total = max(0.0, self.total + min(ratio, self.limit / 2))
        return self.total >= self.limit


def cosine(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Return the cosine of the angle between two vectors; 0 where one has no length, or they differ in size."""
    if x_N.shape != y_N.shape:
        return 0.0
    lengths = float(np.linalg.norm(x_N) * np.linalg.norm(y_N))
    return float(x_N @ y_N) / lengths if lengths else 0.0


def closest(served_N: np.ndarray, versions: dict[str, np.ndarray]) -> str:
    """Return the name of the version whose logprobs are closest to the served ones, by squared differences."""
    return min(versions, key=lambda name: float(np.square(served_N - versions[name]).sum()))


def without(residual_N: np.ndarray, lasting_N: np.ndarray) -> np.ndarray:
    """Return `residual_N` less what it has of a lasting mismatch, as two kernels have, or a quantized base."""
    power = float(lasting_N @ lasting_N)
    return residual_N - float(residual_N @ lasting_N) / power * lasting_N if power else residual_N
