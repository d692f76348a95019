"""In the place of TRL's `VLLMGeneration`: completions from the rollout server, at the pushed version."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from learner.client import RolloutClient
from learner.sampling import policy_logprobs
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import Completion, GenerateRequest, Prompt, RolloutGroup
from shared.sampling import SamplingParams
from shared.weights import WeightVersion

#: Errors that say the server has forgotten the run, or was away: pushing again may help.
RECOVERABLE = {ErrorCode.UNKNOWN_RUN, ErrorCode.VERSION_NOT_ACTIVE, ErrorCode.NOT_READY}
MAX_PARALLEL_REQUESTS = 8

Generated = tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]


@dataclass
class RolloutStats:
    """Counts of training rollouts on this rank, and the last batch's speed."""

    completions: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    last_tokens: int = 0
    last_seconds: float = 0.0
    capped_prompts: int = 0


@dataclass(frozen=True)
class _Ask:
    """`n` completions of one prompt, `index` being its first row in the batch."""

    index: int
    token_ids: list[int]
    n: int
    max_tokens: int | None


@dataclass
class RemoteRollouts:
    """TRL calls `sync_weights()` before a batch whose step it has not seen, then `generate()`; on every rank.

    Args:
        client: the rollout server.
        sampling: sampling parameters of every completion; `n` is set from the batch.
        max_model_len: the server's context in tokens.
        version: answers the version that must be served now.
        barrier: makes sure that this version is served; collective over all ranks.
        recover: brings a server that restarted back to this version; None where a single rank cannot do it.
        is_training: False while TRL evaluates; those rollouts are not counted.
        rank: of this process; keeps a fixed `seed` from giving two ranks the same completions.
    """

    client: RolloutClient
    sampling: SamplingParams
    max_model_len: int
    version: Callable[[], WeightVersion]
    barrier: Callable[[], None]
    recover: Callable[[], None] | None = None
    is_training: Callable[[], bool] = lambda: True
    warn: Callable[[str], None] = print
    rank: int = 0
    stats: RolloutStats = field(default_factory=RolloutStats)

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

        Raises:
            LockstepError: also when a completion is empty, aborted, or not wholly from the version asked for.
        """
        if images is not None and any(image is not None for image in images):
            raise LockstepError(ErrorCode.INVALID_REQUEST, "images in prompts: only text models are supported")
        started = time.perf_counter()
        with profiler or nullcontext():
            completions = self._fetch(self._asks(prompts))
        self._count(completions, time.perf_counter() - started)
        return (
            prompts,
            [c.token_ids for c in completions],
            [[[logprob] for logprob in policy_logprobs(c, self.sampling)] for c in completions],
            [[[token] for token in c.token_ids] for c in completions],
        )

    def _asks(self, prompts: Sequence[list[int]]) -> list[_Ask]:
        asks, index = [], 0
        for token_ids, rows in groupby(prompts):
            n = sum(1 for _ in rows)
            asks.append(_Ask(index, list(token_ids), n, self._room(len(token_ids))))
            index += n
        return asks

    def _room(self, prompt_length: int) -> int | None:
        """`max_tokens`, or less where the context ends before (a long prompt, a grown tool history)."""
        room = self.max_model_len - prompt_length
        if room < 1:
            raise LockstepError(
                ErrorCode.INVALID_REQUEST,
                f"a prompt of {prompt_length} tokens leaves no room in the server's context of "
                f"{self.max_model_len}: shorten the prompts or raise the server's --max-model-len",
            )
        wanted = self.sampling.max_tokens
        if wanted is None or wanted <= room:
            return wanted
        self.stats.capped_prompts += 1
        if self.stats.capped_prompts == 1:
            self.warn(
                f"a prompt of {prompt_length} tokens leaves room for {room} of {wanted} completion tokens "
                "in the server's context; such completions are cut short (said once, counted in "
                "capped_prompts)"
            )
        return room

    def _fetch(self, asks: list[_Ask]) -> list[Completion]:
        """Completions in row order. Entries with the same `n` and `max_tokens` travel in one request."""
        buckets: dict[tuple[int, int | None], list[_Ask]] = {}
        for ask in asks:
            buckets.setdefault((ask.n, ask.max_tokens), []).append(ask)
        if len(buckets) == 1:
            answers = [self._request(asks)]
        else:
            with ThreadPoolExecutor(min(len(buckets), MAX_PARALLEL_REQUESTS)) as pool:
                answers = list(pool.map(self._request, buckets.values()))
        rows: dict[int, Completion] = {}
        for bucket, groups in zip(buckets.values(), answers, strict=True):
            for ask, group in zip(bucket, groups, strict=True):
                rows.update({ask.index + i: c for i, c in enumerate(group.completions)})
        return [rows[i] for i in range(len(rows))]

    def _request(self, asks: list[_Ask]) -> list[RolloutGroup]:
        try:
            return self._attempt(asks)
        except LockstepError as error:
            if error.code not in RECOVERABLE or self.recover is None:
                raise
            self.warn(f"{error}; bringing the server up to date and asking again")
        self.recover()
        return self._attempt(asks)

    def _attempt(self, asks: list[_Ask]) -> list[RolloutGroup]:
        expected, first = self.version(), asks[0]
        update: dict[str, Any] = {"n": first.n, "max_tokens": first.max_tokens}
        if self.sampling.seed is not None:
            update["seed"] = self.sampling.seed + (self.rank << 32)
        # Validated anew, so that n > 1 with temperature 0 is refused here and by name.
        sampling = SamplingParams.model_validate({**self.sampling.model_dump(), **update})
        request = GenerateRequest(
            prompts=[Prompt(token_ids=ask.token_ids) for ask in asks],
            sampling=sampling, policy=expected, run_id=expected.run_id, return_text=False,
        )  # fmt: skip
        groups = sorted(self.client.generate(request).groups, key=lambda group: group.prompt_index)
        if [group.prompt_index for group in groups] != list(range(len(asks))):
            raise _broken(f"asked for {len(asks)} groups, got {[g.prompt_index for g in groups]}")
        for ask, group in zip(asks, groups, strict=True):
            if len(group.completions) != ask.n or group.prompt_token_ids != ask.token_ids:
                raise _broken(f"group {group.prompt_index} is not {ask.n} completions of the prompt that was sent")
            for completion in group.completions:
                check_completion(completion, expected)
        return groups

    def _count(self, completions: list[Completion], seconds: float) -> None:
        tokens = sum(len(c.token_ids) for c in completions)
        self.stats.last_tokens, self.stats.last_seconds = tokens, seconds
        if self.is_training():
            self.stats.completions += len(completions)
            self.stats.completion_tokens += tokens
            self.stats.seconds += seconds


def check_completion(completion: Completion, expected: WeightVersion) -> None:
    """Every token has a finite logprob and was sampled from `expected`, with KV computed by it.

    Raises:
        LockstepError: `protocol_mismatch` for a broken answer, `version_not_active` for tokens of another
        version.
    """
    length = len(completion.token_ids)
    if length == 0 or completion.finish_reason == "abort":
        raise _broken(f"a completion of {length} tokens that ended with {completion.finish_reason!r}")
    if len(completion.logprobs) != length or not all(map(math.isfinite, completion.logprobs)):
        raise _broken(f"{len(completion.logprobs)} logprobs for {length} tokens, or some that are not finite")
    position = 0
    for span in completion.spans:
        if span.start != position or span.end <= span.start:
            raise _broken(f"spans leave a gap or overlap at token {position}")
        if span.version != expected or span.kv != "fresh":
            raise LockstepError(
                ErrorCode.VERSION_NOT_ACTIVE,
                f"tokens [{span.start}, {span.end}) come from {span.version or 'the base'} (kv {span.kv}), "
                f"asked for was {expected}: this would be off-policy; does another learner push to this run?",
            )
        position = span.end
    if position != length:
        raise _broken(f"spans cover {position} of {length} tokens")


def _broken(what: str) -> LockstepError:
    return LockstepError(ErrorCode.PROTOCOL_MISMATCH, f"the rollout server's answer is broken: {what}; see its log")
