"""One call of a reward function: its arguments and its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import cloudpickle


@dataclass
class RewardResult:
    """Result of one call of a reward function.

    Attributes:
        rewards: one for each row; None where the function does not apply.
        metrics, extras: arguments of its calls of `log_metric` and `log_extra`, in order.
        error: traceback of what it raised; the rewards then mean nothing.
    """

    rewards: list[float | None] = field(default_factory=list)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: list[tuple[str, list[Any]]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class RewardCall:
    """Rows of one or several groups, as TRL passes them to reward functions.

    Attributes:
        rows: keyword argument -> one value for each row: prompts, completions, completion_ids, dataset columns.
        state: passed as `trainer_state`.
    """

    rows: dict[str, list[Any]]
    state: Any

    def __len__(self) -> int:
        return len(self.rows["prompts"])

    @cached_property
    def payload(self) -> bytes:
        """Keyword arguments, pickled."""
        return cloudpickle.dumps({**self.rows, "trainer_state": self.state})

    def part(self, first: int, length: int = 1) -> RewardCall:
        """Return the call for `length` rows from row `first` on."""
        return RewardCall({name: values[first : first + length] for name, values in self.rows.items()}, self.state)


#: Numbers of consecutive rows and their results; None for rows that were not scored in time.
Parts = list[tuple[int, RewardResult | None]]
