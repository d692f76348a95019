"""How an adapter lies in one of vLLM's slots: PEFT's modules against the served model's, fused and sharded ones too.

vLLM keeps A as [max_loras, 1, rank, in] and B as [max_loras, 1, out, rank], one pair per slice of a fused layer
(q, k, v of `qkv_proj`). `set_lora` takes full tensors and cuts out this worker's tensor-parallel shard itself.
"""

from __future__ import annotations

from typing import Any

import torch

from rollout_server import compat
from shared.errors import ErrorCode

Pair = tuple[torch.Tensor, torch.Tensor]


def describe(worker: Any) -> dict[str, Any]:
    """What this worker can adapt, for the log."""
    modules = compat.lora_manager(worker).modules
    return {"modules": len(modules), "linear": sum(_is_linear(module) for module in modules.values())}


def check(worker: Any, modules: dict[str, list[int]]) -> dict[str, Any]:
    """Compare announced shapes with the served model; touches nothing."""
    targets = _targets(worker)
    for peft_name, (rank, in_features, out_features) in modules.items():
        name = compat.vllm_module_name(worker, peft_name)
        if name not in targets:
            return _refusal(
                ErrorCode.UNSUPPORTED_ADAPTER,
                f"the served model has no LoRA-capable linear layer {peft_name!r}; "
                "choose target_modules among its attention and MLP projections",
            )
        module, part = targets[name]
        expected = (_in_features(module), _out_features(module, part))
        if (in_features, out_features) != expected:
            return _refusal(
                ErrorCode.SHAPE_MISMATCH,
                f"{peft_name}: the adapter maps {in_features} to {out_features} features, "
                f"the served layer {expected[0]} to {expected[1]}",
            )
        if rank > module.lora_a_stacked[0].shape[-2] * _rank_shards(module):
            return _refusal(ErrorCode.RANK_TOO_HIGH, f"{peft_name}: rank {rank} does not fit into the slot")
    return {"ok": True}


def write(worker: Any, slot_id: int, pairs: dict[str, Pair]) -> dict[str, Any]:
    """Write A, B pairs (by PEFT name) into a slot, clear what they leave out, and read everything back.

    Answers the number of adapted modules, or which one does not read back as it was written.
    """
    manager = compat.lora_manager(worker)
    index = manager.lora_index_to_id.index(slot_id)
    by_name = {compat.vllm_module_name(worker, name): pair for name, pair in pairs.items()}
    written = 0
    for name, module in manager.modules.items():
        if not _is_linear(module):  # lm_head and embeddings: never written, so zero for ever
            continue
        parts = _parts(manager, name, by_name)
        if all(part is None for part in parts):
            module.reset_lora(index)
            continue
        if name in manager.packed_modules:
            module.set_lora(index, [p and p[0] for p in parts], [p and p[1] for p in parts])
        else:
            a, b = parts[0] or (None, None)
            module.set_lora(index, a, b)
        written += sum(part is not None for part in parts)
        if not _reads_back(module, index, parts):
            return _refusal(ErrorCode.INSTALL_FAILED, f"{name} does not read back as written from slot {slot_id}")
    if written != len(pairs):
        return _refusal(ErrorCode.INSTALL_FAILED, f"{written} of {len(pairs)} modules found a place in slot {slot_id}")
    return {"ok": True, "modules": written}


def _is_linear(module: Any) -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return isinstance(module, BaseLinearLayerWithLoRA)


def _targets(worker: Any) -> dict[str, tuple[Any, int | None]]:
    """Served name -> (layer, slice of the fused layer or None)."""
    manager = compat.lora_manager(worker)
    targets: dict[str, tuple[Any, int | None]] = {}
    for name, module in manager.modules.items():
        if not _is_linear(module):
            continue
        if name in manager.packed_modules:
            targets.update({part: (module, i) for i, part in enumerate(manager.packed_modules[name])})
        else:
            targets[name] = (module, None)
    return targets


def _parts(manager: Any, name: str, by_name: dict[str, Pair]) -> list[Pair | None]:
    return [by_name.get(part) for part in manager.packed_modules.get(name, [name])]


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


def _reads_back(module: Any, index: int, parts: list[Pair | None]) -> bool:
    """Is what lies in the slot exactly what was written, and zero around it?"""
    fused = len(parts) > 1
    a: Any = [p and p[0] for p in parts] if fused else parts[0][0]  # type: ignore[index]
    b: Any = [p and p[1] for p in parts] if fused else parts[0][1]  # type: ignore[index]
    if module.tp_size > 1:
        a, b = module.slice_lora_a(a), module.slice_lora_b(b)
    if not fused:
        a, b = [a], [b]
    stacks = ((module.lora_a_stacked, a), (module.lora_b_stacked, b))
    return all(
        _equal_in_corner(stacked[index, 0], tensor)
        for stacks_of_kind, tensors in stacks
        for stacked, tensor in zip(stacks_of_kind, tensors, strict=True)
    )


def _equal_in_corner(buffer: torch.Tensor, tensor: torch.Tensor | None) -> bool:
    if tensor is None:
        return not bool(buffer.any())
    rows, columns = tensor.shape
    written = tensor.to(device=buffer.device, dtype=buffer.dtype)
    return (
        torch.equal(buffer[:rows, :columns], written)
        and not bool(buffer[rows:].any())
        and not bool(buffer[:, columns:].any())
    )


def _refusal(code: ErrorCode, message: str) -> dict[str, Any]:
    return {"ok": False, "code": code.value, "message": message}
