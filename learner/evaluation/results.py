"""Results of evaluations, and their comparison on the same questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from learner.evaluation.statistics import mean_and_stderr, normal_interval, wilson_interval


@dataclass(frozen=True)
class EvalRow:
    """One completion of one question; `rewards` by name of their function, None where it did not apply.

    `reward` is None where none applied: the completion is left out, as in training.
    """

    question: int
    prompt: Any
    completion: str
    finish_reason: str
    tokens: int
    rewards: dict[str, float | None]
    reward: float | None


@dataclass(frozen=True)
class EvalResult:
    """Score of one policy: `reward` is the mean over questions of the weighted rewards, `stderr` its standard error.

    `questions` counts those with a completion that has a reward.
    """

    task: str
    policy: str
    versions: list[str]
    questions: int
    reward: float
    stderr: float
    rewards: dict[str, float | None]
    completion_tokens: int
    rows: list[EvalRow]

    @property
    def unscored(self) -> int:
        """Completions without a reward."""
        return sum(row.reward is None for row in self.rows)

    def interval(self) -> tuple[float, float]:
        """Return the 95% interval of `reward`: Wilson's if every question's is between 0 and 1, else the normal one."""
        if all(0.0 <= mean <= 1.0 for mean in question_means(self.rows).values()):
            return wilson_interval(self.reward, self.questions)
        return normal_interval(self.reward, self.stderr)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (reward of `policy` - reward of `against`) over the `questions` scored for both, with its 95% interval.

    `stderr` is that of paired differences, after the central limit theorem: the standard deviation of the questions'
    differences over the square root of their number (Miller, "Adding Error Bars to Evals", arXiv:2411.00640, section
    4.2). A question's difficulty for both policies cancels out.
    """

    policy: str
    against: str
    questions: int
    difference: float
    stderr: float
    low: float
    high: float


def question_means(rows: Iterable[EvalRow]) -> dict[int, float]:
    """Return the mean reward of each question's completions; of those that have one."""
    rewards: dict[int, list[float]] = {}
    for row in rows:
        if row.reward is not None:
            rewards.setdefault(row.question, []).append(row.reward)
    return {question: sum(values) / len(values) for question, values in rewards.items()}


def paired_differences(results: Sequence[EvalResult]) -> list[PairedDifference | None]:
    """Return the difference of every later result to the first; None where no question has rewards in both."""
    differences: list[PairedDifference | None] = []
    for result in results[1:]:
        own, reference = question_means(result.rows), question_means(results[0].rows)
        values = [own[question] - reference[question] for question in reference if question in own]
        if not values:
            differences.append(None)
            continue
        mean, stderr = mean_and_stderr(values)
        interval = normal_interval(mean, stderr)
        differences.append(PairedDifference(result.policy, results[0].policy, len(values), mean, stderr, *interval))
    return differences


def comparison_table(results: Sequence[EvalResult]) -> list[str]:
    """Return one line per policy, with its difference to the first."""
    width = max(len(result.policy) for result in results)
    table = []
    for result, paired in zip(results, [None, *paired_differences(results)], strict=True):
        low, high = result.interval()
        line = f"{result.policy:<{width}}  {result.reward:.3f} [{low:.3f}, {high:.3f}]"
        if paired:
            line += f"  {paired.difference:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}] against {paired.against}"
        parts = [f"{name} {value:.3f}" for name, value in result.rewards.items() if value is not None]
        if len(parts) > 1:
            line += f"  ({', '.join(parts)})"
        if result.unscored:
            line += f"  ({result.unscored} of {len(result.rows)} completions left out, without a reward)"
        table.append(f"{line}  {', '.join(result.versions)}")
    return table


def comparison_document(results: Sequence[EvalResult]) -> dict[str, Any]:
    """Return the comparison as JSON values, with every question and completion."""
    documents = []
    for result in results:
        low, high = result.interval()
        documents.append(asdict(result) | {"unscored": result.unscored, "low": low, "high": high})
    differences = [difference and asdict(difference) for difference in paired_differences(results)]
    return json_values({"results": documents, "differences": differences})


def json_values(value: Any) -> Any:
    """Return a value that JSON can hold: None for NaN and infinities, which a prompt may have, and text for objects."""
    if isinstance(value, dict):
        return {str(key): json_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
