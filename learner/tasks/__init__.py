"""Tasks: questions, and reward functions that score their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learner.tasks.base import RewardFunc, Task, TaskError
from learner.tasks.imports import import_object, is_importable

__all__ = ["RewardFunc", "Task", "TaskError", "import_object", "load_task"]


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
    default_reward: RewardFunc | None = None,
) -> Task:
    """Load a task, with `eval_size` held-out questions that do not occur in training.

    The choice of held-out questions depends on the task and `eval_size`, not on `seed` or `train_size`.

    Args:
        spec: `reasoning_gym:NAME`; a .jsonl, .json, .csv, .tsv or .parquet file; a hub dataset
            `name[:config][@split]`; or `module:object`, a `Task` or a function that is called with the arguments below
            and returns one.
        task_args: for all kinds `system_prompt`, `prompt_format` (`chat` or `raw`) and `prompt_template` (a format
            string over the row's fields, with `{metadata[...]}` for reasoning_gym). For reasoning_gym also the
            generator's parameters, `answer` (`last_number`, `tag` or `whole`: how to extract the answer from a
            completion) and `partial_credit` (default true: a wrong answer may score more than 0, for instance if it
            contains the right one).
        train_size: training questions; default all of a dataset, 2000 of a generator. A generator with fewer distinct
            questions repeats them.
        seed: for the order and, with a generator, the choice of training questions.
        reward_specs: import paths `module:function`; `score` is a reasoning_gym task's own score, its default.
        eval_dataset: file or hub dataset to evaluate on, instead of held-out rows of `spec`.
        prompt_column: column of a file or dataset with the prompt, as text or chat messages.
        default_reward: of a file or dataset, where `reward_specs` name none.

    Raises:
        TaskError: the task cannot be loaded; the message says how to fix it.

    Example:
        >>> task = load_task("reasoning_gym:chain_sum", eval_size=64, train_size=500)
        >>> task.train[0]["prompt"]
        [{'role': 'user', 'content': 'State the final answer to the following arithmetic problem: ...'}]
    """
    if eval_size < 0 or (train_size is not None and train_size < 1):
        raise TaskError(f"eval_size {eval_size} must not be negative, and train_size {train_size} must be at least 1")
    common: dict[str, Any] = {
        "eval_size": eval_size,
        "train_size": train_size,
        "seed": seed,
        "reward_specs": reward_specs,
        "reward_weights": reward_weights,
    }
    kind, colon, name = spec.partition(":")
    if colon and kind == "reasoning_gym":
        from learner.tasks.gym import load_gym_task

        if eval_dataset is not None:
            raise TaskError(
                "--eval_dataset is for files and datasets; reasoning_gym tasks hold out questions themselves"
            )
        return load_gym_task(name, task_args or {}, **common)

    common |= {"eval_dataset": eval_dataset, "prompt_column": prompt_column}
    if colon and "@" not in spec and is_importable(kind):
        made = import_object(spec)
        made = made if isinstance(made, Task) or not callable(made) else made(task_args=task_args or {}, **common)
        if not isinstance(made, Task):
            raise TaskError(f"{spec} is neither a learner.tasks.Task nor a function that returns one, but {made!r:.80}")
        from learner.tasks.columns import usable

        evaluation = made.eval if made.eval is None else usable(made.eval, f"{spec}, evaluation", images=True)
        return replace(made, train=usable(made.train, f"{spec}, training", images=True), eval=evaluation)

    from learner.tasks.dataset import load_dataset_task

    return load_dataset_task(spec, task_args or {}, default_reward=default_reward, **common)
