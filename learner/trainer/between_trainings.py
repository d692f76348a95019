"""What hooks have to forget between two trainings of their trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback


def forget_between_trainings(trainer: Trainer, forget: Callable[[], object]) -> None:
    """Call `forget` when a training begins: steps count from 0 again, so one of before would be taken for the present.

    TRL goes on with the rows that were left of a generation batch. And when it ends: a step that a callback has stopped
    leaves tensors behind.
    """
    known = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, _Forgetting)]
    if not known:  # transformers warns of a second callback of a class
        known = [_Forgetting()]
        trainer.add_callback(known[0])
    known[0].actions.append(forget)


class _Forgetting(TrainerCallback):
    def __init__(self) -> None:
        self.actions: list[Callable[[], object]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for forget in self.actions:
            forget()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for forget in self.actions:
            forget()
