"""Comparison of evaluations: intervals, and differences on the same questions."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from learner.evaluation.results import (
    EvalResult,
    EvalRow,
    comparison_document,
    comparison_table,
    paired_differences,
)


def result(policy: str, rewards: list[list[float]]) -> EvalResult:
    rows = [EvalRow(i, "", "", "stop", 1, {"odd": r}, r) for i, values in enumerate(rewards) for r in values]
    mean = sum(sum(values) / len(values) for values in rewards) / len(rewards)
    return EvalResult("toy", policy, [policy], len(rewards), mean, 0.1, {"odd": mean}, 1, rows)


def test_differences_are_paired() -> None:
    base = result("base", [[0.0], [1.0], [0.0], [1.0]])
    same = result("same", [[0.0], [1.0], [0.0], [1.0]])
    better = result("better", [[1.0, 0.0], [1.0, 1.0], [0.5, 0.5], [1.0, 1.0]])
    no, gain = paired_differences([base, same, better])
    assert (no.difference, no.stderr, no.low, no.high) == (0.0, 0.0, 0.0, 0.0)
    values = torch.tensor([0.5, 0.0, 0.5, 0.0])
    assert gain.against == "base"
    assert gain.difference == pytest.approx(0.25)
    assert gain.stderr == pytest.approx(values.std().item() / 2)
    assert gain.high - gain.low == pytest.approx(2 * 1.959964 * gain.stderr)
    text = comparison_table([base, same, better])
    assert "+0.250 [" in text[2]
    assert "against base" in text[2]
    assert "against" not in text[0]
    assert paired_differences([]) == []


def test_intervals() -> None:
    low, high = result("p", [[1.0]] * 10).interval()
    assert high == 1.0, "ten of ten is no proof of always"
    assert 0.6 < low < 0.8, "ten of ten is no proof of always"
    low, high = result("p", [[3.0], [5.0]]).interval()
    assert (low + high) / 2 == pytest.approx(4.0)
    assert high - low == pytest.approx(2 * 1.959964 * 0.1)


def test_questions_that_only_one_policy_has_rewards_for() -> None:
    base, other = result("base", [[0.0], [1.0], [0.0]]), result("other", [[1.0], [1.0], [0.0]])
    unscored = [replace(row, reward=None) if row.question == 0 else row for row in other.rows]
    [paired] = paired_differences([base, replace(other, rows=unscored)])
    assert (paired.questions, paired.difference) == (2, 0.0)
    nothing = replace(other, rows=[replace(row, reward=None) for row in other.rows])
    assert paired_differences([base, nothing]) == [None]


def test_the_document_is_json_whatever_prompts_hold() -> None:
    rows = [
        EvalRow(0, [{"role": "user", "content": "", "x": math.nan, "y": {1, 2}, "z": "\ud800"}], "", "stop", 1, {}, 1.0)
    ]
    document = comparison_document([EvalResult("toy", "base", [], 1, 1.0, 0.0, {}, 1, rows)])
    again = json.loads(json.dumps(document, allow_nan=False))
    assert again["results"][0]["rows"][0]["prompt"][0]["x"] is None
