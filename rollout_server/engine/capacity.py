"""How much this server takes on at once, and whether it takes on anything at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rollout_server.settings import ServerSettings
from shared.errors import Draining, LockstepError, Overloaded, TooLarge

_POLL_SECONDS = 0.05


class Capacity:
    """Counts what is under way, over all routes, and refuses what goes beyond the settings.

    What fills an engine are sequences, prompts times n, so they are what is bounded; requests are bounded for the
    memory that their bodies take.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.sequences = 0
        self.requests = 0
        self._body_bytes = 0
        self._draining = asyncio.Event()

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken on."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Take nothing new from now on; what is under way goes on."""
        self._draining.set()

    async def drained(self, seconds: float) -> bool:
        """Wait until `drain` was called, then until nothing is under way or `seconds` have passed; is nothing left?"""
        await self._draining.wait()
        deadline = asyncio.get_running_loop().time() + seconds
        while self.sequences or self.requests:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def check(self, sequences: int = 1) -> None:
        """Would there be room for so many?

        Raises:
            LockstepError: `draining`, `overloaded`.
        """
        if self.draining:
            raise Draining("this server is about to leave and takes nothing new; ask another, or its successor")
        if self.sequences + sequences > self._settings.max_sequences:
            raise Overloaded(
                f"{self.sequences} sequences are under way, {sequences} more would go beyond --max-sequences "
                f"{self._settings.max_sequences}; ask again after the seconds of Retry-After",
                sequences=self.sequences,
            )

    def take(self, prompts: int, n: int = 1) -> Callable[[], None]:
        """Count `prompts` times `n` sequences as under way; answers what gives their room back, once.

        Raises:
            LockstepError: `too_large` for what could never be taken; `draining`, `overloaded`.
        """
        limits = self._settings
        sequences = prompts * n
        for flag, asked, limit in (
            ("--max-prompts", prompts, limits.max_prompts),
            ("--max-n", n, limits.max_n),
            ("--max-sequences", sequences, limits.max_sequences),
        ):
            if asked > limit:
                raise too_large(f"{prompts} prompts with n = {n}", flag, limit)
        self.check(sequences)
        self.sequences += sequences
        return _once(lambda: self._give_back(sequences))

    def check_tokens(self, tokens: int) -> None:
        """Refuse a request of more `tokens`, given and asked for, than one may have.

        Raises:
            LockstepError: `too_large`.
        """
        limit = self._settings.max_request_tokens
        if tokens > limit:
            raise too_large(f"{tokens} tokens, given and asked for", "--max-request-tokens", limit)

    def enter(self, *, bounded: bool = True) -> Callable[[], None]:
        """Count a request as under way; answers what says that it has been answered.

        Raises:
            LockstepError: `overloaded`.
        """
        if bounded and self.requests >= self._settings.max_requests:
            raise Overloaded(
                f"{self.requests} requests are under way, as many as --max-requests allows; ask again after the "
                "seconds of Retry-After"
            )
        self.requests += 1

        def leave() -> None:
            self.requests -= 1

        return _once(leave)

    def hold(self, size: int) -> None:
        """Count so many more bytes (or less) of bodies in memory.

        Raises:
            LockstepError: `overloaded`.
        """
        if size > 0 and self._body_bytes + size > self._settings.max_bodies_mib * 2**20:
            raise Overloaded(
                f"requests of --max-bodies-mib {self._settings.max_bodies_mib} are being read or worked on; ask again "
                "after the seconds of Retry-After"
            )
        self._body_bytes += size

    def _give_back(self, sequences: int) -> None:
        self.sequences -= sequences


def too_large(what: str, flag: str, limit: int) -> LockstepError:
    """What to answer a request beyond a limit."""
    return TooLarge(f"{what} are beyond the server's {flag} {limit}; split the request", limit=limit)


def _once(function: Callable[[], None]) -> Callable[[], None]:
    left = [function]

    def call() -> None:
        if left:
            left.pop()()

    return call
