"""Export a PEFT model's active adapter as one flat tensor and its header: the body of a push."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from learner.adapters.stored import PEFT_PREFIX
from learner.utils.distributed import full_shape, full_tensor, gathered
from shared.adapter_file import LORA_A, LORA_B, Layout, lay_out
from shared.checksum import block_sums, block_weights, checksum
from shared.collective import Announcement
from shared.errors import NotFinite, UnsupportedAdapter
from shared.weights import AdapterManifest, ModuleSpec, WeightVersion

#: Parts that torch.compile and activation checkpointing add to the names of modules.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class AdapterExport:
    """One version of an adapter, ready to be sent.

    Attributes:
        flat: all tensors one after the other, 1-D, of the server's LoRA dtype, on the model's device. The next export
            overwrites it.
    """

    manifest: AdapterManifest
    layout: Layout
    flat: torch.Tensor
    _pieces: list[bytes | memoryview] = field(default_factory=list, init=False, repr=False)
    _making: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def announcement(self) -> Announcement:
        """Return the announcement that precedes a broadcast of the tensors."""
        return Announcement(version=self.manifest.version, checksum=self.manifest.checksum, layout=self.layout.key)

    def pieces(self) -> list[bytes | memoryview]:
        """Return the safetensors blob in host memory: header and tensors, not joined; the same for all servers."""
        with self._making:
            if not self._pieces:
                host = torch.empty_like(self.flat, device="cpu", pin_memory=self.flat.is_cuda).copy_(self.flat)
                self._pieces.extend([self.layout.header(self.manifest), memoryview(host.view(torch.uint8).numpy())])
            return list(self._pieces)


def active_adapter(model: PeftModel) -> str:
    """Return the name of the adapter being trained; raises `unsupported_adapter` if several are active at once."""
    names = model.active_adapters
    if len(names) != 1:
        raise UnsupportedAdapter(f"adapters {names} are active at once; activate one with set_adapter(name)")
    return names[0]


def lora_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Return the layers with `adapter`, by module name in the base; raises `unsupported_adapter` for an embedding."""
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in module.lora_embedding_A:
            raise UnsupportedAdapter(f"{name} is an embedding: take it out of the adapter's target_modules")
        if adapter in module.lora_A:
            for wrapper in WRAPPERS:
                name = name.replace(wrapper, "")
            layers[name.removeprefix(PEFT_PREFIX)] = module
    return layers


