"""Tasks from a file (JSONL, JSON, CSV, TSV, Parquet) or from a dataset on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset

from learner.tasks.base import RewardFunc, Task, TaskError, size_held_out
from learner.tasks.columns import (
    IMAGE_COLUMNS,
    check_parts,
    decoded,
    exact_dataset,
    holds_images,
    image_key,
    is_filled,
    row_images,
    usable,
    without_filled_keys,
)
from learner.tasks.file_kinds import FILE_KINDS, kind_of
from learner.tasks.files import read_file
from learner.tasks.imports import load_rewards
from learner.tasks.prompts import PromptStyle, question_key
from learner.utils.hub import hub_error

logger = logging.getLogger("lockstep.tasks")


def load_dataset_task(
    spec: str,
    task_args: dict[str, Any],
    *,
    eval_size: int | None,
    train_size: int | None,
    seed: int,
    reward_specs: Sequence[str] | None,
    reward_weights: Sequence[float] | None,
    eval_dataset: str | None,
    prompt_column: str,
    default_reward: RewardFunc | None = None,
) -> Task:
    """Load a file or a hub dataset `name[:config][@split]`. See `learner.tasks.load_task`."""
    functions, weights = load_rewards(reward_specs, reward_weights, own=default_reward)  # a typo costs no download
    remaining = dict(task_args)
    style = PromptStyle.take_from(remaining)
    if remaining:
        known = ", ".join(PromptStyle.__dataclass_fields__)
        raise TaskError(f"{spec} has no task argument {', '.join(sorted(remaining))}; only {known}")
    rows = {source: _read(source) for source in (spec, eval_dataset) if source is not None}
    _warn_of_hidden(rows, prompt_column)
    train = _with_prompts(rows[spec], spec, prompt_column, style)
    if eval_dataset is None:
        train, held_out = _hold_out(train, size_held_out(eval_size), spec)
    else:
        held_out = _with_prompts(rows[eval_dataset], eval_dataset, prompt_column, style)
        asked = _keys(held_out)
        first = sorted(range(len(asked)), key=lambda i: _hash(asked[i]))[:eval_size]
        held_out, keys = held_out.select(first), {asked[i] for i in first}
        kept = [i for i, key in enumerate(_keys(train)) if key not in keys]
        if dropped := len(train) - len(kept):
            logger.warning("%s: left out %d training rows whose question is in the evaluation set", spec, dropped)
        train = train.select(kept)
    train = train.shuffle(seed=seed)
    if train_size:
        train = train.select(range(min(train_size, len(train))))
    if not len(train):
        raise TaskError(f"{spec} leaves no questions to train on besides the {len(held_out)} held out")
    return Task(name=spec, train=train, eval=held_out, reward_funcs=functions, reward_weights=weights)


def _warn_of_hidden(rows: Mapping[str, Dataset], prompt_column: str) -> None:
    """Warn, once each, of columns that reward functions do not get, whichever data has them."""
    for name in ("completion", *(["prompt"] if prompt_column != "prompt" else ())):
        if sources := [source for source, each in rows.items() if name in each.column_names]:
            logger.warning(
                "%s: reward functions do not get the column %r, whose name TRL has for its own: rename it if they "
                "read it",
                " and ".join(sources),
                name,
            )


def _read(spec: str) -> Dataset:
    path = Path(spec).expanduser()
    if kind_of(path) in FILE_KINDS or path.exists():
        if path.is_dir():
            raise TaskError(
                f"{path} is a directory: name one {'/'.join(FILE_KINDS)} file in it, or module:object, which may load "
                "it with datasets"
            )
        if not path.is_file():
            raise TaskError(f"no file {path}")
        return read_file(path)
    name, _, split = spec.partition("@")
    name, _, config = name.partition(":")
    try:
        return _read_hub(name, config or None, split or "train")
    except TaskError:
        raise
    except Exception as error:  # not found, offline, gated, unknown config or split: the message says which
        raise hub_error(
            f"{spec!r} is not a file here and could not be loaded from the hub: {type(error).__name__}: {error}. A "
            f"task is reasoning_gym:NAME, a {'/'.join(FILE_KINDS)} file, a hub dataset name[:config][@split], or "
            "module:object",
            error,
            TaskError,
        ) from error


def _read_hub(name: str, config: str | None, split: str) -> Dataset:
    """Load a dataset of the hub. Those that consist of CSV files get text only, as `read_file` would.

    Raises `TaskError` where `datasets` has read text as dates.
    """
    rows = load_dataset(name, config, split=split)
    if rows.info.builder_name == "csv":
        text = Features(dict.fromkeys(rows.column_names, Value("string")))
        return load_dataset(name, config, split=split, features=text, keep_default_na=False)
    if rows.info.builder_name == "json":
        for column, feature in rows.features.items():
            if _has_dates(feature):
                raise TaskError(
                    f"{name}, column {column!r}: datasets reads its text as dates. Download the file and give its path"
                )
    return rows


def _has_dates(feature: Any) -> bool:
    if isinstance(feature, Value):
        return feature.dtype.startswith(("timestamp", "date", "time"))
    nested = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return any(map(_has_dates, (each for each in nested if each is not None)))


def _with_prompts(rows: Dataset, spec: str, prompt_column: str, style: PromptStyle) -> Dataset:
    """Put the model's prompt into the column `prompt`; the rewards read the other columns."""
    rows = usable(rows, spec, images=True)
    if style.prompt_template is None and prompt_column not in rows.column_names:
        raise TaskError(
            f"{spec} has no column {prompt_column!r}; it has {', '.join(rows.column_names)}. Name the question's "
            "column with --prompt_column"
        )
    filled = prompt_column in rows.column_names and is_filled(rows.features[prompt_column])
    prompts: list[Any] = []
    for i, row in enumerate(decoded(rows, spec)):
        value = row.get(prompt_column)
        try:
            prompts.append(style.prompt(without_filled_keys(value) if filled else value, row))
            if type(prompts[i]) is not type(prompts[0]):
                raise TaskError("some prompts are text and others are chat messages: make all the same")
            row_images(row)
            check_parts(prompts[i])
            if holds_images(prompts[i]):
                raise TaskError(
                    "a message holds an image itself: put images into a column `images`, and in the messages leave "
                    'empty parts {"type": "image"} in their places, or none'
                )
        except TaskError as error:
            raise TaskError(f"{spec}, row {i + 1}: {error.message}") from error
    prompted = exact_dataset({"prompt": prompts}, spec)
    others = rows.remove_columns("prompt") if "prompt" in rows.column_names else rows
    # A table without columns has no rows either.
    return concatenate_datasets([others, prompted], axis=1) if others.column_names else prompted


