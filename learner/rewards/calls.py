"""One call of a reward function: its arguments, its result, and what counts as a reward."""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import cloudpickle

from learner.utils.processes import Stopped
from shared.errors import InvalidRequest, LockstepError

#: TRL keeps rewards in float32, where the variance of a group of larger ones, or of their weighted sums, is infinite.
MAX_REWARD = 1e16


class RewardError(InvalidRequest):
    """A reward function raised, or returned what is no reward; the message names it, the cause has its traceback."""


@dataclass
class RewardResult:
    """Result of one call of a reward function.

    Attributes:
        rewards: one for each row; None where the function does not apply.
        metrics, extras: arguments of its calls of `log_metric` and `log_extra`, in order.
        error, traceback: why the rewards mean nothing; None if they do not.
    """

    rewards: list[float | None] = field(default_factory=list)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: list[tuple[str, list[Any]]] = field(default_factory=list)
    error: str | None = None
    traceback: str | None = None


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


def reward_names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    """Return a name for each function: its own, as in TRL, with a number where another has it."""
    names = []
    for function in functions:
        while isinstance(function, partial):
            function = function.func
        names.append(getattr(function, "__name__", type(function).__name__))
    return distinct(names)


def distinct(names: Sequence[str]) -> list[str]:
    """Return the names with a number where another has the same: rewards are kept and logged by name."""
    found: list[str] = []
    for name in names:
        own, number = name, 1
        while own in found:
            number += 1
            own = f"{name}_{number}"
        found.append(own)
    return found


def _completion(row: int) -> str:
    return f"completion {row + 1}"


def call_reward(
    name: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    row_name: Callable[[int], str] = _completion,
) -> list[float | None]:
    """Call a reward function as TRL does, and check what it returns as `checked_rewards` does.

    Raises:
        RewardError: also where the function raised.
    """
    with raising_by_name(name):
        rewards = function(**arguments)
        if inspect.isawaitable(rewards):
            rewards = asyncio.run(_awaited(rewards))
        rewards = list(rewards) if _is_list(rewards) else rewards
    return checked_rewards(name, rewards, arguments["prompts"], row_name)


def checked_rewards(
    name: str, rewards: Any, prompts: Sequence[Any], row_name: Callable[[int], str] = _completion
) -> list[float | None]:
    """Return a finite number for each row, or None where the function does not apply.

    Args:
        row_name: index of a row -> what an error calls it.

    Raises:
        RewardError: `rewards` are something else.
    """
    if not _is_list(rewards):
        raise RewardError(
            f"the reward {name!r} returned {type(rewards).__name__}, not a list with a number for each row"
        )
    rewards = list(rewards)
    if len(rewards) != len(prompts):
        raise RewardError(
            f"the reward {name!r} returned {len(rewards)} rewards for {len(prompts)} completions: return one for each"
        )
    return [
        None if reward is None else _number(name, reward, prompts[i], row_name(i)) for i, reward in enumerate(rewards)
    ]


@contextmanager
def raising_by_name(name: str) -> Iterator[None]:
    """Turn what a reward function raises into one line.

    Raises:
        RewardError: the cause is the error that was raised; a `LockstepError` is raised as it is.
    """
    try:
        yield
    except (LockstepError, KeyboardInterrupt, Stopped, GeneratorExit):
        raise
    except BaseException as error:  # sys.exit() in a reward function must not end a training, nor a panic of Rust
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"the reward {name!r} raised {type(error).__name__}: {' '.join(_written(str, error).split()):.500} (in "
            f"{place.name}, {place.filename}:{place.lineno}; LOCKSTEP_TRACEBACK=1 shows the traceback)"
        ) from error


def _number(name: str, reward: Any, prompt: Any, row: str) -> float:
    number = math.nan
    if not isinstance(reward, str | bytes):
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):
            number = float(reward)
    if abs(number) <= MAX_REWARD:
        return number
    raise RewardError(
        f"the reward {name!r} returned {_written(repr, reward):.60} for {row} (prompt: {str(prompt)!r:.120}): return a "
        f"number within ±{MAX_REWARD:g}, or None to leave the completion out"
    )


def _is_list(rewards: Any) -> bool:
    """Return whether these have an order, which sets have not."""
    return isinstance(rewards, Iterable) and not isinstance(rewards, str | bytes | Mapping | set | frozenset)


def _written(how: Callable[[Any], str], value: Any) -> str:
    """Return `str` or `repr` of an object of the user's, whose own may fail."""
    try:
        return how(value)
    except Exception as error:
        return f"({how.__name__}() of {type(value).__name__} raised {type(error).__name__})"


def _is_cancelled() -> bool:
    """Return whether the present task is cancelled from outside."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # outside of an event loop
        return False
    return task is not None and task.cancelling() > 0


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result
