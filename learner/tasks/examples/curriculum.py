"""A reasoning-gym task from easy to hard.

Run with `--task learner.tasks.examples.curriculum:levels --shuffle_dataset false`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from datasets import concatenate_datasets

from learner.tasks.base import RewardFunc, Task, TaskError
from learner.tasks.gym import DEFAULT_TRAIN_SIZE, import_reasoning_gym, load_gym_task
from learner.tasks.imports import load_rewards
from learner.tasks.prompts import question_key


def levels(
    task_args: dict[str, Any],
    *,
    eval_size: int,
    train_size: int | None,
    seed: int,
    reward_specs: Sequence[str] | None = None,
    reward_weights: Sequence[float] | None = None,
) -> Task:
    """Load the first levels of reasoning-gym's curriculum for a task; the training questions go from level to level.

    A level's questions include those of the levels below it, as in reasoning-gym. The same number of questions is held
    out of each level. Raises `TaskError` if the task has no curriculum, an argument is missing, or there are fewer
    questions than levels.

    Args:
        task_args: `name` of the task, number of `levels`, and arguments of `reasoning_gym:NAME` for all levels.
    """
    given = dict(task_args)
    name, count = given.pop("name", None), given.pop("levels", None)
    if not isinstance(name, str) or not isinstance(count, int) or count < 1:
        raise TaskError("task_args of a curriculum: name (of a reasoning-gym task) and levels (how many) are needed")
    train_size = DEFAULT_TRAIN_SIZE if train_size is None else train_size
    for option, size in (("eval_size", eval_size), ("train_size", train_size)):
        if size and size < count:
            raise TaskError(f"{option} {size} is too few questions for {count} levels: give {count} or more")
    parts = [
        load_gym_task(
            name,
            {**_parameters(name, level), **given},
            eval_size=eval_size // count,
            train_size=train_size // count,
            seed=seed,
        )
        for level in range(count)
    ]
    held_out = {question_key(prompt) for part in parts for prompt in part.eval["prompt"]} if eval_size else set()
    train, evaluation = [], []
    for level, part in enumerate(parts):
        kept = [i for i, prompt in enumerate(part.train["prompt"]) if question_key(prompt) not in held_out]
        train.append(part.train.select(kept).add_column("gym_level", [level] * len(kept)))
        evaluation.append(part.eval.add_column("gym_level", [level] * len(part.eval)))
    score = LevelScore(name, [part.reward_funcs[0] for part in parts])
    functions, weights = load_rewards(reward_specs, reward_weights, own=score)
    return Task(
        name=f"reasoning_gym:{name}, {count} levels",
        train=concatenate_datasets(train),
        eval=concatenate_datasets(evaluation),
        reward_funcs=functions,
        reward_weights=weights,
    )


class LevelScore:
    """A reward function: reasoning-gym's own score for the question's level."""

    def __init__(self, name: str, scores: list[RewardFunc]) -> None:
        self.__name__, self._scores = name, scores

    def __call__(
        self, prompts: list[Any], completions: list[Any], gym_item: list[int], gym_level: list[int], **_: Any
    ) -> list[float]:
        return [
            self._scores[level](prompts=[prompt], completions=[completion], gym_item=[item])[0]
            for prompt, completion, item, level in zip(prompts, completions, gym_item, gym_level, strict=True)
        ]


def _parameters(name: str, level: int) -> dict[str, Any]:
    """Return the generator parameters of a curriculum level; attributes with fewer levels stay at their last."""
    import_reasoning_gym()
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if not has_curriculum(name):
        raise TaskError(f"reasoning-gym has no curriculum for {name!r}: use --task reasoning_gym:{name}")
    curriculum = create_curriculum(name)
    curriculum.set_global_level(level)
    config = dataclasses.asdict(curriculum.generate_configuration())
    return {field: value for field, value in config.items() if field not in ("seed", "size")}
