"""Tasks from a file (JSONL, JSON, CSV, Parquet) or from a dataset on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from learner.tasks.base import Task, TaskError
from learner.tasks.imports import load_rewards
from learner.tasks.prompts import PromptStyle, question_key

logger = logging.getLogger("lockstep.tasks")

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_dataset_task(
    spec: str,
    task_args: dict[str, Any],
    *,
    eval_size: int,
    train_size: int | None,
    seed: int,
    reward_specs: Sequence[str] | None,
    reward_weights: Sequence[float] | None,
    eval_dataset: str | None,
    prompt_column: str,
) -> Task:
    """Load a file or a hub dataset `name[:config][@split]`. See `learner.tasks.load_task`."""
    functions, weights = load_rewards(reward_specs, reward_weights)  # first: a typo should not cost a download
    remaining = dict(task_args)
    style = PromptStyle.take_from(remaining)
    if remaining:
        known = ", ".join(PromptStyle.__dataclass_fields__)
        raise TaskError(f"{spec} has no task argument {', '.join(sorted(remaining))}; only {known}")
    train = _with_prompts(_read(spec), spec, prompt_column, style)
    if eval_dataset is None:
        train, held_out = _hold_out(train, eval_size, spec)
    else:
        held_out = _with_prompts(_read(eval_dataset), eval_dataset, prompt_column, style)
        hashes = [_hash(question_key(prompt)) for prompt in held_out["prompt"]]
        held_out = held_out.select(sorted(range(len(held_out)), key=hashes.__getitem__)[:eval_size])
        keys = {question_key(prompt) for prompt in held_out["prompt"]}
        kept = [i for i, prompt in enumerate(train["prompt"]) if question_key(prompt) not in keys]
        if dropped := len(train) - len(kept):
            logger.warning("%s: left out %d training rows whose question is in the evaluation set", spec, dropped)
        train = train.select(kept)
    train = train.shuffle(seed=seed)
    if train_size:
        train = train.select(range(min(train_size, len(train))))
    if not len(train):
        raise TaskError(f"{spec} leaves no questions to train on besides the {len(held_out)} held out")
    return Task(name=spec, train=train, eval=held_out, reward_funcs=functions, reward_weights=weights)


def _read(spec: str) -> Dataset:
    path = Path(spec).expanduser()
    if path.suffix in FILE_KINDS or path.exists():
        if not path.is_file():
            raise TaskError(f"no file {path}")
        if path.suffix not in FILE_KINDS:
            raise TaskError(f"{path}: a task file ends in {', '.join(FILE_KINDS)}")
        try:
            rows = load_dataset(FILE_KINDS[path.suffix], data_files=str(path), split="train")
        except Exception as error:  # the cause (a broken line, mixed types) is chained below
            raise TaskError(f"{path} cannot be read: {error.__cause__ or error}") from error
        if not len(rows):
            raise TaskError(f"{path} has no rows")
        return rows
    name, _, split = spec.partition("@")
    name, _, config = name.partition(":")
    try:
        return load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # not found, offline, gated, unknown config or split: the message says which
        raise TaskError(
            f"{spec!r} is not a file here and could not be loaded from the hub: {type(error).__name__}: {error}. A "
            "task is reasoning_gym:NAME, a .jsonl/.json/.csv/.parquet file, a hub dataset name[:config][@split], or "
            "module:object"
        ) from error


def _with_prompts(rows: Dataset, spec: str, prompt_column: str, style: PromptStyle) -> Dataset:
    """Put the model's prompt into the column `prompt`; the rewards read the other columns."""
    if style.prompt_template is None and prompt_column not in rows.column_names:
        raise TaskError(
            f"{spec} has no column {prompt_column!r}; it has {', '.join(rows.column_names)}. Name the question's "
            "column with --prompt_column"
        )
    prompts = [style.prompt(row.get(prompt_column), row) for row in rows]
    others = rows.remove_columns("prompt") if "prompt" in rows.column_names else rows
    if not others.column_names:  # a table without columns has no rows either
        return Dataset.from_dict({"prompt": prompts})
    return others.add_column("prompt", prompts)


def _hold_out(rows: Dataset, eval_size: int, spec: str) -> tuple[Dataset, Dataset]:
    """Split by question: all rows of a question are on the same side."""
    by_key: dict[str, list[int]] = {}
    for i, prompt in enumerate(rows["prompt"]):
        by_key.setdefault(question_key(prompt), []).append(i)
    if eval_size >= len(by_key):
        raise TaskError(
            f"{spec} has {len(by_key)} different questions: too few to hold out {eval_size} and train on others. "
            "Lower --eval_size or give --eval_dataset"
        )
    keys = sorted(by_key, key=_hash)
    held_out = [by_key[key][0] for key in keys[:eval_size]]
    kept = sorted(i for key in keys[eval_size:] for i in by_key[key])
    return rows.select(kept), rows.select(held_out)


def _hash(key: str) -> bytes:
    # The text of a question decides whether it is held out, not a seed or the order of the file: the split stays mostly
    # the same with another seed or with rows appended.
    return hashlib.sha256(key.encode()).digest()
