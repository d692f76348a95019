"""How an adapter lies in one of vLLM's slots: PEFT's modules against the served model's, fused and sharded ones too.

vLLM keeps A as [max_loras, 1, rank, in] and B as [max_loras, 1, out, rank], one pair per slice of a fused layer
(q, k, v of `qkv_proj`). `set_lora` takes full tensors and cuts out this worker's tensor-parallel shard itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rollout_server.vllm_compat import versions
from shared.adapter_file import LORA_A, LORA_B
from shared.errors import ErrorCode

Pair = tuple[torch.Tensor, torch.Tensor]
Views = list[torch.Tensor]


def describe(worker: Any) -> dict[str, Any]:
    """What this worker can adapt, and the memory that a slot takes."""
    manager = versions.lora_manager(worker)
    modules = manager.modules.values()
    # One tensor per module, or one per slice of a fused module; of all slots together.
    stacks = [stack for module in modules for stack in (module.lora_a_stacked, module.lora_b_stacked)]
    nbytes = sum(t.nbytes for stack in stacks for t in ((stack,) if isinstance(stack, torch.Tensor) else stack))
    return {
        "modules": len(modules),
        "linear": sum(_is_linear(module) for module in modules),
        "slot_bytes": nbytes // len(manager.lora_index_to_id),
    }


def check(worker: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Compare announced shapes with the served model; a refusal, or None if they fit. Touches nothing.

    Args:
        shapes: NAME.lora_A.weight -> (rank, in_features), NAME.lora_B.weight -> (out_features, rank).
    """
    targets = _targets(worker)
    features = {name: (_in_features(module), _out_features(module, part)) for name, (module, part) in targets.items()}
    model = versions.lora_manager(worker).model
    if refusal := refuse_misfits(model, features, shapes):
        return refusal
    for tensor, (rank, _) in shapes.items():
        if not tensor.endswith(LORA_A):
            continue
        peft_name = tensor.removesuffix(LORA_A)
        module, _ = targets[versions.vllm_module_name(model, peft_name)]
        if rank > module.lora_a_stacked[0].shape[-2] * _rank_shards(module):
            return _refusal(ErrorCode.RANK_TOO_HIGH, f"{peft_name}: rank {rank} does not fit into the slot")
    return None


