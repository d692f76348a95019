"""Where an adapter's modules lie in the live weights of a model that runs without LoRA: fused and sharded ones too.

A linear layer of vLLM holds its weight as [out, in]. A fused layer (q, k, v of `qkv_proj`) stacks the parts of several
modules; with tensor parallelism every worker holds some rows of each part, or some columns of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rollout_server.vllm_compat import versions
from rollout_server.worker.slot_layout import refuse_misfits
from shared.adapter_file import LORA_A, LORA_B


@dataclass(frozen=True)
class Block:
    """One part of a layer: rows [first, first + rows) of `total` output features are on this worker, from row `at` of
    its weight on; so are the input features [column, column + columns).
    """

    layer: str
    weight: torch.Tensor
    at: int
    rows: int
    first: int
    total: int
    column: int
    columns: int

    @property
    def live(self) -> torch.Tensor:
        """This part of the weight that the engine computes with, as a view [rows, columns]."""
        return self.weight[self.at : self.at + self.rows]


@dataclass(frozen=True)
class Target:
    """One linear layer as PEFT knows it: a part of a fused layer, or all parts of a layer that is fused there too."""

    blocks: tuple[Block, ...]
    in_features: int

    @property
    def out_features(self) -> int:
        """Over all workers."""
        return sum(block.total for block in self.blocks)


def targets(worker: Any) -> dict[str, Target]:
    """Served name -> layer, for every linear layer whose live weight can be written."""
    model = worker.get_model()
    packed = versions.packed_modules(model)
    found: dict[str, Target] = {}
    for name, layer in versions.plain_linears(model).items():
        parts, (column, columns) = versions.linear_parts(layer)
        weight = layer.weight.data
        if weight.shape != (sum(rows for rows, _, _ in parts), columns):
            continue  # stored in some way of its own
        blocks, at = [], 0
        for rows, first, total in parts:
            blocks.append(Block(name, weight, at, rows, first, total, column, columns))
            at += rows
        parent, _, own = name.rpartition(".")
        names = packed.get(own, [own])
        if len(names) == len(blocks):
            groups: list[tuple[Block, ...]] = [(block,) for block in blocks]
        elif len(names) == 1:
            groups = [tuple(blocks)]
        else:
            continue
        for part, group in zip(names, groups, strict=True):
            found[f"{parent}.{part}" if parent else part] = Target(group, int(layer.input_size))
    return found


def check(worker: Any, known: dict[str, Target], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Compare announced shapes with the served model; a refusal, or None if they fit. Touches nothing."""
    features = {name: (target.in_features, target.out_features) for name, target in known.items()}
    return refuse_misfits(worker.get_model(), features, shapes)


@dataclass(frozen=True)
class Update:
    """What one block gets: its W0 plus b @ a, views of this worker's share of B [rows, rank] and A [rank, columns]."""

    block: Block
    a: torch.Tensor
    b: torch.Tensor


def plan(worker: Any, known: dict[str, Target], tensors: dict[str, torch.Tensor]) -> list[Update]:
    """The updates of all blocks that an adapter touches.

    Args:
        tensors: NAME.lora_A.weight [rank, in] and NAME.lora_B.weight [out, rank], as `check` has accepted them.
    """
    updates = []
    for name in (name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)):
        a, b = tensors[name + LORA_A], tensors[name + LORA_B]
        start = 0
        for block in known[versions.vllm_module_name(worker.get_model(), name)].blocks:
            rows = b[start + block.first : start + block.first + block.rows]
            updates.append(Update(block, a[:, block.column : block.column + block.columns], rows))
            start += block.total
    return updates
