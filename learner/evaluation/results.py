"""Results of an evaluation: rows and totals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvalRow:
    """One completion of one question; `rewards` by name of their function, None where it did not apply."""

    question: int
    prompt: Any
    completion: str
    finish_reason: str
    tokens: int
    rewards: dict[str, float | None]
    reward: float


@dataclass(frozen=True)
class EvalResult:
    """`reward` is the mean over questions of the weighted rewards, `stderr` its standard error."""

    task: str
    policy: str
    versions: list[str]
    questions: int
    reward: float
    stderr: float
    rewards: dict[str, float | None]
    completion_tokens: int
    rows: list[EvalRow]
