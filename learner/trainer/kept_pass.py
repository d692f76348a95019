"""A scoring pass whose graph is kept for the backward pass: one forward pass a step where two would be the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from trl import GRPOTrainer

from learner.adapters.exporter import active_adapter, lora_layers
from learner.passes.packing import PackedPass, Row


class KeptPass(NamedTuple):
    """The rows of a generation batch, and the one pass that scored them all.

    Until its backward pass nothing may write the adapter, nor s B beside the weights (`lora_product`).

    Attributes:
        values: logprobs and entropies [N] of the pass, with their graph.
    """

    rows: Sequence[Row]
    packed: PackedPass
    values: tuple[torch.Tensor, torch.Tensor]

    def order_of(self, rows: Sequence[Row]) -> list[int] | None:
        """Return where in `rows` each row of the pass is; None unless both are the same rows in any order."""
        places = defaultdict[object, list[int]](list)
        for number, row in enumerate(rows):
            places[_key(row)].append(number)
        if len(rows) != len(self.rows):
            return None
        found = [own.pop() if (own := places[_key(row)]) else None for row in self.rows]
        order = [number for number in found if number is not None]
        return order if len(order) == len(found) else None


class Keeping:
    """Tells which scoring passes keep their graph.

    Of one rank whose generation batches are one optimizer step each; where no activation is recomputed, and no reward
    model computes on the same device between scoring and the backward pass.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        args = trainer.args
        self._model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
        adapter = active_adapter(self._model)
        self._adapters = [adapter]
        self._layer = next(iter(lora_layers(self._model, adapter).values()), None)
        self._one_step = (
            trainer.accelerator.num_processes == 1
            and args.steps_per_generation == args.gradient_accumulation_steps
            and trainer.num_iterations == 1
            and not any(isinstance(reward, nn.Module) for reward in trainer.reward_funcs)
        )
        self._recomputes = True

    def look(self) -> None:
        """See whether the model recomputes activations. TRL has it stop that while it scores."""
        if self._one_step:
            self._recomputes = bool(self._model.is_gradient_checkpointing)

    @property
    def keeps(self) -> bool:
        """Whether a pass of the model as it is now is the policy's, and would be run again."""
        layer = self._layer
        is_policy = layer is not None and layer.active_adapters == self._adapters and not layer.disable_adapters
        return self._one_step and is_policy and not self._recomputes


def _key(row: Row) -> object:
    return tuple(row.prompt), tuple(row.completion), tuple(row.parts)
