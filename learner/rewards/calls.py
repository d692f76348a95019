"""One call of a reward function: what goes in, what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import cloudpickle


@dataclass
class RewardResult:
    """What one call of a reward function gave.

    Attributes:
        rewards: one for each row; None where the function does not apply.
        metrics, extras: what it handed to `log_metric` and `log_extra`, in order.
        error: traceback of what it raised; then the rewards mean nothing.
    """

    rewards: list[float | None] = field(default_factory=list)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: list[tuple[str, list[Any]]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class RewardCall:
    """Rows of one group, as TRL hands them to reward functions.

    Attributes:
        rows: keyword argument -> one value for each row: prompts, completions, completion_ids, dataset columns.
        state: passed as `trainer_state`.
    """

    rows: dict[str, list[Any]]
    state: Any

    def __len__(self) -> int:
        return len(self.rows["prompts"])

    @property
    def kwargs(self) -> dict[str, Any]:
        return {**self.rows, "trainer_state": self.state}

    @cached_property
    def payload(self) -> bytes:
        return cloudpickle.dumps(self.kwargs)

    def row(self, index: int) -> RewardCall:
        return RewardCall({name: values[index : index + 1] for name, values in self.rows.items()}, self.state)


#: Consecutive rows of a call and what they were answered; None for rows that could not be scored in time.
Parts = list[tuple[int, RewardResult | None]]
