"""Fit an adapter into slots: check PEFT's modules against the served model's, and pair tensors with their places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from rollout_server.vllm_compat import linears, lora_slots
from rollout_server.worker import strided_copies
from shared.adapter_file import LORA_A, LORA_B, Layout
from shared.errors import RankTooHigh, ShapeMismatch, UnsupportedAdapter


def lora_pairs(tensors: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return PEFT's module name -> A and B, from NAME.lora_A.weight and NAME.lora_B.weight."""
    names = [name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)]
    return {name: (tensors[name + LORA_A], tensors[name + LORA_B]) for name in names}


def check_fits(model: Any, served: dict[str, linears.ModuleShape], layout: Layout) -> None:
    """Compare an announced layout with the served modules' shapes by name.

    Raises `unsupported_adapter` for a module that is not served, `shape_mismatch`, `rank_too_high`.
    """
    shapes = lora_pairs({entry.name: entry.shape for entry in layout.entries})
    named: dict[str, str] = {}
    for peft_name, ((rank, in_features), (out_features, _)) in shapes.items():
        served_name = linears.vllm_module_name(model, peft_name)
        if (other := named.setdefault(served_name, peft_name)) != peft_name:
            raise UnsupportedAdapter(f"{other} and {peft_name} are one layer of the served model: send one of them")
        expected = served.get(served_name)
        if expected is None:
            kinds = sorted({name.rpartition(".")[2] for name in served})
            raise UnsupportedAdapter(
                f"the served model has no LoRA-capable linear layer {peft_name!r}; choose target_modules among its "
                f"kinds: {', '.join(kinds)}"
            )
        if (in_features, out_features) != expected[:2]:
            raise ShapeMismatch(
                f"{peft_name}: the adapter maps {in_features} to {out_features} features, "
                f"the served layer {expected.in_features} to {expected.out_features}"
            )
        if rank > expected.max_rank:
            raise RankTooHigh(f"{peft_name}: rank {rank} does not fit into the slot")
    for served_name, peft_name in named.items():
        if part := next((named[part] for part in served[served_name].parts if part in named), None):
            raise UnsupportedAdapter(f"{part} and {peft_name} are one layer of the served model: send one of them")


class CopyGroup:
    """Views of the buffer and of a slot that are copied into each other, in pairs; never empty."""

    def __init__(self, pairs: list[lora_slots.Pair]) -> None:
        self.received, self.slot = [received for received, _ in pairs], [slot for _, slot in pairs]
        apart = not all(view.is_contiguous() for pair in pairs for view in pair)
        self._strided = strided_copies.StridedCopies(pairs) if apart and strided_copies.takes(pairs) else None

    def write(self) -> None:
        """Copy from the buffer into the slot."""
        if self._strided:
            self._strided.copy()
        else:
            torch._foreach_copy_(self.slot, self.received)

    def read_back(self) -> None:
        """Copy from the slot into the buffer, which is cleared before."""
        torch._foreach_zero_(self.received)
        if self._strided:
            self._strided.copy(back=True)
        else:
            torch._foreach_copy_(self.received, self.slot)


class CopyPlan(NamedTuple):
    """Where the tensors of a buffer go: each to one place, of which it is read back, and some to more."""

    groups: list[CopyGroup]
    repeated: list[lora_slots.Pair]


def plan_copies(worker: Any, index: int, tensors: dict[str, torch.Tensor]) -> CopyPlan:
    """Find the place of every tensor in a slot; with tensor parallelism, of this worker's shard.

    Args:
        index: of the slot (`lora_slots.slot_index`).
        tensors: NAME.lora_A.weight [rank, in] and NAME.lora_B.weight [out, rank], in a buffer that stays.

    Raises:
        ValueError: not every tensor has a place; `check_fits` would have refused the adapter.
    """
    named, model = lora_pairs(tensors), worker.get_model()
    by_name = {linears.vllm_module_name(model, name): pair for name, pair in named.items()}
    pairs: list[lora_slots.Pair] = []
    placed = 0
    for each in lora_slots.lora_layers(worker):
        layer = each.with_parts_in(by_name)
        parts = [by_name.get(module) for module in layer.modules]
        if any(parts):
            placed += sum(part is not None for part in parts)
            pairs += layer.slot_pairs(index, parts)
    if placed != len(named):
        raise ValueError(f"{placed} of {len(named)} modules found a place in slot {index}")
    buffers = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    if not {view.untyped_storage().data_ptr() for view, _ in pairs} <= buffers:
        raise ValueError("vLLM cut a shard as a copy: it would stay as it is at the next push")
    first: dict[tuple[int, torch.Size], lora_slots.Pair] = {}
    repeated = [pair for pair in pairs if first.setdefault((pair[0].data_ptr(), pair[0].shape), pair) is not pair]
    return CopyPlan(group_copies(list(first.values())), repeated)


def group_copies(pairs: list[lora_slots.Pair]) -> list[CopyGroup]:
    """Group the copies: those of contiguous tensors, which torch copies in a few kernels, apart from the others."""
    groups: dict[bool, list[lora_slots.Pair]] = {}
    for pair in pairs:
        groups.setdefault(all(view.is_contiguous() for view in pair), []).append(pair)
    return [CopyGroup(group) for group in groups.values()]
