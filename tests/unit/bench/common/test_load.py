"""Answers that are checked, and windows of a load, with pushes and without; nothing is started."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest

from bench.common.load import COMPLETIONS, Record, compare, pushing, random_prompts, sampled, tokens_within


def test_tokens_are_spread_over_the_time_of_their_request() -> None:
    records = [Record(0.0, 2.0, 64), Record(2.0, 4.0, 64)]
    assert tokens_within(records, 1.0, 3.0) == pytest.approx(64)
    assert tokens_within(records, 5.0, 6.0) == 0
    windows = list(pairwise([0.0, 2.0, 4.0]))
    assert compare(records, windows)["ratio"] == {"median": 1.0, "mean": 1.0, "min": 1.0, "max": 1.0}


def test_a_share_of_the_rate_comes_with_how_small_a_loss_its_windows_can_show() -> None:
    windows = list(pairwise([0.0, 1.0, 2.0, 3.0, 4.0]))
    records = [Record(start, end, tokens) for (start, end), tokens in zip(windows, [100, 50, 100, 200], strict=True)]
    found = compare(records, windows)
    assert found["share"] == pytest.approx(1.0), "half and double are equally far from one"
    assert found["share_error"] == pytest.approx(math.log(2))
    assert compare(records, windows[:2])["share_error"] is None
    stalled = compare(records[:3], windows)
    assert (stalled["share"], stalled["share_error"]) == (0.0, None), "of a window in which nothing is decoded"


def test_a_push_that_waits_delays_the_next_one() -> None:
    quick, slow = list[float](), list[float]()
    pushing(1.5, lambda: quick.append(time.monotonic()), every_s=0.1)
    pushing(1.5, lambda: (slow.append(time.monotonic()), time.sleep(1.0)), every_s=0.1)
    assert len(slow) == 2 < len(quick) <= 16


def test_choices_are_put_in_order() -> None:
    def choice(index: int) -> str:
        return f'{{"index": {index}, "token_ids": [{index}], "logprobs": {{"token_logprobs": [-1.0]}}}}'

    content = f'{{"choices": [{choice(1)}, {choice(0)}]}}'.encode()
    assert sampled(COMPLETIONS, 200, content, 1, 2) == [([0], [-1.0]), ([1], [-1.0])]


def test_prompts_are_the_same_for_the_same_seed() -> None:
    assert random_prompts(3, 512, 16, 1) == random_prompts(3, 512, 16, 1) != random_prompts(3, 512, 16, 2)
