"""Map an adapter's modules to the live weights of a model that runs without LoRA, fused and sharded layers included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rollout_server.vllm_compat import linears
from shared.adapter_file import LORA_A, LORA_B


@dataclass(frozen=True)
class WeightShard:
    """A module's part of a layer on this worker: rows of `weight` from `row` on, `columns` (first, count) of A."""

    layer: str
    weight: torch.Tensor
    row: int
    part: linears.Part
    columns: tuple[int, int]

    @property
    def live(self) -> torch.Tensor:
        """The weight that the engine computes with, as a view [rows, columns]."""
        return self.weight[self.row : self.row + self.part.rows]


class MergeTarget(NamedTuple):
    """A linear layer as PEFT knows it: one part of a fused layer, or all parts if PEFT's layer is fused too."""

    shards: list[WeightShard]
    shape: linears.ModuleShape


def merge_targets(worker: Any) -> dict[str, MergeTarget]:
    """Return served name -> target, for every linear layer whose live weight can be written."""
    found = {}
    for layer in linears.live_linears(worker):
        row = 0
        for module, parts in layer.modules.items():
            shards = []
            for part in parts:
                shards.append(WeightShard(layer.name, layer.weight, row, part, layer.columns))
                row += part.rows
            shape = linears.ModuleShape(layer.in_features, sum(part.total for part in parts))
            found[module] = MergeTarget(shards, shape)
    return found


class ShardUpdate(NamedTuple):
    """Update of one shard to W0 + b @ a: views of this worker's share of B [rows, rank] and A [rank, columns]."""

    shard: WeightShard
    a: torch.Tensor
    b: torch.Tensor


def plan_updates(worker: Any, targets: dict[str, MergeTarget], tensors: dict[str, torch.Tensor]) -> list[ShardUpdate]:
    """Return the updates of all shards that an adapter touches.

    Args:
        tensors: NAME.lora_A.weight [rank, in] and NAME.lora_B.weight [out, rank] of a layout that fits.
    """
    updates = []
    for name in (name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)):
        a, b = tensors[name + LORA_A], tensors[name + LORA_B]
        start = 0
        for shard in targets[linears.vllm_module_name(worker.get_model(), name)].shards:
            (column, columns), first = shard.columns, start + shard.part.first
            updates.append(ShardUpdate(shard, a[:, column : column + columns], b[first : first + shard.part.rows]))
            start += shard.part.total
    return updates
