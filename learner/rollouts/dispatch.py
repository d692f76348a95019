"""Completions for the rows of a batch, from all rollout servers: each prompt's from one of them, whoever fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

from learner.rollouts.completions import Wanted, broken, check_completion
from learner.servers.pool import ServerPool
from learner.servers.replica import Replica
from learner.servers.router import Router
from learner.utils.threads import start
from shared.errors import InvalidRequest, LockstepError
from shared.rollouts import Completion, GenerateRequest, PolicySelector, Prompt
from shared.sampling import SamplingParams

#: Row of a batch and its prompt -> seed; None: the server draws.
SeedOf = Callable[[int, list[int]], int | None]
#: First row of an entry, and its completions.
Arrived = Callable[[int, Sequence[Completion]], None]
#: How long a server may take until it serves a step that was pushed before the request.
_STEP_WAIT_S = 30.0


@dataclass(frozen=True)
class Ask:
    """`n` completions of one prompt, `index` being its first row in the batch; `seed` overrides the sampling's."""

    index: int
    token_ids: list[int]
    n: int
    seed: int | None = None


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
class _Request:
    """One request to one server: entries with the same `n` and `max_tokens`. `rows`: what has come of it."""

    replica: Replica
    asks: list[Ask]
    max_tokens: int | None
    wanted: Wanted
    incarnation: int
    costs: dict[int, float]
    rows: dict[int, Completion] = field(default_factory=dict)

    def left(self) -> list[Ask]:
        """What has not come."""
        return [ask for ask in self.asks if ask.index not in self.rows]


@dataclass
class Dispatcher:
    """Asks the rollout servers.

    Args:
        pool: the rollout servers.
        sampling: sampling parameters of every completion; `n` is set from the batch.
        max_model_len: the servers' context in tokens.
        warn: told once that completions are cut short by the servers' context.
        rank: of this process; keeps a fixed `seed` from giving two ranks the same completions.
        before: called before anything is asked for.
    """

    pool: ServerPool
    sampling: SamplingParams
    max_model_len: int
    warn: Callable[[str], None] = print
    rank: int = 0
    before: Callable[[], None] = lambda: None
    capped_prompts: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.router = Router(self.sampling.max_tokens)

    @property
    def fixed_seed(self) -> int | None:
        """The sampling's seed on this rank."""
        return None if self.sampling.seed is None else self.sampling.seed + (self.rank << 32)

    def fetch(
        self, asks: Sequence[Ask], wanted: Callable[[], Wanted], arrived: Arrived | None = None
    ) -> list[Completion]:
        """Completions in row order. What a server that fails has not sent yet, another one is asked for.

        Args:
            wanted: what is wanted when a request is made.
            arrived: told of each entry's completions as they come.

        Raises:
            LockstepError: also when a completion is empty, aborted, or of weights that were not wanted.
        """
        self.before()
        rows: dict[int, Completion] = {}
        waiting, running = list(asks), dict[Future[None], _Request]()
        failing_since: float | None = None
        while waiting or running:
            replicas = self.pool.up() if running else self.pool.available()
            if waiting and replicas:
                for request in self._requests(waiting, replicas, wanted()):
                    running[start(partial(self._run, request, arrived), "rollouts")] = request
                waiting = []
            # A server may come back while others are still busy with their share.
            ended, _ = wait(running, 1.0 if waiting else None, FIRST_COMPLETED)
            for outcome in ended:
                request = running.pop(outcome)
                rows.update(request.rows)
                waiting += request.left()
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

    def _requests(self, asks: list[Ask], replicas: list[Replica], wanted: Wanted) -> list[_Request]:
        requests = []
        for replica, share in self.router.split(asks, replicas):
            buckets: dict[tuple[int, int | None], list[Ask]] = {}
            for ask in share:
                buckets.setdefault((ask.n, self._room(len(ask.token_ids))), []).append(ask)
            for (_, max_tokens), bucket in buckets.items():
                costs = {ask.index: self.router.cost(ask) for ask in bucket}
                requests.append(_Request(replica, bucket, max_tokens, wanted, replica.incarnation, costs))
                replica.load.begin(sum(costs.values()))
        return requests

    def _room(self, prompt_length: int) -> int | None:
        """`max_tokens`, or less where the context ends before (a long prompt, a grown tool history)."""
        room = self.max_model_len - prompt_length
        if room < 1:
            raise InvalidRequest(
                f"a prompt of {prompt_length} tokens leaves no room in the server's context of "
                f"{self.max_model_len}: shorten the prompts or raise the server's --max-model-len"
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

    def _run(self, request: _Request, arrived: Arrived | None) -> None:
        """Make the request; each entry's completions are kept as they come."""
        costs, load = dict(request.costs), request.replica.load
        try:
            with request.replica.request_slots:
                for group in request.replica.client.iter_groups(self._body(request)):
                    index = group.prompt_index
                    ask = request.asks[index] if 0 <= index < len(request.asks) else None
                    if ask is None or len(group.completions) != ask.n or group.prompt_token_ids != ask.token_ids:
                        raise broken(f"group {index} is not the completions of a prompt that was sent")
                    for completion in group.completions:
                        check_completion(completion, request.wanted)
                    lengths = [len(completion.token_ids) for completion in group.completions]
                    self.router.saw(lengths)
                    load.end(costs.pop(ask.index, 0.0), sum(lengths))
                    self.pool.on_tokens(request.replica, sum(lengths))
                    request.rows.update({ask.index + i: c for i, c in enumerate(group.completions)})
                    if arrived:
                        arrived(ask.index, group.completions)
        finally:
            load.end(sum(costs.values()))
        if left := request.left():
            raise broken(f"asked for {len(request.asks)} groups, {len(left)} of them did not come")

    def _body(self, request: _Request) -> GenerateRequest:
        wanted = request.wanted
        update: dict[str, Any] = {"n": request.asks[0].n, "max_tokens": request.max_tokens}
        if self.fixed_seed is not None:
            update["seed"] = self.fixed_seed
        # Validated anew, so that n > 1 with temperature 0 is refused here and by name.
        sampling = SamplingParams.model_validate({**self.sampling.model_dump(), **update})
        policy: PolicySelector = wanted.version if wanted.exact else "latest"
        step = {} if wanted.exact else {"min_step": wanted.version.step, "wait_s": _STEP_WAIT_S}
        return GenerateRequest(
            prompts=[Prompt(token_ids=ask.token_ids, seed=ask.seed) for ask in request.asks],
            sampling=sampling,
            policy=policy,
            run_id=wanted.version.run_id,
            return_text=False,
            **step,
        )
