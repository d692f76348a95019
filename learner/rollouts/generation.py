"""Replaces TRL's `VLLMGeneration`: completions from the rollout servers, within the bound on staleness."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from learner.protocols import Trainer
from learner.rewards.scorer import Rewards
from learner.rollouts.completions import AllowedVersion, oldest_step, policy_logprobs, sampled_length
from learner.rollouts.dispatch import Dispatcher, group_requests
from learner.rollouts.dynamic_sampling import DynamicSampling
from learner.rollouts.images import with_images
from learner.rollouts.prefetch import Asked, Prefetcher
from learner.servers.router import GroupRequest
from learner.utils.waits import LATER_S, waiting
from shared.errors import NotFinite
from shared.rollouts import Completion

logger = logging.getLogger("lockstep.rollouts")

#: Share of the sampled tokens, of a batch and of the training, that may be without a finite logprob; one always may.
_UNSCORED = 1e-3

Generated = tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]


@dataclass
class RolloutStats:
    """Counts of training rollouts on this rank, and the last batch's speed.

    A completion of several turns counts once, with the tokens and seconds of all its turns.

    Attributes:
        wait_seconds: for which the trainer waited for completions.
        staleness: completions by their staleness in generation batches.
        last_staleness: mean of the last batch.
        last_tokens, last_seconds: of the last batch's completions, and how long they took to generate.
        last_prompt_tokens: of its prompts, each as often as it has completions.
        regenerated: completions that were discarded as too stale.
        sampled_tokens, unscored_tokens: of this process, and those of them without a finite logprob of the server's.
    """

    completions: int = 0
    completion_tokens: int = 0
    wait_seconds: float = 0.0
    last_tokens: int = 0
    last_prompt_tokens: int = 0
    last_seconds: float = 0.0
    staleness: Counter[int] = field(default_factory=Counter)
    last_staleness: float = 0.0
    regenerated: int = 0
    sampled_tokens: int = 0
    unscored_tokens: int = 0


class Training(Protocol):
    """The training that rollouts are for; `learner.session.Session` implements it."""

    def allowed_version(self, *, ahead: bool) -> AllowedVersion:
        """Return the weights that completions requested now may come from; `ahead`: of a batch to come."""

    def ensure_served(self) -> None:
        """Push the trainer's step unless it was pushed last. Collective."""

    def seed_of(self, row: int, token_ids: list[int]) -> int | None:
        """Return the seed of the prompt in a row of the present batch; None unless the run is deterministic."""


class Agents(Protocol):
    """Runs agents, whose episodes take the place of completions; `learner.agents.episodes.Episodes` implements it."""

    def run(
        self,
        rows: Sequence[Mapping[str, Any]],
        requests: Sequence[GroupRequest],
        allowed: Callable[[], AllowedVersion],
    ) -> Sequence[Completion]:
        """Return an episode for each row of `requests`; `rows` are the dataset rows of the batch."""

    def totals(self) -> dict[str, int]:
        """Return what the training's summary says of the episodes of this rank."""

    def close(self) -> None:
        """End what runs elsewhere."""


