"""Completions for the rows of a batch, from the rollout server: whole, finite, and of versions that are ours."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Literal

from learner.client import RolloutClient
from learner.parallel import all_of
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import Completion, GenerateRequest, PolicySelector, Prompt, RolloutGroup
from shared.sampling import SamplingParams
from shared.weights import WeightVersion

#: Errors that say the server has forgotten the run, or was away: pushing again may help.
RECOVERABLE = {
    ErrorCode.UNKNOWN_RUN, ErrorCode.VERSION_NOT_ACTIVE, ErrorCode.STEP_NOT_REACHED, ErrorCode.NOT_READY,
}  # fmt: skip
MAX_PARALLEL_REQUESTS = 8
#: Row of a batch and its prompt -> seed; None: the server draws.
SeedOf = Callable[[int, list[int]], int | None]
#: First row of an entry, and its completions.
Arrived = Callable[[int, Sequence[Completion]], None]
#: How long the server may take until it serves a step that was pushed before the request.
_STEP_WAIT_S = 30.0
_RETRY_S = 0.2


@dataclass(frozen=True)
class Ask:
    """`n` completions of one prompt, `index` being its first row in the batch; `seed` overrides the sampling's."""

    index: int
    token_ids: list[int]
    n: int
    seed: int | None = None


@dataclass(frozen=True)
class Wanted:
    """Which weights completions may come from.

    Attributes:
        version: what is served when the request is made.
        exact: every token must be of `version`; else also of later steps of the same learner, as pushes overtake it.
        carried: tokens may have been sampled with KV that older weights computed.
    """

    version: WeightVersion
    exact: bool = True
    carried: bool = False

    def accepts(self, version: WeightVersion | None, kv: Literal["fresh", "carried"]) -> bool:
        """Whether a token may be of `version`. How old it may be is decided where it is trained on."""
        if kv != "fresh" and not self.carried:
            return False
        if self.exact or version is None:
            return version == self.version
        return (version.run_id, version.fence) == (self.version.run_id, self.version.fence)


def _unseeded(row: int, token_ids: list[int]) -> None:
    return None


def asks_of(prompts: Sequence[list[int]], seed_of: SeedOf = _unseeded) -> list[Ask]:
    """One entry for each run of equal neighbours among the rows.

    Args:
        prompts: token ids [B][P].
        seed_of: first row of an entry and its prompt -> its seed.
    """
    asks, index = [], 0
    for token_ids, rows in groupby(prompts):
        n = sum(1 for _ in rows)
        asks.append(Ask(index, list(token_ids), n, seed_of(index, token_ids)))
        index += n
    return asks


