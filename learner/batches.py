"""The generation batches of a `trl.GRPOTrainer`: when they come, and with which prompts.

Relies on TRL's internals as `learner.attach` does, in the same range of versions.
"""

from __future__ import annotations

import functools

from datasets import Dataset
from trl import GRPOTrainer

from learner.lookahead import Lookahead
from learner.schedule import Schedule
from shared.errors import ErrorCode, LockstepError


def indexable(trainer: GRPOTrainer) -> bool:
    """Whether the order of prompts can be read ahead: an index sampler orders a dataset; streams have none."""
    return isinstance(trainer.train_dataset, Dataset)


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


class ComingPrompts:
    """The prompts that this rank will be given."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        refusal = None
        if not indexable(trainer):
            refusal = "the training data is a stream, whose prompts are not known ahead"
        elif getattr(trainer, "environment_factories", None) is not None or trainer.rollout_func is not None:
            refusal = "environments and rollout functions make their prompts when they are generated"
        if refusal:
            raise LockstepError(ErrorCode.INVALID_REQUEST, f"max_staleness: {refusal}; leave it at 0")
        self._trainer = trainer

    @functools.cached_property
    def _lookahead(self) -> Lookahead:
        trainer = self._trainer
        schedule = schedule_of(trainer)
        return Lookahead(
            trainer._get_train_sampler, rows=trainer.args.generation_batch_size, repeats=schedule.per_batch,
            per_epoch=schedule.per_epoch,
        )  # fmt: skip

    def token_ids(self, batch: int) -> list[list[int]]:
        """Token ids of this rank's rows of a generation batch [B][P], templated as TRL does it."""
        trainer = self._trainer
        rows = trainer.args.generation_batch_size // trainer.accelerator.num_processes
        first = rows * trainer.accelerator.process_index
        indices = self._lookahead.indices(batch)[first : first + rows]
        prompts = [trainer.train_dataset[index]["prompt"] for index in indices]
        return [list(ids) for ids in trainer._tokenize_prompts(prompts)[0]]
