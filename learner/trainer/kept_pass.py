"""A scoring pass whose graph is kept for the backward pass: one forward pass a step where two would be the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from trl import GRPOTrainer

from learner.passes.packing import PackedPass, Row


class KeptPass(NamedTuple):
    """The rows of a generation batch, and the one pass that scored them all.

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


def keeps_passes(trainer: GRPOTrainer) -> bool:
    """Whether every generation batch is one optimizer step of one rank, whose activations are not recomputed."""
    args = trainer.args
    return (
        trainer.accelerator.num_processes == 1
        and args.steps_per_generation == args.gradient_accumulation_steps
        and trainer.num_iterations == 1
        and not args.gradient_checkpointing
    )


def _key(row: Row) -> object:
    return tuple(row.prompt), tuple(row.completion), tuple(row.parts)