@dataclass
class Fetcher:
    """Asks the rollout server.

    Args:
        client: the rollout server.
        sampling: sampling parameters of every completion; `n` is set from the batch.
        max_model_len: the server's context in tokens.
        warn: told once that completions are cut short by the server's context.
        rank: of this process; keeps a fixed `seed` from giving two ranks the same completions.
        recover: waits for a server that is away and sends it again what it has forgotten; called on any thread.
        patience_s: how long a request that fails because the server is away is made again.
    """

    client: RolloutClient
    sampling: SamplingParams
    max_model_len: int
    warn: Callable[[str], None] = print
    rank: int = 0
    recover: Callable[[], None] = lambda: None
    patience_s: float = 600.0
    capped_prompts: int = field(default=0, init=False)

    def fetch(
        self, asks: Sequence[Ask], wanted: Callable[[], Wanted], arrived: Arrived | None = None
    ) -> list[Completion]:
        """Completions in row order. A server that is away, or has forgotten the run, is helped and asked again.

        Args:
            wanted: what is wanted when a request is made.
            arrived: told of each entry's completions as they come; again if the request has to be made again.

        Raises:
            LockstepError: also when a completion is empty, aborted, or of weights that were not wanted.
        """
        deadline, failed = time.monotonic() + self.patience_s, False
        while True:
            try:
                if failed:
                    self.recover()
                return self._attempt(asks, wanted(), arrived)
            except LockstepError as error:
                if error.code not in RECOVERABLE or time.monotonic() > deadline:
                    raise
                if not failed:
                    self.warn(f"{error}; bringing the server up to date and asking again")
                failed = True
            time.sleep(_RETRY_S)

    def _attempt(self, asks: Sequence[Ask], wanted: Wanted, arrived: Arrived | None) -> list[Completion]:
        """Entries with the same `n` and `max_tokens` travel in one request."""
        buckets: dict[tuple[int, int | None], list[Ask]] = {}
        for ask in asks:
            buckets.setdefault((ask.n, self._room(len(ask.token_ids))), []).append(ask)

        requests = [partial(self._request, bucket, *shape, wanted, arrived) for shape, bucket in buckets.items()]
        answers = all_of(requests, "rollouts", MAX_PARALLEL_REQUESTS)
        rows: dict[int, Completion] = {}
        for bucket, groups in zip(buckets.values(), answers, strict=True):
            for ask, group in zip(bucket, groups, strict=True):
                rows.update({ask.index + i: c for i, c in enumerate(group.completions)})
        return [rows[i] for i in sorted(rows)]

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
        self.capped_prompts += 1
        if self.capped_prompts == 1:
            self.warn(
                f"a prompt of {prompt_length} tokens leaves room for {room} of {wanted} completion tokens "
                "in the server's context; such completions are cut short (said once, counted in "
                "capped_prompts)"
            )
        return room

    def _request(
        self, asks: list[Ask], n: int, max_tokens: int | None, wanted: Wanted, arrived: Arrived | None
    ) -> list[RolloutGroup]:
        update: dict[str, Any] = {"n": n, "max_tokens": max_tokens}
        if self.sampling.seed is not None:
            update["seed"] = self.sampling.seed + (self.rank << 32)
        # Validated anew, so that n > 1 with temperature 0 is refused here and by name.
        sampling = SamplingParams.model_validate({**self.sampling.model_dump(), **update})
        policy: PolicySelector = wanted.version if wanted.exact else "latest"
        step = {} if wanted.exact else {"min_step": wanted.version.step, "wait_s": _STEP_WAIT_S}
        request = GenerateRequest(
            prompts=[Prompt(token_ids=ask.token_ids, seed=ask.seed) for ask in asks],
            sampling=sampling, policy=policy, run_id=wanted.version.run_id, return_text=False, **step,
        )  # fmt: skip
        groups: dict[int, RolloutGroup] = {}
        for group in self.client.iter_groups(request) if arrived else self.client.generate(request).groups:
            ask = asks[group.prompt_index] if 0 <= group.prompt_index < len(asks) else None
            if ask is None or len(group.completions) != ask.n or group.prompt_token_ids != ask.token_ids:
                raise _broken(f"group {group.prompt_index} is not the completions of a prompt that was sent")
            for completion in group.completions:
                check_completion(completion, wanted)
            groups[group.prompt_index] = group
            if arrived:
                arrived(ask.index, group.completions)
        if len(groups) != len(asks):
            raise _broken(f"asked for {len(asks)} groups, got {sorted(groups)}")
        return [groups[i] for i in range(len(asks))]


def check_completion(completion: Completion, wanted: Wanted) -> None:
    """Every token has a finite logprob and was sampled from weights that are wanted.

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
        if not wanted.accepts(span.version, span.kv):
            raise LockstepError(
                ErrorCode.VERSION_NOT_ACTIVE,
                f"tokens [{span.start}, {span.end}) come from {span.version or 'the base'} (kv {span.kv}), "
                f"asked for was {wanted.version}: this would be off-policy; does another learner push to this run?",
            )
        position = span.end
    if position != length:
        raise _broken(f"spans cover {position} of {length} tokens")


def oldest_step(completion: Completion) -> int:
    """The step whose weights sampled the oldest token."""
    return min(span.version.step for span in completion.spans if span.version is not None)


def _broken(what: str) -> LockstepError:
    return LockstepError(ErrorCode.PROTOCOL_MISMATCH, f"the rollout server's answer is broken: {what}; see its log")