@dataclass
class RemoteRollouts:
    """TRL calls `sync_weights()` before a batch whose step it has not seen, then `generate()`; on every rank.

    Rollouts of an evaluation are not counted, and never read ahead.

    Args:
        rewards: scores a training batch's completions as they arrive.
        dynamic_sampling: replaces zero-variance groups of training batches.
        agents: makes the completions; None: each is one answer to its prompt.

    Attributes:
        prefetcher: reads ahead, once `read_ahead` was called.
        last_completions: of the last batch, after replacement.
    """

    dispatcher: Dispatcher
    trainer: Trainer
    training: Training
    rewards: Rewards | None = None
    dynamic_sampling: DynamicSampling | None = None
    agents: Agents | None = None
    prefetcher: Prefetcher | None = field(default=None, init=False)
    last_completions: list[Completion] = field(default_factory=list, init=False)
    stats: RolloutStats = field(default_factory=RolloutStats, init=False)
    _held: tuple[list[list[int]], list[Completion]] | None = field(default=None, init=False)
    _in_tool_loop: bool = field(default=False, init=False)
    #: Dataset rows of batches that agents run for; None: of an evaluation.
    _rows: dict[int | None, Sequence[Mapping[str, Any]]] = field(default_factory=dict, init=False)

    def sync_weights(self) -> None:
        """Make sure that the trainer's step is served. The push itself follows every step."""
        self.training.ensure_served()

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager | None = None,
    ) -> Generated:
        """Return one completion for each row of `prompts`.

        Args:
            prompts: token ids [B][P]. Equal neighbors share one request entry, whatever their number: TRL repeats a
                prompt in a row, except in tool loops, where every row has its own history.
            images: of each row a list of PIL images, or None.
            num_generations: TRL's G; not needed, since rows are counted.
            profiler: TRL's timer.

        Returns:
            prompt ids [B][P], completion ids [B][T], logprobs [B][T][1] of the sampled tokens under the distribution
            they were drawn from (before its truncation; NaN where the server has none), and their token ids [B][T][1].
            T is 0 only for later turns that find the context full.

        Raises:
            LockstepError: also when a completion is empty, aborted, or not of a version that may be trained on, and
                when more than one in a thousand tokens is without a finite logprob.
        """
        prompts = with_images(prompts, images)
        held, self._held = self._held, None
        with profiler or nullcontext():
            if self._in_tool_loop:
                completions = self._next_turn(prompts)
            else:
                completions = held[1] if held and held[0] == prompts else self.complete(prompts)
        logprobs = self.logprobs_of(completions)
        return (
            prompts,
            [c.token_ids for c in completions],
            [[[logprob] for logprob in row] for row in logprobs],
            [[[token] for token in c.token_ids] for c in completions],
        )

    def run_agents(self, rows: Sequence[Mapping[str, Any]], prompts: list[list[int]]) -> list[Completion]:
        """Return the agents' episode for each dataset row, whose prompt is `prompts` [B][P]. Raises as `generate`."""
        batch = self.trainer.generation_batch if self.trainer.is_training else None
        self._rows = {known: kept for known, kept in self._rows.items() if batch is None or (known or 0) > batch}
        self._rows[batch] = rows
        return self.complete(prompts)

    def logprobs_of(self, completions: Sequence[Completion]) -> list[list[float]]:
        """Return ln p [B][T] of sampled tokens under the policy, see `completions.policy_logprobs`; count those that
        have none."""
        logprobs = [policy_logprobs(completion, self.dispatcher.sampling) for completion in completions]
        self._count_unscored(logprobs, sum(map(sampled_length, completions)))
        return logprobs

    @contextmanager
    def tool_loop(self) -> Iterator[None]:
        """Within this context `generate` continues completions that were counted already: TRL's tool loop."""
        self._in_tool_loop = True
        try:
            yield
        finally:
            self._in_tool_loop = False

    def hold(self, prompts: list[list[int]], completions: list[Completion]) -> None:
        """Return these completions from the next `generate`, if it is for these prompts."""
        self._held = prompts, completions

    def complete(self, prompts: list[list[int]]) -> list[Completion]:
        """Return one completion for each row; of other prompts where groups were replaced."""
        with waiting("completions", detail=self.dispatcher.progress, mentions_s=LATER_S):
            return self._completions(prompts)

    def _completions(self, prompts: list[list[int]]) -> list[Completion]:
        started, training = time.perf_counter(), self.trainer.is_training
        prefetcher = self.prefetcher if training else None
        completions = self._take_prefetched(prefetcher, prompts) if prefetcher else None
        seconds = prefetcher.last_seconds if prefetcher and completions is not None else None
        if completions is None:
            batch = self.trainer.generation_batch if training else None
            completions = self._complete(batch, group_requests(prompts, self.training.seed_of), ahead=False)
            self._count_staleness([0] * len(completions) if training else [])
        if training and self.rewards:
            # Again, with the completions that were replaced since they arrived.
            self.rewards.arrived(self.trainer.generation_batch, 0, completions)
        self.last_completions = completions
        waited = time.perf_counter() - started
        tokens = self._count_tokens(completions, waited)
        if training:
            self.stats.last_tokens, self.stats.last_seconds = tokens, seconds or waited
            self.stats.last_prompt_tokens = sum(map(len, prompts))
            self.stats.completions += len(completions)
        return completions

    def _next_turn(self, prompts: list[list[int]]) -> list[Completion]:
        """Return the next turn of each row, by the present weights; empty where its history fills the context."""
        started = time.perf_counter()
        dispatcher = self.dispatcher
        fitting = [row for row, prompt in enumerate(prompts) if len(prompt) < dispatcher.max_model_len]
        dispatcher.capped_prompts += len(prompts) - len(fitting)

        def seed_of(row: int, token_ids: list[int]) -> int | None:
            # Rows of one group may have the same history: one fixed seed would give them the same turn.
            seed, fixed = self.training.seed_of(row, token_ids), dispatcher.fixed_seed
            return seed if seed is not None or fixed is None else fixed + row

        requests = group_requests([prompts[row] for row in fitting], seed_of)
        turns = dispatcher.dispatch(requests, partial(self.training.allowed_version, ahead=False))
        full = Completion(token_ids=[], logprobs=[], log_kept_mass=[], finish_reason="length", spans=[])
        completions = [full] * len(prompts)
        for row, turn in zip(fitting, turns, strict=True):
            completions[row] = turn
        seconds = time.perf_counter() - started
        tokens = self._count_tokens(completions, seconds)
        if self.trainer.is_training:
            self.stats.last_tokens += tokens
            self.stats.last_seconds += seconds
        return completions

    def read_ahead(self, max_staleness: int) -> None:
        """Request coming generation batches from now on, up to `max_staleness` of them before they are needed."""
        coming, schedule = self.trainer.coming_prompts(), self.trainer.schedule
        first = schedule.next_batch(self.trainer.micro_step)

        def asked_of(batch: int) -> Asked:
            rows = coming.rows(batch)
            prompts = coming.token_ids(rows)
            if self.agents:
                self._rows.setdefault(batch, rows)  # the trainer's own, where they are known
            if self.dynamic_sampling:
                self.dynamic_sampling.expect(batch, rows, prompts)
            elif self.rewards:
                self.rewards.expect(batch, rows)
            return prompts, _content(rows) if self.agents else ""

        def complete(batch: int, asked: Asked) -> list[Completion]:
            return self._complete(batch, group_requests(asked[0]), ahead=True)

        self.prefetcher = Prefetcher(asked_of, complete, schedule=schedule, max_staleness=max_staleness)
        self.prefetcher.request(first, first + max_staleness - 1)

    def _complete(self, batch: int | None, requests: list[GroupRequest], *, ahead: bool) -> list[Completion]:
        """Return the completions of a training batch after replacement, or of an evaluation (`batch` is None)."""
        dispatch = partial(self._dispatch, batch, ahead=ahead)
        completions = dispatch(requests)
        if batch is None or self.dynamic_sampling is None:
            return completions
        return self.dynamic_sampling.replace(batch, completions, dispatch)

    def _dispatch(self, batch: int | None, requests: Sequence[GroupRequest], *, ahead: bool) -> list[Completion]:
        """Dispatch, and pass the completions of a training batch on to the rewards as they arrive."""
        if self.agents:
            allowed = partial(self.training.allowed_version, ahead=ahead)
            return list(self.agents.run(self._rows[batch], requests, allowed))
        score = partial(self.rewards.arrived, batch) if self.rewards and batch is not None else None
        return self.dispatcher.dispatch(requests, partial(self.training.allowed_version, ahead=ahead), score)

    def _take_prefetched(self, prefetcher: Prefetcher, prompts: list[list[int]]) -> list[Completion] | None:
        """Return what was read ahead, with stale samples replaced; None if it was not for these prompts."""
        batch, bound = self.trainer.generation_batch, prefetcher.max_staleness
        prefetcher.request(batch, batch)
        completions = prefetcher.take(batch, (prompts, _content(self._rows[batch]) if self.agents else ""))
        if completions is None:
            return None
        prompts = (self.dynamic_sampling.prompts(batch) if self.dynamic_sampling else None) or prompts
        staleness = [prefetcher.schedule.staleness(batch, oldest_step(completion)) for completion in completions]
        stale = [row for row, batches in enumerate(staleness) if batches > bound]
        if stale:  # before the batches that are not needed yet
            self.stats.regenerated += len(stale)
            requests = [GroupRequest(r, prompts[r], 1, self.training.seed_of(r, prompts[r])) for r in stale]
            for row, completion in zip(stale, self._dispatch(batch, requests, ahead=False), strict=True):
                completions[row], staleness[row] = completion, 0
        prefetcher.request(batch + 1, batch + bound)
        self._count_staleness(staleness)
        return completions

    def _count_staleness(self, staleness: list[int]) -> None:
        if staleness:
            self.stats.staleness.update(staleness)
            self.stats.last_staleness = sum(staleness) / len(staleness)

    def _count_unscored(self, logprobs: list[list[float]], tokens: int) -> None:
        """Count sampled tokens of the training whose logprob is NaN; refuse to train on many."""
        if not self.trainer.is_training:
            return
        unscored, stats = sum(math.isnan(logprob) for row in logprobs for logprob in row), self.stats
        stats.sampled_tokens += tokens
        if not unscored:
            return
        if not stats.unscored_tokens:
            logger.warning(
                f"{unscored} sampled tokens have no finite logprob: trained on with importance ratio 1 (said once, "
                "counted in unscored_tokens)"
            )
        known = (unscored, tokens), (stats.unscored_tokens + unscored, stats.sampled_tokens)
        stats.unscored_tokens += unscored
        for missing, of in known:
            if missing > max(1, _UNSCORED * of):
                raise NotFinite(
                    f"{missing} of {of} sampled tokens have no finite logprob, more than one in a thousand: the "
                    "served policy computes NaN or infinity. Start rollout-server with --dtype bfloat16 if it computes "
                    "in float16; check that the base alone is finite (/v1/score with policy=base); lower learning_rate "
                    "if it began during the training"
                )

    def _count_tokens(self, completions: list[Completion], waited: float) -> int:
        tokens = sum(map(sampled_length, completions))
        if self.trainer.is_training:
            self.stats.completion_tokens += tokens
            self.stats.wait_seconds += waited
        return tokens


def _content(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return all columns as text: agents see them, so rows of the same prompt need not be the same."""

    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else re.sub(r" at 0x\w+", "", str(value))

    return json.dumps([dict(row) for row in rows], default=plain)
