"""Distribute the prompts of a batch over all rollout servers, and over the remaining ones where a server fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from learner.rollouts.completions import AllowedVersion, broken_response, check_completion
from learner.servers.pool import ServerPool
from learner.servers.prompts import body_bytes, digests_of, images_of, memory_of
from learner.servers.replica import Replica
from learner.servers.router import GroupRequest, Router
from learner.utils.threads import start
from shared.errors import InvalidRequest, LockstepError, TooLarge
from shared.rollouts import Completion, GenerateRequest, Prompt
from shared.sampling import SamplingParams
from shared.weights import ServerState

#: Called with the first row and the completions of a group, on any thread.
OnCompletions = Callable[[int, Sequence[Completion]], None]
#: How long a server may take until it serves a step that was pushed before the request.
STEP_WAIT_S = 30.0
#: Of a request's body, for all that is not its prompts; sampling may list a million token ids.
_BODY_BYTES = 2**18

logger = logging.getLogger("lockstep.rollouts")


def group_requests(
    prompts: Sequence[list[int]], seed_of: Callable[[int, list[int]], int | None] | None = None
) -> list[GroupRequest]:
    """Return one request for each run of equal neighbors among the prompts.

    Args:
        prompts: token ids [B][P].
        seed_of: maps the first row of a group and its prompt to a seed.
    """
    requests, row = [], 0
    for token_ids, rows in groupby(prompts):
        n = sum(1 for _ in rows)
        requests.append(GroupRequest(row, token_ids, n, seed_of(row, token_ids) if seed_of else None))
        row += n
    return requests


def fitting(groups: Sequence[GroupRequest], state: ServerState) -> list[list[GroupRequest]]:
    """Cut groups into requests whose bodies, and images once decoded, a server takes.

    Raises:
        LockstepError: `too_large` if one prompt alone is more than that.
    """
    limits = (state.max_body_bytes - _BODY_BYTES, state.max_image_memory)
    parts, used = list[list[GroupRequest]](), (0, 0)
    for group in groups:
        needs = (body_bytes(group.token_ids), memory_of(group.token_ids, state))
        over = [0 < limit < need for limit, need in zip(limits, needs, strict=True)]
        if any(over):
            flag = "--max-body-mib" if over[0] else "--max-bodies-mib"
            raise TooLarge(
                f"a prompt of {len(group.token_ids)} tokens and {len(images_of(group.token_ids))} images takes "
                f"{needs[0]} bytes, and {needs[1]} once they are decoded, more than the server's {flag}: scale its "
                f"images down, or start the server with a larger {flag}"
            )
        together = (used[0] + needs[0], used[1] + needs[1])
        if not parts or any(0 < limit < size for limit, size in zip(limits, together, strict=True)):
            parts.append([])
            together = needs
        parts[-1].append(group)
        used = together
    return parts


@dataclass
class _ServerRequest:
    """One request to one server: groups with the same `n` and `max_tokens`, and the rows completed so far."""

    replica: Replica
    groups: list[GroupRequest]
    max_tokens: int | None
    allowed: AllowedVersion
    incarnation: int
    costs: dict[int, float]
    rows: dict[int, Completion] = field(default_factory=dict)

    def missing(self) -> list[GroupRequest]:
        return [group for group in self.groups if group.first_row not in self.rows]


@dataclass
class Dispatcher:
    """Sends requests to the rollout servers.

    Args:
        pool: the rollout servers.
        sampling: sampling parameters of every completion; `n` is set from the batch.
        max_model_len: the servers' context in tokens.
        rank: of this process; keeps a fixed `seed` from giving two ranks the same completions.
        before: called before the first request of a batch.

    Attributes:
        capped_prompts: prompts that left less than `max_tokens` in the context.
    """

    pool: ServerPool
    sampling: SamplingParams
    max_model_len: int
    rank: int = 0
    before: Callable[[], None] = lambda: None
    capped_prompts: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.router = Router(self.sampling.max_tokens)

    @property
    def fixed_seed(self) -> int | None:
        """Seed of the sampling parameters, offset by rank."""
        return None if self.sampling.seed is None else self.sampling.seed + (self.rank << 32)

    def dispatch(
        self,
        groups: Sequence[GroupRequest],
        allowed: Callable[[], AllowedVersion],
        on_completions: OnCompletions | None = None,
    ) -> list[Completion]:
        """Return completions in row order. Groups that a failing server has not sent are requested from another one.

        Args:
            allowed: evaluated for every request that is made.
            on_completions: called for each group as it arrives.

        Raises:
            LockstepError: also when a completion is empty, aborted, or sampled from other weights than allowed.
        """
        self.before()
        rows: dict[int, Completion] = {}
        waiting, running = list(groups), dict[Future[None], _ServerRequest]()
        failing_since: float | None = None
        while waiting or running:
            replicas = self.pool.up() if running else self.pool.available()
            if waiting and replicas:
                for request in self._requests(waiting, replicas, allowed()):
                    running[start(partial(self._run, request, on_completions), "rollouts")] = request
                waiting = []
            # A server may come back while others are still busy with their share.
            ended, _ = wait(running, 1.0 if waiting else None, FIRST_COMPLETED)
            for outcome in ended:
                request = running.pop(outcome)
                rows.update(request.rows)
                waiting += request.missing()
                failing_since = None if request.rows else failing_since
                error = outcome.exception()
                if isinstance(error, LockstepError):
                    failing_since = failing_since or time.monotonic()
                    if time.monotonic() > failing_since + self.pool.patience_s:
                        raise error
                    self.pool.lost_or_raise(request.replica, error, request.incarnation)
                elif error is not None:
                    raise error
                else:
                    request.replica.failures = 0
        return [rows[i] for i in sorted(rows)]

    def progress(self) -> str:
        """Return how much of what was requested is outstanding, and how many servers work on it."""
        replicas = list(self.pool.replicas.values())
        tokens = sum(replica.load.outstanding for replica in replicas)
        return f"about {tokens:.0f} tokens to come, {len(self.pool.up())} of {len(replicas)} servers up"

    def _requests(
        self, groups: list[GroupRequest], replicas: list[Replica], allowed: AllowedVersion
    ) -> list[_ServerRequest]:
        requests = []
        for replica, share in self.router.split(groups, replicas):
            buckets: dict[tuple[int, int | None], list[GroupRequest]] = {}
            for group in share:
                buckets.setdefault((group.n, self._max_tokens(len(group.token_ids))), []).append(group)
            parts = [
                (max_tokens, part)
                for (_, max_tokens), bucket in buckets.items()
                for part in fitting(bucket, replica.known)
            ]
            for max_tokens, bucket in parts:
                costs = {group.first_row: self.router.cost(group) for group in bucket}
                requests.append(_ServerRequest(replica, bucket, max_tokens, allowed, replica.incarnation, costs))
                replica.load.begin(sum(costs.values()))
        return requests

    def _max_tokens(self, prompt_length: int) -> int | None:
        """Return `max_tokens`, or less where the context ends earlier (a long prompt, a grown tool history)."""
        room = self.max_model_len - prompt_length
        if room < 1:
            raise InvalidRequest(
                f"a prompt of {prompt_length} tokens leaves no room in the server's context of "
                f"{self.max_model_len}: shorten the prompts or raise the server's --max-model-len"
            )
        max_tokens = self.sampling.max_tokens
        if max_tokens is None or max_tokens <= room:
            return max_tokens
        self.capped_prompts += 1
        if self.capped_prompts == 1:
            logger.warning(
                f"a prompt of {prompt_length} tokens leaves room for {room} of {max_tokens} completion tokens in the "
                "server's context; such completions are cut short (said once, counted in capped_prompts)"
            )
        return room

    def _run(self, request: _ServerRequest, on_completions: OnCompletions | None) -> None:
        """Make the request; keep the completions of each group as they arrive."""
        costs, load = dict(request.costs), request.replica.load
        try:
            with request.replica.request_slots:
                for response in request.replica.client.iter_groups(self._body(request)):
                    index, completions = response.prompt_index, response.completions
                    group = request.groups[index] if 0 <= index < len(request.groups) else None
                    if (
                        group is None
                        or len(completions) != group.n
                        or response.prompt_token_ids != list(group.token_ids)
                    ):
                        raise broken_response(f"group {index} is not the completions of a prompt that was sent")
                    if response.image_digests != digests_of(group.token_ids):
                        raise broken_response(f"group {index} is of other images than those that were sent")
                    for completion in completions:
                        check_completion(completion, request.allowed)
                    lengths = [len(completion.token_ids) for completion in completions]
                    self.router.saw(lengths)
                    load.end(costs.pop(group.first_row, 0.0), sum(lengths))
                    self.pool.on_tokens(request.replica, sum(lengths))
                    request.replica.heard()
                    request.rows.update({group.first_row + i: c for i, c in enumerate(completions)})
                    if on_completions:
                        on_completions(group.first_row, completions)
        finally:
            load.end(sum(costs.values()))
        if missing := request.missing():
            raise broken_response(f"requested {len(request.groups)} groups, {len(missing)} of them did not come")

    def _body(self, request: _ServerRequest) -> GenerateRequest:
        allowed, n = request.allowed, request.groups[0].n
        update = {"n": n, "max_tokens": request.max_tokens, "seed": self.fixed_seed}
        return GenerateRequest(
            prompts=[
                Prompt(token_ids=list(group.token_ids), seed=group.seed, images=images_of(group.token_ids))
                for group in request.groups
            ],
            # Validated again, so that n > 1 with temperature 0 is refused here and by name.
            sampling=SamplingParams.model_validate({**self.sampling.model_dump(), **update}),
            policy=allowed.version if allowed.exact else "latest",
            run_id=allowed.version.run_id,
            return_text=False,
            **({} if allowed.exact else {"min_step": allowed.version.step, "wait_s": STEP_WAIT_S}),
        )
