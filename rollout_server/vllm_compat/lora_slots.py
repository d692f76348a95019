"""vLLM's adapter slots in plain terms: which there are, which adapter each holds, and how a layer's tensors lie in one.

vLLM keeps A as [slots, 1, rank, in] and B as [slots, 1, out, rank], one pair per slice of a fused layer (q, k, v of
`qkv_proj`), and cuts this worker's tensor-parallel shard out of full tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import Any

import torch

from rollout_server.vllm_compat import lora_columns
from rollout_server.vllm_compat.linears import ModuleShape, assign_parts, linear_parts, shapes_of
from rollout_server.vllm_compat.versions import lora_request

Pair = tuple[torch.Tensor, torch.Tensor]


def _manager(worker: Any) -> Any:
    return worker.model_runner.lora_manager._adapter_manager


def pin_empty_adapter(worker: Any, slot_id: int, rank: int) -> None:
    """Register a zero adapter of `rank` under `slot_id`, put it into a GPU slot and pin it there for good."""
    manager = worker.model_runner.lora_manager
    manager.add_dummy_lora(lora_request(f"slot-{slot_id}", slot_id), rank=rank)
    _manager(worker).activate_adapter(slot_id)
    manager.pin_adapter(slot_id)


def slot_index(worker: Any, slot_id: int) -> int:
    """Return the present index of the adapter `slot_id` in the stacked buffers."""
    return _manager(worker).lora_index_to_id.index(slot_id)


def swap_adapters(worker: Any, one: int, other: int) -> None:
    """Exchange the slots of two pinned adapters between two engine steps. No tensor moves."""
    manager = _manager(worker)
    order = manager.lora_index_to_id
    i, j = order.index(one), order.index(other)
    order[i], order[j] = order[j], order[i]
    manager._last_mapping = None  # or a batch that stays the same would keep the old slot


def slot_bytes(worker: Any) -> int:
    """Return the memory of one slot, over all layers."""
    manager = _manager(worker)
    # One tensor per module, or one per slice of a fused module; of all slots together.
    stacks = [stack for module in manager.modules.values() for stack in (module.lora_a_stacked, module.lora_b_stacked)]
    nbytes = sum(t.nbytes for stack in stacks for t in ((stack,) if isinstance(stack, torch.Tensor) else stack))
    return nbytes // len(manager.lora_index_to_id)


def lora_layers(worker: Any) -> list[LoraLayer]:
    """Return all linear layers with adapter slots; lm_head and embeddings are never adapted."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    manager = _manager(worker)
    linears = [(n, module) for n, module in manager.modules.items() if isinstance(module, BaseLinearLayerWithLoRA)]
    return [LoraLayer(module, manager.packed_modules.get(name, [name]), name) for name, module in linears]


def install() -> None:
    """Let vLLM's LoRA of a fused q, k, v layer know value heads of their own size. Call it before the model is made.

    It takes the keys' size for them, and its warm-up fails.
    """
    from vllm.lora.layers import MergedQKVParallelLinearWithLoRA as Layer

    make = Layer.__init__

    def make_with_value_heads(self: Any, base_layer: Any) -> None:
        make(self, base_layer)
        q, k, _ = self.output_slices
        self.output_slices = (q, k, linear_parts(base_layer)[0][2].rows)

    if not hasattr(make, "__wrapped__"):
        Layer.__init__ = functools.wraps(make)(make_with_value_heads)


class LoraLayer:
    """A linear layer with adapter slots."""

    def __init__(self, module: Any, names: list[str], name: str) -> None:
        self._module, self.name = module, name
        self._parts = linear_parts(module.base_layer)[0]
        #: PEFT's, under the served model's names -> their parts; none where the slots are not cut as the parts are.
        self.modules = assign_parts(names, self._parts) if self._has_place(names) else {}

    def _has_place(self, names: list[str]) -> bool:
        """Return whether slots have a slice for each part, or one for all parts of a single module."""
        rows = [stack.shape[2] for stack in self._module.lora_b_stacked]
        own = [part.rows for part in self._parts]
        if len(own) == 1 and len(rows) == 1:
            return True  # of a row-parallel layer with fully sharded LoRA it is a share
        return rows == own or (len(names) == 1 and rows == [sum(own)])

    def shapes(self) -> dict[str, ModuleShape]:
        """Return the shape of each module, and of all as one."""
        # With fully sharded LoRA each worker keeps a part of the rank.
        shards = self._module.tp_size if self._module.lora_config.fully_sharded_loras else 1
        max_rank = self._module.lora_a_stacked[0].shape[-2] * shards
        return shapes_of(self.name, self.modules, int(self._module.base_layer.input_size), max_rank)

    def with_parts_in(self, adapter: Container[str]) -> LoraLayer:
        """Return the layer as an adapter has it: with one module for all parts, if it names that (`shapes_of`)."""
        as_one = len(self.modules) > 1 and self.name in adapter and self.name not in self.modules
        return LoraLayer(self._module, [self.name], self.name) if as_one else self

    @property
    def in_columns(self) -> bool:
        """Whether its slots are columns of the base's weight."""
        return lora_columns.computes_in_columns(self._module)

    def clear(self, index: int) -> None:
        """Set the slot to the zero adapter."""
        for stack in (*self._module.lora_a_stacked, *self._module.lora_b_stacked):
            stack[index].zero_()

    def slot_pairs(self, index: int, tensors: list[Pair | None]) -> list[Pair]:
        """Pair this worker's shard of an adapter with its place in the slot.

        A module that is several slices of the layer has one B, cut into them, and its A in each.

        `tensors`: for each of `modules` full A [rank, in] and B [out, rank]; None if the adapter leaves it out.
        """
        pairs = []
        stacks = (self._module.lora_a_stacked, self._module.lora_b_stacked)
        for slices, stack in zip(self._shards(tensors), stacks, strict=True):
            for views, slice_stack in zip(slices, stack, strict=True):
                row = 0
                for view in views:
                    pairs.append((view, slice_stack[index, 0, row : row + view.shape[0], : view.shape[1]]))
                    row += view.shape[0]
        return pairs

    def _shards(self, tensors: list[Pair | None]) -> tuple[list[list[Any]], list[list[Any]]]:
        """Return this worker's A and B of every slice: views that lie one below the other in the slot."""
        module, fused = self._module, len(self._module.lora_b_stacked) == 1
        if len(self._parts) == 1 and fused:
            assert tensors[0]
            a, b = tensors[0]
            return ([[a]], [[b]]) if module.tp_size == 1 else ([[module.slice_lora_a(a)]], [[module.slice_lora_b(b)]])
        # Not by vLLM, which knows neither modules of several slices nor, for Phi-3's `qkv_proj`, views: it copies.
        all_a: list[Any] = []
        all_b: list[Any] = []
        for pair, parts in zip(tensors, self.modules.values(), strict=True):
            start = 0
            for part in parts:
                all_a.append(pair and pair[0])
                all_b.append(pair and pair[1][start + part.first : start + part.first + part.rows])
                start += part.total
        if fused:
            a = all_a[0] if module.tp_size == 1 else module.slice_lora_a(all_a[0])
            return [[a]], [all_b]
        if module.tp_size > 1:
            all_a = module.slice_lora_a(all_a)  # of fully sharded LoRA it keeps a share of the rank
        return [[] if a is None else [a] for a in all_a], [[] if b is None else [b] for b in all_b]
