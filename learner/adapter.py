"""A PEFT model's adapter as named raw tensors: what a push carries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from shared.adapter_file import LORA_A, LORA_B, RawTensor
from shared.errors import ErrorCode, LockstepError
from shared.weights import AdapterManifest, ModuleSpec, WeightVersion

PEFT_PREFIX = "base_model.model."
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class AdapterExport:
    """`tensors`: NAME.lora_A.weight [rank, in] and NAME.lora_B.weight [out, rank], the scaling already in B.

    The manifest's checksum is empty; `shared.adapter_file.encode_adapter` fills it in.
    """

    tensors: dict[str, RawTensor]
    manifest: AdapterManifest

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(len(tensor.data) for tensor in self.tensors.values())


def active_adapter(model: PeftModel) -> str:
    """Name of the one adapter being trained.

    Raises:
        LockstepError: `unsupported_adapter` if several are active at once.
    """
    names = model.active_adapters
    if len(names) != 1:
        raise LockstepError(
            ErrorCode.UNSUPPORTED_ADAPTER,
            f"adapters {names} are active at once; activate one with set_adapter(name)",
        )
    return names[0]


def lora_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Module name as the server knows it -> layer that carries `adapter`."""
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in module.lora_embedding_A:
            raise LockstepError(
                ErrorCode.UNSUPPORTED_ADAPTER,
                f"{name} is an embedding: take it out of the adapter's target_modules",
            )
        if adapter in module.lora_A:
            layers[name.replace("_orig_mod.", "").removeprefix(PEFT_PREFIX)] = module
    return layers


def export_adapter(
    model: PeftModel, version: WeightVersion, *, dtype: str, base_weights: str | None = None
) -> AdapterExport:
    """Read the active adapter of `model`.

    B is multiplied by the layer's scaling in float32, then A and B are rounded once to `dtype`. All tensors
    are packed on their device and copied to the host in one go; the raw tensors are views of that copy.

    Args:
        model: unwrapped (no DDP) PEFT model with plain LoRA layers.
        version: which weights these are.
        dtype: the server's `lora_dtype`.
        base_weights: fingerprint of the base the adapter is trained on.

    Raises:
        LockstepError: `unsupported_adapter` if anything trainable would be left out, `not_finite` if the
            adapter holds NaN or infinity (after rounding).
    """
    adapter = active_adapter(model)
    modules: dict[str, ModuleSpec] = {}
    weights: dict[str, torch.Tensor] = {}
    exported: set[int] = set()
    for name, layer in lora_layers(model, adapter).items():
        _refuse_variants(name, layer, adapter)
        a_RI, b_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scaling = float(layer.scaling[adapter])
        exported |= {id(a_RI), id(b_OR)}
        modules[name] = ModuleSpec(rank=a_RI.shape[0], scaling=scaling)
        weights[name + LORA_A] = a_RI.detach().to(TORCH_DTYPES[dtype])
        weights[name + LORA_B] = (b_OR.detach().float() * scaling).to(TORCH_DTYPES[dtype])
    if not modules:
        raise LockstepError(
            ErrorCode.UNSUPPORTED_ADAPTER, f"adapter {adapter!r} has no LoRA layers; check target_modules"
        )
    _refuse_leftovers(model, exported)
    manifest = AdapterManifest(
        version=version, base_weights=base_weights, dtype=dtype, modules=modules,
        peft_config=plain_config(model.peft_config[adapter]), checksum="",
    )  # fmt: skip
    return AdapterExport(_pack(weights, dtype, version), manifest)


def plain_config(config: Any) -> dict[str, Any]:
    """A PEFT config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict(), default=lambda o: sorted(o) if isinstance(o, set) else str(o)))


def _pack(weights: dict[str, torch.Tensor], dtype: str, version: WeightVersion) -> dict[str, RawTensor]:
    flat = torch.cat([weight.reshape(-1) for weight in weights.values()])
    if not torch.isfinite(flat).all():
        bad = next(name for name, weight in weights.items() if not torch.isfinite(weight).all())
        raise LockstepError(
            ErrorCode.NOT_FINITE,
            f"{bad} of {version} holds NaN or infinity: the training has diverged; "
            "lower learning_rate or set max_grad_norm",
        )
    data = memoryview(flat.cpu().view(torch.uint8).numpy())
    tensors, position = {}, 0
    for name, weight in weights.items():
        end = position + weight.numel() * flat.element_size()
        tensors[name] = RawTensor(dtype, tuple(weight.shape), data[position:end])
        position = end
    return tensors


def _refuse_variants(name: str, layer: LoraLayer, adapter: str) -> None:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None or layer.lora_bias.get(adapter):
        what = type(variant).__name__ if variant is not None else "lora_bias"
        raise LockstepError(
            ErrorCode.UNSUPPORTED_ADAPTER,
            f"{name} uses {what}: only plain LoRA can be served; use a plain LoraConfig",
        )
    if layer.merged:
        raise LockstepError(ErrorCode.UNSUPPORTED_ADAPTER, f"{name} is merged into the base: call unmerge_adapter()")
    if not isinstance(layer.lora_A[adapter], nn.Linear):
        raise LockstepError(
            ErrorCode.UNSUPPORTED_ADAPTER,
            f"{name} is a {type(layer.get_base_layer()).__name__}: only linear layers can be served; "
            "take it out of target_modules",
        )


def _refuse_leftovers(model: nn.Module, exported: set[int]) -> None:
    """Whatever is trained must be pushed, or the server would sample from another policy."""
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in exported]
    if left:
        raise LockstepError(
            ErrorCode.UNSUPPORTED_ADAPTER,
            f"{len(left)} trainable parameters are not part of the adapter, {left[0]} for one: freeze them, "
            "or train LoRA on linear layers only",
        )
