"""What a hook has to forget when its trainer trains again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class AtBegin(TrainerCallback):
    """Calls `forget` when a training begins: steps count from 0 again, so one of before would be taken for the present.

    TRL goes on with the rows that were left of a generation batch.
    """

    def __init__(self, forget: Callable[[], object]) -> None:
        self._forget = forget

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See `TrainerCallback`."""
        self._forget()
