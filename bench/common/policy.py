"""The learner's side of a measurement: a base model, an adapter on it, and a stand-in for an optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from bench.common.shapes import Shape


class Policy:
    """A base model with random weights on the learner's device; adapters are put on it and taken off again."""

    def __init__(self, folder: Path, device: torch.device, dtype: str) -> None:
        self.device = device
        config = AutoConfig.from_pretrained(folder)
        with torch.device(device):
            self.base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        self.base.requires_grad_(False)

    @contextlib.contextmanager
    def adapter(self, rank: int, adapter_dtype: str) -> Iterator[PeftModel]:
        """The base with a fresh adapter on all linear layers."""
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(self.base, config)
        for parameter in trained(model):
            parameter.data = parameter.data.to(getattr(torch, adapter_dtype))
        optimizer_step(model)
        try:
            yield model
        finally:
            self.base = model.unload()
            if hasattr(self.base, "peft_config"):
                del self.base.peft_config


def trained(model: PeftModel) -> list[torch.nn.Parameter]:
    """The adapter's parameters."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


#: vLLM's dummy weights are below 0.001, those of its norms too: smaller adapters would not show in its answers.
SCALE = 0.3


@torch.no_grad()
def optimizer_step(model: PeftModel) -> None:
    """Change every LoRA weight in place and wait until that is done."""
    parameters = trained(model)
    for parameter in parameters:
        parameter.normal_(std=SCALE)
    wait_for(parameters[0].device)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_weights(policy: Policy, shape: Shape, folder: Path, dtype: str) -> None:
    """The learner's base for the servers: logprobs of two models that differ could not be compared."""
    policy.base.save_pretrained(folder)
    shape.write(folder, dtype)  # its config.json is of another version of transformers, maybe
    (folder / "generation_config.json").unlink(missing_ok=True)
