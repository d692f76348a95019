"""Evaluations side by side: 95% intervals, and differences on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from learner.evaluation.results import EvalResult

#: Standard errors either side of a mean that hold 95% of a normal distribution.
Z95 = 1.959964


@dataclass(frozen=True)
class Difference:
    """Mean over questions of (reward of `policy` - reward of `against`).

    `stderr` is that of paired differences, after the central limit theorem: the standard deviation of the questions'
    differences over the square root of their number (Miller, "Adding Error Bars to Evals", arXiv:2411.00640, section
    4.2). What makes a question hard for both policies cancels out.
    """

    policy: str
    against: str
    difference: float
    stderr: float
    low: float
    high: float


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Of independent values, one for each question."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def interval(result: EvalResult) -> tuple[float, float]:
    """95% interval of a mean reward: Wilson's where all rewards lie between 0 and 1, else the normal one."""
    if all(0.0 <= mean <= 1.0 for mean in by_question(result).values()):
        return EvalPoint(result.reward, result.questions).interval()
    return result.reward - Z95 * result.stderr, result.reward + Z95 * result.stderr


def by_question(result: EvalResult) -> dict[int, float]:
    """Mean reward of every question's completions."""
    rewards: dict[int, list[float]] = {}
    for row in result.rows:
        rewards.setdefault(row.question, []).append(row.reward)
    return {question: sum(values) / len(values) for question, values in rewards.items()}


def differences(results: Sequence[EvalResult]) -> list[Difference]:
    """Of every result to the first, over the same questions."""
    if not results:
        return []
    first, *others = results
    reference = by_question(first)
    found = []
    for result in others:
        own = by_question(result)
        mean, stderr = mean_and_stderr([own[question] - reference[question] for question in reference])
        found.append(Difference(result.policy, first.policy, mean, stderr, mean - Z95 * stderr, mean + Z95 * stderr))
    return found


def lines(results: Sequence[EvalResult]) -> list[str]:
    """A table for people: a line for each policy, with its difference to the first."""
    width = max(len(result.policy) for result in results)
    table = []
    for result, difference in zip(results, [None, *differences(results)], strict=True):
        low, high = interval(result)
        named = {name: value for name, value in result.rewards.items() if value is not None}
        parts = ", ".join(f"{name} {value:.3f}" for name, value in named.items())
        table.append(
            f"{result.policy:<{width}}  {result.reward:.3f} [{low:.3f}, {high:.3f}]"
            + (
                f"  {difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] against "
                f"{difference.against}"
                if difference
                else ""
            )
            + (f"  ({parts})" if len(named) > 1 else "")
            + f"  {', '.join(result.versions)}"
        )
    return table


def document(results: Sequence[EvalResult]) -> dict[str, Any]:
    """The same for programs, with every question and answer."""
    return {
        "results": [asdict(result) | dict(zip(("low", "high"), interval(result), strict=True)) for result in results],
        "differences": [asdict(difference) for difference in differences(results)],
    }


class EvalPoint(NamedTuple):
    """The mean score of `n` held-out questions, each between 0 and 1."""

    mean: float
    n: int

    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of a proportion.

        Exact for answers that are right or wrong; for partial credit it is too wide rather than too narrow, since no
        score between 0 and 1 varies more than a right-or-wrong one of the same mean.
        """
        z, n, p = 1.959964, self.n, min(max(self.mean, 0.0), 1.0)
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # At p = 0 and 1 an end is p itself, but for rounding.
        return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))
