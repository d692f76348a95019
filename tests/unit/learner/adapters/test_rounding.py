"""What rounding to the adapter's dtype takes from an optimizer's step."""

from __future__ import annotations

import deepspeed.utils
import pytest
import torch

from learner.adapters.rounding import RoundedUpdates, keep_master_weights
from shared.errors import UnsupportedAdapter

Masters = dict[int, torch.Tensor]


@pytest.fixture
def masters(monkeypatch: pytest.MonkeyPatch) -> Masters:
    """The float32 copies, by the number that ZeRO-3 gives a parameter."""
    held: Masters = {}
    monkeypatch.setattr(deepspeed.utils, "safe_get_local_fp32_param", lambda parameter: held[parameter.ds_id])
    return held


def make_model(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1, bias=False)).to(dtype)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    return model


def test_what_is_lost_of_a_step(masters: Masters) -> None:
    """Units in the last place of bfloat16 are 2^-7 at 1 and 2^-6 at 2."""
    masters.update({0: torch.tensor([[1.0, 2.0]]), 1: torch.tensor([[1.0]])})
    rounded = RoundedUpdates(make_model(), lambda local: local)  # type: ignore[arg-type]

    def step(*by: float) -> float | None:
        masters[0] = masters[0] + torch.tensor([by[:2]])
        masters[1] = masters[1] + torch.tensor([by[2:]])
        return rounded.last_lost()

    assert step(2**-7, 2**-6, 0.0) == 0.0
    assert step(2**-9, 2**-8, 2**-9) == 1.0  # nothing of it shows
    # Of 3/4 of a unit each, the first two make a whole one with what was kept back, the third does by itself.
    assert step(0.75 * 2**-7, 0.75 * 2**-6, 0.0) == pytest.approx(1 / 3)
    assert step(0.0, 0.0, 0.0) is None


def test_copies_of_zero_1_and_2_are_looked_at(masters: Masters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed.utils, "safe_get_full_fp32_param", lambda parameter: masters[parameter.number])
    model = torch.nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    model.weight.number, model.weight.get_full_hp_param = 0, object()
    masters[0] = torch.tensor([[1.0, 2.0]])
    rounded = RoundedUpdates(model, lambda local: local)  # type: ignore[arg-type]
    masters[0] = masters[0] + torch.tensor([[2**-9, 2**-8]])
    assert rounded.last_lost() == 1.0


def test_where_nothing_is_rounded(masters: Masters) -> None:
    """Adapters in float32 are what their optimizer updates: nobody is asked for a copy."""
    assert RoundedUpdates(make_model(torch.float32), torch.neg).last_lost() is None  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_without_a_copy_are_not_passed_over(dtype: torch.dtype) -> None:
    plain = torch.nn.Linear(2, 1).to(dtype)
    with pytest.raises(UnsupportedAdapter, match=r"2 parameters train in torch.*16 without a float32 copy, weight"):
        RoundedUpdates(plain, torch.neg)  # type: ignore[arg-type]
    assert keep_master_weights(plain) == 2  # type: ignore[arg-type]
    assert RoundedUpdates(plain, torch.neg).last_lost() is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("keeps", "least", "most"), [(False, 0.0, 0.5), (True, 0.99, 1.01)])
def test_small_steps_move_the_adapter(keeps: bool, least: float, most: float) -> None:
    """A of a rank-16 adapter of width 576, 20 steps of AdamW at 1e-5: its movement regressed on the true one."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(576, 16, bias=False).to(torch.bfloat16)
    true = torch.nn.Linear(576, 16, bias=False)
    true.weight.data = layer.weight.data.float()
    start = true.weight.data.clone()
    if keeps:
        keep_master_weights(layer)  # type: ignore[arg-type]
    both = torch.optim.AdamW([layer.weight, true.weight], lr=1e-5, weight_decay=0.0)
    slope = torch.randn(16, 576)
    for _ in range(20):
        gradient = slope + torch.randn(16, 576)
        for each in (layer, true):
            each.weight.grad = gradient.to(each.weight.dtype)
        both.step()
    moved, expected = layer.weight.data.float() - start, true.weight.data - start
    assert least <= float((moved * expected).sum() / expected.square().sum()) <= most
