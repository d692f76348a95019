"""A linear layer and its LoRA adapter as one product with one rounding: y = [x, x Aᵀ] [W, s B]ᵀ.

PEFT adds s B A x to an output that was rounded before: in bfloat16 an addend below half a unit in the last place of the
output vanishes, and that is most of what a young adapter adds. As r more columns of the weight it is accumulated in
float32 with everything else. Backward is one product, too: [gx, gh] = g [W, s B], then gx += gh A.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import nn
from torch.nn.functional import linear

#: Attribute of a layer: its weight with spare columns.
_WIDE = "lockstep_wide_weight"


def use_one_product(model: PeftModel, adapter: str) -> int:
    """Let LoRA layers compute base and adapter in one product; return how many do.

    Left to PEFT are layers with another base than `nn.Linear` (quantized, say), a variant of LoRA, a bias in B, or
    dropout; and all, for the time being, while adapters are disabled, merged, or others than `adapter` are active.

    In 16 bits the base's weight becomes a view of a matrix with r spare columns, so that nothing is copied for a pass;
    `safetensors` wants it `contiguous()` before it is written by itself.
    """
    layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module, adapter)]
    for layer in layers:
        _widen(layer, adapter)
        layer.forward = MethodType(_forward_of(adapter), layer)
    return len(layers)


def _is_plain(layer: Linear, adapter: str) -> bool:
    dropout = layer.lora_dropout[adapter] if adapter in layer.lora_A else None
    return (
        type(layer.base_layer) is nn.Linear
        and (isinstance(dropout, nn.Identity) or getattr(dropout, "p", None) == 0.0)
        and adapter not in layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and not layer.fan_in_fan_out
    )


def _forward_of(adapter: str) -> Any:
    def forward(self: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or self.disable_adapters or self.merged or self.active_adapters != [adapter]:
            return Linear.forward(self, x, *args, **kwargs)
        base, device = self.base_layer, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        wide = self.__dict__.get(_WIDE)
        if wide is not None and not (
            wide.data_ptr() == base.weight.data_ptr()
            and wide.dtype == base.weight.dtype
            and wide.shape[1] == base.weight.shape[1] + _columns(a)
        ):
            wide = self.__dict__[_WIDE] = None  # the weight was moved, or the adapter is another
        if wide is not None and wide.dtype != dtype:
            wide = None
        return OneProduct.apply(x, base.weight, base.bias, a, b, self.scaling[adapter], dtype, wide)

    return forward


def _columns(a: torch.Tensor) -> int:
    """Return how many columns A takes: its rank, rounded up to rows that GPUs read in whole pieces of 16 bytes."""
    return -(-a.shape[0] // 8) * 8


def _widen(layer: Linear, adapter: str) -> None:
    """Move a 16-bit weight into [W, 0], of shape [out, in + columns], which the layer keeps; not other weights."""
    weight = layer.base_layer.weight
    if weight.dtype.itemsize != 2 or type(weight.data) is not torch.Tensor or weight.requires_grad:
        return
    wide = weight.new_zeros(weight.shape[0], weight.shape[1] + _columns(layer.lora_A[adapter].weight))
    wide[:, : weight.shape[1]] = weight.data
    weight.data = wide[:, : weight.shape[1]]
    layer.__dict__[_WIDE] = wide  # no buffer: it is in no state_dict


class OneProduct(torch.autograd.Function):
    """y = [x, x Aᵀ] [W, s B]ᵀ + bias. Keeps x and x Aᵀ for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dtype: torch.dtype,
        wide: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute in `dtype`.

        Args:
            x: [..., in].
            weight, bias: [out, in] and [out], without gradient.
            a, b: [r, in] and [out, r].
            wide: `[W, 0]`, of shape [out, in + columns], where s B is written; None: it is made.
        """
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            scaled_b = (b * scaling).to(dtype)
            shrunk = rows @ a.to(dtype).T
            own_bias = None if bias is None else bias.to(dtype)
            if dtype.itemsize == 2:
                spare = rows.new_zeros(rows.shape[0], _columns(a) - a.shape[0])
                y = linear(torch.cat([rows, shrunk, spare], 1), _wide(weight, scaled_b, dtype, wide), own_bias)
            else:
                y = linear(rows, weight.to(dtype), own_bias).addmm_(shrunk, scaled_b.T)
        ctx.save_for_backward(rows, shrunk, weight, a, b)
        ctx.scaling, ctx.dtype, ctx.wide, ctx.x = scaling, dtype, wide, (x.shape, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradients of x, A and B."""
        rows, shrunk, weight, a, b = ctx.saved_tensors
        dtype, columns = ctx.dtype, rows.shape[1]
        with torch.autocast(gradient.device.type, enabled=False):
            g = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
            scaled_b = (b * ctx.scaling).to(dtype)
            if dtype.itemsize == 2 and ctx.needs_input_grad[0]:
                both = g @ _wide(weight, scaled_b, dtype, ctx.wide)
                g_x, g_shrunk = both[:, :columns], both[:, columns : columns + a.shape[0]]
            else:
                g_shrunk = g @ scaled_b
                g_x = g @ weight.to(dtype) if ctx.needs_input_grad[0] else None
            if g_x is not None:
                g_x = g_x.addmm_(g_shrunk, a.to(dtype)).reshape(ctx.x[0]).to(ctx.x[1])
            g_a = (g_shrunk.T @ rows).to(a.dtype) if ctx.needs_input_grad[3] else None
            g_b = ((g.T @ shrunk) * ctx.scaling).to(b.dtype) if ctx.needs_input_grad[4] else None
        return g_x, None, None, g_a, g_b, None, None, None


def _wide(weight: torch.Tensor, scaled_b: torch.Tensor, dtype: torch.dtype, wide: torch.Tensor | None) -> torch.Tensor:
    if wide is None:
        wide = weight.new_zeros(weight.shape[0], weight.shape[1] + _columns(scaled_b.T), dtype=dtype)
        wide[:, : weight.shape[1]] = weight
    wide[:, weight.shape[1] : weight.shape[1] + scaled_b.shape[1]] = scaled_b
    return wide
