"""Base and adapter as one product: PEFT's values and gradients in float32, and one rounding in bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from learner.passes.lora_product import use_one_product


class Net(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64, bias=bias), nn.Linear(64, 32, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def peft_net(*, bias: bool = False, dtype: torch.dtype = torch.float32, b_std: float = 0.1, **options):
    torch.manual_seed(0)
    model = Net(bias).to(dtype)
    model = get_peft_model(
        model, LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": ["first", "second"], **options})
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            parameter.data.normal_(std=b_std)
    return model


def gradients(model, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), list(torch.autograd.grad((y.float() * torch.arange(y.shape[-1])).sum(), [x, *trained]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"use_rslora": True},
        {"rank_pattern": {"first": 4}, "alpha_pattern": {"second": 3}},
        {"target_modules": ["second"]},
    ],
    ids=str,
)
def test_float32_is_pefts_own(options):
    model = peft_net(**options)
    plain = copy.deepcopy(model)
    assert use_one_product(model, "default") == len(options.get("target_modules", "ab"))
    x = torch.randn(3, 5, 48)
    y, ours = gradients(model, x)
    expected, theirs = gradients(plain, x)
    torch.testing.assert_close(y, expected)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_small_updates_reach_the_output_in_bfloat16(autocast):
    """The output moves as in float32: share = sum(moved * true) / sum(true * true)."""
    base = torch.float32 if autocast else torch.bfloat16
    model = peft_net(dtype=base, b_std=2e-4)
    if autocast:  # the base's weights lie on the bfloat16 grid
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    x = torch.randn(4096, 48).bfloat16().to(base)
    layer = model.base_model.model.first
    true = (x.float() @ layer.lora_A["default"].weight.T) @ layer.lora_B["default"].weight.T * layer.scaling["default"]

    def share() -> float:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            moved = layer(x).float() - layer.base_layer(x).float()
        return float((moved * true).sum() / (true * true).sum())

    before = share()
    use_one_product(model, "default")
    assert before < 0.7
    assert share() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_near_those_of_float32(dtype):
    model = peft_net(dtype=dtype)
    reference = copy.deepcopy(model).float()
    use_one_product(model, "default")
    x = torch.randn(64, 48).to(dtype)
    _, ours = gradients(model, x)
    _, theirs = gradients(reference, x.float())
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.float() - other).norm() < 0.02 * other.norm()


def test_the_base_keeps_its_bits_and_computes_alone_where_the_adapter_is_disabled():
    model = peft_net(dtype=torch.bfloat16)
    before = copy.deepcopy(model)
    use_one_product(model, "default")
    x = torch.randn(7, 48).bfloat16()
    model(x)
    for (name, now), (_, then) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(now, then), name
    with torch.no_grad(), model.disable_adapter(), before.disable_adapter():
        assert torch.equal(model(x), before(x))


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_is_no_plain_lora_is_left_to_peft(options):
    assert use_one_product(peft_net(**options), "default") == 0


@pytest.mark.parametrize("rank", [1, 4, 8, 12])
def test_any_rank_in_16_bits(rank):
    model = peft_net(dtype=torch.bfloat16, r=rank)
    reference = copy.deepcopy(model).float()
    use_one_product(model, "default")
    x = torch.randn(64, 48).bfloat16()
    y, ours = gradients(model, x)
    expected, theirs = gradients(reference, x.float())
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.float() - other).norm() < 0.03 * other.norm()


def test_a_copy_is_its_own():
    model = peft_net()
    use_one_product(model, "default")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    with other.disable_adapter(), torch.no_grad():
        assert not other(torch.randn(3, 48)).any()


def test_a_weight_that_was_moved_is_not_kept_twice():
    model = peft_net(dtype=torch.bfloat16)
    use_one_product(model, "default")
    layer = model.base_model.model.first
    layer.base_layer.weight.data = layer.base_layer.weight.data.clone()
    model(torch.randn(3, 48).bfloat16())
    assert layer.wide is None


def test_another_active_adapter_is_left_to_peft():
    model = peft_net()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    plain = copy.deepcopy(model)
    use_one_product(model, "default")
    model.set_adapter("other")
    plain.set_adapter("other")
    x = torch.randn(7, 48)
    assert torch.equal(model(x), plain(x))
