"""The trainer, as rollouts, pushes and step metrics see it; `learner.trainer.internals.TrlTrainer` is TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from accelerate import Accelerator

    from learner.rollouts.schedule import Schedule


class ComingPrompts(Protocol):
    """This rank's prompts in coming generation batches; called on the trainer's thread."""

    def rows(self, batch: int) -> list[dict[str, Any]]:
        """Return the dataset rows of a generation batch, one for each completion. Cheapest in ascending order."""

    def spare_rows(self, batch: int, count: int) -> list[dict[str, Any]]:
        """Return up to `count` dataset rows of the batches around a generation batch, drawn by seed and batch."""

    def token_ids(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Return the token ids of the rows' prompts [B][P], templated as for training."""


class Trainer(Protocol):
    """A GRPO trainer."""

    accelerator: Accelerator
    output_dir: Path
    seed: int
    num_generations: int

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def micro_step(self) -> int:
        """Forward-backward passes done."""

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the complete training."""

    @property
    def schedule(self) -> Schedule:
        """When generation batches are trained on; known once the training has begun."""

    @property
    def generation_batch(self) -> int:
        """Number of the present generation batch, counted from 0 over the complete training."""

    @property
    def first_row(self) -> int:
        """This rank's first row among the rows of a generation batch."""

    @property
    def is_training(self) -> bool:
        """False during evaluation."""

    def coming_prompts(self) -> ComingPrompts:
        """Return the prompts that this rank will be given."""

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Return the share of this rank's peak FLOP/s that training on so many tokens a second takes; None: unknown."""

    def latest(self, metric: str) -> float | None:
        """Return the last value of a training metric; None where nothing was generated since the last log."""

    def log(self, metric: str, value: float) -> None:
        """Add to the metrics of the trainer's next log."""
