"""When each generation batch is trained on, in TRL's micro-steps and optimizer steps, and how stale a sample is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Generation batches are numbered from 0 over the complete training, epochs included.

    Attributes:
        per_batch: micro-steps that train on one generation batch: TRL's `steps_per_generation * num_iterations`.
        accumulation: micro-steps per optimizer step; the last one of an epoch may have fewer.
        per_epoch: generation batches per epoch.
        max_steps: optimizer steps of the complete training.
        iterations: how often each row is trained on: TRL's `num_iterations`.
    """

    per_batch: int
    accumulation: int
    per_epoch: int
    max_steps: int
    iterations: int = 1

    @property
    def batches_per_step(self) -> float:
        """Rows that an optimizer step trains on, as a part or a multiple of those of a generation batch."""
        return self.accumulation * self.iterations / self.per_batch

    @property
    def _epoch_micro_steps(self) -> int:
        return self.per_epoch * self.per_batch

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self._epoch_micro_steps // self.accumulation)

    def batch_at(self, micro_step: int) -> int:
        """Return the generation batch that a micro-step trains on."""
        return micro_step // self.per_batch

    def next_batch(self, micro_step: int) -> int:
        """Return the first generation batch that has not begun before this micro-step."""
        return -(-micro_step // self.per_batch)

    def epoch_at(self, step: int) -> int:
        """Return the epochs completed after so many optimizer steps."""
        return step // self.epoch_steps

    def first_step(self, batch: int) -> int:
        """Return the optimizer steps done when the training on a batch begins."""
        epoch, within = divmod(batch * self.per_batch, self._epoch_micro_steps)
        return epoch * self.epoch_steps + within // self.accumulation

    @property
    def last_batch(self) -> int:
        """The last generation batch that is trained on."""
        epochs, steps = divmod(self.max_steps, self.epoch_steps)
        within = min(steps * self.accumulation, self._epoch_micro_steps)
        return (epochs * self._epoch_micro_steps + within - 1) // self.per_batch

    def staleness(self, batch: int, step: int) -> int:
        """Return how many generation batches, up to `batch`, begin with newer weights than those of `step`."""
        newest = batch
        while newest > 0 and self.first_step(newest) > step:
            newest -= 1
        return batch - newest
