"""The trained adapter as a PEFT directory: written and read where a model may be sharded over several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from learner.adapters.exporter import active_adapter, peft_tensors, peft_weights
from learner.adapters.stored import WEIGHTS_FILE
from learner.utils.distributed import gathered, overwrite
from shared.errors import InvalidRequest


def save_adapter(model: PeftModel, folder: Path, *, writes: bool) -> None:
    """Write the active adapter, where PEFT finds it. Collective where it is sharded; the rank that `writes` does so."""
    tensors = peft_tensors(model)
    if writes:
        replace(model.peft_config[active_adapter(model)], inference_mode=True).save_pretrained(folder)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put the values that `save_adapter` has written into the active adapter. Collective where it is sharded.

    Raises:
        LockstepError: `invalid_request` if they are not there, or another adapter's.
    """
    path, weights = folder / WEIGHTS_FILE, peft_weights(model)
    tensors = load_file(path) if path.is_file() else {}
    if tensors.keys() != weights.keys():
        raise InvalidRequest(f"{path} does not hold this adapter; resume from another checkpoint")
    with gathered(list(weights.values()), written=True):
        for name, weight in weights.items():
            overwrite(weight, tensors[name].to(weight.device, weight.dtype))
