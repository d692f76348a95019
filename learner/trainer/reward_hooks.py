"""Rewards of a `trl.GRPOTrainer`, computed in reward workers: TRL calls stand-ins that find the values ready."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import is_async_callable

from learner.agents.rewards import AgentReward
from learner.cluster.resources import Resources
from learner.config import LearnerConfig
from learner.rewards.calls import RewardCall, RewardError, call_reward, checked_rewards, distinct, raising_by_name
from learner.rewards.on_cluster import workers_on_cluster
from learner.rewards.pool import ProcessWorkers, RewardPool
from learner.rewards.scorer import EVALUATION, Rewards, Row
from learner.trainer.images import seen_prompt
from learner.trainer.prompt_order import generation_batch
from shared.errors import InvalidRequest

#: With which a training ends that has had rewards before.
_UNSCORED_BATCHES = 3


def score_in_workers(trainer: GRPOTrainer, config: LearnerConfig) -> Rewards:
    """Replace the trainer's reward functions by stand-ins, and score groups as their completions arrive.

    TRL keeps calling reward models, functions that read environments, and functions that cannot be sent to a worker.

    Raises:
        LockstepError: workers do not start; or `drop_degenerate_groups` needs a reward that no worker can compute.
    """
    names, functions = trainer.reward_func_names, list(trainer.reward_funcs)  # a copy: the list may be the user's
    on_ray = config.reward_backend == "ray"
    pool = RewardPool(
        {i: (names[i], function) for i, function in enumerate(functions) if _may_leave(trainer, function)},
        workers=config.reward_workers,
        timeout_s=config.reward_timeout_s,
        make_workers=workers_on_cluster(cast(Resources, config.reward_resources)) if on_ray else ProcessWorkers,
    )
    if config.drop_degenerate_groups and len(pool.names) < len(functions):
        pool.close()
        left = ", ".join(name for i, name in enumerate(names) if i not in pool.names)
        raise InvalidRequest(
            f"drop_degenerate_groups: rewards must be known as completions arrive, and no reward worker can run {left}"
        )
    tokenizer = copy.deepcopy(trainer.processing_class)  # two threads must not share one
    rewards = Rewards(
        pool,
        group_size=trainer.num_generations,
        batch=partial(generation_batch, trainer),
        weights=lambda: trainer.reward_weights.tolist(),
        normalizes=trainer.multi_objective_aggregation == "normalize_then_sum",
        early_call=partial(_early_call, trainer, tokenizer) if pool.names and _plain_completions(trainer) else None,
    )
    for i in pool.names:
        functions[i] = _stand_in(trainer, rewards, i)
    trainer.reward_funcs = functions
    generate = trainer._generate_and_score_completions

    def generate_expected(inputs: list[Row]) -> dict[str, Any]:
        if trainer.model.training:
            batch = generation_batch(trainer)
            rewards.expect(batch, inputs)
            rewards.forget_before(batch)
        return generate(inputs)

    trainer._generate_and_score_completions = generate_expected
    return rewards


def name_rewards(trainer: GRPOTrainer) -> None:
    """Give rewards of one name different ones: TRL keeps and logs them by name."""
    trainer.reward_func_names = distinct(trainer.reward_func_names)


def check_rewards(trainer: GRPOTrainer) -> None:
    """Hold the reward functions and models that TRL calls to what `checked_rewards` takes for a reward.

    Raises, when rewards are computed:
        RewardError: names the reward and the completion; or no completion of a training batch has a reward: of the
            first one, or of `_UNSCORED_BATCHES` in a row.
    """
    names, functions = trainer.reward_func_names, list(trainer.reward_funcs)
    trainer.reward_funcs = [
        function if isinstance(function, nn.Module) else _checked(name, function)
        for name, function in zip(names, functions, strict=True)
    ]
    models = [i for i, function in enumerate(functions) if isinstance(function, nn.Module)]
    calculate, unscored = trainer._calculate_rewards, Unscored(names)

    def calculate_checked(*args: Any, **kwargs: Any) -> torch.Tensor:
        rewards_BF = calculate(*args, **kwargs)
        if trainer.model.training:
            unscored.saw(rewards_BF)
        for i in models:
            column = rewards_BF[:, i].tolist()  # of all ranks, whose prompts are not known here
            checked_rewards(names[i], column, ["not shown"] * len(column))
        return rewards_BF

    trainer._calculate_rewards = calculate_checked


class Unscored:
    """Counts training batches, over all ranks, in which no completion has a reward: nothing is learned from them."""

    def __init__(self, names: list[str]) -> None:
        self._names, self._in_a_row, self._most = names, 0, 1

    def saw(self, rewards_BF: torch.Tensor) -> None:
        """Count a batch; NaN stands for None.

        Raises:
            RewardError: so many in a row say that the reward functions are wrong, or what they need is gone.
        """
        if not rewards_BF.isnan().all():
            self._in_a_row, self._most = 0, _UNSCORED_BATCHES
            return
        self._in_a_row += 1
        batches = "" if self._in_a_row == 1 else f" of each of {self._in_a_row} batches"
        if self._in_a_row >= self._most:
            raise RewardError(
                f"none of {len(rewards_BF)} completions{batches} has a reward: {', '.join(self._names)} returned None "
                "for all of them, or took longer than reward_timeout_s. Return a number wherever a function applies, 0 "
                "for a completion without an answer; every kind of row needs a function that applies to it"
            )


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the same kind, for TRL to call, that returns checked rewards."""
    if is_async_callable(function):

        async def reward_later(**arguments: Any) -> list[float | None]:
            with raising_by_name(name):
                rewards = await function(**arguments)
            return checked_rewards(name, rewards, arguments["prompts"])

        reward_later.__name__ = name
        return reward_later

    def reward(**arguments: Any) -> list[float | None]:
        return call_reward(name, function, arguments)

    reward.__name__ = name
    return reward


