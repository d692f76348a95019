"""Which rollout server completes which prompts: the one that will be done first, or that knows the prompt already."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, TypeVar

#: Weight of the latest measurement in a server's speed, and in the length of completions.
_NEWEST = 0.3
#: Prompts are compared in blocks of so many tokens. Servers cache in smaller ones; shorter prompts cost little anyway.
_BLOCK_TOKENS = 128
_BLOCKS_KNOWN = 65536
#: How much later a server that knows the prompt may be done than the one that would be first.
_AFFINITY_SLACK = 1.25


class Load:
    """What one server still has to do, and how fast it has been.

    Attributes:
        outstanding: tokens that it was asked for and has not sent.
        speed: tokens per second while it had something to do; None: not known yet.
        tokens: that have come from it so far.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.outstanding = 0.0
        self.speed: float | None = None
        self.tokens = 0
        self._tokens_before, self._busy_since = 0, 0.0

    def begin(self, expected: float) -> None:
        """So many more tokens were asked for."""
        with self._lock:
            if self.outstanding <= 0:
                self._tokens_before, self._busy_since = self.tokens, time.monotonic()
            self.outstanding += expected

    def end(self, expected: float, tokens: int = 0) -> None:
        """Of what was asked for, this much has come (or will not come), as `tokens` tokens."""
        with self._lock:
            self.outstanding -= expected
            self.tokens += tokens
            if self.outstanding > 0.5:
                return
            self.outstanding = 0.0
            seconds = time.monotonic() - self._busy_since
            came = self.tokens - self._tokens_before
            if came and seconds > 0:
                speed = came / seconds
                self.speed = speed if self.speed is None else (1 - _NEWEST) * self.speed + _NEWEST * speed


class Server(Protocol):
    """What is known of a server."""

    @property
    def url(self) -> str: ...
    @property
    def load(self) -> Load: ...


class Ask(Protocol):
    """`n` completions of one prompt."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def n(self) -> int: ...


S = TypeVar("S", bound=Server)
A = TypeVar("A", bound=Ask)


class Router:
    """Spreads prompts over servers.

    Args:
        max_tokens: of a completion; what is expected of the first ones.
    """

    def __init__(self, max_tokens: int | None) -> None:
        self._length = float(max_tokens or 256)
        self._measured = False
        self._lock = threading.Lock()
        self._known: OrderedDict[int, str] = OrderedDict()

    def cost(self, ask: Ask) -> float:
        """Tokens that will be computed for it, about."""
        return ask.n * self._length + len(ask.token_ids)

    def saw(self, lengths: Sequence[int]) -> None:
        """Completions of these lengths have come."""
        mean = sum(lengths) / max(len(lengths), 1)
        with self._lock:
            self._length = (1 - _NEWEST) * self._length + _NEWEST * mean if self._measured else max(mean, 1.0)
            self._measured = True

    def split(self, asks: Sequence[A], servers: Sequence[S]) -> list[tuple[S, list[A]]]:
        """Each ask to one server; servers without any are left out. Their loads are not changed."""
        known = [server.load.speed for server in servers if server.load.speed]
        usual = sum(known) / len(known) if known else 1.0
        speed = {server.url: server.load.speed or usual for server in servers}
        tokens = {server.url: server.load.outstanding for server in servers}
        shares: dict[str, list[A]] = {server.url: [] for server in servers}
        with self._lock:
            for ask in asks:
                cost = self.cost(ask)
                done = {url: (tokens[url] + cost) / speed[url] for url in tokens}
                first = min(done, key=lambda url: done[url])
                blocks = _blocks(ask.token_ids)
                owner = next((self._known[b] for b in reversed(blocks) if b in self._known), None)
                chosen = owner if owner in done and done[owner] <= _AFFINITY_SLACK * done[first] else first
                self._remember(blocks, chosen)
                tokens[chosen] += cost
                shares[chosen].append(ask)
        return [(server, shares[server.url]) for server in servers if shares[server.url]]

    def _remember(self, blocks: list[int], url: str) -> None:
        for block in blocks:
            self._known[block] = url
            self._known.move_to_end(block)
        while len(self._known) > _BLOCKS_KNOWN:
            self._known.popitem(last=False)


def _blocks(token_ids: list[int]) -> list[int]:
    """A hash of each whole number of blocks that the prompt begins with, the shortest first."""
    hashes, last = [], 0
    for end in range(_BLOCK_TOKENS, len(token_ids) + 1, _BLOCK_TOKENS):
        last = hash((last, *token_ids[end - _BLOCK_TOKENS : end]))
        hashes.append(last)
    return hashes
