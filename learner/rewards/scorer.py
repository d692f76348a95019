"""Scores groups as soon as their completions arrive; the trainer finds the rewards ready when it asks for them."""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import cloudpickle

from learner.rewards.calls import Parts, RewardCall, RewardError
from learner.rewards.pool import RewardPool
from shared.rollouts import Completion

logger = logging.getLogger("lockstep.rewards")

Row = dict[str, Any]
#: In place of a generation batch's number, during evaluation.
EVALUATION = -1
#: Standard deviation of rewards that are equal, as for TRL's `frac_reward_zero_std`.
_NO_DEVIATION = 1e-8


@dataclass
class Rewards:
    """Takes completions as they arrive, on any thread; returns rewards to the trainer, on its thread.

    Rewards computed early are a cache: they are used only for exactly the rows and completions that the trainer then
    asks for.

    Attributes:
        wait_seconds: time the training thread waited for rewards.
        unscored: function name -> rewards that are missing because it hung or died.

    Args:
        pool: reward functions by their number in the trainer.
        group_size: completions of a prompt in training.
        batch: returns the number of the present generation batch.
        weights: returns the trainer's weight of each reward function.
        normalizes: whether each function's rewards of a group are normalized before they are added: TRL's
            `normalize_then_sum`.
        early_call: dataset rows, token ids of their completions -> the call that the trainer will make for them; None
            if that cannot be known before.
    """

    pool: RewardPool
    group_size: int
    batch: Callable[[], int]
    weights: Callable[[], list[float]]
    early_call: Callable[[list[Row], list[list[int]]], RewardCall] | None
    normalizes: bool = False
    wait_seconds: float = field(default=0.0, init=False)
    unscored: Counter[str] = field(default_factory=Counter, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    #: Batch and first row of a group -> its call, and the outcome of each function that was not collected yet.
    _groups: dict[tuple[int, int], tuple[RewardCall, dict[int, Future[Parts]]]] = field(
        default_factory=dict, init=False
    )
    _expected: dict[int, list[Row]] = field(default_factory=dict, init=False)

    def expect(self, batch: int, rows: Sequence[Row]) -> None:
        """Note the dataset rows of this rank in a generation batch, one for each completion."""
        with self._lock:
            self._expected[batch] = list(rows)

    def forget_before(self, batch: int) -> None:
        """Drop rows and rewards of earlier generation batches and of evaluations."""
        with self._lock:
            self._groups = {place: group for place, group in self._groups.items() if place[0] >= batch}
            self._expected = {known: rows for known, rows in self._expected.items() if known >= batch}

    def arrived(self, batch: int | None, first: int, completions: Sequence[Completion]) -> None:
        """Begin to score completions of the rows from `first` on; those of incomplete groups wait for `collect`.

        Args:
            batch: generation batch; None: the present one.
        """
        size = self.group_size
        with self._lock:
            batch = self.batch() if batch is None else batch
            rows = self._expected.get(batch)
            if not self.early_call or rows is None or len(rows) % size or first % size or len(completions) % size:
                return
            for start in range(0, len(completions), size):
                row = first + start
                completion_ids = [completion.token_ids for completion in completions[start : start + size]]
                self._pending((batch, row), self.early_call(rows[row : row + size], completion_ids))

    def totals(self, batch: int, first: int) -> list[float]:
        """Wait for the rewards of the group from row `first` on; return what TRL makes advantages of, NaN for none.

        Raises:
            RewardError: a reward function raised, or returned what is no reward.
        """
        with self._lock:
            pending = dict(self._groups[batch, first][1])
        columns = [self._checked(self.pool.wait(outcome)) for outcome in pending.values()]
        weights = [self.weights()[i] for i in pending]
        return group_totals(columns, weights, normalizes=self.normalizes)

    def collect(
        self,
        index: int,
        call: RewardCall,
        log_extra: Callable[[str, list[Any]], None],
        log_metric: Callable[[str, float], None],
        *,
        batch: int,
        group_size: int,
    ) -> list[float | None]:
        """Return the rewards of function `index` for all rows of this rank, and pass on what it logged, in row order.

        Raises:
            RewardError: the function raised, or returned what is no reward.
        """
        began = time.perf_counter()
        outcomes = []
        with self._lock:
            for first, part in _groups(call, group_size):
                pending = self._pending((batch, first), part)
                # Collected before: compute it again.
                outcomes.append(pending.pop(index) if index in pending else self.pool.submit(index, part))
                if not pending:
                    del self._groups[batch, first]
        parts = [part for outcome in outcomes for part in self.pool.wait(outcome)]
        if batch != EVALUATION:
            self.wait_seconds += time.perf_counter() - began
        name, unscored = self.pool.names[index], sum(rows for rows, result in parts if result is None)
        if unscored and not self.unscored[name]:
            logger.warning(
                "the reward %s gave %d sample(s) no reward within %g s each, or ended its process; they count as "
                "unscorable. Make it faster, give it a limit of its own, or raise reward_timeout_s (warned of once, "
                "counted as unscored)",
                name,
                unscored,
                self.pool.timeout_s,
            )
        self.unscored[name] += unscored
        rewards = self._checked(parts)
        _replay(parts, log_extra, log_metric)
        return rewards

    def close(self) -> None:
        """End the workers."""
        self.early_call = None
        self.pool.close()

    def _pending(self, place: tuple[int, int], call: RewardCall) -> dict[int, Future[Parts]]:
        """Return the outcomes of the group at `place`; begin to score it unless that was done for the same call."""
        if place not in self._groups or not _same(self._groups[place][0].rows, call.rows):
            self._groups[place] = call, {index: self.pool.submit(index, call) for index in self.pool.names}
        return self._groups[place][1]

    def _checked(self, parts: Parts) -> list[float | None]:
        """Return a reward for each row. Raises as `collect`."""
        rewards = list[float | None]()
        for rows, result in parts:
            if result is not None and result.error is not None:
                raise RewardError(result.error) from WorkerTraceback(result.traceback)
            rewards += [None] * rows if result is None else result.rewards
        return rewards


def group_totals(columns: list[list[float | None]], weights: list[float], *, normalizes: bool) -> list[float]:
    """Return the weighted sum of each row of a group's rewards; NaN where no function applies.

    Args:
        columns: of each reward function, the rewards of all rows, None where it does not apply.
        normalizes: each column is normalized first, by its mean and standard deviation; not as TRL by 1e-4 more, which
            leaves something of columns that cancel.
    """
    if normalizes:
        columns = [_normalized(column) for column in columns]
    sums = []
    for row in zip(*columns, strict=True):
        scored = [weight * reward for weight, reward in zip(weights, row, strict=True) if reward is not None]
        sums.append(sum(scored) if scored else math.nan)
    return sums


def _normalized(column: list[float | None]) -> list[float | None]:
    known = [reward for reward in column if reward is not None]
    mean, deviation = (statistics.fmean(known), statistics.stdev(known)) if len(known) > 1 else (0.0, 0.0)
    if deviation < _NO_DEVIATION:
        return [None if reward is None else 0.0 for reward in column]
    return [None if reward is None else (reward - mean) / deviation for reward in column]


class WorkerTraceback(Exception):
    """Shows the traceback of an error in a reward worker."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _groups(call: RewardCall, size: int) -> Iterator[tuple[int, RewardCall]]:
    """Split a call into groups of `size` rows; where groups straddle ranks, into runs of equal prompts.

    Yields:
        The first row of each group, and the group.
    """
    lengths = [size] * (len(call) // size)
    if len(call) % size:
        lengths = [sum(1 for _ in run) for _, run in groupby(call.rows["prompts"])]
    first = 0
    for length in lengths:
        yield first, call.part(first, length)
        first += length


def _replay(
    parts: Parts, log_extra: Callable[[str, list[Any]], None], log_metric: Callable[[str, float], None]
) -> None:
    """Log to the trainer what a function logged for its parts; None in extra columns that a part did not log."""
    extras: dict[str, list[Any]] = {column: [] for _, result in parts if result for column, _ in result.extras}
    for rows, result in parts:
        for metric, value in result.metrics if result else ():
            log_metric(metric, value)
        logged: dict[str, list[Any]] = {}
        for column, values in result.extras if result else ():
            logged.setdefault(column, []).extend(values)
        for column, filled in extras.items():
            filled += logged.get(column, [None] * rows)
    for column, filled in extras.items():
        log_extra(column, filled)


def _same(these: Any, those: Any) -> bool:
    try:
        return bool(these == those)
    except Exception:  # arrays refuse to be one truth value
        return cloudpickle.dumps(these) == cloudpickle.dumps(those)
