"""Rewards under a `trl.GRPOTrainer`: computed in worker processes as soon as a group's completions arrive.

TRL's own `_calculate_rewards` finds the values ready. Relies on TRL's internals as `learner.trainer.attach` does, in the
same range of versions.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import cloudpickle
from torch import nn
from trl import GRPOTrainer
from trl.data_utils import is_conversational

from learner.config import LearnerConfig
from learner.rewards.calls import Parts, RewardCall, RewardResult
from learner.rewards.pool import RewardPool
from shared.rollouts import Completion

Row = dict[str, Any]
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")
_PASSED_BY_TRL = ("trainer_state", "log_extra", "log_metric")
#: In the place of a generation batch's number.
_EVALUATION = -1


@dataclass
class _Group:
    """One group that is being scored, or was: function -> what TRL has not fetched yet."""

    call: RewardCall
    pending: dict[int, Future[Parts]]


class PooledReward:
    """In the place of a reward function: TRL calls it with all rows of this rank."""

    def __init__(self, name: str, collect: Callable[[dict[str, Any]], list[float | None]]) -> None:
        self.__name__, self._collect = name, collect

    def __call__(self, **kwargs: Any) -> list[float | None]:
        return self._collect(kwargs)


class Rewards:
    """Takes groups as they arrive, on any thread, and answers TRL on the training thread.

    What was computed early is a cache: it is used only for the very rows and completions that TRL then asks for.

    Attributes:
        wait_seconds: for which the training thread waited for rewards.
        unscored: rewards that are missing because a function hung or died, by function.
    """

    def __init__(self, trainer: GRPOTrainer, config: LearnerConfig, say: Callable[[str], None] = print) -> None:
        self._trainer, self._say, self._timeout_s = trainer, say, config.reward_timeout_s
        self.wait_seconds = 0.0
        self.unscored: Counter[str] = Counter()
        pooled = [i for i, function in enumerate(trainer.reward_funcs) if _may_leave(trainer, function)]
        self._names = [trainer.reward_func_names[i] for i in pooled]
        self._pool = RewardPool(
            [(trainer.reward_func_names[i], trainer.reward_funcs[i]) for i in pooled],
            workers=config.reward_workers,
            timeout_s=config.reward_timeout_s,
            warn=say,
        )
        wrapped = list(trainer.reward_funcs)  # not in place: the list may be the user's
        for number, i in enumerate(pooled):
            wrapped[i] = PooledReward(trainer.reward_func_names[i], partial(self._collect, number))
        trainer.reward_funcs = wrapped
        self._lock = threading.Lock()
        self._groups: dict[tuple[int, int], _Group] = {}
        self._expected: dict[int, list[Row]] = {}
        self._tokenizer = copy.deepcopy(trainer.processing_class)  # two threads must not share one
        self._early = bool(pooled) and _plain_completions(trainer)
        self._know_present_rows()

    @property
    def _batch(self) -> int:
        args = self._trainer.args
        return self._trainer._step // (args.steps_per_generation * self._trainer.num_iterations)

    def expect(self, batch: int, rows: Sequence[Row]) -> None:
        """Dataset rows of this rank in a coming generation batch, one for each completion."""
        with self._lock:
            self._expected[batch] = list(rows)

    def arrived(self, batch: int | None, first: int, completions: Sequence[Completion]) -> None:
        """Completions of consecutive rows are there. Rows that are no whole groups wait until TRL asks.

        Args:
            batch: generation batch; None: the present one.
            first: the first row.
        """
        size = self._trainer.num_generations
        with self._lock:
            batch = self._batch if batch is None else batch
            rows = self._expected.get(batch)
            if not self._early or rows is None or len(rows) % size or first % size or len(completions) % size:
                return
            for start in range(0, len(completions), size):
                completion_ids = [completion.token_ids for completion in completions[start : start + size]]
                self._group((batch, first + start), self._early_call(rows, first + start, completion_ids))

    def totals(self, batch: int, first: int) -> list[float]:
        """Weighted sums of the rewards of the group at row `first`, as TRL adds them up; NaN where there is none.

        Waits for them. They stay there for TRL.

        Raises:
            RuntimeError: a reward function raised.
        """
        with self._lock:
            pending = dict(self._groups[batch, first].pending)
        columns = []
        for i, outcome in pending.items():
            parts = self._pool.wait(outcome)
            columns.append([reward for rows, answer in parts for reward in _checked(self._names[i], rows, answer)])
        weights = self._trainer.reward_weights.tolist()
        sums = []
        for row in zip(*columns, strict=True):
            scored = [weight * reward for weight, reward in zip(weights, row, strict=True) if reward is not None]
            sums.append(sum(scored) if scored else math.nan)
        return sums

    def close(self) -> None:
        """End the workers."""
        self._early = False
        self._pool.close()

    def _know_present_rows(self) -> None:
        trainer = self._trainer
        generate = trainer._generate_and_score_completions

        def generate_knowing_rows(inputs: list[Row]) -> dict[str, Any]:
            if trainer.model.training:
                self.expect(self._batch, inputs)
                self._forget_before(self._batch)
            return generate(inputs)

        trainer._generate_and_score_completions = generate_knowing_rows

    def _forget_before(self, batch: int) -> None:
        with self._lock:
            self._groups = {place: group for place, group in self._groups.items() if place[0] >= batch}
            self._expected = {known: rows for known, rows in self._expected.items() if known >= batch}

    def _early_call(self, rows: list[Row], first: int, completion_ids: list[list[int]]) -> RewardCall:
        """The arguments that TRL will pass for these rows."""
        group = rows[first : first + len(completion_ids)]
        prompts = [row["prompt"] for row in group]
        completions: list[Any] = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": content}] for content in completions]
        columns = {name: [row[name] for row in group] for name in rows[0] if name not in _NOT_COLUMNS}
        return RewardCall(
            {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns},
            _light(self._trainer.state),
        )

    def _group(self, place: tuple[int, int], call: RewardCall) -> _Group:
        """The group that is being scored at `place`, begun now if it is not for this very call."""
        group = self._groups.get(place)
        if group is None or not _same(group.call.rows, call.rows):
            group = _Group(call, {i: self._pool.submit(i, call) for i in range(len(self._names))})
            self._groups[place] = group
        return group

    def _collect(self, number: int, kwargs: dict[str, Any]) -> list[float | None]:
        """What TRL gets from function `number` for all rows of this rank."""
        began = time.perf_counter()
        training = self._trainer.model.training
        batch = self._batch if training else _EVALUATION
        state, log_extra, log_metric = (kwargs.pop(name) for name in _PASSED_BY_TRL)
        calls = list(self._calls(kwargs, _light(state)))
        with self._lock:
            pending = []
            for first, call in calls:
                group = self._group((batch, first), call)
                if number not in group.pending:  # fetched before: asked again, it is computed again
                    group.pending[number] = self._pool.submit(number, call)
                pending.append(group.pending.pop(number))
                if not group.pending:
                    del self._groups[batch, first]
        parts = [part for outcome in pending for part in self._pool.wait(outcome)]
        if training:
            self.wait_seconds += time.perf_counter() - began
        return self._replay(self._names[number], parts, log_extra, log_metric)

    def _calls(self, rows: dict[str, list[Any]], state: Any) -> Iterator[tuple[int, RewardCall]]:
        """Whole groups; where groups straddle ranks, runs of equal prompts. With the first row of each."""
        trainer, prompts = self._trainer, rows["prompts"]
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        lengths = [size] * (len(prompts) // size)
        if len(prompts) % size:
            lengths = [sum(1 for _ in run) for _, run in groupby(prompts)]
        first = 0
        for length in lengths:
            yield first, RewardCall({name: values[first : first + length] for name, values in rows.items()}, state)
            first += length

    def _replay(
        self, name: str, parts: Parts, log_extra: Callable[..., None], log_metric: Callable[..., None]
    ) -> list[float | None]:
        """Rewards in row order; what the function logged goes to TRL in that order too. Raises as `_checked`."""
        rewards: list[float | None] = []
        columns = dict.fromkeys(column for _, answer in parts if answer for column, _ in answer.extras)
        extras: dict[str, list[Any]] = {column: [] for column in columns}
        for rows, answer in parts:
            if answer is None:
                self._missed(name, rows)
            rewards += _checked(name, rows, answer)
            for metric, value in answer.metrics if answer else ():
                log_metric(metric, value)
            logged: dict[str, list[Any]] = {}
            for column, values in answer.extras if answer else ():
                logged.setdefault(column, []).extend(values)
            for column, filled in extras.items():
                filled += logged.get(column, [None] * rows)
        for column, filled in extras.items():
            log_extra(column, filled)
        return rewards

    def _missed(self, name: str, rows: int) -> None:
        if not self.unscored[name]:
            self._say(
                f"the reward {name} gave {rows} sample(s) no reward within {self._timeout_s:g} s each, or ended its "
                "process; they count as unscorable. Make it faster, give it a limit of its own, or raise "
                "reward_timeout_s (said once, counted as unscored)"
            )
        self.unscored[name] += rows


def _checked(name: str, rows: int, answer: RewardResult | None) -> list[float | None]:
    """A reward for each of `rows` rows.

    Raises:
        RuntimeError: the function raised, with its traceback.
        ValueError: it returned too many rewards, or too few.
    """
    if answer is None:
        return [None] * rows
    if answer.error is not None:
        raise RuntimeError(f"the reward function '{name}' failed:\n{answer.error}")
    if len(answer.rewards) != rows:
        raise ValueError(
            f"The reward function '{name}' returned {len(answer.rewards)} rewards, but {rows} were expected (one per "
            "prompt-completion pair). Make sure the reward function returns exactly one reward per completion."
        )
    return answer.rewards


def all_known_early(trainer: GRPOTrainer) -> bool:
    """Whether every reward can be computed as completions arrive."""
    return _plain_completions(trainer) and all(_may_leave(trainer, function) for function in trainer.reward_funcs)


def _may_leave(trainer: GRPOTrainer, function: Callable[..., Any]) -> bool:
    """Not reward models, nor what reads environments: TRL calls these itself."""
    if isinstance(function, nn.Module) or getattr(trainer, "environment_factories", None) is not None:
        return False
    try:
        return "environments" not in inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins have no signature
        return True


def _plain_completions(trainer: GRPOTrainer) -> bool:
    """Whether a completion's text follows from its tokens alone, as it is known when they arrive."""
    tokenizer = trainer._tokenizer
    templates = (getattr(tokenizer, name, None) for name in ("response_template", "response_schema"))
    return not trainer.tools and trainer.rollout_func is None and all(template is None for template in templates)


def _light(state: Any) -> SimpleNamespace:
    """`trainer_state` without its history, and without needing transformers to be read."""
    plain = {k: v for k, v in vars(state).items() if v is None or isinstance(v, bool | int | float | str)}
    return SimpleNamespace(**plain, log_history=[])


def _same(these: Any, those: Any) -> bool:
    try:
        return bool(these == those)
    except Exception:  # arrays refuse to be one truth value
        return cloudpickle.dumps(these) == cloudpickle.dumps(those)
