"""In the place of TRL's `VLLMGeneration`: completions from the rollout servers, no older than they may be."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from learner.rollouts.completions import Wanted, oldest_step, policy_logprobs
from learner.rollouts.dispatch import Ask, Dispatcher, SeedOf, asks_of
from learner.rollouts.prefetch import Prefetcher
from learner.rollouts.schedule import Schedule
from shared.errors import InvalidRequest
from shared.rollouts import Completion
from shared.weights import WeightVersion

Generated = tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]


@dataclass
class RolloutStats:
    """Counts of training rollouts on this rank, and the last batch's speed.

    A completion of several turns is one completion; tokens and seconds are those of all its turns.

    Attributes:
        wait_seconds: for which the trainer waited for completions.
        lags: completions by their lag in generation batches.
        regenerated: completions that were thrown away because they lagged too much.
    """

    completions: int = 0
    completion_tokens: int = 0
    wait_seconds: float = 0.0
    last_tokens: int = 0
    last_seconds: float = 0.0
    lags: Counter[int] = field(default_factory=Counter)
    last_lag: float = 0.0
    regenerated: int = 0


@dataclass(frozen=True)
class Ahead:
    """Reading ahead: what is fetched while the trainer trains.

    Attributes:
        max_staleness: how many generation batches old a sample's oldest weights may be.
    """

    prefetcher: Prefetcher
    schedule: Schedule
    max_staleness: int


class Refill(Protocol):
    """See `learner.rollouts.dynamic_sampling.DynamicSampling`."""

    def fill(
        self, batch: int, completions: list[Completion], fetch: Callable[[list[Ask]], list[Completion]]
    ) -> list[Completion]: ...
    def prompts(self, batch: int) -> list[list[int]] | None: ...


@dataclass
class RemoteRollouts:
    """TRL calls `sync_weights()` before a batch whose step it has not seen, then `generate()`; on every rank.

    Args:
        dispatcher: asks the rollout servers.
        version: answers the version that must be served now.
        barrier: makes sure that this version is served; collective over all ranks.
        is_training: False while TRL evaluates; those rollouts are not counted, and never read ahead.
        seed_of: row of the batch and its prompt -> its seed, where seeds are derived.
        arrived: told of a training batch's completions as they come: generation batch (None: the present one), first
            row, completions. Called on any thread.
        batch: the generation batch that is being generated now.
        refill: replaces groups of training batches.

    Attributes:
        drawn: what `draw` has answered last.
    """

    dispatcher: Dispatcher
    version: Callable[[], WeightVersion]
    barrier: Callable[[], None]
    is_training: Callable[[], bool] = lambda: True
    seed_of: SeedOf = lambda row, token_ids: None
    ahead: Ahead | None = None
    arrived: Callable[[int | None, int, Sequence[Completion]], None] | None = None
    batch: Callable[[], int] = lambda: 0
    refill: Refill | None = None
    drawn: list[Completion] = field(default_factory=list)
    stats: RolloutStats = field(default_factory=RolloutStats)
    _held: tuple[list[list[int]], list[Completion]] | None = None
    _goes_on: bool = False

    def sync_weights(self) -> None:
        """A barrier: when it returns, the trainer's step is served. The push itself follows every step."""
        self.barrier()

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager | None = None,
    ) -> Generated:
        """One completion for each row of `prompts`.

        Args:
            prompts: token ids [B][P]. TRL repeats a prompt `num_generations` times in a row, except in tool
                loops, where every row has its own history. Equal neighbours share one request entry,
                whatever their number.
            images: must be None.
            num_generations: TRL's G; not needed, since rows are counted.
            profiler: TRL's timer.

        Returns:
            prompt ids [B][P], completion ids [B][T], logprobs [B][T][1] of the sampled tokens under the
            distribution they were drawn from (before it was truncated, if it was), and their token ids [B][T][1].
            T is 0 only for later turns that find the context full.

        Raises:
            LockstepError: also when a completion is empty, aborted, or not of a version that may be trained on.
        """
        if images is not None and any(image is not None for image in images):
            raise InvalidRequest("images in prompts: only text models are supported")
        held, self._held = self._held, None
        with profiler or nullcontext():
            if self._goes_on:
                completions = self._go_on(prompts)
            else:
                completions = held[1] if held and held[0] == prompts else self.draw(prompts)
        return (
            prompts,
            [c.token_ids for c in completions],
            [[[logprob] for logprob in policy_logprobs(c, self.dispatcher.sampling)] for c in completions],
            [[[token] for token in c.token_ids] for c in completions],
        )

    @contextmanager
    def later_turns(self) -> Iterator[None]:
        """Within it TRL's tool loop runs: `generate` goes on with completions that were counted already."""
        self._goes_on = True
        try:
            yield
        finally:
            self._goes_on = False

    def hold(self, prompts: list[list[int]], completions: list[Completion]) -> None:
        """Answer the next `generate` with these, if it is for these prompts."""
        self._held = prompts, completions

    def draw(self, prompts: list[list[int]]) -> list[Completion]:
        """One completion for each row; of other prompts where `refill` has replaced groups."""
        started = time.perf_counter()
        ahead = self.ahead if self.is_training() else None
        completions = self._from_ahead(ahead, prompts) if ahead else None
        read_ahead = completions is not None
        if completions is None:
            completions = self._now(asks_of(prompts, self.seed_of))
            if self.is_training():
                completions = self.refill.fill(self.batch(), completions, self._now) if self.refill else completions
                self._count_lags([0] * len(completions))
        if self.is_training() and self.arrived:
            self.arrived(None, 0, completions)  # with what was replaced since it arrived
        self.drawn = completions
        waited = time.perf_counter() - started
        self._count(completions, waited, ahead.prefetcher.last_seconds if read_ahead and ahead else waited)
        return completions

    def _go_on(self, prompts: list[list[int]]) -> list[Completion]:
        """The next turn of each row, by the trainer's present weights; nothing where its history fills the context."""
        started = time.perf_counter()
        dispatcher = self.dispatcher
        fitting = [row for row, prompt in enumerate(prompts) if len(prompt) < dispatcher.max_model_len]
        dispatcher.capped_prompts += len(prompts) - len(fitting)
        asks = asks_of([prompts[row] for row in fitting], self._seed_of_turn)
        fetched = iter(dispatcher.fetch(asks, lambda: Wanted(self.version())))
        full = Completion(token_ids=[], logprobs=[], log_kept_mass=[], finish_reason="length", spans=[])
        completions = [full] * len(prompts)
        for row in fitting:
            completions[row] = next(fetched)
        seconds = time.perf_counter() - started
        self.stats.last_tokens += self._count_tokens(completions, seconds)
        self.stats.last_seconds += seconds
        return completions

    def _seed_of_turn(self, row: int, token_ids: list[int]) -> int | None:
        """Rows of one group may have the same history: one fixed seed would give them the same turn."""
        seed, fixed = self.seed_of(row, token_ids), self.dispatcher.fixed_seed
        return seed if seed is not None or fixed is None else fixed + row

    def draw_ahead(self, batch: int, prompts: list[list[int]], wanted: Callable[[], Wanted]) -> list[Completion]:
        """`draw` for a batch to come; called on a thread of its own."""
        fetch = partial(self.fetch, wanted=wanted, batch=batch)
        completions = fetch(asks_of(prompts))
        return self.refill.fill(batch, completions, fetch) if self.refill else completions

    def _now(self, asks: list[Ask]) -> list[Completion]:
        """Completions of the trainer's present weights."""
        return self.fetch(asks, lambda: Wanted(self.version()))

    def fetch(self, asks: list[Ask], wanted: Callable[[], Wanted], batch: int | None = None) -> list[Completion]:
        """`Dispatcher.fetch`; what belongs to a training batch is handed on as it arrives.

        Args:
            batch: that is read ahead; None: the present one, or an evaluation's.
        """
        listens = self.arrived if batch is not None or self.is_training() else None
        return self.dispatcher.fetch(asks, wanted, partial(listens, batch) if listens else None)

    def _from_ahead(self, ahead: Ahead, prompts: list[list[int]]) -> list[Completion] | None:
        """What was read ahead, with samples that lag too much replaced; None for prompts that were not."""
        batch = self.batch()
        ahead.prefetcher.request(batch, batch)
        completions = ahead.prefetcher.take(batch, prompts)
        if completions is None:
            return None
        prompts = (self.refill.prompts(batch) if self.refill else None) or prompts
        lags = [ahead.schedule.lag(batch, oldest_step(completion)) for completion in completions]
        # First of all, ahead of the batches that are not needed yet.
        self._regenerate(prompts, completions, lags, ahead.max_staleness)
        ahead.prefetcher.request(batch + 1, batch + ahead.max_staleness)
        self._count_lags(lags)
        return completions

    def _regenerate(self, prompts: list[list[int]], completions: list[Completion], lags: list[int], bound: int) -> None:
        """Replace, in place, every completion that lags more than `bound`."""
        stale = [row for row, lag in enumerate(lags) if lag > bound]
        if not stale:
            return
        self.stats.regenerated += len(stale)
        fresh = self._now([Ask(row, prompts[row], 1, self.seed_of(row, prompts[row])) for row in stale])
        for row, completion in zip(stale, fresh, strict=True):
            completions[row], lags[row] = completion, 0

    def _count_lags(self, lags: list[int]) -> None:
        self.stats.lags.update(lags)
        self.stats.last_lag = sum(lags) / max(len(lags), 1)

    def _count(self, completions: list[Completion], waited: float, seconds: float) -> None:
        self.stats.last_tokens, self.stats.last_seconds = self._count_tokens(completions, waited), seconds
        if self.is_training():
            self.stats.completions += len(completions)

    def _count_tokens(self, completions: list[Completion], waited: float) -> int:
        tokens = sum(len(c.token_ids) for c in completions)
        if self.is_training():
            self.stats.completion_tokens += tokens
            self.stats.wait_seconds += waited
        return tokens
