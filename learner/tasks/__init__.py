"""Tasks: questions, and reward functions that score their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from learner.tasks.arguments import reads
from learner.tasks.base import EVAL_SIZE, RewardFunc, Task, TaskError, size_held_out
from learner.tasks.imports import import_object, is_importable
from learner.utils.wording import option
from shared.errors import LockstepError

__all__ = ["RewardFunc", "Task", "TaskError", "import_object", "load_task"]


def load_task(
    spec: str,
    *,
    task_args: dict[str, Any] | None = None,
    eval_size: int | None = None,
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
            `name[:config][@split]`; or `module:object`, a `Task` or a function that returns one. A function is called
            with those of the arguments below that it names, or with all if it has a `**rest` (not `**_`). What differs
            from its default and is not looked at, as with a `Task`, is refused.
        eval_size: default 128, or with `eval_dataset` all that it has.
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
        ConnectionError: the hub cannot be reached.

    Example:
        >>> task = load_task("reasoning_gym:chain_sum", eval_size=64, train_size=500)
        >>> task.train[0]["prompt"]
        [{'role': 'user', 'content': 'State the final answer to the following arithmetic problem: ...'}]
    """
    if (eval_size or 0) < 0 or (train_size is not None and train_size < 1):
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
        if prompt_column != "prompt":
            raise TaskError(
                f"--prompt_column {prompt_column} is for files and datasets; reasoning_gym tasks make their prompts "
                "(prompt_template in task_args words them)"
            )
        return load_gym_task(name, task_args or {}, **common | {"eval_size": size_held_out(eval_size)})

    common |= {"eval_dataset": eval_dataset, "prompt_column": prompt_column}
    if colon and "@" not in spec and is_importable(kind):
        made = _made(spec, import_object(spec), {"task_args": task_args or {}, **common})
        from learner.tasks.columns import prompted

        evaluation = made.eval if made.eval is None else prompted(made.eval, f"{spec}, evaluation", images=True)
        return replace(made, train=prompted(made.train, f"{spec}, training", images=True), eval=evaluation)

    from learner.tasks.dataset import load_dataset_task

    return load_dataset_task(spec, task_args or {}, default_reward=default_reward, **common)


def _made(spec: str, found: Any, given: Mapping[str, Any]) -> Task:
    """Return the task at an import path: itself, or what the function there makes of the options it looks at."""
    made = found
    if isinstance(found, Task):
        _refuse_ignored(spec, given)
    elif callable(found):
        seen = [name for name in given if reads(found, name)]
        _refuse_ignored(spec, {name: value for name, value in given.items() if name not in seen})
        given = {**given, "eval_size": size_held_out(given["eval_size"])}
        made = _called(spec, found, {name: given[name] for name in seen})
    if not isinstance(made, Task):
        raise TaskError(f"{spec} is neither a learner.tasks.Task nor a function that returns one, but {made!r:.80}")
    return made


def _refuse_ignored(spec: str, ignored: Mapping[str, Any]) -> None:
    usual = {**(load_task.__kwdefaults__ or {}), "eval_size": EVAL_SIZE}
    chosen = [name for name, value in ignored.items() if value != usual[name] and value not in (None, {}, [], ())]
    # `seed` is the training's own, too.
    options = [option({"reward_specs": "reward_funcs"}.get(name, name)) for name in chosen if name != "seed"]
    if options:
        raise TaskError(f"{', '.join(options)}: the task {spec} does not look at it; leave it out")


def _called(spec: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return function(**arguments)
    except (LockstepError, OSError):  # another try may find the network or the disk that was missing
        raise
    except (Exception, SystemExit) as error:  # whatever the user's function does
        raise TaskError(f"calling {spec!r} failed: {type(error).__name__}: {error}") from error
