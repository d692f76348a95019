"""The order of generation batches of a `trl.GRPOTrainer`: when they are trained on, and with which prompts."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from trl import GRPOTrainer

from learner.rollouts.schedule import Schedule


def indexable(trainer: GRPOTrainer) -> bool:
    """Return whether an index sampler orders the prompts, so that they can be read ahead; streams have none."""
    return not isinstance(trainer.train_dataset, IterableDataset | TorchIterableDataset)


def schedule_of(trainer: GRPOTrainer) -> Schedule:
    """Return when generation batches are trained on; `max_steps` is known once the training has begun."""
    args = trainer.args
    prompts = args.generation_batch_size // trainer.num_generations
    rows = len(trainer.train_dataset) if indexable(trainer) else sys.maxsize  # a stream is one epoch
    return Schedule(
        per_batch=args.steps_per_generation * trainer.num_iterations,
        accumulation=args.gradient_accumulation_steps,
        per_epoch=max(rows // prompts, 1),
        max_steps=trainer.state.max_steps,
        iterations=trainer.num_iterations,
    )


def generation_batch(trainer: GRPOTrainer) -> int:
    """Return the number of the generation batch that the next micro-step trains on."""
    return schedule_of(trainer).batch_at(trainer._step)


def rows_of_rank(trainer: GRPOTrainer) -> range:
    """Return this rank's rows among those of a generation batch."""
    size = trainer.args.generation_batch_size // trainer.accelerator.num_processes
    first = size * trainer.accelerator.process_index
    return range(first, first + size)


class TrlPrompts:
    """The coming prompts of a trainer, as `learner.protocols.ComingPrompts`, whose docstrings apply."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer
        self._batch, self._known = -2, list[int]()
        self._coming: Iterator[list[int]] = iter(())

    def rows(self, batch: int) -> list[dict[str, Any]]:
        dataset, rows = self._trainer.train_dataset, rows_of_rank(self._trainer)
        return [dataset[index] for index in self._indices(batch)[rows.start : rows.stop]]

    def spare_rows(self, batch: int, count: int) -> list[dict[str, Any]]:
        trainer, used = self._trainer, set(self._indices(batch))
        ranks, length = trainer.accelerator.num_processes, len(trainer.train_dataset)
        size = min(length, count * ranks + len(used))
        drawn = random.Random(f"{trainer.args.seed}/{batch}").sample(range(length), size)
        others = [index for index in drawn if index not in used][trainer.accelerator.process_index :: ranks]
        return [trainer.train_dataset[index] for index in others[:count]]

    def token_ids(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        return [list(ids) for ids in self._trainer._tokenize_prompts([row["prompt"] for row in rows])[0]]

    def _indices(self, batch: int) -> list[int]:
        if batch != self._batch:
            if batch != self._batch + 1:
                trainer, schedule = self._trainer, schedule_of(self._trainer)
                rows = trainer.args.generation_batch_size
                self._coming = coming_indices(trainer._get_train_sampler(), rows=rows, schedule=schedule, first=batch)
            self._batch, self._known = batch, next(self._coming)
        return self._known


def skip_epochs(sampler: Iterable[int], epochs: int) -> None:
    """Advance a new `RepeatSampler` of TRL by so many epochs: each iteration draws its order at its first index."""
    for _ in range(epochs):
        next(iter(sampler))


def coming_indices(sampler: Iterable[int], *, rows: int, schedule: Schedule, first: int) -> Iterator[list[int]]:
    """Yield dataset indices [rows] of the generation batches from `first` on, one for each completion.

    Args:
        sampler: a new one, as the trainer's loader got one; yields every generation batch `schedule.per_batch` times.
        rows: rows of one generation batch, over all ranks.
    """
    epoch, skipped = divmod(first, schedule.per_epoch)
    skip_epochs(sampler, epoch)
    repeated = rows * schedule.per_batch
    while True:
        indices = islice(sampler, skipped * repeated, None)
        for _ in range(skipped, schedule.per_epoch):
            yield list(islice(indices, repeated))[:rows]
        skipped = 0
