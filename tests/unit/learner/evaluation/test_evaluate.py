"""Scores of a policy: reward functions are called as TRL calls them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from datasets import Dataset

from learner.evaluation.evaluate import evaluate
from learner.servers.client import RolloutClient
from learner.tasks import Task
from shared.errors import InvalidRequest
from shared.sampling import SamplingParams


def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 2) for ids in completion_ids]


async def later(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return odd(completion_ids)


class Awaitable:
    """Can be awaited, and is no coroutine."""

    def __init__(self, completion_ids: list[list[int]], **_: Any) -> None:
        self.rewards = odd(completion_ids)

    def __await__(self) -> Generator[Any, None, list[float]]:
        yield from ()
        return self.rewards


def _task(*functions: Any) -> Task:
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 9}"} for i in range(8)])
    return Task(name="toy", train=rows, eval=rows, reward_funcs=list(functions))


def test_any_awaitable_is_awaited(server) -> None:
    client = RolloutClient("http://fake", transport=server.transport)
    result = evaluate(client, _task(odd, later, Awaitable), policy="base", sampling=SamplingParams(max_tokens=4))
    assert result.rewards["odd"] is not None
    assert result.rewards == dict.fromkeys(["odd", "later", "Awaitable"], result.rewards["odd"])
    assert result.reward == pytest.approx(3 * result.rewards["odd"])


def test_every_completion_needs_a_reward(server) -> None:
    def short(**_: Any) -> list[float]:
        return [1.0]

    client = RolloutClient("http://fake", transport=server.transport)
    with pytest.raises(InvalidRequest, match="short returned 1 rewards for 8 completions"):
        evaluate(client, _task(short), policy="base", sampling=SamplingParams(max_tokens=4))
