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
    quiet = torch.tensor([0.0, 0.0, 15.0, 0.0, 15.0], dtype=torch.double)
    both = measure(BATCH, lambda x: x + quiet, mode="token_mask", clip_min=None, clip_max=3.0)
    assert both.delta == pytest.approx(alone.delta / 4)
    assert both.clipped == pytest.approx(alone.clipped / 4)
