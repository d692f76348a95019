"""A small environment with a tool: find a secret number by asking whether it is higher or lower."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from learner.tasks.arguments import check_task_args
from learner.tasks.base import Task

_PROMPT = (
    "I think of a whole number from 1 to {most}. Find it with the tool guess, with as few guesses as you can; it says "
    "whether the number is higher or lower. Stop when it says that you are right."
)


class Guessing:
    """Environment of one completion, with the tool `guess`.

    Run with `--environment learner.tasks.examples.guessing:Guessing`.
    """

    def reset(self, secret: int, **_: Any) -> None:
        """Start an episode with the row's `secret`."""
        self._secret, self._guesses, self._found = secret, 0, False

    def guess(self, number: int) -> str:
        """Guess the secret number.

        Args:
            number: The guess.

        Returns:
            Whether the secret number is higher or lower, or that the guess is right.
        """
        self._guesses += 1
        self._found = self._found or number == self._secret
        if number == self._secret:
            return "right"
        return "higher" if self._secret > number else "lower"

    def get_reward(self) -> float:
        """Return 1 for finding it with the first guess, 0.1 less for each further one; 0.1 if all were wrong."""
        if not self._found:
            return 0.1 if self._guesses else 0.0
        return max(1.1 - 0.1 * self._guesses, 0.2)


def numbers(task_args: dict[str, Any], *, eval_size: int, train_size: int | None, seed: int) -> Task:
    """Load with `--task learner.tasks.examples.guessing:numbers`; the environment gives the reward.

    All prompts are equal and secrets are drawn at random, so no numbers are held out.

    Args:
        task_args: `most`, the largest secret (default 100).
    """
    check_task_args(task_args, "most")
    most = int(task_args.get("most", 100))
    prompt = [{"role": "user", "content": _PROMPT.format(most=most)}]

    def rows(count: int, seed: str) -> Dataset:
        draw = random.Random(seed)
        return Dataset.from_list([{"prompt": prompt, "secret": draw.randint(1, most)} for _ in range(count)])

    return Task(
        name="guessing",
        train=rows(train_size or 2000, f"train {seed}"),
        eval=rows(max(eval_size, 1), "eval"),
        reward_funcs=[],
    )