class AdapterExporter:
    """Exports the active adapter of a PEFT model after every step.

    Multiplies B by the layer's scaling in float32, then rounds A and B once to the server's dtype. Reads the values at
    every export, from the parameter objects that the model had when this was made. Raises `unsupported_adapter` if a
    trainable parameter is not part of the adapter.

    Args:
        model: unwrapped (no DDP) PEFT model with plain LoRA layers. It may be sharded by ZeRO-3, or by FSDP2 if all
            of it is resharded (`learner.utils.distributed.reshard`).
        dtype: the server's `lora_dtype`.
        base_weights: fingerprint of the base the adapter is trained on.
    """

    def __init__(self, model: PeftModel, *, dtype: str, base_weights: str | None = None) -> None:
        self.model, self.dtype, self.base_weights = model, dtype, base_weights
        self.adapter = active_adapter(model)
        self.layers = lora_layers(model, self.adapter)
        if not self.layers:
            raise UnsupportedAdapter("the adapter adapts no linear layer; check target_modules")
        for name, layer in self.layers.items():
            _refuse_variants(name, layer, self.adapter)
        self._a = [layer.lora_A[self.adapter].weight for layer in self.layers.values()]
        self._b = [layer.lora_B[self.adapter].weight for layer in self.layers.values()]
        exported = {id(weight) for weight in (*self._a, *self._b)}
        self._others = [(name, p) for name, p in model.named_parameters() if id(p) not in exported]
        self._check_trainable()
        shapes: dict[str, tuple[int, ...]] = {}
        for name, a_RI, b_OR in zip(self.layers, self._a, self._b, strict=True):
            shapes |= {name + LORA_A: full_shape(a_RI), name + LORA_B: full_shape(b_OR)}
        self.layout = Layout(lay_out(shapes, dtype))
        self._template: AdapterManifest | None = None
        self._scalings: list[float] = []
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.flat = torch.empty(sum(sizes), dtype=TORCH_DTYPES[dtype], device=self._a[0].device)
        self._views = [v.view(shape) for v, shape in zip(self.flat.split(sizes), shapes.values(), strict=True)]
        self._weights = torch.from_numpy(block_weights()).to(self.flat.device)

    def export(self, version: WeightVersion) -> AdapterExport:
        """Export the current values as `version`, unsharded on every rank. Collective if the model is sharded.

        Raises `not_finite` if it holds NaN or infinity (after rounding), `unsupported_adapter` if it is merged or
        something else has become trainable.
        """
        self._check_trainable()
        for name, layer in self.layers.items():
            if layer.merged:
                raise UnsupportedAdapter(f"{name} is merged into the base: call unmerge_adapter()")
        scalings = [float(layer.scaling[self.adapter]) for layer in self.layers.values()]
        with torch.no_grad():
            with gathered([*self._a, *self._b]):
                torch._foreach_copy_(self._views[::2], [full_tensor(w) for w in self._a])
                scaled = torch._foreach_mul([full_tensor(w).float() for w in self._b], scalings)
                torch._foreach_copy_(self._views[1::2], scaled)
            self._check_finite(version)
            elements = self.flat.view(torch.int32 if self.flat.element_size() == 4 else torch.int16)
            sums = torch.cat(list(block_sums(elements, self._weights))).cpu().numpy().tobytes()
        if self._template is None or scalings != self._scalings:
            # Copied for every push: making a manifest takes longer than the transfer.
            config = self.model.peft_config[self.adapter].to_dict()
            plain_config = json.dumps(config, default=lambda o: sorted(o) if isinstance(o, set) else str(o))
            modules = zip(self.layers, self._a, scalings, strict=True)
            self._scalings = scalings
            self._template = AdapterManifest(
                version=version,
                base_weights=self.base_weights,
                dtype=self.dtype,
                checksum="",
                peft_config=json.loads(plain_config),
                modules={name: ModuleSpec(rank=full_shape(a_RI)[0], scaling=s) for name, a_RI, s in modules},
            )
        update = {"version": version, "checksum": checksum(self.layout.index, sums)}
        return AdapterExport(self._template.model_copy(update=update), self.layout, self.flat)

    def _check_finite(self, version: WeightVersion) -> None:
        low, high = self.flat.aminmax()
        if bool(torch.isfinite(low) & torch.isfinite(high)):
            return
        pairs = zip(self.layout.entries, self._views, strict=True)
        bad = next(entry.name for entry, view in pairs if not torch.isfinite(view).all())
        raise NotFinite(
            f"{bad} of {version} holds NaN or infinity: the training has diverged; "
            "lower learning_rate or set max_grad_norm"
        )

    def _check_trainable(self) -> None:
        """Refuse trainable parameters that are not pushed: the server would sample from another policy."""
        left = [name for name, p in self._others if p.requires_grad]
        if left:
            raise UnsupportedAdapter(
                f"{len(left)} trainable parameters are not part of the adapter, {left[0]} for one: freeze them, "
                "or train LoRA on linear layers only"
            )


def _refuse_variants(name: str, layer: LoraLayer, adapter: str) -> None:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None or layer.lora_bias.get(adapter):
        what = type(variant).__name__ if variant is not None else "lora_bias"
        raise UnsupportedAdapter(f"{name} uses {what}: only plain LoRA can be served; use a plain LoraConfig")
    if not isinstance(layer.lora_A[adapter], nn.Linear):
        raise UnsupportedAdapter(
            f"{name} is a {type(layer.get_base_layer()).__name__}: only linear layers can be served; "
            "take it out of target_modules"
        )
