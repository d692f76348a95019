"""Tasks: questions, and functions that score the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from learner.tasks.base import RewardFunc, Task, TaskError
from learner.tasks.imports import import_object, is_importable

__all__ = ["RewardFunc", "Task", "TaskError", "import_object", "load_task"]

GYM_PREFIX = "reasoning_gym:"


def load_task(
    spec: str,
    *,
    task_args: dict[str, Any] | None = None,
    eval_size: int = 128,
    train_size: int | None = None,
    seed: int = 42,
    reward_specs: Sequence[str] | None = None,
    reward_weights: Sequence[float] | None = None,
    eval_dataset: str | None = None,
    prompt_column: str = "prompt",
) -> Task:
    """Load the task that `spec` names, with `eval_size` questions that training never sees.

    Which questions are held out depends on the task and `eval_size` only, never on `seed` or `train_size`.

    Args:
        spec: `reasoning_gym:NAME`; a .jsonl, .json, .csv or .parquet file; a hub dataset `name[:config][@split]`; or
            `module:object`, a `Task` or a function that is called with the arguments below and returns one.
        task_args: for reasoning_gym the generator's parameters, `answer` (`last_number`, `tag` or `whole`: how the
            answer is found in a completion) and `partial_credit` (true; many of its tasks give some for a wrong answer
            that contains the right one, and false makes that nothing). For datasets too: `system_prompt`,
            `prompt_template` (a format string over the row's fields, with `{metadata[...]}` for reasoning_gym) and
            `prompt_format` (`chat` or `raw`).
        train_size: training questions; default all of a dataset, 2000 of a generator. A generator that has fewer
            different ones repeats them.
        seed: of the order and, for a generator, the choice of training questions.
        reward_specs: import paths `module:function`; `score` is a reasoning_gym task's own score, its default.
        reward_weights: one for each reward; default 1 each.
        eval_dataset: a file or hub dataset to evaluate on, instead of held-out rows of `spec`.
        prompt_column: the column of a file or dataset that holds the prompt, text or chat messages.

    Raises:
        TaskError: with what to do instead.
    """
    if eval_size < 0 or (train_size is not None and train_size < 1):
        raise TaskError(f"eval_size {eval_size} and train_size {train_size} must not be negative, nor train_size zero")
    common: dict[str, Any] = {
        "eval_size": eval_size,
        "train_size": train_size,
        "seed": seed,
        "reward_specs": reward_specs,
        "reward_weights": reward_weights,
    }
    if spec.startswith(GYM_PREFIX):
        from learner.tasks.gym import load_gym_task

        if eval_dataset is not None:
            raise TaskError("--eval_dataset is for files and datasets; a reasoning_gym task holds questions out itself")
        return load_gym_task(spec.removeprefix(GYM_PREFIX), task_args or {}, **common)

    common |= {"eval_dataset": eval_dataset, "prompt_column": prompt_column}
    module, _, _ = spec.partition(":")
    if ":" in spec and "@" not in spec and is_importable(module):
        made = import_object(spec)
        made = made if isinstance(made, Task) or not callable(made) else made(task_args=task_args or {}, **common)
        if not isinstance(made, Task):
            raise TaskError(f"{spec} is neither a learner.tasks.Task nor a function that returns one, but {made!r:.80}")
        return made

    from learner.tasks.dataset import load_dataset_task

    return load_dataset_task(spec, task_args or {}, **common)
