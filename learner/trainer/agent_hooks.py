"""Let a `trl.GRPOTrainer` train on agents' episodes: one row for each, masked where nothing was sampled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import nn
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import is_async_callable

from learner.agents.episodes import NO_REWARD, Episodes, check_some_are_left
from learner.agents.rewards import AgentReward, agent_reward
from learner.agents.trajectories import Episode
from learner.session import Session
from learner.trainer.forks import PARTS, Forks

Row = dict[str, Any]


def add_agent_reward(trainer: GRPOTrainer) -> AgentReward:
    """Give the trainer the reward that agents return, in place of `agent_reward` or beside its reward functions."""
    reward, functions = AgentReward(), list(trainer.reward_funcs)
    if agent_reward in functions:
        at = functions.index(agent_reward)
        functions[at] = reward
        trainer.reward_func_names = [*trainer.reward_func_names]
        trainer.reward_func_names[at] = reward.__name__
    else:
        functions.append(reward)
        trainer.reward_func_names = [*trainer.reward_func_names, reward.__name__]
        trainer.reward_processing_classes = [*trainer.reward_processing_classes, None]
        trainer.reward_weights = torch.cat([trainer.reward_weights, torch.ones(1)])
    trainer.reward_funcs = functions
    return reward


def run_agents(trainer: GRPOTrainer, session: Session, reward: AgentReward, forks: Forks) -> None:
    """Put the agents' episodes in the place of completions."""
    agents = cast(Episodes, session.rollouts.agents)
    generate, score = trainer._generate, trainer._generate_and_score_completions
    compute = trainer._compute_loss
    rows: list[Row] = []
    episodes: list[Episode] = []

    def rollout(prompts: list[Any], _: Any) -> dict[str, Any]:
        token_ids = [list(ids) for ids in trainer._tokenize_prompts(prompts)[0]]
        episodes[:] = cast(Sequence[Episode], session.rollouts.run_agents(rows, token_ids))
        nobody_scores = NO_REWARD if len(trainer.reward_funcs) == 1 else None
        unused = [each.failure or (nobody_scores if each.reward is None else None) for each in episodes]
        check_some_are_left(gather_object(unused))
        reward.rewards = [episode.reward for episode in episodes]
        reward.open = [i for i, each in enumerate(episodes) if each.reward is None and not each.failure]
        forks.begin([episode.parts for episode in episodes])
        return {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            "completion_ids": [episode.token_ids for episode in episodes],
            "logprobs": session.rollouts.logprobs_of(episodes),
            "env_mask": [episode.mask for episode in episodes],
        }

    def generate_conversations(prompts: list[Any]) -> tuple[Any, ...]:
        ids, completion_ids, mask, _, *others = generate(prompts)
        conversations = _conversations(trainer, episodes, chats=is_conversational({"prompt": prompts[0]}))
        # TRL's look at the last token of the row, which need not be the last call's.
        sizes = [(float(each.finish_reason == "length"), float(sum(each.mask))) for each in episodes]
        cut_B, length_B = trainer.accelerator.gather(torch.tensor(sizes, device=trainer.accelerator.device)).unbind(1)
        metrics, ended = _metrics(trainer), length_B[cut_B == 0]
        ended = ended if len(ended) else torch.zeros(1)
        metrics["completions/clipped_ratio"][-1] = cut_B.mean().item()
        for name, value in (("mean", ended.mean()), ("min", ended.min()), ("max", ended.max())):
            metrics[f"completions/{name}_terminated_length"][-1] = value.item()
        return ids, completion_ids, mask, conversations, *others

    def generate_and_score(inputs: list[Row]) -> dict[str, Any]:
        metrics = _metrics(trainer)
        rows[:], before = inputs, asdict(agents.counts)
        try:
            batch = score(inputs)
            parts = forks.to_tensor(trainer.accelerator.device)
        finally:
            forks.begin(None)
        if parts is not None:
            batch[PARTS] = parts
        _log(metrics, episodes, {name: n - before[name] for name, n in asdict(agents.counts).items()})
        for name in trainer.reward_func_names:  # functions that scored no row
            for kind in ("mean", "std"):
                values = metrics.get(f"rewards/{name}/{kind}")
                if values and math.isnan(values[-1]):
                    values.pop()
                    if not values:
                        del metrics[f"rewards/{name}/{kind}"]
        return batch

    def compute_with_forks(model: Any, inputs: dict[str, Any]) -> Any:
        forks.see(inputs)
        try:
            return compute(model, inputs)
        finally:
            forks.begin(None)

    trainer.rollout_func = rollout
    trainer._generate = generate_conversations
    trainer._generate_and_score_completions = generate_and_score
    trainer._compute_loss = compute_with_forks
    _score_open_rows(trainer, reward)


