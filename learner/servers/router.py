"""Router of prompts to rollout servers: to the one that will finish first, or that has the prompt in its cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from learner.servers.replica import NEWEST, Replica

#: Prompts are compared in blocks of so many tokens. Servers cache in smaller ones; shorter prompts cost little anyway.
_BLOCK_TOKENS = 128
_MAX_BLOCKS = 65536
#: How much later a server with the prompt in its cache may finish than the first one.
_AFFINITY_SLACK = 1.25


@dataclass(frozen=True)
class GroupRequest:
    """A request for `n` completions of one prompt.

    Attributes:
        first_row: row of the batch that the first completion is for; the others follow it.
        token_ids: of the prompt; an `ImagePrompt` where it has images.
        seed: overrides the seed of the sampling parameters.
    """

    first_row: int
    token_ids: list[int]
    n: int
    seed: int | None = None


class Router:
    """Spreads prompts over servers; expects completions of `max_tokens` until some were measured."""

    def __init__(self, max_tokens: int | None) -> None:
        self._length = float(max_tokens or 256)
        self._measured = False
        self._lock = threading.Lock()
        #: Hash of a prompt's first blocks -> URL of the server that was last sent them.
        self._cached_at: OrderedDict[int, str] = OrderedDict()

    def cost(self, request: GroupRequest) -> float:
        """Estimate the tokens to compute, of prompt and completions."""
        return request.n * self._length + len(request.token_ids)

    def saw(self, lengths: Sequence[int]) -> None:
        """Update the expected length by those of completions that have come, in tokens."""
        mean = sum(lengths) / max(len(lengths), 1)
        with self._lock:
            self._length = (1 - NEWEST) * self._length + NEWEST * mean if self._measured else max(mean, 1.0)
            self._measured = True

    def split(
        self, requests: Sequence[GroupRequest], replicas: Sequence[Replica]
    ) -> list[tuple[Replica, list[GroupRequest]]]:
        """Assign each request to one server; omit servers without any. Their loads are not changed."""
        measured = [replica.load.speed for replica in replicas if replica.load.speed]
        usual = sum(measured) / len(measured) if measured else 1.0
        # Arrays: every request looks at every server.
        speed = np.array([replica.load.speed or usual for replica in replicas])
        tokens = np.array([replica.load.outstanding for replica in replicas])
        index = {replica.url: i for i, replica in enumerate(replicas)}
        shares: list[list[GroupRequest]] = [[] for _ in replicas]
        with self._lock:
            for request in requests:
                cost = self.cost(request)
                finish = (tokens + cost) / speed
                chosen = int(finish.argmin())
                blocks = _block_hashes(request.token_ids)
                cached = next((self._cached_at[b] for b in reversed(blocks) if b in self._cached_at), None)
                if cached in index and finish[index[cached]] <= _AFFINITY_SLACK * finish[chosen]:
                    chosen = index[cached]
                for block in blocks:
                    self._cached_at[block] = replicas[chosen].url
                    self._cached_at.move_to_end(block)
                tokens[chosen] += cost
                shares[chosen].append(request)
            while len(self._cached_at) > _MAX_BLOCKS:
                self._cached_at.popitem(last=False)
        return [(replica, share) for replica, share in zip(replicas, shares, strict=True) if share]


def _block_hashes(token_ids: list[int]) -> list[int]:
    """Return a hash of every prefix of full blocks, the shortest first."""
    ends = range(_BLOCK_TOKENS, len(token_ids) + 1, _BLOCK_TOKENS)
    return list(accumulate(ends, lambda last, end: hash((last, *token_ids[end - _BLOCK_TOKENS : end])), initial=0))[1:]
