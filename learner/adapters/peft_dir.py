"""Write and read the active adapter as a PEFT directory, also where the model is sharded over several ranks."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from learner.adapters.exporter import active_adapter, lora_layers
from learner.adapters.stored import PEFT_PREFIX, WEIGHTS_FILE
from learner.utils.distributed import full_tensor, gathered, overwrite
from shared.adapter_file import LORA_A, LORA_B
from shared.errors import InvalidRequest
from shared.messages import one_line


def save_adapter(model: PeftModel, folder: Path, *, writes: bool) -> None:
    """Write the active adapter into `folder`, on the rank that `writes`. Collective if the model is sharded."""
    weights = _peft_weights(model)
    with gathered(list(weights.values())):
        tensors = {name: full_tensor(weight.detach()).clone() for name, weight in weights.items()}
    if writes:
        replace(model.peft_config[active_adapter(model)], inference_mode=True).save_pretrained(folder)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load values written by `save_adapter` into the active adapter. Collective if the model is sharded.

    Raises `invalid_request` if they are missing, or another adapter's.
    """
    path, weights = folder / WEIGHTS_FILE, _peft_weights(model)
    tensors = load_file(path) if path.is_file() else {}
    if tensors.keys() != weights.keys():
        raise InvalidRequest(f"{path} does not hold this adapter; resume from another checkpoint")
    with gathered(list(weights.values()), written=True):
        for name, weight in weights.items():
            overwrite(weight, tensors[name].to(weight.device, weight.dtype))


def trainable_adapter(base: PreTrainedModel, source: str) -> PeftModel:
    """Return the model with an adapter of a directory or the hub, to be trained on.

    Raises `invalid_request` if it does not fill the layers that it names, where PEFT only warns and begins anew.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys")
        try:
            return PeftModel.from_pretrained(base, source, is_trainable=True)
        except UserWarning as warning:
            missing = re.search(r"'(.+?)'", str(warning).partition("[")[2])
            raise InvalidRequest(
                f"init_adapter {source} was made for another model class, or is damaged: it has no "
                f"{missing[1] if missing else one_line(warning)}; make one for a {type(base).__name__}"
            ) from warning


def _peft_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    # PEFT's own function finds other names where activation checkpointing has wrapped the layers, and saves nothing.
    adapter = active_adapter(model)
    return {
        PEFT_PREFIX + name + suffix: factors[adapter].weight
        for name, layer in lora_layers(model, adapter).items()
        for suffix, factors in ((LORA_A, layer.lora_A), (LORA_B, layer.lora_B))
    }
