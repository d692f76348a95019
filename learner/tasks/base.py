"""What a task is: questions to train on, questions held out, and functions that score answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidRequest

if TYPE_CHECKING:
    from datasets import Dataset

# TRL's reward function: f(prompts=..., completions=..., **columns) -> one float, or None for "does not apply", each.
RewardFunc = Callable[..., Any]


class TaskError(InvalidRequest):
    """A task that cannot be loaded as asked for; the message says what to do instead."""


@dataclass(frozen=True)
class Task:
    """Questions and rewards, in the form that TRL's `GRPOTrainer` takes.

    `train` and `eval` have a column `prompt` (chat messages, or text) and whatever columns the rewards read. No prompt
    of `eval` occurs in `train`. `reward_weights` is None where every reward counts 1.
    """

    name: str
    train: Dataset
    eval: Dataset
    reward_funcs: list[RewardFunc]
    reward_weights: list[float] | None = None
