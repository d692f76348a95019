"""The reward that an agent returns, as a reward function of TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def agent_reward(prompts: list[Any], **_: Any) -> list[float | None]:
    """Stand for the agent's reward where TRL requires a reward function: `GRPOTrainer(reward_funcs=agent_reward)`."""
    return [None] * len(prompts)


class AgentReward:
    """Returns what the agents of the present batch returned.

    Attributes:
        rewards: one for each row of this rank; None where the agent returned none, or failed.
        open: the rows that reward functions score: their agent did not fail, and returned no reward.
    """

    __name__ = "agent"

    def __init__(self) -> None:
        self.rewards: Sequence[float | None] = ()
        self.open: list[int] = []

    def __call__(self, prompts: list[Any], **_: Any) -> list[float | None]:
        return list(self.rewards)
