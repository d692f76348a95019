"""The mismatch of a generation batch, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from learner.rollouts.mismatch import measure

OWN = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]])
SERVED = torch.tensor([[-1.1, -2.0, -2.0], [-1.0, -3.0, -9.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
BATCH = {"old_per_token_logps": OWN, "sampling_per_token_logps": SERVED, "completion_mask": MASK}


def test_mean_difference_and_kl():
    mismatch = measure(BATCH, lambda x: x, mode="token_mask", clip_min=None, clip_max=3.0)
    differences = [0.1, 0.0, -1.0, 0.0, 2.0]
    assert mismatch.delta == pytest.approx(3.1 / 5)
    assert mismatch.kl == pytest.approx(sum(math.exp(d) - 1 - d for d in differences) / 5)
    assert mismatch.clipped == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("mode", "low", "high", "clipped"),
    [
        ("token_truncate", 0.5, 3.0, 2 / 5),
        ("token_mask", None, None, 0.0),
        ("sequence_mask", None, 3.0, 1 / 2),  # e^-0.9 and e^2
        ("sequence_truncate", 0.5, 8.0, 1 / 2),
        ("sequence_truncate", 0.5, 3.0, 1.0),
    ],
)
def test_clipped_tokens_or_sequences(mode, low, high, clipped):
    assert measure(BATCH, lambda x: x, mode=mode, clip_min=low, clip_max=high).clipped == pytest.approx(clipped)


def test_tool_tokens_unknown_logprobs_and_empty_sequences_do_not_count():
    served = SERVED.clone()
    served[0, 2] = math.nan
    batch = {**BATCH, "sampling_per_token_logps": served, "tool_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
    mismatch = measure(batch, lambda x: x, mode="sequence_mask", clip_min=2.0, clip_max=3.0)
    assert mismatch.delta == pytest.approx(0.1 / 2)
    assert mismatch.clipped == 1.0
    nothing = {**BATCH, "completion_mask": torch.zeros_like(MASK)}
    assert measure(nothing, lambda x: x, mode="token_mask", clip_min=None, clip_max=3.0).delta == 0.0


def test_ranks_are_weighted_by_their_tokens():
    alone = measure(BATCH, lambda x: x, mode="token_mask", clip_min=None, clip_max=3.0)
    quiet = torch.tensor([0.0, 0.0, 15.0, 0.0, 15.0, 0.0, 0.0, 0.0], dtype=torch.double)
    both = measure(BATCH, lambda x: x + quiet, mode="token_mask", clip_min=None, clip_max=3.0)
    assert both.delta == pytest.approx(alone.delta / 4)
    assert both.clipped == pytest.approx(alone.clipped / 4)


@pytest.mark.parametrize(
    ("mode", "low", "high", "weights"),
    [
        (None, None, 3.0, [1, 1]),
        ("token_truncate", None, 3.0, [math.exp(0.1), 1, math.exp(-1), 1, 3]),
        ("token_mask", 0.5, 3.0, [math.exp(0.1), 1, 0, 1, 0]),
        ("sequence_truncate", None, 3.0, [math.exp(-0.9), 3]),
        ("sequence_mask", None, 3.0, [math.exp(-0.9), 0]),
        ("sequence_mask", None, None, [math.exp(-0.9), math.exp(2)]),
        ("sequence_mask", 9.0, None, [0, 0]),
    ],
)
def test_effective_sample_size_is_that_of_the_weights(mode, low, high, weights):
    mismatch = measure(BATCH, lambda x: x, mode=mode, clip_min=low, clip_max=high)
    squares = sum(weight**2 for weight in weights)
    expected = sum(weights) ** 2 / (len(weights) * squares) if squares else 0.0
    assert mismatch.effective_sample_size == pytest.approx(expected)
    assert mode or mismatch.clipped == 0.0


def test_what_the_off_policy_mask_drops_is_not_effective():
    """Of four sequences one is both worse than its group and far from the learner's distribution."""
    far = torch.tensor([0.0, -0.5, 0.5, 0.5])
    batch = {
        "old_per_token_logps": torch.zeros(4, 3),
        "sampling_per_token_logps": far[:, None].expand(4, 3),
        "completion_mask": torch.ones(4, 3),
        "advantages": torch.tensor([-1.0, -1.0, 1.0, -1.0]),
    }
    options = {"mode": None, "clip_min": None, "clip_max": None}
    assert measure(batch, lambda x: x, off_policy_threshold=0.1, **options).effective_sample_size == 3 / 4


def test_ratios_beyond_float32_leave_a_number():
    batch = {**BATCH, "old_per_token_logps": torch.tensor([[500.0, 500.0, 500.0], [0.0, 0.0, 0.0]])}
    mismatch = measure(batch, lambda x: x, mode="sequence_mask", clip_min=None, clip_max=None)
    assert mismatch.effective_sample_size == pytest.approx(1 / 2)


@pytest.mark.parametrize("length", [24, 512, 2048])
def test_long_sequences_leave_little_of_sequence_ratios(length):
    """Tokens' log ratios of a bfloat16 pair, 0.06 nats each: that of a sequence is the sum of all of its tokens'."""
    generator = torch.Generator().manual_seed(0)
    served = torch.randn(512, length, generator=generator) * 0.06 + 0.06**2 / 2
    batch = {
        "old_per_token_logps": torch.zeros_like(served),
        "sampling_per_token_logps": served,
        "completion_mask": torch.ones_like(served),
    }

    def left(mode: str) -> float:
        return measure(batch, lambda x: x, mode=mode, clip_min=None, clip_max=3.0).effective_sample_size

    assert (left("sequence_mask") < 0.5) == (length > 24)
    assert left("token_truncate") > 0.99
