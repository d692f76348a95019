"""Steps far below the noise of bfloat16: who serves the version before is named, who does not is left alone."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.adapters.exporter import lora_layers
from shared.adapter_file import LORA_B
from shared.errors import LockstepError
from tests.support.rounding_server import RATIOS, Pair


@pytest.mark.parametrize("fault", [{"behind": 1}, {"stuck_at": 0}], ids=str)
def test_named_within_three_steps_at_1e_5(fault):
    pair = Pair()
    pair.begin(RATIOS[1e-5])
    vars(pair.server).update(fault)
    with pytest.raises(LockstepError, match=r"does not serve r@0\.[123]: .* closest to those of r@0\.[012]\b"):
        pair.train(1, 3)


def test_named_within_three_steps_wherever_it_gets_stuck():
    pair = Pair(seed=1)
    pair.begin(RATIOS[1e-5])
    pair.train(1, 4)
    assert abs(pair.proof.step_share.value - 1) < 4 * pair.proof.step_share.error
    pair.server.stuck_at = 4
    with pytest.raises(LockstepError, match=r"does not serve r@0\.[567]"):
        pair.train(5, 7)


@pytest.mark.parametrize("fault", [{"behind": 1}, {"stuck_at": 0}], ids=str)
def test_named_within_twenty_steps_at_1e_6(fault):
    pair = Pair()
    pair.begin(RATIOS[1e-6])
    vars(pair.server).update(fault)
    with pytest.raises(LockstepError, match=r"does not serve r@0\.\d+: .* closest to those of r@0\.\d"):
        pair.train(1, 20)


def test_a_healthy_server_is_left_alone():
    pair = Pair()
    pair.begin(RATIOS[1e-6])
    pair.train(1, 3)
    found = pair.proof.step_share
    assert abs(found.value - 1) < 4 * found.error
    assert found.error < 1.5


def test_steps_that_become_small_are_looked_for_again():
    """Large ones would show in the mismatch if they were missing; a learning rate that decays ends that."""
    pair = Pair()
    pair.begin(60.0)
    pair.train(1, 2)
    assert pair.proof.step_share is None
    pair.optimizer = torch.optim.AdamW(
        [p for p in pair.model.parameters() if p.requires_grad], lr=1e-4 * pair.optimizer.param_groups[0]["lr"]
    )
    pair.server.stuck_at = 2
    with pytest.raises(LockstepError, match=r"does not serve r@0\.[345]: of the last step"):
        pair.train(3, 5)


def test_a_step_that_is_lost_as_adapters_are_rounded_is_not_missed():
    """A learner in float32 makes steps that servers in 16 bits hold no part of: none of them can arrive."""
    pair = Pair()
    pair.model.float()
    pair.begin(RATIOS[1e-5])
    pair.train(1, 1)
    held = [value.bfloat16().float() for value in pair.proof.weights.copied()]
    for number in (2, 3, 4):
        pair.proof.weights.write([value * (1 + number * 2**-12) for value in held])
        pair.proof.check(pair.publisher.push(number).version)
        pair.proof.keep_step()
        assert pair.proof.step_share is None
    assert all(torch.equal(a, b * (1 + 2**-10)) for a, b in zip(pair.proof.weights.copied(), held, strict=True))


def test_a_step_that_overflows_as_it_is_enlarged_is_enlarged_less():
    pair = Pair()
    pair.begin(RATIOS[1e-5])
    pair.train(1, 1)
    pair.proof._enlarged = 1e30
    for number in (2, 3):
        pair.train(number, number)
        assert pair.proof.step_share is not None
        assert abs(pair.proof.step_share.value - 1.0) < 4 * pair.proof.step_share.error < 4.0


@pytest.mark.parametrize("scaling", [-1.0, 2**1.5, 0.0])
def test_adapters_are_rounded_as_they_are_scaled(scaling):
    """By rsLoRA, say; `alpha_pattern` can switch a module off."""
    pair = Pair()
    pair.model.float()
    first = next(iter(pair.proof.weights.modules))
    for model in (pair.model, pair.server.policy):
        lora_layers(model, "default")[first].scaling["default"] = scaling
    if not scaling:
        pair.server.silent = frozenset([first])  # or it would divide by it
    pair.begin(RATIOS[1e-5])
    pair.train(1, 2)
    sent = pair.server.history["r"][-1][first + LORA_B].float()
    weights = pair.proof.weights
    held = weights.rounded(weights.copied(), torch.bfloat16)[len(weights.a)]
    assert torch.allclose(held * scaling, sent, rtol=1e-6)


def test_no_alarm_but_a_word_where_rounding_takes_small_updates(caplog):
    """With `--apply adapter` in 16 bits a server that serves the version before looks like one that does not."""
    pair = Pair(apply="adapter")
    pair.begin(RATIOS[1e-5])
    pair.server.behind = 1
    with caplog.at_level(logging.WARNING, "lockstep.sync"):
        pair.train(1, 3)
    assert pair.proof.step_share.value < 0.5
    assert [record.message for record in caplog.records if "--apply columns" in record.message]


def test_one_improbable_token_is_no_alarm_where_rounding_takes_small_updates():
    """A token in thousands, as trained policies have them in bfloat16; all tokens together are another matter."""
    pair = Pair(apply="adapter")
    pair.begin(RATIOS[1e-5])
    pair.step()
    version = pair.publisher.push(1).version
    measured = pair.proof.measure(pair.proof.probe.logprobs(), version)[0]
    off_N = np.zeros(measured.own.size)
    off_N[7] = 1.5 * measured.tolerance
    pair.proof.check_mismatch(replace(measured, served=measured.served + off_N))
    with pytest.raises(LockstepError, match="does not sample from the weights that were pushed"):
        pair.proof.check_mismatch(replace(measured, served=measured.served + off_N.max()))


def test_a_mismatch_of_four_times_the_noise():
    """Which the dtypes explain four times over."""
    pair = Pair()
    pair.begin(4.0)
    base = next(iter(pair.proof.bases.values()))
    pair.server.stuck_at = 0
    pair.step()
    version = pair.publisher.push(1).version
    pair.step()
    measured = pair.proof.measure(pair.proof.probe.logprobs(), version)[0]
    assert measured.rms_mismatch < base.tolerance
    assert measured.rms_mismatch > measured.rms_tolerance == pytest.approx(4 * base.rms_mismatch)
    with pytest.raises(LockstepError, match=r"rms \S+, tolerance"):
        pair.proof.check_mismatch(measured)


def test_samples_are_held_to_the_noise_of_the_pair():
    pair = Pair()
    noise = pair.proof.check_base()[0].rms_mismatch
    pair.proof.check_sampled(3 * noise, 1000)
    pair.proof.check_sampled(6 * noise, 1000)  # the first batch has shown three times the noise
    with pytest.raises(LockstepError, match="1000 sampled tokens differ"):
        pair.proof.check_sampled(30 * noise, 1000)
    pair.proof.check_sampled(math.inf, 0)


def test_a_quantized_base_calibrates_its_own_tolerances():
    pair = Pair(quantized=0.3)
    base = pair.proof.check_base()[0]
    assert base.rms_mismatch > 0.1
    assert base.max_mismatch > Pair().proof.check_base()[0].tolerance, "which would have been refused unquantized"
    pair.begin(RATIOS[1e-5])
    pair.train(1, 2)
    assert pair.proof.last.tolerance > base.max_mismatch
    with pytest.raises(LockstepError, match="at the base"):
        Pair(quantized=3.0).proof.check_base()  # another base altogether
