"""The datasets of a `trl.GRPOTrainer`: refuse at the start, by row, what would end the training in its middle."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from trl import GRPOConfig, GRPOTrainer

from learner.tasks import columns
from learner.tasks.columns import IMAGE_COLUMNS, decoded
from learner.trainer.filled_keys import named_datasets
from learner.trainer.images import Largest, media_tokens, sees_images, tokenized
from learner.utils.distributed import on_every_rank
from shared.errors import InvalidRequest

logger = logging.getLogger("lockstep.trainer")

#: Prompts whose token ids are kept.
KEPT = 512
_ROWS_AT_ONCE, _IMAGES_AT_ONCE = 512, 16
_MANY_ROWS = 50_000


@dataclass
class Prompts:
    """Prompts of all datasets, as TRL templates them.

    Attributes:
        first: token ids [N][P] of the first training prompts without images.
        images: the most that one prompt has.
        longest: tokens of the longest prompt.
        where: names the longest prompt.
        largest: the largest images.
        unknown: a stream does not tell whether its rows have images.
    """

    first: list[list[int]] = field(default_factory=list)
    longest: int = 0
    where: str = ""
    images: int = 0
    largest: Largest = field(default_factory=Largest)
    unknown: bool = False


def check_datasets(trainer: GRPOTrainer) -> None:
    """Check the columns of the training and evaluation data; take out image columns without images.

    Raises:
        LockstepError: `invalid_request`, with the column and its row.
    """
    usable = partial(columns.prompted, images=sees_images(trainer))
    if isinstance(trainer.train_dataset, Dataset | IterableDataset):
        trainer.train_dataset = usable(trainer.train_dataset, "the training data")
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        trainer.eval_dataset = {name: usable(rows, f"the data of {name}") for name, rows in evaluation.items()}
    elif isinstance(evaluation, Dataset | IterableDataset):
        trainer.eval_dataset = usable(evaluation, "the evaluation data")


def measure_prompts(trainer: GRPOTrainer) -> Prompts:
    """Tokenize every prompt of the training data, and of the evaluation data if the training evaluates; none of streams
    and environments, which make theirs. Each rank takes its part of the rows. Collective.

    A stream is not read before the training: where its columns are of images, a prompt counts as having a small one.

    Raises:
        LockstepError: `invalid_request` on every rank, with the row of a prompt that is missing or empty, has images,
            is of another kind than the others, is refused by the chat template or has text that this leaves out, or
            holds tokens of media without any.
    """
    accelerator, found = trainer.accelerator, Prompts()
    measure = partial(_measure_part, trainer, accelerator.process_index, accelerator.num_processes)
    for part in on_every_rank(measure):
        found.first += part.first[: KEPT - len(found.first)]
        found.images = max(found.images, part.images)
        found.largest.join(part.largest)
        found.unknown |= part.unknown
        if part.longest > found.longest:
            found.longest, found.where = part.longest, part.where
    return found


def check_enough(rows: Any, args: GRPOConfig) -> None:
    """Refuse training data that does not fill one generation batch, of which TRL makes no step: `invalid_request`."""
    needed = args.generation_batch_size // args.num_generations
    if isinstance(rows, Dataset) and len(rows) < needed:
        raise InvalidRequest(
            f"the training data has {len(rows)} prompts, and one generation batch takes {needed}: give more, or lower "
            "per_device_train_batch_size, gradient_accumulation_steps or generation_batch_size"
        )


def _measure_part(trainer: GRPOTrainer, rank: int, ranks: int) -> Prompts:
    found = Prompts()
    if trainer.environment_factories is not None:
        return found
    unseen = {images: media_tokens(trainer, images=images) for images in (False, True)}
    evaluates = str(getattr(trainer.args.eval_strategy, "value", trainer.args.eval_strategy)) != "no"
    for name, rows in named_datasets(trainer):
        if not (evaluates or rows is trainer.train_dataset):
            continue
        if isinstance(rows, IterableDataset) and sees_images(trainer):
            _expect_of_stream(found, rows, name)
        if not isinstance(rows, Dataset) or "prompt" not in rows.column_names or not len(rows):
            continue
        if len(rows) > _MANY_ROWS and rank == 0:
            logger.info("measuring the %d prompts of %s", len(rows), name)
        wanted = ["prompt", *(IMAGE_COLUMNS if sees_images(trainer) else ())]
        only_prompts = rows.select_columns(
            [name for name in wanted if name in rows.column_names]
        )  # others may be large
        kind, end = type(next(decoded(only_prompts, name))["prompt"]), len(rows) * (rank + 1) // ranks
        at_once = _IMAGES_AT_ONCE if len(wanted) > 1 else _ROWS_AT_ONCE
        for start in range(len(rows) * rank // ranks, end, at_once):
            part = _part(only_prompts, range(start, min(start + at_once, end)), name)
            for i, (ids, images) in enumerate(_tokenized(trainer, part, kind, name, start)):
                if not ids:
                    raise InvalidRequest(f"{name}, row {start + i + 1}: the prompt is empty")
                if unfilled := unseen[bool(images)].intersection(ids):
                    raise InvalidRequest(
                        f"{name}, row {start + i + 1}, {_beginning(part[i]['prompt'])}: the prompt holds tokens of an "
                        f"image, a video or a sound (id {min(unfilled)}), and nothing fills them: leave them out"
                    )
                found.images = max(found.images, len(images))
                found.largest.see_all(images, f"{name}, row {start + i + 1},")
                if len(ids) > found.longest:
                    found.longest = len(ids)
                    found.where = f"{name}, row {start + i + 1}, {_beginning(part[i]['prompt'])}"
                if rows is trainer.train_dataset and len(found.first) < KEPT and not images:
                    found.first.append(ids)
    return found


def _part(rows: Dataset, numbers: range, name: str) -> list[dict[str, Any]]:
    try:
        columns_of = rows[numbers.start : numbers.stop]
    except Exception:  # one by one, which takes five times as long, to name the row
        return list(decoded(rows.select(numbers), name, numbers.start + 1))
    return [dict(zip(columns_of, row, strict=True)) for row in zip(*columns_of.values(), strict=True)]


def _expect_of_stream(found: Prompts, rows: IterableDataset, name: str) -> None:
    """Count the smallest image in where a stream's columns are of images."""
    seen = columns.may_have_images(rows)
    found.unknown |= seen is None
    if seen:
        found.images = max(found.images, 1)
        found.largest.see_sizes([(1, 1)], f"{name}, a stream,")


