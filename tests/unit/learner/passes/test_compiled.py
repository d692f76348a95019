"""Compiled layers: the same values and gradients, one compilation for all layers, lengths and updates."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.passes import attention
from learner.passes.compiled import CompiledLayers
from learner.passes.lora_product import use_one_product
from learner.passes.packing import Row, plan_passes


@pytest.fixture
def model(model_dir: Path) -> PeftModel:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, attn_implementation=attention.PACKED)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    use_one_product(model, "default")
    return model


def logits_and_gradients(model: PeftModel, length: int = 3, *, grad: bool = True) -> list[torch.Tensor]:
    rows = [Row([5, 6, 7], [8] * length), Row([5, 6, 7], [9, 10]), Row([11], [12])]
    [packed] = plan_passes(rows, 512, torch.device("cpu"))
    model.zero_grad()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        options = attention.arguments(packed)
        logits = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, **options).logits
    if grad:
        logits.float().square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logits.detach(), *(parameter.grad.clone() for parameter in trained if parameter.grad is not None)]


def step(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)


def test_values_and_gradients_are_the_same_and_nothing_is_compiled_again(model: PeftModel) -> None:
    """For other layers, lengths and updates."""

    def passes(*lengths: int) -> list[list[torch.Tensor]]:
        return [logits_and_gradients(model, length, grad=grad) for length in lengths for grad in (False, True)]

    before = passes(3, 4)
    layers = CompiledLayers(model, backend="aot_eager")
    compiled = passes(3, 4)
    # Without gradient; with gradient, into the first layer and into others.
    assert counters["frames"]["total"] == 3
    step(model)
    compiled_later = passes(2, 17)
    assert counters["frames"]["total"] == 3
    assert not counters["graph_break"]
    layers.undo()
    for expected, found in zip((*before, *passes(2, 17)), (*compiled, *compiled_later), strict=True):
        torch.testing.assert_close(found, expected)


class Gated(GradientCheckpointingLayer):
    """The half of a decoder layer that holds most activations."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 48), nn.Linear(8, 48), nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_what_is_cheap_to_have_again_is_not_kept() -> None:
    """The product of gate and up is not, though a matrix product reads it in the backward pass."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, kept = nn.Sequential(Gated()), torch.randn(5, 8), list[torch.Size]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    def gradients() -> list[torch.Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x).square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    expected = gradients()
    kept.clear()
    CompiledLayers(model, backend="aot_eager_decomp_partition")
    for found, each in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, each)
    assert kept.count(torch.Size([5, 48])) == 2


def test_what_cannot_be_compiled_is_computed_as_before(model: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits_and_gradients(model)

    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise ValueError("no compiler here")

    layers = CompiledLayers(model, backend=broken)
    with caplog.at_level(logging.WARNING):
        found = logits_and_gradients(model)
    torch.testing.assert_close(found, expected)
    assert not layers.active
    assert "no compiler here" in caplog.text
