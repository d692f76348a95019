"""A linear layer and its LoRA adapter as one product with one rounding: y = [x, x Aᵀ] [W, s B]ᵀ.

PEFT adds s B A x to an output that was rounded before: in bfloat16 an addend below half a unit in the last place of the
output vanishes, and that is most of what a young adapter adds. As r more columns of the weight it is accumulated in
float32 with everything else. Backward is one product, too: [gx, gh] = g [W, s B], then gx += gh A.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import nn
from torch.nn.functional import linear


def use_one_product(model: PeftModel, adapter: str) -> int:
    """Let LoRA layers compute base and adapter in one product; return how many do.

    Left to PEFT are layers with another base than `nn.Linear` (quantized, say), a variant of LoRA, a bias in B, or
    dropout; and all, for the time being, while adapters are disabled, merged, or others than `adapter` are active.

    In 16 bits the base's weight becomes a view of a matrix with r spare columns, so that nothing is copied for a pass;
    `safetensors` wants it `contiguous()` before it is written by itself.
    """
    layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module, adapter)]
    for layer in layers:
        layer.__class__ = OneProductLinear  # a method of the class, not of each object, is compiled once for all layers
        layer.one_product, layer.wide = adapter, _widened(layer, adapter)
    return len(layers)


def write_adapters(module: nn.Module) -> None:
    """Write s B of all layers below `module` beside their W, where compiled code reads it."""
    for layer in module.modules():
        if isinstance(layer, OneProductLinear):
            layer.write_adapter()


@contextmanager
def written_once(model: nn.Module) -> Iterator[None]:
    """Write s B of all layers beside their W now, and not again for each layer's forward pass: updates come later.

    With a small model launching what writes would take longer than the passes.
    """
    layers = [module for module in model.modules() if isinstance(module, OneProductLinear)]
    places = {layer: place for layer in layers if (place := layer.place()) is not None}
    if places:
        adapters = [layer.lora_B[layer.one_product].weight.detach() for layer in places]
        scaled = torch._foreach_mul(adapters, [layer.scaling[layer.one_product] for layer in places])
        torch._foreach_copy_(list(places.values()), scaled)
    for layer in places:
        layer.is_written = True
    try:
        yield
    finally:
        for layer in places:
            layer.is_written = False


def _is_plain(layer: Linear, adapter: str) -> bool:
    dropout = layer.lora_dropout[adapter] if adapter in layer.lora_A else None
    return (
        type(layer.base_layer) is nn.Linear
        and (isinstance(dropout, nn.Identity) or getattr(dropout, "p", None) == 0.0)
        and adapter not in layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and not layer.fan_in_fan_out
    )


class OneProductLinear(Linear):
    """PEFT's LoRA layer, with another forward.

    Attributes:
        one_product: the adapter.
        wide: `[W, s B, 0]`, of shape [out, in + columns], of which the base's weight is a view; None where a pass
            makes it. In no state_dict.
        is_written: s B in `wide` is the present one.
    """

    one_product: str
    wide: torch.Tensor | None
    is_written = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return y [..., out] for x [..., in]."""
        adapter = self.one_product
        if args or kwargs or self.disable_adapters or self.merged or self.active_adapters != [adapter]:
            return super().forward(x, *args, **kwargs)
        if not torch.compiler.is_compiling():  # pointers are not to be compared there
            self.write_adapter()
        base, device = self.base_layer, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
        wide = self.wide if self.wide is not None and self.wide.dtype == dtype else None
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return OneProduct.apply(x, base.weight, base.bias, a, b, self.scaling[adapter], dtype, wide)

    def write_adapter(self) -> None:
        """Write s B into `wide`, unless it has been written for the present passes."""
        if not self.is_written and (place := self.place()) is not None:
            place.copy_(self.lora_B[self.one_product].weight.detach() * self.scaling[self.one_product])

    def place(self) -> torch.Tensor | None:
        """Return where in `wide` s B is; forget one that the weight is no view of any more, or of another adapter.

        Not seen by autograd: a pass that is on its way back finds what it went forward with.
        """
        wide, weight = self.wide, self.base_layer.weight
        if wide is None or self.one_product not in self.lora_A:
            return None
        a, b = self.lora_A[self.one_product].weight, self.lora_B[self.one_product].weight
        if (
            wide.data_ptr() != weight.data_ptr()
            or wide.dtype != weight.dtype
            or wide.shape[1] != weight.shape[1] + _columns(a)
        ):
            self.wide = None
            return None
        return wide.data[:, weight.shape[1] : weight.shape[1] + b.shape[1]]


def _columns(a: torch.Tensor) -> int:
    """Return how many columns A takes: its rank, rounded up to rows that GPUs read in whole pieces of 16 bytes."""
    return -(-a.shape[0] // 8) * 8


def _widened(layer: Linear, adapter: str) -> torch.Tensor | None:
    """Move a 16-bit weight into [W, 0], of shape [out, in + columns], and return that; None for other weights."""
    weight = layer.base_layer.weight
    if weight.dtype.itemsize != 2 or type(weight.data) is not torch.Tensor or weight.requires_grad:
        return None
    wide = weight.new_zeros(weight.shape[0], weight.shape[1] + _columns(layer.lora_A[adapter].weight))
    wide[:, : weight.shape[1]] = weight.data
    weight.data = wide[:, : weight.shape[1]]
    torch._dynamo.mark_static(wide)  # as a parameter's, its shape is a constant of compiled code
    return wide


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
            wide: `[W, s B, 0]`, of shape [out, in + columns]; None: it is made.
        """
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            shrunk = rows @ a.to(dtype).T
            own_bias = None if bias is None else bias.to(dtype)
            if dtype.itemsize == 2:
                spare = rows.new_zeros(rows.shape[0], _columns(a) - a.shape[0])
                y = linear(torch.cat([rows, shrunk, spare], 1), _wide(weight, b, scaling, dtype, wide), own_bias)
            else:
                y = linear(rows, weight.to(dtype), own_bias).addmm_(shrunk, (b * scaling).to(dtype).T)
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
            if dtype.itemsize == 2 and ctx.needs_input_grad[0]:
                both = g @ _wide(weight, b, ctx.scaling, dtype, ctx.wide)
                g_x, g_shrunk = both[:, :columns], both[:, columns : columns + a.shape[0]]
            else:
                g_shrunk = g @ (b * ctx.scaling).to(dtype)
                g_x = g @ weight.to(dtype) if ctx.needs_input_grad[0] else None
            if g_x is not None:
                g_x = g_x.addmm_(g_shrunk, a.to(dtype)).reshape(ctx.x[0]).to(ctx.x[1])
            g_a = (g_shrunk.T @ rows).to(a.dtype) if ctx.needs_input_grad[3] else None
            g_b = ((g.T @ shrunk) * ctx.scaling).to(b.dtype) if ctx.needs_input_grad[4] else None
        return g_x, None, None, g_a, g_b, None, None, None


def _wide(
    weight: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype, wide: torch.Tensor | None
) -> torch.Tensor:
    """Return `[W, s B, 0]`."""
    if wide is not None:
        return wide
    spare = weight.new_zeros(weight.shape[0], _columns(b.T) - b.shape[1], dtype=dtype)
    return torch.cat([weight.to(dtype), (b * scaling).to(dtype), spare], 1)
