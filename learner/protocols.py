"""What a session needs of the trainer; `learner.trainer.attach.TrainerSide` answers it for TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from learner.rollouts.schedule import Schedule


class Coming(Protocol):
    """This rank's prompts in generation batches to come; called on the trainer's thread."""

    def rows(self, batch: int) -> list[dict[str, Any]]: ...
    def spare_rows(self, batch: int, count: int) -> list[dict[str, Any]]: ...
    def token_ids(self, rows: list[dict[str, Any]]) -> list[list[int]]: ...


class Trainer(Protocol):
    """A GRPO trainer, as far as rollouts, pushes and figures are concerned."""

    accelerator: Accelerator
    output_dir: Path
    seed: int

    @property
    def step(self) -> int: ...
    @property
    def micro_step(self) -> int: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def first_row(self) -> int: ...
    @property
    def is_training(self) -> bool: ...
    def coming_prompts(self) -> Coming: ...
    def latest(self, metric: str) -> float | None: ...
    def log(self, metric: str, value: float) -> None: ...
