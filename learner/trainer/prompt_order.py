"""The order of generation batches of a `trl.GRPOTrainer`: when they are trained on, and with which prompts."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from trl import GRPOTrainer

from learner.rollouts.schedule import Schedule
from learner.trainer.images import image_rows, sees_images, token_ids


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


def steps_in_all(trainer: GRPOTrainer) -> int | None:
    """Return the optimizer steps of the complete training, before it begins; None: as many as a stream has."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * schedule_of(trainer).epoch_steps) if indexable(trainer) else None


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
        self._known: dict[int, list[int]] = {}
        self._coming, self._next, self._reach = iter(list[list[int]]()), -1, 0

    def rows(self, batch: int) -> list[dict[str, Any]]:
        dataset, rows = self._trainer.train_dataset, rows_of_rank(self._trainer)
        indices = self._indices(batch, batch)[batch][rows.start : rows.stop]
        own = {index: dataset[index] for index in dict.fromkeys(indices)}  # read once: Arrow takes its time
        if not sees_images(self._trainer):  # a reward may write into its row
            return [copy.deepcopy(own[index]) for index in indices]
        return image_rows(self._trainer, [dict(own[index]) for index in indices])

    def spare_rows(self, batch: int, count: int) -> list[dict[str, Any]]:
        trainer, per_epoch = self._trainer, schedule_of(self._trainer).per_epoch
        ranks, prompts = (
            trainer.accelerator.num_processes,
            trainer.args.generation_batch_size // trainer.num_generations,
        )
        # Twice as many batches as are needed, around this one, of its epoch.
        self._reach = -(-count * ranks // prompts)
        begin = batch - batch % per_epoch
        end = begin + per_epoch - 1
        first = max(begin, min(batch - self._reach, end - 2 * self._reach))
        near = self._indices(first, min(end, first + 2 * self._reach))
        used = set(near[batch])
        others = [index for index in dict.fromkeys(i for each in near.values() for i in each) if index not in used]
        if not others and indexable(trainer):  # an epoch of one batch: of those that it leaves out
            others = [index for index in range(len(trainer.train_dataset)) if index not in used]
        drawn = random.Random(f"{trainer.args.seed}/{batch}").sample(others, min(len(others), count * ranks))
        own = drawn[trainer.accelerator.process_index :: ranks]
        return image_rows(trainer, [trainer.train_dataset[index] for index in own])

    def token_ids(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        return token_ids(self._trainer, rows)

    def _indices(self, first: int, last: int) -> dict[int, list[int]]:
        """Return the dataset indices of the generation batches from `first` to `last`."""
        if first not in self._known and first != self._next:
            trainer, schedule = self._trainer, schedule_of(self._trainer)
            rows = trainer.args.generation_batch_size
            self._coming = coming_indices(trainer._get_train_sampler(), rows=rows, schedule=schedule, first=first)
            self._known, self._next = {}, first
        while self._next <= last:
            self._known[self._next] = next(self._coming)
            self._next += 1
        self._known = {batch: indices for batch, indices in self._known.items() if batch >= first - 2 * self._reach}
        return {batch: self._known[batch] for batch in range(first, last + 1)}


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