def refuse_misfits(
    model: Any, features: dict[str, tuple[int, int]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    """A refusal if a module of the adapter is not among the served ones, or has another shape there.

    Args:
        features: served name -> (in_features, out_features) over all workers.
    """
    for tensor, (_, in_features) in shapes.items():
        if not tensor.endswith(LORA_A):
            continue
        peft_name = tensor.removesuffix(LORA_A)
        out_features = shapes[peft_name + LORA_B][0]
        expected = features.get(versions.vllm_module_name(model, peft_name))
        if expected is None:
            return _refusal(
                ErrorCode.UNSUPPORTED_ADAPTER,
                f"the served model has no LoRA-capable linear layer {peft_name!r}; "
                "choose target_modules among its attention and MLP projections",
            )
        if (in_features, out_features) != expected:
            return _refusal(
                ErrorCode.SHAPE_MISMATCH,
                f"{peft_name}: the adapter maps {in_features} to {out_features} features, "
                f"the served layer {expected[0]} to {expected[1]}",
            )
    return None


@dataclass(frozen=True)
class Copies:
    """Views of the buffer and of a slot that are copied one into the other, in pairs; never empty."""

    received: list[torch.Tensor]
    slot: list[torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """Where the tensors of one adapter lie in one slot; with tensor parallelism, those of this worker's shard."""

    copies: list[Copies]
    modules: int


def plan(worker: Any, index: int, tensors: dict[str, torch.Tensor]) -> Plan:
    """Find the place of every tensor in a slot.

    Args:
        index: of the slot in vLLM's stacked buffers (`compat.slot_index`).
        tensors: NAME.lora_A.weight [rank, in] and NAME.lora_B.weight [out, rank], in a buffer that stays.

    Raises:
        ValueError: not every tensor has a place; `check` would have refused the adapter.
    """
    manager = versions.lora_manager(worker)
    names = {name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)}
    by_name = {
        versions.vllm_module_name(manager.model, name): (tensors[name + LORA_A], tensors[name + LORA_B])
        for name in names
    }
    buffers = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    pairs: list[Pair] = []
    modules = 0
    for name, module in manager.modules.items():
        parts = [by_name.get(part) for part in manager.packed_modules.get(name, [name])]
        if not _is_linear(module) or all(part is None for part in parts):
            continue
        modules += sum(part is not None for part in parts)
        for shards, stacks in zip(_shards(module, parts), (module.lora_a_stacked, module.lora_b_stacked), strict=True):
            for views, stack in zip(shards, stacks, strict=True):
                row = 0
                for view in views:
                    pairs.append((view, stack[index, 0, row : row + view.shape[0], : view.shape[1]]))
                    row += view.shape[0]
    if modules != len(names):
        raise ValueError(f"{modules} of {len(names)} modules found a place in slot {index}")
    if not {view.untyped_storage().data_ptr() for view, _ in pairs} <= buffers:
        raise ValueError("vLLM cut a shard as a copy: it would stay as it is at the next push")
    return Plan(grouped(pairs), modules)


def grouped(pairs: list[Pair]) -> list[Copies]:
    """Group what is copied: torch copies a list of tensors in a few kernels only if all of them are contiguous.

    B of a lower rank than the slot's is not, nor is a shard of columns: these take a kernel each.
    """
    groups: dict[bool, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(all(view.is_contiguous() for view in pair), []).append(pair)
    return [Copies([received for received, _ in group], [slot for _, slot in group]) for group in groups.values()]


def clear(worker: Any, index: int) -> None:
    """Make a slot the zero adapter: whatever a layout leaves out must not be left over from another one."""
    for module in versions.lora_manager(worker).modules.values():
        if _is_linear(module):  # lm_head and embeddings are never written, so zero for ever
            for stack in (*module.lora_a_stacked, *module.lora_b_stacked):
                stack[index].zero_()


def _is_linear(module: Any) -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return isinstance(module, BaseLinearLayerWithLoRA)


def _targets(worker: Any) -> dict[str, tuple[Any, int | None]]:
    """Served name -> (layer, slice of the fused layer or None)."""
    manager = versions.lora_manager(worker)
    targets: dict[str, tuple[Any, int | None]] = {}
    for name, module in manager.modules.items():
        if not _is_linear(module):
            continue
        if name in manager.packed_modules:
            targets.update({part: (module, i) for i, part in enumerate(manager.packed_modules[name])})
        else:
            targets[name] = (module, None)
    return targets


def _in_features(module: Any) -> int:
    return int(module.base_layer.input_size)


def _out_features(module: Any, part: int | None) -> int:
    base = module.base_layer
    if part is None:
        return int(base.output_size)
    if hasattr(base, "total_num_kv_heads"):
        heads = base.total_num_heads if part == 0 else base.total_num_kv_heads
        return int(heads * base.head_size)
    return int(base.output_sizes[part])


def _rank_shards(module: Any) -> int:
    """With fully sharded LoRA each worker keeps a part of the rank."""
    return module.tp_size if module.lora_config.fully_sharded_loras else 1


def _shards(module: Any, parts: list[Pair | None]) -> tuple[list[Views], list[Views]]:
    """This worker's A and B of every slice of a layer: views which lie one below the other in the slot."""
    if len(parts) > 1:
        all_a: Any = [part and part[0] for part in parts]
        all_b: Any = [part and part[1] for part in parts]
        if module.tp_size > 1:
            all_a, all_b = module.slice_lora_a(all_a), module.slice_lora_b(all_b)
        return [[] if a is None else [a] for a in all_a], [[] if b is None else [b] for b in all_b]
    assert parts[0]
    a, b = parts[0]
    if module.tp_size == 1:
        return [[a]], [[b]]
    rows, _ = versions.linear_parts(module.base_layer)
    if len(rows) == 1:
        return [[module.slice_lora_a(a)]], [[module.slice_lora_b(b)]]
    # One LoRA over a fused layer (Phi-3's `qkv_proj`): vLLM would join this worker's rows of all parts in a copy.
    views, start = [], 0
    for own, first, total in rows:
        views.append(b[start + first : start + first + own])
        start += total
    return [[module.slice_lora_a(a)]], [views]


def _refusal(code: ErrorCode, message: str) -> dict[str, Any]:
    return {"ok": False, "code": code.value, "message": message}
