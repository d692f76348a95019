"""Compile the layers that a training passes through, where that is asked for or pays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from transformers import TrainerCallback
from trl import GRPOTrainer

from learner.passes.compiled import CompiledLayers
from shared.errors import InvalidRequest

logger = logging.getLogger("lockstep.passes")

Compile = Literal["auto", "on", "off"]
#: What compiled layers save of a training's time, and what compiling takes; on the careful side of
#: docs/measurements.md, "a learner's passes".
_SAVED, _COST_S = 0.25, 60.0
#: The first steps find out how large a pass may be.
_JUDGED_STEP = 3


def compile_layers(trainer: GRPOTrainer, choice: Compile, train_seconds: Callable[[], float]) -> CompiledLayers | None:
    """Compile the decoder layers of a trainer whose passes are packed; return them if that is done at once.

    Args:
        choice: on: at once. auto: on a GPU, after a few steps, if what is left of the training is long enough.
        train_seconds: returns for how long the last step trained.

    Raises:
        LockstepError: `invalid_request` if layers are to be compiled for a CPU.
    """
    gpu = trainer.accelerator.device.type == "cuda"
    if choice == "on" and not gpu:
        raise InvalidRequest("compile: layers are compiled for GPUs only; leave it at auto, or set it to off")
    # Resumed trainings would have to compile at the same step to make the same updates.
    if choice == "on" or (choice == "auto" and gpu and not trainer.args.full_determinism):
        callback = _CompileWhereItPays(trainer, train_seconds, at_once=choice == "on")
        trainer.add_callback(callback)
        return callback.layers
    return None


class _CompileWhereItPays(TrainerCallback):
    def __init__(self, trainer: GRPOTrainer, train_seconds: Callable[[], float], *, at_once: bool) -> None:
        self._trainer, self._train_seconds = trainer, train_seconds
        self._steps = 0
        self.layers = CompiledLayers(trainer.model) if at_once else None
        self._seconds: list[float] | None = [] if at_once else None  # of the first steps with compiled layers

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps += 1
        if self._seconds is not None:
            self._tell_cost(self._seconds)
        elif self.layers is None and self._steps == _JUDGED_STEP:
            seconds, left = self._train_seconds(), state.max_steps - state.global_step
            if pays(seconds, left):
                self.layers, self._seconds = CompiledLayers(self._trainer.model), []
                logger.info("compiling layers, which takes about a minute: %d steps of %.1f s are left", left, seconds)
            else:
                logger.info("layers are not compiled: %d steps of %.1f s would not make up for it", left, seconds)

    def _tell_cost(self, seconds: list[float]) -> None:
        """Say what compiling took once a step has passed in which nothing was compiled."""
        seconds.append(self._train_seconds())
        if len(seconds) == 2:
            compiling, compiled = seconds
            self._seconds = None
            if self.layers and self.layers.active:
                logger.info(
                    "compiling layers took %.0f s: a step trains for %.1f s now", compiling - compiled, compiled
                )


def pays(train_seconds: float, steps: int) -> bool:
    """Return whether compiling saves at least twice the time that it takes.

    Example:
        assert pays(3.0, 200) and not pays(3.0, 100)
    """
    return train_seconds * steps * _SAVED >= 2 * _COST_S
