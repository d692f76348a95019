"""The type of a task: training questions, held-out questions, and reward functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidRequest

if TYPE_CHECKING:
    from datasets import Dataset

# Called by TRL as f(prompts=..., completions=..., **columns); returns a float for each, or None if it does not apply.
RewardFunc = Callable[..., Any]
#: Questions that are held out where nobody says how many.
EVAL_SIZE = 128
#: Arguments that TRL gives every reward function; a dataset column of such a name would take the place of one.
REWARD_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)


class TaskError(InvalidRequest):
    """A task cannot be loaded as requested; the message says how to fix that."""


@dataclass(frozen=True)
class Task:
    """Questions and rewards, as TRL's `GRPOTrainer` takes them.

    Attributes:
        train, eval: rows with a column `prompt` (chat messages, or text) and the columns that the rewards read. No
            prompt of `eval` occurs in `train` with the same images.
        reward_weights: one for each reward; None: 1 each.
    """

    name: str
    train: Dataset
    eval: Dataset
    reward_funcs: list[RewardFunc]
    reward_weights: list[float] | None = None


def size_held_out(eval_size: int | None) -> int:
    """Return how many questions are held out; None: nobody has said."""
    return EVAL_SIZE if eval_size is None else eval_size