def _hold_out(rows: Dataset, eval_size: int, spec: str) -> tuple[Dataset, Dataset]:
    """Split by question: all rows of a question are on the same side."""
    by_key: dict[str, list[int]] = {}
    for i, key in enumerate(_keys(rows)):
        by_key.setdefault(key, []).append(i)
    if eval_size >= len(by_key):
        raise TaskError(
            f"{spec} has {len(by_key)} different questions: too few to hold out {eval_size} and train on others. "
            "Lower --eval_size or give --eval_dataset"
        )
    keys = sorted(by_key, key=_hash)
    held_out = [by_key[key][0] for key in keys[:eval_size]]
    kept = sorted(i for key in keys[eval_size:] for i in by_key[key])
    return rows.select(kept), rows.select(held_out)


def _keys(rows: Dataset) -> list[str]:
    """Return a key for each row, equal for questions of the same text and the same images, in whichever column."""
    seen = [name for name in IMAGE_COLUMNS if name in rows.column_names]
    only_questions = rows.select_columns(["prompt", *seen])
    return ["\0".join([question_key(row["prompt"]), *map(image_key, row_images(row))]) for row in only_questions]


def _hash(key: str) -> bytes:
    # The question itself decides whether it is held out, not a seed or the order of the file: the split stays mostly
    # the same with another seed or with rows appended.
    return hashlib.sha256(key.encode()).digest()
