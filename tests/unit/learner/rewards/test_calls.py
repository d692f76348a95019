"""What counts as a reward, the same in training and evaluation."""

from __future__ import annotations

import sys
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from learner.rewards.calls import RewardError, call_reward, checked_rewards, reward_names
from shared.errors import InvalidRequest


@pytest.mark.parametrize(
    "rewards",
    [
        [1, None],
        (True, None),
        [torch.tensor(1.0), None],
        [np.float32(1), None],
        [Decimal(1), None],
        iter([1.0, None]),
        {1.0: 0, None: 0}.keys(),
    ],
)
def test_numbers_and_none(rewards: Any) -> None:
    assert checked_rewards("f", rewards, ["p", "p"]) == [1.0, None]


def test_a_tensor_of_rewards() -> None:
    assert checked_rewards("f", torch.tensor([0.5, 1.0]), ["p", "p"]) == [0.5, 1.0]


@pytest.mark.parametrize(
    "reward", [float("nan"), float("inf"), -float("inf"), 1e39, -1e17, 10**400, "1", b"1", [1.0], {}, torch.ones(2), 1j]
)
def test_anything_else_is_refused_by_reward_and_row(reward: Any) -> None:
    with pytest.raises(RewardError, match=r"the reward 'f' returned .* for question 2 \(prompt: 'second'\)") as refused:
        checked_rewards("f", [None, reward], ["first", "second"], lambda row: f"question {row + 1}")
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("rewards", [None, 1.0, "ab", b"ab", {"a": 1, "b": 2}])
def test_not_a_list(rewards: Any) -> None:
    with pytest.raises(RewardError, match=r"'f' returned \w+, not a list "):
        checked_rewards("f", rewards, ["p", "p"])


def test_an_error_is_one_line_and_the_traceback_its_cause() -> None:
    def fails(**_: Any) -> None:
        raise ValueError("two\nlines")

    with pytest.raises(
        RewardError, match=r"^the reward 'g' raised ValueError: two lines \(in fails, .*test_calls"
    ) as found:
        call_reward("g", fails, {"prompts": []})
    assert isinstance(found.value.__cause__, ValueError)
    with pytest.raises(RewardError, match="raised SystemExit"):
        call_reward("g", lambda **_: sys.exit(3), {"prompts": []})


def test_errors_that_say_what_to_do_stay_as_they_are() -> None:
    def refuses(**_: Any) -> None:
        raise InvalidRequest("needs a column 'answer'")

    with pytest.raises(InvalidRequest, match=r"^needs a column"):
        call_reward("g", refuses, {"prompts": []})


def test_names_are_trls_and_differ() -> None:
    def score() -> None: ...

    assert reward_names([score, partial(score), partial, score]) == ["score", "score_2", "partial", "score_3"]
