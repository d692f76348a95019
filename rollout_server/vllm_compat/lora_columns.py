"""Compute LoRA as more columns of the base's weight: y = [x, h] [W, B]ᵀ with h = x Aᵀ, for `--apply columns`.

vLLM adds B h to an output that the base has rounded already: in bfloat16 an addend below half a unit in the last place
of the output vanishes, and that is most of what a young adapter adds. Here one product accumulates both in float32 and
rounds once, as the learner's does (`learner.passes.lora_product`).

A weight is made with spare columns and rows, [out + columns, in + columns], and `weight.data` is a view of its first
corner, so that W stays as it is for all who read it. The spare columns hold B of every slot, the spare rows A; a fused
layer has columns for each of its slices, zero in the rows of the others. vLLM's `lora_a_stacked` and `lora_b_stacked`
become views of them, so whatever writes and reads slots goes on as before, and no address changes. h is zero in the
columns of slots that a token does not use: contents that are just being written are finite, and count zero times.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch

from rollout_server.vllm_compat import one_product

#: Attribute of a base layer: its weight with spare columns and rows.
_WIDE = "lockstep_wide_weight"
#: Columns come in multiples of it: GPUs read rows in whole pieces of 16 bytes.
_ALIGNMENT = 8


def install() -> None:
    """Let unquantized linear layers compute LoRA in one product. Call it before the model is made."""
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    one_product.register()
    create_weights = UnquantizedLinearMethod.create_weights
    create_lora_modules = LoRAModelManager._create_lora_modules

    def create_wide_weights(
        self: Any, layer: Any, input_size_per_partition: int, output_partition_sizes: Any, *args: Any, **kwargs: Any
    ) -> None:
        create_weights(self, layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)
        if type(layer) in _plain_layers():
            widen(layer, slices=len(output_partition_sizes))

    def create_lora_modules_in_columns(self: Any) -> None:
        create_lora_modules(self)
        for module in self.modules.values():
            if has_columns(module):
                use_columns(module)

    UnquantizedLinearMethod.create_weights = create_wide_weights
    LoRAModelManager._create_lora_modules = create_lora_modules_in_columns


def _plain_layers() -> tuple[type, ...]:
    """Return vLLM's layers that only multiply: kernels of others, such as routers of experts, read their weights."""
    from vllm.model_executor.layers import linear

    return (
        linear.ReplicatedLinear,
        linear.ColumnParallelLinear,
        linear.MergedColumnParallelLinear,
        linear.QKVParallelLinear,
        linear.RowParallelLinear,
    )


def widen(layer: Any, slices: int) -> None:
    """Move a new layer's weight into [[W, 0], [0, 0]] with room for all slots and slices, if the engine serves LoRA."""
    from vllm.config import get_current_vllm_config

    lora, weight = get_current_vllm_config().lora_config, layer.weight
    if lora is None or weight.is_meta or weight.dim() != 2:
        return
    rows, width = weight.shape
    if width < lora.max_lora_rank:
        return  # no product of a model's: weights of a convolution
    spare = _aligned(slices * lora.max_loras * lora.max_lora_rank)
    wide = weight.data.new_zeros(rows + spare, width + spare)
    weight.data = wide[:rows, :width]
    setattr(layer, _WIDE, wide)


def has_columns(module: Any) -> bool:
    """Return whether vLLM's LoRA layer may compute in one product: nothing but W, where it was made, in one dtype."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers import linear

    if not isinstance(module, BaseLinearLayerWithLoRA):
        return False
    base = module.base_layer
    wide = getattr(base, _WIDE, None)
    return (
        wide is not None
        and type(base) in _plain_layers()
        and type(base.quant_method) is linear.UnquantizedLinearMethod
        and wide.data_ptr() == base.weight.data_ptr()
        and wide.dtype == module.lora_a_stacked[0].dtype
        and module.lora_a_stacked[0].shape[-1] == base.weight.shape[1]
        and sum(b.shape[2] for b in module.lora_b_stacked) == base.weight.shape[0]
    )


def use_columns(module: Any) -> None:
    """Move the slots of a LoRA layer into the columns of its base's weight, and compute with them from now on."""
    base, old_b = module.base_layer, module.lora_b_stacked
    slots, _, rank, width = module.lora_a_stacked[0].shape
    each, count, out = slots * rank, _aligned(len(old_b) * slots * rank), base.weight.shape[0]
    wide = getattr(base, _WIDE)[: out + count, : width + count]
    lora_a, lora_b, row = [], [], 0
    for index, old in enumerate(old_b):
        own = slice(index * each, (index + 1) * each)
        lora_a.append(wide[out:, :width][own].unflatten(0, (slots, rank))[:, None])
        rows = wide[row : row + old.shape[2], width:][:, own]
        lora_b.append(rows.unflatten(1, (slots, rank)).transpose(0, 1)[:, None])
        row += old.shape[2]
    module.lora_a_stacked, module.lora_b_stacked = tuple(lora_a), tuple(lora_b)
    module.lockstep_weight, module.lockstep_layout = wide, ([old.shape[2] for old in old_b], slots, rank)
    module.lockstep_column_slots = _column_slots(len(old_b), slots, rank, wide.device)
    module.apply = MethodType(_apply, module)


def computes_in_columns(module: Any) -> bool:
    """Return whether `use_columns` was called with this layer."""
    return "lockstep_weight" in vars(module)


def _apply(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Take the place of `BaseLinearLayerWithLoRA.apply`: x [tokens, in] or [1, tokens, in]."""
    punica = self.punica_wrapper
    meta = getattr(punica, "token_mapping_meta", None)
    y = torch.ops.vllm.lockstep_one_product(
        x.flatten(0, -2),
        self.lockstep_weight,
        bias,
        punica._token_lora_indices,  # not the property without underscore: its length would be traced into the graph
        self.lockstep_column_slots,
        None if meta is None else meta.no_lora_flag_cpu,
        *self.lockstep_layout,
    )
    return y.unflatten(0, x.shape[:-1]) if x.dim() > 2 else y


def _aligned(columns: int) -> int:
    return -(-columns // _ALIGNMENT) * _ALIGNMENT


@functools.cache
def _column_slots(slices: int, slots: int, rank: int, device: torch.device) -> torch.Tensor:
    """Return the slot of each column [columns], int64; -2, which no token has, for those that only align."""
    own = torch.arange(slots).repeat_interleave(rank).repeat(slices)
    return torch.nn.functional.pad(own, (0, _aligned(len(own)) - len(own)), value=-2).to(device)
