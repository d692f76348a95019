"""What counts as a reward, the same in training and evaluation."""

from __future__ import annotations

import asyncio
import sys
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from learner.rewards.calls import RewardError, call_reward, checked_rewards, raising_by_name, reward_names
from learner.utils.processes import Stopped
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


@pytest.mark.parametrize("rewards", [None, 1.0, "ab", b"ab", {"a": 1, "b": 2}, {0.0, 1.0}, frozenset({0.0, 1.0})])
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


@pytest.mark.parametrize("error", [asyncio.CancelledError(), type("Panic", (BaseException,), {})("of Rust")])
def test_errors_that_are_no_exceptions_have_a_name_too(error: BaseException) -> None:
    def fails(**_: Any) -> None:
        raise error

    async def fails_later(**_: Any) -> None:
        raise error

    for function in (fails, fails_later):
        with pytest.raises(RewardError, match=rf"^the reward 'g' raised {type(error).__name__}: "):
            call_reward("g", function, {"prompts": []})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped("SIGTERM")])
def test_a_signal_is_no_error_of_a_reward(error: BaseException) -> None:
    with pytest.raises(type(error)), raising_by_name("g"):
        raise error


def test_a_reward_that_is_cancelled_is_no_error_of_its_own() -> None:
    async def waits() -> None:
        with raising_by_name("g"):
            await asyncio.sleep(60)

    async def cancels() -> None:
        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancels())


def test_what_cannot_be_written_is_named_all_the_same() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise ValueError

        __repr__ = __str__

    def fails(**_: Any) -> None:
        raise Odd

    with pytest.raises(RewardError, match="raised Odd: "):
        call_reward("g", fails, {"prompts": []})
    with pytest.raises(RewardError, match=r"returned .*Odd.* for completion 1"):
        checked_rewards("g", [Odd()], ["p"])


def test_errors_that_say_what_to_do_stay_as_they_are() -> None:
    def refuses(**_: Any) -> None:
        raise InvalidRequest("needs a column 'answer'")

    with pytest.raises(InvalidRequest, match=r"^needs a column"):
        call_reward("g", refuses, {"prompts": []})


def test_names_are_trls_and_differ() -> None:
    def score() -> None: ...

    assert reward_names([score, partial(score), partial, score]) == ["score", "score_2", "partial", "score_3"]
