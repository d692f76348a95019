"""What rounding to the adapter's dtype takes from an optimizer's step."""

from __future__ import annotations

import deepspeed.utils
import pytest
import torch

from learner.adapters.rounding import RoundedUpdates

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


def test_where_nothing_is_rounded(masters: Masters) -> None:
    """Adapters in float32, and those without a copy, are what their optimizer updates: nobody is asked for a copy."""
    assert RoundedUpdates(make_model(torch.float32), torch.neg).last_lost() is None  # type: ignore[arg-type]
    plain = torch.nn.Linear(2, 1).to(torch.bfloat16)
    assert RoundedUpdates(plain, torch.neg).last_lost() is None  # type: ignore[arg-type]