def _metrics(trainer: GRPOTrainer) -> dict[str, list[float]]:
    """Return TRL's metrics of the training, or of the evaluation that runs."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def _log(metrics: Any, episodes: Sequence[Episode], counts: dict[str, int]) -> None:
    """Add to TRL's metrics what a batch's agents did; `counts` since the batch before."""
    kept = [episode for episode in episodes if not episode.failure]
    for name, values in (
        ("calls", [episode.calls for episode in kept]),
        ("trajectories", [episode.trajectories for episode in kept]),
        ("repaired_calls", [episode.repaired for episode in kept]),
    ):
        metrics[f"agents/{name}"].append(sum(values) / max(len(values), 1))
    metrics["agents/left_out"].append(float(len(episodes) - len(kept)))
    metrics["agents/failed_runs"].append(float(counts["failed"]))
    metrics["agents/lost_runs"].append(float(counts["lost"]))


def _conversations(trainer: GRPOTrainer, episodes: Sequence[Episode], *, chats: bool) -> list[Any]:
    """Return what reward functions are given as completions: the turns up to each episode's last call."""
    decode = functools.partial(trainer.processing_class.decode, skip_special_tokens=True)
    if not chats:
        return [decode([token for _, ids in episode.turns() for token in ids]) for episode in episodes]
    return [[_message(sampled, decode(ids)) for sampled, ids in episode.turns()] for episode in episodes]


def shown_turns(trainer: GRPOTrainer, episode: Episode) -> list[tuple[bool, str]]:
    """Return the texts of all conversations, and whether they were sampled; with headings, if there are several.

    The prompt of the first one is the row's.
    """
    decode = functools.partial(trainer.processing_class.decode, skip_special_tokens=True)
    prompts = [episode.token_ids[start : start + length] for start, length in episode.parts]
    found = []
    for number, turns in enumerate(episode.conversations(), 1):
        if episode.trajectories > 1:
            found.append((False, f"[conversation {number} of {episode.trajectories}]"))
        if number > 1:
            found.append((False, decode(prompts[number - 2]).strip()))
        found += [(sampled, decode(ids) if sampled else decode(ids).strip()) for sampled, ids in turns]
    return found


def _message(sampled: bool, text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text} if sampled else {"role": "tool", "content": text.strip()}


def _score_open_rows(trainer: GRPOTrainer, reward: AgentReward) -> None:
    """Let reward functions see only the rows whose agent left its reward to them."""
    models = [i for i, function in enumerate(trainer.reward_funcs) if isinstance(function, nn.Module)]
    own = trainer.reward_func_names.index(reward.__name__)
    trainer.reward_funcs = [
        function if i == own or i in models else _of_open_rows(function, reward)
        for i, function in enumerate(trainer.reward_funcs)
    ]
    if not models:
        return
    calculate = trainer._calculate_rewards

    def calculate_open(*args: Any, **kwargs: Any) -> torch.Tensor:
        rewards_BF = calculate(*args, **kwargs)
        closed = torch.ones(len(reward.rewards), dtype=torch.bool, device=rewards_BF.device)
        closed[reward.open] = False
        closed_B = trainer.accelerator.gather(closed)
        for i in models:
            rewards_BF[closed_B, i] = torch.nan
        return rewards_BF

    trainer._calculate_rewards = calculate_open


def _of_open_rows(function: Callable[..., Any], reward: AgentReward) -> Callable[..., Any]:
    def chosen(arguments: dict[str, Any]) -> dict[str, Any]:
        count, rows = len(arguments["prompts"]), reward.open
        found = {
            name: [value[i] for i in rows] if isinstance(value, list) and len(value) == count else value
            for name, value in arguments.items()
        }
        log_extra = arguments["log_extra"]
        return found | {"log_extra": lambda column, values: log_extra(column, spread(values))}

    def spread(values: Sequence[Any]) -> list[Any]:
        found: list[Any] = [None] * len(reward.rewards)
        for row, value in zip(reward.open, values, strict=True):
            found[row] = value
        return found

    if is_async_callable(function):

        async def score_later(**arguments: Any) -> list[Any]:
            return spread(await function(**chosen(arguments)) if reward.open else [])

        score_later.__name__ = function.__name__
        return score_later

    def score(**arguments: Any) -> list[Any]:
        return spread(function(**chosen(arguments)) if reward.open else [])

    score.__name__ = function.__name__
    return score