def _stand_in(trainer: GRPOTrainer, rewards: Rewards, index: int) -> Callable[..., list[float | None]]:
    """Return a function for TRL to call with all rows of this rank, which returns the workers' rewards."""

    def reward(trainer_state: Any, log_extra: Any, log_metric: Any, **rows: list[Any]) -> list[float | None]:
        batch, size = EVALUATION, trainer.num_generations_eval
        if trainer.model.training:
            batch, size = generation_batch(trainer), trainer.num_generations
        call = RewardCall(rows, _light(trainer_state))
        return rewards.collect(index, call, log_extra, log_metric, batch=batch, group_size=size)

    reward.__name__ = trainer.reward_func_names[index]
    return reward


def _early_call(trainer: GRPOTrainer, tokenizer: Any, rows: list[Row], completion_ids: list[list[int]]) -> RewardCall:
    """Return the call that TRL will make for these rows and completions."""
    prompts = [seen_prompt(trainer, row) for row in rows]
    completions: list[Any] = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational({"prompt": prompts[0]}):
        completions = [[{"role": "assistant", "content": content}] for content in completions]
    own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    names = [name for name in rows[0] if name not in ("prompt", "completion", "completion_ids")]
    return RewardCall(own | {name: [row[name] for row in rows] for name in names}, _light(trainer.state))


def all_known_early(trainer: GRPOTrainer) -> bool:
    """Return whether every reward can be computed as completions arrive, if workers can run its function."""
    return _plain_completions(trainer) and all(_may_leave(trainer, function) for function in trainer.reward_funcs)


def _may_leave(trainer: GRPOTrainer, function: Callable[..., Any]) -> bool:
    """Return whether a function depends on its arguments only: reward models and readers of environments do not."""
    if isinstance(function, nn.Module | AgentReward) or trainer.environment_factories is not None:
        return False
    try:
        return "environments" not in inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins have no signature
        return True


def _plain_completions(trainer: GRPOTrainer) -> bool:
    """Return whether a completion's text follows from its tokens alone, as they arrive."""
    tokenizer = trainer._tokenizer
    templates = (getattr(tokenizer, name, None) for name in ("response_template", "response_schema"))
    if any(isinstance(function, AgentReward) for function in trainer.reward_funcs):
        return False
    return not trainer.tools and trainer.rollout_func is None and all(template is None for template in templates)


def _light(state: Any) -> SimpleNamespace:
    """Return `trainer_state` without its history, in a form that is read without transformers."""
    plain = {k: v for k, v in vars(state).items() if v is None or isinstance(v, bool | int | float | str)}
    return SimpleNamespace(**plain, log_history=[])
