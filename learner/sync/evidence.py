"""Evidence for the version that a server samples from, from logprobs that rounding blurs.

Let s be served logprobs, o the learner's own at the pushed version v, and d the learner's movement since an earlier
version u. The *share* is 1 + the regression of s - o on d: 1 where the server serves v, 0 where it serves u. No
movement of one step needs to be visible: what proofs find adds up in a sequential test. Steps that go the same way meet
part of the same noise again while the policy hardly changes. So proofs add up token by token: one that errs alike in
all of them is one witness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: A server that serves what was pushed is accused once in so many proofs, at most.
PROOFS_PER_FALSE_ALARM = 1e6


@dataclass(frozen=True)
class Share:
    """Part of a movement that has arrived, with its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Evidence:
    """What one proof tells, or several together.

    Attributes:
        products_N, powers_N: of every token, s - o times the movement, and the movement squared.
        squares, values: the sum of all (s - o)^2, and how many there are.
        rows_N: the sequence of every token.
        noise: least rms of s - o in nats, without what the server may have missed.
    """

    products_N: np.ndarray
    powers_N: np.ndarray
    squares: float
    values: int
    rows_N: np.ndarray
    noise: float

    @classmethod
    def of(cls, residual_N: np.ndarray, movement_N: np.ndarray, rows_N: np.ndarray, noise: float = 0.0) -> Evidence:
        """Return that of one proof.

        Args:
            residual_N: s - o at the pushed version.
            movement_N: o minus the learner's logprobs at the earlier version.
        """
        squares = float(residual_N @ residual_N)
        return cls(residual_N * movement_N, movement_N**2, squares, len(residual_N), rows_N, noise)

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            self.products_N + other.products_N,
            self.powers_N + other.powers_N,
            self.squares + other.squares,
            self.values + other.values,
            self.rows_N,
            max(self.noise, other.noise),
        )

    def share(self) -> Share | None:
        """Regress s - o on the learner's movement, through the origin; None where nothing moved.

        The standard error is the largest of three: that of independent errors with `noise`, that of tokens with unequal
        noise, which may be the same in all proofs (White 1980), and that of sequences whose tokens err together (Liang
        and Zeger 1986).
        """
        power = float(self.powers_N.sum())
        if not power:
            return None
        slope = float(self.products_N.sum()) / power
        scores_N = self.products_N - slope * self.powers_N
        scores = np.bincount(self.rows_N, weights=scores_N)
        sequences = len(set(self.rows_N.tolist()))
        by_sequence = float(scores @ scores) * sequences / max(sequences - 1, 1)
        by_token = float(scores_N @ scores_N)
        independent = max((self.squares - slope**2 * power) / self.values, self.noise**2) * power
        return Share(1.0 + slope, math.sqrt(max(by_sequence, by_token, independent)) / power)


def share(residual_N: np.ndarray, movement_N: np.ndarray, rows_N: np.ndarray, noise: float = 0.0) -> Share | None:
    """Return the share that one proof finds; see `Evidence`."""
    return Evidence.of(residual_N, movement_N, rows_N, noise).share()


class Suspicion:
    """Sequential test of "the server serves the version before" against "it serves what was pushed".

    Takes the log likelihood ratio of all proofs together, and begins anew where it falls below 0 (Page 1954,
    "Continuous inspection schemes"), so that a server that got stuck late is found as fast. While all is well the ratio
    has mean 1, so e^limit proofs pass between two false alarms on average (Lorden 1971).

    Attributes:
        total: of the proofs since it began; an alarm is due at `limit`.
    """

    limit = math.log(PROOFS_PER_FALSE_ALARM)

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.total = self._ratio = 0.0
        self._proofs: Evidence | None = None

    def add(self, evidence: Evidence) -> bool:
        """Add what one proof has found; return whether the server stands accused.

        No single proof counts for more than half of what an alarm needs: errors are not quite normal.
        """
        self._proofs = self._proofs + evidence if self._proofs else evidence
        found = self._proofs.share()
        if found is None:
            return False
        ratio = ((found.value - 1.0) ** 2 - found.value**2) / (2 * found.error**2)  # ln of N(0, e) to N(1, e)
        self.total += min(ratio - self._ratio, self.limit / 2)
        self._ratio = ratio
        if not self.total > 0.0:
            self._begin()
        return self.total >= self.limit


def closest(served_N: np.ndarray, versions: dict[str, np.ndarray]) -> str:
    """Return the name of the version whose logprobs are closest to the served ones, by squared differences."""
    return min(versions, key=lambda name: float(np.square(served_N - versions[name]).sum()))


def without(residual_N: np.ndarray, lasting_N: np.ndarray) -> np.ndarray:
    """Return `residual_N` less what it has of a lasting mismatch, as two kernels have, or a quantized base."""
    power = float(lasting_N @ lasting_N)
    return residual_N - float(residual_N @ lasting_N) / power * lasting_N if power else residual_N