def _tokenized(
    trainer: GRPOTrainer, rows: list[dict[str, Any]], kind: type, name: str, start: int
) -> list[tuple[list[int], list[Any]]]:
    """Return token ids [P] and images of each row; where that fails, name the first row for which it does."""
    prompts = [row["prompt"] for row in rows]
    for row, prompt in enumerate(prompts, start + 1):
        if not isinstance(prompt, str | list) or not prompt or type(prompt) is not kind:
            raise InvalidRequest(
                f"{name}, row {row}: a prompt must be text or a list of chat messages, as in the other rows, and not "
                f"empty, but it is {prompt!r:.80}"
            )
    try:
        return list(zip(*tokenized(trainer, rows), strict=True))
    except Exception as error:  # whatever a chat template raises
        half = len(prompts) // 2
        if half:
            first = _tokenized(trainer, rows[:half], kind, name, start)
            return first + _tokenized(trainer, rows[half:], kind, name, start + half)
        where = f"{name}, row {start + 1}, {_beginning(prompts[0])}"
        if isinstance(error, InvalidRequest):
            raise InvalidRequest(f"{where}: {error.message}") from error
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise InvalidRequest(f"{where}: the tokenizer or its chat template refuses it ({why})") from error


def _beginning(prompt: Any) -> str:
    message = prompt[-1] if isinstance(prompt, list) and prompt else prompt
    text = message.get("content") if isinstance(message, dict) else message
    return f"{' '.join(str(text).split())!r:.80}"
