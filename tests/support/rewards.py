"""Reward functions for tests; without torch, so that reward workers start quickly."""

from __future__ import annotations

import time
from typing import Any

import numpy as np


def reward_odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of odd token ids."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def odd_at_leisure(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Give the same, after a second that costs no processor time."""
    time.sleep(1.0)
    return reward_odd(completion_ids)


def answers_seven(completions, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [1.0 if text.strip() == "7" else 0.0 for text in texts]


def third(prompts, completions, answer, nested, log_metric, log_extra, **_):
    """Values that float32 rounds, one that does not apply, and columns that not every group logs."""
    log_metric("mean_answer", sum(len(a) for a in answer) / len(answer))
    if answer[0] == "w2":
        log_extra("said", [str(completion)[-5:] for completion in completions])
    return [None if n["k"][0] == 1 else len(str(c)) / 3 + n["k"][2] for c, n in zip(completions, nested, strict=True)]


async def whole_thirds(completions, trainer_state, **_):
    return [trainer_state.global_step + np.float64(1 / 3) for _ in completions]


def slow(completions, completion_ids, **_):
    time.sleep(0.2)
    return [len(ids) / 10 for ids in completion_ids]


def environments_reader(completions, environments=None, **_):
    return [0.5] * len(completions)


def hangs_sometimes(completion_ids, **_):
    if any(len(ids) == 6 for ids in completion_ids):
        time.sleep(600)
    return [1.0] * len(completion_ids)


def raises(completions, **_):
    raise KeyError("no such answer")


def not_a_number(completions, **_):
    return [1.0, float("nan"), *[0.5] * (len(completions) - 2)]


async def infinite_later(completions, **_):
    return [float("inf")] * len(completions)


def too_large(completions, **_):
    """Finite, but not in float32."""
    return [1e39] * len(completions)


def text(completions, **_):
    return ["0.5"] * len(completions)


def too_few(completions, **_):
    return [1.0]


def first_is_best_unless_easy(completions, easy, **_):
    return [0.5 if easy[0] else float(i == 0) for i in range(len(completions))]


def all_the_same(completions, **_):
    return [1.0] * len(completions)
