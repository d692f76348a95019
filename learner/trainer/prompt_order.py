"""The generation batches of a `trl.GRPOTrainer`: when they come, and with which prompts.

Relies on TRL's internals as `learner.trainer.attach` does, in the same range of versions.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import Any, Protocol

from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from trl import GRPOTrainer

from learner.rollouts.schedule import Schedule
from shared.errors import InvalidRequest
from shared.weights import ServerState


def indexable(trainer: GRPOTrainer) -> bool:
    """Whether the order of prompts can be read ahead: an index sampler orders a dataset; streams have none."""
    return not isinstance(trainer.train_dataset, IterableDataset | TorchIterableDataset)


def schedule_of(trainer: GRPOTrainer) -> Schedule:
    """When its generation batches are trained on; known as soon as the training has begun."""
    args = trainer.args
    prompts = args.generation_batch_size // trainer.num_generations
    return Schedule(
        per_batch=args.steps_per_generation * trainer.num_iterations,
        accumulation=args.gradient_accumulation_steps,
        per_epoch=max(len(trainer.train_dataset) // prompts, 1),
        max_steps=trainer.state.max_steps,
    )


def check_slots(trainer: GRPOTrainer, state: ServerState, max_staleness: int, in_flight: str) -> None:
    """A request that runs ahead holds its adapter slot while the pushes of S generation batches come.

    Raises:
        LockstepError: `invalid_request` where a push would have to wait for it.
    """
    if in_flight != "drain" or state.apply == "merge":
        return
    micro_steps = max_staleness * trainer.args.steps_per_generation * trainer.num_iterations
    needed = -(-micro_steps // trainer.args.gradient_accumulation_steps) + 1
    if state.slots_per_run < needed:
        raise InvalidRequest(
            f"max_staleness={max_staleness}: a rollout can live through {needed - 1} pushes, and the server has only "
            f"{state.slots_per_run} adapter slots: start it with --slots-per-run {needed}, or set in_flight=keep"
        )


class ComingPrompts:
    """The prompts that this rank will be given."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        refusal = None
        if not indexable(trainer):
            refusal = "the training data is a stream, whose prompts are not known ahead"
        elif getattr(trainer, "environment_factories", None) is not None or trainer.rollout_func is not None:
            refusal = "environments and rollout functions make their prompts when they are generated"
        if refusal:
            raise InvalidRequest(f"max_staleness: {refusal}; leave it at 0")
        self._trainer = trainer
        self._known: tuple[int, list[int]] = (-1, [])

    @functools.cached_property
    def _lookahead(self) -> Lookahead:
        trainer = self._trainer
        schedule = schedule_of(trainer)
        return Lookahead(
            trainer._get_train_sampler,
            rows=trainer.args.generation_batch_size,
            repeats=schedule.per_batch,
            per_epoch=schedule.per_epoch,
        )

    def rows(self, batch: int) -> list[dict[str, Any]]:
        """This rank's dataset rows of a generation batch, one for each completion. Cheapest in ascending order."""
        trainer = self._trainer
        rows = trainer.args.generation_batch_size // trainer.accelerator.num_processes
        first = rows * trainer.accelerator.process_index
        return [trainer.train_dataset[index] for index in self._indices(batch)[first : first + rows]]

    def spare_rows(self, batch: int, count: int) -> list[dict[str, Any]]:
        """Up to `count` dataset rows that are not in a generation batch on any rank, derived from seed and batch."""
        trainer, used = self._trainer, set(self._indices(batch))
        ranks, length = trainer.accelerator.num_processes, len(trainer.train_dataset)
        drawn = random.Random(f"{trainer.args.seed}/{batch}").sample(
            range(length), min(length, count * ranks + len(used))
        )
        others = [index for index in drawn if index not in used][trainer.accelerator.process_index :: ranks]
        return [trainer.train_dataset[index] for index in others[:count]]

    def _indices(self, batch: int) -> list[int]:
        if self._known[0] != batch:
            self._known = batch, self._lookahead.indices(batch)
        return self._known[1]

    def token_ids(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Token ids of the rows' prompts [B][P], templated as TRL does it."""
        return [list(ids) for ids in self._trainer._tokenize_prompts([row["prompt"] for row in rows])[0]]


class IndexSampler(Protocol, Sized):
    """What is needed of `trl.trainer.utils.RepeatSampler`: each iteration is one epoch."""

    def __iter__(self) -> Iterator[int]: ...


def skip_epochs(sampler: IndexSampler, epochs: int) -> None:
    """Bring a fresh sampler to where it is after so many epochs: an epoch's order is drawn at its first index."""
    for _ in range(epochs):
        next(iter(sampler))


class Lookahead:
    """Dataset indices of any generation batch, in the order in which TRL's sampler yields them.

    Args:
        make_sampler: a new sampler, as the trainer's loader got one.
        rows: rows of one generation batch, over all ranks.
        repeats: how often the sampler yields every generation batch.
        per_epoch: generation batches per epoch.
    """

    def __init__(self, make_sampler: Callable[[], IndexSampler], *, rows: int, repeats: int, per_epoch: int) -> None:
        self._make_sampler = make_sampler
        self._rows, self._repeats, self._per_epoch = rows, repeats, per_epoch
        self._next = -1
        self._indices: Iterator[int] = iter(())
        self._sampler: IndexSampler | None = None

    def indices(self, batch: int) -> list[int]:
        """Indices into the dataset [rows], one per completion. Cheapest in ascending order of `batch`."""
        epoch, within = divmod(batch, self._per_epoch)
        if batch != self._next:
            self._sampler = self._make_sampler()
            skip_epochs(self._sampler, epoch)
            self._indices = iter(self._sampler)
            self._take(within * self._rows * self._repeats)
        elif within == 0 and self._sampler is not None:
            self._indices = iter(self._sampler)
        self._next = batch + 1
        return self._take(self._rows * self._repeats)[: self._rows]

    def _take(self, count: int) -> list[int]:
        return list(islice(self._indices, count))
